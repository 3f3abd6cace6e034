"""What Krylov solvers share: a recurrence is stepped, iterated until its columns are done, and refined.

The recurrence's own residual drifts away from the true one in finite precision. So when a run of the recurrence ends,
the true residual is recomputed; where it exceeds `tol`, another run starts on what is left (iterative refinement), as
long as iterations are left and the true residual has at least halved since the last start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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

Dot = Callable[[Block, Block], Tensor]


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


class Recurrence(Protocol):
    """A method's state, started at u = 0 on unit right-hand sides: a NamedTuple of blocks and (Q,) tensors.

    Inner products are taken by `dot`, the operator's own.
    """

    @property
    def x(self) -> Block: ...  # the iterate

    @property
    def error(self) -> Tensor: ...  # ‖residual‖, as the recurrence has it

    @property
    def stop(self) -> Tensor: ...  # no further step is possible,

    @property
    def negative(self) -> Tensor: ...  # and the reason is negative curvature

    @property
    def diagonal(self) -> Tensor: ...  # the newest row of the Lanczos tridiagonal,

    @property
    def off(self) -> Tensor: ...  # and the entry that ties it to the next row

    @classmethod
    def start(cls, r: Block, dot: Dot) -> Recurrence: ...

    def step(self, matvec: Callable[[Block], Block], dot: Dot) -> Recurrence: ...

    def __iter__(self) -> Iterator[Any]: ...

    def _asdict(self) -> dict[str, Any]: ...


class LinearSystem:
    """(B + λI)u = c for Q columns, as `krylov` solves it.

    Args:
        operator: gives the inner product, and the counts of products.
        product: B v as `product(v, index)`, for a block v that holds the columns `index`.
        rhs: c.
        damping: λ.
        residual: c − (B + λI)u as `residual(u, index)`, for a solver that knows a better way to compute it.

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
    ):
        self.dot, self.norm, self.counts = operator.dot, operator.norm, operator.counts
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
        refine(state, system, solver)
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
    state.recurrence = now = state.recurrence.step(lambda v: system.matvec(v, index), system.dot)
    state.steps += 1
    state.iterations[index] += 1
    for q, *row in zip(index.tolist(), now.diagonal.tolist(), now.off.tolist(), strict=True):
        state.tridiagonals[q].append(row)
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
        state.recurrence, state.running = _take(now, ~done), index[~done]


def refine(state: KrylovState, system: LinearSystem, solver: KrylovSolver) -> None:
    """Recomputes the true residuals after a run, and chooses the columns that another run is to improve."""
    for q, rows in state.tridiagonals.items():
        diagonal, off = torch.tensor(rows, dtype=torch.float64).T
        values, _ = ritz(diagonal, off)
        if not state.ritz[q]:  # the first run, which started at the right-hand side
            state.muted[q] = muted_share(diagonal, off, system.damping)
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
    ritz: list[list[float]]  # extreme eigenvalues of the tridiagonals of all finished runs, for each column
    muted: list[float]  # share of the right-hand side at curvature below λ
    steps: int = 0
    run_columns: Tensor | None = None  # the columns with which the run in progress started,
    relative_at_start: Tensor | None = None  # the relative residuals then,
    residual_norms: Tensor | None = None  # and their norms
    recurrence: Recurrence | None = None
    tridiagonals: dict[int, list[list[float]]] = field(default_factory=dict)  # column → rows of the run in progress

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
        self.recurrence = recurrence.start(unit, system.dot)
        self.tridiagonals, self.residual = {q: [] for q in self.running.tolist()}, {}

    def dump(self, system: LinearSystem) -> tuple[dict[str, Block], dict[str, Tensor], dict[str, Any]]:
        """Blocks, tensors and plain values, as `SolverCheckpoint.save` takes them."""
        assert self.recurrence is not None
        recurrence = {f"recurrence.{name}": value for name, value in self.recurrence._asdict().items()}
        parts = {**recurrence, **vars(self), "counts": system.counts}
        blocks = {k: v for k, v in parts.items() if isinstance(v, dict) and k not in ("tridiagonals", "residual")}
        tensors = {k: v for k, v in parts.items() if isinstance(v, Tensor)}
        tridiagonals = [[q, rows] for q, rows in self.tridiagonals.items()]
        return (
            blocks,
            tensors,
            {
                "steps": self.steps,
                "ritz": self.ritz,
                "muted": self.muted,
                "tridiagonals": tridiagonals,
            },
        )

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
        return cls(
            **parts,
            residual={},
            ritz=facts["ritz"],
            muted=facts["muted"],
            steps=facts["steps"],
            tridiagonals=dict(facts["tridiagonals"]),
            recurrence=recurrence(**saved),
        )


def _take(recurrence: Recurrence, columns: Tensor) -> Recurrence:
    return type(recurrence)(*(vectors.take(f, columns) if isinstance(f, dict) else f[columns] for f in recurrence))


def _report(state: KrylovState, system: LinearSystem, solver: KrylovSolver) -> dict[str, Any]:
    def status(error: float, iterations: int, negative: bool) -> str:
        if error <= solver.tol:
            return "converged"
        return "negative_curvature" if negative else "max_iter" if iterations >= solver.max_iter else "stalled"

    # An eigenvalue estimate at the level of rounding has no sign: a semi-definite operator is not indefinite.
    noise = 10 * system.rounding_unit
    indefinite = [bool(ritz) and min(ritz) < -noise * max(map(abs, ritz)) for ritz in state.ritz]
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
        "smallest_ritz": [min(ritz) - system.damping if ritz else None for ritz in state.ritz],
        "largest_ritz": [max(ritz) - system.damping if ritz else None for ritz in state.ritz],
        "muted": state.muted,
    }
