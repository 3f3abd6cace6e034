"""Influences of a batch on many queries by per-example gradients, a layer at a time; exact, for all parameters.

I(x) = −⟨u, ∇ℓ_x⟩ is a sum over layers of −⟨u_layer, Σ_{n ∈ x} g_n ⊗ a_n⟩. One forward and one backward pass serve all
queries. Then a linear layer takes the cheaper one of two orders of the sums: (u aₙ)·gₙ for every query, which costs as
much as the layer's forward pass per query, or the gradient of every example, once, and its product with all queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..adapters.functional import FunctionalModel, without_tf32
from ..curvature.derivatives import Evaluation, directional_derivatives, term_derivatives
from ..curvature.layer_rules import Call, Embedding, Grouping, Layer, Linear, Local
from ..curvature.layers import LayerMap
from ..curvature.norms import GradientNorms, Metric, SquaredNorms
from ..objectives import Objective, Terms, with_losses
from ..vectors import Block

# The gradients of examples that exist at a time: so many that a processor's cache nearly holds them, or a GPU is busy.
BLOCK_EXAMPLES, BLOCK_BYTES = 64, 2**22
BLOCK_BYTES_ON_GPU = 2**28
HALVES = (torch.bfloat16, torch.float16)


class Layerwise:
    """Scores batches for all columns of u at once.

    Args:
        model: has the parameters at which the losses are differentiated.
        objective: gives the losses.
        u: the queries, tensors of shape (Q, *parameter.shape).
        rows: the first rows to score, see `LayerMap`.
        metric: what self-influences are taken in, beside the norms; None: there are none.

    Attributes:
        layers: which parameters are scored layer by layer; the rest goes by forward mode.
    """

    def __init__(
        self, model: FunctionalModel, objective: Objective, u: Block, rows: list[dict], metric: Metric | None = None
    ):
        self.model, self.objective = model, objective
        with torch.autocast(next(iter(u.values())).device.type, enabled=False), without_tf32():
            self.layers = LayerMap(model, objective, tuple(u), rows) if metric is None else metric.fit.layers
        self.norms = GradientNorms(self.layers, metric)
        self.columns = vectors.columns(u)
        self.rest = vectors.select(u, self.layers.rest)
        self.queries = {layer: _Queries(layer, u) for layer in self.layers.layers}

    @property
    def copied_bytes(self) -> int:
        """Bytes that are held beside u: weights of the queries in the order in which they are read."""
        return sum(queries.copied_bytes for queries in self.queries.values())

    def slopes(
        self, batch: dict[str, Any], examples: int, norms: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """⟨u_q, ∇ℓ_i⟩ of each row and query, (B, Q); the losses and the counts, (B,); and the norms, if asked for.

        The norms, by the same pass, in float64: ‖∇ℓ_i‖, (B, 1); with a metric ‖∇ℓ_i‖ and ∇ℓ_iᵀ f(A) ∇ℓ_i, (B, 2).
        """
        evaluation = Evaluation(self.model, self.objective, batch)
        squares = SquaredNorms(self.norms, examples) if norms else None
        slopes, sums, counts = self._in_layers(evaluation, examples, squares)
        if self.rest:
            forward = [directional_derivatives(evaluation, vectors.column(self.rest, q)) for q in range(self.columns)]
            slopes = slopes + torch.stack([slope for slope, _, _ in forward], dim=1)
        if squares is None:
            return slopes, sums, counts, None
        sizes = squares.finish(evaluation)
        sizes[:, 0] = sizes[:, 0].sqrt()
        return slopes, sums, counts, sizes

    def term_slopes(self, batch: dict[str, Any], examples: int, terms: Terms) -> Tensor:
        """⟨u_q, ∇ℓ_t⟩ of each of the batch's terms and query, (M, Q).

        One pass takes the first terms of all rows, the next one their second terms, …: as many passes as the longest
        row has terms. What a layer holds at one token is not the share of a term, whose gradient passes other tokens.
        """
        slopes, numbers = terms.losses.new_zeros(len(terms.owners), self.columns), terms.numbers
        for number in numbers.unique():
            places = (numbers == number).nonzero().squeeze(1)
            one_per_row = with_losses(self.objective, partial(_one_per_row, self.objective, places, examples))
            of_rows, _, _ = self._in_layers(Evaluation(self.model, one_per_row, batch), examples)
            slopes[places] = of_rows[terms.owners[places]].to(slopes)
        if self.rest:
            evaluation = Evaluation(self.model, self.objective, batch)
            forward = [term_derivatives(evaluation, vectors.column(self.rest, q)) for q in range(self.columns)]
            slopes = slopes + torch.stack([slope for slope, _ in forward], dim=1)
        return slopes

    def _in_layers(
        self, evaluation: Evaluation, examples: int, squares: SquaredNorms | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`slopes` in the parameters that layers make gradients of; `squares` is told of them, too."""
        total: list[Tensor] = []

        def receive(layer: Layer, call: Call) -> None:
            total.append(self.queries[layer].products(call, squares))

        sums, counts = self.layers.run(evaluation, examples, receive)
        slopes = torch.stack(total).sum(0) if total else sums.new_zeros(examples, self.columns)
        return slopes, sums, counts


def _one_per_row(
    objective: Objective, places: Tensor, examples: int, call: Callable, batch: dict
) -> tuple[Tensor, Tensor]:
    """The losses of the terms at `places`, at most one per row; zero for a row without one."""
    assert objective.terms is not None
    terms = objective.terms(call, batch)
    sums = terms.losses.new_zeros(examples).index_add(0, terms.owners[places], terms.losses[places])
    return sums, torch.ones_like(sums)


