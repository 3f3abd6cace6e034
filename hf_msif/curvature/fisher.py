"""Objectives whose gradients sample the Gauss-Newton matrix: labels are drawn from the model's own predictions.

The Gauss-Newton matrix of example i is Σ_t J_tᵀ H_t J_t, over the terms t of its loss, with the Jacobian J_t of the
outputs that a term reads and the Hessian H_t of the term in them. It is a second moment of gradients: for independent
random vectors c_t with E[c_t] = 0 and E[c_t c_tᵀ] = H_t, the gradient g_i = Σ_t J_tᵀ c_t has the second moment
E[g_i g_iᵀ] = Σ_t J_tᵀ H_t J_t, since the cross terms vanish (Martens, 2020). For a cross-entropy of weight w,
p = softmax(outputs) and a label ŷ drawn from p, c_t = √w (p − e_ŷ) is such a vector.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..objectives import Objective, with_losses
from ..objectives.tokens import seeded
from .padding import with_outputs

DENSE_OUTPUTS = 64  # outputs of a row for which H_t is written out, if the loss is no cross-entropy


class Fisher(Protocol):
    """Which gradients' second moments stand for the curvature."""

    def objectives(self, objective: Objective, ids: Sequence[Any]) -> list[Objective]:
        """Objectives for one batch: C_i is the sum of ∇ℓ_i ∇ℓ_iᵀ over them.

        Args:
            objective: that of the stage.
            ids: the `example_id` of each row of the batch.
        """
        ...


@dataclass(frozen=True)
class Empirical:
    """The rows' own labels: C_i = ∇ℓ_i ∇ℓ_iᵀ. No Gauss-Newton matrix, also not on average (Kunstner et al., 2019)."""

    def objectives(self, objective: Objective, ids: Sequence[Any]) -> list[Objective]:
        return [objective]


@dataclass(frozen=True)
class Sampled:
    """Labels drawn from the model's predictions: E[Σ g_i g_iᵀ] is the Gauss-Newton matrix of example i.

    A loss that is no softmax cross-entropy of the model's last outputs, but has few outputs per row, takes the square
    root of its Hessian times random signs for c_t, with negative eigenvalues taken for 0. Any other loss takes its own
    gradients, as `Empirical` does, with a warning.

    The random numbers are a function of the seed, the example and the number of the term alone.

    Args:
        draws: how often the labels are drawn; one pass over the data each.
        seed: of the labels.
    """

    draws: int = 1
    seed: int = 0

    def objectives(self, objective: Objective, ids: Sequence[Any]) -> list[Objective]:
        return [with_losses(objective, partial(self._losses, objective, ids, draw)) for draw in range(self.draws)]

    def _losses(
        self, objective: Objective, ids: Sequence[Any], draw: int, call: Callable, batch: dict
    ) -> tuple[Tensor, Tensor]:
        """(Σ_t ⟨c_t, outputs⟩, count) of every example, the first with the value 0: its gradient alone is used."""
        outputs = Outputs(call)
        sums, counts = objective.losses(outputs.first, batch)
        if not outputs.varying or not bool(counts.any()):  # no term at all
            return torch.zeros_like(sums) + sum(0 * outputs.tensors[k].sum() for k in outputs.varying), counts
        losses = partial(objective.losses, batch=batch)
        parts = cross_entropies(outputs, losses, sums)
        if parts is not None:
            # Labels of different outputs are independent, too.
            cotangents = [each.sampled(self._random(ids, draw + k * self.draws)) for k, each in enumerate(parts)]
        else:
            roots = square_roots(outputs, losses, len(sums))
            if roots is None:
                warnings.warn(
                    f"the losses of {type(objective).__name__} are neither cross-entropies nor functions of "
                    f"{DENSE_OUTPUTS} outputs per row: the curvature is estimated by their own gradients "
                    "(the empirical Fisher), which are no sample of the Gauss-Newton matrix.",
                    stacklevel=2,
                )
                return objective.losses(call, batch)
            cotangents = [roots.sampled(self._random(ids, draw))]
        products = [
            _Product.apply(each.outputs, each.values / math.sqrt(self.draws), each.examples, len(sums))
            for each in cotangents
        ]
        return torch.stack(products).sum(0), counts

    def _random(self, ids: Sequence[Any], draw: int) -> Callable[[Tensor], Tensor]:
        """(M,) examples of M terms → (M,) uniform numbers; those of an example do not depend on the others."""

        def uniform(examples: Tensor) -> Tensor:
            number = torch.bincount(examples, minlength=len(ids)).tolist()
            drawn = [
                torch.from_numpy(seeded(self.seed, example, draw).random(n))
                for example, n in zip(ids, number, strict=True)
            ]
            order = examples.argsort(stable=True)  # the terms of each example in their own order
            return torch.empty(len(examples), dtype=torch.float64, device=examples.device).index_copy_(
                0, order, torch.cat(drawn).to(examples.device)
            )

        return uniform


