"""What a run will cost, measured on one batch a stage, before anything is spent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from .autodiff import Evaluation
from .errors import InputError
from .stages import Link

if TYPE_CHECKING:
    from .run import Run

# In units of one forward pass (F) of the same rows, for one query column; measured by benchmarks/scoring.py.
PRODUCT = {"gauss_newton": 4.2, "hessian": 7.5}
SCORE = 3.0
MIXED = 6.0
SOLVER_BLOCKS = {"CG": 5, "SquaredCG": 6, "MinRes": 12, "Identity": 1, "Dense": 2}


def plan(run: Run) -> dict:
    """Split, memory, passes, time and disk of a run, and the text that says so.

    Stages that are not trained yet are measured with untrained weights; times are estimates from one batch.
    """
    columns = 1 if run.config.test.aggregate != "none" else len(run.config.test.ids or range(run.config.test.number))
    models = {}
    for name in run.names:
        try:
            models[name] = run.model(name)
        except InputError:
            models[name] = run._models[name] = run.new_model(name)
    chain = run.chain(models)
    lines, stages, disk = [], {}, 0
    for link in chain.links:
        stages[link.stage.name] = cost = _stage(link, columns)
        disk += cost["vector_bytes"]
        lines += [
            str(link.split),
            f"  one pass of {cost['curvature_examples']:,} rows: {cost['forward_seconds']:.1f} s forward, "
            f"{cost['product_seconds']:.1f} s a curvature product with {columns} column(s)",
            f"  solve: at most {cost['iterations']} iterations, {_time(cost['solve_seconds'])}; vectors "
            f"{_size(cost['solver_bytes'])}, model {_size(cost['model_bytes'])}",
        ]
    corpus = len(run.corpus())
    target = stages[run.config.corpus.stage or run.names[0]]
    seconds = corpus * target["forward_seconds"] / target["curvature_examples"] * SCORE * columns
    lines.append(f"scoring {corpus:,} rows for {columns} column(s): {_time(seconds)}")
    lines.append(f"disk: {_size(disk)} for the query, about {_size(corpus * (300 + 16 * columns))} for the scores")
    splits = {link.stage.name: link.split.table() for link in chain.links}
    return {"text": "\n".join(lines), "stages": stages, "splits": splits, "score_seconds": seconds, "disk_bytes": disk}


def _stage(link: Link, columns: int) -> dict:
    size = link.stage.batch_size
    rows = link._subset(min(4 * size, len(link.rows)))
    with torch.no_grad(), link.model.evaluating():
        batches = [batch for _, batch in link.engine.batches(rows, link.stage.objective.collate, size)]
        Evaluation(link.model, link.stage.objective, batches[0]).losses({})
        started = time.perf_counter()
        for batch in batches:
            Evaluation(link.model, link.stage.objective, batch).losses({})
        forward = (time.perf_counter() - started) / len(rows)
    examples = min(link.stage.curvature_samples or len(link.rows), len(link.rows))
    # With a frozen encoder a product costs little more than the head; its first pass pays for the encoder.
    product = forward * examples * (PRODUCT[link.stage.curvature] * columns if not link.split.frozen else 1.0)
    iterations = getattr(link.stage.solver, "max_iter", 0)
    width = sum(link.model.parameters[n].numel() * link.model.parameters[n].element_size() for n in link.split.trained)
    mixed = forward * examples * MIXED * columns if link.split.frozen else 0.0
    return {
        "forward_seconds": forward * examples,
        "curvature_examples": examples,
        "product_seconds": product,
        "iterations": iterations,
        "solve_seconds": iterations * product + mixed,
        "vector_bytes": width * columns,
        "solver_bytes": width * columns * SOLVER_BLOCKS[type(link.stage.solver).__name__],
        "model_bytes": sum(p.numel() * p.element_size() for p in link.model.parameters.values()),
    }


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
