"""`Auto`: a solver chosen by the size of the system, its definiteness and the number of right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import InputError
from ..vectors import Block
from ._base import Problem, Progress, Solver, check_settings
from .block_cg import BlockCG
from .certificate import Solution
from .cg import CG
from .closed_form import ClosedForm
from .dense import Dense
from .minres import MinRes
from .nystrom import Nystrom
from .operator import CountedOperator, Operator

SMALL = 500  # parameters up to which the matrix is formed: the products of conjugate gradients for a few columns
MANY = 16  # columns from which Nystrom's 64 products pay beside a block's shared Krylov space
NYSTROM_BYTES = 2**31  # its 64 vectors must fit


@dataclass(frozen=True)
class Auto(Solver):
    """(A + λI)u = b by a solver that suits the problem; the certificate says which, and why.

    - a curvature that knows its inverse (EK-FAC): `ClosedForm`;
    - a curvature that may be indefinite (the Hessian): `MinRes`, without damping unless it is given;
    - at most `SMALL` parameters: `Dense`;
    - one right-hand side: `CG`;
    - several: `BlockCG`, in whose shared Krylov space they take about half of the products; from `MANY` on with the
      preconditioner `Nystrom`, if its vectors fit into `NYSTROM_BYTES`.

    Args:
        damping: λ ≥ 0, or "auto": `damping_fraction` × the largest |eigenvalue|. "training", here and in other
            solvers but `SquaredCG`: 1/τ of the run that `Stage.run` names, see `influence.recorded.TrainingDamping`.
        tol: the relative residual at which a column is done.
        max_iter: the largest number of iterations of a column.
        damping_fraction: used by damping="auto" alone.

    Raises:
        InputError: a setting out of range.

    >>> Auto().chosen(Problem(parameters=10**6, columns=1, semidefinite=True))[0]
    CG(damping='auto', tol=0.001, max_iter=200, damping_fraction=0.001, preconditioner=None)
    """

    damping: float | str = "auto"
    tol: float = 1e-3
    max_iter: int = 200
    damping_fraction: float = 1e-3

    damped: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self, counts=("max_iter",))

    def chosen(self, problem: Problem) -> tuple[Solver, str]:
        """The solver, and why."""
        damping: dict[str, Any] = {"damping": self.damping, "damping_fraction": self.damping_fraction}
        iterations: dict[str, Any] = {"tol": self.tol, "max_iter": self.max_iter}
        if problem.closed_form:
            return ClosedForm(**damping, tol=self.tol), "closed_form, since the curvature knows its inverse"
        if not problem.semidefinite:
            shift = 0.0 if self.damping == "auto" else self.damping
            return MinRes(damping=shift, **iterations), "minres, since the curvature may be indefinite"
        if problem.parameters <= SMALL and not problem.sharded:
            return Dense(**damping, tol=self.tol), f"dense, for {problem.parameters:,} parameters"
        if problem.columns == 1:
            return CG(**damping, **iterations), "cg, for one right-hand side"
        together = f"block_cg, since {problem.columns} right-hand sides share a Krylov space"
        vector = problem.parameters * problem.element_size
        if problem.columns >= MANY and Nystrom().rank * vector <= NYSTROM_BYTES:
            solver = BlockCG(**damping, **iterations, preconditioner=Nystrom())
            return solver, f"{together}; nystrom, whose products are shared by all of them"
        return BlockCG(**damping, **iterations), together

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Any,
        progress: Progress | None = None,
        checkpoint: Any = None,
    ) -> Solution:
        """Not called: `solve` asks `chosen` first."""
        raise InputError(
            "Auto computes nothing itself; expected solve(operator, b, Auto()), which asks for its choice."
        )

    def init(self, operator: Operator) -> Any:
        """Not called, either."""
        return self.compute(CountedOperator(operator, 0), {}, None)
