"""What all curvature operators share: fixed batches, one division by N, the quadratic terms."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import vectors
from ..adapters.functional import FunctionalModel, memo_bytes
from ..engine.accelerated import Engine
from ..objectives import Objective
from ..vectors import Block
from .derivatives import Evaluation, gradient, hessian_product

MEMO_BYTES = 2 * 2**30


class Curvature:
    """A symmetric operator  v ↦ (1/N) Σ_i C_i v + ridge ∘ v  on the trained parameters of a stage.

    C_i is the curvature of example i's loss ℓ_i (a sum over its terms) and N = Σ_i count_i. `ridge` is the diagonal of
    F's quadratic terms: weight decay, and 2α where a parameter is tied to the stage before, eq. (12). The examples and
    their masks are the same in every product, or the operator would not be linear.

    A subclass defines `_product(evaluation, v)`: Σ_i C_i v over the examples of one batch, for every column of v.
    The first pass collates the batches, and later ones find them. Where few passes are needed, `holds_batches` is
    False: each pass then collates its batches anew, so that memory does not grow with the rows.

    Args:
        model: gives the parameters at which the losses are differentiated.
        objective: gives the losses.
        rows: the examples; each process holds its shard of them.
        names: trained parameters, the operator's space.
        engine: runs the passes and adds up over processes.
        batch_size: rows per batch; it does not change a product.
        ridge: parameter name → a number, or a tensor that broadcasts to the parameter. Defaults to none.

    Attributes:
        parameters: the trained parameters, plain tensors.
        examples: the number of rows.
        evaluations: this process's batches, where they are held.
        holds_batches: whether they are.
    """

    holds_batches: ClassVar[bool] = True  # of an operator that is read by mini-batches, its own value
    is_symmetric: ClassVar[bool] = False  # by construction: nothing is to be checked
    semidefinite: ClassVar[bool] = False  # known to be positive semi-definite
    fixed_seconds: float = 0.0  # of the first product, what did not grow with the rows

    def __init__(
        self,
        model: FunctionalModel,
        objective: Objective,
        rows: list[dict],
        names: tuple[str, ...],
        engine: Engine,
        batch_size: int,
        ridge: Mapping[str, float | Tensor] | None = None,
    ):
        self.model, self.objective, self.rows = model, objective, rows
        self.engine, self.batch_size = engine, batch_size
        self.parameters = {name: model.parameters[name] for name in names}
        self.ridge = dict(ridge or {})
        self.examples = len(rows)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """This process's batches, collated at the first pass; none where `holds_batches` is False."""
        if not self.holds_batches:
            return []
        with self.engine.raising_together():
            batches = self.engine.batches(self.rows, self.objective, self.batch_size)
            return [Evaluation(self.model, self.objective, batch, memo={}) for _, batch in batches]

    def minibatch(self, step: int, rows: int, seed: int = 0) -> Curvature:
        """The curvature of one mini-batch, scaled to be an unbiased estimate of this one: (n / |B|) Σ_{i ∈ B} C_i / N.

        The mini-batches of an epoch, ⌈n / rows⌉ steps, are a random partition of all n rows into parts of nearly equal
        size: every row is in one of them. B is a pure function of (seed, step), the same for any number of processes.
        N is the number of terms of *all* rows: divided by that of B, the estimate would be biased.

        Args:
            step: the number of the mini-batch, from 0; after an epoch comes another partition.
            rows: |B| at most.
            seed: of the partitions.

        Returns:
            A curvature of those rows, which holds its batches; itself where it is no sum over batches, as EK-FAC.
        """
        if type(self)._product is Curvature._product:
            return self
        parts = -(-self.examples // rows)
        epoch, place = divmod(step, parts)
        start, end = place * self.examples // parts, (place + 1) * self.examples // parts
        order = _permutation(self.examples, seed, epoch)
        estimate = copy.copy(self)
        for name in [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]:
            del vars(estimate)[name]
        with self.engine.raising_together():
            estimate.rows = [self.rows[i] for i in order[start:end].tolist()]
        estimate.examples = end - start
        estimate.holds_batches = True  # type: ignore[misc]  # its own value
        vars(estimate)["count"] = self.count * (end - start) / self.examples
        return estimate

    @cached_property
    def count(self) -> float:
        """N: the number of counted terms of all examples."""
        with torch.no_grad(), self.model.evaluating(), self.engine.raising_together():
            local = sum((float(_counts(e).double().sum()) for e in self._passing()), 0.0)
        return sum(self.engine.gather([local]))

    def _product(self, evaluation: Evaluation, v: Block) -> Block:
        raise NotImplementedError

    def rehearse(self, evaluation: Evaluation, v: Block) -> None:
        """What a pass over the data does with one batch; its memory is measured on it."""
        self._product(evaluation, v)

    def keep_in(self, folder: Path) -> None:
        """Says where a long preparation may be saved, to be found by the next query. Defaults to saving nothing."""

    def approximations(self) -> list[str]:
        """For people: how C_i is approximated, one line per kind of parameters. Defaults to none."""
        return []

    def held_bytes(self) -> int:
        """Bytes that are held between products, beside vectors and batches. Defaults to 0."""
        return 0

    def products(self, v: Block) -> Iterator[Block]:
        """Σ_i C_i v over each of this process's batches, one block per batch."""
        return (self._product(evaluation, v) for evaluation in self._passing())

    def matvec(self, v: Block) -> Block:
        """A v for every column of v, tensors of shape (Q, *parameter.shape): one pass over the data, one reduction.

        Accumulated in float64 over batches and processes, returned in the dtype of v.
        """
        with self.model.evaluating():
            total = self.engine.sum(v, self.products(v))
        product = self._divided(total)
        for name, strength in self.ridge.items():
            product[name] += strength * v[name]
        return product

    def mixed(self, v: Block, names: tuple[str, ...]) -> Block:
        """∂/∂names ⟨∇_trained F, v⟩ for every column: the mixed second derivative of eqs. (10) and (11), always exact.

        The quadratic terms tie no trained parameter to a frozen one, so they do not appear.
        """
        columns = vectors.columns(v)
        like = {n: self.model.parameters[n].expand(columns, *self.model.parameters[n].shape) for n in names}
        total = len(self.evaluations) or None
        passing = self.engine.bar(self._passing(), total=total, desc="mixed derivative", unit=" batches")
        with self.model.evaluating():
            product = self.engine.sum(like, (hessian_product(e, v, names) for e in passing))
        return self._divided(product)

    def gradient(self) -> Block:
        """(1/N) Σ_i ∇ℓ_i on the trained parameters, a block of one column, without the quadratic terms of F."""
        like = vectors.stack([self.parameters])
        with self.model.evaluating():
            parts = (vectors.stack([gradient(e, self.parameters)]) for e in self._passing())
            total = self.engine.sum(like, parts)
        return self._divided(total)

    def _divided(self, total: Block) -> Block:
        for t in total.values():  # in place: a block of many columns is large
            t /= self.count
        return total

    def _passing(self) -> Iterator[Evaluation]:
        """The batches of a pass; outputs of frozen encoders are kept between passes, up to `MEMO_BYTES`."""
        if not self.holds_batches:
            batches = self.engine.batches(self.rows, self.objective, self.batch_size)
            yield from (Evaluation(self.model, self.objective, batch) for _, batch in batches)
            return
        memo_size = 0
        for evaluation in self.evaluations:
            yield evaluation
            memo_size += memo_bytes(evaluation.memo or {})
            if memo_size > MEMO_BYTES:
                evaluation.memo = None


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def _counts(evaluation: Evaluation) -> Tensor:
    counts = evaluation.objective.counts
    return counts(evaluation.batch) if counts is not None else evaluation.losses({})[1]
