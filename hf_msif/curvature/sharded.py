"""A solver's vectors in slices, one a process: their memory falls with the number of processes.

Process r of R holds the entries r⌈P/R⌉, … of every vector of a recurrence (x, r, p, Ap, …). A product gathers the one
vector that its pass over the data needs whole, and leaves of the result its own slice again (a reduce-scatter, where
whole vectors need an all-reduce); inner products are added up over the processes. So beside the slices a process holds
for the time of a product: the vector, its float64 sum, and a batch's part of it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .. import vectors
from ..engine.accelerated import Engine
from ..vectors import Block
from . import Curvature
from .base import TRACE_PROBES

NAME = "slice"


class Sliced:
    """A curvature operator on this process's slices: blocks {"slice": (Q, ⌈P/R⌉)}, the last one's padded with zeros.

    To be used, and solved with, inside of `Engine.slices`.
    """

    def __init__(self, operator: Curvature, engine: Engine):
        self.operator, self.engine = operator, engine
        self.dimension = sum(p.numel() for p in operator.parameters.values())
        self.length = engine.slice_length(self.dimension)
        kind = next(iter(operator.parameters.values())).new_zeros(1)
        self.parameters = {NAME: kind.expand(self.length)}  # its shape, dtype and device; no memory

    def cut(self, block: Block) -> Block:
        """The slices of a block of whole vectors."""
        rows = (torch.cat([t[q].flatten() for t in block.values()]) for q in range(vectors.columns(block)))
        return {NAME: torch.stack([self.engine.cut(row) for row in rows])}

    def join(self, block: Block) -> Block:
        """The whole vectors of slices, the same on every process."""
        rows = self.join_rows(block)
        return vectors.unflatten(rows, self._like(len(rows)))

    def join_rows(self, block: Block) -> Tensor:
        """The same as plain rows, (Q, P)."""
        return torch.stack([self.engine.join(row, self.dimension) for row in block[NAME]])

    def cut_rows(self, rows: Tensor) -> Block:
        """The slices of plain rows, (Q, P)."""
        return {NAME: torch.stack([self.engine.cut(row) for row in rows])}

    def _like(self, width: int) -> Block:
        return {name: p.expand(width, *p.shape) for name, p in self.operator.parameters.items()}

    def matvec(self, v: Block) -> Block:
        """The slices of A v: the same sums as `Curvature.matvec`."""
        with vectors.across(None), self.operator.model.evaluating():
            own = self.engine.sum_sliced(self._like(len(v[NAME])), self.operator.products(self.join(v)))
        own /= self.operator.count
        return {NAME: own.to(v[NAME].dtype) + self._ridge * v[NAME]}

    @cached_property
    def _ridge(self) -> Tensor:
        """The diagonal of the quadratic terms."""
        parts = []
        for name, p in self.operator.parameters.items():
            strength = self.operator.ridge.get(name, 0.0)
            parts.append((torch.zeros_like(p) + strength).flatten())
        return self.engine.cut(torch.cat(parts))

    def random(self, columns: int) -> Block:
        """Slices of `vectors.rademacher`, which would give all processes the same entries."""
        parts = [self.cut(vectors.rademacher(self.operator.parameters, columns, 0, q)) for q in range(columns)]
        return {NAME: torch.cat([part[NAME] for part in parts])}

    def trace(self) -> float:
        """As `Curvature.trace`, with the same random vectors, one at a time."""
        probes = self.random(TRACE_PROBES)[NAME].split(1)
        return sum(float(vectors.dot({NAME: z}, self.matvec({NAME: z}))) for z in probes) / TRACE_PROBES
