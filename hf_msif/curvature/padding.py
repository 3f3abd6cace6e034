"""Whether the loss of a row depends on the rows beside it in a batch, as it does where padding reaches the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import Engine, to_device
from ..engine.batching import row_cost, row_shape
from ..objectives import Objective
from .derivatives import Evaluation, parameters_in_use

# Relative differences of equal gradients. (BERT-base in float32: up to 1e-5 between a row alone and a row in a batch.
# Some models compute parts in float32, whatever their parameters are.)
ROUNDING = {torch.float64: 1e-6}
ROUNDING_OF_OTHERS = 1e-4
COMPARED_PARAMETERS = 2**22
SEARCHED_ROWS = 1000  # among which rows of different length are searched
COMPARED_ROWS = 8  # a model may select tokens, and a single pair of rows show nothing of it


@dataclass(frozen=True)
class BatchEffect:
    """How far the losses of rows and their gradients move with the rows beside them, relative to their sizes.

    Attributes:
        beside_others: of rows of different length, alone and together.
        beside_equals: of rows alone and beside themselves; 0.0 where `beside_others` is rounding, and nothing was
            measured.
        padded: whether rows were padded beside the others.
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


def rows_of_all_lengths(rows: Sequence[dict], objective: Objective) -> list[dict]:
    """Up to `COMPARED_ROWS` of the rows that have a term, from the shortest to the longest one, evenly spread."""
    ascending = sorted(rows, key=lambda row: row_cost(row, objective))
    longest = next((row for row in reversed(ascending) if _has_terms(row, objective)), None)
    compared: list[dict] = []
    for n in range(COMPARED_ROWS - 1):
        start, end = (k * (len(ascending) - 1) // (COMPARED_ROWS - 1) for k in (n, n + 1))
        found = next((row for row in ascending[start:end] if row is not longest and _has_terms(row, objective)), None)
        compared += [] if found is None else [found]
    return compared + ([] if longest is None else [longest])


def _has_terms(row: dict, objective: Objective) -> bool:
    return objective.counts is None or bool(objective.counts(objective.collate([row])).sum() > 0)


def batch_effect(
    model: FunctionalModel, objective: Objective, rows: Sequence[dict], names: Iterable[str]
) -> BatchEffect:
    """Compares the losses and gradients of n rows alone and together, in n + 1 gradients, and n more of twice the same
    row where they differ.

    Losses are `tempered`. Gradients are compared as Σ_i g_i / ‖g_i‖, g_i being those of the rows alone: one backward
    pass for all rows of a batch. Only as many of the parameters `names` as have 4 million entries take part, the
    smallest tensors first (in most models biases and normalisations of all layers): the comparison needs little memory
    beside the activations.

    Args:
        model: at the parameters at which the losses are differentiated.
        objective: makes batches of rows and losses of the model's outputs.
        rows: rows of different length.
        names: parameters on which the losses depend.
    """
    compared: list[str] = []
    total = 0
    for name in sorted(names, key=lambda name: model.parameters[name].numel()):
        total += model.parameters[name].numel()
        if compared and total > COMPARED_PARAMETERS:
            break
        compared.append(name)
    limit, beside_equals = rounding(next(iter(model.parameters.values())).dtype), 0.0
    with model.evaluating(), without_tf32():
        measure = partial(_measured, model, tempered(objective, model, rows), compared)
        alone = [measure([row]) for row in rows]
        weights = [1 / norm if (norm := float(gradient.norm())) else 0.0 for _, gradient in alone]
        losses = torch.cat([loss for loss, _ in alone])
        gradient = torch.stack([weight * g for weight, (_, g) in zip(weights, alone, strict=True)]).sum(0)
        beside_others = _difference((losses, gradient), measure(rows, weights))
        if beside_others > limit:
            for row, weight, (loss, g) in zip(rows, weights, alone, strict=True):
                twice = measure([row, row], [weight / 2, weight / 2])
                beside_equals = max(beside_equals, _difference((loss.repeat(2), weight * g), twice))
    shapes = {row_shape(row, objective) for row in rows}
    return BatchEffect(beside_others, beside_equals, len(shapes) > 1, limit)


def without_padding(
    model: FunctionalModel,
    objective: Objective,
    rows: Sequence[dict],
    engine: Engine,
    names: Sequence[str] | None = None,
) -> Objective:
    """The objective, `unpadded()` where padding reaches the model's losses and batches of equal length keep it out.

    Args:
        model: at its present parameters.
        objective: reads the rows.
        rows: some of them are compared.
        engine: tells all processes what the main one found.
        names: parameters on which the losses depend; defaults to all such parameters.
    """
    compared = rows_of_all_lengths(rows[:SEARCHED_ROWS], objective) if objective.pads else []
    if len({row_shape(row, objective) for row in compared}) < 2:
        return objective
    with engine.raising_together():
        names = parameters_in_use(model, objective, compared, model.parameters) if names is None else names
        effect = batch_effect(model, objective, compared, names)
    effect = engine.broadcast_object(effect)
    return objective.unpadded() if effect.reaches_loss and effect.equal_lengths_help else objective


def tempered(objective: Objective, model: FunctionalModel, rows: Sequence[dict]) -> Objective:
    """The objective, which reads the model's outputs divided by their largest entry for these rows.

    The loss of a row that the model has learned by heart, and its derivatives, are differences of nearly equal
    numbers, whose rounding would look like an error. At such outputs they are not, and read the same numbers.
    """
    largest = [0.0]

    def noted(output: Any) -> Any:
        values = [output] if isinstance(output, Tensor) else output.values()
        floats = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
        largest.extend(float(t.abs().max()) for t in floats if t.numel())
        return output

    with torch.no_grad(), model.evaluating():
        for row in rows:
            objective.losses(_then(noted, model.bind({})), _batch(model, objective, [row]))
    scale = max(largest) or 1.0

    def divided(output: Any) -> Any:
        if isinstance(output, Tensor):
            return output / scale
        for key, value in list(output.items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                output[key] = value / scale
        return output

    changed = copy.copy(objective)
    object.__setattr__(changed, "losses", lambda call, batch: objective.losses(_then(divided, call), batch))
    return changed


def _then(change: Callable, call: Callable) -> Callable:
    return lambda **inputs: change(call(**inputs))


def _batch(model: FunctionalModel, objective: Objective, rows: Sequence[dict]) -> dict[str, Any]:
    return to_device(objective.collate(rows), next(iter(model.parameters.values())).device)


def _measured(
    model: FunctionalModel,
    objective: Objective,
    names: list[str],
    rows: Sequence[dict],
    weights: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """The losses of the rows of a batch, and the gradient of their weighted sum, flat; both in float64."""
    evaluation = Evaluation(model, objective, _batch(model, objective, rows))
    leaves = evaluation.leaves(names)
    sums, _ = evaluation.losses(leaves)
    total = (sums * torch.tensor(weights, dtype=sums.dtype, device=sums.device)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return sums.detach().double(), torch.cat([g.reshape(-1).double() for g in gradients])


def _difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The larger one of the largest relative difference of a loss (of at least 1), and of the norm of the difference
    of the gradients, which are sums of vectors of norm 1."""
    losses = (one[0] - other[0]).abs() / torch.maximum(one[0].abs(), other[0].abs()).clamp(min=1.0)
    return max(float(losses.max()), float((one[1] - other[1]).norm()))
