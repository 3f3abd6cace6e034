"""Conjugate gradients: (A + λI)u = b for positive definite A + λI, one product per iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Progress
from ._krylov import Dot, KrylovSolver, LinearSystem, krylov
from .certificate import Certificate, Solution
from .damping import Damping, bound_of
from .operator import CountedOperator, rounding_unit

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


@dataclass(frozen=True)
class CG(KrylovSolver):
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

    vectors_held: ClassVar[int] = 5

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
        u, report = krylov(ConjugateGradients, system, self, progress, checkpoint)
        report |= {"largest_eigenvalue": state.largest_eigenvalue, "iteration_bound": bound_of(state, self.tol)}
        return Solution(u, Certificate("cg", **report))


class ConjugateGradients(NamedTuple):
    """The recurrence, and the Lanczos tridiagonal in it: T[k,k] = 1/αₖ + βₖ₋₁/αₖ₋₁, T[k,k+1] = √βₖ/αₖ."""

    x: Block
    r: Block
    p: Block
    rr: Tensor  # ‖r‖²
    carry: Tensor  # βₖ₋₁/αₖ₋₁
    scale: Tensor  # the largest curvature |pᵀSp|/‖p‖² so far, against which rounding is measured
    error: Tensor
    stop: Tensor
    negative: Tensor
    diagonal: Tensor
    off: Tensor

    @classmethod
    def start(cls, r: Block, dot: Dot) -> ConjugateGradients:
        rr = dot(r, r)
        zero, no = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.bool)
        return cls(vectors.zeros_like(r), r, vectors.clone(r), rr, zero, zero, rr.sqrt(), no, no, zero, zero)

    def step(self, matvec: Callable[[Block], Block], dot: Dot) -> ConjugateGradients:
        x, r, p, rr = self.x, self.r, self.p, self.rr
        product = matvec(p)
        pp, curvature = dot(p, p), dot(p, product)
        scale = torch.maximum(self.scale, curvature.abs() / pp)
        noise = rounding_unit(p) * scale * pp
        flat = curvature <= noise
        alpha = torch.where(flat, 0.0, rr / curvature)
        vectors.add_(x, p, alpha)
        vectors.add_(r, product, -alpha)
        rr_next = dot(r, r)
        beta, inverse_alpha = rr_next / rr, curvature / rr
        return ConjugateGradients(
            x=x,
            r=r,
            p=vectors.add(r, p, beta),
            rr=rr_next,
            carry=beta * inverse_alpha,
            scale=scale,
            error=rr_next.sqrt(),
            stop=flat,
            negative=curvature < -noise,
            diagonal=inverse_alpha + self.carry,
            off=beta.sqrt() * inverse_alpha,
        )
