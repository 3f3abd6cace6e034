"""Correlation and slope of predicted and measured effects, and of two halves of a measurement, with intervals."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError


@dataclass(frozen=True)
class Correlation:
    """Agreement of predictions with measurements, each number a mean over columns (test examples).

    Attributes:
        pearson_r: Pearson's correlation in [−1, 1]; a column counts as 0 if its prediction is constant (it orders
            nothing), and as NaN if its measurement is constant.
        pearson_interval: its percentile bootstrap interval over the n rows (removals).
        spearman_r: Spearman's rank correlation in [−1, 1], with the same rules.
        spearman_interval: its interval.
        slope: of the least-squares line measured ≈ slope · predicted + c; 1 if the predictions have the right size.
        slope_interval: its interval.
        n: number of removals.
        columns: number of test columns over which the mean is taken.
        level: confidence level of the intervals, e.g. 0.95.
    """

    pearson_r: float
    pearson_interval: tuple[float, float]
    spearman_r: float
    spearman_interval: tuple[float, float]
    slope: float
    slope_interval: tuple[float, float]
    n: int
    columns: int
    level: float

    def to_dict(self) -> dict:
        """Plain lists and numbers, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        low, high = self.pearson_interval
        below, above = self.spearman_interval
        return (
            f"Pearson r {self.pearson_r:.3f} [{low:.3f}, {high:.3f}], Spearman {self.spearman_r:.3f} [{below:.3f}, "
            f"{above:.3f}], slope {self.slope:.3g}, n = {self.n}"
        )


