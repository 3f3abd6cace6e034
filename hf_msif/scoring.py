"""Scores a corpus for a query by per-example directional derivatives; no per-example gradient is ever stored."""

from __future__ import annotations

import numpy as np
import torch

from . import vectors
from .autodiff import Evaluation, directional
from .engine import as_rows
from .errors import InputError
from .query import Query, describe
from .scores import Scores


def score(query: Query, corpus, stage: str | None = None, batch_size: int | None = None) -> Scores:
    """I(x) = −⟨u_k, ∇ℓ_x⟩ for every row x of `corpus`: one forward-mode pass a query column, 3 F a column.

    Raises:
        InputError: empty corpus, unknown stage, a batch size below 1, or a loss that is not finite (rows are named).
    """
    link = query.chain.link(stage)
    rows = as_rows(corpus, "the corpus")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1, or None for the stage's own.")
    engine, objective = link.engine, link.stage.objective
    u = query.solutions[link.stage.name]
    found = []
    bar = engine.bar(total=len(rows), desc=f"scoring {link.stage.name}", unit=" rows")
    with bar, link.model.evaluating():
        for indices, batch in engine.batches(rows, objective.collate, batch_size or link.stage.batch_size):
            evaluation = Evaluation(link.model, objective, batch)
            influence = []
            for q in range(query.columns):
                slopes, sums, counts = directional(evaluation, vectors.column(u, q))
                influence.append(-slopes.double())
            influence = torch.stack(influence, 1)
            _check_finite(torch.column_stack([sums, influence]), [rows[i] for i in indices])
            cut = batch.get("truncated", torch.zeros(len(indices)))
            values = (influence.tolist(), sums.tolist(), counts.tolist(), cut.tolist())
            found += list(zip(indices, *values, strict=True))
            bar.update(len(indices) * engine.accelerator.num_processes)
    found = sorted(engine.gather(found))
    metadata = {"stage": link.stage.name, "N": link.count, "objective": describe(objective)}
    metadata |= {
        "truncated": int(sum(row[4] for row in found)),
        "certificate": query.certificate(),
        "tests": query.tests,
    }
    return Scores.build(
        rows=[rows[index] for index, *_ in found],
        influence=np.array([row[1] for row in found]),
        count=link.count,
        text_column=getattr(objective, "text_column", getattr(objective, "image_column", "text")),
        columns={"loss": [row[2] for row in found], "terms": [row[3] for row in found]},
        metadata=metadata,
    )


def _check_finite(values: torch.Tensor, rows: list[dict]) -> None:
    fine = torch.isfinite(values).all(1).tolist()
    bad = [row["example_id"] for row, ok in zip(rows, fine, strict=True) if not ok]
    if bad:
        raise InputError(
            f"the loss (or its derivative) of the rows with example_id {bad[:5]} is not finite: check the model's "
            "weights and inputs."
        )
