"""Scoring that survives its process: finished parts on disk, what they are parts of, and the one file at the end.

A corpus is cut into parts of so many consecutive rows, whatever number of processes scores them. A part is one Parquet
file with checksums of its pages, written beside its place and renamed when it is on the disk, so that it is there
whole or not at all; a damaged one is found when scoring goes on, and scored again. `manifest.json` says what all parts
belong to. Only the main process reads and writes here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.files import write_json, write_whole
from ..engine.hashing import digest
from ..errors import InputError
from .scores import DUPLICATES, METADATA_KEY, Scores, pack, with_duplicates, write_frame
from .summary import Extremes

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
HASHED_AT_ONCE = 2**20  # rows whose texts' hashes are compared in memory at a time


def rows_digest(rows: Sequence[dict]) -> str:
    """What a part's rows are known by: ids and contents."""
    return digest(list(rows))


class Collected:
    """Scores in memory: all rows, or the extremes."""

    def __init__(self, extremes: Extremes | None):
        self.extremes, self.frames, self.truncated = extremes, [], 0

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        return True

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        self.truncated += truncated
        if self.extremes is not None:
            self.extremes.add(frame)
        else:
            self.frames.append(frame)

    def scores(self, metadata: dict) -> Scores:
        import pandas as pd

        metadata = {**metadata, "truncated": self.truncated}
        if self.extremes is not None:
            return Scores(self.extremes.frame, {**metadata, "kept": self.extremes.summary()})
        return Scores(with_duplicates(pd.concat(self.frames, ignore_index=True)), metadata)


class Durable:
    """What rows and extremes kept on disk have in common: the folder of an unfinished scoring, and its manifest.

    Args:
        path: the finished file.
        manifest: what the scores depend on, name → value; the names are for people.
        resume: go on with what an interrupted scoring left.

    Raises:
        InputError: there is an unfinished scoring and `resume` is false, or it was of something else, which is named.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], resume: bool):
        self.path, self.folder = path, path.with_suffix(".parts")
        self.manifest = {"format": FORMAT, **json.loads(json.dumps(manifest, default=str))}
        self.truncated = 0
        if not self.folder.is_dir() or not (self.folder / "manifest.json").is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            with self._full_disk():
                write_json(self.folder / "manifest.json", self.manifest)
            self._open()
            return
        if not resume:
            raise InputError(
                f"{self.folder} holds a scoring that was interrupted: go on with --resume (resume=True), or delete "
                "the folder to score from the beginning."
            )
        try:
            kept = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{self.folder}/manifest.json is damaged ({error}): delete the folder.") from error
        changed = [name for name in {**kept, **self.manifest} if kept.get(name) != self.manifest.get(name)]
        if changed:
            raise InputError(
                f"{' and '.join(changed)} changed since the scoring in {self.folder} was interrupted; expected the "
                "same to go on: score with what it was, or delete the folder to score from the beginning."
            )
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    def _changed(self, number: int, rows: Sequence[dict]) -> InputError:
        return InputError(
            f"the corpus changed since the scoring in {self.folder} was interrupted: the {len(rows):,} rows from "
            f"{rows[0]['example_id']!r} on (part {number}) are not those that were scored; expected the same corpus "
            "to go on, or delete the folder to score from the beginning."
        )

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise InputError(
                f"{self.folder}: {error.strerror}; the parts that were finished are whole: free some space and go on "
                "with --resume (resume=True)."
            ) from error


class Parts(Durable):
    """One file a part, then all of them as one."""

    def _open(self) -> None:
        self.known: dict[int, str] = {}
        for leftover in self.folder.glob("*.part"):
            leftover.unlink()
        for path in sorted(self.folder.glob("part-*.parquet")):
            facts = _facts(path)
            if facts is None:
                print(f"{path} is damaged: its rows are scored again")
                path.unlink()
            else:
                self.known[facts["number"]] = facts["rows"]

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        """Whether a part is still to be scored."""
        if number not in self.known:
            return True
        if self.known[number] != rows_digest(rows):
            raise self._changed(number, rows)
        return False

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        facts = {"number": number, "rows": rows_digest(rows), "truncated": truncated}
        with self._full_disk():
            write_frame(frame, facts, self._path(number))
        self.known[number] = facts["rows"]

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.parquet"

    def finish(self, parts: int, metadata: dict) -> None:
        """Puts the parts together, with how often each text occurs; memory does not grow with the corpus."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        beyond = [number for number in self.known if number >= parts]
        if beyond:
            raise InputError(
                f"the corpus changed since the scoring in {self.folder} was interrupted: it ends before part "
                f"{min(beyond)}, which was scored; delete the folder to score from the beginning."
            )
        paths = [self._path(number) for number in range(parts)]
        truncated = sum(_own_facts(path)["truncated"] for path in paths)
        packed = {METADATA_KEY: pack({**metadata, "truncated": truncated})}

        def write(target: Path) -> None:
            with _counted(paths) as counts, _Writer(target) as writer:
                start = 0
                for path in paths:
                    table = pq.read_table(path)
                    own = pa.array(counts[start : start + len(table)], pa.int64())
                    start += len(table)
                    table = table.add_column(DUPLICATES, "duplicates", own)
                    writer.write(table.replace_schema_metadata(packed))

        with self._full_disk():
            write_whole(self.path, write)
        shutil.rmtree(self.folder)


