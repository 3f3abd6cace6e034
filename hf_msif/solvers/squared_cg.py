"""The paper's system, eq. (16): conjugate gradients on the squared Hessian, two products per iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import vectors
from ..errors import InputError
from ..vectors import Block
from ._base import Progress
from ._krylov import KrylovSolver, LinearSystem, krylov
from .certificate import Certificate, Solution
from .cg import ConjugateGradients
from .damping import TRAINING, Damping, bound_of, damping, damping_products
from .lanczos import largest_eigenvalue
from .operator import CountedOperator, Operator

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


@dataclass(frozen=True)
class SquaredCG(KrylovSolver):
    """(H² + λI)u = Hb by conjugate gradients, the minimiser of ½uᵀ(H² + λI)u − uᵀHb (paper, eq. (16)).

    H may be indefinite: H² is not. The price is two products per iteration and the square of the condition number.
    For λ = 0 and regular H the solution is that of Hu = b, which `MinRes` reaches without squaring.

    Args:
        damping: λ ≥ 0, in units of *squared* eigenvalues, or "auto": `damping_fraction` × the largest squared
            eigenvalue.
        tol: a column is done when ‖(H² + λI)u − Hb‖ ≤ tol ‖Hb‖. The certificate also has ‖Hu − b‖/‖b‖.
        max_iter: the largest number of iterations of a column, restarts included; two products each.
        damping_fraction: used by damping="auto" alone. The default is the square of that of `CG`: h/(h² + λ) departs
            from 1/h below the same |h|, a thousandth of the largest.

    Raises:
        InputError: a setting out of range; in `init`, damping="auto" where H is zero.

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
    damping_fraction: float = 1e-6

    vectors_held: ClassVar[int] = 6

    def __post_init__(self):
        super().__post_init__()
        if self.damping == TRAINING:
            raise InputError(
                "SquaredCG(damping='training'): its λ is added to squared eigenvalues, 1/τ to eigenvalues; expected a "
                "number or 'auto', or another solver such as CG."
            )

    def init(self, operator: Operator) -> Damping:
        """λ, at the cost of a short Lanczos run when it must be derived."""
        return damping(self, lambda: largest_eigenvalue(operator) ** 2)

    def products(self, parameters: int, columns: int) -> int:
        """Two per iteration; Hb; two for the true residual; and those of the Lanczos run for the damping."""
        return 2 * self.max_iter + 3 + damping_products(self, columns)

    def spectral_filter(self, eigenvalues: Tensor, damping: float) -> Tensor:
        """σ / (σ² + λ)"""
        return eigenvalues / (eigenvalues**2 + damping)

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Damping,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides; called by `solve`."""
        matvec, norms = operator.matvec, operator.norm(b)
        residual_unsquared = torch.where(norms > 0, torch.nan, norms)  # NaN until `residual` has computed it
        nonzero = residual_unsquared.nonzero().flatten()
        rhs = vectors.put_(vectors.zeros_like(b), nonzero, matvec(vectors.take(b, nonzero), nonzero))

        def squared(v: Block, index: Tensor) -> Block:
            return matvec(matvec(v, index), index)

        def residual(u: Block, index: Tensor) -> Block:
            # H(b − Hu) − λu needs as many products as Hb − H(Hu) − λu, cancels less, and yields b − Hu on the way.
            unsquared = vectors.add(vectors.take(b, index), matvec(u, index), -1.0)
            residual_unsquared[index] = operator.norm(unsquared) / norms[index]
            return vectors.add(matvec(unsquared, index), u, -state.value)

        system = LinearSystem(operator, squared, rhs, state.value, residual)
        u, report = krylov(ConjugateGradients, system, self, progress, checkpoint)
        residual_unsquared[residual_unsquared.isnan() & (operator.norm(u) == 0)] = 1.0  # Hb = 0, so u = 0
        # Columns that were finished before an interruption: their unsquared residuals were not saved.
        unknown = residual_unsquared.isnan().nonzero().flatten()
        if len(unknown):
            residual(vectors.take(u, unknown), unknown)
        report |= {"matvecs": operator.counts.tolist(), "residual_unsquared": residual_unsquared.tolist()}
        report |= {"largest_eigenvalue": state.largest_eigenvalue, "iteration_bound": bound_of(state, self.tol)}
        return Solution(u, Certificate("squared_cg", **report))
