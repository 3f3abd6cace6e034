"""`Solution`: what a solver returns, with its `Certificate`: how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..display import Curves, Displayed, Summary, Table, plural
from ..vectors import Block

SHOWN = 8  # columns that `print` tells one by one


@dataclass(frozen=True, repr=False)
class Certificate(Displayed):
    """What is known about a solution; lists have one entry per column.

    - `solver`: the method. `damping`: λ, in the units of the system that was solved. `tol`: the tolerance.
    - `iterations`: steps of the method, over all restarts.
    - `matvecs`: products with the operator, the check of the residual included, `Solver.init` excluded.
    - `residual`: the *true* relative residual ‖Su − c‖/‖c‖ of the system Su = c that the solver defines, recomputed
      from the returned u with a fresh product; 0 where c = 0. `converged`: residual ≤ tol.
    - `status`: why the column ended: "converged", "max_iter", "stalled" or "negative_curvature".
    - `negative_curvature`: S was seen not to be positive definite. This stops CG, and informs elsewhere.
    - `smallest_ritz`, `largest_ritz`: estimates of the extreme eigenvalues of the operator *without* damping (of H²
      for SquaredCG; exact for Dense), None where the solver has no estimate.
    - `muted`: share of the squared norm of c in directions with |curvature| < `damping`, where u follows the damping
      and not the curvature; None where the solver does not know it. Exact for Dense; for Krylov solvers, by the Gauss
      quadrature in their tridiagonal.
    - `largest_eigenvalue`: the largest |eigenvalue|, known where damping="auto" needed it (of H² for SquaredCG), else
      None. `iteration_bound`: the iterations that this damping and `tol` allow in exact arithmetic, for a positive
      semi-definite A; None where `damping` was a number, and for other solvers than CG and SquaredCG.
    - `residual_unsquared`: ‖Hu − b‖/‖b‖ for SquaredCG, None elsewhere.
    - `choice`: which solver `Auto` chose, and why; None where the solver was given.
    - `residual_error`: where `residual` is an estimate from mini-batches, its standard error, which is included in it;
      None where it was recomputed on all rows. (`Stochastic`, whose `matvecs` are in products with all rows, rounded
      up; `iterations` are steps on mini-batches.)
    """

    solver: str
    damping: float
    tol: float
    iterations: list[int]
    matvecs: list[int]
    residual: list[float]
    converged: list[bool]
    status: list[str]
    negative_curvature: list[bool]
    smallest_ritz: list[float | None]
    largest_ritz: list[float | None]
    muted: list[float] | None = None
    largest_eigenvalue: float | None = None
    iteration_bound: int | None = None
    residual_unsquared: list[float] | None = None
    choice: str | None = None
    residual_error: list[float] | None = None

    @classmethod
    def from_residual(
        cls,
        solver: str,
        damping: float,
        tol: float,
        residual: Tensor,
        matvecs: Tensor,
        iterations: int = 0,
        failure: str = "max_iter",
        **facts: Any,
    ) -> Certificate:
        """The certificate of a method that stops all columns at the same time.

        Args:
            solver: the method's name.
            damping: λ.
            tol: the tolerance.
            residual: true relative residuals, shape (Q,); a column is converged where it is at most `tol`.
            matvecs: products per column, shape (Q,).
            iterations: of every column.
            failure: the `status` of columns that are not converged.
            facts: other fields of the certificate; unless given, no negative curvature and no eigenvalue is known.
        """
        converged, columns = (residual <= tol).tolist(), len(residual)
        unknown = {
            "negative_curvature": [False] * columns,
            "smallest_ritz": [None] * columns,
            "largest_ritz": [None] * columns,
        }
        return cls(
            solver,
            damping,
            tol,
            iterations=[iterations] * columns,
            matvecs=matvecs.tolist(),
            residual=residual.tolist(),
            converged=converged,
            status=["converged" if c else failure for c in converged],
            **{**unknown, **facts},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Inverse of `to_dict`."""
        return cls(**values)

    def __str__(self) -> str:
        chosen = [] if self.choice is None else [f"solver='auto' took {self.choice}"]
        columns, others = self._worst()
        lines = [*chosen, *([self._title()] if others else []), *map(self._line, columns)]
        return "\n".join([*lines, f"… and {plural(others, 'column')} of smaller residual"] if others else lines)

    def summary(self) -> Summary:
        columns, others = self._worst()
        rows = [
            [str(q), self.status[q], str(self.iterations[q]), f"{self.residual[q]:.1e}", str(self.matvecs[q])]
            for q in columns
        ]
        table = Table(["column", "status", "iterations", "residual", "products"], rows)
        chosen = [] if self.choice is None else [f"solver='auto' took {self.choice}"]
        more = [f"{plural(others, 'column')} of smaller residual are not shown."] if others else []
        return Summary(self._title(), [*chosen, self._damping()], [table], more)

    def curves(self) -> Curves:
        return Curves(
            "iterations",
            "relative residual of each column",
            {f"{self.solver}, {plural(len(self.status), 'column')}": (self.iterations, self.residual)},
            limit=self.tol,
            are_points=True,
        )

    def _worst(self) -> tuple[list[int], int]:
        """The columns of largest residual, in their order, and how many others there are."""
        order = sorted(range(len(self.status)), key=lambda q: (self.converged[q], -self.residual[q]))
        return sorted(order[:SHOWN]), max(0, len(order) - SHOWN)

    def _title(self) -> str:
        least, most = min(self.iterations), max(self.iterations)
        steps = plural(most, "iteration") if least == most else f"{least:,} to {most:,} iterations"
        return (
            f"{self.solver}: {sum(self.converged)} of {plural(len(self.status), 'column')} converged, {steps}, "
            f"residual at most {max(self.residual):.1e} (tol {self.tol:.0e})"
        )

    def _line(self, q: int) -> str:
        n, steps = self.iterations[q], plural(self.iterations[q], "iteration")
        prose = {
            "converged": f"converged in {steps}" if n else "solved without iterations",
            "max_iter": f"stopped at {steps}, not converged",
            "stalled": (f"stalled after {steps}" if n else "not solved")
            + ": singular, or too ill-conditioned for its precision",
            "negative_curvature": f"negative curvature met at iteration {n}: the operator is not positive definite, "
            "use MinRes or curvature='gauss_newton' or more damping",
        }[self.status[q]]
        line = f"{self.solver}, column {q}: {prose}; residual {self.residual[q]:.1e} (tol {self.tol:.0e})"
        if self.residual_error is not None:
            line += f" by an estimate on mini-batches, its standard error {self.residual_error[q]:.1e} included"
        if self.residual_unsquared is not None:
            line += f", of Hu = b {self.residual_unsquared[q]:.1e}"
        line += f", {plural(self.matvecs[q], 'product')}, {self._damping()}"
        if self.smallest_ritz[q] is not None:
            line += f", eigenvalues {self.smallest_ritz[q]:.2g} to {self.largest_ritz[q]:.2g}"
        if self.muted is not None and self.damping:
            what = "Hb" if self.residual_unsquared is not None else "b"
            line += f"; curvature below {self.damping:.2g} is muted: {self.muted[q]:.0%} of {what}"
        return line

    def _damping(self) -> str:
        if self.largest_eigenvalue is None:
            return f"damping {self.damping:.3g}"
        fraction = self.damping / self.largest_eigenvalue
        what = "largest eigenvalue" + (" of H²" if self.residual_unsquared is not None else "")
        bound = "" if self.iteration_bound is None else f" (at most {plural(self.iteration_bound, 'iteration')})"
        return f"damping {self.damping:.3g} = {fraction:.3g} × the {what} {self.largest_eigenvalue:.3g}{bound}"


@dataclass(frozen=True)
class Solution:
    """`value`: the block u, shaped like the right-hand sides; `certificate`: how far it can be trusted."""

    value: Block
    certificate: Certificate
