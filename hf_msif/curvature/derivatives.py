"""Derivatives of the summed losses of one batch: gradient, directional derivative, Hessian and Gauss-Newton products.

Each function takes an `Evaluation` (model, objective, batch) and returns *sums* over the batch's examples, never
means, in the dtype of the model's parameters. Costs are in units of F, one forward pass. Hessian products are computed
by double backward, Gauss-Newton products by forward mode and backward passes; `torch.func.hessian` and `jacrev` are
not used, since `jvp(jacrev(f))` is silently wrong through an affine LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..adapters.functional import FunctionalModel, precision_advice
from ..engine.accelerated import to_device
from ..errors import InputError, first_line
from ..objectives import Objective, Terms
from ..vectors import Block, columns

Other = TypeVar("Other")


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
    """Those of `names` on which the losses of the first two rows depend.

    Raises:
        InputError: the model has no backward pass in evaluation mode, or a gradient is not finite.
    """
    device, names, used = next(iter(model.parameters.values())).device, list(names), set[str]()
    with model.evaluating():
        for row in rows[:2]:  # one at a time: a model without a pad token takes no more
            evaluation = Evaluation(model, objective, to_device(objective.collate([row]), device))
            leaves = evaluation.leaves(names)
            total = evaluation.losses(leaves)[0].sum()
            if total.requires_grad:
                try:
                    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                except (AssertionError, NotImplementedError) as error:
                    raise InputError(
                        f"{type(model.model).__name__} has no gradient in evaluation mode ({first_line(error)}); "
                        "expected a model whose backward pass works without dropout: influence is that of its losses "
                        "as it predicts."
                    ) from error
                slopes = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
                for name, g in slopes.items():
                    if not g.isfinite().all():
                        raise InputError(
                            f"the gradient of {type(model.model).__name__} in {name!r} is not finite at the row "
                            f"{row['example_id']!r}; expected numbers: check its weights, leave the row out"
                            f"{precision_advice(g.dtype)}."
                        )
                used |= set(slopes)
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

    Where a function of the model has no forward-mode derivative, the derivative in w of ⟨Σ_i w_i ∇ℓ_i, direction⟩
    gives the same by two backward passes, about 4 F; where a backward pass cannot be differentiated either, a backward
    pass per example does.

    Args:
        evaluation: the batch.
        direction: a plain vector (no axis of columns); parameters whose names are missing have a zero entry.

    Returns:
        (derivatives, sums, counts), each (B,): ⟨∇ℓ_i, direction⟩ and what `Evaluation.losses` returns.
    """
    return _derivatives(evaluation.model, direction, evaluation.losses)


def term_derivatives(evaluation: Evaluation, direction: Mapping[str, Tensor]) -> tuple[Tensor, Terms]:
    """⟨∇ℓ_t, direction⟩ for every term t of the losses, (M,), and the terms. Costs 3 F, as `directional_derivatives`,
    whose derivatives are the sums of these."""

    def losses_and_terms(parameters: Mapping[str, Tensor]) -> tuple[Tensor, Terms]:
        terms = evaluation.terms(parameters)
        return terms.losses, terms

    derivatives, losses, terms = _derivatives(evaluation.model, direction, losses_and_terms)
    return derivatives, terms._replace(losses=losses)


def _derivatives(
    model: FunctionalModel,
    direction: Mapping[str, Tensor],
    losses: Callable[[Mapping[str, Tensor]], tuple[Tensor, Other]],
) -> tuple[Tensor, Tensor, Other]:
    """The derivatives of the first value of `losses(parameters)`, (M,), along a direction; and both its values."""
    if model.forward_mode:
        try:
            with torch.no_grad(), forward_ad.dual_level():
                dual, other = losses({n: forward_ad.make_dual(model.parameters[n], t) for n, t in direction.items()})
                primal, tangent = forward_ad.unpack_dual(dual)
                return torch.zeros_like(primal) if tangent is None else tangent, primal, other
        except NotImplementedError as error:
            model.refuse_forward_mode(error)
    leaves = {name: model.parameters[name].detach().requires_grad_() for name in direction}
    with torch.enable_grad():
        values, other = losses(leaves)
        return _reverse_derivatives(model, values, leaves, direction), values.detach(), other


