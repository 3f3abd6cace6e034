"""Diagnostics of a bound stage: what makes its scores worse without making them wrong, and what to do about it.

Nothing is refused here; `checks` has what is. A diagnostic takes a `BoundStage` and returns a `Finding` about a few of
its rows. A new one is a function here, or anywhere, and a line in `registry.DIAGNOSTICS`.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor

from .. import vectors
from ..adapters.functional import FunctionalModel
from ..curvature.derivatives import Evaluation, example_gradients
from ..errors import InputError, first_line
from ..objectives.corruption import Corruption
from ..solvers.damping import TRAINING
from ..solvers.lanczos import lanczos, largest_eigenvalue, ritz
from ..solvers.operator import CountedOperator
from ..training.objective import QuadraticTerms
from .chain import BoundStage
from .checks import pad_ids_text
from .findings import Finding
from .implicit import Implicit

ROWS = 16
STEPS = 12  # of Lanczos, for the ends of a spectrum
CLOSE = 1e-3  # relative differences of losses and gradients below it change no ranking
AT_REST = 2.0  # times what chance makes of a sample's mean gradient at a minimum


def pad_ids(bound: BoundStage) -> Finding:
    """Whether model and tokenizer pad with the same token."""
    if bound.objective.tokenizer is None:
        return Finding("pad ids", "the objective has no tokenizer")
    return Finding("pad ids", pad_ids_text(bound).strip() or "model and tokenizer agree")


def attention(bound: BoundStage) -> Finding:
    """Whether the model's own kernel of attention gives the losses of the one that is differentiated."""
    kernel = getattr(getattr(bound.stage.model, "config", None), "_attn_implementation", None)
    if kernel in (None, "eager"):
        return Finding("attention", "the model's own attention is differentiated")
    batch = bound.collate(bound.compared_rows)
    evaluation = Evaluation(bound.model, bound.objective, batch)
    training = bound.stage.model.training
    with torch.no_grad():
        with bound.model.evaluating():
            differentiated = evaluation.losses({})[0].double()
        bound.stage.model.eval()
        try:
            gap = _relative(evaluation.losses({})[0].double(), differentiated)
        finally:
            bound.stage.model.train(training)
    if gap <= CLOSE:
        return Finding("attention", f"an exact kernel in the place of {kernel} has the same losses", gap)
    return Finding(
        "attention",
        f"the losses by {kernel} are not those of the exact kernel that is differentiated: the model was trained with "
        "an approximation; finetune it with attn_implementation='eager', or take the scores for those of the exact "
        "one",
        gap,
    )


def precision(bound: BoundStage) -> Finding:
    """How far gradients in the model's dtype are from those in float64."""
    dtype = next(iter(bound.model.parameters.values())).dtype
    if dtype == torch.float64:
        return Finding("precision", "parameters are float64")
    row, names = bound.compared_rows[-1], bound.split.trained
    gradients = []
    try:
        for model in (bound.model, FunctionalModel(copy.deepcopy(bound.stage.model).double(), bound.engine.device)):
            wide = {k: t.double() if _is_narrow(t, model) else t for k, t in bound.collate([row]).items()}
            with model.evaluating():
                gradient = example_gradients(Evaluation(model, bound.objective, wide), names)
            gradients.append({name: t.double() for name, t in gradient.items()})
    except (RuntimeError, InputError) as error:
        return Finding("precision", f"the model cannot be compared with itself in float64 ({first_line(error)})")
    difference = vectors.add(gradients[0], gradients[1], -1.0)
    gap = float(vectors.norm(difference) / vectors.norm(gradients[1]).clamp(min=1e-300))
    name = str(dtype).removeprefix("torch.")
    if gap <= CLOSE:
        return Finding("precision", f"a gradient in {name} is that of float64", gap)
    return Finding("precision", f"a gradient in {name} is not that of float64: give the model dtype float64", gap)


def stationarity(bound: BoundStage) -> Finding:
    """How far the mean gradient of a sample is from what chance makes of it at a minimum.

    r_i = (∇ℓ_i + c_i ∇R) / c̄ for n rows with c_i terms and the quadratic terms R of F has the mean ∇F over all rows.
    Told is ‖r̄‖ over its standard error, √(Σ ‖r_i − r̄‖² / (n (n − 1))): about 1 at a minimum, more at any other place.
    """
    rows, names = bound.subset(ROWS), bound.split.trained
    parameters, differentiation = vectors.select(bound.model.parameters, names), bound.differentiation
    if isinstance(differentiation, Implicit):
        quadratic = differentiation.quadratic
    else:
        quadratic = QuadraticTerms.of(bound.stage.model, bound.split, parameters, bound.stage.weight_decay)
    penalty = vectors.stack([quadratic.gradient(parameters, {n: torch.zeros_like(p) for n, p in parameters.items()})])
    total, squares, counts = vectors.scale(penalty, torch.zeros(1, device=bound.engine.device)), 0.0, 0.0
    with bound.model.evaluating():
        for row in rows:
            evaluation = Evaluation(bound.model, bound.objective, bound.collate([row]))
            with torch.no_grad():
                count = evaluation.losses({})[1].double()
            residual = vectors.add(example_gradients(evaluation, names), penalty, count)
            total, counts = vectors.add(total, residual), counts + float(count)
            squares += float(vectors.norm(residual)) ** 2
    n = len(rows)
    if n < 3 or not counts:
        return Finding("stationarity", "there are fewer than three rows with a term")
    mean = float(vectors.norm(total)) / n  # in units of c̄, as the error
    error = (max(squares - n * mean**2, 0.0) / (n * (n - 1))) ** 0.5
    ratio = mean / max(error, 1e-300)
    if ratio <= AT_REST:
        return Finding(
            "stationarity", f"the mean gradient of {n} rows is within chance of zero ({ratio:.1f} times it)"
        )
    return Finding(
        "stationarity",
        f"training ended before a minimum: the mean gradient of {n} rows is {ratio:.1f} times what chance makes of "
        "it; Gauss-Newton with damping (the default) bears that, link: unrolled and link: segments ask about the run "
        "itself, and polish trains to a minimum",
    )


