"""Minimum residual method: (A + λI)u = b for symmetric, possibly indefinite A, one product per iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Progress
from ._krylov import KrylovSolver, LinearSystem, Recurrence, krylov
from .certificate import Certificate, Solution
from .damping import Damping
from .operator import CountedOperator

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


@dataclass(frozen=True)
class MinRes(KrylovSolver):
    """(A + λI)u = b by the minimum residual method (Paige & Saunders, 1975).

    The iterate minimises ‖(A + λI)u − b‖ over the Krylov space; A may be indefinite, and singular when b is in its
    range. The residual falls monotonically. `negative_curvature` in the certificate is information, not a failure.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × the largest |eigenvalue|.
            On an indefinite A a shift can make the system *worse*: it moves negative eigenvalues towards zero.
        tol: a column is done when ‖(A + λI)u − b‖ ≤ tol ‖b‖.
        max_iter: the largest number of iterations of a column, restarts included; one product each.
        damping_fraction: used by damping="auto" alone.

    Raises:
        InputError: a setting out of range; in `init`, damping="auto" where A is zero.

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
    damping_fraction: float = 1e-3

    vectors_held: ClassVar[int] = 12

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Damping,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides; called by `solve`."""
        system = LinearSystem(operator, operator.matvec, b, state.value)
        u, report = krylov(MinimumResidual, system, self, progress, checkpoint)
        return Solution(u, Certificate("minres", largest_eigenvalue=state.largest_eigenvalue, **report))


# The value of ‖S r‖ / (‖S‖ ‖r‖) below which r counts as orthogonal to the range of S, for directions in float64.
LEAST_SQUARES = torch.finfo(torch.float64).eps ** 0.5


@dataclass
class MinimumResidual(Recurrence):
    """Lanczos vectors v, and the QR factorisation of their tridiagonal by plane rotations (c, s), one per step.

    x and w are float64 whatever the dtype of the operator: rounding them costs MINRES the *square* of the condition
    number in attainable accuracy, where rounding v costs the condition number (Sleijpen, van der Vorst &
    Modersitzki, 2000). In float32 this decides between a solution and noise. It costs half as much memory again.
    """

    x: Block
    v: Block
    v_old: Block
    w: Block  # search directions W = V R⁻¹, R upper triangular with three diagonals
    w_old: Block
    off: Tensor  # βₖ₊₁, which ties vₖ to vₖ₊₁
    c: Tensor
    s: Tensor
    above: Tensor  # entry above the diagonal of R, to which one more rotation is to be applied
    corner: Tensor  # entry two above the diagonal, of the next column of R
    scale: Tensor  # largest entry of the tridiagonal, against which rounding is measured
    error: Tensor
    stop: Tensor
    negative: Tensor
    diagonal: Tensor

    @classmethod
    def start(cls, r: Block, system: LinearSystem) -> MinimumResidual:
        error = system.norm(r)
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

    def step(self, matvec: Callable[[Block], Block], system: LinearSystem) -> MinimumResidual:
        v = self.v
        v_next = vectors.add(matvec(v), self.v_old, -self.off)
        alpha = system.dot(v, v_next)
        vectors.add_(v_next, v, -alpha)
        beta = system.norm(v_next)
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
            v=vectors.scale(v_next, 1 / beta),  # where β = 0 the error is zero or `stop` is set: the column ends here
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