class _Queries:
    """The queries in one layer's parameters."""

    def __init__(self, layer: Layer, u: Block):
        self.layer = layer
        self.u = {local: u[name] for local, name in layer.names.items()}
        self.reduced: Tensor | None = None
        self.copied_bytes = 0
        if isinstance(layer, Linear) and "weight" in self.u:
            matrix = self.u["weight"].flatten(2)
            # A stored weight is a sum of products left ⊗ right. The left one is cut into blocks: it is to be long.
            self.swapped = matrix.shape[1] < matrix.shape[2]
            if self.swapped:
                matrix = matrix.transpose(1, 2).contiguous()
                self.copied_bytes = matrix.nbytes
            self.u["weight"] = matrix

    def __len__(self) -> int:
        return vectors.columns(self.u)

    def products(self, call: Call, squares: SquaredNorms | None = None) -> Tensor:
        """⟨u_q, ∇ℓ_i⟩ in the layer's parameters, by one of its calls: (B, Q). `squares` is told of the call."""
        if squares is None:
            return self._products(call, None)
        weight = self.layer.names.get("weight") if isinstance(self.layer, Linear) else None
        if weight is not None and not squares.norms.is_whole(weight, call):
            weight = None
        products = self._products(call, None if weight is None else squares.total[0])
        squares.receive(self.layer, call, weight)
        return products

    def _products(self, call: Call, squares: Tensor | None) -> Tensor:
        layer, u, g, grouping, parts = self.layer, self.u, call.g, call.grouping, []
        exact = g.to(next(iter(u.values())).dtype)  # sums over tokens are not taken in bfloat16
        if isinstance(layer, Embedding):
            parts.append(grouping.sum(torch.stack([_dot(exact, table[call.a]) for table in u["weight"]], dim=1)))
        elif isinstance(layer, Local):
            columns = [layer.slopes(call, {local: t[q] for local, t in u.items()}) for q in range(len(self))]
            return torch.stack(columns, dim=1)
        elif "weight" in u and isinstance(layer, Linear):
            a, swapped = call.a.to(g.dtype), self.swapped != layer.transposed
            parts.append(_matrix(a if swapped else g, g if swapped else a, grouping, self._weight(g.dtype), squares))
        elif "weight" in u:
            parts.append(grouping.sum(call.a * exact) @ u["weight"].T)
        if "bias" in u:
            parts.append(grouping.sum(exact) @ u["bias"].T)
        return sum(parts[1:], parts[0])

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """The matrices in the type in which gradients are made."""
        if self.u["weight"].dtype != dtype and (self.reduced is None or self.reduced.dtype != dtype):
            self.reduced = self.u["weight"].to(dtype)
        return self.u["weight"] if self.u["weight"].dtype == dtype or self.reduced is None else self.reduced


def _matrix(left: Tensor, right: Tensor, grouping: Grouping, u: Tensor, squares: Tensor | None) -> Tensor:
    """Σ_{n ∈ i} left_nᵀ u_q right_n, (B, Q), for u of shape (Q, d_left, d_right).

    Σ (Σ_{n ∈ i} left_n ⊗ right_n)² is added to `squares`, (B,), unless it is None.
    """
    rows, examples, columns = len(left), grouping.examples, len(u)
    # In units of d_left · d_right; a query's product with the gradients of examples runs at half the speed of others.
    if squares is None and rows * columns <= rows + 2 * examples * (1 + columns):
        return grouping.sum(torch.stack([_by_query(left, right, matrix) for matrix in u], dim=1))
    return _by_example(grouping.padded(left), grouping.padded(right), u, squares)


def _by_query(left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    """left_nᵀ matrix right_n of each row, (n,): as much work as the layer's forward pass."""
    if left.shape[1] < right.shape[1]:
        return _dot(right @ matrix.T, left)
    return _dot(left @ matrix, right)


def _by_example(left: Tensor, right: Tensor, u: Tensor, squares: Tensor | None) -> Tensor:
    """Σ_t left_itᵀ u_q right_it, (B, Q), by the gradient of every example, once for all queries.

    The gradients exist for some examples and some rows of the weight at a time, always in the same memory, which stays
    in the processor's cache: several times as fast as all at once.
    """
    (examples, _, height), (columns, _, width) = left.shape, u.shape
    on_gpu = left.device.type != "cpu"
    block_examples = examples if on_gpu else min(examples, BLOCK_EXAMPLES)
    block = (BLOCK_BYTES_ON_GPU if on_gpu else BLOCK_BYTES) // left.element_size()
    high = max(1, min(height, block // (block_examples * width)))
    memory = left.new_empty(block_examples * high * width)
    total = left.new_zeros(columns, examples, dtype=torch.float32 if left.dtype in HALVES else left.dtype)
    for top in range(0, height, high):
        rows, queries = left[:, :, top : top + high].transpose(1, 2), u[:, top : top + high].flatten(1)
        for first in range(0, examples, block_examples):
            part, of = rows[first : first + block_examples], right[first : first + block_examples]
            gradients = memory[: part.shape[0] * part.shape[1] * width].view(*part.shape[:2], width)
            torch.bmm(part, of, out=gradients)
            total[:, first : first + block_examples] += queries @ gradients.flatten(1).T
            if squares is not None:
                norms = torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=total.dtype)
                squares[first : first + block_examples] += norms.square()
    return total.T


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, (n,); in float32 at least."""
    return torch.linalg.vecdot(x, y) if x.dtype not in HALVES else torch.linalg.vecdot(x.float(), y.float())
