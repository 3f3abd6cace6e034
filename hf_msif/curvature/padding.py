"""Whether the loss of a row depends on the rows beside it in a batch, as it does where padding reaches the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import to_device
from ..engine.batching import row_cost, row_shape
from ..objectives import Objective
from .derivatives import Evaluation

# Relative differences of equal gradients. (BERT-base in float32: up to 1e-5 between a row alone and a row in a batch.
# Some models compute parts in float32, whatever their parameters are.)
ROUNDING = {torch.float64: 1e-6}
ROUNDING_OF_OTHERS = 1e-4
COMPARED_PARAMETERS = 2**22
SEARCHED_ROWS = 1000  # among which a short and a long one are searched


@dataclass(frozen=True)
class BatchEffect:
    """How far the loss of a row and its gradient move with the rows beside it, relative to their norms.

    Attributes:
        beside_others: the larger one of a short and a long row, alone and together.
        beside_equals: the same of rows of equal length, alone and beside themselves; 0.0 where `beside_others` is
            rounding, and nothing was measured.
        padded: whether one row was padded beside the other one.
        rounding: up to where a difference counts as rounding.
    """

    beside_others: float
    beside_equals: float
    padded: bool
    rounding: float

    @property
    def reaches_loss(self) -> bool:
        """Whether the loss of a row depends on other rows in its batch."""
        return self.beside_others > self.rounding

    @property
    def equal_lengths_help(self) -> bool:
        """Whether it does not in batches of rows of equal length, which need no padding."""
        return self.padded and self.beside_equals <= self.rounding


def rounding(dtype: torch.dtype) -> float:
    """The relative difference up to which two computations of the same number agree in `dtype`."""
    return ROUNDING.get(dtype, ROUNDING_OF_OTHERS)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, convolutions and matrix products on a GPU have all bits of float32, so that rounding is rounding."""
    backends: Any = torch.backends
    kernels = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [kernel.fp32_precision for kernel in kernels]
    try:
        for kernel in kernels:
            kernel.fp32_precision = "ieee"
        yield
    finally:
        for kernel, precision in zip(kernels, before, strict=True):
            kernel.fp32_precision = precision


def short_and_long(rows: Sequence[dict], objective: Objective) -> tuple[dict, dict] | None:
    """The rows of least and of largest length that have a term; None if fewer than two rows have."""
    order = sorted(range(len(rows)), key=lambda i: row_cost(rows[i], objective))
    short, long = (next((i for i in some if _has_terms(rows[i], objective)), None) for some in (order, order[::-1]))
    return None if short is None or long is None or short == long else (rows[short], rows[long])


def _has_terms(row: dict, objective: Objective) -> bool:
    return objective.counts is None or bool(objective.counts(objective.collate([row])).sum() > 0)


def batch_effect(
    model: FunctionalModel, objective: Objective, short: dict, long: dict, names: Iterable[str]
) -> BatchEffect:
    """Compares the losses and gradients of two rows alone and together, in at most eight gradients of one or two rows.

    Only as many of the parameters `names` as have 4 million entries take part, the smallest tensors first (in most
    models biases and normalisations of all layers): the comparison then needs no memory beside the activations.

    Args:
        model: at the parameters at which the losses are differentiated.
        objective: makes batches of rows and losses of the model's outputs.
        short, long: two rows of different length.
        names: parameters on which the losses depend.
    """
    compared: list[str] = []
    total = 0
    for name in sorted(names, key=lambda name: model.parameters[name].numel()):
        total += model.parameters[name].numel()
        if compared and total > COMPARED_PARAMETERS:
            break
        compared.append(name)
    with model.evaluating(), without_tf32():
        alone = [_measured(model, objective, [row], compared)[0] for row in (short, long)]
        together = _measured(model, objective, [short, long], compared)
        beside_others = max(_difference(*pair) for pair in zip(alone, together, strict=True))
        limit, beside_equals = rounding(next(iter(model.parameters.values())).dtype), 0.0
        if beside_others > limit:
            for row, expected in zip((short, long), alone, strict=True):
                for value in _measured(model, objective, [row, row], compared):
                    beside_equals = max(beside_equals, _difference(expected, value))
    padded = row_shape(short, objective) != row_shape(long, objective)
    return BatchEffect(beside_others, beside_equals, padded, limit)


def without_padding(
    model: FunctionalModel, objective: Objective, rows: Sequence[dict], names: Sequence[str]
) -> Objective:
    """The objective, `unpadded()` where padding reaches the model's losses and batches of equal length keep it out."""
    pair = short_and_long(rows[:SEARCHED_ROWS], objective) if objective.pads else None
    if pair is None or row_shape(pair[0], objective) == row_shape(pair[1], objective):
        return objective
    effect = batch_effect(model, objective, *pair, names)
    return objective.unpadded() if effect.reaches_loss and effect.equal_lengths_help else objective


def _measured(
    model: FunctionalModel, objective: Objective, rows: list[dict], names: list[str]
) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient (flat) of every row of one batch."""
    device = next(iter(model.parameters.values())).device
    evaluation = Evaluation(model, objective, to_device(objective.collate(rows), device))
    leaves = evaluation.leaves(names)
    sums, _ = evaluation.losses(leaves)
    results = []
    for i, loss in enumerate(sums):
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=i + 1 < len(sums), allow_unused=True, materialize_grads=True
        )
        results.append((loss.detach().double(), torch.cat([g.reshape(-1).double() for g in gradients])))
    return results


def _difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The larger one of the relative differences of two losses and of two gradients."""
    return max(
        float((x - y).norm() / torch.maximum(x.norm(), y.norm()).clamp(min=1e-30))
        for x, y in zip(one, other, strict=True)
    )
