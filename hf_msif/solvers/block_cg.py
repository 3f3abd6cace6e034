"""Block conjugate gradients: (A + λI)u = b for many right-hand sides, which share one Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from ._base import Progress
from ._krylov import LinearSystem, Recurrence, Spectrum, krylov
from .certificate import Certificate, Solution
from .operator import CountedOperator, rounding_unit
from .preconditioner import PreconditionedSolver, Preconditioner, Prepared, not_definite

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint

INDEFINITE = 1e-4  # how far below zero an eigenvalue of a Gram matrix is no rounding, relative to the largest
FLOAT64 = torch.finfo(torch.float64).eps
PASSES = 3  # of an orthonormalisation, at most
MOST_ROWS = 1024  # of the block tridiagonal
WELL_CONDITIONED = 1e-3  # the shortest over the longest direction, below which one pass is not enough


@dataclass(frozen=True)
class BlockCG(PreconditionedSolver):
    """(A + λI)u = b by block conjugate gradients (O'Leary, 1980), for positive definite A + λI.

    Each column's iterate minimises ½uᵀ(A + λI)u − uᵀb over the *sum* of all columns' Krylov spaces. Gradients of
    related test examples share most of their directions, so that Q of them together take far fewer iterations than
    each alone; a product has up to Q columns, as in `CG`. With one column it is `CG`.

    Columns that depend on others linearly cost nothing, from the start or as soon as they do. A column that has
    converged stays in the products as long as its residual is a direction of its own, for the others would lose their
    conjugacy. The certificate charges each product to as many columns as it had, first to those not yet converged.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × the largest |eigenvalue|.
        tol: a column is done when ‖(A + λI)u − b‖ ≤ tol ‖b‖.
        max_iter: the largest number of iterations, restarts included; one product each.
        damping_fraction: used by damping="auto" alone.
        preconditioner: None, a name in `registry.PRECONDITIONERS` such as "nystrom", or a `Preconditioner`.

    Raises:
        InputError: a setting out of range; in `init`, damping="auto" where A is zero.

    >>> from hf_msif.solvers import solve
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(3, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, 4.0, 7.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[3.0, 6.0, 9.0], [3.0, 0.0, 9.0], [3.0, 6.0, 9.0]], dtype=torch.float64)}
    >>> solution = solve(Diagonal(), b, BlockCG(damping=2.0))
    >>> solution.value["w"].round(decimals=6).abs().tolist()
    [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    >>> solution.certificate.iterations  # three eigenvalues, two different right-hand sides
    [2, 2, 2]
    """

    damping: float | str = "auto"
    tol: float = 1e-3
    max_iter: int = 200
    damping_fraction: float = 1e-3
    preconditioner: Preconditioner | str | None = None

    unpreconditioned: ClassVar[int] = 7

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Prepared,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides; called by `solve`."""
        system = self.system(operator, b, state)
        u, report = krylov(BlockConjugateGradients, system, self, progress, checkpoint)
        return Solution(u, Certificate("block_cg", **report, **self.damping_facts(state.damping)))


@dataclass
class BlockConjugateGradients(Recurrence):
    """The variant BCGrQ of Dubrulle (2001): the residuals are R = VC with V orthonormal, or M⁻¹-orthonormal.

    α = (PᵀSP)⁻¹, X ← X + PαC; V'B = V − SPα, V' orthonormal, as B; C ← BC; P ← M⁻¹V' + PBᵀ.

    V has m columns, at most one per right-hand side: a factorisation that reveals the rank leaves out directions at
    the level of rounding. As VᵀP = I, P never loses rank where V has none to lose, and nothing else can break down.
    The block tridiagonal of Lanczos has α⁻¹ + B α⁻¹ Bᵀ (the former α in the second term) on its diagonal, and B α⁻¹
    beside it.
    """

    x: Block  # columns: the right-hand sides that are not done
    v: Block  # columns: m directions
    p: Block
    c: Tensor  # (m, columns of x)
    b: Tensor  # the newest B, (m, the former m)
    weights: Tensor  # C before the step
    curvature: Tensor  # α⁻¹ of the step before
    scale: Tensor  # the largest curvature so far, against which rounding is measured
    error: Tensor
    stop: Tensor
    negative: Tensor
    diagonal: Tensor
    off: Tensor

    @classmethod
    def start(cls, r: Block, system: LinearSystem) -> BlockConjugateGradients:
        v, z, c = orthonormalise(r, system, 0.0)
        error = _norms(v, c, system)
        no, nothing = torch.zeros_like(error, dtype=torch.bool), c.new_zeros(len(c), 0)
        p = vectors.clone(z)
        scale, curvature = c.new_zeros(()), c.new_zeros(0, 0)
        return cls(
            vectors.zeros_like(r), v, p, c, nothing, c, curvature, scale, error, no, no, diagonal=nothing, off=nothing
        )

    def step(self, matvec: Callable[[Block], Block], system: LinearSystem) -> BlockConjugateGradients:
        x, v, p, c = self.x, self.v, self.p, self.c
        product = matvec(p)
        curvature = _symmetric(system.gram(p, product))
        # Rayleigh quotients of S on the span of P, by which flat and negative directions are told from rounding.
        lengths, turn = torch.linalg.eigh(_symmetric(system.gram(p, p)))
        inverse_root = (turn / lengths.clamp(min=FLOAT64 * lengths[-1].item()).sqrt()).T
        quotients, basis = torch.linalg.eigh(_symmetric(inverse_root @ curvature @ inverse_root.T))
        scale = torch.maximum(self.scale, quotients.abs().max())
        noise = rounding_unit(p) * scale
        flat, negative = quotients[0] <= noise, quotients[0] < -noise
        diagonal = curvature + self.b @ self.curvature @ self.b.T
        if flat:
            stop = torch.ones_like(self.stop)
            return BlockConjugateGradients(
                x, v, p, c, self.b, c, curvature, scale, self.error, stop, stop & negative, diagonal, c.new_zeros(0, 0)
            )
        root = basis.T @ inverse_root
        alpha = root.T @ (root / quotients[:, None])
        vectors.add_(x, vectors.combine(p, alpha @ c))
        rest = vectors.add_(vectors.combine(product, alpha), v, -1.0)  # −W; B has its sign
        del product
        v_next, z, b = orthonormalise(rest, system, 1.0)
        b, rest = -b, {}
        c_next = b @ c
        return BlockConjugateGradients(
            x=x,
            v=v_next,
            p=vectors.add(z, vectors.combine(p, b.T)),
            c=c_next,
            b=b,
            weights=c,
            curvature=curvature,
            scale=scale,
            error=_norms(v_next, c_next, system),
            stop=self.stop,
            negative=self.negative,
            diagonal=diagonal,
            off=b @ curvature,
        )

    def keep(self, columns: Tensor) -> BlockConjugateGradients:
        """Without the columns that are done: their directions stay, since the others need them."""
        taken = {name: getattr(self, name)[columns] for name in ("error", "stop", "negative")}
        return type(self)(**{**vars(self), **taken, "x": vectors.take(self.x, columns), "c": self.c[:, columns]})

    def trace(self) -> list:
        return [self.diagonal.tolist(), self.off.tolist(), self.weights.tolist()]

    @classmethod
    def spectra(cls, traces: list[tuple[list[int], list]]) -> dict[int, Spectrum]:
        """Ritz values of the block tridiagonal, and each column's shares, by its part in the first block.

        It is cut after about `MOST_ROWS` rows: that of fewer steps, whose eigenvalues take seconds and not minutes.
        """
        columns, (_, _, weights) = traces[0]
        blocks = [[torch.tensor(matrix, dtype=torch.float64) for matrix in trace[:2]] for _, trace in traces]
        sizes = torch.tensor([len(diagonal) for diagonal, _ in blocks])
        blocks = blocks[: max(1, int((sizes.cumsum(0) <= MOST_ROWS).sum()))]
        t, row = torch.block_diag(*(diagonal for diagonal, _ in blocks)), 0
        for _, off in blocks[:-1]:
            k, m = off.shape
            t[row + m : row + m + k, row : row + m] = off
            row += m
        values, basis = torch.linalg.eigh(t)  # reads the lower triangle
        parts = (torch.tensor(weights, dtype=torch.float64).T @ basis[: len(weights)]).square()
        parts /= parts.sum(1, keepdim=True)
        return {q: (values, share) for q, share in zip(columns, parts, strict=True)}


def orthonormalise(w: Block, system: LinearSystem, floor: float) -> tuple[Block, Block, Tensor]:
    """W = VB with V of full rank and VᵀV = I, or VᵀM⁻¹V = I: V, M⁻¹V and B, by the eigenvalues of the Gram matrix.

    Directions at the level of rounding are left out. A second pass is made where the first loses digits.

    Args:
        w: m columns.
        system: gives the inner product and M.
        floor: length below which, times the rounding unit of w, a direction is rounding.

    Returns:
        V, k ≤ m columns; M⁻¹V, which is V itself without a preconditioner; B, shape (k, m).
    """
    precondition = system.precondition
    v, z = w, w if precondition is None else precondition(w)
    factor = torch.eye(vectors.columns(w), dtype=torch.float64, device=system.rhs_norms.device)
    for _ in range(PASSES):
        gram = _symmetric(system.gram(v, z))
        lengths, basis = torch.linalg.eigh(gram)
        if lengths[0] < -INDEFINITE * lengths.abs().max():
            raise not_definite(lengths[0].item())
        rounding = max((10 * rounding_unit(w) * floor) ** 2, 10 * len(gram) * FLOAT64 * lengths[-1].item())
        real = lengths > rounding
        lengths, basis = lengths[real].sqrt(), basis[:, real]
        v = vectors.combine(v, basis / lengths)
        z = v if precondition is None else vectors.combine(z, basis / lengths)
        factor = lengths[:, None] * basis.T @ factor
        if not len(lengths) or lengths[0] >= WELL_CONDITIONED * lengths[-1]:
            break
    return v, z, factor


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _norms(v: Block, c: Tensor, system: LinearSystem) -> Tensor:
    """‖VC‖ of each column."""
    if system.precondition is None:
        return c.norm(dim=0)  # V is orthonormal
    return (c * (_symmetric(system.gram(v, v)) @ c)).sum(0).clamp(min=0).sqrt()
