"""Brings a small model to a stationary point of its stage's F: L-BFGS, then trust-region Newton-CG, or scikit-learn.

Influence functions and the truth they are compared with are derivatives of a *minimum*: a retraining that stops a
gradient of 1e-4 short of it measures where training stopped, not what an example did.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import vectors
from ..adapters.functional import FunctionalModel
from ..adapters.split import Split, decayed_names, split, write
from ..curvature import Hessian
from ..curvature.derivatives import Evaluation, reached
from ..engine.accelerated import Engine
from ..engine.corpus import as_rows, checked_omission
from ..errors import InputError
from ..objectives import checked_objective
from ..vectors import Block
from . import logistic
from .newton import Newton, Preconditioner, State, lbfgs, nearby

HANDOVER = 1e-3  # gradient norm at which L-BFGS hands over to Newton's method
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class PolishReport:
    """What `polish` reached.

    Attributes:
        name: the stage's.
        parameters: number of scalars that were trained.
        objective, objective_before: F, and F before.
        gradient_norm, gradient_norm_before: ‖∇F‖ over the trained parameters, and before.
        tol, reached: whether gradient_norm ≤ tol.
        lbfgs_iterations, newton_iterations: accepted steps of either; scikit-learn's count as Newton's.
        evaluations: passes over the data for F and ∇F; products: Hessian products. Not those inside of scikit-learn.
        smallest_ritz: an upper bound of the Hessian's smallest eigenvalue (exact where it was written out), from the
            last Newton steps; None where none was needed, or where a preconditioner was given.
        negative_curvature: the last Newton step met a direction of negative curvature: no minimum.
        seconds: wall time.
        solver: scikit-learn's solver where it found the minimum; None: our own.
        preconditioner: for `polish` of a nearby F; None where CG was short.
    """

    name: str
    parameters: int
    objective: float
    objective_before: float
    gradient_norm: float
    gradient_norm_before: float
    tol: float
    reached: bool
    lbfgs_iterations: int
    newton_iterations: int
    evaluations: int
    products: int
    smallest_ritz: float | None
    negative_curvature: bool
    seconds: float
    solver: str | None = None
    preconditioner: Preconditioner | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "preconditioner"}

    def __str__(self) -> str:
        end = "" if self.reached else " NOT reached"
        ritz = "" if self.smallest_ritz is None else f", smallest curvature {self.smallest_ritz:.2g}"
        before, after = self.gradient_norm_before, self.gradient_norm
        way = f"{self.lbfgs_iterations} L-BFGS and {self.newton_iterations} Newton steps"
        if self.solver is not None:
            way = f"scikit-learn's {self.solver}, {self.newton_iterations} steps"
        return (
            f"{self.name}: ‖∇F‖ {before:.1e} → {after:.1e} (tol {self.tol:.0e}{end}), "
            f"F {self.objective_before:.6g} → {self.objective:.6g}; {way}, "
            f"{self.products} Hessian products{ritz}; {self.seconds:.1f} s"
        )


def polish(
    model: nn.Module,
    objective: Any,
    data: Any,
    *,
    previous: nn.Module | None = None,
    trainable: str | Sequence[str] = "all",
    weight_decay: float = 0.0,
    alpha: float | None = None,
    resized: bool = False,
    omit: Collection[Any] = (),
    method: Literal["newton", "sklearn"] = "newton",
    tol: float | None = None,
    lbfgs_iter: int = 500,
    max_iter: int = 50,
    cg_iter: int = 500,
    dense_limit: int = 2048,
    factorise: bool = False,
    preconditioner: Preconditioner | None = None,
    batch_size: int = 64,
    engine: Engine | None = None,
    name: str = "stage",
) -> PolishReport:
    """Minimises F = (1/N) Σ ℓ_i + (weight_decay/2) ‖φ_decayed‖² [+ α ‖W − W_before‖², eq. (12)] in place,
    to ‖∇F‖ ≤ tol.

    F and its trained parameters are those of `Stage` with the same arguments, in the model's own dtype (float64 for a
    truth that finite differences can see), in evaluation mode, full batch, masks those of the objective's first draws.
    L-BFGS (strong Wolfe) goes first; the Newton steps are Steihaug's conjugate gradients in a trust region with exact
    Hessian products, which use a direction of negative curvature instead of being stopped by it. Where CG would be
    long and the model has at most `dense_limit` trained parameters, the Hessian is written out once and preconditions
    all later CG; the report carries it, for retrainings nearby. Batches are collated once, outputs of frozen encoders
    are computed once.

    With method="sklearn" scikit-learn's LogisticRegression does the same for a linear softmax head on a constant
    encoder (`logistic.minimise` has the correspondence), in float64; the report's gradient is ours all the same.

    Args:
        model: changed in place at the end (not on an exception), left in evaluation mode.
        objective, data, previous, trainable, weight_decay, alpha: as in `train` and `Stage`.
        resized: as in `Stage`.
        omit: example ids whose losses are taken out of F. N stays that of all rows, which is ε = −1/N of eq. (4), the
            removal that `removal_effect` predicts; dividing by the new N instead would scale the losses against the
            quadratic terms, a shift common to all removals of one size.
        method: "newton" for any stage; "sklearn" for a linear head, on which `lbfgs_iter`, `cg_iter` and
            `preconditioner` have no effect.
        tol: of ‖∇F‖; default 1e-9 in float64, 1e-4 in float32.
        lbfgs_iter: most L-BFGS iterations; 0 skips them.
        max_iter: most Newton steps.
        cg_iter: most products a Newton step.
        dense_limit: most trained parameters for a written-out Hessian (P products, P² numbers).
        factorise: write the Hessian out at the end (up to `dense_limit`): the report then has its smallest eigenvalue
            and a preconditioner in any case.
        preconditioner: that of the report of a nearby F with the same trained parameters: L-BFGS starts from it and
            takes full steps down to `tol`, most often without a Hessian product.
        batch_size: rows a batch of the full-batch passes.
        engine: made when none is given.
        name: the stage's, for messages.

    Returns:
        `PolishReport`. A tolerance that was not reached is warned about, never hidden.

    Raises:
        InputError: bad rows, nothing left after `omit`, ids in `omit` that no row has, or F not finite; with
            method="sklearn", a head that is not linear, losses that are no weighted softmax cross-entropies, or α.

    >>> from hf_msif.models import ConvNetConfig, ConvNetForImageClassification
    >>> from hf_msif.objectives import ImageClassification
    >>> _ = torch.manual_seed(0)
    >>> config = ConvNetConfig(image_size=2, channels=[1], kernel_size=1, dense=[], num_labels=2)
    >>> model = ConvNetForImageClassification(config).double()
    >>> rows = [{"image": [[0, 0], [0, 0]], "label": int(i % 4 == 0)} for i in range(8)]
    >>> report = polish(model, ImageClassification(), rows, weight_decay=0.1)
    >>> report.reached, round(report.objective, 4)  # black images: the entropy of 1/4, 0.5623, by the biases alone
    (True, 0.5623)
    """
    if method not in ("newton", "sklearn"):
        raise InputError(f"stage {name!r}: method is {method!r}; expected 'newton' or 'sklearn'.")
    started = time.perf_counter()
    engine, objective = engine or Engine(progress=False), checked_objective(objective, f"stage {name!r}")
    rows = as_rows(data, f"the data of stage {name!r}")
    roles = split(name, model, previous, trainable, resized)
    target = _Target(model, objective, rows, roles, previous, weight_decay, alpha, omit, batch_size, engine)
    tol = TOLERANCE.get(target.dtype, 1e-4) if tol is None else tol
    with target.model.evaluating(), engine.bar(desc=f"polishing {name}", unit=" steps") as bar:
        state = before = target.at()
        if not math.isfinite(state.value):
            raise InputError(f"stage {name!r}: F is {state.value}; its training diverged, or the data are bad.")
        bar.set_postfix(gradient=f"{state.norm:.1e}")
        first, steps, solver = 0, 0, None
        if method == "sklearn":
            point, solver, steps = logistic.minimise(target, name, tol, max_iter, dense_limit)
            state = target.at(point)
        elif preconditioner is not None and lbfgs_iter:
            state, first = nearby(target, state, preconditioner, tol, lbfgs_iter, bar)
        elif state.norm > max(tol, HANDOVER) and lbfgs_iter:
            state, first = lbfgs(target, max(tol, HANDOVER), lbfgs_iter, bar)
        search = Newton(target, state, preconditioner, cg_iter, dense_limit)
        while solver is None and search.state.norm > tol and steps < max_iter and search.step():
            steps += 1
            bar.set_postfix(gradient=f"{search.state.norm:.1e}", refresh=False)
            bar.update()
        search.finish()
        if factorise and search.size <= dense_limit:
            search.factorise()
    write(model, target.parameters)
    model.eval()
    report = PolishReport(
        name=name,
        parameters=vectors.numel(before.gradient),
        objective=search.state.value,
        objective_before=before.value,
        gradient_norm=search.state.norm,
        gradient_norm_before=before.norm,
        tol=tol,
        reached=search.state.norm <= tol,
        lbfgs_iterations=first,
        newton_iterations=steps,
        evaluations=target.evaluations,
        products=target.products,
        smallest_ritz=search.smallest,
        negative_curvature=search.negative,
        seconds=round(time.perf_counter() - started, 3),
        solver=solver,
        preconditioner=search.preconditioner,
    )
    if not report.reached:
        warnings.warn(f"not a stationary point. {report}", stacklevel=2)
    return report


class _Target:
    """F of one stage without some of its examples: value, gradient, Hessian products; itself a solvers' operator."""

    def __init__(self, model, objective, rows, roles: Split, previous, weight_decay, alpha, omit, batch_size, engine):
        omit = checked_omission(omit, rows, roles.stage)
        kept = [row for row in rows if row["example_id"] not in omit]
        if roles.proximal and not alpha:
            raise InputError(
                f"stage {roles.stage!r} trains {len(roles.proximal)} inherited tensors (first {roles.proximal[0]!r}): "
                "give alpha, the α of eq. (12), or freeze them with trainable='head'."
            )
        if isinstance(alpha, str):
            raise InputError(
                f"stage {roles.stage!r}: alpha is {alpha!r}; a minimum needs the number itself, such as the estimate "
                "that a chain reports for it."
            )
        self.engine, self.roles, self.evaluations, self.products = engine, roles, 0, 0
        self.model = FunctionalModel(model, engine.device)
        self.model.parameters |= {name: self.model.parameters[name].clone() for name in roles.trained}
        names = reached(self.model, objective, rows, roles.trained)  # the rest is held constant
        self.operator = Hessian(self.model, objective, kept, names, engine, batch_size)
        self.parameters = self.operator.parameters
        self.dtype = next(iter(self.parameters.values())).dtype
        omitted = [row for row in rows if row["example_id"] in omit]
        self.count = self.operator.count + self._count(objective, omitted, batch_size)
        self._share = self.operator.count / self.count
        self.decay = {name: weight_decay for name in names if weight_decay and name in decayed_names(model)}
        self.tie = {
            name: roles.tie(name, self.parameters[name], alpha) for name in roles.proximal if name in self.parameters
        }
        self._anchor = {name: self._anchored(name, previous) for name in self.tie}

    def _count(self, objective, rows, batch_size) -> float:
        total = 0.0
        for start in range(0, len(rows), batch_size):
            batch = self.engine.place(objective.collate(rows[start : start + batch_size]))
            evaluation = Evaluation(self.model, objective, batch)
            with torch.no_grad(), self.model.evaluating():
                total += float(evaluation.losses({})[1].double().sum())
        return total

    def _anchored(self, name: str, previous: nn.Module) -> Tensor:
        source, parameter = previous.get_parameter(self.roles.inherited[name]).detach(), self.parameters[name]
        anchor = parameter.clone()
        # All rows, unless a resize added some; a scalar has none.
        (anchor[: len(source)] if name in self.roles.resized else anchor).copy_(source)
        return anchor

    def at(self, point: Block | None = None) -> State:
        """F and ∇F at `point`, which becomes the present one; by default where the model is."""
        if point is None:
            point = {name: p.clone().unsqueeze(0) for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.copy_(point[name][0])
        self.evaluations += 1
        like = {name: p.unsqueeze(0) for name, p in self.parameters.items()}
        like[""] = torch.zeros(1, dtype=torch.float64, device=self.engine.device)
        total = self.engine.sum(like, map(self._losses, self.operator._passing()))
        value = float(total.pop("")) / self.count
        gradient = {name: t / self.count for name, t in total.items()}
        for strength, name, shift in self._quadratic():
            gradient[name] = gradient[name] + strength * shift
            value += 0.5 * float((strength * shift.double() ** 2).sum())
        return State(point, value, gradient)

    def _losses(self, evaluation: Evaluation) -> Block:
        # With the gradient's graph even where a value would do: without one a memo cannot tell that a constant
        # module's *input* varies.
        leaves = evaluation.leaves(self.parameters)
        total = evaluation.losses(leaves)[0].sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
        parts = {name: g.unsqueeze(0) for name, g in zip(leaves, gradients, strict=True)}
        return parts | {"": total.detach().reshape(1)}

    def _quadratic(self):
        for name, strength in self.decay.items():
            yield strength, name, self.parameters[name].unsqueeze(0)
        for name, strength in self.tie.items():
            yield strength, name, (self.parameters[name] - self._anchor[name]).unsqueeze(0)

    def matvec(self, v: Block) -> Block:
        """∂²F v for every column, at the present point."""
        self.products += vectors.columns(v)
        product = vectors.scale(self.operator.matvec(v), self._share)
        for terms in (self.decay, self.tie):
            for name, strength in terms.items():
                product[name] = product[name] + strength * v[name]
        return product
