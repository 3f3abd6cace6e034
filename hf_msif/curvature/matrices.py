"""Parameters as matrices: on which sides EK-FAC has a basis, and which calls of layers make their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .blocks import LONGEST_VECTOR, Gradients, KroneckerBlock, has_basis
from .layer_rules import Call, Elementwise, Embedding, Layer, Linear


class MatrixShape:
    """How a parameter is a matrix, and on which sides of it its block has a basis.

    Attributes:
        layer: the layer that makes the gradients of a matrix; None for a vector, and for what no layer makes.
        is_vector: layers make the gradients of a vector.
        is_apart: no layer makes them as matrices or vectors: a backward pass per example does.
        kind: of approximation, for people.
    """

    def __init__(self, layer: Layer | None, is_vector: bool, size: tuple[int, int], left: bool, right: bool):
        self.layer, self.is_vector, self.size, self.left, self.right = layer, is_vector, size, left, right
        self.is_apart = layer is None and not is_vector
        if is_vector:
            self.kind = "vectors with an eigenbasis of their own" if left else "long vectors, diagonal"
        elif layer is None:
            self.kind = "parameters of other layers, diagonal, a backward pass per example"
        elif left and right:
            self.kind = "matrices in a Kronecker eigenbasis"
        else:
            self.kind = "tables and long matrices, diagonal along the vocabulary or the long side"

    @classmethod
    def of(cls, name: str, parameter: Tensor, layers: list[Layer]) -> MatrixShape:
        matrices = [layer for layer in layers if isinstance(layer, (Linear, Embedding)) and _local(layer, name)]
        sizes = {tuple(_matrices(layer, parameter.unsqueeze(0)).shape[1:]) for layer in matrices}
        turned = {isinstance(layer, Linear) and layer.transposed for layer in matrices}
        if not layers or (matrices and (len(matrices) < len(layers) or max(len(sizes), len(turned)) > 1)):
            return cls(None, False, (parameter.numel(), 1), False, False)  # made in two ways that do not fit
        if not matrices:
            return cls(None, True, (parameter.numel(), 1), 1 < parameter.numel() <= LONGEST_VECTOR, False)
        ((m, n),) = sizes
        table = any(isinstance(layer, Embedding) for layer in matrices)
        left = has_basis(m, n) and not table
        return cls(matrices[0], False, (m, n), left, has_basis(n, m))

    def block(self, like: Tensor) -> KroneckerBlock:
        return KroneckerBlock(self.size, like, self.left, self.right)

    def matrices(self, v: Tensor) -> Tensor:
        """Columns of the parameter, (Q, *shape), as matrices, (Q, m, n)."""
        return v.reshape(len(v), *self.size) if self.layer is None else _matrices(self.layer, v)

    def stored(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Inverse of `matrices`; `like` has the shape of the result."""
        return self.layer.stored(matrices) if isinstance(self.layer, Linear) else matrices.reshape(like.shape)


def shapes_of(parameters: Mapping[str, Tensor], layers: Iterable[Layer]) -> dict[str, MatrixShape]:
    """How each parameter is a matrix, given the layers that make the gradients."""
    owners: dict[str, list[Layer]] = {name: [] for name in parameters}
    for layer in layers:
        for name in layer.names.values():
            owners[name].append(layer)
    return {name: MatrixShape.of(name, parameters[name], made_by) for name, made_by in owners.items()}


def _local(layer: Layer, name: str) -> bool:
    """Whether the parameter is the layer's weight."""
    return layer.names.get("weight") == name


def _matrices(layer: Layer, v: Tensor) -> Tensor:
    return layer.matrix(v) if isinstance(layer, Linear) else v


def collect(made: dict[str, Gradients], layer: Layer, call: Call, apart: list[str]) -> None:
    """Adds what a call of a layer tells of the gradients of its parameters; those of `apart` are made elsewhere."""
    own = {local: made[name] for local, name in layer.names.items() if name not in apart}
    if not isinstance(layer, (Linear, Embedding, Elementwise)):
        columns = layer.gradients(call)
        for local, gradients in own.items():
            gradients.add_vectors(columns[layer.names[local]].reshape(call.grouping.examples, -1))
        return
    if "bias" in own:
        own["bias"].add_vectors(call.grouping.sum(call.g))
    if "weight" not in own:
        return
    if isinstance(layer, Linear):
        own["weight"].add(call.grouping.padded(call.a), call.grouping.padded(call.g))
    elif isinstance(layer, Embedding):
        own["weight"].add_tokens(call.grouping.example_of_each(call.g), call.a, call.g)
    else:
        own["weight"].add_vectors(call.grouping.sum(call.a * call.g))