class KeptParts(Durable):
    """Extremes of what has been scored so far, in one file that is replaced."""

    EVERY = 10.0  # seconds between two copies

    def __init__(self, path: Path, manifest: Mapping[str, Any], resume: bool, extremes: Extremes):
        self.extremes = extremes
        super().__init__(path, manifest, resume)

    def _open(self) -> None:
        import pyarrow.parquet as pq

        self.done, self.chain, self.passed = 0, "", ""
        self.kept, path = time.monotonic(), self.folder / "kept.parquet"
        if path.is_file():
            facts = _facts(path)
            if facts is None:
                print(f"{path} is damaged: scoring starts from the beginning")
                path.unlink()
                return
            self.extremes.restore(pq.read_table(path).to_pandas(), facts["moments"])
            self.done, self.chain, self.truncated = facts["done"], facts["chain"], facts["truncated"]

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        if number >= self.done:
            return True
        self.passed = _chained(self.passed, rows)
        if number == self.done - 1 and self.passed != self.chain:
            raise InputError(
                f"the corpus changed since the scoring in {self.folder} was interrupted: some of the rows up to "
                f"{rows[-1]['example_id']!r} are not those that were scored; expected the same corpus to go on, or "
                "delete the folder to score from the beginning."
            )
        return False

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        self.extremes.add(frame)
        self.done, self.chain, self.truncated = number + 1, _chained(self.chain, rows), self.truncated + truncated
        if time.monotonic() - self.kept >= self.EVERY:
            self._save(self.folder / "kept.parquet", self._state())
            self.kept = time.monotonic()

    def _state(self) -> dict:
        state = {"done": self.done, "chain": self.chain, "truncated": self.truncated}
        return state | {"moments": self.extremes.state()}

    def _save(self, path: Path, facts: dict) -> None:
        with self._full_disk():
            write_frame(self.extremes.frame, facts, path)

    def finish(self, parts: int, metadata: dict) -> None:
        if parts < self.done:
            raise InputError(
                f"the corpus changed since the scoring in {self.folder} was interrupted: it has fewer rows than were "
                "scored; delete the folder to score from the beginning."
            )
        metadata = {**metadata, "truncated": self.truncated, "kept": self.extremes.summary()}
        self._save(self.path, metadata)
        shutil.rmtree(self.folder)


class _Writer:
    """A Parquet writer that takes its schema from the first table."""

    def __init__(self, path: Path):
        self.path, self.writer = path, None

    def __enter__(self) -> _Writer:
        return self

    def write(self, table) -> None:
        import pyarrow.parquet as pq

        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, table.schema, write_page_checksum=True)
        self.writer.write_table(table)

    def __exit__(self, *error) -> None:
        if self.writer is not None:
            self.writer.close()


def _own_facts(path: Path) -> dict:
    import pyarrow.parquet as pq

    return json.loads(pq.read_schema(path).metadata[METADATA_KEY])


def _facts(path: Path) -> dict | None:
    """A part's facts where all of it can be read and its checksums hold, else None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(path, page_checksum_verification=True).read()
        return _own_facts(path)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _chained(chain: str, rows: Sequence[dict]) -> str:
    return hashlib.sha256(f"{chain}{rows_digest(rows)}".encode()).hexdigest()


@contextmanager
def _counted(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """How often each row's text or image occurs in all parts, in a file that is mapped: the texts are compared by
    64 bits of their hashes, those of one residue class at a time."""
    import pyarrow.parquet as pq

    total = sum(pq.read_metadata(path).num_rows for path in paths)
    classes, start = -(-total // HASHED_AT_ONCE), 0
    with TemporaryFile(dir=paths[0].parent) as one, TemporaryFile(dir=paths[0].parent) as two:
        hashes = np.memmap(one, dtype=np.uint64, mode="w+", shape=(total,))
        counts = np.memmap(two, dtype=np.int32, mode="w+", shape=(total,))
        for path in paths:
            texts = pq.read_table(path, columns=["text_sha256"])["text_sha256"].to_pylist()
            hashes[start : start + len(texts)] = [int(text[:16], 16) for text in texts]
            start += len(texts)
        for residue in range(classes):
            here = [
                np.flatnonzero(hashes[i : i + HASHED_AT_ONCE] % np.uint64(classes) == residue) + i
                for i in range(0, total, HASHED_AT_ONCE)
            ]
            places = np.concatenate(here)
            _, which, found = np.unique(hashes[places], return_inverse=True, return_counts=True)
            counts[places] = found[which]
        yield counts
