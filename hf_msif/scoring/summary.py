"""A bounded account of any number of scores: the extreme rows, moments and a histogram of all (`score(keep=k)`)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# Edges of the histogram: 0 and ± 10^(k/4), the same for all runs, so that counts of parts add up.
EDGES = np.array([10.0 ** (k / 4) for k in range(-120, 121)])
EDGES = np.concatenate([-EDGES[::-1], [0.0], EDGES])


@dataclass
class Moments:
    """Count, mean, squared deviation, range and histogram of a query column's influences."""

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0  # Σ (x − mean)²
    smallest: float = math.inf
    largest: float = -math.inf
    histogram: dict[int, int] = field(default_factory=dict)  # number of the bin → count; bin b ends at EDGES[b]

    def add(self, values: np.ndarray) -> None:
        """Chan, Golub & LeVeque (1979): two means and deviations as those of both together."""
        n, mean = len(values), float(values.mean())
        total, shift = self.count + n, mean - self.mean
        self.deviation += float(((values - mean) ** 2).sum()) + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total
        self.smallest, self.largest = min(self.smallest, float(values.min())), max(self.largest, float(values.max()))
        bins, counts = np.unique(np.searchsorted(EDGES, values), return_counts=True)
        for b, c in zip(bins.tolist(), counts.tolist(), strict=True):
            self.histogram[b] = self.histogram.get(b, 0) + c

    def to_dict(self) -> dict:
        """Plain numbers; the histogram as [from, to, count]."""
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
    """For each query column the `keep` rows of largest, of smallest and of least absolute influence, so that the first
    and last `keep` rows of all orders of `Scores.top` are among them; and the `Moments` of all."""

    def __init__(self, keep: int, columns: list[str]):
        self.keep, self.columns = keep, columns
        self.frame: pd.DataFrame | None = None
        self.moments = [Moments() for _ in columns]

    def add(self, frame: pd.DataFrame) -> None:
        """The next rows, in the order of the corpus."""
        import pandas as pd

        for column, moments in zip(self.columns, self.moments, strict=True):
            moments.add(frame[column].to_numpy())
        pool = frame if self.frame is None else pd.concat([self.frame, frame], ignore_index=True)
        chosen = np.zeros(len(pool), dtype=bool)
        for column in self.columns:
            values = pool[column].to_numpy()
            for key in (-values, values, abs(values)):  # ties: the earlier row
                chosen[np.argsort(key, kind="stable")[: self.keep]] = True
        self.frame = pool[chosen].reset_index(drop=True)

    def state(self) -> list[dict]:
        """The moments, ready for JSON."""
        return [asdict(moments) for moments in self.moments]

    def restore(self, frame: pd.DataFrame, state: list[dict]) -> None:
        """Goes on from a frame and a `state`."""
        self.frame = frame
        self.moments = [Moments(**{**s, "histogram": {int(b): c for b, c in s["histogram"].items()}}) for s in state]

    def summary(self) -> dict:
        """For the metadata of the scores."""
        return {"keep": self.keep, "all": [moments.to_dict() for moments in self.moments]}
