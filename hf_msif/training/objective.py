"""F of a stage: the one objective that is trained, polished, replayed and differentiated.

    F_k(φ) = (1/N_k) Σ_i ω_i ℓ_i(φ) + (weight_decay/2) ‖φ_decayed‖² [+ α ‖W − W_before‖², eq. (12)],  N_k = Σ_i count_i

`data_term` and `example_weights` are the first term, `QuadraticTerms` the others; `StageObjective` is all of F on all
rows of a stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import vectors
from ..adapters.functional import FunctionalModel
from ..adapters.split import Split, decayed_names
from ..curvature import Hessian
from ..curvature.derivatives import Evaluation, parameters_in_use
from ..curvature.padding import without_padding
from ..engine.accelerated import Engine
from ..engine.corpus import checked_omission
from ..errors import InputError
from ..objectives import Objective
from ..vectors import Block
from .newton import State


def example_weights(rows: Sequence[Mapping[str, Any]], omit: Collection[Any]) -> Tensor:
    """ω, shape (rows,), float32: 0 for the rows whose `example_id` is in `omit`, 1 for all others."""
    return torch.tensor([0.0 if row["example_id"] in omit else 1.0 for row in rows])


def data_term(weights: Tensor, sums: Tensor, count: float | Tensor) -> Tensor:
    """(1/N) Σ_i ω_i ℓ_i, a scalar.

    Args:
        weights: ω, shape (B,).
        sums: ℓ_i of every example, a sum over its terms, shape (B,).
        count: N, the number of counted terms. It may be that of more rows than these, of which this is then a share.
            Where it is 0 no term is counted: the data term is 0, and not 0/0.

    >>> data_term(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 5.0]), 4)  # the second row is omitted; N stays
    tensor(0.7500)
    """
    return (weights * sums).sum() / (count + (count == 0))


@dataclass(frozen=True)
class QuadraticTerms:
    """R(φ) = (weight_decay/2) ‖φ_decayed‖² + α ‖W − W_before‖², eq. (12), made by `QuadraticTerms.of`.

    A resized tensor is tied to W_before by its leading, inherited rows alone; rows that the resize added are free.

    Attributes:
        decay: weight_decay, by the names of φ_decayed.
        alpha: α; None where nothing is tied.
        tie: 2α, the curvature of the second term, by the names of W; for a resized tensor a column of shape
            (rows, 1, ...) that is 0 on the rows that the resize added.
        anchors: W_before, by the names of W; of a resized tensor the inherited rows alone.
    """

    decay: dict[str, float] = field(default_factory=dict)
    alpha: float | None = None
    tie: dict[str, float | Tensor] = field(default_factory=dict)
    anchors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        roles: Split,
        parameters: Mapping[str, Tensor],
        weight_decay: float = 0.0,
        alpha: float | None = None,
        previous: nn.Module | Mapping[str, Tensor] | None = None,
        decayed: Collection[str] | None = None,
    ) -> QuadraticTerms:
        """The quadratic terms of a stage.

        Args:
            model: the stage's model, whose layers say what weight decay acts on.
            roles: of its parameters.
            parameters: the trained parameters; the terms are restricted to them. Anchors take their dtype and device.
            weight_decay: of the first term.
            alpha: α of the second term; None: there is none.
            previous: the model of the stage before, or its parameters by name; needed where α ties parameters to it.
                Its memory is shared, not copied, where dtype and device agree.
            decayed: the names that weight decay acts on; defaults to `adapters.decayed_names(model)`.
        """
        decay: dict[str, float] = {}
        anchors: dict[str, Tensor] = {}
        tie: dict[str, float | Tensor] = {}
        if weight_decay:
            decayed = decayed_names(model) if decayed is None else decayed
            decay = {name: weight_decay for name in parameters if name in decayed}
        if alpha is not None:
            before = dict(previous.named_parameters()) if isinstance(previous, nn.Module) else previous
            for name in roles.proximal:
                if name in parameters:
                    assert before is not None
                    anchors[name] = before[roles.inherited[name]].detach().to(parameters[name])
            tie = {name: _tie(alpha, parameters[name], roles.resized.get(name)) for name in anchors}
        return cls(decay, alpha, tie, anchors)

    def shift(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W − W_before on the tied names; zero on rows that a resize added."""
        return {name: self._shift(name, parameters[name]) for name in self.anchors}

    def _shift(self, name: str, parameter: Tensor) -> Tensor:
        anchor = self.anchors[name]
        if anchor.shape == parameter.shape:
            return parameter - anchor
        rows = len(anchor)
        return torch.cat([parameter[:rows] - anchor, torch.zeros_like(parameter[rows:])])

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor | float:
        """R, a scalar in the parameters' dtype (0.0 where there are no terms); autograd can differentiate it."""
        value: Tensor | float = 0.0
        for name, decay in self.decay.items():
            value = value + decay / 2 * (parameters[name] ** 2).sum()
        for name in self.anchors:
            assert self.alpha is not None
            value = value + self.alpha * (self._shift(name, parameters[name]) ** 2).sum()
        return value

    def gradient(
        self, parameters: Mapping[str, Tensor], data: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """∇R = decay ∘ φ + tie ∘ (W − W_before), on the names that a term acts on.

        Args:
            parameters: φ.
            data: the gradient of the data term, to which ∇R is added: the result is ∇F, on the names of `data`. Its
                tensors have the shapes of the parameters, or are blocks of one column.
        """
        total = dict(data or {})
        for name, decay in self.decay.items():
            part = decay * parameters[name]
            total[name] = total[name] + part if name in total else part
        for name, tie in self.tie.items():
            part = tie * self._shift(name, parameters[name])
            total[name] = total[name] + part if name in total else part
        return total

    @cached_property
    def ridge(self) -> dict[str, float | Tensor]:
        """The diagonal of ∂²R: name → a number, or a tensor that broadcasts to the parameter."""
        ridge: dict[str, float | Tensor] = dict(self.decay)
        for name, tie in self.tie.items():
            ridge[name] = ridge.get(name, 0.0) + tie
        return ridge


def _tie(alpha: float, parameter: Tensor, inherited_rows: int | None) -> float | Tensor:
    if inherited_rows is None:
        return 2 * alpha
    is_inherited = torch.arange(parameter.shape[0], device=parameter.device) < inherited_rows
    return 2 * alpha * is_inherited.to(parameter).reshape(-1, *[1] * (parameter.dim() - 1))


class StageObjective:
    """F of a stage on all of its rows, as a function of the trained parameters: value, gradient, Hessian products.

    It is what `newton` minimises, and an operator of `hf_msif.solvers`: the Hessian of F at the present point.

    Args:
        model: the stage's model, in whose parameters F starts; it is not changed.
        objective: an object of `hf_msif.objectives`, or of your own subclass of `objectives.Objective`.
        rows: the stage's data.
        roles: of the model's parameters. The trained ones that the losses depend on are the variables of F; all others
            are held constant.
        previous: the model of the stage before, which α ties to.
        weight_decay: of the quadratic penalty.
        alpha: α of eq. (12), needed where inherited parameters are trained.
        omit: example ids whose losses have the weight ω_i = 0; N stays that of all rows.
        batch_size: rows per batch of the full-batch passes.
        engine: runs the passes.

    Attributes:
        parameters: the present point, plain tensors; `at` moves them in place.
        quadratic: the quadratic terms.
        count: N.
        evaluations, products: how many passes for F and ∇F, and how many Hessian products there were.

    Raises:
        InputError: inherited parameters are trained and alpha is not a number; ids in `omit` that no row has, or all;
            rows without a single term.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        rows: list[dict],
        roles: Split,
        engine: Engine,
        previous: nn.Module | None = None,
        weight_decay: float = 0.0,
        alpha: float | None = None,
        omit: Collection[Any] = (),
        batch_size: int = 64,
    ):
        omit = checked_omission(omit, rows, roles.stage)
        _check_alpha(alpha, roles)
        self.engine, self.evaluations, self.products = engine, 0, 0
        self.model = FunctionalModel(model, engine.device)
        self.model.parameters |= {name: self.model.parameters[name].clone() for name in roles.trained}
        names = parameters_in_use(self.model, objective, rows, roles.trained)
        objective = without_padding(self.model, objective, rows, engine, names)

        # A pass leaves out the rows with the weight zero; they count in N alone.
        present = [row for row in rows if row["example_id"] not in omit]
        self.operator = Hessian(self.model, objective, present, names, engine, batch_size)
        self.count = self.operator.count
        if omit:
            absent = [row for row in rows if row["example_id"] in omit]
            self.count += Hessian(self.model, objective, absent, names, engine, batch_size).count
        if not self.count:
            raise without_terms(roles.stage, len(rows))
        self.parameters = self.operator.parameters
        self.dtype = next(iter(self.parameters.values())).dtype
        self.quadratic = QuadraticTerms.of(model, roles, self.parameters, weight_decay, alpha, previous)

    def at(self, point: Block | None = None) -> State:
        """F and ∇F at `point` (one column), which becomes the present one; defaults to the present one."""
        if point is None:
            point = vectors.stack([self.parameters])
        for name, p in self.parameters.items():
            p.copy_(point[name][0])
        self.evaluations += 1
        like = {name: p.unsqueeze(0) for name, p in self.parameters.items()}
        like[""] = torch.zeros(1, dtype=torch.float64, device=self.engine.device)
        sums = self.engine.sum(like, map(self._sums, self.operator._passing()))
        data = float(sums.pop("")) / self.count
        slopes = {name: t / self.count for name, t in sums.items()}
        penalty = float(self.quadratic.value({name: p.double() for name, p in self.parameters.items()}))
        return State(point, data + penalty, self.quadratic.gradient(self.parameters, slopes))

    def _sums(self, evaluation: Evaluation) -> Block:
        """A batch's Σ ∇ℓ, and its Σ ℓ under the name "", as a block of one column."""
        # With the gradient's graph even where a value would do: without one a memo cannot tell that a constant
        # module's *input* varies.
        leaves = evaluation.leaves(self.parameters)
        total = evaluation.losses(leaves)[0].sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
        sums = {name: g.unsqueeze(0) for name, g in zip(leaves, gradients, strict=True)}
        return sums | {"": total.detach().reshape(1)}

    def matvec(self, v: Block) -> Block:
        """∂²F v for every column, at the present point."""
        self.products += vectors.columns(v)
        product = vectors.scale(self.operator.matvec(v), self.operator.count / self.count)
        for name, ridge in self.quadratic.ridge.items():
            product[name] = product[name] + ridge * v[name]
        return product


def missing_alpha(roles: Split) -> InputError:
    """The refusal of a stage that trains inherited parameters without α."""
    return InputError(
        f"stage {roles.stage!r} trains {len(roles.proximal)} inherited tensors (first {roles.proximal[0]!r}): "
        "give alpha, the α of eq. (12), or freeze them with trainable='head'."
    )


def without_terms(stage: str, rows: int) -> InputError:
    """The refusal of rows on which the loss of a stage sums over nothing, N = 0."""
    return InputError(
        f"stage {stage!r}: none of its {rows:,} rows has a term to predict, so N = 0 and its loss says nothing; "
        "expected rows with words: check the text column, max_length and the tokenizer."
    )


def _check_alpha(alpha: float | str | None, roles: Split) -> None:
    """Inherited parameters that are trained need α as a number."""
    if roles.proximal and not alpha:
        raise missing_alpha(roles)
    if isinstance(alpha, str):
        raise InputError(
            f"stage {roles.stage!r}: alpha is {alpha!r}; a minimum needs the number itself, such as the estimate "
            "that a chain reports for it."
        )
