"""What a run will cost, measured on one batch a stage, before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .. import vectors
from ..adapters.functional import memo_bytes
from ..curvature.base import MEMO_BYTES, TRACE_PROBES
from ..curvature.derivatives import Evaluation, directional
from ..engine.corpus import Stream, first
from ..influence.chain import Link
from ..influence.unrolled import held_bytes
from ..training.optimisers import start
from ..training.record import compose
from ..training.replay import Replay
from .memory import activation_bytes, attended, available_bytes, size, solver_bytes

if TYPE_CHECKING:
    from .run import Run


def plan(run: Run, processes: int = 1) -> dict:
    """Split, memory, passes, time and disk of a run, and the text that says so.

    Stages that are not trained yet are measured with untrained weights; times are estimates from one batch, those of
    several processes without what they spend on telling each other.
    """
    models = {name: run.present_model(name) for name in run.names}
    columns = 1 if run.aggregate else len(run.tests())
    streamed = isinstance(run.rows(run.ranked), Stream)
    corpus = run.config.corpus.sample if streamed else len(run.corpus())
    chain = run.chain(models, planned=True)
    lines, stages = [], {}
    for link in chain.links:
        name = link.stage.name
        lines.append(str(link.split) + ("" if run.is_trained(name) else "\n  not trained yet: untrained weights"))
        if run.config.stages[name].link == "unrolled":
            stages[name] = cost = _unrolled(link, run.arguments(name), columns)
            lines += [
                f"  run of {cost['steps']:,} steps of up to {cost['step_rows']} rows: "
                f"{_time(cost['training_seconds'])} to train; back through it with {columns} column(s) "
                f"{_time(cost['solve_seconds'])}",
                f"  {cost['states_held']} states of {size(cost['state_bytes'])} held at a time, with adjoints "
                f"{size(cost['solver_bytes'])}; model {size(cost['model_bytes'])}; {cost['states_kept']} states on "
                f"disk, {size(cost['disk_bytes'])}",
            ]
            continue
        stages[name] = cost = _stage(link, columns, processes)
        lines += [
            f"  one pass of {cost['curvature_examples']:,} rows: {_time(cost['forward_seconds'])} forward, "
            f"{_time(cost['product_seconds'])} a curvature product with {columns} column(s)",
            f"  solve: at most {cost['products']:,} products, {_time(cost['solve_seconds'])}",
            f"  memory on each of {processes} process(es): vectors {size(cost['solver_bytes'])}, model "
            f"{size(cost['model_bytes'])}, a batch's activations {size(cost['activation_bytes'])}"
            + (f", outputs of the frozen encoder {size(cost['memo_bytes'])}" if cost["memo_bytes"] else ""),
        ]
    one = stages[run.ranked]["score_seconds_a_row"] * columns / processes
    seconds, counted = one * (corpus or 1000), f"{corpus:,} rows" if corpus else "1,000 rows of the stream"
    disk = sum(cost["vector_bytes"] + cost.get("disk_bytes", 0) for cost in stages.values())
    lines += [
        f"scoring {counted} for {columns} column(s): {_time(seconds)}",
        f"disk: {size(disk)} for the query and recorded runs, about {size((corpus or 1000) * (300 + 16 * columns))} "
        f"for the scores of {counted}",
    ]
    needed = max(cost["solver_bytes"] + cost.get("activation_bytes", 0) for cost in stages.values())
    free = available_bytes(chain.engine.device)
    lines.append(f"memory: {size(needed)} at a time on each process beside the models, of {size(free)} free")
    if needed > free:
        lines.append("this does not fit: msif query would refuse (see memory_check)")
    splits = {link.stage.name: link.split.table() for link in chain.links}
    return {
        "text": "\n".join(lines),
        "stages": stages,
        "splits": splits,
        "score_seconds": seconds,
        "disk_bytes": disk,
        "memory_bytes": needed,
        "free_bytes": free,
    }


def _stage(link: Link, columns: int, processes: int) -> dict:
    """Costs of a stage. A product is timed with the outputs of constant modules in the memo, as all passes but the
    first find them, and on one batch of middling length; a full pass is so much longer as its forward passes are."""
    stage, solver = link.stage, link.stage.solver
    batch_size, examples = stage.batch_size, stage.curvature_samples
    if not isinstance(link.rows, Stream):
        examples = min(examples or len(link.rows), len(link.rows))
    wanted = min(4 * batch_size, examples)
    rows = first(link.rows, wanted) if isinstance(link.rows, Stream) else link.subset(wanted)
    batches = list(link.engine.batches(rows, stage.objective, batch_size))
    indices, batch = batches[len(batches) // 2]
    widest, _ = max(batches, key=lambda found: attended(found[1]))
    operator = link.curvature([rows[i] for i in indices])
    v = vectors.rademacher(operator.parameters, columns, seed=0)
    plain, width = Evaluation(link.model, stage.objective, batch), vectors.numel(operator.parameters)
    with torch.no_grad(), link.model.evaluating():
        operator.count, plain.losses({})  # the first pass pays for what later ones find ready
        one = _seconds(plain.losses, {})
        every = sum(_seconds(replace(plain, batch=batch).losses, {}) for _, batch in batches) / len(rows) * examples
        score = _seconds(directional, plain, vectors.column(v, 0)) / one * every / examples
    cold = _seconds(operator.matvec, v, once=True)
    memo = memo_bytes(operator.evaluations[0].memo or {}) / len(indices) * examples
    warm = _seconds(operator.matvec, v) if memo or cold < 0.2 else cold
    cold, warm = ((cold if memo else warm) * every / one, warm * every / one)
    kept = min(1.0, MEMO_BYTES / memo) if memo else 0.0
    usual = kept * warm + (1 - kept) * cold
    products = _products(solver, width, columns)
    mixed = every * (3 + 4 * columns) if link.split.frozen else 0.0  # of autodiff.hessian_product
    every, cold, usual, mixed = (seconds / processes for seconds in (every, cold, usual, mixed))
    vector_bytes = sum(t.numel() * t.element_size() for t in v.values())
    return {
        "forward_seconds": every,
        "curvature_examples": examples,
        "first_product_seconds": cold,
        "product_seconds": usual,
        "products": products,
        "solve_seconds": products * usual + (cold - usual if products else 0.0) + mixed,
        "score_seconds_a_row": score,
        "vector_bytes": vector_bytes,
        "solver_bytes": solver_bytes(link, solver, columns, processes),
        "activation_bytes": activation_bytes(link.curvature([rows[i] for i in widest])),
        "memo_bytes": int(kept * memo) if products else 0,
        "model_bytes": sum(p.numel() * p.element_size() for p in link.model.parameters.values()),
    }


def _unrolled(link: Link, arguments, columns: int) -> dict:
    """Costs of a stage that is pulled back through its run, from two of its steps there and back."""
    stage, rows = link.stage, link.rows
    run, replay = link.recording, getattr(link, "replay", None)
    if run is None:
        run = compose(link.model, stage.objective, rows, arguments, link.split, stage.weight_decay)
        replay = Replay(link.model, stage.objective, rows, run, link.engine, link.split, name=stage.name)
    slots = start(run.optimiser, {name: link.model.parameters[name] for name in run.trained})
    names = (*link.split.trained, *link.split.frozen)
    a = vectors.rademacher({name: link.model.parameters[name] for name in names}, columns, seed=0)
    adjoint, last = replay.adjoint(a), run.steps - 1
    forward = _seconds(replay.forward, slots, 0)
    backward = _seconds(replay.backward, slots, min(1, last), adjoint)
    state = run.bytes_of(link.model.parameters)
    step_rows = max(map(len, run.schedule.rows))
    return {
        "steps": run.steps,
        "step_rows": step_rows,
        "training_seconds": run.steps * forward,
        "solve_seconds": run.steps * (forward + backward),
        "score_seconds_a_row": forward / step_rows / 3 / columns,
        "state_bytes": state,
        "states_held": run.interval + 2,
        "states_kept": len(run.saved_steps),
        "solver_bytes": held_bytes(run, link.model.parameters, columns),
        "vector_bytes": 8 * columns * len(rows),
        "disk_bytes": len(run.saved_steps) * state,
        "model_bytes": sum(p.numel() * p.element_size() for p in link.model.parameters.values()),
    }


def _products(solver, parameters: int, columns: int) -> int:
    """Most products with all columns that a solve takes: iterations, the estimate of the damping, the final check."""
    kind = type(solver).__name__
    if kind == "Identity":
        return 0
    if kind == "Dense":
        return -(-parameters // columns) + 1
    estimate = -(-TRACE_PROBES // columns) if solver.damping == "auto" else 0
    return solver.max_iter * (2 if kind == "SquaredCG" else 1) + estimate + (3 if kind == "SquaredCG" else 1)


def _seconds(work: Callable, *arguments, once: bool = False) -> float:
    """Wall time, the best of three where that costs nothing."""
    found = []
    while not found or (not once and len(found) < 3 and sum(found) < 0.2):
        started = time.perf_counter()
        work(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.2g} s" if seconds < 10 else f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"
