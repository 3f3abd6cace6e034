"""`InMemory`: the sink that keeps the scores of all rows in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .frames import with_duplicates
from .scores import Scores

if TYPE_CHECKING:
    import pandas as pd


class InMemory:
    """All rows, in memory; see `sinks.Sink`."""

    def __init__(self):
        self.frames: list[pd.DataFrame] = []
        self.truncated = 0

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        return True

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        self.frames.append(frame)
        self.truncated += truncated

    def finish(self, parts: int, metadata: dict) -> Scores:
        import pandas as pd

        frame = with_duplicates(pd.concat(self.frames, ignore_index=True))
        return Scores(frame, {**metadata, "truncated": self.truncated})
