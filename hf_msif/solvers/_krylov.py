"""Runs a Krylov recurrence on a block: freezes columns that are done, checks them, refines what the check refutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import eps
from ._solve import Keeper, Progress


class Recurrence(Protocol):
    """A method's state, started at u = 0 on unit right-hand sides: a NamedTuple of blocks and (Q,) tensors."""

    x: Block  # the iterate
    error: Tensor  # ‖residual‖ by the recurrence
    stop: Tensor  # no further step is possible
    negative: Tensor  # … because of negative curvature
    diagonal: Tensor  # the newest row of the Lanczos tridiagonal,
    off: Tensor  # and the entry that ties it to the next row

    @classmethod
    def start(cls, r: Block) -> Recurrence: ...

    def step(self, matvec: Callable[[Block], Block]) -> Recurrence: ...


def krylov(
    recurrence: type[Recurrence],
    product: Callable[[Block, Tensor], Block],
    rhs: Block,
    damping: float,
    solver: Any,
    counts: Tensor,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
    residual: Callable[[Block, Tensor], Block] | None = None,
) -> tuple[Block, dict[str, Any]]:
    """Solves (B + λI)u = c, where `product(v, index)` is Bv for a block v that holds the columns `index`.

    The recurrence's own residual drifts away from the true one in finite precision, so the true one is recomputed
    when a run ends; where it exceeds `tol` the recurrence is started again on what is left (iterative refinement),
    as long as iterations are left and the true residual fell at least by half since the last start.

    `counts` are the products spent on each column, which go into the copies that `keeper` keeps. `residual(u, index)`
    is c − (B + λI)u, for solvers that know a better way to compute it. Returns u and the fields of its certificate
    that are known here.
    """

    def system(v: Block, index: Tensor) -> Block:
        return vectors.add(product(v, index), v, damping) if damping else product(v, index)

    if residual is None:

        def residual(u: Block, index: Tensor) -> Block:
            return vectors.add(vectors.take(rhs, index), system(u, index), -1.0)

    size = vectors.norm(rhs)
    kept = keeper.load() if keeper is not None else None
    way = _Way.start(rhs, size, solver.tol) if kept is None else _Way.load(recurrence, counts, *kept)
    while len(way.index):
        if way.state is None:
            way.begin(recurrence, size)
        while len(way.index):
            way.step(system, progress, size, solver, eps(rhs))
            if keeper is not None and len(way.index) and keeper.due():
                keeper.save(*way.dump(counts))
        for q, row in way.rows.items():
            way.ritz[q] += _extreme_eigenvalues(row)
        active = way.active
        way.r = residual(vectors.take(way.x, active), active)
        way.relative[active] = vectors.norm(way.r) / size[active]
        improved = way.relative <= 0.5 * way.before
        again = (way.relative > solver.tol) & improved & (way.iterations < solver.max_iter) & ~way.stuck
        way.index, way.r, way.state = active[again[active]], vectors.take(way.r, again[active]), None
    return way.x, _report(solver, damping, eps(rhs), way.iterations, way.relative, way.negative, way.ritz)


