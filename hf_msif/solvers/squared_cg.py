"""The paper's system, eq. (16): conjugate gradients on the squared Hessian, two products an iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Counted, Damping, Operator, check_settings, damping
from ._krylov import krylov
from ._solve import Certificate, Keeper, Progress, Solution
from .cg import ConjugateGradients


@dataclass(frozen=True)
class SquaredCG:
    """(H² + λI)u = Hb by conjugate gradients, the minimiser of ½uᵀ(H² + λI)u − uᵀHb (paper, eq. (16)).

    H may be indefinite: H² is not. The price is two products an iteration and the square of the condition number;
    for λ = 0 and regular H the solution is that of Hu = b, which `MinRes` reaches without squaring.

    Args:
        damping: λ ≥ 0, in units of *squared* eigenvalues, or "auto": `damping_fraction` × trace(H²)/P.
        tol: a column is done when ‖(H² + λI)u − Hb‖ ≤ tol ‖Hb‖. The certificate also has ‖Hu − b‖/‖b‖.
        max_iter: most iterations a column, restarts included; two products each.
        damping_fraction: used by damping="auto" alone.

    Raises:
        ValueError: on settings out of range, and for damping="auto" when H is zero.

    >>> import torch
    >>> from hf_msif.solvers import solve
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, -2.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[2.0, 5.0]], dtype=torch.float64)}
    >>> solve(Diagonal(), b, SquaredCG(damping=1.0)).value["w"].round(decimals=6).tolist()  # hᵢ bᵢ / (hᵢ² + 1)
    [[1.0, -2.0]]
    """

    damping: float | str = 0.0
    tol: float = 1e-3
    max_iter: int = 200
    damping_fraction: float = 0.1

    def __post_init__(self):
        check_settings(self, counts=("max_iter",))

    def init(self, operator: Operator) -> Damping:
        """λ, at the cost of four products when it must be estimated."""
        return damping(self, operator, squared=True)

    def compute(
        self,
        operator: Operator,
        b: Block,
        state: Damping,
        progress: Progress | None = None,
        keeper: Keeper | None = None,
    ) -> Solution:
        """One block of right-hand sides; called by `solve`."""
        product, size = Counted(operator, b), vectors.norm(b)
        unsquared = torch.where(size > 0, torch.nan, size)  # known when the residual is
        index = unsquared.nonzero().flatten()
        rhs = vectors.put_(vectors.zeros_like(b), index, product(vectors.take(b, index), index))

        def squared(v: Block, index: Tensor) -> Block:
            return product(product(v, index), index)

        def residual(u: Block, index: Tensor) -> Block:
            # H(b − Hu) − λu costs as much as Hb − H(Hu) − λu, cancels less, and passes by the residual of Hu = b.
            rest = vectors.add(vectors.take(b, index), product(u, index), -1.0)
            unsquared[index] = vectors.norm(rest) / size[index]
            return vectors.add(product(rest, index), u, -state.value)

        counts = product.counts
        u, report = krylov(ConjugateGradients, squared, rhs, state.value, self, counts, progress, keeper, residual)
        unsquared[unsquared.isnan() & (vectors.norm(u) == 0)] = 1.0  # Hb = 0: nothing was done
        left = unsquared.isnan().nonzero().flatten()  # finished before an interruption
        if len(left):
            residual(vectors.take(u, left), left)
        certificate = Certificate(
            "squared_cg",
            state.value,
            matvecs=product.counts.tolist(),
            mean_eigenvalue=state.mean_eigenvalue,
            residual_unsquared=unsquared.tolist(),
            **report,
        )
        return Solution(u, certificate)
