"""The paper's baseline (Figure 2c): the inverse curvature replaced by the identity."""

from __future__ import annotations

from dataclasses import dataclass

from .. import vectors
from ..vectors import Block
from ._base import Operator
from ._solve import Certificate, Keeper, Progress, Solution


@dataclass(frozen=True)
class Identity:
    """u = b without a product: the gradient baseline of the paper's Figure 2(c), not a solution of Au = b.

    The certificate is exact for the system it names, Iu = b: residual 0, no product.

    >>> import torch
    >>> from hf_msif.solvers import solve
    >>> class Double:
    ...     parameters = {"w": torch.zeros(2)}
    ...     def matvec(self, v):
    ...         return {"w": 2 * v["w"]}
    >>> solve(Double(), {"w": torch.tensor([[1.0, 3.0]])}, Identity()).value["w"].tolist()
    [[1.0, 3.0]]
    """

    def init(self, operator: Operator) -> None:
        """Nothing is paid once."""

    def compute(
        self,
        operator: Operator,
        b: Block,
        state: None = None,
        progress: Progress | None = None,
        keeper: Keeper | None = None,
    ) -> Solution:
        """A copy of b; called by `solve`."""
        count = vectors.columns(b)
        certificate = Certificate(
            "identity",
            damping=0.0,
            tol=0.0,
            iterations=[0] * count,
            matvecs=[0] * count,
            residual=[0.0] * count,
            converged=[True] * count,
            status=["converged"] * count,
            negative_curvature=[False] * count,
            smallest_ritz=[None] * count,
            largest_ritz=[None] * count,
        )
        return Solution(vectors.clone(b), certificate)
