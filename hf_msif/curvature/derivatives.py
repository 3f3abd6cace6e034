"""Derivatives of the summed losses of one batch: gradient, directional derivative, Hessian and Gauss-Newton products.

Each function takes an `Evaluation` (model, objective, batch) and returns *sums* over the batch's examples, never
means, in the dtype of the model's parameters. Costs are in units of F, one forward pass. Hessian products are computed
by double backward, Gauss-Newton products by forward mode and backward passes; `torch.func.hessian` and `jacrev` are
not used, since `jvp(jacrev(f))` is silently wrong through an affine LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import to_device
from ..objectives import Objective, Terms
from ..vectors import Block, column, columns


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

    def terms(self, parameters: Mapping[str, Tensor]) -> Terms:
        """The terms of `losses`, from an objective that says them."""
        assert self.objective.terms is not None
        return self.objective.terms(self.model.bind(parameters, self.memo), self.batch)

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
    with _moving(evaluation.model, direction) as parameters:
        sums, counts = evaluation.losses(parameters)
        return *_tangent_and_primal(sums), counts


def term_derivatives(evaluation: Evaluation, direction: Mapping[str, Tensor]) -> tuple[Tensor, Terms]:
    """⟨∇ℓ_t, direction⟩ for every term t of the losses, (M,), and the terms. Costs 3 F, as `directional_derivatives`,
    whose derivatives are the sums of these."""
    with _moving(evaluation.model, direction) as parameters:
        terms = evaluation.terms(parameters)
        tangent, primal = _tangent_and_primal(terms.losses)
        return tangent, terms._replace(losses=primal)


@contextmanager
def _moving(model: FunctionalModel, direction: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The parameters of a direction with their tangents, for forward mode."""
    with torch.no_grad(), forward_ad.dual_level():
        yield {name: forward_ad.make_dual(model.parameters[name], tangent) for name, tangent in direction.items()}


def _tangent_and_primal(dual: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent, primal


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
    objective: the model's outputs are cut from the loss, their tangent is J v, double backward through the loss alone
    applies H_out, and one backward pass through the same evaluation of the model applies Jᵀ.

    J v of the first column comes from forward mode. Its backward pass w ↦ Jᵀ w is linear in w, and the derivative of
    ⟨Jᵀ w, v⟩ in w is J v: it serves the other columns, so that the model runs once for all of them. Costs about
    5 F for the first column and 4.2 F for each further one. Autograd holds the graphs of two passes for any Q > 1, and
    of one for Q = 1.

    The first product with several columns finds out whether the model's backward pass can be differentiated (2.2 F
    more), and stores it as `FunctionalModel.linear_backward`. If not, every column is computed as the first one.

    Args:
        evaluation: the batch.
        v: a block of Q columns.

    Returns:
        A block of Q columns over the names of v.
    """
    product = _gauss_newton_columns(evaluation, v) if evaluation.model.linear_backward is not False else None
    if product is not None:
        return product

    def rows() -> Iterator[dict[str, Tensor]]:
        for q in range(columns(v)):
            alone = _gauss_newton_columns(evaluation, {name: t[q : q + 1] for name, t in v.items()})
            assert alone is not None
            yield column(alone, 0)

    return _block(column(v, 0), columns(v), rows())


def _gauss_newton_columns(evaluation: Evaluation, v: Block) -> Block | None:
    """`gauss_newton_product` by one run of the model; None if Q > 1 and the backward pass is not known to allow it."""
    leaves, last = evaluation.leaves(v), columns(v) - 1
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(leaf, v[name][0]) for name, leaf in leaves.items()}
        cut = _CutOutputs(evaluation.model.bind(duals, evaluation.memo))
        sums, _ = evaluation.objective.losses(cut, evaluation.batch)
    outputs, tangents, inputs = ([triple[i] for triple in cut.outputs] for i in range(3))
    gradients = torch.autograd.grad(sums.sum(), inputs, create_graph=True, materialize_grads=True)
    curved = [i for i, g in enumerate(gradients) if g.requires_grad]
    if not curved:  # the loss is linear in the outputs
        return {name: torch.zeros_like(t) for name, t in v.items()}

    def curvature(tangents: Sequence[Tensor], retain_graph: bool) -> list[Tensor]:
        """H_out times the tangents of the outputs."""
        pairs = [(gradients[i], tangents[i]) for i in curved]
        along = [t for _, t in pairs]
        return list(_grad([g for g, _ in pairs], dict(enumerate(inputs)), along, retain_graph).values())

    w = curvature(tangents, retain_graph=last > 0)
    if last == 0:
        return {name: t.unsqueeze(0) for name, t in _grad(outputs, leaves, w).items()}
    backward = _LinearBackward(outputs, leaves, w)
    if evaluation.model.linear_backward is None:
        evaluation.model.linear_backward = backward.confirms(tangents, column(v, 0))
    if not evaluation.model.linear_backward:
        return None

    def rows() -> Iterator[dict[str, Tensor]]:
        yield backward.value
        for q in range(1, last + 1):
            products = curvature(backward.tangents(column(v, q), q < last), q < last)
            yield _grad(outputs, leaves, products, retain_graph=q < last)

    return _block(leaves, columns(v), rows())


class _LinearBackward:
    """The linear map w ↦ Jᵀ w, at one w, with the graph by which it can be differentiated.

    Attributes:
        value: Jᵀ w, by name.
    """

    def __init__(self, outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], w: Sequence[Tensor]):
        self.w = [t.detach().requires_grad_() for t in w]
        self.results = _grad(outputs, leaves, self.w, retain_graph=True, create_graph=True)
        self.value = {name: t.detach() for name, t in self.results.items()}

    def tangents(self, v: Mapping[str, Tensor], retain_graph: bool) -> list[Tensor]:
        """J v: the derivative of ⟨Jᵀ w, v⟩ in w."""
        results = {name: t for name, t in self.results.items() if t.requires_grad}
        if not results:
            return [torch.zeros_like(t) for t in self.w]
        along = [v[name] for name in results]
        return list(_grad(list(results.values()), dict(enumerate(self.w)), along, retain_graph).values())

    def confirms(self, tangents: Sequence[Tensor], v: Mapping[str, Tensor]) -> bool | None:
        """Whether J v is `tangents`, which forward mode found; None if these are zero and say nothing.

        It is not where autograd does not know the derivative of a backward pass, or where a backward pass hides from
        autograd what it does with w.
        """
        try:
            pairs = list(zip(tangents, self.tangents(v, retain_graph=True), strict=True))
        except RuntimeError as error:
            if not any(text in str(error) for text in ("not implemented", "differentiate twice")):
                raise
            return False
        size = sum(float(t.double().square().sum()) for t, _ in pairs)
        gap = sum(float((t - s).double().square().sum()) for t, s in pairs)
        if not gap <= size * max(torch.finfo(t.dtype).eps for t, _ in pairs):  # of rounding, it is of the order eps²
            return False
        return True if size else None


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


Key = TypeVar("Key", str, int)


def _grad(
    outputs: Tensor | Sequence[Tensor],
    leaves: Mapping[Key, Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> dict[Key, Tensor]:
    """`torch.autograd.grad` by name or number; zeros for leaves on which the outputs do not depend."""
    grads = torch.autograd.grad(
        outputs,
        list(leaves.values()),
        grad_outputs,
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, grads, strict=True))
