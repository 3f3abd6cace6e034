"""Minimises F by scikit-learn where what a stage trains is a linear softmax head on a constant encoder.

Such an F is convex, and scikit-learn has the best solvers for it. Nothing is taken on trust: slopes and values show
that the losses are those of a softmax, and `polish` takes the gradient at the end by our own operator.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..curvature.derivatives import Evaluation
from ..errors import InputError
from ..vectors import Block

WAY_OUT = "use method='newton', which minimises any stage"


@dataclass(frozen=True)
class Terms:
    """Σ_m weight_m · −log softmax(W x_m + b)[label_m]: features (M, d) in float64, labels (M,), weights (M,)."""

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def minimise(target: Any, stage: str, tol: float, max_iter: int, dense_limit: int) -> tuple[Block, str, int]:
    """The minimum of an F whose parameters are one linear layer under a softmax cross-entropy.

    F = (1/N) Σ_m w_m CE_m + (λ/2) ‖W‖² has the minimum of scikit-learn's C Σ_m w_m CE_m + ½ ‖W‖² with C = 1/(N λ).
    With two classes scikit-learn has one vector w = W₁ − W₀, and ½ ‖w‖² = ‖W‖²: C is 2/(N λ). A common shift of all
    biases (of the weights too where λ = 0) does not change a softmax; the mean over classes stays what it was.

    newton-cholesky writes the Hessian out and stops at rounding; beyond `dense_limit` parameters newton-cg is used.
    (lbfgs stops early: `benchmarks/linear_heads.py`.)

    Args:
        target: F, a `StageObjective` at its starting point (scikit-learn itself starts at zero).
        stage: the stage's name, for messages.
        tol: of ‖∇F‖.
        max_iter: most iterations.
        dense_limit: most parameters for a written-out Hessian.

    Returns:
        The minimum (a block of one column), the name of scikit-learn's solver, its number of iterations.

    Raises:
        InputError: what is trained is not one linear layer, its input is trained too, a term ties it to the stage
            before, or the losses are not weighted softmax cross-entropies.
    """
    from sklearn.linear_model import LogisticRegression

    name = _layer(target, stage)
    weight, bias = target.parameters[f"{name}.weight"], target.parameters.get(f"{name}.bias")
    terms = _terms(target, name, stage)
    classes, decay = weight.shape[0], target.quadratic.decay.get(f"{name}.weight", 0.0)
    missing = np.setdiff1d(np.arange(classes), terms.labels)  # scikit-learn takes the classes from the labels
    features = np.concatenate([terms.features, np.zeros((len(missing), weight.shape[1]))])
    weights = np.concatenate([terms.weights, np.zeros(len(missing))])
    size = sum(p.numel() for p in target.parameters.values())
    share = weights.sum() / target.count  # scikit-learn divides by the sum of the weights
    regression = LogisticRegression(
        C=(2 if classes == 2 else 1) / (target.count * decay) if decay else np.inf,
        solver="newton-cholesky" if size <= dense_limit else "newton-cg",
        fit_intercept=bias is not None,
        tol=max(0.2 * tol / (share * size**0.5), 1e-15),
        max_iter=max_iter,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report of `polish` says by how much it missed the tolerance
        regression.fit(features, np.concatenate([terms.labels, missing]), sample_weight=weights)
    values, shifts = regression.coef_, regression.intercept_
    if classes == 2:
        values, shifts = np.stack([-values[0], values[0]]) / 2, np.array([-shifts[0], shifts[0]]) / 2
    point = {f"{name}.weight": _with_mean(values, weight) if not decay else torch.from_numpy(values).to(weight)}
    if bias is not None:
        point[f"{name}.bias"] = _with_mean(shifts, bias)
    point = {n: point[n].unsqueeze(0) for n in target.parameters}
    return point, regression.solver, int(np.max(regression.n_iter_))


def _with_mean(values: np.ndarray, before: Tensor) -> Tensor:
    """`values` with a common shift that gives them the mean over classes of `before`."""
    shifted = torch.from_numpy(values).to(before)
    return shifted + (before - shifted).mean(0)


def _layer(target: Any, stage: str) -> str:
    """The name of the linear layer that is all the stage trains."""
    names = list(target.parameters)
    layers = {name.rpartition(".")[0] for name in names}
    module = target.model.model.get_submodule(layers.pop()) if len(layers) == 1 else None
    wanted = [] if module is None else [n for n, _ in module.named_parameters(recurse=False)]
    if (
        not isinstance(module, nn.Linear)
        or module.out_features < 2
        or {n.rpartition(".")[2] for n in names} != {*wanted}
    ):
        raise InputError(
            f"stage {stage!r} trains {len(names)} tensors (first {names[0]!r}), which are not one linear layer; "
            f"method='sklearn' is for a linear head on a frozen encoder (trainable='head'): {WAY_OUT}."
        )
    if target.quadratic.tie:
        raise InputError(
            f"stage {stage!r} ties {next(iter(target.quadratic.tie))!r} to the stage before by alpha, a term that "
            f"scikit-learn does not have: {WAY_OUT}."
        )
    return names[0].rpartition(".")[0]


def _terms(target: Any, name: str, stage: str) -> Terms:
    """The terms of all processes: weights and labels from the slopes at zero logits, checked at random ones."""
    like = target.parameters
    generator = torch.Generator().manual_seed(0)
    zero = {n: torch.zeros_like(p) for n, p in like.items()}
    drawn = {n: (torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5).to(p) for n, p in like.items()}
    limit = 1e-9 if target.dtype == torch.float64 else 1e-3
    parts = []
    with target.engine.raising_together():
        for evaluation in target.operator._passing():
            x, _, slopes, _ = _slopes(evaluation, zero, name, stage)
            # The slope of w · CE with label y at zero logits: w (1/C − 1 at y).
            classes = slopes.shape[1]
            labels = slopes.argmin(1)
            weights = -slopes.gather(1, labels[:, None])[:, 0] * classes / (classes - 1)
            _, logits, slopes, total = _slopes(evaluation, drawn, name, stage)
            expected = weights[:, None] * (logits.softmax(1) - nn.functional.one_hot(labels, classes))
            losses = weights * nn.functional.cross_entropy(logits, labels, reduction="none")
            size = max(float(weights.abs().max()), 1e-300) if len(weights) else 1.0
            gap = float((slopes - expected).abs().max()) if len(weights) else 0.0
            if not (gap <= limit * size and abs(total - float(losses.sum())) <= limit * (1 + abs(total))):
                raise InputError(
                    f"the losses of stage {stage!r} ({type(evaluation.objective).__name__}) are not softmax "
                    f"cross-entropies of the outputs of {name!r}, one weight per term; method='sklearn' is for those: "
                    f"{WAY_OUT}."
                )
            used = weights != 0
            parts.append(tuple(t[used].cpu().numpy() for t in (x, labels, weights)))
    parts = target.engine.gather(parts)
    return Terms(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _slopes(evaluation: Evaluation, point: dict, name: str, stage: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """The layer's inputs (M, d) and outputs (M, C) at a point, the slopes of the batch's Σ ℓ in these, and Σ ℓ."""
    calls, leaves = [], {n: p.requires_grad_() for n, p in point.items()}
    layer = evaluation.model.model.get_submodule(name)
    handle = layer.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output)))
    try:
        total = evaluation.losses(leaves)[0].sum()
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][0].requires_grad:
        why = f"runs {len(calls)} times per pass" if len(calls) != 1 else "has an input that is trained too"
        raise InputError(
            f"stage {stage!r}: the layer {name!r} {why}; method='sklearn' is for one linear head on a frozen encoder: "
            f"{WAY_OUT}."
        )
    x, output = calls[0]
    (slopes,) = torch.autograd.grad(total, [output], materialize_grads=True, allow_unused=True)
    x, output, slopes = (t.detach().double().flatten(0, -2) for t in (x, output, slopes))
    return x, output, slopes, float(total.detach())
