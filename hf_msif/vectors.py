"""Algebra on parameter vectors: `dict[str, Tensor]` whose tensors carry a leading axis of columns.

A *block* maps parameter names to tensors of shape `(Q, *parameter.shape)`: Q vectors of the same parameter space,
one per query. All functions treat the Q columns independently, so a solver written with them solves Q systems in
lock-step, and one pass over the data serves all columns. Inner products are accumulated in float64 whatever the
dtype of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Block = dict[str, Tensor]
PIECE = 2**16  # entries of a column that `gram` takes to float64 at a time


def columns(x: Mapping[str, Tensor]) -> int:
    """Number of columns Q of a block."""
    return next(iter(x.values())).shape[0]


def numel(x: Mapping[str, Tensor]) -> int:
    """Length P of one column: the number of scalars of a block divided by Q."""
    return sum(math.prod(t.shape[1:]) for t in x.values())


def nbytes(x: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of a block, or of a model's parameters.

    >>> nbytes({"w": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.float64)})
    40
    """
    return sum(t.nbytes for t in x.values())


def _rows(t: Tensor) -> Tensor:
    # `flatten(1)` refuses the one-dimensional tensors of a parameter without axes (a temperature, a mixing weight).
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def _as_column(scalars: Tensor | float, like: Tensor) -> Tensor | float:
    if not isinstance(scalars, Tensor):
        return scalars
    return scalars.to(like).reshape(-1, *[1] * (like.dim() - 1))


def dot(x: Block, y: Block) -> Tensor:
    """Inner products of matching columns, float64, shape (Q,).

    >>> x = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    >>> dot(x, x)
    tensor([ 5., 25.], dtype=torch.float64)
    """
    first = next(iter(x.values()))
    total = torch.zeros(first.shape[0], dtype=torch.float64, device=first.device)
    for name, t in x.items():
        left = _rows(t).double()
        right = left if y[name] is t else _rows(y[name]).double()
        total += torch.linalg.vecdot(left, right)
    return total


def gram(x: Block, y: Block) -> Tensor:
    """Inner products of all columns of x with all columns of y, float64, shape (Q of x, Q of y).

    >>> x = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    >>> gram(x, {"w": torch.tensor([[1.0, 0.0]])})
    tensor([[1.],
            [3.]], dtype=torch.float64)
    """
    total = torch.zeros(columns(x), columns(y), dtype=torch.float64, device=next(iter(x.values())).device)
    for name, t in x.items():
        # In pieces: the float64 copies of a whole embedding would need more memory than the block.
        for left, right in zip(_rows(t).split(PIECE, 1), _rows(y[name]).split(PIECE, 1), strict=True):
            total += left.double() @ right.double().T
    return total


def norm(x: Block) -> Tensor:
    """Euclidean norms of the columns, float64, shape (Q,)."""
    return dot(x, x).sqrt()


def add(x: Block, y: Block, scale: Tensor | float = 1.0) -> Block:
    """x + scale · y; `scale` is a number or one scalar per column, shape (Q,)."""
    return {name: t + _as_column(scale, t) * y[name] for name, t in x.items()}


def add_(x: Block, y: Block, scale: Tensor | float = 1.0) -> Block:
    """x ← x + scale · y in place; returns x."""
    for name, t in x.items():
        t.add_(_as_column(scale, t) * y[name])
    return x


def scale(x: Block, by: Tensor | float) -> Block:
    """by · x; `by` is a number or one scalar per column, shape (Q,)."""
    return {name: _as_column(by, t) * t for name, t in x.items()}


def combine(x: Block, coefficients: Tensor) -> Block:
    """Linear combinations of the columns of x: column j of the result is Σ_q coefficients[q, j] x_q.

    >>> combine({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, torch.tensor([[1.0], [-1.0]]))
    {'w': tensor([[-2., -2.]])}
    """
    size = coefficients.shape[1]
    return {name: (coefficients.T.to(t) @ _rows(t)).reshape(size, *t.shape[1:]) for name, t in x.items()}


def where(keep: Tensor, x: Block, y: Block) -> Block:
    """Columns of x where `keep` (bool, shape (Q,)) holds, of y elsewhere."""
    return {name: torch.where(keep.reshape(-1, *[1] * (t.dim() - 1)), t, y[name]) for name, t in x.items()}


def clone(x: Block) -> Block:
    """A copy that shares no memory with x."""
    return {name: t.clone() for name, t in x.items()}


def zeros_like(x: Block) -> Block:
    """A block of zeros with the shapes, dtypes and devices of x."""
    return {name: torch.zeros_like(t) for name, t in x.items()}


def select(x: Mapping[str, Tensor], names: Iterable[str]) -> Block:
    """The block restricted to `names`, in their order."""
    return {name: x[name] for name in names}


def stack(vectors: list[Mapping[str, Tensor]]) -> Block:
    """Makes one block of Q columns from Q plain vectors (no column axis)."""
    return {name: torch.stack([v[name] for v in vectors]) for name in vectors[0]}


def column(x: Block, index: int) -> dict[str, Tensor]:
    """One column as a plain vector (no column axis)."""
    return {name: t[index] for name, t in x.items()}


def take(x: Block, index: Tensor) -> Block:
    """A smaller block with copies of the columns `index` (integers, or bool of shape (Q,))."""
    return {name: t[index] for name, t in x.items()}


def put_(x: Block, index: Tensor, y: Block) -> Block:
    """Writes the columns of y over the columns `index` of x, in place; returns x. The inverse of `take`."""
    for name, t in x.items():
        t[index] = y[name]
    return x


def rademacher(parameters: Mapping[str, Tensor], columns: int, seed: int) -> Block:
    """A block of independent ±1 entries shaped like `parameters`: the same entries for the same seed on any device.

    Args:
        parameters: plain tensors (no column axis) that give names, shapes, dtypes and devices.
        columns: Q.
        seed: of a generator of its own; the global random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randint(0, 2, (columns, *p.shape), generator=generator) * 2 - 1).to(p)
        for name, p in parameters.items()
    }


def flatten(x: Block) -> Tensor:
    """The block as a matrix of shape (Q, P), parameters in the block's order."""
    return torch.cat([_rows(t) for t in x.values()], dim=1)


def unflatten(matrix: Tensor, like: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Block:
    """Inverse of `flatten`.

    Args:
        matrix: shape (Q, P).
        like: a block that gives names, shapes, devices and dtypes; its number of columns is ignored.
        dtype: of the result, in the place of the dtypes of `like`.
    """
    sizes = [math.prod(t.shape[1:]) for t in like.values()]
    return {
        name: part.reshape(matrix.shape[0], *t.shape[1:]).to(t.device, dtype or t.dtype)
        for (name, t), part in zip(like.items(), matrix.split(sizes, dim=1), strict=True)
    }
