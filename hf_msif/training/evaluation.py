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


def mistakes(
    model: nn.Module, objective: Objective, data: Any, batch_size: int = 64, engine: Engine | None = None
) -> list[dict]:
    """The rows whose predicted class is not their label, in their order; for objectives with `predictions`."""
    engine, objective = engine or Engine(progress=False), checked_objective(objective, "the evaluation", model)
    if objective.predictions is None:
        raise InputError(f"{type(objective).__name__} predicts no classes; expected an objective with `predictions`.")
    rows = as_rows(data, "the evaluation data")
    functional, mistaken = FunctionalModel(model, engine.device), []
    objective = without_padding(functional, objective, rows, engine)
    assert objective.predictions is not None  # as above
    with torch.no_grad(), functional.evaluating():
        for indices, batch in engine.batches(rows, objective, batch_size):
            wrong = objective.predictions(functional.bind({}), batch) != batch["labels"]
            mistaken += [i for i, is_wrong in zip(indices, wrong.tolist(), strict=True) if is_wrong]
    return [rows[i] for i in sorted(engine.gather(mistaken))]