def correlation(
    predicted: ArrayLike, measured: ArrayLike, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Pearson's and Spearman's correlation and the slope, each a mean over columns, with bootstrap intervals.

    Args:
        predicted: predicted effects, shape (n,) or (n, Q): n removals, Q test columns.
        measured: measured effects, of the same shape.
        resamples: number of bootstrap samples of the n rows, drawn with replacement and the same for all columns.
        level: confidence level of the percentile intervals.
        seed: of the resampling.

    Raises:
        InputError: the shapes differ, there are fewer than three rows, or a value is not finite.

    >>> agreement = correlation([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 9.0])
    >>> round(agreement.pearson_r, 4), round(agreement.spearman_r, 4), round(agreement.slope, 4)
    (0.9944, 1.0, 2.3)
    """
    return _mean_agreement([(predicted, measured)], resamples, level, seed)


def split_half(repetitions: ArrayLike, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Correlation:
    """The correlation of the means of two halves of repeated measurements, a mean over ways to halve them.

    It is the reliability of a mean of ⌊K/2⌋ repetitions; `spearman_brown` gives that of all K. There are at most 35
    ways, which is all of them for K = 8; where there are more, 35 are drawn. Of an odd K each way leaves out one.

    Args:
        repetitions: measured effects (K, n) or (K, n, Q): K ≥ 2 repetitions, n removals, Q test columns.
        resamples, level: as for `correlation`.
        seed: of the ways that are drawn, and of the resampling.

    Raises:
        InputError: there are fewer than two repetitions or three rows, or a value is not finite.

    >>> effects = np.arange(5.0) + np.array([[0], [1], [0], [2]])  # repetitions that differ by a constant
    >>> round(split_half(effects).pearson_r, 6)
    1.0
    """
    effects = np.asarray(repetitions, dtype=np.float64)
    if effects.ndim not in (2, 3) or len(effects) < 2:
        raise InputError(
            f"split_half got an array of shape {effects.shape}; expected (K, n) or (K, n, Q) with K ≥ 2 repetitions."
        )
    pairs = [(effects[a].mean(0), effects[b].mean(0)) for a, b in _halves(len(effects), seed)]
    return _mean_agreement(pairs, resamples, level, seed)


def spearman_brown(halves: Correlation, factor: float) -> Correlation:
    """The reliability of a mean of `factor` times as many repetitions: f r / (1 + (f − 1) r) (Spearman, Brown, 1910).

    It holds for Pearson's r of repetitions with equal and independent errors, and for the slope between two such
    means, which is a reliability too; for ranks it is an approximation. A value that is not positive shows no
    reliability at all, and stays as it is.

    Args:
        halves: what `split_half` returned.
        factor: number of all repetitions over the number in one half.

    >>> halves = correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0])
    >>> round(halves.pearson_r, 3), round(spearman_brown(halves, 2).pearson_r, 3)  # 2 · 0.6 / 1.6
    (0.6, 0.75)
    """

    def lengthened(r: float) -> float:
        return factor * r / (1 + (factor - 1) * r) if r > 0 else r

    numbers: dict[str, Any] = {
        name: lengthened(getattr(halves, name)) for name in ("pearson_r", "spearman_r", "slope")
    }
    for name in ("pearson_interval", "spearman_interval", "slope_interval"):
        low, high = getattr(halves, name)
        numbers[name] = (lengthened(low), lengthened(high))
    return replace(halves, **numbers)


@dataclass(frozen=True)
class LossDifference:
    """How much more a test loss rises without the first rows of a ranking than without random rows.

    Attributes:
        difference: loss after training without the rows that a method puts first − loss after training without as
            many random ones, means over columns and draws; positive where the method finds rows that help.
        interval: its percentile bootstrap interval over the random draws.
        above: share of the draws whose loss, a mean over columns, is the lower one.
        draws: number of random draws.
        columns: number of test columns.
        level: confidence level of the interval.
    """

    difference: float
    interval: tuple[float, float]
    above: float
    draws: int
    columns: int
    level: float

    def to_dict(self) -> dict:
        """Plain lists and numbers, ready for JSON."""
        return {**asdict(self), "interval": list(self.interval)}


def loss_difference(
    without_first: ArrayLike, without_random: ArrayLike, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> LossDifference:
    """The query loss difference: without the first rows of a ranking against without random rows.

    Args:
        without_first: test losses after training without the first rows, or their changes, (Q,).
        without_random: the same after training without random rows, (R, Q), one row per draw.
        resamples: number of bootstrap samples of the draws.
        level: confidence level of the percentile interval.
        seed: of the resampling.

    Raises:
        InputError: the shapes do not fit, there are fewer than two draws, or a value is not finite.

    >>> found = loss_difference([2.0, 3.0], [[1.0, 1.0], [1.0, 2.0]])
    >>> found.difference, found.above
    (1.25, 1.0)
    """
    first, random = (np.asarray(values, dtype=np.float64) for values in (without_first, without_random))
    if first.ndim != 1 or random.ndim != 2 or random.shape[1] != len(first) or len(random) < 2:
        raise InputError(
            f"loss_difference got shapes {first.shape} and {random.shape}; expected (Q,) and (R, Q) with R ≥ 2 draws."
        )
    if not (np.isfinite(first).all() and np.isfinite(random).all()):
        raise InputError("loss_difference got values that are not finite: look for a retraining that diverged.")
    differences = first.mean() - random.mean(1)
    return LossDifference(
        difference=float(differences.mean()),
        interval=_interval_of_mean(differences, resamples, level, seed),
        above=float((differences > 0).mean()),
        draws=len(random),
        columns=len(first),
        level=level,
    )


@dataclass(frozen=True)
class Recall:
    """The share of planted rows among the first k of a ranking, for several k.

    Attributes:
        k: numbers of rows that are looked at.
        recall: per k, the mean over units of (planted rows among the first k) / (planted rows).
        interval: per k, its percentile bootstrap interval over units; NaN where there is one unit.
        chance: per k, what a random order has on average, k / rows.
        units: number of units.
        of: what a unit is, "tests" or "seeds".
        level: confidence level of the intervals.
    """

    k: tuple[int, ...]
    recall: tuple[float, ...]
    interval: tuple[tuple[float, float], ...]
    chance: tuple[float, ...]
    units: int
    of: str
    level: float

    def to_dict(self) -> dict:
        """Plain lists and numbers, ready for JSON."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return plain | {"interval": [list(pair) for pair in self.interval]}


def recalls(order: ArrayLike, planted: ArrayLike, k: Sequence[int]) -> np.ndarray:
    """recall@k = (planted rows among the first k) / (planted rows), float64, shape (Q, len(k)).

    Args:
        order: the rows of each ranking from first to last, (rows, Q).
        planted: whether a row is planted, boolean, (rows, Q).
        k: numbers of first rows.

    >>> recalls([[2], [0], [1]], [[True], [False], [True]], k=[1, 2, 3])  # rows 0 and 2 are planted
    array([[0.5, 1. , 1. ]])
    """
    planted = np.asarray(planted, dtype=bool)
    hits = np.take_along_axis(planted, np.asarray(order), axis=0).cumsum(0)
    return (hits[np.asarray(k) - 1] / hits[-1]).T


