"""Truths: the measured removal effects with which predictions are compared, and how reliable they are.

    OwnTruth        the run that is explained, trained again without the examples from its own start
    ExpectedTruth   the mean over trainings from other starts: what the examples do to any such training

They are two questions, and may rank methods in opposite orders. Both take their retrainings from a `Bank`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from .bank import Bank
from .measures import Correlation, aggregated, correlation, spearman_brown, split_half

OTHER_STARTS = 1000  # the seed of the first of them, far from the seeds that people give their runs


@dataclass(frozen=True)
class Measurement:
    """Measured removal effects of n omissions on Q test columns, in units of the test loss.

    Attributes:
        effects: (n, Q); positive: the omitted examples helped.
        ceiling: how a second measurement like this one would correlate with it; None: not measured.
        repeated: that second measurement (n, Q), where there is one.
        halves: of an expected truth, the correlation of the means of two halves of its starts.
        by_start: of an expected truth, the effects under each start, (K, n, Q), whose mean is `effects`.
    """

    effects: np.ndarray
    ceiling: Correlation | None = None
    repeated: np.ndarray | None = None
    halves: Correlation | None = None
    by_start: np.ndarray | None = None


class Truth(Protocol):
    """What predictions are compared with."""

    @property
    def seeds(self) -> Sequence[int]:
        """The seeds of the retrainings of which `effects` are the mean."""
        ...

    @property
    def retrainings(self) -> Sequence[int]:
        """`seeds`, and those of the ceiling: all that `measure` takes from the bank."""
        ...

    def check(self, retrain: Callable) -> None:
        """Refuses a way of retraining that has no such truth, before anything is trained.

        Args:
            retrain: a bank's.

        Raises:
            InputError: says why it has none.
        """
        ...

    def effects(self, bank: Bank, omissions: Sequence[Collection], aggregate: str | None) -> np.ndarray:
        """Measured removal effects alone, without a ceiling: (n, Q)."""
        ...

    def measure(
        self, bank: Bank, omissions: Sequence[Collection], aggregate: str | None, resamples: int
    ) -> Measurement:
        """Measured removal effects, and their ceiling.

        Args:
            bank: the retrainings.
            omissions: n sets of example ids.
            aggregate: "sum" or "mean" over the test columns; None: each column by itself.
            resamples: number of bootstrap samples for the intervals of the ceiling.

        Raises:
            InputError: the bank's way of retraining has no such truth.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: "truth", its name, and its settings."""
        ...

    def __str__(self) -> str:
        """The truth in words, after "against"."""
        ...


@dataclass(frozen=True)
class OwnTruth:
    """What the run that is explained does without the examples: it is trained again from its own start.

    effect = mean over `seeds` of (loss without the examples − loss with all of them, under the same seed)

    Attributes:
        seeds: of `WarmStart`, 0 is the finished model; of `FromScratch`, the seed of the run itself.
        ceiling_seeds: of a second measurement, whose correlation with the first is the ceiling: seeds of the same
            start moved by a relative 1e-6 (any other seed of `WarmStart`, a negative one of `FromScratch`); empty: no
            ceiling.

    Raises:
        InputError: the same seed is in both: the same retrainings would raise the ceiling.
    """

    seeds: Sequence[int] = (0,)
    ceiling_seeds: Sequence[int] = (1,)

    def __post_init__(self):
        if not len(self.seeds) or set(self.seeds) & set(self.ceiling_seeds):
            raise InputError(
                f"seeds {list(self.seeds)} and ceiling_seeds {list(self.ceiling_seeds)} overlap, or seeds are none; "
                "expected different seeds: the same retrainings would raise the ceiling."
            )

    @property
    def retrainings(self) -> list[int]:
        return [*self.seeds, *self.ceiling_seeds]

    def check(self, retrain: Callable) -> None:
        pass  # a run can always be compared with itself

    def effects(self, bank: Bank, omissions: Sequence[Collection], aggregate: str | None) -> np.ndarray:
        return aggregated(bank.effects(omissions, self.seeds), aggregate)

    def measure(
        self, bank: Bank, omissions: Sequence[Collection], aggregate: str | None, resamples: int
    ) -> Measurement:
        effects = self.effects(bank, omissions, aggregate)
        if not len(self.ceiling_seeds):
            return Measurement(effects)
        repeated = aggregated(bank.effects(omissions, self.ceiling_seeds), aggregate)
        return Measurement(effects, correlation(repeated, effects, resamples), repeated)

    def to_dict(self) -> dict[str, Any]:
        return {"truth": "own", "seeds": list(self.seeds), "ceiling_seeds": list(self.ceiling_seeds)}

    def __str__(self) -> str:
        return "the run's own retraining" + (f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else "")


