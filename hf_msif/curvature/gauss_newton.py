"""The Gauss-Newton matrix of a stage's objective: positive semi-definite, and the default."""

from __future__ import annotations

from typing import ClassVar

from ..vectors import Block
from .base import Curvature
from .derivatives import Evaluation, gauss_newton_product


class GaussNewton(Curvature):
    """(1/N) Σ_i J_iᵀ H_i J_i, the Hessian without the curvature of the model's outputs (Schraudolph, 2002).

    J_i is the Jacobian of the model's outputs for example i, and H_i the Hessian of its loss in these outputs. For
    cross-entropy it equals the Fisher information. It is positive semi-definite wherever the loss is convex in the
    outputs, so that it stays meaningful away from a stationary point, which no real pretraining run reaches.
    """

    semidefinite: ClassVar[bool] = True

    def _product(self, evaluation: Evaluation, v: Block) -> Block:
        return gauss_newton_product(evaluation, v)
