"""EK-FAC as a preconditioner of conjugate gradients on the exact curvature."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import InputError
from ..solvers import Preconditioner
from ..vectors import Block
from .base import Curvature
from .ekfac import EKFAC
from .fisher import Fisher, Sampled


class State(NamedTuple):
    """A fit, λ, and how the solver's blocks become whole vectors and back."""

    fit: EKFAC
    damping: float
    join: Callable[[Block], Block]
    cut: Callable[[Block], Block]


@dataclass(frozen=True)
class EKFACPreconditioner(Preconditioner):
    """M = EK-FAC of the operator + λI: as many passes as two to three products, and none per iteration.

    Args:
        fisher, basis_share, folder: settings of `EKFAC`.
    """

    fisher: Fisher = field(default_factory=Sampled)
    basis_share: float = 0.25
    folder: str | os.PathLike | None = None

    # Rotated columns, and their products with the inverse eigenvalues.
    vectors_held = 2

    def extra_bytes(self, parameters: int) -> int:
        """The eigenvalues, one per parameter, and the bases, which are about as large."""
        return 2 * 4 * parameters

    def init(self, operator: Any, damping: float) -> State:
        """Fits EK-FAC on the operator's model, losses, rows and quadratic terms.

        Args:
            operator: a `Curvature`, or a `Sharded` one.
            damping: λ > 0 of the system.

        Raises:
            InputError: the operator is no curvature of a stage.
        """

        def same(block: Block) -> Block:
            return block

        curvature, join, cut = operator, same, same
        if not isinstance(operator, Curvature) and hasattr(operator, "join"):
            curvature, join, cut = operator.operator, operator.join, operator.cut
        if not isinstance(curvature, Curvature):
            raise InputError(
                f"EKFACPreconditioner got a {type(operator).__name__}; expected a curvature of hf_msif.curvature, "
                "whose model and rows it reads."
            )
        settings = {"fisher": self.fisher, "basis_share": self.basis_share, "folder": self.folder}
        fit = EKFAC.of(curvature, **settings)
        _ = fit.blocks
        return State(fit, damping, join, cut)

    def apply(self, state: State, block: Block) -> Block:
        """M⁻¹ r for every column r."""
        return state.cut(state.fit.inverse(state.join(block), state.damping))