@dataclass(frozen=True)
class ExpectedTruth:
    """What training does without the examples in expectation over its starts: the mean of K retrainings.

    effect = (1/K) Σ_k (loss without the examples − loss with all of them, both from start k)

    A start is what a seed of the bank's `retrain` draws: for `FromScratch` the initial weights of all that is trained
    from scratch, and by its `vary` also the order of the batches. The same sentences are read with the same masks.

    The ceiling is the reliability of the mean of K starts, the correlation that a second mean of K other starts would
    have: the split-half correlation taken to K starts by the formula of Spearman and Brown. Errors of the K starts
    hide a part of the expectation, so that a perfect prediction of it has √ceiling and not 1.

    Attributes:
        starts: K, at least 2 (8 is a good beginning, and an even number halves best), for the seeds 1000 to
            1000 + K − 1; or the seeds themselves. More starts go on where fewer ended.

    Raises:
        InputError: fewer than two starts, or a seed twice.

    >>> ExpectedTruth(3).seeds
    (1000, 1001, 1002)
    """

    starts: int | Sequence[int] = 8
    seeds: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        seeds = self.starts
        seeds = [OTHER_STARTS + k for k in range(seeds)] if isinstance(seeds, int) else [int(seed) for seed in seeds]
        if len(set(seeds)) != len(seeds) or len(seeds) < 2:
            raise InputError(
                f"starts is {self.starts!r}; expected a number of at least two starts, or as many different seeds."
            )
        object.__setattr__(self, "seeds", tuple(seeds))

    @property
    def retrainings(self) -> tuple[int, ...]:
        return self.seeds

    def check(self, retrain: Callable) -> None:
        if hasattr(retrain, "check_starts"):  # of a plain function, every seed counts as another start
            retrain.check_starts(self.seeds)

    def by_start(self, bank: Bank, omissions: Sequence[Collection], aggregate: str | None) -> np.ndarray:
        """The effects under each start, (K, n, Q)."""
        self.check(bank.retrain)
        one, other = (bank.losses([()], seed) for seed in self.seeds[:2])
        if np.array_equal(one, other):
            raise InputError(
                f"training ended in the same losses under the seeds {self.seeds[0]} and {self.seeds[1]}: there are no "
                "other starts over which an effect could be expected; expected OwnTruth."
            )
        return np.stack([aggregated(bank.effects(omissions, [seed]), aggregate) for seed in self.seeds])

    def effects(self, bank: Bank, omissions: Sequence[Collection], aggregate: str | None) -> np.ndarray:
        return self.by_start(bank, omissions, aggregate).mean(0)

    def measure(
        self, bank: Bank, omissions: Sequence[Collection], aggregate: str | None, resamples: int
    ) -> Measurement:
        by_start = self.by_start(bank, omissions, aggregate)
        halves = split_half(by_start, resamples)
        ceiling = spearman_brown(halves, len(self.seeds) / (len(self.seeds) // 2))
        return Measurement(by_start.mean(0), ceiling, halves=halves, by_start=by_start)

    def to_dict(self) -> dict[str, Any]:
        return {"truth": "expected", "starts": list(self.seeds)}

    def __str__(self) -> str:
        return f"the mean of retrainings from {len(self.seeds)} other starts"
