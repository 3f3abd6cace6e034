"""What Krylov solvers share: a recurrence is stepped, iterated until its columns are done, and refined.

The recurrence's own residual drifts away from the true one in finite precision. So when a run of the recurrence ends,
the true residual is recomputed; where it exceeds `tol`, another run starts on what is left (iterative refinement), as
long as iterations are left and the true residual has at least halved since the last start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Progress, Solver, check_settings
from .damping import Damping, damping, damping_products, muted_share
from .lanczos import largest_eigenvalue, ritz
from .operator import CountedOperator, Operator, rounding_unit

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


class KrylovSolver(Solver):
    """What the Krylov solvers share; each has settings `damping`, `tol`, `max_iter` and `damping_fraction`."""

    shardable: ClassVar[bool] = True
    damped: ClassVar[bool] = True
    damping: float | str
    tol: float
    max_iter: int
    damping_fraction: float

    def __post_init__(self):
        check_settings(self, counts=("max_iter",))

    def init(self, operator: Operator) -> Damping:
        """λ, at the cost of a short Lanczos run when it must be derived."""
        return damping(self, lambda: largest_eigenvalue(operator))

    def products(self, parameters: int, columns: int) -> int:
        """max_iter + 1, and the products of the Lanczos run for the damping."""
        return self.max_iter + 1 + damping_products(self, columns)


Spectrum = tuple[Tensor, Tensor]  # Ritz values, and the share of the column's right-hand side at each of them


class Recurrence:
    """A method's state, started at u = 0 on unit right-hand sides: a dataclass of blocks and tensors.

    Attributes:
        x: the iterates.
        error: ‖residual‖ of each column, as the recurrence has it.
        stop: no further step is possible,
        negative: and the reason is negative curvature.
        diagonal: the newest entry on the diagonal of each column's Lanczos tridiagonal,
        off: and the entry that ties it to the next one.
    """

    x: Block
    error: Tensor
    stop: Tensor
    negative: Tensor
    diagonal: Tensor
    off: Tensor

    @classmethod
    def start(cls, r: Block, system: LinearSystem) -> Recurrence:
        """The state before the first step, for unit right-hand sides r, which may be written to."""
        raise NotImplementedError

    def step(self, matvec: Callable[[Block], Block], system: LinearSystem) -> Recurrence:
        """The state after one more product."""
        raise NotImplementedError

    def keep(self, columns: Tensor) -> Recurrence:
        """The state without the columns that are done, where `columns` is False."""
        taken = {k: vectors.take(v, columns) if isinstance(v, dict) else v[columns] for k, v in vars(self).items()}
        return type(self)(**taken)

    def trace(self) -> list:
        """What the step adds to what is known of the spectrum, as JSON holds it."""
        return [self.diagonal.tolist(), self.off.tolist()]

    @classmethod
    def spectra(cls, traces: list[tuple[list[int], list]]) -> dict[int, Spectrum]:
        """The spectrum of each column of a run, from the columns that took each step and its `trace`."""
        rows: dict[int, list] = {}
        for columns, trace in traces:
            for q, *row in zip(columns, *trace, strict=True):
                rows.setdefault(q, []).append(row)
        return {q: ritz(*torch.tensor(t, dtype=torch.float64).T.unbind()) for q, t in rows.items()}


class LinearSystem:
    """(B + λI)u = c for Q columns, as `krylov` solves it.

    Args:
        operator: gives the inner product, and the counts of products.
        product: B v as `product(v, index)`, for a block v that holds the columns `index`.
        rhs: c.
        damping: λ.
        residual: c − (B + λI)u as `residual(u, index)`, for a solver that knows a better way to compute it.
        precondition: v ↦ M⁻¹v for each column, symmetric and positive definite; None without a preconditioner.

    Attributes:
        rhs_norms: ‖c‖ of each column, shape (Q,).
        rounding_unit: of the dtype of c.
    """

    def __init__(
        self,
        operator: CountedOperator,
        product: Callable[[Block, Tensor], Block],
        rhs: Block,
        damping: float,
        residual: Callable[[Block, Tensor], Block] | None = None,
        precondition: Callable[[Block], Block] | None = None,
    ):
        self.dot, self.gram, self.norm, self.counts = operator.dot, operator.gram, operator.norm, operator.counts
        self.precondition = precondition
        self.product, self.rhs, self.damping = product, rhs, damping
        self.residual = residual or self._residual
        self.rhs_norms, self.rounding_unit = operator.norm(rhs), rounding_unit(rhs)

    def matvec(self, v: Block, index: Tensor) -> Block:
        """(B + λI)v for a block v that holds the columns `index`."""
        return vectors.add(self.product(v, index), v, self.damping) if self.damping else self.product(v, index)

    def _residual(self, u: Block, index: Tensor) -> Block:
        return vectors.add(vectors.take(self.rhs, index), self.matvec(u, index), -1.0)


def krylov(
    recurrence: type[Recurrence],
    system: LinearSystem,
    solver: KrylovSolver,
    progress: Progress | None = None,
    checkpoint: SolverCheckpoint | None = None,
) -> tuple[Block, dict[str, Any]]:
    """Solves a system with the solver's `tol` and `max_iter`; returns u and the fields of its certificate."""
    saved = checkpoint.load() if checkpoint is not None else None
    state = KrylovState.start(system, solver.tol) if saved is None else KrylovState.load(recurrence, system, *saved)
    while len(state.running):
        iterate(state, recurrence, system, solver, progress, checkpoint)
        refine(state, recurrence, system, solver)
    return state.x, _report(state, system, solver)


