"""Functions of a matrix times vectors, f(A) b: several f from one Krylov space (Lanczos with re-orthogonalisation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Progress
from .operator import CountedOperator, Operator, rounding_unit

# Values of the functions of some columns, given by their numbers, at their Ritz values (A, k): (A, F, k), float64.
Functions = Callable[[Tensor, list[int]], Tensor]
SETTLED_CHECKS = 2  # checks in a row in which the iterates must have changed by at most `tol`
SPACING = 16  # up to that iteration each one is checked, later ones at distances of 1/SPACING of their number
KEPT_SHARE = 0.7  # of a vector's norm; where one sweep of orthogonalisation leaves less, rounding asks for another


@dataclass(frozen=True)
class FunctionsReport:
    """How well f(A) b is known; lists have one entry per column.

    Attributes:
        iterations: k, the dimension of the Krylov space.
        error: ‖y − y'‖ / ‖y‖ of the last iterate y and the one of the check before, the largest of all functions; 0
            where the Krylov space is exhausted.
        smallest_ritz, largest_ritz: bounds of the spectrum that the column shows, from within.
    """

    iterations: list[int]
    error: list[float]
    smallest_ritz: list[float]
    largest_ritz: list[float]


def apply_functions(
    operator: Operator,
    b: Block,
    functions: Functions,
    tol: float,
    max_iter: int,
    groups: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[list[Block], FunctionsReport]:
    """f(A) b for each of F functions and each of Q columns.

    k Lanczos steps give an orthonormal basis V of the Krylov space of b and the tridiagonal T = VᵀAV; then
    f(A) b ≈ ‖b‖ V f(T) e₁, exact where f is a polynomial of degree < k. Both orthogonality and the error estimate hold
    to rounding, since each new vector is made orthogonal to all before. All k vectors of each column are held.

    Args:
        operator: A, symmetric.
        b: Q columns.
        functions: `functions(values, columns)`, the values of the functions of A columns, given by their numbers, at
            their Ritz values (A, k): (A, F, k). All columns have the same F.
        tol: a column is done where two checks in a row find each of its iterates changed by at most `tol`.
        max_iter: k at most.
        groups: number of the group of each column. The results of a group are added up later, so that the change of a
            small one is measured by the largest of its group. None: each column is a group of its own.
        progress: called as `progress(iteration, error)`.

    Returns:
        F blocks of Q columns; the report. A column that did not settle within `max_iter` is reported, not raised.

    Raises:
        InputError: a product holds NaN or inf.

    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, 4.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[1.0, 1.0]], dtype=torch.float64)}
    >>> (root,), report = apply_functions(Diagonal(), b, lambda values, columns: values.sqrt()[:, None], 1e-9, 10)
    >>> root["w"].round(decimals=6).tolist(), report.iterations
    ([[1.0, 2.0]], [2])
    """
    counted, columns = CountedOperator(operator, vectors.columns(b)), vectors.columns(b)
    groups = list(range(columns)) if groups is None else list(groups)
    norms = counted.norm(b)
    runs = [_Column(float(norm), float(rounding_unit(b))) for norm in norms]
    outputs: list[Block] | None = None
    active = [q for q in range(columns) if runs[q].norm > 0]
    index = torch.tensor(active, dtype=torch.long, device=norms.device)
    v = vectors.scale(vectors.take(b, index), 1 / norms[index])
    basis: list[Block] = []
    while active:
        basis.append(v)
        w = vectors.clone(counted.matvec(v, index))
        alpha = counted.dot(v, w)
        vectors.add_(w, v, -alpha)
        beta = _orthogonalise(counted, w, basis)
        for place, q in enumerate(active):
            runs[q].extend(float(alpha[place]), float(beta[place]))
        iteration = len(basis)
        checked = iteration <= SPACING or iteration % (iteration // SPACING) == 0 or iteration == max_iter
        if not checked and not any(runs[q].exhausted for q in active):
            v = vectors.scale(w, 1 / beta)
            continue
        spectra = [runs[q].spectrum() for q in active]
        table = functions(torch.stack([values for values, _ in spectra]), active)
        for q, (values, vectors_of_t), at_values in zip(active, spectra, table, strict=True):
            runs[q].evaluate(values, vectors_of_t, at_values)
        _judge(runs, groups)
        done = [runs[q].exhausted or runs[q].settled(tol) or iteration == max_iter for q in active]
        if progress is not None:
            progress(iteration, max(runs[q].error for q in active))
        for place, q in enumerate(active):
            if done[place]:
                if outputs is None:
                    outputs = [vectors.zeros_like(b) for _ in runs[q].coefficients]
                _write(outputs, q, basis, place, runs[q].coefficients * runs[q].norm)
        if any(done):
            left = torch.tensor([place for place in range(len(active)) if not done[place]], device=index.device)
            left = left.long()
            for i, block in enumerate(basis):  # one after another: all of them at once would be held twice
                basis[i] = vectors.take(block, left)
            w, beta, index = vectors.take(w, left), beta[left], index[left]
            active = index.tolist()
        if active:
            v = vectors.scale(w, 1 / beta)
    if outputs is None:
        outputs = [vectors.zeros_like(b) for _ in functions(norms.new_zeros(1, 1).cpu(), [0])[0]]
    return outputs, FunctionsReport(
        iterations=[len(run.diagonal) for run in runs],
        error=[0.0 if run.exhausted else run.error for run in runs],
        smallest_ritz=[run.smallest for run in runs],
        largest_ritz=[run.largest for run in runs],
    )


class _Column:
    """The tridiagonal of one column, and its iterates as coefficients of the basis.

    Attributes:
        norm: ‖b‖.
        coefficients: f(T) e₁ of each function, (F, k).
        changes: ‖b‖ times the change of each since the check before, (F,).
        error: the largest change, relative to the iterates of the column's group.
    """

    def __init__(self, norm: float, unit: float):
        self.norm, self.unit = norm, unit
        self.diagonal: list[float] = []
        self.off: list[float] = []
        self.exhausted = norm == 0
        self.coefficients = self.changes = torch.zeros(0, dtype=torch.float64)
        self.error, self.checks = 0.0, 0
        self.smallest = self.largest = 0.0

    def extend(self, alpha: float, beta: float) -> None:
        self.diagonal.append(alpha)
        self.exhausted = beta <= 8 * self.unit * max(*map(abs, self.diagonal), *self.off, 0.0)
        self.off.append(beta)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of T."""
        diagonal = torch.tensor(self.diagonal, dtype=torch.float64)
        off = torch.tensor(self.off[:-1], dtype=torch.float64)
        return torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))

    def evaluate(self, values: Tensor, basis: Tensor, at_values: Tensor) -> None:
        """The iterates, from T's eigenvalues and eigenvectors and the functions' values there, (F, k)."""
        self.smallest, self.largest = float(values[0]), float(values[-1])
        coefficients = (at_values * basis[0]) @ basis.T
        before = torch.zeros_like(coefficients)
        before[:, : self.coefficients.shape[-1]] = self.coefficients
        self.changes = self.norm * (coefficients - before).norm(dim=1)
        self.coefficients = coefficients

    def settled(self, tol: float) -> bool:
        self.checks = self.checks + 1 if self.error <= tol else 0
        return self.checks >= SETTLED_CHECKS


