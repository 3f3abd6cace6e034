"""The mean loss and the accuracy of a model on rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters.functional import FunctionalModel
from ..curvature.derivatives import Evaluation
from ..engine.accelerated import Engine
from ..engine.corpus import as_rows
from ..errors import InputError
from ..objectives import checked_objective


def evaluate(
    model: nn.Module, objective: Any, data: Any, batch_size: int = 64, engine: Engine | None = None
) -> dict[str, float]:
    """Σ ℓ / Σ counts over `data` without dropout, and the accuracy where the objective predicts classes.

    Returns:
        {"loss", "examples"} and, for classification, "accuracy".

    Raises:
        InputError: bad rows, or rows without a counted term.
    """
    engine, objective = engine or Engine(progress=False), checked_objective(objective, "the evaluation")
    rows = as_rows(data, "the evaluation data")
    functional = FunctionalModel(model, engine.device)
    parts = []
    with torch.no_grad(), functional.evaluating():
        for _, batch in engine.batches(rows, objective, batch_size):
            evaluation = Evaluation(functional, objective, batch)
            sums, counts = evaluation.losses({})
            right = 0.0
            if objective.predictions is not None:
                right = float((objective.predictions(functional.bind({}), batch) == batch["labels"]).sum())
            parts.append((float(sums.double().sum()), float(counts.double().sum()), right))
    losses, counts, right = (sum(column) for column in zip(*engine.gather(parts), strict=True))
    if counts == 0:
        raise InputError(
            f"none of the {len(rows)} rows of the evaluation data has a term that counts: are their texts empty?"
        )
    found = {"loss": losses / counts, "examples": len(rows)}
    return found | ({"accuracy": right / len(rows)} if objective.predictions is not None else {})


def mistakes(
    model: nn.Module, objective: Any, data: Any, batch_size: int = 64, engine: Engine | None = None
) -> list[dict]:
    """The rows whose predicted class is not their label, in their order; for objectives with `predictions`."""
    engine = engine or Engine(progress=False)
    rows = as_rows(data, "the evaluation data")
    functional, found = FunctionalModel(model, engine.device), []
    with torch.no_grad(), functional.evaluating():
        for indices, batch in engine.batches(rows, objective, batch_size):
            wrong = objective.predictions(functional.bind({}), batch) != batch["labels"]
            found += [i for i, bad in zip(indices, wrong.tolist(), strict=True) if bad]
    return [rows[i] for i in sorted(engine.gather(found))]
