"""Derivatives of the summed losses of one batch: gradient, directional derivative, Hessian and Gauss-Newton products.

Each function takes an `Evaluation` (model, objective, batch) and returns *sums* over the batch's examples, never
means, in the dtype of the model's parameters. Costs are in units of F, one forward pass. Hessian products are computed
by double backward, Gauss-Newton products by forward mode and backward passes; `torch.func.hessian` and `jacrev` are
not used, since `jvp(jacrev(f))` is silently wrong through an affine LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import to_device
from ..objectives import Objective
from ..vectors import Block, columns


@dataclass
class Evaluation:
    """The per-example losses ℓ_i of one batch as a function of the parameters.

    Attributes:
        model: the model as a function of its parameters.
        objective: makes losses of the model's outputs.
        batch: what `objective.collate` returned, on the model's device.
        memo: stores the outputs of constant encoder modules between calls, see `FunctionalModel.bind`; None: nothing
            is stored.
    """

    model: FunctionalModel
    objective: Objective
    batch: dict[str, Any]
    memo: dict | None = None

    def losses(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(sums, counts), both (B,), at `parameters`; parameters whose names are missing keep the model's value.

        `sums` has each example's summed loss, `counts` its number of terms (e.g. masked tokens).
        """
        return self.objective.losses(self.model.bind(parameters, self.memo), self.batch)

    def leaves(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The model's values of the parameters `names`, as new leaves that require a gradient."""
        return {name: self.model.parameters[name].detach().requires_grad_() for name in names}


def parameters_in_use(
    model: FunctionalModel, objective: Objective, rows: list[dict], names: Iterable[str]
) -> tuple[str, ...]:
    """Those of `names` on which the losses of the first two rows depend."""
    device, names, used = next(iter(model.parameters.values())).device, list(names), set[str]()
    with model.evaluating():
        for row in rows[:2]:  # one at a time: a model without a pad token takes no more
            evaluation = Evaluation(model, objective, to_device(objective.collate([row]), device))
            leaves = evaluation.leaves(names)
            total = evaluation.losses(leaves)[0].sum()
            if total.requires_grad:
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                used |= {name for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return tuple(name for name in names if name in used)


def gradient(evaluation: Evaluation, names: Iterable[str]) -> dict[str, Tensor]:
    """Σ_i ∇ℓ_i with respect to `names`, as a plain vector (no axis of columns). Costs 3 F."""
    return gradient_and_losses(evaluation, names)[0]


def gradient_and_losses(evaluation: Evaluation, names: Iterable[str]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(`gradient`, sums, counts): the gradient, and what `Evaluation.losses` returns, from one forward pass."""
    leaves = evaluation.leaves(names)
    sums, counts = evaluation.losses(leaves)
    return _grad(sums.sum(), leaves), sums.detach(), counts


def example_gradients(evaluation: Evaluation, names: Iterable[str]) -> Block:
    """∇ℓ_i of every example with respect to `names`, one column per example: a block with Q = B.

    For a few test examples, not for a corpus: it needs a backward pass per example and holds B gradients.
    """
    leaves = evaluation.leaves(names)
    sums, _ = evaluation.losses(leaves)
    return _block(leaves, len(sums), (_grad(s, leaves, retain_graph=True) for s in sums))


def directional_derivatives(evaluation: Evaluation, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """⟨∇ℓ_i, direction⟩ for every example, by forward mode: no gradient is stored. Costs 3 F.

    Args:
        evaluation: the batch.
        direction: a plain vector (no axis of columns); parameters whose names are missing have a zero entry.

    Returns:
        (derivatives, sums, counts), each (B,): ⟨∇ℓ_i, direction⟩ and what `Evaluation.losses` returns.
    """
    with torch.no_grad(), forward_ad.dual_level():
        parameters = {
            name: forward_ad.make_dual(evaluation.model.parameters[name], tangent)
            for name, tangent in direction.items()
        }
        sums, counts = evaluation.losses(parameters)
        primal, tangent = forward_ad.unpack_dual(sums)
        return torch.zeros_like(primal) if tangent is None else tangent, primal, counts


def hessian_product(evaluation: Evaluation, v: Block, names: Iterable[str]) -> Block:
    """∂/∂names ⟨Σ_i ∇ℓ_i, v⟩ for every column of v.

    If `names` are those of v, this is the Hessian product; otherwise it is the product with the mixed second
    derivative. The graph of the gradient is built once for all Q columns: costs about (3 + 4 Q) F.

    Args:
        evaluation: the batch.
        v: a block of Q columns; the inner gradient ∇ℓ_i is with respect to its names.
        names: parameters of the outer derivative.

    Returns:
        A block of Q columns over `names`.
    """
    inner = evaluation.leaves(v)
    outer = {name: inner.get(name, leaf) for name, leaf in evaluation.leaves(names).items()}
    sums, _ = evaluation.losses({**outer, **inner})
    gradients = torch.autograd.grad(sums.sum(), list(inner.values()), create_graph=True, materialize_grads=True)
    curved = [(g, v[name]) for name, g in zip(inner, gradients, strict=True) if g.requires_grad]
    if not curved:  # the loss is linear in these parameters
        return {name: leaf.new_zeros(columns(v), *leaf.shape) for name, leaf in outer.items()}
    inner_gradients, last = [g for g, _ in curved], columns(v) - 1
    tangents = ([t[q] for _, t in curved] for q in range(last + 1))
    rows = (_grad(inner_gradients, outer, ts, retain_graph=q < last) for q, ts in enumerate(tangents))
    return _block(outer, columns(v), rows)


def gauss_newton_product(evaluation: Evaluation, v: Block) -> Block:
    """Jᵀ H_out J v for every column of v.

    J is the Jacobian of the model's outputs, H_out the Hessian of the summed losses in these outputs. It works for any
    objective: the model's outputs are cut from the loss, their forward-mode tangent is J v, double backward through
    the loss alone applies H_out, and one backward pass through the same evaluation of the model applies Jᵀ. Costs 5 F
    per column.

    Args:
        evaluation: the batch.
        v: a block of Q columns.

    Returns:
        A block of Q columns over the names of v.
    """
    rows = []
    for q in range(columns(v)):
        leaves = evaluation.leaves(v)
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf, v[name][q]) for name, leaf in leaves.items()}
            cut = _CutOutputs(evaluation.model.bind(duals, evaluation.memo))
            sums, _ = evaluation.objective.losses(cut, evaluation.batch)
        inputs = [leaf for _, _, leaf in cut.outputs]
        gradients = torch.autograd.grad(sums.sum(), inputs, create_graph=True, materialize_grads=True)
        pairs = [(g, tangent) for g, (_, tangent, _) in zip(gradients, cut.outputs, strict=True) if g.requires_grad]
        if not pairs:
            rows.append({name: torch.zeros_like(leaf) for name, leaf in leaves.items()})
            continue
        products = torch.autograd.grad([g for g, _ in pairs], inputs, [t for _, t in pairs], materialize_grads=True)
        rows.append(_grad([primal for primal, _, _ in cut.outputs], leaves, list(products)))
    return {name: torch.stack([row[name] for row in rows]) for name in v}


class _CutOutputs:
    """A model call whose outputs are new leaves, cut from the graph; `outputs` has their (primal, tangent, leaf)."""

    def __init__(self, call: Callable):
        self.call = call
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, **inputs):
        output = self.call(**inputs)
        for key, value in list(output.items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                primal, tangent = forward_ad.unpack_dual(value)
                leaf = primal.detach()
                if tangent is not None:
                    leaf.requires_grad_()
                    self.outputs.append((primal, tangent.detach(), leaf))
                output[key] = leaf
        return output


def _block(like: Mapping[str, Tensor], number: int, rows: Iterable[Mapping[str, Tensor]]) -> Block:
    """A block of plain vectors, each written as soon as it is made: a list of them would hold the block twice."""
    block = {name: t.new_empty(number, *t.shape) for name, t in like.items()}
    for q, row in enumerate(rows):
        for name, t in row.items():
            block[name][q] = t
    return block


def _grad(
    outputs: Tensor | Sequence[Tensor],
    leaves: Mapping[str, Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """`torch.autograd.grad` by name; zeros for leaves on which the outputs do not depend."""
    grads = torch.autograd.grad(
        outputs,
        list(leaves.values()),
        grad_outputs,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, grads, strict=True))
