"""What a solver is given: the `Operator` protocol, and `CountedOperator`, which checks and counts its products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .. import vectors
from ..errors import InputError
from ..vectors import Block


class Operator(Protocol):
    """A symmetric linear map A on the space of `parameters` (plain tensors, no column axis), P scalars in all.

    `parameters` and `matvec` are required. An operator may also have

    - `dot(x, y) -> Tensor`: inner products of matching columns, float64, shape (Q,); defaults to `vectors.dot`. An
      operator whose blocks hold only this process's shard of longer vectors returns those of the whole vectors.
    - `gram(x, y) -> Tensor`: the same of all columns of x with all of y, float64, shape (Q of x, Q of y); defaults to
      `vectors.gram`, or where the operator has a `dot` of its own, to one call of that per column of y.
    - `sum_over_processes(values) -> Tensor`: the sum of a small tensor over the processes that hold the other shards;
      defaults to `values`.
    - `dimension: int`: P; defaults to the number of scalars in `parameters`.
    - `rademacher(seed) -> Block`: one column of independent ±1 entries; defaults to `vectors.rademacher`.
    """

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    def matvec(self, block: Block) -> Block:
        """A v for each column v of a block, tensors of shape (Q, *parameter.shape). Q varies from call to call."""
        ...


class CountedOperator:
    """An operator with the defaults of `Operator` filled in, whose products are checked and counted per column.

    `solve` hands one to `Solver.compute`.

    Args:
        operator: A.
        columns: Q, how many right-hand sides the products are counted for.

    Attributes:
        parameters: those of the operator.
        counts: products spent on each column so far, shape (Q,), on the device of the parameters.
    """

    def __init__(self, operator: Operator, columns: int):
        self.operator = operator
        self.parameters = operator.parameters
        self.dot: Callable[[Block, Block], Tensor] = getattr(operator, "dot", vectors.dot)
        device = next(iter(operator.parameters.values())).device
        self.counts = torch.zeros(columns, dtype=torch.long, device=device)

    def gram(self, x: Block, y: Block) -> Tensor:
        """Inner products of all columns of x with all columns of y, float64, shape (Q of x, Q of y)."""
        if hasattr(self.operator, "gram"):
            return self.operator.gram(x, y)
        if not hasattr(self.operator, "dot"):
            return vectors.gram(x, y)
        copies = ({name: t[j].expand_as(x[name]) for name, t in y.items()} for j in range(vectors.columns(y)))
        return torch.stack([self.dot(x, copy) for copy in copies], 1)

    def norm(self, x: Block) -> Tensor:
        """Euclidean norms of the columns by the operator's inner product, float64, shape (Q,)."""
        return self.dot(x, x).sqrt()

    def rademacher(self, seed: int) -> Block:
        """One column of independent ±1 entries, the same for the same seed on any device and number of processes."""
        if hasattr(self.operator, "rademacher"):
            return self.operator.rademacher(seed)
        return vectors.rademacher(self.parameters, 1, seed)

    def matvec(self, v: Block, index: Tensor | None = None) -> Block:
        """A v for a block v that holds the columns `index` (defaults to all Q).

        The result must not be written to: the operator may keep it.

        Raises:
            InputError: the product holds NaN or inf.
        """
        if not vectors.columns(v):
            return v
        self.counts[slice(None) if index is None else index] += 1
        product = self.operator.matvec(v)
        product = {name: product[name].detach() for name in v}
        self.check_finite(product, "a product of the operator (matvec)")
        return product

    def check_finite(self, x: Block, what: str) -> None:
        """Raises InputError on every process when `what`, the block x, holds NaN or inf on any of them."""
        infinite = torch.stack([~_all_finite(t) for t in x.values()]).double()
        if hasattr(self.operator, "sum_over_processes"):
            infinite = self.operator.sum_over_processes(infinite)
        if infinite.any():
            name = list(x)[int(infinite.argmax())]
            narrower = ", or try float32: model.float()" if x[name].dtype == torch.float64 else ""
            raise InputError(
                f"{what} holds NaN or inf in parameter {name!r}; expected numbers: check the weights and the rows"
                f"{narrower}."
            )


def _all_finite(t: Tensor) -> Tensor:
    # The extremes are NaN where an entry is; `t.isfinite()` makes copies of t, and takes thirty times as long.
    extremes = torch.stack(t.aminmax()) if t.numel() else t
    return extremes.isfinite().all()


def dimension(operator: Operator) -> int:
    """P, the number of scalars in a whole vector of the operator's space."""
    if hasattr(operator, "dimension"):
        return operator.dimension
    return sum(p.numel() for p in operator.parameters.values())


def rounding_unit(x: Mapping[str, Tensor]) -> float:
    """The largest machine epsilon among the dtypes in x."""
    return max(torch.finfo(t.dtype).eps for t in x.values())
