"""The mean loss and the accuracy of a model on rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters.functional import FunctionalModel
from ..curvature.derivatives import Evaluation
from ..curvature.padding import without_padding
from ..engine.accelerated import Engine
from ..engine.corpus import as_rows
from ..errors import InputError
from ..objectives import Objective, checked_objective


def evaluate(
    model: nn.Module, objective: Objective, data: Any, batch_size: int = 64, engine: Engine | None = None
) -> dict[str, float]:
    """Σ ℓ / Σ counts over `data` without dropout, and the accuracy where the objective predicts classes.

    Where padding reaches the loss, batches of rows of equal length are used.

    Args:
        model: evaluated at its present parameters; not changed.
        objective: an object of `hf_msif.objectives`, or of your own subclass of `objectives.Objective`.
        data: the examples: a `datasets.Dataset`, a list of dicts that the objective reads, or a list of strings.
        batch_size: rows per batch.
        engine: runs the passes; made when none is given.

    Returns:
        {"loss", "examples"} and, for classification, "accuracy". The loss is a mean over counted terms.

    Raises:
        InputError: bad rows, or rows without a counted term.
    """
    engine, objective = engine or Engine(progress=False), checked_objective(objective, "the evaluation", model)
    rows = as_rows(data, "the evaluation data")
    functional = FunctionalModel(model, engine.device)
    objective = without_padding(functional, objective, rows, engine)
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
    measures = {"loss": losses / counts, "examples": len(rows)}
    return measures | ({"accuracy": right / len(rows)} if objective.predictions is not None else {})


def predicted(
    model: nn.Module, objective: Objective, data: Any, batch_size: int = 64, engine: Engine | None = None
) -> list[int]:
    """The predicted class of each row, in their order; for objectives with `predictions`.

    Raises:
        InputError: bad rows, or an objective without `predictions`.
    """
    return [number for number, _ in _predicted(model, objective, data, batch_size, engine)]


def mistakes(
    model: nn.Module, objective: Objective, data: Any, batch_size: int = 64, engine: Engine | None = None
) -> list[dict]:
    """The rows whose predicted class is not their label, in their order; for objectives with `predictions`.

    Raises:
        InputError: bad rows, or an objective without `predictions`.
    """
    rows = as_rows(data, "the evaluation data")
    pairs = _predicted(model, objective, rows, batch_size, engine)
    return [row for row, (number, label) in zip(rows, pairs, strict=True) if number != label]


def _predicted(
    model: nn.Module, objective: Objective, data: Any, batch_size: int, engine: Engine | None
) -> list[tuple[int, int]]:
    """The predicted class and the label of each row."""
    engine, objective = engine or Engine(progress=False), checked_objective(objective, "the evaluation", model)
    if objective.predictions is None:
        raise InputError(f"{type(objective).__name__} predicts no classes; expected an objective with `predictions`.")
    rows, share = as_rows(data, "the evaluation data"), list[tuple[int, int, int]]()
    functional = FunctionalModel(model, engine.device)
    objective = without_padding(functional, objective, rows, engine)
    assert objective.predictions is not None  # as above
    with torch.no_grad(), functional.evaluating():
        for indices, batch in engine.batches(rows, objective, batch_size):
            numbers = objective.predictions(functional.bind({}), batch)
            share += zip(indices, numbers.tolist(), batch["labels"].tolist(), strict=True)
    return [(number, label) for _, number, label in sorted(engine.gather(share))]
