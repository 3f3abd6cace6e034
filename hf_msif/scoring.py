"""Scores a corpus for a query by per-example directional derivatives; no per-example gradient is ever stored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import vectors
from .autodiff import Evaluation, directional
from .digests import describe, digest
from .engine import as_rows
from .errors import InputError
from .query import Query
from .scores import Scores
from .stages import Link
from .vectors import Block


def score(query: Query, corpus, stage: str | None = None, batch_size: int | None = None) -> Scores:
    """I(x) = −⟨u_k, ∇ℓ_x⟩ for every row x of `corpus`: one forward-mode pass a query column, 3 F a column.

    Of an unrolled stage the rows are its own, and I(x) = N ∂f/∂w_x is known already; a forward pass adds their losses.

    Raises:
        InputError: empty corpus, unknown stage, a batch size below 1, a loss that is not finite (rows are named), or a
            row that an unrolled stage's run did not see.
    """
    link = query.chain.link(stage)
    rows = as_rows(corpus, "the corpus")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1, or None for the stage's own.")
    engine, objective = link.engine, link.stage.objective
    u = query.solutions[link.stage.name]
    recorded = _recorded(link, u, rows) if link.recording is not None else None
    found = []
    bar = engine.bar(total=len(rows), desc=f"scoring {link.stage.name}", unit=" rows")
    with bar, link.model.evaluating():
        for indices, batch in engine.batches(rows, objective.collate, batch_size or link.stage.batch_size):
            evaluation = Evaluation(link.model, objective, batch)
            if recorded is not None:
                influence = recorded[indices]
                with torch.no_grad():
                    sums, counts = evaluation.losses({})
            else:
                slopes, sums, counts = [], None, None
                for q in range(query.columns):
                    slope, sums, counts = directional(evaluation, vectors.column(u, q))
                    slopes.append(-slope.double())
                influence = torch.stack(slopes, 1)
            _check_finite(torch.column_stack([sums, influence]), [rows[i] for i in indices])
            cut = batch.get("truncated", torch.zeros(len(indices)))
            values = (influence.tolist(), sums.tolist(), counts.tolist(), cut.tolist())
            found += list(zip(indices, *values, strict=True))
            bar.update(len(indices) * engine.processes)
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


def _recorded(link: Link, u: Block, rows: list[dict]) -> Tensor:
    """N ∂f/∂w of the rows, (rows, Q)."""
    places = {row["example_id"]: (i, digest(row)) for i, row in enumerate(link.rows)}
    for row in rows:
        if places.get(row["example_id"], ("", ""))[1] != digest(row):
            raise InputError(
                f"the row {row['example_id']!r} is not one of the rows that stage {link.stage.name!r} was trained on: "
                "through its run (link='unrolled') only those have an influence. Score rows of its data, or use "
                "link='proximal'."
            )
    return link.count * u["weights"].T[[places[row["example_id"]][0] for row in rows]]


def _check_finite(values: torch.Tensor, rows: list[dict]) -> None:
    fine = torch.isfinite(values).all(1).tolist()
    bad = [row["example_id"] for row, ok in zip(rows, fine, strict=True) if not ok]
    if bad:
        raise InputError(
            f"the loss (or its derivative) of the rows with example_id {bad[:5]} is not finite: check the model's "
            "weights and inputs."
        )
