"""`PartsOnDisk`: the sink that keeps the scores of all rows on disk, one file per part, and one file at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import TypedDict

from ..engine.files import write_atomically
from ..engine.folders import unfinished_files
from .folder import PART_NAMES, ScoringFolder, read_facts, read_facts_if_intact, rows_digest
from .frames import DUPLICATES, METADATA_KEY, pack_metadata, write_frame
from .scores import Scores

if TYPE_CHECKING:
    import pandas as pd

COUNTED_AT_ONCE = 2**20  # rows whose texts' hashes are compared in memory at a time


class PartFacts(TypedDict):
    """What a part says of itself: its number, the digest of its rows, and how many of these were truncated."""

    number: int
    rows: str
    truncated: int


class PartsOnDisk:
    """All rows, in one file per part until the scoring is finished, then in one file; see `sinks.Sink`.

    Args:
        path: the finished file.
        manifest: what the scores depend on: name for people → digest or setting.
        resume: continue an interrupted scoring, if there is one. A part that is damaged is scored again.

    Raises:
        InputError: see `ScoringFolder`.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], resume: bool):
        self.folder = ScoringFolder(path, manifest, resume)
        self.digests: dict[int, str] = {}  # number of a finished part → digest of its rows
        for leftover in unfinished_files(self.folder.path):
            leftover.unlink()
        for part in sorted(self.folder.path.glob(PART_NAMES)):
            facts = read_facts_if_intact(part, PartFacts)
            if facts is None or part != self._path(facts["number"]):
                print(f"{part} is damaged: its rows are scored again")
                part.unlink()
            else:
                self.digests[facts["number"]] = facts["rows"]

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        if number not in self.digests:
            return True
        if self.digests[number] != rows_digest(rows):
            raise self.folder.corpus_changed(
                f"the {len(rows):,} rows from {rows[0]['example_id']!r} on (part {number}) are not those that were "
                "scored"
            )
        return False

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        facts: dict[str, Any] = {"number": number, "rows": rows_digest(rows), "truncated": truncated}
        with self.folder.full_disk_explained():
            write_frame(frame, facts, self._path(number))
        self.digests[number] = facts["rows"]

    def _path(self, number: int) -> Path:
        return self.folder.path / f"part-{number:08d}.parquet"

    def finish(self, parts: int, metadata: dict) -> Scores:
        """Joins the parts and adds the column `duplicates`; memory does not grow with the corpus.

        Raises:
            InputError: the corpus is shorter than the one whose scoring was interrupted, or the disk is full.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        surplus = [number for number in self.digests if number >= parts]
        if surplus:
            raise self.folder.corpus_changed(f"it ends before part {min(surplus)}, which was scored")
        paths = [self._path(number) for number in range(parts)]
        truncated = sum(read_facts(path)["truncated"] for path in paths)
        schema_metadata = {METADATA_KEY: pack_metadata({**metadata, "truncated": truncated})}

        def write(target: Path) -> None:
            with _duplicate_counts(paths) as counts, _TableWriter(target) as writer:
                start = 0
                for path in paths:
                    table = pq.read_table(path)
                    duplicates = pa.array(counts[start : start + len(table)], pa.int64())
                    start += len(table)
                    table = table.add_column(DUPLICATES, "duplicates", duplicates)
                    writer.write(table.replace_schema_metadata(schema_metadata))

        with self.folder.full_disk_explained():
            write_atomically(self.folder.finished, write)
        self.folder.remove()
        return Scores.from_parquet(self.folder.finished)


class _TableWriter:
    """A Parquet writer that takes its schema from the first table."""

    def __init__(self, path: Path):
        self.path = path
        self.writer: Any = None  # of pyarrow, which has no types

    def __enter__(self) -> _TableWriter:
        return self

    def write(self, table) -> None:
        import pyarrow.parquet as pq

        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, table.schema, write_page_checksum=True)
        self.writer.write_table(table)

    def __exit__(self, *error) -> None:
        if self.writer is not None:
            self.writer.close()


@contextmanager
def _duplicate_counts(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """How often the text (or image) of each row occurs in all parts, as an array that is mapped from a file.

    Texts are compared by 64 bits of their SHA-256. Equal hashes have the same residue modulo the number of classes, so
    that each class can be counted alone, and only the hashes of one class are in memory at a time.
    """
    import pyarrow.parquet as pq

    total = sum(pq.read_metadata(path).num_rows for path in paths)
    classes = -(-total // COUNTED_AT_ONCE)
    with TemporaryFile(dir=paths[0].parent) as hash_file, TemporaryFile(dir=paths[0].parent) as count_file:
        hashes = np.memmap(hash_file, dtype=np.uint64, mode="w+", shape=(total,))
        counts = np.memmap(count_file, dtype=np.int32, mode="w+", shape=(total,))
        start = 0
        for path in paths:
            texts = pq.read_table(path, columns=["text_sha256"])["text_sha256"].to_pylist()
            hashes[start : start + len(texts)] = [int(text[:16], 16) for text in texts]
            start += len(texts)
        for residue in range(classes):
            places = np.concatenate(
                [
                    np.flatnonzero(hashes[i : i + COUNTED_AT_ONCE] % np.uint64(classes) == residue) + i
                    for i in range(0, total, COUNTED_AT_ONCE)
                ]
            )
            _, group, sizes = np.unique(hashes[places], return_inverse=True, return_counts=True)
            counts[places] = sizes[group]
        yield counts
