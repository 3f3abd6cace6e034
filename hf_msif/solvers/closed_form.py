"""The inverse that a curvature knows itself: for EK-FAC, whose eigenbasis is at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import vectors
from ..errors import InputError
from ..vectors import Block
from ._base import Progress, Solver, check_settings
from .certificate import Certificate, Solution
from .damping import damping
from .operator import CountedOperator, Operator

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint

NEEDED = ("inverse", "smallest_eigenvalue", "largest_eigenvalue")


@dataclass(frozen=True)
class ClosedForm(Solver):
    """(A + λI)u = b by the operator's own `inverse(b, λ)`: no iteration, and one product to check it.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × the operator's
            `largest_eigenvalue()`.
        damping_fraction: used by damping="auto" alone.
        tol: relative residual up to which a column counts as solved; rounding is all that it has.

    Raises:
        InputError: a setting out of range; in `init`, an operator without `inverse` or, for "auto", one that is zero.

    >>> from hf_msif.solvers import solve
    >>> class Double:
    ...     parameters = {"w": torch.zeros(2)}
    ...     def matvec(self, v):
    ...         return {"w": 2 * v["w"]}
    ...     def inverse(self, v, damping):
    ...         return {"w": v["w"] / (2 + damping)}
    ...     def smallest_eigenvalue(self):
    ...         return 2.0
    ...     largest_eigenvalue = smallest_eigenvalue
    >>> solve(Double(), {"w": torch.tensor([[3.0, 6.0]])}, ClosedForm(damping=1.0)).value["w"].tolist()
    [[1.0, 2.0]]
    """

    damping: float | str = "auto"
    damping_fraction: float = 1e-3
    tol: float = 1e-3

    vectors_held: ClassVar[int] = 3
    damped: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self, counts=())

    def products(self, parameters: int, columns: int) -> int:
        """The one that checks the solution."""
        return 1

    def init(self, operator: Operator) -> float:
        """λ."""
        owner: Any = operator
        if not all(hasattr(owner, name) for name in NEEDED):
            raise InputError(
                f"ClosedForm needs a curvature that knows its inverse, but {type(operator).__name__} does not; "
                "expected curvature='ekfac', or another solver such as CG."
            )
        return damping(self, owner.largest_eigenvalue).value

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: float,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides; called by `solve`."""
        owner: Any = operator.operator
        u = owner.inverse(b, state)
        residual = vectors.add(vectors.add(operator.matvec(u), u, state), b, -1.0)
        norms = operator.norm(b)
        relative = torch.where(norms > 0, operator.norm(residual) / norms, 0.0)
        certificate = Certificate.from_residual(
            "closed_form",
            state,
            self.tol,
            relative,
            operator.counts,
            failure="stalled",
            smallest_ritz=[owner.smallest_eigenvalue()] * len(norms),
            largest_ritz=[owner.largest_eigenvalue()] * len(norms),
        )
        return Solution(u, certificate)
