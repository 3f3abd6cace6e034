"""The exact Hessian of a stage's objective, by double backward."""

from __future__ import annotations

from ..autodiff import Evaluation, hessian_product
from ..vectors import Block
from ._operator import Curvature


class Hessian(Curvature):
    """∂²F/∂trained², eqs. (9), (10), (14), (15): for small, polished models.

    Indefinite unless the stage sits at a minimum: solve with `MinRes` where it may not.
    """

    def _product(self, evaluation: Evaluation, v: Block) -> Block:
        return hessian_product(evaluation, v, tuple(v))
