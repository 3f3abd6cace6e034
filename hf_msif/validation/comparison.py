"""Two runs side by side: how much the pretraining rows matter to one task or model, and to another (§4.3, §4.4)."""

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
        mean_absolute: mean |influence| over rows and test columns, of either.
        mean_absolute_interval: percentile bootstrap of either.
        ratio: of the means, first by second; ratio_interval: its bootstrap.
        spearman_r, top_k_shared: agreement of the two rankings by mean |influence|, over rows that both have; NaN
            where they share fewer than three.
        signed_r: of the signed influences on a test example, the mean over test examples; NaN where the two sets of
            scores are about different ones.
        shared: number of those rows. k: of the top. level: of the intervals.
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

    def plot(self, path: str | os.PathLike, names: tuple[str, str] = ("first", "second")) -> None:
        """Histograms of the rows' mean |influence|, on a logarithmic axis (the paper's Figures B and C)."""
        from ..reports.figures import figure

        drawn = figure(figsize=(5, 3.2), layout="constrained")
        axes = drawn.subplots()
        values = [np.abs(v).mean(1) for v in self.values]
        positive = np.concatenate([v[v > 0] for v in values])
        edges = np.geomspace(positive.min(), positive.max(), 40) if len(positive) else 40
        for name, some, mean in zip(names, values, self.mean_absolute, strict=True):
            axes.hist(some, bins=edges, alpha=0.55, label=f"{name}: mean {mean:.3g}")
        axes.set(xscale="log", xlabel="mean |influence| of a row", ylabel="rows")
        axes.legend(fontsize="small")
        drawn.savefig(path, dpi=150, format="png")


def compare(
    first: Scores, second: Scores, k: int = 100, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Relates the absolute influences of two sets of scores.

    The bootstrap resamples rows and test columns independently: the number of test examples limits what a mean is
    worth as much as that of rows does. Rows with the same ids and contents on both sides are resampled together.

    Args:
        first, second: the scores, of any corpora and tests; units are those of each test loss.
        k: of `top_k_shared`.
        resamples, level, seed: of the bootstrap.

    Raises:
        InputError: scores that are not finite, or of which only the extremes were kept.
    """
    if any("kept" in s.metadata for s in (first, second)):
        raise InputError(
            "compare got scores of which only the extremes were kept (--keep), whose means are not those of the "
            "corpus; expected all scores."
        )
    values = [np.stack([s.influence(q) for q in range(s.columns)], axis=1) for s in (first, second)]
    if not all(np.isfinite(v).all() for v in values):
        raise InputError("compare got influences that are not finite.")
    absolute = [np.abs(v) for v in values]
    keys = [list(zip(s.frame["example_id"].astype(str), s.frame["text_sha256"], strict=True)) for s in (first, second)]
    generator, drawn, paired = np.random.default_rng(seed), [], keys[0] == keys[1]
    for _ in range(resamples):
        weights = [_weights(generator, len(absolute[0]))]
        weights.append(weights[0] if paired else _weights(generator, len(absolute[1])))
        columns = [_weights(generator, a.shape[1]) for a in absolute]
        drawn.append([w @ a @ c for w, a, c in zip(weights, absolute, columns, strict=True)])
    drawn = np.array(drawn)
    edges = [50 * (1 - level), 50 * (1 + level)]
    ends = np.percentile(drawn, edges, axis=0).T
    means = [float(a.mean()) for a in absolute]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = drawn[:, 0] / drawn[:, 1]
    asked = [(s.metadata.get("tests"), s.columns) for s in (first, second)]
    correlation, overlap, signed, shared = _agreement(keys, values, k, same=asked[0] == asked[1])
    return Comparison(
        mean_absolute=tuple(means),
        mean_absolute_interval=tuple((float(low), float(high)) for low, high in ends),
        ratio=means[0] / means[1] if means[1] else float("nan"),
        ratio_interval=tuple(float(x) for x in np.percentile(ratios, edges)),
        spearman_r=correlation,
        top_k_shared=overlap,
        signed_r=signed,
        shared=shared,
        k=k,
        level=level,
        values=tuple(values),
    )


def _weights(generator: np.random.Generator, size: int) -> np.ndarray:
    """Multiplicities of a bootstrap sample, as weights that add up to one."""
    return np.bincount(generator.integers(size, size=size), minlength=size) / size


def _agreement(keys: list[list], values: list[np.ndarray], k: int, same: bool) -> tuple[float, float, float, int]:
    """Over rows that both have; signed influences column by column where the columns are the same."""
    from scipy.stats import spearmanr

    places = [dict(zip(some, range(len(some)), strict=True)) for some in keys]
    both = [key for key in places[0] if key in places[1]]
    if len(both) < 3:
        return float("nan"), float("nan"), float("nan"), len(both)
    values = [value[[place[key] for key in both]] for value, place in zip(values, places, strict=True)]
    x, y = (np.abs(value).mean(1) for value in values)
    signed = [spearmanr(a, b).statistic for a, b in zip(*(v.T for v in values), strict=True)] if same else [np.nan]
    k = min(k, len(both))
    top = [set(np.argsort(-v, kind="stable")[:k].tolist()) for v in (x, y)]
    return float(spearmanr(x, y).statistic), len(top[0] & top[1]) / k, float(np.mean(signed)), len(both)
