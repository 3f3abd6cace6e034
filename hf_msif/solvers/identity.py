"""The paper's baseline (Figure 2c): the inverse curvature replaced by the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..vectors import Block
from ._base import Progress, Solver
from .certificate import Certificate, Solution
from .operator import CountedOperator

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


@dataclass(frozen=True)
class Identity(Solver):
    """u = b without a product: the gradient baseline of the paper's Figure 2(c), not a solution of Au = b.

    The certificate is that of the system Iu = b: residual 0, no product.

    >>> import torch
    >>> from hf_msif.solvers import solve
    >>> class Double:
    ...     parameters = {"w": torch.zeros(2)}
    ...     def matvec(self, v):
    ...         return {"w": 2 * v["w"]}
    >>> solve(Double(), {"w": torch.tensor([[1.0, 3.0]])}, Identity()).value["w"].tolist()
    [[1.0, 3.0]]
    """

    vectors_held: ClassVar[int] = 1

    def products(self, parameters: int, columns: int) -> int:
        """None at all."""
        return 0

    def spectral_filter(self, eigenvalues: Tensor, damping: float) -> Tensor:
        """1: the curvature is not asked."""
        return torch.ones_like(eigenvalues)

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: None = None,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """b itself, without a copy; called by `solve`."""
        residual = torch.zeros_like(operator.counts, dtype=torch.float64)
        certificate = Certificate.from_residual("identity", 0.0, 0.0, residual, operator.counts)
        return Solution(b, certificate)
