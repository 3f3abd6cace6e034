"""The whole matrix, for small models and for tests: (A + λI)u = b by an eigendecomposition in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import vectors
from ..errors import InputError
from ..vectors import Block
from ._base import Progress, Solver, check_settings
from .certificate import Certificate, Solution
from .damping import Damping, damping
from .operator import CountedOperator, Operator, dimension, rounding_unit

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


TINY = torch.finfo(torch.float64).tiny  # in the place of zero below a fraction


class Factorisation(NamedTuple):
    """A = V diag(e) Vᵀ in float64, e ascending, shapes (P,) and (P, P)."""

    damping: Damping
    eigenvalues: Tensor
    eigenvectors: Tensor


def written_out(operator: Operator, chunk: int = 64) -> Tensor:
    """A in float64, (P, P), by products with `chunk` unit vectors at a time; symmetric as far as its products are."""
    like, size = vectors.stack([operator.parameters]), dimension(operator)
    device = vectors.flatten(like).device
    rows = []
    for index in torch.arange(size, device=device).split(chunk):
        units = torch.zeros(len(index), size, device=device).scatter_(1, index[:, None], 1.0)
        product = CountedOperator(operator, len(index)).matvec(vectors.unflatten(units, like))
        rows.append(vectors.flatten(product).double())
    return torch.cat(rows)


@dataclass(frozen=True)
class Dense(Solver):
    """(A + λI)u = b with A written out from P products with unit vectors, symmetrised, and decomposed in float64.

    One eigendecomposition serves definite, indefinite and singular A (there u is the least-squares solution of
    least norm) and shows the exact spectrum. It costs P products, 16 P² bytes and time P³: an oracle for small models.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × the largest |eigenvalue|.
        tol: a column counts as converged when ‖(A + λI)u − b‖ ≤ tol ‖b‖, with a fresh product.
        max_parameters: refuse larger P.
        chunk: unit vectors per product.
        damping_fraction: used by damping="auto" alone.

    Raises:
        InputError: a setting out of range; in `init`, P > max_parameters, or an A that is not symmetric beyond
            rounding.

    >>> from hf_msif.solvers import solve
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, -2.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[3.0, 6.0]], dtype=torch.float64)}
    >>> solution = solve(Diagonal(), b, Dense())
    >>> solution.value["w"].tolist(), solution.certificate.smallest_ritz
    ([[3.0, -3.0]], [-2.0])
    """

    damping: float | str = 0.0
    tol: float = 1e-3
    max_parameters: int = 8192
    chunk: int = 64
    damping_fraction: float = 1e-3

    vectors_held: ClassVar[int] = 2
    damped: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self, counts=("max_parameters", "chunk"))

    def products(self, parameters: int, columns: int) -> int:
        """P products with one vector, and one product to check."""
        return -(-parameters // columns) + 1

    def extra_bytes(self, parameters: int) -> int:
        """The matrix and its eigenvectors in float64."""
        return 16 * parameters**2

    def init(self, operator: Operator) -> Factorisation:
        """The factorisation of A, P products; λ is not in it."""
        size = dimension(operator)
        if size > self.max_parameters:
            raise InputError(
                f"Dense would write out a {size} × {size} matrix; its limit is max_parameters={self.max_parameters}: "
                "use CG or MinRes, restrict the trainable parameters, or raise the limit."
            )
        matrix = written_out(operator, self.chunk)
        asymmetry = ((matrix - matrix.T).norm() / matrix.norm().clamp(min=TINY)).item()
        if asymmetry > rounding_unit(operator.parameters) ** 0.5:
            raise InputError(
                f"The operator is not symmetric: ‖A − Aᵀ‖/‖A‖ = {asymmetry:.1e}, beyond rounding. Does every product "
                "see the same examples, with the same masks and without dropout?"
            )
        eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return Factorisation(damping(self, lambda: eigenvalues.abs().max().item()), eigenvalues, eigenvectors)

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Factorisation,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides, with one product per column to check it; called by `solve`."""
        shift, basis = state.damping.value, state.eigenvectors
        eigenvalues = state.eigenvalues + shift
        noise = 10 * rounding_unit(b) * eigenvalues.abs().max()
        inverse = torch.where(eigenvalues.abs() > noise, 1 / eigenvalues, 0.0)
        coordinates = vectors.flatten(b).double() @ basis
        u = vectors.unflatten((coordinates * inverse) @ basis.T, b)

        norms = operator.norm(b)
        relative, nonzero = torch.zeros_like(norms), norms.nonzero().flatten()
        v = vectors.take(u, nonzero)
        residual = vectors.add(vectors.take(b, nonzero), vectors.add(operator.matvec(v, nonzero), v, shift), -1.0)
        relative[nonzero] = operator.norm(residual) / norms[nonzero]
        columns = len(norms)
        muted = coordinates[:, state.eigenvalues.abs() < shift].square().sum(1) / norms.square().clamp(min=TINY)
        certificate = Certificate.from_residual(
            "dense",
            shift,
            self.tol,
            relative,
            operator.counts,
            failure="stalled",
            negative_curvature=[bool(eigenvalues[0] < -noise)] * columns,
            smallest_ritz=[state.eigenvalues[0].item()] * columns,
            largest_ritz=[state.eigenvalues[-1].item()] * columns,
            muted=muted.tolist(),
            largest_eigenvalue=state.damping.largest_eigenvalue,
        )
        return Solution(u, certificate)