def _judge(runs: list[_Column], groups: list[int]) -> None:
    """Sets the error of each column: its change relative to the largest iterate of its group."""
    largest: dict[int, Tensor] = {}
    for run, group in zip(runs, groups, strict=True):
        if len(run.changes):
            size = run.norm * run.coefficients.norm(dim=1)
            largest[group] = torch.maximum(largest[group], size) if group in largest else size
    for run, group in zip(runs, groups, strict=True):
        if len(run.changes):
            tiny = torch.finfo(torch.float64).tiny
            run.error = float((run.changes / largest[group].clamp(min=tiny)).max())


def _orthogonalise(operator: CountedOperator, w: Block, basis: list[Block]) -> Tensor:
    """Makes w orthogonal to all of the basis, in place; returns the norms of its columns."""
    norm = operator.norm(w)
    for _ in range(2):  # twice is enough (Giraud et al., 2005)
        before = norm
        for v in basis:
            vectors.add_(w, v, -operator.dot(v, w))
        norm = operator.norm(w)
        if bool((norm >= KEPT_SHARE * before).all()):
            break
    return norm


def _write(outputs: list[Block], q: int, basis: list[Block], place: int, coefficients: Tensor) -> None:
    """Writes Σ_j coefficients[f, j] v_j of the column at `place` of the basis to column q of each output f."""
    for output, row in zip(outputs, coefficients.tolist(), strict=True):
        for name, t in output.items():
            for coefficient, v in zip(row, basis, strict=True):
                t[q].add_(v[name][place], alpha=coefficient)
