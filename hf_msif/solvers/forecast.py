"""How many products a solve will take, told from a few steps at the right-hand sides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import vectors
from ..errors import InputError
from ..vectors import Block
from ._base import Solver
from ._krylov import KrylovSolver
from ._solve import solve
from .cg import CG
from .damping import MARGIN, Damping, iteration_bound
from .lanczos import Tridiagonal, lanczos, ritz
from .operator import CountedOperator, Operator, rounding_unit

STEPS = 24


class Forecast(NamedTuple):
    """Products that a solve will take, the check of the residual included and `Solver.init` excluded.

    Attributes:
        usual: of each column, as its residuals go on.
        worst: of any column: the bound on the iterations, or max_iter where that is smaller.
        most: of any column, if all of max_iter were taken.
    """

    usual: list[int]
    worst: int
    most: int


def can_forecast(solver: object) -> bool:
    """Whether `forecast` takes this solver: those that iterate on a residual."""
    return isinstance(solver, KrylovSolver)


def forecast(operator: Operator, b: Block, solver: Solver, state: Any = None, steps: int = STEPS) -> Forecast:
    """Forecasts the products of `solve(operator, b, solver)`, at the price of `steps` products with all columns.

    Conjugate gradients and Lanczos are one method: the first `steps` residuals of `CG` follow from T, for any λ,
    without solving. Another Krylov solver, or one with a preconditioner, takes its first `steps` iterations, and what
    is told is that of its slowest column. Where the residuals do not reach `tol`, they go on at the rate of the last
    half of them.

    Args:
        operator: A, positive semi-definite for a bound to exist.
        b: Q right-hand sides.
        solver: `CG`, `BlockCG`, `MinRes` or `SquaredCG`.
        state: `solver.init(operator)`, if it is at hand.
        steps: k, of the Lanczos run.

    Raises:
        InputError: the solver is another one.

    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(3, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, 4.0, 4.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]], dtype=torch.float64)}
    >>> forecast(Diagonal(), b, CG(damping=1.0)).usual  # two eigenvalues and one, and a product to check
    [3, 2]
    """
    if not isinstance(solver, KrylovSolver):
        raise InputError(f"solver is {solver}; expected one that iterates on a residual, such as CG or BlockCG.")
    state = solver.init(operator) if state is None else state
    if not isinstance(solver, CG) or solver.preconditioner is not None:
        return _by_running(operator, b, solver, state, steps)
    damping = state.damping
    counted = CountedOperator(operator, vectors.columns(b))
    t = lanczos(counted, b, steps)
    worst = int(min(solver.max_iter, _bound(t, damping, solver.tol, rounding_unit(b))))
    usual = [
        1 + math.ceil(min(usual_iterations(history, solver.tol), worst)) if norm else 0
        for history, norm in zip(residual_history(t, damping.value), counted.norm(b).tolist(), strict=True)
    ]
    return Forecast(usual, worst + 1, solver.max_iter + 1)


def _by_running(operator: Operator, b: Block, solver: KrylovSolver, state: Any, steps: int) -> Forecast:
    """The products that the first iterations promise; the residual of the slowest column counts."""
    history: list[float] = []
    first = cast(KrylovSolver, replace(solver, max_iter=min(steps, solver.max_iter)))  # type: ignore[type-var]
    certificate = solve(operator, b, first, state, lambda _, residual: history.append(residual)).certificate
    per_iteration = max(1, (max(certificate.matvecs) - 1) // max(1, max(certificate.iterations)))
    iterations: float = max(certificate.iterations)
    if not all(certificate.converged):
        iterations = min(usual_iterations(torch.tensor(history, dtype=torch.float64), solver.tol), solver.max_iter)
    bound = (
        solver.max_iter if certificate.iteration_bound is None else min(solver.max_iter, certificate.iteration_bound)
    )
    usual = [1 + per_iteration * math.ceil(iterations) if n else 0 for n in certificate.matvecs]
    return Forecast(usual, 1 + per_iteration * bound, 1 + per_iteration * solver.max_iter)


def _bound(t: Tridiagonal, damping: Damping, tol: float, rounding: float) -> float:
    """`iteration_bound`, with the largest Ritz value that is known; infinity where there is none."""
    values = torch.cat([ritz(diagonal, off)[0] for diagonal, off in zip(*t, strict=True)])
    largest = max(MARGIN * (damping.largest_eigenvalue or 0.0), values.max().item())
    if not damping.value or values.min() < -10 * rounding * largest:
        return math.inf
    return iteration_bound(1 + largest / damping.value, tol) or math.inf


def residual_history(t: Tridiagonal, damping: float) -> Tensor:
    """‖r_j‖/‖b‖ of conjugate gradients on A + λI after j = 1, …, k steps from b: float64, shape (Q, k).

    With the pivots d_1 = T_11 + λ, d_j = T_jj + λ − T_{j−1,j}²/d_{j−1} of the factorisation of T + λI, ‖r_j‖ is
    ‖r_{j−1}‖ T_{j,j+1}/d_j. A pivot that is not positive is negative curvature, which ends the solve: NaN from there.

    Args:
        t: T of A, from a Lanczos run at b.
        damping: λ.
    """
    residual, history = torch.ones_like(t.diagonal[:, 0]), []
    pivot = t.diagonal[:, 0] + damping
    for j in range(t.diagonal.shape[1]):
        if j:
            pivot = t.diagonal[:, j] + damping - t.off[:, j - 1].square() / pivot
        pivot = torch.where(pivot > 0, pivot, torch.nan)
        residual = residual * t.off[:, j] / pivot
        history.append(residual)
    return torch.stack(history, 1)


def usual_iterations(history: Tensor, tol: float) -> float:
    """Iterations to the relative residual `tol`, from the first k residuals of one column, shape (k,).

    Where none of them reaches `tol`, they go on at the rate of the last half of them. The rate is that of the
    smallest residuals over the Krylov spaces (those of MINRES), 1/ρ_k² = Σ_{j ≤ k} 1/‖r_j‖², which fall evenly where
    ‖r_j‖ rises and falls; at a rate q per step, ‖r_j‖ = ρ_j / √(1 − q²) (Cullum & Greenbaum, 1996).

    Returns:
        Iterations; infinity where ρ does not fall, or `tol` is 0. A NaN in the history ends it: its position.

    >>> round(usual_iterations(0.7 ** torch.arange(1, 13), 1e-3), 1)  # log(1e-3)/log(0.7)
    19.4
    """
    reached = (~(history > tol)).nonzero()  # NaN included
    if len(reached):
        return int(reached[0]) + 1
    smallest = (1 + history.double().pow(-2).cumsum(0)).rsqrt()
    k = len(history)
    steps = max(1, k // 2)
    earlier = smallest[k - 1 - steps] if k > steps else 1.0
    rate = (smallest[-1] / earlier).item() ** (1 / steps)
    if not 0 < rate < 1 or tol == 0:
        return math.inf
    return k + (math.log(tol) + 0.5 * math.log(1 - rate**2) - smallest[-1].log().item()) / math.log(rate)
