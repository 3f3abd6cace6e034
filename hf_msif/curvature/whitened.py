"""`Whitened`: a curvature in the coordinates of a diagonal preconditioner, P^½ H P^½."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..vectors import Block
from .base import Curvature


class Whitened:
    """A = P^½ H P^½, an `Operator` for solvers, whole or in shards (`sharded.Sharded`).

    A run that divides its gradients by √v̂, as Adam does, is plain gradient descent in the coordinates P^−½ φ with
    P = 1/(√v̂ + ε), where the curvature is A and a gradient is P^½ g.

    Args:
        operator: H.
        roots: P^½ on each of its parameters; 0 where the run never moved the parameter.
        decay: a further diagonal of A by name: decoupled weight decay, which no preconditioner scales.
    """

    def __init__(self, operator: Curvature, roots: Mapping[str, Tensor], decay: Mapping[str, float] | None = None):
        self.operator, self.roots, self.decay = operator, roots, decay or {}
        self.parameters, self.semidefinite = operator.parameters, operator.semidefinite
        self.model, self.engine = operator.model, operator.engine

    @property
    def count(self) -> float:
        return self.operator.count

    @property
    def ridge(self) -> dict[str, Tensor]:
        """The diagonal of the quadratic terms: P ∘ ridge of H, and the decoupled decay."""
        ridge = {name: self.roots[name] ** 2 * strength for name, strength in self.operator.ridge.items()}
        for name, decay in self.decay.items():
            ridge[name] = ridge.get(name, torch.zeros_like(self.roots[name])) + decay
        return ridge

    def scaled(self, v: Block) -> Block:
        """P^½ v for every column."""
        return {name: self.roots[name] * t for name, t in v.items()}

    def unscaled(self, v: Block) -> Block:
        """P^−½ v for every column; 0 where P is."""
        return {name: torch.where((root := self.roots[name]) > 0, t / root, 0.0) for name, t in v.items()}

    def products(self, v: Block) -> Iterator[Block]:
        """What adds up to N times A v without the quadratic terms, batch by batch."""
        return map(self.scaled, self.operator.products(self.scaled(v)))

    def matvec(self, v: Block) -> Block:
        """A v for every column of v: one pass over the data."""
        product = self.scaled(self.operator.matvec(self.scaled(v)))
        for name, decay in self.decay.items():
            product[name] = product[name] + decay * v[name]
        return product