def mean_recall(
    units: ArrayLike, k: Sequence[int], chance: Sequence[float], of: str, resamples: int = 1000, level: float = 0.95
) -> Recall:
    """The mean of `units`, recalls (units, len(k)), with intervals over them."""
    units = np.asarray(units, dtype=np.float64)
    nothing = (math.nan, math.nan)
    intervals = [_interval_of_mean(values, resamples, level, 0) if len(units) > 1 else nothing for values in units.T]
    recall = tuple(units.mean(0).tolist())
    return Recall(tuple(k), recall, tuple(intervals), tuple(chance), len(units), of, level)


def _interval_of_mean(values: np.ndarray, resamples: int, level: float, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of values (n,)."""
    rows = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[rows].mean(1), edges(level))
    return float(low), float(high)


def _halves(number: int, seed: int, most: int = 35) -> list[tuple[list[int], list[int]]]:
    """Ways to take two halves of ⌊number/2⌋ from range(number): all, or `most` random ones where there are more."""
    size = number // 2
    ways = math.comb(number, size) * math.comb(number - size, size) // 2
    if ways > most:
        generator = np.random.default_rng(seed)
        orders = [generator.permutation(number).tolist() for _ in range(most)]
        return [(order[:size], order[size : 2 * size]) for order in orders]
    halves = []
    for first in itertools.combinations(range(number), size):
        rest = [i for i in range(first[0] + 1, number) if i not in first]  # each pair once
        halves += [(list(first), list(second)) for second in itertools.combinations(rest, size)]
    return halves


def _mean_agreement(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], resamples: int, level: float, seed: int
) -> Correlation:
    """The mean over pairs of (n,) or (n, Q) of their `statistics`; a bootstrap sample has the same rows of all."""
    columns = [[np.asarray(values, dtype=np.float64) for values in pair] for pair in pairs]
    for x, y in columns:
        if x.shape != y.shape or x.ndim not in (1, 2) or len(x) < 3:
            raise InputError(
                f"correlation got shapes {x.shape} and {y.shape}; expected two equal ones, (n,) or (n, Q), with n ≥ 3."
            )
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise InputError("correlation got values that are not finite: look for a retraining that diverged.")
    # The pairs side by side, as if they were columns: a mean over columns is then one over pairs, too.
    x, y = (np.hstack([pair[side].reshape(len(pair[side]), -1) for pair in columns]) for side in (0, 1))
    estimates = statistics(x[None], y[None])[:, 0]
    generator = np.random.default_rng(seed)
    resampled, chunk = [], max(1, 2**22 // x.size)
    for start in range(0, resamples, chunk):
        rows = generator.integers(len(x), size=(min(chunk, resamples - start), len(x)))
        resampled.append(statistics(x[rows], y[rows]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # NaN is right for a constant measurement
        ends = np.nanpercentile(np.hstack(resampled), edges(level), axis=1).T
    pearson, spearman, slope = ((float(low), float(high)) for low, high in ends)
    return Correlation(
        pearson_r=float(estimates[0]),
        pearson_interval=pearson,
        spearman_r=float(estimates[1]),
        spearman_interval=spearman,
        slope=float(estimates[2]),
        slope_interval=slope,
        n=len(x),
        columns=x.shape[1] // len(columns),
        level=level,
    )


def aggregated(values: np.ndarray, aggregate: str | None) -> np.ndarray:
    """Effects (n, Q), or their "sum" or "mean" over the columns, (n, 1)."""
    return values if aggregate is None else getattr(values, aggregate)(axis=1, keepdims=True)


def edges(level: float) -> list[float]:
    """The two percentiles between which a share `level` of a bootstrap lies."""
    return [50 * (1 - level), 50 * (1 + level)]


def statistics(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r, Spearman's r and the slope of B samples x, y of shape (B, n, Q), means over Q: shape (3, B)."""
    from scipy.stats import rankdata

    pearson, slope = _r_and_slope(x, y)
    spearman, _ = _r_and_slope(rankdata(x, axis=1), rankdata(y, axis=1))
    return np.stack([pearson.mean(1), spearman.mean(1), slope.mean(1)])


def _r_and_slope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r and the least-squares slope of y on x, both (B, Q)."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    xx, yy, xy = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
    flat = xx <= np.finfo(np.float64).tiny
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(flat, np.where(yy > 0, 0.0, np.nan), xy / np.sqrt(xx * yy))
        return r, np.where(flat, 0.0, xy / xx)
