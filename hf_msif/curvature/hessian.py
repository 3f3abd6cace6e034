"""The exact Hessian of a stage's objective, by double backward."""

from __future__ import annotations

from ..vectors import Block
from .base import Curvature
from .derivatives import Evaluation, hessian_product


class Hessian(Curvature):
    """∂²F/∂trained², eqs. (9), (10), (14), (15): for small models that were polished.

    It is indefinite if the stage is not at a minimum; solve with `MinRes` in that case.
    """

    def _product(self, evaluation: Evaluation, v: Block) -> Block:
        return hessian_product(evaluation, v, tuple(v))