def curvature_sign(bound: BoundStage) -> Finding:
    """Whether the curvature has directions in which the objective falls."""
    differentiation = bound.differentiation
    if not isinstance(differentiation, Implicit):
        return Finding("curvature sign", "the stage solves no system")
    if bound.stage.curvature_name != "hessian":
        return Finding("curvature sign", f"{bound.stage.curvature_name} is positive semi-definite by construction")
    operator = CountedOperator(differentiation.in_coordinates(differentiation.curvature(bound.subset(ROWS))), 1)
    steps = lanczos(operator, operator.rademacher(seed=0), STEPS)
    values, _ = ritz(steps.diagonal[0], steps.off[0])
    least, most = float(values[0]), float(values[-1])
    if least >= -1e-3 * most:
        return Finding("curvature sign", f"eigenvalues on {ROWS} rows are from {least:.2g} to {most:.2g}")
    return Finding(
        "curvature sign",
        f"eigenvalues on {ROWS} rows are from {least:.2g} to {most:.2g}: the stage is at no minimum, and "
        "(Hessian)⁻¹ means little there; take curvature: gauss_newton, more damping, or polish the stage",
    )


def ties(bound: BoundStage) -> Finding:
    """Which parameters are one tensor under several names."""
    names = defaultdict[int, list[str]](list)
    for name, parameter in bound.stage.model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    tied = [each for each in names.values() if len(each) > 1]
    if not tied:
        return Finding("ties", "every parameter has one name")
    first = " and ".join(tied[0][:2])
    return Finding(
        "ties", f"{len(tied)} tensor(s) have several names ({first}): each counts once, in all of its places"
    )


def mask_coverage(bound: BoundStage) -> Finding:
    """How often a token of a row is a term of its loss, and how many rows are cut or have no term."""
    rows, objective = bound.subset(64), bound.objective
    batch = bound.collate(rows)
    with torch.no_grad(), bound.model.evaluating():
        counts = Evaluation(bound.model, objective, batch).losses({})[1]
    empty, cut = int((counts == 0).sum()), int(torch.as_tensor(batch.get("truncated", 0)).sum())
    text = "each token counts in its loss"
    if isinstance(objective, Corruption):
        covered = objective.masks == "folds" and objective.draws * objective.mask_probability > 0.99
        share = objective.draws * objective.mask_probability
        text = f"each word is masked {share:.3g} times" + (
            "" if covered else " on average, some more often than others"
        )
        text += "" if covered else ": mask_rounds: 1 masks each equally often"
    text += f"; of {len(rows)} rows {cut} are cut at max_length, and {empty} have no term"
    return Finding("mask coverage", text)


def damping(bound: BoundStage) -> Finding:
    """λ beside the largest eigenvalue of the curvature."""
    differentiation = bound.differentiation
    if not isinstance(differentiation, Implicit):
        return Finding("damping", "the stage solves no system")
    solver, _ = differentiation.solver_for(1)
    value = getattr(solver, "damping", None)
    if value is None or not solver.products(1, 1):
        return Finding("damping", f"{type(solver).__name__} has none")
    if value == TRAINING or differentiation.training_damping is not None:
        return Finding("damping", "1/τ, one over the summed learning rates of the training")
    largest = largest_eigenvalue(differentiation.in_coordinates(differentiation.curvature(bound.subset(ROWS))))
    fraction = getattr(solver, "damping_fraction", None)
    if value == "auto":
        return Finding("damping", f"{fraction:g} of the largest eigenvalue, which is {largest:.2g} on {ROWS} rows")
    share = float(value) / max(largest, 1e-300)
    text = f"{float(value):g}, {share:.1g} of the largest eigenvalue on {ROWS} rows ({largest:.2g})"
    if share > 1:
        text += ": it outweighs all curvature, so that scores are nearly gradient products; try auto, or msif sweep"
    return Finding("damping", text)


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-300))


def _is_narrow(value: object, model: FunctionalModel) -> bool:
    wanted = next(iter(model.parameters.values())).dtype
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != wanted
