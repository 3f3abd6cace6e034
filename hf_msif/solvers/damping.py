"""The damping λ: a number, or a fraction of the largest eigenvalue; how it bounds the iterations and what it mutes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ..errors import InputError
from .lanczos import MOST_STEPS

TRAINING = "training"  # 1/τ of the stage's recorded run, which an implicit stage puts in its place
MARGIN = 1.03  # the largest eigenvalue over its estimate, at most: measured on the spectra of the tests


class DampingSettings(Protocol):
    """The settings of a solver that `damping` reads."""

    @property
    def damping(self) -> float | str: ...

    @property
    def damping_fraction(self) -> float: ...


class Damping(NamedTuple):
    """λ in force, and the largest |eigenvalue| of which it is a fraction (None where λ was given as a number)."""

    value: float
    largest_eigenvalue: float | None


def damping(solver: DampingSettings, largest: Callable[[], float]) -> Damping:
    """`solver.damping`, or for "auto" `solver.damping_fraction` × the largest |eigenvalue|.

    Relative to the largest eigenvalue λ bounds the condition number, by 1 + 1/fraction. A fraction of the mean
    eigenvalue bounds nothing: nearly all of the millions of directions of a real model are flat.

    Args:
        solver: its settings.
        largest: the largest |eigenvalue| of the operator that λ is added to; called for "auto" alone.

    Raises:
        InputError: the operator is zero; or damping is "training", which an implicit stage replaces by a number.
    """
    if solver.damping == TRAINING:
        raise InputError(
            "damping='training' is 1 over the training time of a recorded run, which a solver alone does not know; "
            "expected Stage(solver=..., run=FOLDER) of an implicit stage, or damping as a number."
        )
    if solver.damping != "auto":
        return Damping(float(solver.damping), None)
    eigenvalue = largest()
    if not eigenvalue > 0:
        raise InputError(
            "damping='auto' needs curvature, but the operator is zero: does any parameter reach the loss? Else give "
            "damping as a number."
        )
    return Damping(solver.damping_fraction * eigenvalue, eigenvalue)


def damping_products(solver: DampingSettings, columns: int) -> int:
    """Products with Q = `columns` columns that a Lanczos run for `damping` takes at most, rounded up."""
    return -(-MOST_STEPS // columns) if solver.damping == "auto" else 0


def iteration_bound(condition: float, tol: float) -> int | None:
    """Iterations after which conjugate gradients reach ‖r‖ ≤ tol ‖b‖, whatever b is, in exact arithmetic.

    k ≤ ½ √κ ln(2 √κ / tol), from ‖e_k‖ ≤ 2 ((√κ − 1)/(√κ + 1))^k ‖e_0‖ in the norm of the operator. The √κ in the
    logarithm takes this norm to that of the residual; without it, the bound is false on ordinary spectra.

    Args:
        condition: κ, the largest eigenvalue over the smallest.
        tol: relative residual.

    Returns:
        A bound on k; None where tol is 0.

    >>> iteration_bound(1001, 1e-3)
    175
    """
    if tol <= 0:
        return None
    root = math.sqrt(condition)
    return max(1, math.ceil(0.5 * root * math.log(2 * root / tol)))


def bound_of(damping: Damping, tol: float) -> int | None:
    """`iteration_bound` of a positive semi-definite operator with a damping that was derived; else None."""
    if damping.largest_eigenvalue is None:
        return None
    return iteration_bound(1 + MARGIN * damping.largest_eigenvalue / damping.value, tol)


def muted_share(values: Tensor, shares: Tensor, damping: float) -> float:
    """The share of ‖b‖² in directions with |curvature| < λ, where the solution follows λ and not the curvature.

    Args:
        values: Ritz values of the damped operator A + λI from a Lanczos run at b, shape (k,).
        shares: of b at each of them, as `lanczos.ritz` returns them.
        damping: λ.

    >>> import torch
    >>> muted_share(torch.tensor([1.5, 3.0]), torch.tensor([0.25, 0.75]), damping=1.0)
    0.25
    """
    return shares[(values - damping).abs() < damping].sum().item()
