"""Correlation of predicted and measured effects, with bootstrap intervals."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class Correlation:
    """Agreement of predictions with measurements, a mean over columns (test examples).

    Attributes:
        pearson_r, spearman_r: in [−1, 1]; 0 where a prediction is constant (it orders nothing), NaN where the
            measurement is.
        slope: of the least-squares line measured ≈ slope · predicted + c; 1 where the sizes agree too.
        pearson_interval, spearman_interval, slope_interval: percentile bootstrap over the n rows (removals).
        n: removals.
        columns: test columns averaged over.
        level: of the intervals.
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


def correlation(predicted, measured, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Correlation:
    """Pearson's and Spearman's correlation and the slope, each the mean over columns, with bootstrap intervals.

    Args:
        predicted, measured: arrays of shape (n,) or (n, Q): n removals, Q test columns.
        resamples: of the n rows, with replacement, all columns together.
        level: of the percentile intervals.
        seed: of the resampling.

    Raises:
        InputError: shapes differ, fewer than three rows, or values that are not finite.

    >>> found = correlation([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 9.0])
    >>> round(found.pearson_r, 4), round(found.spearman_r, 4), round(found.slope, 4)
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
    found = statistics(x[None], y[None])[:, 0]
    generator = np.random.default_rng(seed)
    drawn, chunk = [], max(1, 2**22 // x.size)
    for start in range(0, resamples, chunk):
        rows = generator.integers(len(x), size=(min(chunk, resamples - start), len(x)))
        drawn.append(statistics(x[rows], y[rows]))
    edges = [50 * (1 - level), 50 * (1 + level)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # a constant measurement: NaN is the answer
        ends = np.nanpercentile(np.hstack(drawn), edges, axis=1).T
    pearson, spearman, slope = ((float(low), float(high)) for low, high in ends)
    return Correlation(
        pearson_r=float(found[0]),
        pearson_interval=pearson,
        spearman_r=float(found[1]),
        spearman_interval=spearman,
        slope=float(found[2]),
        slope_interval=slope,
        n=len(x),
        columns=x.shape[1],
        level=level,
    )


def statistics(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(Pearson, Spearman, slope) of B samples (B, n, Q), means over Q: shape (3, B)."""
    from scipy.stats import rankdata

    pearson, slope = _moments(x, y)
    spearman, _ = _moments(rankdata(x, axis=1), rankdata(y, axis=1))
    return np.stack([pearson.mean(1), spearman.mean(1), slope.mean(1)])


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    xx, yy, xy = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
    flat = xx <= np.finfo(np.float64).tiny
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(flat, np.where(yy > 0, 0.0, np.nan), xy / np.sqrt(xx * yy))
        return r, np.where(flat, 0.0, xy / xx)
