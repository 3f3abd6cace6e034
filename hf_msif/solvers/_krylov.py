"""Runs a Krylov recurrence on a block: freezes columns that are done, checks them, refines what the check refutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._operator import eps
from ._solve import Progress


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
    progress: Progress | None = None,
    residual: Callable[[Block, Tensor], Block] | None = None,
) -> tuple[Block, dict[str, Any]]:
    """Solves (B + λI)u = c, where `product(v, index)` is Bv for a block v that holds the columns `index`.

    The recurrence's own residual drifts away from the true one in finite precision, so the true one is recomputed
    when a run ends; where it exceeds `tol` the recurrence is started again on what is left (iterative refinement),
    as long as iterations are left and the true residual fell at least by half since the last start.

    `residual(u, index)` is c − (B + λI)u, for solvers that know a better way to compute it. Returns u and the
    fields of its certificate that are known here.
    """

    def system(v: Block, index: Tensor) -> Block:
        return vectors.add(product(v, index), v, damping) if damping else product(v, index)

    if residual is None:

        def residual(u: Block, index: Tensor) -> Block:
            return vectors.add(vectors.take(rhs, index), system(u, index), -1.0)

    x, size = vectors.zeros_like(rhs), vectors.norm(rhs)
    relative = (size > 0).to(size)  # ‖c − (B + λI)x‖ / ‖c‖ of x = 0
    iterations = torch.zeros_like(size, dtype=torch.long)
    stuck, negative = torch.zeros_like(size, dtype=torch.bool), torch.zeros_like(size, dtype=torch.bool)
    ritz: list[list[float]] = [[] for _ in size]
    index, passes = (relative > solver.tol).nonzero().flatten(), 0
    r = vectors.take(rhs, index)
    while len(index):
        active, before, length = index, relative.clone(), relative * size
        state = recurrence.start(vectors.scale(r, 1 / length[index]))
        rows: dict[int, list[tuple[float, float]]] = {q: [] for q in active.tolist()}
        while len(index):
            state = state.step(lambda v, index=index: system(v, index))
            passes += 1
            iterations[index] += 1
            for q, *row in zip(index.tolist(), state.diagonal.tolist(), state.off.tolist(), strict=True):
                rows[q].append(row)
            error = state.error * before[index]
            if progress is not None:
                progress(passes, error.max().item())
            # Beyond the rounding unit the recurrence only flatters itself: time to look at the true residual.
            reached = (error <= solver.tol) | (state.error <= eps(rhs))
            done = reached | state.stop | (iterations[index] >= solver.max_iter)
            if done.any():
                at = index[done]
                vectors.put_(x, at, vectors.add_(vectors.take(x, at), vectors.take(state.x, done), length[at]))
                stuck[at], negative[at] = (state.stop & ~reached)[done], state.negative[done]
                state, index = _take(state, ~done), index[~done]

        for q, row in rows.items():
            ritz[q] += _extreme_eigenvalues(row)
        r = residual(vectors.take(x, active), active)
        relative[active] = vectors.norm(r) / size[active]
        again = (relative > solver.tol) & (relative <= 0.5 * before) & (iterations < solver.max_iter) & ~stuck
        index, r = active[again[active]], vectors.take(r, again[active])
    return x, _report(solver, damping, eps(rhs), iterations, relative, negative, ritz)


def _take(state: Any, keep: Tensor) -> Any:
    return type(state)(*(vectors.take(f, keep) if isinstance(f, dict) else f[keep] for f in state))


def _extreme_eigenvalues(rows: list[tuple[float, float]]) -> list[float]:
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
