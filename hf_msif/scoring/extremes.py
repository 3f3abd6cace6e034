"""Sinks that keep the extreme rows and a summary of all of them (`score(keep=k)`), in memory or on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from .folder import ScoringFolder, read_facts_if_intact, rows_digest
from .frames import write_frame
from .scores import Scores
from .summary import Extremes

if TYPE_CHECKING:
    import pandas as pd


class SavedMoments(TypedDict):
    """`summary.Moments` as JSON holds them."""

    count: int
    mean: float
    deviation: float
    smallest: float
    largest: float
    histogram: dict[str, int]


class AccountFacts(TypedDict):
    """What kept.parquet says of itself beside its rows."""

    done: int
    chain: str
    truncated: int
    moments: list[SavedMoments]


class ExtremesInMemory:
    """The extreme rows and a summary of all rows, in memory; see `sinks.Sink`.

    Args:
        extremes: an account without rows yet.
    """

    def __init__(self, extremes: Extremes):
        self.extremes, self.truncated, self.chain = extremes, 0, ""

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        return True

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        self.extremes.add(frame)
        self.truncated += truncated
        self.chain = extended(self.chain, rows)

    def finish(self, parts: int, metadata: dict) -> Scores:
        summary = {"truncated": self.truncated, "kept": self.extremes.summary(), "rows_sha256": self.chain}
        return Scores(self.extremes.frame, {**metadata, **summary})


class ExtremesOnDisk:
    """The extreme rows and a summary of all rows, in one file that is replaced as scoring goes on; see `sinks.Sink`.

    Args:
        path: the finished file.
        manifest: what the scores depend on: name for people → digest or setting.
        resume: continue an interrupted scoring, if there is one.
        extremes: an account without rows yet.

    Raises:
        InputError: see `ScoringFolder`.
    """

    SAVE_EVERY = 10.0  # seconds between two writings of the file

    def __init__(self, path: Path, manifest: Mapping[str, Any], resume: bool, extremes: Extremes):
        import pyarrow.parquet as pq

        self.folder, self.extremes = ScoringFolder(path, manifest, resume), extremes
        self.done, self.truncated = 0, 0  # parts that the account includes, and truncated rows in them
        # Hash chains of the rows that the account includes, and of those that `missing` has been asked about.
        self.chain, self.asked_chain = "", ""
        self.saved = time.monotonic()
        self.account = self.folder.path / "kept.parquet"
        if self.account.is_file():
            facts = read_facts_if_intact(self.account, AccountFacts)
            if facts is None:
                print(f"{self.account} is damaged: scoring starts from the beginning")
                self.account.unlink()
                return
            self.extremes.restore(pq.read_table(self.account).to_pandas(), facts["moments"])
            self.done, self.chain, self.truncated = facts["done"], facts["chain"], facts["truncated"]

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        if number >= self.done:
            return True
        self.asked_chain = extended(self.asked_chain, rows)
        if number == self.done - 1 and self.asked_chain != self.chain:
            raise self.folder.corpus_changed(
                f"some of the rows up to {rows[-1]['example_id']!r} are not those that were scored"
            )
        return False

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        self.extremes.add(frame)
        self.done, self.truncated = number + 1, self.truncated + truncated
        self.chain = extended(self.chain, rows)
        if time.monotonic() - self.saved >= self.SAVE_EVERY:
            facts = {"done": self.done, "chain": self.chain, "truncated": self.truncated}
            self._write({**facts, "moments": self.extremes.state()}, self.account)
            self.saved = time.monotonic()

    def _write(self, facts: dict, path: Path) -> None:
        with self.folder.full_disk_explained():
            write_frame(self.extremes.frame, facts, path)

    def finish(self, parts: int, metadata: dict) -> Scores:
        """Writes the extreme rows as the finished file.

        Raises:
            InputError: the corpus is shorter than the one whose scoring was interrupted, or the disk is full.
        """
        if parts < self.done:
            raise self.folder.corpus_changed("it has fewer rows than were scored")
        summary = {"truncated": self.truncated, "kept": self.extremes.summary(), "rows_sha256": self.chain}
        self._write({**metadata, **summary}, self.folder.finished)
        self.folder.remove()
        return Scores.from_parquet(self.folder.finished)


def extended(chain: str, rows: Sequence[dict]) -> str:
    """The hash chain of all rows before, extended by the rows of a part: `rows_sha256` of the scores that are kept."""
    return hashlib.sha256(f"{chain}{rows_digest(rows)}".encode()).hexdigest()