def _reverse_derivatives(
    model: FunctionalModel, values: Tensor, leaves: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> Tensor:
    """⟨∇value_i, direction⟩ of every value, (M,), by reverse mode: of all at once, if a backward pass can be
    differentiated, which the first values with a slope find out by a backward pass each."""
    if not values.requires_grad or not len(values):  # they do not depend on these parameters
        return torch.zeros_like(values)

    def one_by_one() -> Tensor:
        gradients = (_grad(value, leaves, retain_graph=True) for value in values)
        products = [torch.stack([(g[n] * t).sum() for n, t in direction.items()]).sum() for g in gradients]
        return torch.stack(products)

    if model.linear_backward is False:
        return one_by_one()
    try:
        (together,) = LinearBackward([values], leaves, [torch.ones_like(values)]).tangents(direction, True)
    except RuntimeError as error:
        check_differentiability_is_meant(error)
        model.linear_backward = False
        return one_by_one()
    if model.linear_backward is None:
        each = one_by_one()
        model.linear_backward = _agree([each], [together])
        return each
    return together


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

    Raises:
        NotTwiceDifferentiableError: a function of the model, or of the loss, has no second derivative.
    """
    inner = evaluation.leaves(v)
    outer = {name: inner.get(name, leaf) for name, leaf in evaluation.leaves(names).items()}
    sums, _ = evaluation.losses({**outer, **inner})
    gradients = torch.autograd.grad(sums.sum(), list(inner.values()), create_graph=True, materialize_grads=True)
    curved = [(g, v[name]) for name, g in zip(inner, gradients, strict=True) if g.requires_grad]
    check_twice_differentiable(evaluation.model, [g for g, _ in curved])
    if not curved:  # the loss is linear in these parameters
        return {name: leaf.new_zeros(columns(v), *leaf.shape) for name, leaf in outer.items()}
    inner_gradients, last = [g for g, _ in curved], columns(v) - 1
    tangents = ([t[q] for _, t in curved] for q in range(last + 1))
    rows = (_grad(inner_gradients, outer, ts, retain_graph=q < last) for q, ts in enumerate(tangents))
    return _block(outer, columns(v), rows)


class LinearBackward:
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
            return _agree(tangents, self.tangents(v, retain_graph=True))
        except RuntimeError as error:
            check_differentiability_is_meant(error)
            return False


def check_differentiability_is_meant(error: RuntimeError) -> None:
    """Raises an error of autograd again, unless it says that a function or its backward pass has no derivative."""
    said = any(text in str(error) for text in ("not implemented", "differentiate twice"))
    if not said and not isinstance(error, NotImplementedError):
        raise error


def _agree(tangents: Sequence[Tensor], others: Sequence[Tensor]) -> bool | None:
    """Whether two computations of the same tensors agree up to rounding, that of float32 at least, in which models
    compute parts whatever their dtype is; None if the first ones are zero."""
    pairs = list(zip(tangents, others, strict=True))
    size = sum(float(t.double().square().sum()) for t, _ in pairs)
    gap = sum(float((t - s).double().square().sum()) for t, s in pairs)
    if not gap <= size * torch.finfo(torch.float32).eps:  # of rounding, it is of the order eps²
        return False
    return True if size else None


class NotTwiceDifferentiableError(InputError):
    """A function of a model has no second derivative."""


def check_twice_differentiable(model: FunctionalModel, gradients: Iterable[Tensor]) -> None:
    """Refuses gradients that passed a function marked with `once_differentiable`.

    Autograd puts a node that raises an error behind such a function, but no parameter can be reached from that node:
    it is never run, and the second derivative would lack all that passes it, without a word. The first gradients of a
    model tell.

    Raises:
        NotTwiceDifferentiableError: they passed one.
    """
    if model.twice_differentiable:
        return
    nodes, visited = [g.grad_fn for g in gradients], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node.name().endswith("::Error"):
            raise NotTwiceDifferentiableError(
                f"a function of {type(model.model).__name__} is marked as once_differentiable, so that its losses "
                "have no second derivative; expected functions whose backward pass can be differentiated: another "
                "implementation of them, or a single stage with solvers.Identity()."
            )
        nodes += [following for following, _ in node.next_functions]
    model.twice_differentiable = True


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
