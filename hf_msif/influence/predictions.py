"""What the finetuned model says of the test rows: the predicted class, its probability, and the label's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..objectives.classification import class_names, label_name
from .chain import BoundStage


def predictions(bound: BoundStage, rows: Sequence[dict]) -> list[dict[str, Any]]:
    """What the model of the last stage says of each test row.

    Args:
        bound: the last stage.
        rows: its test rows.

    Returns:
        One entry per row. For a classification of whole rows: `label` and `prediction`, names of classes, and
        `probability`, that of the predicted class, in [0, 1]; for other objectives nothing.
    """
    objective = bound.objective
    if objective.logits is None:
        return [{} for _ in rows]
    names = class_names(objective, bound.model.model)
    share: list[tuple[int, dict[str, Any]]] = []
    with torch.no_grad(), bound.model.evaluating():
        for indices, batch in bound.engine.batches(rows, objective, bound.batch_size):
            probabilities = objective.logits(bound.model.bind({}), batch).double().softmax(1)
            most = probabilities.max(1)
            columns = (t.tolist() for t in (batch["labels"], most.indices, most.values))
            for i, label, number, probability in zip(indices, *columns, strict=True):
                named = {"label": label_name(label, names), "prediction": label_name(number, names)}
                share.append((i, {**named, "probability": probability}))
    return [prediction for _, prediction in sorted(bound.engine.gather(share), key=lambda item: item[0])]
