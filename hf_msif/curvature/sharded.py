"""A solver's vectors in shards, one per process: their memory falls with the number of processes.

Process r of R holds the entries r⌈P/R⌉, …, (r + 1)⌈P/R⌉ − 1 of every vector of a recurrence (x, r, p, Ap, …). A
product gathers the one vector that its pass over the data needs as a whole, and keeps only this process's shard of the
result (a reduce-scatter, where whole vectors need an all-reduce). Inner products are added up over the processes. So
beside the shards, a process holds for the time of a product: the whole vector, its float64 sum, and a batch's part of
that sum.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .. import vectors
from ..engine.accelerated import Engine
from ..vectors import Block
from .base import Curvature
from .whitened import Whitened

NAME = "shard"


class Sharded:
    """A curvature operator on this process's shards: an `Operator` for solvers that are `shardable`.

    Its blocks are {"shard": (Q, ⌈P/R⌉)}; the last shards are padded with zeros.

    Args:
        operator: the curvature, or a whitened one, on whole vectors.
        engine: its processes hold the shards.
    """

    def __init__(self, operator: Curvature | Whitened, engine: Engine):
        self.operator, self.engine = operator, engine
        self.dimension = sum(p.numel() for p in operator.parameters.values())
        scalar = next(iter(operator.parameters.values())).new_zeros(1)
        self.parameters = {NAME: scalar.expand(engine.shard_length(self.dimension))}  # no memory beyond one scalar

    def dot(self, x: Block, y: Block) -> Tensor:
        """Inner products of the whole vectors whose shards x and y hold: float64, shape (Q,), on every process."""
        return self.sum_over_processes(vectors.dot(x, y))

    def gram(self, x: Block, y: Block) -> Tensor:
        """Inner products of all whole vectors of x with all of y: float64, (Q of x, Q of y), on every process."""
        return self.sum_over_processes(vectors.gram(x, y))

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """A small tensor, added up over the processes."""
        return self.engine.all_reduce(values)

    def cut(self, block: Block) -> Block:
        """This process's shards of a block of whole vectors."""
        # One column at a time: a flat copy of the whole block would be as large as the block.
        rows = (torch.cat([t[q].flatten() for t in block.values()]) for q in range(vectors.columns(block)))
        return {NAME: torch.stack([self.engine.cut(row) for row in rows])}

    def join(self, block: Block) -> Block:
        """The whole vectors of a block of shards, the same on every process."""
        rows = self.join_rows(block)
        return vectors.unflatten(rows, self._like(len(rows)))

    def join_rows(self, block: Block) -> Tensor:
        """The whole vectors of a block of shards as a matrix, (Q, P)."""
        return torch.stack([self.engine.join(row, self.dimension) for row in block[NAME]])

    def cut_rows(self, rows: Tensor) -> Block:
        """This process's shards of the rows of a matrix, (Q, P)."""
        return {NAME: torch.stack([self.engine.cut(row) for row in rows])}

    def _like(self, columns: int) -> Block:
        return {name: p.expand(columns, *p.shape) for name, p in self.operator.parameters.items()}

    def matvec(self, v: Block) -> Block:
        """The shards of A v: the same sums as `Curvature.matvec`."""
        with self.operator.model.evaluating():
            total = self.engine.sum_sharded(self._like(len(v[NAME])), self.operator.products(self.join(v)))
        total /= self.operator.count
        return {NAME: total.to(v[NAME].dtype) + self._ridge * v[NAME]}

    @cached_property
    def _ridge(self) -> Tensor:
        """The shard of the diagonal of the quadratic terms."""
        parts = []
        for name, p in self.operator.parameters.items():
            strength = self.operator.ridge.get(name, 0.0)
            parts.append((torch.zeros_like(p) + strength).flatten())
        return self.engine.cut(torch.cat(parts))

    def rademacher(self, seed: int) -> Block:
        """The shards of `vectors.rademacher` of whole vectors; of shards it would give all processes the same ones."""
        return self.cut(vectors.rademacher(self.operator.parameters, 1, seed))
