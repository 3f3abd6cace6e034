"""Lanczos runs: the tridiagonal that a symmetric operator shows to a vector, and what can be read off it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from .operator import CountedOperator, Operator, rounding_unit

MOST_STEPS = 16  # products of one column with which the largest eigenvalue is estimated
SETTLED = 0.01  # relative change of the estimate, in two steps in a row, at which it is taken


class Tridiagonal(NamedTuple):
    """T of k Lanczos steps for Q columns: vᵢᵀAvᵢ on the diagonal and ‖·‖ beside it, float64, both of shape (Q, k).

    `off[:, j]` ties row j to row j + 1, so that its last entry ties T to the step that was not taken.
    """

    diagonal: Tensor
    off: Tensor


def lanczos(
    operator: CountedOperator, start: Block, steps: int, enough: Callable[[Tridiagonal], bool] | None = None
) -> Tridiagonal:
    """T of `steps` Lanczos steps from each column of `start`, one product per step (Lanczos, 1950).

    It is the three-term recurrence in the order of Paige (1972), without re-orthogonalisation: three blocks are held
    instead of all Lanczos vectors. Rounding then repeats eigenvalues that have converged, and moves none of them. It
    does the same to conjugate gradients, so T also foretells their residuals as they come, delay included.

    Args:
        operator: A; it gives the inner product.
        start: Q vectors. A column that is zero, or whose Krylov space is exhausted, continues with rows of zeros.
        steps: k at most.
        enough: ends the run early where it is true of T so far.

    Returns:
        T, on the device of the inner products.
    """
    v, before = start, start
    beta = norms = operator.norm(start)
    scale = torch.zeros_like(norms)
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    while len(diagonal) < steps:
        v_next = vectors.scale(v, torch.where(beta > 0, 1 / beta, 0.0))
        product = operator.matvec(v_next)
        rest = vectors.add(product, before, -beta) if diagonal else vectors.clone(product)
        alpha = operator.dot(v_next, rest)
        vectors.add_(rest, v_next, -alpha)
        beta = operator.norm(rest)
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
        beta = torch.where(beta <= rounding_unit(start) * scale, 0.0, beta)  # what is left is rounding
        diagonal.append(alpha)
        off.append(beta)
        v, before = rest, v_next
        if enough is not None and enough(Tridiagonal(torch.stack(diagonal, 1), torch.stack(off, 1))):
            break
    return Tridiagonal(torch.stack(diagonal, 1), torch.stack(off, 1))


def ritz(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values θ, ascending, and the share of the start vector at each of them, for one T of shape (k,).

    The shares are the squared first components of the eigenvectors of T: the weights of Gauss quadrature with the
    nodes θ for the spectral measure of the start vector (Golub & Welsch, 1969). They add up to 1.

    >>> values, shares = ritz(torch.tensor([2.0, 2.0]).double(), torch.tensor([1.0, 0.0]).double())
    >>> values.round(decimals=6).tolist(), shares.round(decimals=6).tolist()
    ([1.0, 3.0], [0.5, 0.5])
    """
    tridiagonal = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    values, basis = torch.linalg.eigh(tridiagonal)
    return values, basis[0] ** 2


def largest_eigenvalue(operator: Operator) -> float:
    """The largest |eigenvalue| of A to about 1 %, from a Lanczos run of at most `MOST_STEPS` products of one column.

    It starts at a seeded vector of ±1, the same on any device and any number of processes, and ends where the largest
    |Ritz value|, which approaches from below, has changed by at most `SETTLED` twice in a row. Exact for P ≤ 2.

    Raises:
        InputError: a product holds NaN or inf.

    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, -4.0], dtype=torch.float64)}
    >>> round(largest_eigenvalue(Diagonal()), 6)
    4.0
    """
    estimates: list[float] = []

    def settled(t: Tridiagonal) -> bool:
        values, _ = ritz(t.diagonal[0], t.off[0])
        estimates.append(values.abs().max().item())
        exhausted = not t.off[0, -1]
        if exhausted or len(estimates) < 3:
            return exhausted
        first, second, third = estimates[-3:]
        return max(abs(second - first), abs(third - second)) <= SETTLED * third

    counted = CountedOperator(operator, 1)
    lanczos(counted, counted.rademacher(seed=0), MOST_STEPS, settled)
    return estimates[-1]
