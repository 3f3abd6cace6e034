"""Derivatives of the summed losses of one batch: gradient, directional derivative, Hessian and Gauss-Newton products.

Each function takes an `Evaluation` (model, objective, batch) and returns *sums* over the batch's examples, never
means. Second derivatives are double-backward or forward-over-forward-and-backward; `torch.func.hessian` and `jacrev`
are not used, since `jvp(jacrev(f))` is silently wrong through an affine LayerNorm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import placed
from ..vectors import Block, columns


@dataclass
class Evaluation:
    """The per-example losses of one batch as a function of the parameters."""

    model: FunctionalModel
    objective: Any
    batch: dict[str, Any]
    memo: dict | None = None

    def losses(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(sums, counts), both (B,), at `parameters`; names that are missing keep the model's value."""
        return self.objective.losses(self.model.bind(parameters, self.memo), self.batch)

    def leaves(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.model.parameters[name].detach().requires_grad_() for name in names}


def reached(model: FunctionalModel, objective: Any, rows: list[dict], names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that the losses of the first rows depend on."""
    device = next(iter(model.parameters.values())).device
    evaluation = Evaluation(model, objective, placed(objective.collate(rows[:2]), device))
    with model.evaluating():
        leaves = evaluation.leaves(names)
        total = evaluation.losses(leaves)[0].sum()
        if not total.requires_grad:
            return ()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return tuple(name for name, g in zip(leaves, found, strict=True) if g is not None)


def gradient(evaluation: Evaluation, names: Iterable[str]) -> dict[str, Tensor]:
    """Σ_i ∇ℓ_i with respect to `names`, as a plain vector. Cost 3 F (F: one forward pass)."""
    leaves = evaluation.leaves(names)
    sums, _ = evaluation.losses(leaves)
    return _grad(sums.sum(), leaves)


def example_gradients(evaluation: Evaluation, names: Iterable[str]) -> Block:
    """∇ℓ_i of every example of the batch, one column an example. For a handful of test examples, not for a corpus."""
    leaves = evaluation.leaves(names)
    sums, _ = evaluation.losses(leaves)
    rows = [_grad(s, leaves, retain_graph=True) for s in sums]
    return {name: torch.stack([row[name] for row in rows]) for name in leaves}


def directional(evaluation: Evaluation, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """⟨∇ℓ_i, direction⟩ for every example by forward mode; nothing of a gradient's size is stored. Cost 3 F.

    Returns:
        (derivatives, sums, counts), each (B,).
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
    """∂/∂names ⟨Σ_i ∇ℓ_i, v⟩ for every column of v: where `names` are v's own the Hessian product, else the mixed one.

    The gradient's graph is built once and shared by the columns: cost (3 + about 4 Q) F.
    """
    inner = evaluation.leaves(v)
    outer = {name: inner.get(name, leaf) for name, leaf in evaluation.leaves(names).items()}
    sums, _ = evaluation.losses({**outer, **inner})
    gradients = torch.autograd.grad(sums.sum(), list(inner.values()), create_graph=True, materialize_grads=True)
    curved = [(g, v[name]) for name, g in zip(inner, gradients, strict=True) if g.requires_grad]
    if not curved:  # the loss is linear in these parameters
        return {name: leaf.new_zeros(columns(v), *leaf.shape) for name, leaf in outer.items()}
    slopes, last = [g for g, _ in curved], columns(v) - 1
    rows = [_grad(slopes, outer, [t[q] for _, t in curved], retain_graph=q < last) for q in range(columns(v))]
    return {name: torch.stack([row[name] for row in rows]) for name in outer}


def gauss_newton_product(evaluation: Evaluation, v: Block) -> Block:
    """Jᵀ H_out J v for every column of v: J the Jacobian of the model's outputs, H_out the losses' Hessian in them.

    Works for any objective: the model's output is cut from the loss, J v is its forward-mode tangent, H_out is
    applied to it by double backward through the loss alone, and Jᵀ is one backward pass through the same evaluation.
    Cost 5 F a column.
    """
    rows = []
    for q in range(columns(v)):
        leaves = evaluation.leaves(v)
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf, v[name][q]) for name, leaf in leaves.items()}
            cut = _Cut(evaluation.model.bind(duals, evaluation.memo))
            sums, _ = evaluation.objective.losses(cut, evaluation.batch)
        inputs = [leaf for _, _, leaf in cut.outputs]
        slopes = torch.autograd.grad(sums.sum(), inputs, create_graph=True, materialize_grads=True)
        pairs = [(g, tangent) for g, (_, tangent, _) in zip(slopes, cut.outputs, strict=True) if g.requires_grad]
        if not pairs:
            rows.append({name: torch.zeros_like(leaf) for name, leaf in leaves.items()})
            continue
        bent = torch.autograd.grad([g for g, _ in pairs], inputs, [t for _, t in pairs], materialize_grads=True)
        rows.append(_grad([primal for primal, _, _ in cut.outputs], leaves, list(bent)))
    return {name: torch.stack([row[name] for row in rows]) for name in v}


class _Cut:
    """Runs a call and hands its outputs on as fresh leaves, keeping (primal with graph, tangent, leaf) of each."""

    def __init__(self, call):
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


def _grad(outputs, leaves: Mapping[str, Tensor], grad_outputs=None, retain_graph: bool = False) -> dict[str, Tensor]:
    grads = torch.autograd.grad(
        outputs,
        list(leaves.values()),
        grad_outputs,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, grads, strict=True))
