"""Norms of examples' gradients, a layer at a time: ‖∇ℓ_i‖, and ∇ℓ_iᵀ f(A) ∇ℓ_i for a function of EK-FAC's matrix A.

G_i, the gradient of example i in one parameter, is a sum of products g_n ⊗ a_n over the example's tokens, and over all
calls of all layers that have the parameter. A norm of a sum is no sum of norms: what a tied parameter, or a layer that
is called twice, contributes is put together before it is squared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Block
from .blocks import Gradients
from .derivatives import Evaluation, example_gradients
from .ekfac import EKFAC
from .layer_rules import Call, Layer
from .layers import LayerMap
from .matrices import collect, shapes_of


class Metric:
    """The quadratic form ∇ᵀ f(A) ∇, A the matrix of EK-FAC: with f(σ) = 1/(σ + λ), self-influence.

    Args:
        fit: the approximation A; it is fitted now, by all processes together.
        f: a function of eigenvalues, elementwise and not negative.

    Raises:
        InputError: f is not finite at 0, as with λ = 0, and A is singular.
    """

    def __init__(self, fit: EKFAC, f: Callable[[Tensor], Tensor]):
        self.fit, self.f = fit, f
        if not f(torch.zeros(1)).isfinite().all():
            fit.check_regular(0.0)
        self.weights = fit.transformed(f)

    def squares(self, v: Block) -> Tensor:
        """vᵀ f(A) v of each column, (Q,) in float64."""
        return vectors.dot(v, self.fit.function(v, self.f))


class GradientNorms:
    """Which calls of layers make the whole gradient of which parameter.

    Args:
        layers: the layers that make gradients; those of `metric.fit`, where there is a metric.
        metric: a quadratic form that is evaluated, too.

    Attributes:
        apart: the parameters of which no layer makes the gradient: a backward pass per example does.
        shared: those that several layers have.
    """

    def __init__(self, layers: LayerMap, metric: Metric | None = None):
        self.metric = metric
        self.parameters = {name: layers.model.parameters[name] for name in layers.wanted}
        self.apart = [name for name, shape in shapes_of(self.parameters, layers.layers).items() if shape.is_apart]
        made = [name for layer in layers.layers for name in layer.names.values()]
        self.shared = {name for name in made if made.count(name) > 1}

    def is_whole(self, name: str, call: Call) -> bool:
        """Whether a call of a layer that has the parameter makes its whole gradient."""
        return call.alone and name not in self.shared and name not in self.apart


class SquaredNorms:
    """The squared norms of one batch's gradients: `receive` takes every call of a layer, `finish` has them.

    Args:
        norms: what is known of all batches.
        examples: B.

    Attributes:
        total: Σ G_i² over the parameters until now, (1, B) in float64; with a metric (2, B), the second in the metric.
    """

    def __init__(self, norms: GradientNorms, examples: int):
        self.norms, self.pending = norms, dict[str, Gradients]()
        like = next(iter(norms.parameters.values()))
        self.total = torch.zeros(1 if norms.metric is None else 2, examples, dtype=torch.float64, device=like.device)

    def receive(self, layer: Layer, call: Call, squared: str | None = None) -> None:
        """Adds a call of a layer: at once, unless other calls make the same gradient, too.

        Args:
            layer, call: as `LayerMap.run` hands them out.
            squared: a parameter of which the caller has added Σ G_i² to `total[0]` already.
        """
        apart, made = list(self.norms.apart), dict[str, Gradients]()
        if squared is not None and self.norms.metric is None:
            apart.append(squared)
        for name in layer.names.values():
            if name not in apart:
                whole = self.norms.is_whole(name, call)
                made[name] = Gradients() if whole else self.pending.setdefault(name, Gradients())
        if made:
            collect(made, layer, _in_full_precision(call, next(iter(layer.values.values())).dtype), apart)
        for name, gradients in made.items():
            if name not in self.pending:
                self._add(name, gradients, squared)

    def finish(self, evaluation: Evaluation) -> Tensor:
        """Σ G_i² of each example, (B, 1) in float64; with a metric (B, 2)."""
        if self.norms.apart:
            with torch.enable_grad():
                gradients = example_gradients(evaluation, self.norms.apart)
            for name, columns in gradients.items():
                self.pending[name] = Gradients()
                self.pending[name].add_vectors(columns.reshape(len(columns), -1))
        for name, made in self.pending.items():
            self._add(name, made)
        return self.total.T.clamp(min=0)  # where calls cancel, rounding is left

    def _add(self, name: str, gradients: Gradients, squared: str | None = None) -> None:
        metric = self.norms.metric
        if name != squared:
            gradients.add_squared_norms(self.total[0])
        if metric is not None:
            block = metric.fit.blocks[name]
            gradients.in_basis(block.left, block.right).add_squared_norms(self.total[1], metric.weights[name])


def _in_full_precision(call: Call, dtype: torch.dtype) -> Call:
    """The call in the precision of the parameters, where autocast computed parts of it in another one."""
    if not isinstance(call.a, Tensor):
        return call
    return replace(call, a=call.a.to(dtype) if call.a.is_floating_point() else call.a, g=call.g.to(dtype))