def iterate(
    state: KrylovState,
    recurrence: type[Recurrence],
    system: LinearSystem,
    solver: KrylovSolver,
    progress: Progress | None,
    checkpoint: SolverCheckpoint | None,
) -> None:
    """Starts a run of the recurrence, unless one was loaded, and steps it until all of its columns are done."""
    if state.recurrence is None:
        state.begin_run(recurrence, system)
    while len(state.running):
        step(state, system, solver, progress)
        if checkpoint is not None and len(state.running) and checkpoint.due():
            checkpoint.save(*state.dump(system))


def step(state: KrylovState, system: LinearSystem, solver: KrylovSolver, progress: Progress | None) -> None:
    """One step of the recurrence; the columns that are done leave it, and their iterates are added to x."""
    assert state.recurrence is not None
    assert state.run_columns is not None
    assert state.relative_at_start is not None
    assert state.residual_norms is not None
    index = state.running
    state.recurrence = now = state.recurrence.step(
        lambda v: system.matvec(v, state.charged(vectors.columns(v))), system
    )
    state.steps += 1
    state.iterations[index] += 1
    state.traces.append((index.tolist(), now.trace()))
    error = now.error * state.relative_at_start[index]
    if progress is not None:
        progress(state.steps, error.max().item())
    # Below the rounding unit the recurrence's residual says nothing any more: time to recompute the true one.
    reached = (error <= solver.tol) | (now.error <= system.rounding_unit)
    done = reached | now.stop | (state.iterations[index] >= solver.max_iter)
    if done.any():
        columns = index[done]
        x = vectors.add_(vectors.take(state.x, columns), vectors.take(now.x, done), state.residual_norms[columns])
        vectors.put_(state.x, columns, x)
        state.stuck[columns], state.negative[columns] = (now.stop & ~reached)[done], now.negative[done]
        state.recurrence, state.running = now.keep(~done), index[~done]


def refine(state: KrylovState, recurrence: type[Recurrence], system: LinearSystem, solver: KrylovSolver) -> None:
    """Recomputes the true residuals after a run, and chooses the columns that another run is to improve."""
    for q, (values, shares) in recurrence.spectra(state.traces).items():
        if not state.ritz[q]:  # the first run, which started at the right-hand side
            state.muted[q] = muted_share(values, shares, system.damping)
        state.ritz[q] += [values[0].item(), values[-1].item()]
    columns = state.run_columns
    assert columns is not None
    assert state.relative_at_start is not None
    residual = system.residual(vectors.take(state.x, columns), columns)
    state.relative[columns] = system.norm(residual) / system.rhs_norms[columns]
    improved = state.relative <= 0.5 * state.relative_at_start
    again = (state.relative > solver.tol) & improved & (state.iterations < solver.max_iter) & ~state.stuck
    state.running = columns[again[columns]]
    state.residual, state.recurrence = vectors.take(residual, again[columns]), None


FACTS = ("steps", "ritz", "muted", "traces")  # of a state, as JSON holds them


