"""`Extremes`: an account of scores whose size does not grow with their number (`score(keep=k)`): the extreme rows,
and moments and a histogram of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .orders import relative_keys

if TYPE_CHECKING:
    import pandas as pd

# Edges of the histogram: 0 and ± 10^(k/4), the same for all runs, so that the counts of parts can be added.
EDGES = np.array([10.0 ** (k / 4) for k in range(-120, 121)])
EDGES = np.concatenate([-EDGES[::-1], [0.0], EDGES])


@dataclass
class Moments:
    """Count, mean, squared deviation, range and histogram of one query column's influences.

    >>> moments = Moments()
    >>> moments.add(np.array([1.0, 2.0]))
    >>> moments.add(np.array([6.0]))
    >>> moments.count, moments.mean, moments.deviation, moments.largest
    (3, 3.0, 14.0, 6.0)

    Attributes:
        count: number of values.
        mean: their mean.
        deviation: Σ (x − mean)².
        smallest: the smallest value.
        largest: the largest value.
        histogram: number of a bin → how many values are in it; bin b ends at EDGES[b], which belongs to it.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    smallest: float = math.inf
    largest: float = -math.inf
    histogram: dict[int, int] = field(default_factory=dict)

    def add(self, values: np.ndarray) -> None:
        """Includes more values, at least one, by the update of Chan, Golub & LeVeque (1979)."""
        n, mean = len(values), float(values.mean())
        total, shift = self.count + n, mean - self.mean
        self.deviation += float(((values - mean) ** 2).sum()) + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total
        self.smallest, self.largest = min(self.smallest, float(values.min())), max(self.largest, float(values.max()))
        bins, counts = np.unique(np.searchsorted(EDGES, values), return_counts=True)
        for b, bin_count in zip(bins.tolist(), counts.tolist(), strict=True):
            self.histogram[b] = self.histogram.get(b, 0) + bin_count

    def to_dict(self) -> dict:
        """Plain numbers, ready for JSON; the histogram as a list of [from, to, count]."""
        low, high = np.concatenate([[-math.inf], EDGES]).tolist(), np.concatenate([EDGES, [math.inf]]).tolist()
        return {
            "count": self.count,
            "mean": self.mean,
            "standard_deviation": math.sqrt(self.deviation / self.count) if self.count else None,
            "smallest": self.smallest,
            "largest": self.largest,
            "histogram": [[low[b], high[b], self.histogram[b]] for b in sorted(self.histogram)],
        }


class Extremes:
    """The extreme rows of a corpus, and the `Moments` of all of its rows.

    A row is extreme if, in some query column, it is among the `keep` rows of largest, of smallest or of least absolute
    influence, or of largest absolute influence, or among the first or the last ones of a relative order whose norms
    are there: so the first and the last `keep` rows of every order of `Scores.top` are there.

    >>> import pandas as pd
    >>> extremes = Extremes(1, ["influence"])
    >>> extremes.add(pd.DataFrame({"influence": [0.5, -2.0, 0.1]}))
    >>> extremes.add(pd.DataFrame({"influence": [3.0, 1.0]}))
    >>> extremes.frame.influence.tolist(), extremes.moments[0].count
    ([-2.0, 0.1, 3.0], 5)

    Args:
        keep: how many rows per order.
        columns: names of the influence columns.
        norms: names of the columns by which relative orders divide.

    Attributes:
        frame: the extreme rows, in the order of the corpus; None before the first `add`.
        moments: one entry per influence column.
    """

    def __init__(self, keep: int, columns: list[str], norms: Sequence[str] = ()):
        self.keep, self.columns, self.norms = keep, columns, norms
        self.frame: pd.DataFrame | None = None
        self.moments = [Moments() for _ in columns]

    def add(self, frame: pd.DataFrame) -> None:
        """Includes the next rows, in the order of the corpus."""
        import pandas as pd

        for column, moments in zip(self.columns, self.moments, strict=True):
            moments.add(frame[column].to_numpy())
        candidates = frame if self.frame is None else pd.concat([self.frame, frame], ignore_index=True)
        is_extreme = np.zeros(len(candidates), dtype=bool)
        norms = {name: candidates[name].to_numpy() for name in self.norms}
        for column in self.columns:
            values = candidates[column].to_numpy()
            ends = [end for key in relative_keys(values, norms) for end in (key, -key)]
            # The row of largest absolute influence is that of largest or of smallest influence.
            for key in (-values, values, abs(values), *ends):
                is_extreme[np.argsort(key, kind="stable")[: self.keep]] = True  # stable: of equal rows the earlier one
        self.frame = candidates[is_extreme].reset_index(drop=True)

    def state(self) -> list[dict]:
        """The moments, ready for JSON."""
        return [asdict(moments) for moments in self.moments]

    def restore(self, frame: pd.DataFrame, state: list[dict]) -> None:
        """Continues an earlier account: its `frame`, and what its `state` returned."""
        self.frame = frame
        self.moments = [
            Moments(**{**values, "histogram": {int(b): count for b, count in values["histogram"].items()}})
            for values in state
        ]

    def summary(self) -> dict:
        """What the metadata of the scores say of it."""
        return {"keep": self.keep, "all": [moments.to_dict() for moments in self.moments]}
