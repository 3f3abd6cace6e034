"""Where all influences of a query column lie, as the bars of a small figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..scoring.scores import Scores

BINS = 72


class Histogram(NamedTuple):
    """Counts of influences between equally spaced edges.

    Attributes:
        edges: ascending, one more than counts; 0 is one of them where the influences have both signs.
        counts: of the rows in each bin. Where extremes alone were kept, the counts of the wider bins that are known,
            spread evenly: no whole numbers.
        rows: how many rows there are.
    """

    edges: np.ndarray
    counts: np.ndarray
    rows: int


def histogram(scores: Scores, query: int) -> Histogram:
    """The distribution of all influences of a query column, also of those that were not kept.

    Args:
        scores: of any corpus.
        query: number of the query column.
    """
    if "kept" in scores.metadata:
        moments = scores.metadata["kept"]["all"][query]
        low, high = float(moments["smallest"]), float(moments["largest"])
        edges = _edges(low, high)
        counts = np.zeros(len(edges) - 1)
        for start, end, count in moments["histogram"]:
            counts += count * _overlaps(edges, max(start, low), min(end, high))
        return Histogram(edges, counts, int(moments["count"]))
    values = scores.influence(query)
    edges = _edges(float(values.min()), float(values.max()))
    return Histogram(edges, np.histogram(values, edges)[0].astype(float), len(values))


def _edges(low: float, high: float) -> np.ndarray:
    """BINS or BINS + 1 bins of one width from `low` to `high` at least, with an edge at 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / BINS
    if not width > 0:
        return np.array([-1.0, 0.0, 1.0])
    # The largest value is to be in the last bin, also after rounding.
    first, last = int(np.floor(low / width)), int(np.ceil(high / width * (1 + 1e-12)))
    return np.arange(first, last + 1) * width


def _overlaps(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """Which share of the interval from `start` to `end` lies in each bin; all of it in one bin where it is a point."""
    if not end > start:
        shares = np.zeros(len(edges) - 1)
        shares[min(max(int(np.searchsorted(edges, start, side="right")) - 1, 0), len(shares) - 1)] = 1.0
        return shares
    shares = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, None) / (end - start)
    return shares / shares.sum()