@dataclass
class _Way:
    """How far a solve has come: what it has found, and the runs of the recurrence that are under way."""

    x: Block
    relative: Tensor  # ‖c − (B + λI)x‖ / ‖c‖
    iterations: Tensor
    stuck: Tensor
    negative: Tensor
    index: Tensor  # the columns still running
    r: Block  # what is left of them, where a run is about to start
    ritz: list[list[float]]
    passes: int = 0
    active: Tensor | None = None  # the columns that this run started with,
    before: Tensor | None = None  # their relative residuals,
    length: Tensor | None = None  # and residuals then
    state: Any = None
    rows: dict[int, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def start(cls, rhs: Block, size: Tensor, tol: float) -> _Way:
        relative = (size > 0).to(size)  # of x = 0
        no, index = torch.zeros_like(size, dtype=torch.bool), (relative > tol).nonzero().flatten()
        none = torch.zeros_like(size, dtype=torch.long)
        left = vectors.take(rhs, index)
        return cls(vectors.zeros_like(rhs), relative, none, no, no.clone(), index, left, [[] for _ in size])

    def begin(self, recurrence: type[Recurrence], size: Tensor) -> None:
        self.active, self.before, self.length = self.index, self.relative.clone(), self.relative * size
        self.state = recurrence.start(vectors.scale(self.r, 1 / self.length[self.index]))
        self.rows, self.r = {q: [] for q in self.active.tolist()}, {}

    def step(self, system, progress: Progress | None, size: Tensor, solver: Any, unit: float) -> None:
        index = self.index
        self.state = state = self.state.step(lambda v: system(v, index))
        self.passes += 1
        self.iterations[index] += 1
        for q, *row in zip(index.tolist(), state.diagonal.tolist(), state.off.tolist(), strict=True):
            self.rows[q].append(row)
        error = state.error * self.before[index]
        if progress is not None:
            progress(self.passes, error.max().item())
        # Beyond the rounding unit the recurrence only flatters itself: time to look at the true residual.
        reached = (error <= solver.tol) | (state.error <= unit)
        done = reached | state.stop | (self.iterations[index] >= solver.max_iter)
        if done.any():
            at = index[done]
            gained = vectors.add_(vectors.take(self.x, at), vectors.take(state.x, done), self.length[at])
            vectors.put_(self.x, at, gained)
            self.stuck[at], self.negative[at] = (state.stop & ~reached)[done], state.negative[done]
            self.state, self.index = _take(state, ~done), index[~done]

    def dump(self, counts: Tensor) -> tuple[dict[str, Block], dict[str, Tensor], dict[str, Any]]:
        """Blocks, tensors and plain values, as a `Keeper` saves them."""
        parts = {**{f"state.{k}": v for k, v in self.state._asdict().items()}, **vars(self), "counts": counts}
        blocks = {k: v for k, v in parts.items() if isinstance(v, dict) and k not in ("rows", "r")}
        tensors = {k: v for k, v in parts.items() if isinstance(v, Tensor)}
        rows = [[q, row] for q, row in self.rows.items()]
        return blocks, tensors, {"passes": self.passes, "ritz": self.ritz, "rows": rows}

    @classmethod
    def load(cls, recurrence: type[Recurrence], counts: Tensor, blocks, tensors, facts) -> _Way:
        parts = {**blocks, **tensors}
        counts.copy_(parts.pop("counts"))
        state = {k.removeprefix("state."): parts.pop(k) for k in list(parts) if k.startswith("state.")}
        rows = dict(facts["rows"])
        return cls(**parts, r={}, ritz=facts["ritz"], passes=facts["passes"], rows=rows, state=recurrence(**state))


def _take(state: Any, keep: Tensor) -> Any:
    return type(state)(*(vectors.take(f, keep) if isinstance(f, dict) else f[keep] for f in state))


def _extreme_eigenvalues(rows: list[list[float]]) -> list[float]:
    diagonal, off = torch.tensor(rows, dtype=torch.float64).T
    tridiagonal = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    values = torch.linalg.eigvalsh(tridiagonal)
    return [values[0].item(), values[-1].item()]


def _report(solver, damping, unit, iterations, relative, negative, ritz) -> dict[str, Any]:
    def status(error: float, count: int, bad: bool) -> str:
        if error <= solver.tol:
            return "converged"
        return "negative_curvature" if bad else "max_iter" if count >= solver.max_iter else "stalled"

    # An eigenvalue estimate at the level of rounding has no sign: a semi-definite operator is not indefinite.
    indefinite = [bool(e) and min(e) < -10 * unit * max(map(abs, e)) for e in ritz]
    iterations, relative, negative = iterations.tolist(), relative.tolist(), negative.tolist()
    return {
        "tol": float(solver.tol),
        "iterations": iterations,
        "residual": relative,
        "converged": [error <= solver.tol for error in relative],
        "status": [status(*column) for column in zip(relative, iterations, negative, strict=True)],
        "negative_curvature": [a or b for a, b in zip(negative, indefinite, strict=True)],
        "smallest_ritz": [min(e) - damping if e else None for e in ritz],
        "largest_ritz": [max(e) - damping if e else None for e in ritz],
    }