@dataclass
class KrylovState:
    """The state of a solve: the solution so far, and the run of the recurrence that is in progress."""

    x: Block
    relative: Tensor  # ‖c − (B + λI)x‖ / ‖c‖ at the end of the last run
    iterations: Tensor
    stuck: Tensor  # the recurrence could not go on
    negative: Tensor  # it met negative curvature
    running: Tensor  # indices of the columns that are not done
    residual: Block  # of those columns, between two runs; empty during a run
    ritz: list[list[float]]  # extreme Ritz values of all finished runs, for each column
    muted: list[float]  # share of the right-hand side at curvature below λ
    steps: int = 0
    run_columns: Tensor | None = None  # the columns with which the run in progress started,
    relative_at_start: Tensor | None = None  # the relative residuals then,
    residual_norms: Tensor | None = None  # and their norms
    recurrence: Recurrence | None = None
    traces: list[tuple[list[int], list]] = field(default_factory=list)  # columns and trace of each step of that run

    @classmethod
    def start(cls, system: LinearSystem, tol: float) -> KrylovState:
        """x = 0, which solves the columns where c = 0."""
        norms = system.rhs_norms
        relative, no = (norms > 0).to(norms), torch.zeros_like(norms, dtype=torch.bool)
        running = (relative > tol).nonzero().flatten()
        return cls(
            x=vectors.zeros_like(system.rhs),
            relative=relative,
            iterations=torch.zeros_like(norms, dtype=torch.long),
            stuck=no,
            negative=no.clone(),
            running=running,
            residual=vectors.take(system.rhs, running),
            ritz=[[] for _ in norms],
            muted=[0.0] * len(norms),
        )

    def begin_run(self, recurrence: type[Recurrence], system: LinearSystem) -> None:
        """Starts the recurrence on the residuals of the running columns, scaled to length 1."""
        self.run_columns, self.relative_at_start = self.running, self.relative.clone()
        self.residual_norms = self.relative * system.rhs_norms
        unit = vectors.scale(self.residual, 1 / self.residual_norms[self.running])
        self.recurrence = recurrence.start(unit, system)
        self.traces, self.residual = [], {}

    def charged(self, width: int) -> Tensor:
        """The columns to which a product with `width` columns is charged.

        They are those that are running, but for a method whose columns share directions: it may multiply fewer, or
        more, which are charged to columns of the run that are done.
        """
        assert self.run_columns is not None
        if width == len(self.running):
            return self.running
        done = self.run_columns[~torch.isin(self.run_columns, self.running)]
        return torch.cat([self.running, done])[:width]

    def dump(self, system: LinearSystem) -> tuple[dict[str, Block], dict[str, Tensor], dict[str, Any]]:
        """Blocks, tensors and plain values, as `SolverCheckpoint.save` takes them."""
        assert self.recurrence is not None
        recurrence = {f"recurrence.{name}": value for name, value in vars(self.recurrence).items()}
        parts = {**recurrence, **vars(self), "counts": system.counts}
        blocks = {k: v for k, v in parts.items() if isinstance(v, dict) and k != "residual"}
        tensors = {k: v for k, v in parts.items() if isinstance(v, Tensor)}
        return blocks, tensors, {name: parts[name] for name in FACTS}

    @classmethod
    def load(
        cls,
        recurrence: type[Recurrence],
        system: LinearSystem,
        blocks: dict[str, Block],
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
    ) -> KrylovState:
        """Inverse of `dump`; also sets the system's counts of products."""
        parts: dict[str, Any] = {**blocks, **tensors}
        system.counts.copy_(parts.pop("counts"))
        prefix = "recurrence."
        saved = {k.removeprefix(prefix): parts.pop(k) for k in list(parts) if k.startswith(prefix)}
        parts |= {name: facts[name] for name in FACTS}
        return cls(**parts, residual={}, recurrence=recurrence(**saved))


def _report(state: KrylovState, system: LinearSystem, solver: KrylovSolver) -> dict[str, Any]:
    def status(error: float, iterations: int, negative: bool) -> str:
        if error <= solver.tol:
            return "converged"
        return "negative_curvature" if negative else "max_iter" if iterations >= solver.max_iter else "stalled"

    # An eigenvalue estimate at the level of rounding has no sign: a semi-definite operator is not indefinite.
    noise = 10 * system.rounding_unit
    indefinite = [bool(ritz) and min(ritz) < -noise * max(map(abs, ritz)) for ritz in state.ritz]
    # Those of a preconditioned system are no eigenvalues of A, though their signs are.
    known = [ritz if system.precondition is None else [] for ritz in state.ritz]
    iterations, relative, negative = state.iterations.tolist(), state.relative.tolist(), state.negative.tolist()
    return {
        "damping": system.damping,
        "tol": float(solver.tol),
        "iterations": iterations,
        "matvecs": system.counts.tolist(),
        "residual": relative,
        "converged": [error <= solver.tol for error in relative],
        "status": [status(*column) for column in zip(relative, iterations, negative, strict=True)],
        "negative_curvature": [a or b for a, b in zip(negative, indefinite, strict=True)],
        "smallest_ritz": [min(ritz) - system.damping if ritz else None for ritz in known],
        "largest_ritz": [max(ritz) - system.damping if ritz else None for ritz in known],
        "muted": state.muted if system.precondition is None else None,
    }
