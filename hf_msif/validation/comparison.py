"""Two runs side by side: how much the pretraining rows matter to one task or model, and to another (the paper's §4.3
and §4.4)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field

import numpy as np

from ..errors import InputError
from ..scoring.scores import Scores


@dataclass(frozen=True)
class Comparison:
    """Absolute influences of two sets of scores.

    Attributes:
        mean_absolute: mean |influence| over rows and query columns, of the first and the second set.
        mean_absolute_interval: percentile bootstrap intervals of both.
        ratio: of the means, first by second; NaN if the second is 0.
        ratio_interval: percentile bootstrap interval of the ratio.
        spearman_r: Spearman's correlation of the rows' mean |influence| over query columns, over the rows that both
            sets have; NaN if these are fewer than three.
        top_k_shared: share of the k rows of the largest mean |influence| that is the same in both, over the same rows.
        signed_r: Spearman's correlation of the signed influences on a test example, the mean over test examples; NaN
            if the two sets of scores are about different test examples.
        shared: number of rows that both sets have.
        k: of `top_k_shared`.
        level: of the intervals, 0.95 for 95 %.
        values: the signed influences of both, each (rows, columns).
    """

    mean_absolute: tuple[float, float]
    mean_absolute_interval: tuple[tuple[float, float], tuple[float, float]]
    ratio: float
    ratio_interval: tuple[float, float]
    spearman_r: float
    top_k_shared: float
    signed_r: float
    shared: int
    k: int
    level: float
    values: tuple[np.ndarray, np.ndarray] = field(repr=False, compare=False)

    def to_dict(self) -> dict:
        """Plain lists and numbers, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "values"}

    def plot(self, path: str | os.PathLike, names: tuple[str, str] = ("first", "second"), format: str = "png") -> None:
        """Draws histograms of the rows' mean |influence|, on a logarithmic axis (the paper's Figures B and C).

        Args:
            path: of the picture.
            names: of the two sets of scores, in the legend.
            format: of the picture, as matplotlib names it; `path` may have any ending.

        Raises:
            InputError: matplotlib is not installed.
        """
        from ..reports.figures import figure

        page = figure(figsize=(5, 3.2), layout="constrained")
        axes = page.subplots()
        values = [np.abs(v).mean(1) for v in self.values]
        positive = np.concatenate([v[v > 0] for v in values])
        edges = np.geomspace(positive.min(), positive.max(), 40) if len(positive) else 40
        for name, strengths, mean in zip(names, values, self.mean_absolute, strict=True):
            axes.hist(strengths, bins=edges, alpha=0.55, label=f"{name}: mean {mean:.3g}")
        axes.set(xscale="log", xlabel="mean |influence| of a row", ylabel="rows")
        axes.legend(fontsize="small")
        page.savefig(path, dpi=150, format=format)


def compare(
    first: Scores, second: Scores, k: int = 100, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Relates the absolute influences of two sets of scores.

    The bootstrap resamples rows and query columns independently: few test examples make a mean as uncertain as few
    rows do. If both sets are of the same corpus (the same ids and contents in the same order), they are resampled
    together.

    Args:
        first: scores of any corpus and tests, in the unit of their test loss.
        second: scores of any corpus and tests, in the unit of theirs.
        k: of `top_k_shared`.
        resamples: number of bootstrap samples.
        level: of the intervals, 0.95 for 95 %.
        seed: of the bootstrap.

    Raises:
        InputError: scores that are not finite, or of which only the extremes were kept.
    """
    if any("kept" in s.metadata for s in (first, second)):
        raise InputError(
            "compare got scores of which only the extremes were kept (--keep); their means are not those of the "
            "corpus. Expected all scores: score without --keep."
        )
    values = [s.influences() for s in (first, second)]
    if not all(np.isfinite(v).all() for v in values):
        raise InputError(
            "compare got influences that are not finite; expected scores of models whose losses are finite."
        )
    absolute = [np.abs(v) for v in values]
    keys = [list(zip(s.frame["example_id"].astype(str), s.frame["text_sha256"], strict=True)) for s in (first, second)]
    generator, resampled_means, same_corpus = np.random.default_rng(seed), [], keys[0] == keys[1]
    for _ in range(resamples):
        rows = [_weights(generator, len(absolute[0]))]
        rows.append(rows[0] if same_corpus else _weights(generator, len(absolute[1])))
        columns = [_weights(generator, a.shape[1]) for a in absolute]
        resampled_means.append([r @ a @ c for r, a, c in zip(rows, absolute, columns, strict=True)])
    resampled = np.array(resampled_means)  # (resamples, 2)
    edges = [50 * (1 - level), 50 * (1 + level)]
    ends = np.percentile(resampled, edges, axis=0).T
    means = [float(a.mean()) for a in absolute]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = resampled[:, 0] / resampled[:, 1]
    tests = [(s.metadata.get("tests"), s.columns) for s in (first, second)]
    correlation, overlap, signed, shared = _agreement(keys, values, k, same_tests=tests[0] == tests[1])
    return Comparison(
        mean_absolute=(means[0], means[1]),
        mean_absolute_interval=(_interval(ends[0]), _interval(ends[1])),
        ratio=means[0] / means[1] if means[1] else float("nan"),
        ratio_interval=_interval(np.percentile(ratios, edges)),
        spearman_r=correlation,
        top_k_shared=overlap,
        signed_r=signed,
        shared=shared,
        k=k,
        level=level,
        values=(values[0], values[1]),
    )


def _interval(ends: np.ndarray) -> tuple[float, float]:
    return float(ends[0]), float(ends[1])


def _weights(generator: np.random.Generator, size: int) -> np.ndarray:
    """How often a bootstrap sample holds each of `size` items, as weights that add up to one."""
    return np.bincount(generator.integers(size, size=size), minlength=size) / size


def _agreement(
    keys: list[list], values: list[np.ndarray], k: int, same_tests: bool
) -> tuple[float, float, float, int]:
    """`spearman_r`, `top_k_shared`, `signed_r` and `shared` of a `Comparison`."""
    from scipy.stats import spearmanr

    places = [{key: place for place, key in enumerate(side)} for side in keys]
    common = [key for key in places[0] if key in places[1]]
    if len(common) < 3:
        return float("nan"), float("nan"), float("nan"), len(common)
    first, second = (v[[place[key] for key in common]] for v, place in zip(values, places, strict=True))
    signed = [np.nan]
    if same_tests:
        signed = [spearmanr(a, b).statistic for a, b in zip(first.T, second.T, strict=True)]
    strengths = [np.abs(v).mean(1) for v in (first, second)]
    k = min(k, len(common))
    top = [set(np.argsort(-s, kind="stable")[:k].tolist()) for s in strengths]
    correlation = float(spearmanr(*strengths).statistic)
    return correlation, len(top[0] & top[1]) / k, float(np.mean(signed)), len(common)
