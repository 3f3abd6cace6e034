"""Conjugate gradients: (A + λI)u = b for positive definite A + λI, one product an iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Counted, Damping, Operator, check_settings, damping, eps
from ._krylov import krylov
from ._solve import Certificate, Keeper, Progress, Solution


@dataclass(frozen=True)
class CG:
    """(A + λI)u = b by conjugate gradients (Hestenes & Stiefel, 1952).

    The iterate minimises ½uᵀ(A + λI)u − uᵀb over the Krylov space, which has a minimum only where A + λI is
    positive definite: a Gauss-Newton matrix, or a Hessian at a real minimum. A direction p with pᵀ(A + λI)p ≤ 0
    ends the column at the iterate before it, and the certificate says so.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × trace(A)/P.
        tol: a column is done when ‖(A + λI)u − b‖ ≤ tol ‖b‖.
        max_iter: most iterations a column, restarts included; one product each.
        damping_fraction: used by damping="auto" alone.

    Raises:
        ValueError: on settings out of range, and for damping="auto" when the trace is not positive.

    >>> from hf_msif.solvers import solve
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, 4.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[3.0, 6.0]], dtype=torch.float64)}
    >>> solve(Diagonal(), b, CG(damping=2.0)).value["w"].round(decimals=6).tolist()
    [[1.0, 1.0]]
    >>> solve(Diagonal(), b, CG()).certificate.damping  # 10 × (1 + 4)/2
    25.0
    """

    damping: float | str = "auto"
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
        u, report = krylov(ConjugateGradients, product, b, state.value, self, product.counts, progress, keeper)
        certificate = Certificate(
            "cg", state.value, mean_eigenvalue=state.mean_eigenvalue, matvecs=product.counts.tolist(), **report
        )
        return Solution(u, certificate)


class ConjugateGradients(NamedTuple):
    """The recurrence, and the tridiagonal it hides: T[k,k] = 1/αₖ + βₖ₋₁/αₖ₋₁, T[k,k+1] = √βₖ/αₖ."""

    x: Block
    r: Block
    p: Block
    rr: Tensor  # ‖r‖²
    carry: Tensor  # βₖ₋₁/αₖ₋₁
    scale: Tensor  # largest curvature |pᵀSp|/‖p‖² met, the yardstick of rounding
    error: Tensor
    stop: Tensor
    negative: Tensor
    diagonal: Tensor
    off: Tensor

    @classmethod
    def start(cls, r: Block) -> ConjugateGradients:
        rr = vectors.dot(r, r)
        zero, no = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.bool)
        return cls(vectors.zeros_like(r), r, vectors.clone(r), rr, zero, zero, rr.sqrt(), no, no, zero, zero)

    def step(self, matvec: Callable[[Block], Block]) -> ConjugateGradients:
        x, r, p, rr = self.x, self.r, self.p, self.rr
        product = matvec(p)
        pp, curvature = vectors.dot(p, p), vectors.dot(p, product)
        scale = torch.maximum(self.scale, curvature.abs() / pp)
        noise = eps(p) * scale * pp
        flat = curvature <= noise
        alpha = torch.where(flat, 0.0, rr / curvature)
        vectors.add_(x, p, alpha)
        vectors.add_(r, product, -alpha)
        new = vectors.dot(r, r)
        beta, inverse = new / rr, curvature / rr
        return ConjugateGradients(
            x=x,
            r=r,
            p=vectors.add(r, p, beta),
            rr=new,
            carry=beta * inverse,
            scale=scale,
            error=new.sqrt(),
            stop=flat,
            negative=curvature < -noise,
            diagonal=inverse + self.carry,
            off=beta.sqrt() * inverse,
        )