class Outputs:
    """A model's outputs, which a loss can read again at other values without running the model.

    Attributes:
        tensors: every floating-point tensor of the outputs, as the model made it.
        varying: numbers of those that depend on the parameters.
    """

    def __init__(self, call: Callable):
        self._call, self._outputs = call, list[Any]()
        self.tensors: list[Tensor] = []

    def first(self, **inputs):
        """Runs the model."""
        output = self._call(**inputs)
        self._outputs.append(output)

        def noted(t: Tensor) -> Tensor:
            self.tensors.append(t)
            return t.detach()

        return with_outputs(noted, lambda **_: output)()

    @property
    def varying(self) -> list[int]:
        return [k for k, t in enumerate(self.tensors) if t.requires_grad]

    def at(self, values: Sequence[Tensor]) -> Callable:
        """A call that returns the outputs with `values` in the place of `tensors`."""
        outputs, left = iter(self._outputs), iter(values)
        return with_outputs(lambda _: next(left), lambda **_: next(outputs))


class Cotangent(NamedTuple):
    """c_t of every row of an output.

    Attributes:
        outputs: the model's output, in the graph.
        values: the gradient that stands for that of the loss, shaped like `outputs`.
        examples: the example of each row; a row is the last axis.
    """

    outputs: Tensor
    values: Tensor
    examples: Tensor


