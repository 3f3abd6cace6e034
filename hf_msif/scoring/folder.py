"""`ScoringFolder`: the folder of a scoring that is not finished, and what files in it say of themselves.

`manifest.json` says what all files in the folder depend on. Every other file is Parquet with checksums of its pages,
and is written beside its place and renamed when it is on the disk: it is there whole or not at all. A file that was
damaged later is found when the scoring is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..engine import folders
from ..engine.files import checked_value, read_json, write_json
from ..engine.hashing import digest
from ..errors import FileError, InputError
from .frames import METADATA_KEY

FORMAT = 1
SHOWN = 5  # changes in a message
PART_NAMES = "part-" + 8 * "[0-9]" + ".parquet"
FILES = ("manifest.json", "kept.parquet", PART_NAMES)


class ScoringFolder:
    """The folder scores.parts, which lies beside scores.parquet until that is written. Only the main process uses it.

    Args:
        finished: path of the finished file.
        manifest: what the scores depend on: name for people → digest or setting.
        resume: continue an interrupted scoring, if there is one.

    Attributes:
        finished: path of the finished file.
        path: the folder.

    Raises:
        InputError: there is an unfinished scoring and `resume` is false, or its manifest differs (what differs is
            named) or is damaged, or the folder holds files that the library did not write, or the disk is full.
    """

    def __init__(self, finished: Path, manifest: Mapping[str, Any], resume: bool):
        self.finished, self.path = finished, finished.with_suffix(".parts")
        manifest = {"format": FORMAT, **json.loads(json.dumps(manifest, default=str))}
        folders.check(self.path)
        if (self.path / "manifest.json").is_file():
            self._check(manifest, resume)
        else:
            folders.remove(self.path)
            with self.full_disk_explained():
                folders.write_marker(self.path, "unfinished scoring", FILES)
                write_json(self.path / "manifest.json", manifest)

    def _check(self, manifest: dict, resume: bool) -> None:
        if not resume:
            raise InputError(
                f"{self.path} holds a scoring that was interrupted: continue it with --resume (resume=True), or "
                "delete the folder to score from the beginning."
            )
        saved = read_json(
            self.path / "manifest.json", dict[str, Any], f"delete {self.path} to score from the beginning"
        )
        changed = [name for name in {**saved, **manifest} if saved.get(name) != manifest.get(name)]
        if changed:
            more = [f"{len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
            names = " and ".join([*changed[:SHOWN], *more])
            raise InputError(
                f"{names} changed since the scoring in {self.path} was interrupted: undo the change to continue it, "
                "or delete the folder to score from the beginning."
            )

    def corpus_changed(self, how: str) -> InputError:
        """The error to raise where the corpus is not that of the interrupted scoring; `how` is a main clause."""
        return InputError(
            f"the corpus changed since the scoring in {self.path} was interrupted: {how}; score the same corpus to "
            "continue, or delete the folder to score from the beginning."
        )

    @contextmanager
    def full_disk_explained(self) -> Iterator[None]:
        """Inside, the sentence on a file that cannot be written says how to go on, too."""
        try:
            yield
        except FileError as error:
            way_out = "the parts that were finished are whole: continue with --resume (resume=True)"
            raise FileError(f"{str(error).rstrip('.')}; {way_out}.") from error

    def remove(self) -> None:
        """Deletes the folder, unless it holds files of the user's."""
        folders.remove(self.path)


def rows_digest(rows: Sequence[dict]) -> str:
    """SHA-256 of the rows' ids and contents."""
    return digest(list(rows))


def read_facts(path: Path) -> dict:
    """The JSON that `scores.write_frame` put into a file's schema."""
    import pyarrow.parquet as pq

    return json.loads(pq.read_schema(path).metadata[METADATA_KEY])


def read_facts_if_intact(path: Path, kind: Any) -> Any:
    """`read_facts` where the whole file can be read, its checksums hold, and the facts are of that kind; otherwise
    None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(path, page_checksum_verification=True).read()
        return checked_value(read_facts(path), kind, path, "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException):  # `FileError` is one, too
        return None
