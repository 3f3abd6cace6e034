"""Correlation and slope of predicted and measured effects, with bootstrap intervals."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

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
    x, y = (np.asarray(values, dtype=np.float64) for values in (predicted, measured))
    if x.shape != y.shape or x.ndim not in (1, 2) or len(x) < 3:
        raise InputError(
            f"correlation got shapes {x.shape} and {y.shape}; expected two equal ones, (n,) or (n, Q), with n ≥ 3."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("correlation got values that are not finite: look for a retraining that diverged.")
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    estimates = statistics(x[None], y[None])[:, 0]
    generator = np.random.default_rng(seed)
    resampled, chunk = [], max(1, 2**22 // x.size)
    for start in range(0, resamples, chunk):
        rows = generator.integers(len(x), size=(min(chunk, resamples - start), len(x)))
        resampled.append(statistics(x[rows], y[rows]))
    edges = [50 * (1 - level), 50 * (1 + level)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # NaN is right for a constant measurement
        ends = np.nanpercentile(np.hstack(resampled), edges, axis=1).T
    pearson, spearman, slope = ((float(low), float(high)) for low, high in ends)
    return Correlation(
        pearson_r=float(estimates[0]),
        pearson_interval=pearson,
        spearman_r=float(estimates[1]),
        spearman_interval=spearman,
        slope=float(estimates[2]),
        slope_interval=slope,
        n=len(x),
        columns=x.shape[1],
        level=level,
    )


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
