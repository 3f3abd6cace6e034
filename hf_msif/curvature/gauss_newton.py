"""The Gauss-Newton matrix of a stage's objective: positive semi-definite, the default."""

from __future__ import annotations

from ..vectors import Block
from .base import Curvature
from .derivatives import Evaluation, gauss_newton_product


class GaussNewton(Curvature):
    """(1/N) Σ_i J_iᵀ H_out J_i: the Hessian without the curvature of the model's outputs (Schraudolph, 2002).

    Equal to the Fisher information for cross-entropy, and positive semi-definite wherever the loss is convex in the
    logits: it stays meaningful where a model is not at a stationary point, as no real pretraining run is.
    """

    def _product(self, evaluation: Evaluation, v: Block) -> Block:
        return gauss_newton_product(evaluation, v)
