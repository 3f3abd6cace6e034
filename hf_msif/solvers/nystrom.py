"""The randomised Nyström preconditioner: the largest eigenvalues of A, from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import vectors
from ..errors import InputError
from ..vectors import Block
from .operator import CountedOperator, Operator, dimension, rounding_unit
from .preconditioner import Preconditioner

CHUNK = 8  # columns per product
LEAST = 0.1  # eigenvalues below this share of λ are left out


class LowRank(NamedTuple):
    """I + U diag(change) Uᵀ, U orthonormal."""

    basis: Block  # the columns of U
    change: Tensor  # (l_r + λ)/(l + λ) − 1 of each of them
    gram: Callable[[Block, Block], Tensor]  # the operator's


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """M⁻¹ = (l_r + λ) U (L + λ)⁻¹ Uᵀ + (I − U Uᵀ) (Frangella, Tropp & Udell, 2023), for positive semi-definite A.

    U L Uᵀ = AΩ (ΩᵀAΩ)⁺ (AΩ)ᵀ is the Nyström approximation of A from `rank` seeded vectors Ω of ±1, the same on any
    device and any number of processes; l_r is the smallest eigenvalue in L. The pseudo-inverse leaves out what is at
    the level of rounding, and eigenvalues far below λ are left out, too: λ hides them. So r ≤ `rank`.

    It pays where the spectrum falls below λ within about `rank` eigenvalues, and from a few right-hand sides on: its
    products are spent once per operator.

    Args:
        rank: products, and vectors held at most.
        seed: of Ω.

    Raises:
        InputError: rank < 1.
    """

    rank: int = 64
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"Nystrom(rank={self.rank!r}): expected a whole number >= 1.")

    @property
    def state_vectors(self) -> int:  # type: ignore[override]  # a setting decides what is a constant elsewhere
        return self.rank + CHUNK

    def products(self, parameters: int, columns: int) -> int:
        """`rank` products of one column; no more than P."""
        return -(-min(self.rank, parameters) // columns)

    def init(self, operator: Operator, damping: float) -> LowRank:
        """U and L, from products with `CHUNK` columns at a time."""
        size = min(self.rank, dimension(operator))
        counted = CountedOperator(operator, size)
        seeds = torch.arange(size).split(CHUNK)
        y = {name: p.new_empty(size, *p.shape) for name, p in operator.parameters.items()}
        for index in seeds:
            vectors.put_(y, index, counted.matvec(self._omega(counted, index), index))
        core = torch.cat([counted.gram(self._omega(counted, index), y) for index in seeds])
        values, basis = torch.linalg.eigh((core + core.T) / 2)
        real = values > 10 * rounding_unit(y) * values[-1].clamp(min=0)
        root = basis[:, real] / values[real].sqrt()  # of (ΩᵀAΩ)⁺
        gram = counted.gram(y, y)
        values, basis = torch.linalg.eigh(root.T @ ((gram + gram.T) / 2) @ root)  # AΩ root has L^½ as singular values
        real = values > max(10 * rounding_unit(y) * values[-1:].sum().item(), LEAST * damping)
        values, y = values[real], _combine(y, root @ (basis[:, real] / values[real].sqrt()))
        overlap = counted.gram(y, y)  # I but for rounding, which a condition number of 1/fraction would magnify
        lengths, turn = torch.linalg.eigh((overlap + overlap.T) / 2)
        y = _combine(y, (turn / lengths.sqrt()) @ turn.T)
        change = (values[:1] + damping) / (values + damping) - 1
        return LowRank(y, change, counted.gram)

    def _omega(self, counted: CountedOperator, index: Tensor) -> Block:
        columns = [counted.rademacher(seed=self.seed + i) for i in index.tolist()]
        return {name: torch.cat([column[name] for column in columns]) for name in columns[0]}

    def apply(self, state: LowRank, block: Block) -> Block:
        """M⁻¹r for each column r of a block."""
        if not len(state.change):
            return block
        coefficients = state.change[:, None] * state.gram(state.basis, block)
        return vectors.add(block, vectors.combine(state.basis, coefficients))


def _combine(x: Block, coefficients: Tensor) -> Block:
    """`vectors.combine`, which empties x on the way: two such blocks would not fit."""
    return {name: vectors.combine({name: x.pop(name)}, coefficients)[name] for name in list(x)}
