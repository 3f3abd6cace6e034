"""`Compared`: the rows of a corpus on which a query's replicates are compared; they are scored before the others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..engine.stream import Stream
from .noise import SAMPLE_ROWS, Noise
from .scorable import Measured, Scorable

FEWEST_ROWS = 64  # that tell the noise: intervals of 90 % then cover 90 ± 3 % of the rows

Measure = Callable[[list[dict]], Measured]


@dataclass(frozen=True)
class Compared:
    """How the replicates scatter, and the rows of the corpus that told it.

    Attributes:
        noise: None: the query has one replicate, or it is known without these rows.
        measured: the rows.
        places: number of a row in the corpus → its place in `measured`.
    """

    noise: Noise | None = None
    measured: Measured | None = None
    places: dict[int, int] | None = None

    def completed(self, numbers: Sequence[int], rows: list[dict], measure: Measure) -> Measured:
        """Rows of the corpus, of which those that are compared are measured already.

        Args:
            numbers: of the rows in the corpus.
            rows: the rows themselves.
            measure: measures rows.
        """
        known = self.places or {}
        new = [place for place, number in enumerate(numbers) if number not in known]
        if len(new) == len(rows):
            return measure(rows)
        assert self.measured is not None
        there = [place for place, number in enumerate(numbers) if number in known]
        values = np.empty((len(rows), self.measured.values.shape[1]))
        values[there] = self.measured.values[[known[numbers[place]] for place in there]]
        if new:
            values[new] = measure([rows[place] for place in new]).values
        return replace(self.measured, values=values)


def compared(scorable: Scorable, source: Sequence[dict] | Stream, first: list[dict], measure: Measure) -> Compared:
    """Compares the replicates on `SAMPLE_ROWS` rows of the corpus: random ones of a table, the first of a stream.

    Where it has fewer than `FEWEST_ROWS`, they are compared as `Scorable.noise` does.

    Args:
        scorable: the question.
        source: the corpus.
        first: its first rows, as many as are scored in a round.
        measure: measures rows.
    """
    if scorable.noise is None:
        return Compared()
    rows = first if isinstance(source, Stream) else source
    numbers: Sequence[int] = range(min(len(rows), SAMPLE_ROWS))
    if len(rows) > SAMPLE_ROWS and rows is source:
        numbers = random.Random(scorable.seed).sample(range(len(rows)), SAMPLE_ROWS)
    measured = measure([rows[number] for number in numbers])
    places = {number: place for place, number in enumerate(numbers)}
    return Compared(noise_of(scorable, measured), measured, places)


def noise_of(scorable: Scorable, measured: Measured) -> Noise | None:
    """What rows that were measured tell of the noise; where they are too few, `Scorable.noise`."""
    if scorable.noise is None:
        return None
    return Noise.measured(measured.replicates) if len(measured.values) >= FEWEST_ROWS else scorable.noise()
