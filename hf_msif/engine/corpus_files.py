"""Corpora in local files: which formats are read (a new one is a line of `FORMATS`), and how their rows are named."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError, first_line
from .stream import Stream

# File ending → the builder of `datasets` that reads such a file, also with a further ending .gz.
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def from_files(paths: Sequence[str | os.PathLike], what: str = "the corpus", builder: str | None = None) -> Stream:
    """Local files as one stream, in the order of `paths`.

    The `example_id` of a row is "file.txt:17": its file's name and its number in the file, from 0.

    Args:
        paths: the files.
        what: name of the data in error messages.
        builder: the builder of `datasets` that reads them, e.g. "text"; None: chosen by the files' endings.

    Raises:
        InputError: a file does not exist, its ending is unknown, or two files have the same name; on iteration, a
            file cannot be read (the message says after which row) or there is no row.
    """
    files, names = [Path(path).expanduser() for path in paths], Counter[str]()
    for path in files:
        names[path.name] += 1
        if not path.is_file():
            raise InputError(f"{what}: the file {str(path)!r} does not exist; set it to where the data is.")
        if builder is None and _builder(path) is None:
            raise InputError(
                f"{what}: {path.name!r} has an ending that says nothing of its format; expected one of "
                f"{', '.join(FORMATS)}, or one of them with .gz."
            )
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"{what} has several files {twice[0]!r}, whose rows would have the same ids; rename one.")

    def read() -> Iterator[dict]:
        from datasets import load_dataset

        for path in files:
            streamed = load_dataset(builder or _builder(path), data_files=[str(path)], split="train", streaming=True)
            rows, number = iter(streamed), 0
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    break
                except Exception as error:  # of whatever reads the format
                    raise InputError(
                        f"{what}: {path.name} cannot be read after row {number}: {first_line(error)}."
                    ) from error
                yield {"example_id": f"{path.name}:{number}", **row}
                number += 1

    return Stream(read, what, tuple(files))


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return FORMATS.get(suffixes[-1]) if suffixes else None
