"""Brings a small model to a stationary point of its stage's F: L-BFGS, then trust-region Newton-CG, or scikit-learn.

Influence functions, and the retrainings that they are compared with, are derivatives of a *minimum*. A retraining that
stops at a gradient of 1e-4 measures where training stopped, not what an example did.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .. import vectors
from ..adapters.split import split, write
from ..engine.accelerated import Engine
from ..engine.corpus import as_rows
from ..errors import InputError
from ..objectives import Objective, checked_objective
from . import logistic
from .newton import Newton, Preconditioner, lbfgs, nearby
from .objective import StageObjective

HANDOVER = 1e-3  # gradient norm at which L-BFGS hands over to Newton's method
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class PolishReport:
    """What `polish` reached.

    Attributes:
        name: the stage's name.
        parameters: number of scalars that were trained.
        objective, objective_before: F at the end, and at the start.
        gradient_norm, gradient_norm_before: ‖∇F‖ over the trained parameters at the end, and at the start.
        tol, reached: the tolerance, and whether gradient_norm ≤ tol.
        lbfgs_iterations, newton_iterations: accepted steps of each; those of scikit-learn count as Newton's.
        evaluations, products: passes over the data for F and ∇F, and Hessian products; without those of scikit-learn.
        smallest_ritz: an upper bound of the Hessian's smallest eigenvalue (exact where it was written out), from the
            last Newton steps; None where none was needed, or where a preconditioner was given.
        negative_curvature: the last Newton step met a direction of negative curvature: the point is not a minimum.
        seconds: wall time.
        solver: the solver of scikit-learn that found the minimum; None where it was our own.
        preconditioner: for `polish` of a nearby F; None where CG took few steps.
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
    objective: Objective,
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
    (Influence has these masks with `MaskedLM(static=True)` or `Stage(mask_rounds=None)`; a configuration does so.)

    L-BFGS (strong Wolfe) goes first; the Newton steps are Steihaug's conjugate gradients in a trust region with exact
    Hessian products, which use a direction of negative curvature instead of being stopped by it. Where CG needs many
    steps and the model has at most `dense_limit` trained parameters, the Hessian is written out once and preconditions
    all later CG; the report holds it for the retrainings that follow. Batches are collated once, outputs of frozen
    encoders are computed once.

    With method="sklearn" scikit-learn's LogisticRegression does the same for a linear softmax head on a constant
    encoder (`logistic.minimise` states the correspondence), in float64; the report's gradient is still ours.

    Args:
        model: changed in place at the end (not on an exception), left in evaluation mode.
        objective: an object of `hf_msif.objectives`, or another `Objective`.
        data: the stage's examples: a `datasets.Dataset`, a list of dicts that the objective reads, or a list of
            strings.
        previous: the model of the stage before, which says what is inherited; None for a first stage.
        trainable: "all", "head" (everything that is not inherited) or a list of name patterns; all other parameters
            are held constant.
        weight_decay: of the quadratic penalty, which acts on the trained parameters but biases and normalisation
            layers.
        alpha: α of eq. (12), needed where inherited parameters are trained.
        resized: accept embeddings that gained rows since the stage before; the new rows are not tied.
        omit: example ids whose losses have the weight zero in F. N stays that of all rows, which is ε = −1/N of
            eq. (4), the removal that `removal_effect` predicts. (Division by the new N would scale the losses against
            the quadratic terms: a shift that is common to all removals of one size.)
        method: "newton" for any stage; "sklearn" for a linear head, on which `lbfgs_iter`, `cg_iter` and
            `preconditioner` have no effect.
        tol: of ‖∇F‖; defaults to 1e-9 in float64 and 1e-4 in float32.
        lbfgs_iter: most L-BFGS iterations; 0 skips them.
        max_iter: most Newton steps.
        cg_iter: most Hessian products per Newton step.
        dense_limit: most trained parameters P for a written-out Hessian (P products, P² numbers).
        factorise: write the Hessian out at the end (up to `dense_limit` parameters), so that the report always has its
            smallest eigenvalue and a preconditioner.
        preconditioner: from the report of a nearby F with the same trained parameters: L-BFGS starts from it and
            takes full steps down to `tol`, most often without a Hessian product.
        batch_size: rows per batch of the full-batch passes.
        engine: runs the passes; made when none is given.
        name: the stage's name, for messages.

    Returns:
        `PolishReport`.

    Warns:
        UserWarning: the tolerance was not reached.

    Raises:
        InputError: a limit below 0, a `tol` that is not positive, no steps at all (`lbfgs_iter` and `max_iter` 0); bad
            rows, nothing left after `omit`, ids in `omit` that no row has, inherited parameters that are trained
            without α, or F not finite; with method="sklearn" also a head that is not linear, losses that are not
            weighted softmax cross-entropies, or α.

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
    limits = {"lbfgs_iter": lbfgs_iter, "max_iter": max_iter, "cg_iter": cg_iter, "dense_limit": dense_limit}
    check_limits({"tol": tol, **limits}, f"stage {name!r}: ")
    started = time.perf_counter()
    engine, objective = engine or Engine(progress=False), checked_objective(objective, f"stage {name!r}", model)
    objective.check_model(model)
    rows = as_rows(data, f"the data of stage {name!r}")
    roles = split(name, model, previous, trainable, resized)
    target = StageObjective(model, objective, rows, roles, engine, previous, weight_decay, alpha, omit, batch_size)
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


def check_limits(settings: Mapping[str, Any], prefix: str) -> None:
    """Checks those settings of `polish` that are given.

    Args:
        settings: name → value.
        prefix: what stands before a name in messages.

    Raises:
        InputError: a limit below 0, a tolerance that is not positive, or no steps at all.

    >>> check_limits({"lbfgs_iter": 0, "max_iter": 0}, "polish.")
    Traceback (most recent call last):
        ...
    hf_msif.errors.InputError: polish.max_iter is 0 and polish.lbfgs_iter is 0; expected at least 1 for one of them: \
    no step would be taken.
    """
    for name in ("lbfgs_iter", "max_iter", "cg_iter", "dense_limit"):
        if settings.get(name, 0) < 0:
            raise InputError(f"{prefix}{name} is {settings[name]}; expected at least 0.")
    tol = settings.get("tol")
    if tol is not None and not 0 < tol < math.inf:
        raise InputError(f"{prefix}tol is {tol}; expected a positive number, or None for the dtype's own.")
    if settings.get("max_iter") == 0 and settings.get("lbfgs_iter") == 0:
        raise InputError(
            f"{prefix}max_iter is 0 and {prefix}lbfgs_iter is 0; expected at least 1 for one of them: no step "
            "would be taken."
        )
