"""`MaskNoise`: how much of what tells rows apart is their masks, measured on a few rows; `rounds` for a target."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engine.corpus import as_corpus, first_rows
from ..engine.stream import Stream
from .scorable import Scorable, measure

ROWS = 128
TARGET = 0.05  # share of the variance between rows that masks may have
MOST_ROUNDS = 8


@dataclass(frozen=True)
class MaskNoise:
    """The share of the variance between the scores of rows that their masks have.

    Rounds of masks are independent: with v the variance over rounds and s that of the rows' expectations over rows,
    R rounds have the share (v/R) / (s + v/R).

    Attributes:
        rows: how many were measured.
        one_round: the share of a single round, of the query column where it is largest.

    >>> MaskNoise(rows=128, one_round=0.5).share(4), MaskNoise(rows=128, one_round=0.08).rounds(target=0.05)
    (0.2, 2)
    """

    rows: int
    one_round: float

    @classmethod
    def measured(cls, rounds: Sequence[Scorable], corpus: Any, batch_size: int | None = None) -> MaskNoise:
        """From the scores of up to 128 rows under two rounds: v = ⟨(a − b)²⟩/2, and s + v is the variance over rows.

        Args:
            rounds: two `Scorable`s, whose objectives have one round each, not the same one.
            corpus: a table, of which rows at equal distances are taken, or a stream, of which the first ones are.
            batch_size: rows per batch.
        """
        source = as_corpus(corpus, "the corpus")
        step = 1 if isinstance(source, Stream) else max(1, len(source) // ROWS)
        rows = first_rows(source, step * ROWS)[::step]
        with rounds[0].model.evaluating():
            one, other = (measure(r, rows, batch_size or r.batch_size, None).influence for r in rounds)
        of_masks = ((one - other) ** 2).mean(0) / 2
        of_rows = (one.var(0) + other.var(0)) / 2
        shares = (of_masks / of_rows.clip(min=1e-300)).clip(max=1.0)
        return cls(len(rows), float(shares.max()))

    def share(self, rounds: int) -> float:
        """That of the means of `rounds` rounds."""
        noise = self.one_round / rounds
        return noise / max(1 - self.one_round + noise, 1e-300)

    def rounds(self, target: float = TARGET) -> int:
        """One round, doubled until the share is at most `target`, and at most 8 rounds."""
        rounds = 1
        while self.share(rounds) > target and rounds < MOST_ROUNDS:
            rounds *= 2
        return rounds

    def tell(self, masks_per_round: int | None, is_main: bool = True) -> dict[str, Any]:
        """Prints what was measured and chosen, and warns where `MOST_ROUNDS` do not reach the target.

        Args:
            masks_per_round: for the text.
            is_main: whether this process prints and warns.

        Returns:
            The same for the metadata of scores.
        """
        rounds = self.rounds()
        share = self.share(rounds)
        masks = "" if masks_per_round is None else f" of {masks_per_round} masks per row"
        if is_main:
            print(
                f"masks: one round{masks} makes {self.one_round:.1%} of the variance between the scores of "
                f"{self.rows} rows; {rounds} round(s), which are taken, {share:.1%}"
            )
        if is_main and share > TARGET:
            warnings.warn(
                f"masks still make {share:.0%} of the variance between rows with {rounds} rounds, more than "
                f"{TARGET:.0%}: give mask_rounds as a larger number.",
                stacklevel=4,
            )
        return asdict(self) | {"mask_rounds": rounds, "share": share, "target": TARGET}
