"""`Noise`: how far a query's replicates scatter, and with it the standard error of every score and the reliability of
the ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SAMPLE_ROWS = 512  # on which the noise is measured
GROUP_ROWS, MOST_GROUPS = 32, 8  # rows of like size that share a variance, at least; number of such groups
UNRELIABLE = 0.5


@dataclass(frozen=True)
class Noise:
    """How the influences of R independent replicates of a query scatter, measured on a sample of rows.

    The influence I(x) is the mean of the R replicates' I_r(x), and its squared standard error is

    se²(x) = ((1 − Z) τ²(x) + Z s²(x)) / R

    s²(x) is the variance of x's own R replicates, which says little for R = 2, and τ²(x) = exp(a + b log size(x)) that
    of rows of like size. The size of a row is the root mean square of its influences over the query columns, each
    divided by its `scale`. Under normal noise it is independent of s², so that rows which look large by chance are no
    problem. Z is Bühlmann's credibility: the share of the variance of s²/τ² between rows that is no sampling
    noise of s². (Linear shrinkage of variances toward a trend; Smyth 2004 has it for genes.)

    Attributes:
        replicates: R.
        rows: number of rows in the sample.
        reliability: of each query column, Spearman's rank correlation of two replicates over the sample, mean of all
            pairs; NaN for fewer than three rows.
        scale: of each column, the root mean square of the influences over the sample.
        intercept: a of each column, in units of squared influence; −inf where the replicates are equal.
        slope: b of each column, between 0 and 2.
        least: size below which a row counts as of this size.
        credibility: Z, in [0, 1).
    """

    replicates: int
    rows: int
    reliability: list[float]
    scale: list[float]
    intercept: list[float]
    slope: list[float]
    least: float
    credibility: float

    @classmethod
    def measured(cls, influences: np.ndarray) -> Noise:
        """The noise of replicates, (rows, R, Q), R ≥ 2.

        >>> generator = np.random.default_rng(0)
        >>> truth = generator.normal(size=(500, 1, 1))
        >>> noise = Noise.measured(truth + 0.5 * generator.normal(size=(500, 2, 1)))
        >>> round(noise.reliability[0], 1)  # 1 / (1 + 0.5²)
        0.8
        >>> errors = noise.standard_errors(truth + 0.5 * generator.normal(size=(500, 2, 1)))
        >>> round(float(errors.mean()), 1)  # 0.5 / √2
        0.4
        """
        rows, replicates, columns = influences.shape
        means, variances = influences.mean(1), influences.var(1, ddof=1)
        scale = np.sqrt((means**2).mean(0)).clip(min=np.finfo(float).tiny)
        sizes = _sizes(means, scale)
        order = np.argsort(sizes, kind="stable")
        groups = np.array_split(order, max(1, min(MOST_GROUPS, rows // GROUP_ROWS)))
        group_sizes = np.array([np.sqrt((sizes[group] ** 2).mean()) for group in groups])
        least = float(group_sizes[0])
        clipped = np.log(np.maximum(sizes, least).clip(min=np.finfo(float).tiny))
        intercept, slope, ratios = [], [], np.ones_like(variances)
        for q in range(columns):
            b = _slope(group_sizes, np.array([variances[group, q].mean() for group in groups]))
            level = float((variances[:, q] / np.exp(b * clipped)).mean())
            intercept.append(float(np.log(level)) if level else -np.inf)
            slope.append(b)
            if level:
                ratios[:, q] = variances[:, q] / (level * np.exp(b * clipped))
        return cls(
            replicates,
            rows,
            _reliability(influences),
            scale.tolist(),
            intercept,
            slope,
            least,
            _credibility(ratios, replicates - 1),
        )

    def standard_errors(self, influences: np.ndarray) -> np.ndarray:
        """se of the means of replicates, (rows, R, Q) → (rows, Q), in the unit of the influence.

        An interval of ± 1.645 se has the limit of infinitely many replicates inside for about 90 % of the rows.
        """
        sizes = np.maximum(_sizes(influences.mean(1), np.array(self.scale)), self.least)
        logs = np.log(sizes.clip(min=np.finfo(float).tiny))[:, None]
        trend = np.exp(np.array(self.intercept) + np.array(self.slope) * logs)
        own = influences.var(1, ddof=1)
        return np.sqrt(((1 - self.credibility) * trend + self.credibility * own) / self.replicates)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Noise:
        """Inverse of `to_dict`."""
        return cls(**values)

    @property
    def lowest_reliability(self) -> float:
        """That of the worst query column; NaN where it is not known."""
        return float(min(self.reliability, key=lambda value: (value == value, value)))

    def __str__(self) -> str:
        lowest, many = self.lowest_reliability, len(self.reliability) > 1
        if lowest != lowest:
            return f"reliability unknown: the influences of {self.rows:,} rows have no ranks to compare"
        text = (
            f"reliability {lowest:.2f}{' for the worst query column' if many else ''}: rank correlation of "
            f"{_in_words(self.replicates)} replicates over {self.rows:,} rows; {self.reliability_of_mean(lowest):.2f} "
            "for their mean, which is ranked"
        )
        if lowest < UNRELIABLE:
            text = f"THIS RANKING IS MOSTLY NOISE: take more draws of masks or more curvature_samples. {text}"
        return text

    def reliability_of_mean(self, reliability: float) -> float:
        """The reliability of the replicates' mean where that of one is r: R r / (1 + (R − 1) r), by Spearman and Brown
        (1910)."""
        return self.replicates * reliability / (1 + (self.replicates - 1) * reliability)


def top_probabilities(values: np.ndarray, errors: np.ndarray, k: int, absolute: bool = False) -> np.ndarray:
    """The probability of each row that it is among the k first, where scores are normal around `values`.

    P_i = P(score_i > t) = Φ((values_i − t) / errors_i), with the threshold t at which Σ_i P_i = k. (The k-th largest
    of many independent scores varies little; a Monte Carlo of whole rankings says the same, see its test.)

    Args:
        values: scores, (rows,).
        errors: their standard errors, (rows,).
        k: size of the top.
        absolute: whether the largest absolute scores are first, so that P_i = P(|score_i| > t).

    Returns:
        P, (rows,), in [0, 1]; it sums to k, or to the number of rows where k is larger.

    >>> top_probabilities(np.array([3.0, 2.0, 2.0, -9.0]), np.array([0.1, 0.5, 0.5, 0.1]), 2).round(2)
    array([1. , 0.5, 0.5, 0. ])
    """
    from scipy.special import ndtr

    if k >= len(values):
        return np.ones(len(values))
    furthest = float(abs(values).max())
    errors = np.maximum(errors, 1e-9 * furthest + np.finfo(float).tiny)
    high = furthest + 9 * float(errors.max())
    low = 0.0 if absolute else -high
    for _ in range(100):  # bisection, until the ends are neighbouring floats or nearly so
        threshold = (low + high) / 2
        probabilities = ndtr((values - threshold) / errors)
        if absolute:
            probabilities += ndtr((-values - threshold) / errors)
        low, high = (threshold, high) if probabilities.sum() > k else (low, threshold)
    return probabilities


def _sizes(means: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.sqrt(((means / scale) ** 2).mean(1))


def _slope(sizes: np.ndarray, variances: np.ndarray) -> float:
    """b of variance ∝ size^b by least squares of the logarithms, within [0, 2]: noise grows with the size of a row, at
    most in proportion."""
    usable = (sizes > 0) & (variances > 0)
    if usable.sum() < 2:
        return 0.0
    x, y = np.log(sizes[usable]), np.log(variances[usable])
    x = x - x.mean()
    return float(np.clip((x @ y) / max(x @ x, 1e-12), 0, 2))


def _credibility(ratios: np.ndarray, freedom: int) -> float:
    """Z of the ratios s²/τ², whose mean is 1: normal noise of `freedom` degrees of freedom alone gives them the second
    moment 1 + 2 / freedom."""
    between = max(0.0, float((ratios**2).mean()) / (1 + 2 / freedom) - 1)
    return between / (between + (1 + between) * 2 / freedom)


def _reliability(influences: np.ndarray) -> list[float]:
    from scipy.stats import rankdata

    rows, replicates, columns = influences.shape
    if rows < 3:
        return [float("nan")] * columns
    ranks = rankdata(influences, axis=0)
    ranks -= ranks.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    with np.errstate(invalid="ignore"):  # a constant column has no ranks
        ranks /= norms
    # Σ over pairs of different replicates of their correlation, by the norm of the sum.
    total = ((ranks.sum(1) ** 2).sum(0) - replicates) / (replicates * (replicates - 1))
    return total.tolist()


def _in_words(number: int) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(number, str(number))
