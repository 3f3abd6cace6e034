"""What encoders make of rows: their mean outputs, and the cosines of these."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.split import encoder
from ..objectives import Objective, tokenized
from .chain import BoundStage


def representations(bound: BoundStage, rows: list[dict]) -> np.ndarray:
    """Encoder outputs (rows, features) of all rows, in their order, on every process.

    An output is the mean over the real tokens of a text, or over the positions of an image.

    Args:
        bound: the stage whose model reads the rows.
        rows: as the objective of the stage reads them.
    """
    engine, objective = bound.engine, bound.objective
    outputs: list[tuple[int, list[float]]] = []
    with torch.no_grad(), bound.model.evaluating():
        for indices, batch in engine.batches(
            rows, objective, bound.stage.batch_size, lambda batch_rows: _inputs(objective, batch_rows)
        ):
            outputs += zip(indices, _pooled(bound, batch).double().tolist(), strict=True)
    return np.array([row[1] for row in sorted(engine.gather(outputs))])


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosine of every row with every other one, (rows, others); 0 where either is zero.

    >>> cosines(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[0.0, 2.0]]))
    array([[0.8],
           [0. ]])
    """
    return _unit(rows) @ _unit(others).T


def _inputs(objective: Objective, rows: list[dict]) -> dict:
    """The encoder's inputs: the whole text, unmasked; without a tokenizer the objective's batch without its labels."""
    if objective.tokenizer is not None:
        return tokenized(objective, rows)
    names, batch = objective.inputs, objective.collate(rows)
    return {name: batch[name] for name in names} if names else {k: v for k, v in batch.items() if k != "labels"}


def _pooled(bound: BoundStage, inputs: dict) -> Tensor:
    """The encoder's output of a batch as (B, features): a mean over real tokens, or over image positions."""
    parameters = bound.model.parameters
    base: Any = encoder(bound.stage.model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        base = base.get_encoder()  # there is no target to decode
    values = {id(p): parameters[name] for name, p in bound.stage.model.named_parameters()}
    state = {name: values[id(p)] for name, p in base.named_parameters()}
    buffers = {name: b.to(bound.engine.device) for name, b in base.named_buffers()}
    output = torch.func.functional_call(base, {**state, **buffers}, kwargs=inputs)
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        states = output if isinstance(output, Tensor) else output[0]
    if states.dim() == 3 and "attention_mask" in inputs:
        weights = inputs["attention_mask"].to(states).unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    if states.dim() == 3:
        return states.mean(1)
    return states.flatten(2).mean(2) if states.dim() == 4 else states.flatten(1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