class _Product(torch.autograd.Function):
    """Σ over the rows of each example of ⟨c_t, outputs⟩, (B,), with the value 0."""

    @staticmethod
    def forward(ctx, outputs: Tensor, values: Tensor, examples: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(values, examples)
        return outputs.new_zeros(size)

    @staticmethod
    def backward(ctx, weights: Tensor):
        values, examples = ctx.saved_tensors
        if bool((weights == 1).all()):
            return values, None, None, None
        return values * weights[examples].view(*values.shape[:-1], 1), None, None, None


def _changed(outputs: Outputs, values: dict[int, Tensor]) -> Callable:
    return outputs.at([values.get(k, t.detach()) for k, t in enumerate(outputs.tensors)])


def _tolerance(t: Tensor) -> float:
    return 1e4 * torch.finfo(t.dtype).eps


@dataclass
class CrossEntropies:
    """Σ_t w_t · −log softmax(z_t)[label_t].

    Attributes:
        outputs: z, (*, C).
        used: the rows with a weight; None: all of them.
        weights: (M,) w_t > 0 of the used rows.
        examples: the example of every row.
        probabilities: (M, C) softmax of the used rows.
    """

    outputs: Tensor
    used: Tensor | None
    weights: Tensor
    examples: Tensor
    probabilities: Tensor

    def sampled(self, uniform: Callable[[Tensor], Tensor]) -> Cotangent:
        """√w (p − e_ŷ), with ŷ drawn from p."""
        examples = self.examples if self.used is None else self.examples[self.used]
        cumulative = self.probabilities.cumsum(1)
        drawn = uniform(examples).to(cumulative).unsqueeze(1) * cumulative[:, -1:]
        labels = torch.searchsorted(cumulative, drawn, right=True).clamp(max=cumulative.shape[1] - 1)
        del cumulative
        return self.cotangent(labels)

    def cotangent(self, labels: Tensor) -> Cotangent:
        """√w (p − e_label), labels of shape (M, 1)."""
        roots = self.weights.sqrt().unsqueeze(1)
        values = self.probabilities * roots
        values.scatter_add_(1, labels, -roots)
        if self.used is not None:
            values = values.new_zeros(len(self.examples), values.shape[1]).index_put_((self.used,), values)
        return Cotangent(self.outputs, values.view_as(self.outputs), self.examples)


def cross_entropies(outputs: Outputs, losses: Callable, sums: Tensor) -> list[CrossEntropies] | None:
    """What the losses are, one entry per output that they read, if they are weighted softmax cross-entropies of the
    outputs' rows; else None.

    At outputs of 0 the slope of a term w · CE with the label y is w (1/C − e_y), which tells y and w without rounding,
    and by a second slope, with the loss of example i weighted by i + 1, the example. Then the losses at the true
    outputs must be those of these terms.

    Args:
        outputs: the model's outputs, read once.
        losses: of a call.
        sums: the losses of the examples at `outputs`.
    """
    zeros = {k: torch.zeros_like(outputs.tensors[k]).requires_grad_() for k in outputs.varying}
    total, _ = losses(_changed(outputs, zeros))
    if not total.requires_grad:
        return None
    slopes = _slopes(total.sum(), zeros, retain_graph=True)
    if not slopes:
        return None
    order = torch.arange(1.0, len(total) + 1, device=total.device, dtype=total.dtype)
    weighted = _slopes((order * total).sum(), {index: zeros[index] for index in slopes})
    parts, expected = [], torch.zeros_like(sums)
    for index, slope in slopes.items():
        found = _cross_entropies_of(outputs.tensors[index], slope, weighted[index], len(total))
        if found is None:
            return None
        part, terms = found
        expected.index_add_(0, part.examples if part.used is None else part.examples[part.used], terms)
        parts.append(part)
    return parts if bool(((sums - expected).abs() <= _tolerance(sums) * (1 + sums.abs())).all()) else None


def _cross_entropies_of(z: Tensor, slope: Tensor, weighted: Tensor, size: int) -> tuple[CrossEntropies, Tensor] | None:
    """The cross-entropies of the rows of one output and their values, by the slopes at 0; None where the slopes are
    others."""
    classes = slope.shape[-1]
    if slope.dim() < 2 or classes < 2:
        return None
    slope = slope.flatten(0, -2)
    labels = slope.argmin(1, keepdim=True)
    lowest = slope.gather(1, labels)
    weights = -lowest * classes / (classes - 1)
    limit = _tolerance(slope) * float(weights.max())
    slope = slope.scatter_add(1, labels, weights)
    if not float((torch.stack([slope.amax(1), slope.amin(1)], 1) - weights / classes).abs().max()) <= limit:
        return None
    growth = weighted.flatten(0, -2).gather(1, labels) / torch.where(lowest == 0, 1, lowest)
    examples = (growth.squeeze(1).round().long() - 1).clamp(0, size - 1)
    weights = weights.squeeze(1)
    used = (weights > limit).nonzero().squeeze(1) if bool((weights <= limit).any()) else None
    rows = z.detach().flatten(0, -2)
    if used is not None:
        rows, labels, weights = rows[used], labels[used], weights[used]
    logarithms = rows.log_softmax(1)
    terms = -weights * logarithms.gather(1, labels).squeeze(1)
    return CrossEntropies(z, used, weights, examples, logarithms.exp_()), terms


@dataclass
class SquareRoots:
    """A loss with few outputs per row, whose Hessian in them is made of one block per row.

    Attributes:
        outputs: z, (*, m).
        roots: (M, m, m) the symmetric square roots of the blocks.
        examples: (M,) the example of every row.
    """

    outputs: Tensor
    roots: Tensor
    examples: Tensor

    def sampled(self, uniform: Callable[[Tensor], Tensor]) -> Cotangent:
        """The square root of H_t times random signs."""
        size = self.roots.shape[-1]
        used = (self.roots != 0).any(2).flatten().nonzero().squeeze(1)  # padding does not move the others' numbers
        drawn = uniform(self.examples.repeat_interleave(size)[used])
        signs = self.roots.new_zeros(len(self.roots) * size)
        signs[used] = torch.where(drawn < 0.5, -1.0, 1.0).to(signs)
        values = (self.roots @ signs.view(-1, size, 1)).squeeze(2)
        return Cotangent(self.outputs, values.view_as(self.outputs), self.examples)


def square_roots(outputs: Outputs, losses: Callable, size: int) -> SquareRoots | None:
    """The square roots of the losses' Hessians in the rows of one output; None where these are not of that kind."""
    leaves = {k: outputs.tensors[k].detach().requires_grad_() for k in outputs.varying}
    total, _ = losses(_changed(outputs, leaves))
    if not total.requires_grad:
        return None
    order = torch.arange(1.0, size + 1, device=total.device, dtype=total.dtype)
    slopes = _slopes(total.sum(), leaves, create_graph=True)
    if len(slopes) != 1:
        return None
    ((index, slope),) = slopes.items()
    leaf, m = leaves[index], slope.shape[-1] if slope.dim() > 1 else 0
    if not 0 < m <= DENSE_OUTPUTS or not slope.requires_grad:
        return None
    weighted = torch.autograd.grad((order * total).sum(), leaf, create_graph=True)[0]

    def product(of: Tensor, v: Tensor) -> Tensor:
        return torch.autograd.grad(of, leaf, v, retain_graph=True)[0].flatten(0, -2).detach()

    units = torch.eye(m, dtype=leaf.dtype, device=leaf.device)
    blocks = torch.stack([product(slope, unit.expand_as(leaf)) for unit in units], dim=2)
    v = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(leaf)
    found, grown = product(slope, v), product(weighted, v)
    gap = found - (blocks @ v.flatten(0, -2).unsqueeze(2)).squeeze(2)
    limit = _tolerance(leaf) * float(found.norm())
    growth = (found * grown).sum(1) / found.square().sum(1).clamp(min=torch.finfo(leaf.dtype).tiny)
    examples = (growth.round().long() - 1).clamp(0, size - 1)
    mixing = grown - (examples + 1).unsqueeze(1) * found
    if not (float(gap.norm()) <= limit and float(mixing.norm()) <= limit * size):
        return None
    values, basis = torch.linalg.eigh((blocks + blocks.transpose(1, 2)).double() / 2)
    roots = (basis * values.clamp(min=0).sqrt().unsqueeze(1)) @ basis.transpose(1, 2)
    return SquareRoots(outputs.tensors[index], roots.to(leaf), examples)


def _slopes(total: Tensor, leaves: dict[int, Tensor], **settings) -> dict[int, Tensor]:
    """The gradients that are not zero."""
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, **settings)
    return {k: g for k, g in zip(leaves, found, strict=True) if g is not None and bool((g != 0).any())}
