"""The Gauss-Newton matrix of a stage's objective: positive semi-definite, and the default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..errors import InputError
from ..vectors import Block, column, columns, rademacher
from .base import Curvature
from .derivatives import Evaluation, LinearBackward, _block, _grad, directional_derivatives


class GaussNewton(Curvature):
    """(1/N) Σ_i J_iᵀ H_i J_i, the Hessian without the curvature of the model's outputs (Schraudolph, 2002).

    J_i is the Jacobian of the model's outputs for example i, and H_i the Hessian of its loss in these outputs. For
    cross-entropy it equals the Fisher information. It is positive semi-definite wherever the loss is convex in the
    outputs, so that it stays meaningful away from a stationary point, which no real pretraining run reaches.
    """

    semidefinite: ClassVar[bool] = True

    def _product(self, evaluation: Evaluation, v: Block) -> Block:
        return gauss_newton_product(evaluation, v)


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
    more), and stores it as `FunctionalModel.linear_backward`. If not, every column is computed as the first one. Where
    a function of the model has no forward-mode derivative, all columns are computed as the further ones.

    Args:
        evaluation: the batch.
        v: a block of Q columns.

    Returns:
        A block of Q columns over the names of v.

    Raises:
        InputError: the model has neither a forward-mode derivative nor a backward pass that can be differentiated.
    """
    model = evaluation.model
    if model.forward_mode:
        try:
            product = _gauss_newton_columns(evaluation, v) if model.linear_backward is not False else None
            return _gauss_newton_one_by_one(evaluation, v) if product is None else product
        except _ForwardModeError as refused:
            model.refuse_forward_mode(refused.error)
    if model.linear_backward is None:  # the slopes along some direction that is not zero find it out
        like = {name: model.parameters[name] for name in v}
        directional_derivatives(evaluation, column(rademacher(like, 1, seed=0), 0))
    if model.linear_backward is False:
        raise InputError(
            f"{type(model.model).__name__} has no forward-mode derivative, and its backward pass cannot be "
            "differentiated: it has no curvature products; expected curvature='ekfac', which takes gradients alone, "
            "or solvers.Identity()."
        )
    return _gauss_newton_by_reverse_mode(evaluation, v)


class _ForwardModeError(Exception):
    """A function of the model has no forward-mode derivative."""

    def __init__(self, error: NotImplementedError):
        self.error = error


def _gauss_newton_one_by_one(evaluation: Evaluation, v: Block) -> Block:
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
        try:
            cut = _CutLoss(evaluation, duals)
        except NotImplementedError as error:
            raise _ForwardModeError(error) from error
    if not cut.curved:
        return {name: torch.zeros_like(t) for name, t in v.items()}
    w = cut.curvature(cut.tangents, retain_graph=last > 0)
    if last == 0:
        return {name: t.unsqueeze(0) for name, t in _grad(cut.outputs, leaves, w).items()}
    backward = LinearBackward(cut.outputs, leaves, w)
    if evaluation.model.linear_backward is None:
        evaluation.model.linear_backward = backward.confirms(cut.tangents, column(v, 0))
    if not evaluation.model.linear_backward:
        return None

    def rows() -> Iterator[dict[str, Tensor]]:
        yield backward.value
        yield from cut.products(backward, leaves, v, first=1)

    return _block(leaves, columns(v), rows())


def _gauss_newton_by_reverse_mode(evaluation: Evaluation, v: Block) -> Block:
    """`gauss_newton_product` without forward mode: J v of every column is the derivative of a backward pass."""
    leaves = evaluation.leaves(v)
    cut = _CutLoss(evaluation, leaves)
    if not cut.curved:
        return {name: torch.zeros_like(t) for name, t in v.items()}
    backward = LinearBackward(cut.outputs, leaves, [torch.ones_like(t) for t in cut.outputs])
    return _block(leaves, columns(v), cut.products(backward, leaves, v))


class _CutLoss:
    """The loss of a batch as a function of the model's outputs, which are cut from the model's graph.

    Args:
        evaluation: the batch.
        parameters: leaves, or duals of leaves.

    Attributes:
        outputs: those of the model, with their graph.
        tangents: of the outputs; zeros without duals.
        curved: whether the loss has a curvature in the outputs.
    """

    def __init__(self, evaluation: Evaluation, parameters: Mapping[str, Tensor]):
        self.call = evaluation.model.bind(parameters, evaluation.memo)
        self.outputs, self.tangents, self.leaves = list[Tensor](), list[Tensor](), list[Tensor]()
        sums, _ = evaluation.objective.losses(self._cut, evaluation.batch)
        gradients: tuple[Tensor, ...] = ()
        if self.leaves:
            gradients = torch.autograd.grad(sums.sum(), self.leaves, create_graph=True, materialize_grads=True)
        self.pairs = [(i, g) for i, g in enumerate(gradients) if g.requires_grad]
        self.curved = bool(self.pairs)

    def _cut(self, **inputs):
        output = self.call(**inputs)
        for key, value in list(output.items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                primal, tangent = forward_ad.unpack_dual(value)
                leaf = primal.detach()
                if primal.requires_grad:
                    leaf.requires_grad_()
                    self.outputs.append(primal)
                    self.tangents.append(torch.zeros_like(leaf) if tangent is None else tangent.detach())
                    self.leaves.append(leaf)
                output[key] = leaf
        return output

    def curvature(self, tangents: Sequence[Tensor], retain_graph: bool) -> list[Tensor]:
        """H_out times the tangents of the outputs."""
        slopes, along = [g for _, g in self.pairs], [tangents[i] for i, _ in self.pairs]
        return list(_grad(slopes, dict(enumerate(self.leaves)), along, retain_graph).values())

    def products(
        self, backward: LinearBackward, leaves: Mapping[str, Tensor], v: Block, first: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Jᵀ H_out J v of the columns from `first` on; `backward` and `leaves` are those of the outputs."""
        last = columns(v) - 1
        for q in range(first, last + 1):
            w = self.curvature(backward.tangents(column(v, q), q < last), q < last)
            yield _grad(self.outputs, leaves, w, retain_graph=q < last)
