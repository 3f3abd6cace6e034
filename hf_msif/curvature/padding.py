"""Whether the loss of a row depends on the rows beside it in a batch, as it does where padding reaches the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..adapters.functional import FunctionalModel, without_tf32
from ..engine.accelerated import Engine, to_device
from ..engine.batching import row_cost, row_shape
from ..objectives import Objective
from .derivatives import Evaluation, parameters_in_use

# Relative differences of equal gradients: of a row alone and in a batch, up to 1e-5 in BERT-base in float32, and up to
# 3e-6 where parameters are float64 and the model computes parts (normalisation, rotary positions) in float32.
ROUNDING = {torch.float64: 1e-6}
ROUNDING_OF_OTHERS = 1e-4
ROUNDING_IN_PARTS = 1e-5
MIXING = 100  # times rounding: what rows of equal length must not do to each other
LARGEST = 4.0  # of the outputs that a tempered loss reads: a softmax of them is not saturated
MASKED = 1e30  # an output beyond stands for minus infinity
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
        """Whether the loss of a row depends on other rows in its batch. (What rows of equal length differ by, computed
        by the same kernels, is rounding unless it is large.)"""
        padding_reaches = self.padded and self.beside_others > max(self.rounding, 10 * self.beside_equals)
        return padding_reaches or self.mixes

    @property
    def mixes(self) -> bool:
        """Whether rows depend on each other that need no padding."""
        equals = self.beside_equals if self.padded else self.beside_others
        return equals > MIXING * self.rounding


def rounding(model: FunctionalModel, objective: Objective, row: dict) -> float:
    """The relative difference up to which two computations of the same number agree.

    A loss that is computed in float64 throughout is smooth: of its values at θ, θ (1 + h), θ (1 + 2h) the second
    difference vanishes for h = 1e-10. Where parts are computed in float32, it is their rounding.
    """
    dtype = next(iter(model.parameters.values())).dtype
    if dtype != torch.float64:
        return ROUNDING_OF_OTHERS
    batch = _batch(model, objective, [row])
    with torch.no_grad(), model.evaluating():
        first, second, third = (
            Evaluation(model, objective, batch).losses({n: p * (1 + k * 1e-10) for n, p in model.parameters.items()})[
                0
            ]
            for k in range(3)
        )
    bend = (first - 2 * second + third).abs() / first.abs().clamp(min=1.0)
    return ROUNDING_IN_PARTS if float(bend.max()) > 1e-12 else ROUNDING[dtype]


def rows_of_all_lengths(rows: Sequence[dict], objective: Objective) -> list[dict]:
    """Up to `COMPARED_ROWS` of the rows that have a term, from the shortest to the longest one, evenly spread.

    Where all texts have one length, shorter ones are made of the longest one: what is scored later may be shorter.
    """
    ascending = sorted(rows, key=lambda row: row_cost(row, objective))
    longest = next((row for row in reversed(ascending) if _has_terms(row, objective)), None)
    if longest is None:
        return []
    compared: list[dict] = []
    for n in range(COMPARED_ROWS - 1):
        start, end = (k * (len(ascending) - 1) // (COMPARED_ROWS - 1) for k in (n, n + 1))
        found = next((row for row in ascending[start:end] if row is not longest and _has_terms(row, objective)), None)
        compared += [] if found is None else [found]
    compared.append(longest)
    if len({row_shape(row, objective) for row in compared}) == 1:
        compared = [*_shorter(longest, objective), *compared[-2:]]
    return compared


def _shorter(row: dict, objective: Objective) -> list[dict]:
    """The row with the first half and the first quarter of its words, where it has a text of several words."""
    column = objective.text_column
    text = None if column is None else row.get(column)
    words = text.split() if isinstance(text, str) else []
    cut = [{**row, column: " ".join(words[: len(words) // part])} for part in (4, 2) if len(words) >= 2 * part]
    cut = cut or ([{**row, column: words[0]}] if len(words) > 1 else [])
    return [other for other in cut if _has_terms(other, objective)]


def _has_terms(row: dict, objective: Objective) -> bool:
    return objective.counts is None or bool(objective.counts(objective.collate([row])).sum() > 0)


def batch_effect(
    model: FunctionalModel, objective: Objective, rows: Sequence[dict], names: Iterable[str]
) -> BatchEffect:
    """Compares the losses and gradients of n rows alone and together, in n + 1 gradients, and n more of twice the same
    row where they differ.

    Losses are `tempered`. Gradients are compared as Σ_i g_i / ‖g_i‖, g_i being those of the rows alone: one backward
    pass for all rows of a batch. Only the `smallest` of the parameters `names` take part: the comparison needs little
    memory beside the activations.

    Args:
        model: at the parameters at which the losses are differentiated.
        objective: makes batches of rows and losses of the model's outputs.
        rows: rows of different length.
        names: parameters on which the losses depend.
    """
    compared, beside_equals = smallest(model, names), 0.0
    with model.evaluating(), without_tf32():
        tempered_objective = tempered(objective, model, rows)
        limit = rounding(model, tempered_objective, rows[-1])
        measure = partial(_measured, model, tempered_objective, compared)
        alone = [measure([row]) for row in rows]
        norms = [float(gradient.norm()) for _, gradient in alone]
        weights = [
            1 / norm if norm > limit / 10 else 0.0 for norm in norms
        ]  # of a gradient of 0 only rounding is left
        losses = torch.cat([loss for loss, _ in alone])
        gradient = torch.zeros_like(alone[0][1])
        for weight, (_, g) in zip(weights, alone, strict=True):
            gradient.add_(g, alpha=weight)
        beside_others = _difference((losses, gradient), measure(rows, weights))
        if beside_others > limit:
            for row, weight, (loss, g) in zip(rows, weights, alone, strict=True):
                twice = measure([row, row], [weight / 2, weight / 2])
                beside_equals = max(beside_equals, _difference((loss.repeat(2), weight * g), twice))
    shapes = {row_shape(row, objective) for row in rows}
    return BatchEffect(beside_others, beside_equals, len(shapes) > 1, limit)


def smallest(model: FunctionalModel, names: Iterable[str]) -> list[str]:
    """Those of the parameters `names` that have 4 million entries together, the smallest tensors first (in most models
    biases and normalisations of all layers); at least one."""
    result: list[str] = []
    total = 0
    for name in sorted(names, key=lambda name: model.parameters[name].numel()):
        total += model.parameters[name].numel()
        if result and total > COMPARED_PARAMETERS:
            break
        result.append(name)
    return result


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
    return objective.unpadded() if effect.reaches_loss and not effect.mixes else objective


def tempered(objective: Objective, model: FunctionalModel, rows: Sequence[dict]) -> Objective:
    """The objective, which reads the model's outputs divided by a number that leaves none of them above `LARGEST`.

    The loss of a row that the model has learned by heart, and its derivatives, are differences of nearly equal
    numbers, whose rounding would look like an error. At such outputs they are not, and read the same numbers.
    """
    largest = [0.0]

    def noted(t: Tensor) -> Tensor:
        sizes = t.abs()
        sizes = sizes[sizes < MASKED]
        largest.append(float(sizes.max()) if sizes.numel() else 0.0)
        return t

    with torch.no_grad(), model.evaluating():
        for row in rows:
            objective.losses(with_outputs(noted, model.bind({})), _batch(model, objective, [row]))
    scale = max(1.0, max(largest) / LARGEST)
    changed = copy.copy(objective)
    losses = objective.losses
    object.__setattr__(changed, "losses", lambda call, batch: losses(with_outputs(lambda t: t / scale, call), batch))
    return changed


def with_outputs(change: Callable[[Tensor], Tensor], call: Callable) -> Callable:
    """`call`, every number of whose output `change` has changed. An output that is no nest of tensors stays."""

    def changed(**inputs):
        output = call(**inputs)
        if isinstance(output, MutableMapping):  # a `ModelOutput`, whose attributes are its items
            for key, value in list(output.items()):
                output[key] = tree_map(each, value)
            return output
        return tree_map(each, output)

    def each(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return changed


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
    of the gradients, which are sums of vectors of norm 1. Infinite where one is not finite."""
    losses = (one[0] - other[0]).abs() / torch.maximum(one[0].abs(), other[0].abs()).clamp(min=1.0)
    larger = max(float(losses.max()), float((one[1] - other[1]).norm()))
    return larger if losses.isfinite().all() and math.isfinite(larger) else math.inf
