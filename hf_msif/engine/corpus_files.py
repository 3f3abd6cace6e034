"""Corpora in local files: which formats are read (a new one is a line of `FORMATS`), and how their rows are named."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        for path in files:
            for number, row in enumerate(_rows(path, builder or _builder(path), what)):
                yield {"example_id": f"{path.name}:{number}", **row}

    return Stream(read, what, tuple(files))


def _rows(path: Path, builder: str | None, what: str) -> Iterator[dict]:
    """The rows of one file; of one that is damaged those before the damage, then an `InputError`."""
    from datasets import load_dataset

    rows: Iterator[dict] | None = None
    number, failure, is_done = 0, None, False
    while not is_done:
        ready: list[dict] = []
        with silent_datasets():
            try:
                if rows is None:
                    rows = iter(load_dataset(builder, data_files=[str(path)], split="train", streaming=True))
                ready.extend(itertools.islice(rows, 256))
                is_done = not ready
            except Exception as error:  # of whatever reads the format
                failure, is_done = error, True
        yield from ready
        number += len(ready)
    if failure is not None:
        reason = problem_of(path, builder) or first_line(failure)
        raise InputError(f"{what}: {path.name} cannot be read after row {number}: {reason}.") from failure


def problem_of(path: Path, builder: str | None) -> str | None:
    """What is wrong with a file that a builder of `datasets` could not read, in words; None where nothing is found.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "tweets.csv"
    ...     _ = path.write_bytes("text\\nnaïve\\n".encode("latin-1"))
    ...     problem_of(path, "csv")
    'line 2 is no UTF-8 text: convert it to UTF-8'
    """
    if path.is_dir():
        return "it is a folder"
    try:
        if builder == "parquet":
            import pyarrow.parquet as pq

            return None if pq.read_metadata(path).num_rows else "it holds no row"
        if builder not in ("text", "csv", "json"):
            return None
        return _problem_of_lines(path, builder)
    except (OSError, ValueError, EOFError) as error:  # also of pyarrow
        return first_line(error)


def _problem_of_lines(path: Path, builder: str) -> str | None:
    full, number = 0, 0
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115  (entered below)
    with opened as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                return f"line {number} is no UTF-8 text: convert it to UTF-8"
            full += bool(text.strip())
            if builder == "json" and path.suffix in (".jsonl", ".gz") and text.strip():
                try:
                    is_row = isinstance(json.loads(text), dict)
                except (ValueError, RecursionError) as error:
                    return f"line {number} is no JSON ({first_line(error)})"
                if not is_row:
                    return f"line {number} is no JSON object"
    if not full:
        return "it holds no row"
    return "it holds a header and no row" if builder == "csv" and full == 1 else None


@contextmanager
def silent_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets`, and without its log lines, which an error of ours would repeat."""
    import datasets

    level, shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return FORMATS.get(suffixes[-1]) if suffixes else None
