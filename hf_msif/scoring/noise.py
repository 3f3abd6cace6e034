"""`Noise`: how far a query's replicates scatter, and with it the standard error of every score and the reliability of
the ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TINY = np.finfo(float).tiny
SAMPLE_ROWS = 256  # on which the noise is measured: ln se of a score is known to about 2.2 / (2 √256) = 0.07
UNRELIABLE = 0.5
SMALL = 0.25  # share of the rows that count as of the same, smallest size
CERTAIN = 1e6  # degrees of freedom that stand for infinitely many
COVERAGE, WIDTH = 0.95, 1.6448536269514722  # quantile of the normal distribution, ± which is 90 % of it


@dataclass(frozen=True)
class Noise:
    """How the influences of R independent replicates of a query scatter, measured on a sample of rows.

    The influence I(x) is the mean of the R replicates' I_r(x). The variance s²(x) of these has d = R − 1 degrees of
    freedom, which say little of one row. It is therefore moderated by rows of like size (Smyth 2004, "Linear models
    and empirical Bayes methods", with the trend of his limma): σ²(x) counts as drawn from a scaled inverse χ²
    distribution with d₀ degrees of freedom around the trend s₀²(x) = exp(a + b log size(x)), so that

    s̃²(x) = (d₀ s₀²(x) + d s²(x)) / (d₀ + d),   se(x) = s̃(x) / √R · t / z

    t and z are the 95 % quantiles of Student's distribution with d₀ + d degrees of freedom and of the normal one:
    ± 1.645 se covers the limit of infinitely many replicates for 90 % of the rows. a, b and d₀ follow from mean, slope
    and variance of log s² over the sample. The size of a row is the root mean square of its influences over the query
    columns, each in units of its `scale`; under normal noise it is independent of s².

    Attributes:
        replicates: R.
        rows: number of rows in the sample.
        reliability: of each query column, Spearman's rank correlation of two replicates over the sample, mean of all
            pairs; NaN for fewer than three rows.
        scale: of each column, the root mean square of the influences over the sample.
        intercept: a of each column, the variance being in squared influence; −inf where the replicates are equal.
        slope: b of each column.
        least: smaller rows count as of this size.
        freedom: d₀.
    """

    replicates: int
    rows: int
    reliability: list[float]
    scale: list[float]
    intercept: list[float]
    slope: list[float]
    least: float
    freedom: float

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
        from scipy.special import digamma, polygamma

        rows, replicates, columns = influences.shape
        means, variances, d = influences.mean(1), influences.var(1, ddof=1), replicates - 1
        scale = np.sqrt((means**2).mean(0)).clip(min=TINY)
        sizes = _sizes(means, scale)
        least = float(np.quantile(sizes, SMALL))
        logs = np.log(np.maximum(sizes, least).clip(min=TINY))
        intercept, slope, excess = np.full(columns, -np.inf), np.zeros(columns), []
        for q in range(columns):
            moved = variances[:, q] > 0
            if not moved.any():
                continue
            x, y = logs[moved], np.log(variances[moved, q]) - digamma(d / 2) + np.log(d / 2)
            slope[q] = (x - x.mean()) @ y / max(float(((x - x.mean()) ** 2).sum()), TINY) if np.ptp(x) else 0.0
            intercept[q] = y.mean() - slope[q] * x.mean()
            used = 2 if np.ptp(x) else 1
            residuals = y - intercept[q] - slope[q] * x
            excess.append(float(residuals @ residuals) / max(len(y) - used, 1) - float(polygamma(1, d / 2)))
        freedom = _freedom(float(np.mean(excess)) if excess else 0.0)
        if freedom < CERTAIN:
            intercept += float(digamma(freedom / 2) - np.log(freedom / 2))
        reliability = _reliability(influences)
        fit = (intercept.tolist(), slope.tolist(), least, freedom)
        return cls(replicates, rows, reliability, scale.tolist(), *fit)

    def standard_errors(self, influences: np.ndarray) -> np.ndarray:
        """se of the means of replicates, (rows, R, Q) → (rows, Q), in the unit of the influence."""
        from scipy.stats import t

        d = self.replicates - 1
        logs = np.log(np.maximum(_sizes(influences.mean(1), np.array(self.scale)), self.least).clip(min=TINY))
        trend = np.exp(np.array(self.intercept) + np.array(self.slope) * logs[:, None])
        moderated = (self.freedom * trend + d * influences.var(1, ddof=1)) / (self.freedom + d)
        return np.sqrt(moderated / self.replicates) * t.ppf(COVERAGE, self.freedom + d) / WIDTH

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
            more = "more draws of masks, or more curvature_samples, in the stages that follow, too"
            text = f"THIS RANKING IS MOSTLY NOISE: take {more}. {text}"
        return text

    def reliability_of_mean(self, reliability: float) -> float:
        """The reliability of the replicates' mean where that of one is r: R r / (1 + (R − 1) r), by Spearman and Brown
        (1910). Below 0, where that formula has no meaning (and a pole), there is nothing to rely on: 0."""
        if reliability <= 0:
            return 0.0
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


def _freedom(excess: float) -> float:
    """d₀ with ψ′(d₀/2) = excess, the variance of log σ² about its trend; `CERTAIN` where there is none."""
    from scipy.special import polygamma

    low, high = 0.0, np.log(CERTAIN)
    if excess <= polygamma(1, CERTAIN / 2):
        return CERTAIN
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if polygamma(1, np.exp(middle) / 2) > excess else (low, middle)
    return float(np.exp(low))


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
