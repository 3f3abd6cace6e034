"""Conjugate gradients: (A + λI)u = b for positive definite A + λI, one product per iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Progress
from ._krylov import LinearSystem, Recurrence, krylov
from .certificate import Certificate, Solution
from .operator import CountedOperator, rounding_unit
from .preconditioner import PreconditionedSolver, Preconditioner, Prepared, not_definite

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


@dataclass(frozen=True)
class CG(PreconditionedSolver):
    """(A + λI)u = b by conjugate gradients (Hestenes & Stiefel, 1952).

    The iterate minimises ½uᵀ(A + λI)u − uᵀb over the Krylov space, which has a minimum only where A + λI is
    positive definite: a Gauss-Newton matrix, or a Hessian at a true minimum. A direction p with pᵀ(A + λI)p ≤ 0
    ends the column at the iterate before it, and the certificate says so.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × the largest |eigenvalue|,
            which mutes directions of curvature below λ and bounds the iterations (`damping.iteration_bound`).
        tol: a column is done when ‖(A + λI)u − b‖ ≤ tol ‖b‖.
        max_iter: the largest number of iterations of a column, restarts included; one product each.
        damping_fraction: used by damping="auto" alone.
        preconditioner: None, a name in `registry.PRECONDITIONERS` such as "nystrom", or a `Preconditioner`: fewer
            iterations, at a price that is paid once per operator. `tol` is that of the true residual all the same.

    Raises:
        InputError: a setting out of range; in `init`, damping="auto" where A is zero.

    >>> from hf_msif.solvers import solve
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, 4.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[3.0, 6.0]], dtype=torch.float64)}
    >>> solve(Diagonal(), b, CG(damping=2.0)).value["w"].round(decimals=6).tolist()
    [[1.0, 1.0]]
    >>> round(solve(Diagonal(), b, CG()).certificate.damping, 6)  # 0.001 × 4
    0.004
    """

    damping: float | str = "auto"
    tol: float = 1e-3
    max_iter: int = 200
    damping_fraction: float = 1e-3
    preconditioner: Preconditioner | str | None = None

    unpreconditioned: ClassVar[int] = 5

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Prepared,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides; called by `solve`."""
        system = self.system(operator, b, state)
        u, report = krylov(ConjugateGradients, system, self, progress, checkpoint)
        return Solution(u, Certificate("cg", **report, **self.damping_facts(state.damping)))


@dataclass
class ConjugateGradients(Recurrence):
    """The recurrence, and the Lanczos tridiagonal in it: T[k,k] = 1/αₖ + βₖ₋₁/αₖ₋₁, T[k,k+1] = √βₖ/αₖ.

    With a preconditioner M it runs in the inner product of M⁻¹, and T is that of M^-½ S M^-½; `error` is ‖r‖ all the
    same.
    """

    x: Block
    r: Block
    p: Block
    rz: Tensor  # rᵀM⁻¹r
    carry: Tensor  # βₖ₋₁/αₖ₋₁
    scale: Tensor  # the largest curvature |pᵀSp|/‖p‖² so far, against which rounding is measured
    error: Tensor
    stop: Tensor
    negative: Tensor
    diagonal: Tensor
    off: Tensor

    @classmethod
    def start(cls, r: Block, system: LinearSystem) -> ConjugateGradients:
        z, rr, rz = _preconditioned(r, system)
        zero, no = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.bool)
        return cls(vectors.zeros_like(r), r, vectors.clone(z), rz, zero, zero, rr.sqrt(), no, no, zero, zero)

    def step(self, matvec: Callable[[Block], Block], system: LinearSystem) -> ConjugateGradients:
        x, r, p, rz = self.x, self.r, self.p, self.rz
        product = matvec(p)
        pp, curvature = system.dot(p, p), system.dot(p, product)
        scale = torch.maximum(self.scale, curvature.abs() / pp)
        noise = rounding_unit(p) * scale * pp
        flat = curvature <= noise
        alpha = torch.where(flat, 0.0, rz / curvature)
        vectors.add_(x, p, alpha)
        vectors.add_(r, product, -alpha)
        z, rr, rz_next = _preconditioned(r, system)
        beta, inverse_alpha = rz_next / rz, curvature / rz
        return ConjugateGradients(
            x=x,
            r=r,
            p=vectors.add(z, p, beta),
            rz=rz_next,
            carry=beta * inverse_alpha,
            scale=scale,
            error=rr.sqrt(),
            stop=flat,
            negative=curvature < -noise,
            diagonal=inverse_alpha + self.carry,
            off=beta.sqrt() * inverse_alpha,
        )


def _preconditioned(r: Block, system: LinearSystem) -> tuple[Block, Tensor, Tensor]:
    """z = M⁻¹r, ‖r‖² and rᵀz."""
    rr = system.dot(r, r)
    if system.precondition is None:
        return r, rr, rr
    z = system.precondition(r)
    rz = system.dot(r, z)
    if ((rz <= 0) & (rr > 0)).any():
        raise not_definite(rz.min().item())
    return z, rr, rz
