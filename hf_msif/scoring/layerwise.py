"""Influences of a batch on many queries by per-example gradients, a layer at a time; exact, for all parameters.

I(x) = −⟨u, ∇ℓ_x⟩ is a sum over layers of −⟨u_layer, Σ_{n ∈ x} g_n ⊗ a_n⟩. One forward and one backward pass serve all
queries. Then a linear layer takes the cheaper one of two orders of the sums: (u aₙ)·gₙ for every query, which costs as
much as the layer's forward pass per query, or the gradient of every example, once, and its product with all queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..adapters.functional import FunctionalModel
from ..curvature.derivatives import Evaluation, directional_derivatives
from ..curvature.layers import Call, Elementwise, Embedding, Layer, LayerMap, Linear
from ..objectives import Objective
from ..vectors import Block

BLOCK_BYTES = 2**24  # of the gradients of a batch's examples that exist at a time


class Layerwise:
    """Scores batches for all columns of u at once.

    Args:
        model: has the parameters at which the losses are differentiated.
        objective: gives the losses.
        u: the queries, tensors of shape (Q, *parameter.shape).
        rows: the first rows to score, see `LayerMap`.

    Attributes:
        layers: which parameters are scored layer by layer; the rest goes by forward mode.
    """

    def __init__(self, model: FunctionalModel, objective: Objective, u: Block, rows: list[dict]):
        self.model, self.objective = model, objective
        self.layers = LayerMap(model, objective, tuple(u), rows)
        self.columns = vectors.columns(u)
        self.rest = vectors.select(u, self.layers.rest)
        self.u = vectors.select(u, self.layers.covered)

    def slopes(self, batch: dict[str, Any], examples: int) -> tuple[Tensor, Tensor, Tensor]:
        """⟨u_q, ∇ℓ_i⟩ of each row and query, (B, Q); the losses and the counts, (B,)."""
        evaluation = Evaluation(self.model, self.objective, batch)
        total: list[Tensor] = []

        def receive(layer: Layer, call: Call) -> None:
            total.append(products(layer, call, self.u))

        sums, counts = self.layers.run(evaluation, examples, receive)
        slopes = torch.stack(total).sum(0) if total else sums.new_zeros(examples, self.columns)
        if self.rest:
            forward = [directional_derivatives(evaluation, vectors.column(self.rest, q)) for q in range(self.columns)]
            slopes = slopes + torch.stack([slope for slope, _, _ in forward], dim=1)
        return slopes, sums, counts


def products(layer: Layer, call: Call, u: Block) -> Tensor:
    """⟨u_q, ∇ℓ_i⟩ in one layer's parameters, by one of its calls: (B, Q)."""
    own = {local: u[name] for local, name in layer.names.items()}
    if isinstance(layer, Linear):
        made = []
        if "weight" in own:
            made.append(_linear(call, layer.matrix(own["weight"])))
        if "bias" in own:
            made.append(call.grouping.sum(call.g) @ own["bias"].T)
        return sum(made[1:], made[0])
    if isinstance(layer, Embedding):
        return _embedding(call, own["weight"])
    assert isinstance(layer, Elementwise)
    made = [call.grouping.sum(call.a * call.g) @ own["weight"].T] if "weight" in own else []
    if "bias" in own:
        made.append(call.grouping.sum(call.g) @ own["bias"].T)
    return sum(made[1:], made[0])


def _linear(call: Call, u: Tensor) -> Tensor:
    """Σ_{n ∈ i} g_nᵀ u_q a_n, for u of shape (Q, d_out, d_in)."""
    (rows, d_in), d_out, columns = call.a.shape, call.g.shape[1], len(u)
    by_query = rows * columns
    by_example = rows + call.grouping.examples * columns
    if by_query <= by_example:
        return call.grouping.sum(_by_query(call.a, call.g, u))
    return _by_example(call, u)


def _by_query(a: Tensor, g: Tensor, u: Tensor) -> Tensor:
    """g_nᵀ u_q a_n of each row, (n, Q): as much work as the layer's forward pass per query."""
    if a.shape[1] < g.shape[1]:
        return torch.stack([torch.linalg.vecdot(g @ matrix, a) for matrix in u], dim=1)
    return torch.stack([torch.linalg.vecdot(a @ matrix.T, g) for matrix in u], dim=1)


def _by_example(call: Call, u: Tensor) -> Tensor:
    """The same, summed per example, by the gradient of every example: a block of output rows at a time."""
    a, g = call.grouping.padded(call.a), call.grouping.padded(call.g)
    size = max(1, BLOCK_BYTES // (len(a) * a.shape[2] * a.element_size()))
    total = a.new_zeros(len(a), len(u))
    for start in range(0, g.shape[2], size):
        gradients = g[:, :, start : start + size].transpose(1, 2) @ a
        total.addmm_(gradients.flatten(1), u[:, start : start + size].flatten(1).T)
    return total


def _embedding(call: Call, u: Tensor) -> Tensor:
    """Σ_{n ∈ i} ⟨g_n, u_q[token n]⟩."""
    return call.grouping.sum(torch.stack([torch.linalg.vecdot(call.g, table[call.a]) for table in u], dim=1))
