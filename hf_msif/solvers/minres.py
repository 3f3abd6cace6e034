"""Minimum residual method: (A + λI)u = b for symmetric, possibly indefinite A, one product an iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Counted, Damping, Operator, check_settings, damping
from ._krylov import krylov
from ._solve import Certificate, Keeper, Progress, Solution


@dataclass(frozen=True)
class MinRes:
    """(A + λI)u = b by the minimum residual method (Paige & Saunders, 1975).

    The iterate minimises ‖(A + λI)u − b‖ over the Krylov space; A may be indefinite, and singular when b is in its
    range. The residual falls monotonically, and the certificate's `negative_curvature` is for information.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × trace(A)/P. On an
            indefinite A a shift can make the system *worse*: it moves negative eigenvalues towards zero.
        tol: a column is done when ‖(A + λI)u − b‖ ≤ tol ‖b‖.
        max_iter: most iterations a column, restarts included; one product each.
        damping_fraction: used by damping="auto" alone.

    Raises:
        ValueError: on settings out of range, and for damping="auto" when the trace is not positive.

    >>> from hf_msif.solvers import solve
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, -2.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[3.0, 6.0]], dtype=torch.float64)}
    >>> solution = solve(Diagonal(), b, MinRes())
    >>> solution.value["w"].round(decimals=6).tolist(), solution.certificate.negative_curvature
    ([[3.0, -3.0]], [True])
    """

    damping: float | str = 0.0
    tol: float = 1e-3
    max_iter: int = 200
    damping_fraction: float = 10.0

    def __post_init__(self):
        check_settings(self, counts=("max_iter",))

    def init(self, operator: Operator) -> Damping:
        """λ, at the cost of four products when it must be estimated."""
        return damping(self, operator)

    def compute(
        self,
        operator: Operator,
        b: Block,
        state: Damping,
        progress: Progress | None = None,
        keeper: Keeper | None = None,
    ) -> Solution:
        """One block of right-hand sides; called by `solve`."""
        product = Counted(operator, b)
        u, report = krylov(MinimumResidual, product, b, state.value, self, product.counts, progress, keeper)
        certificate = Certificate(
            "minres", state.value, mean_eigenvalue=state.mean_eigenvalue, matvecs=product.counts.tolist(), **report
        )
        return Solution(u, certificate)


# ‖S r‖ / (‖S‖ ‖r‖) at which r counts as orthogonal to the range of S, as far as float64 directions can tell.
LEAST_SQUARES = torch.finfo(torch.float64).eps ** 0.5


class MinimumResidual(NamedTuple):
    """Lanczos vectors v, and the QR factorisation of their tridiagonal by plane rotations (c, s), one a step.

    x and w are float64 whatever the dtype of the operator: rounding them costs MINRES the *square* of the condition
    number in attainable accuracy, where rounding v costs the condition number (Sleijpen, van der Vorst &
    Modersitzki, 2000). In float32 that decides between an answer and noise, for half as much memory again.
    """

    x: Block
    v: Block
    v_old: Block
    w: Block  # search directions W = V R⁻¹, R upper triangular with three diagonals
    w_old: Block
    off: Tensor  # βₖ₊₁, ties vₖ to vₖ₊₁
    c: Tensor
    s: Tensor
    above: Tensor  # entry above the diagonal of R that the last rotation left to be rotated once more
    corner: Tensor  # entry two above the diagonal, of the next column of R
    scale: Tensor  # largest entry of the tridiagonal, the yardstick of rounding
    error: Tensor
    stop: Tensor
    negative: Tensor
    diagonal: Tensor

    @classmethod
    def start(cls, r: Block) -> MinimumResidual:
        error = vectors.norm(r)
        zero, no = torch.zeros_like(error), torch.zeros_like(error, dtype=torch.bool)
        wide = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in r.items()}
        return cls(
            x=vectors.clone(wide),
            v=r,
            v_old=vectors.zeros_like(r),
            w=wide,
            w_old=wide,
            off=zero,
            c=zero - 1,
            s=zero,
            above=zero,
            corner=zero,
            scale=zero,
            error=error,
            stop=no,
            negative=no,
            diagonal=zero,
        )

    def step(self, matvec: Callable[[Block], Block]) -> MinimumResidual:
        v = self.v
        new = vectors.add(matvec(v), self.v_old, -self.off)
        alpha = vectors.dot(v, new)
        vectors.add_(new, v, -alpha)
        beta = vectors.norm(new)
        scale = torch.maximum(self.scale, torch.maximum(alpha.abs(), beta))

        delta = self.c * self.above + self.s * alpha
        rest = self.s * self.above - self.c * alpha
        gamma = torch.hypot(rest, beta)
        # ‖S r‖ = error · ‖(rest, c β)‖ for the iterate before this step. Where it vanishes that iterate is the
        # least-squares solution of a singular system whose right-hand side leaves the range; a further step would
        # follow rounding.
        stop = torch.hypot(rest, self.c * beta) <= LEAST_SQUARES * scale
        gamma = torch.where(stop, 1.0, gamma)
        c, s = rest / gamma, beta / gamma
        w = vectors.add({name: t.double() for name, t in v.items()}, self.w_old, -self.corner)
        vectors.add_(w, self.w, -delta)
        w = vectors.scale(w, 1 / gamma)
        vectors.add_(self.x, w, torch.where(stop, 0.0, c * self.error))
        return MinimumResidual(
            x=self.x,
            v=vectors.scale(new, 1 / beta),  # β = 0 leaves no error, or stops: the column ends here
            v_old=v,
            w=w,
            w_old=self.w,
            off=beta,
            c=c,
            s=s,
            above=-self.c * beta,
            corner=self.s * beta,
            scale=scale,
            error=torch.where(stop, self.error, s * self.error),
            stop=stop,
            negative=self.negative,
            diagonal=alpha,
        )
