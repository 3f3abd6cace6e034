"""Corpora in local files: how text, JSON lines, CSV and Parquet are read, and how their rows are named."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, first_line
from ..registry import FORMATS, builder_of, file_ending
from .stream import Stream

INDEX = "__index_level_0__"  # the column that pandas makes of a row's first fields where it has more than the header


@dataclass(frozen=True)
class CsvFormat:
    """How files of the builder "csv" are written.

    Attributes:
        separator: the character between columns; None: a tab in .tsv files, else a comma.
        column_names: names of the columns, for files without a header; None: the first line is the header.
        quotes: whether a field in quotation marks may hold separators and line breaks; False: quotation marks are
            characters like others.
    """

    separator: str | None = None
    column_names: tuple[str, ...] | None = None
    quotes: bool = True

    def options(self, name: str | os.PathLike) -> dict[str, Any]:
        """The settings with which the builder reads a file of this name.

        >>> CsvFormat().options("tweets.tsv")
        {'sep': '\\t'}
        """
        options: dict[str, Any] = {"sep": self.separator or ("\t" if file_ending(str(name)) == ".tsv" else ",")}
        if self.column_names is not None:
            options["column_names"] = list(self.column_names)
        if not self.quotes:
            options["quoting"] = csv.QUOTE_NONE
        return options

    def check(self, path: Path, key: str) -> None:
        """Refuses `column_names` that are not one per column: pandas would shift or empty the columns.

        Raises:
            InputError: names the numbers of both; `key` is the configuration key of the names.
        """
        if self.column_names is None:
            return
        separator = self.options(path)["sep"]
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if self.quotes else csv.QUOTE_NONE
        try:
            with opened(path) as file:
                lines = (line.decode() for line in file if line.strip())
                fields = next(csv.reader(lines, delimiter=separator, quoting=quoting), [])
        except (OSError, ValueError, EOFError, csv.Error):
            return  # whoever reads the file says what is wrong with it
        if fields and len(fields) != len(self.column_names):
            raise InputError(
                f"{key} has {len(self.column_names)} names, but the first line of {path.name} has {len(fields)} "
                f"columns by the separator {separator!r}; expected one name per column."
            )


def from_files(
    paths: Sequence[str | os.PathLike],
    what: str = "the corpus",
    builder: str | None = None,
    csv_format: CsvFormat | None = None,
) -> Stream:
    """Local files as one stream, in the order of `paths`.

    The `example_id` of a row is "file.txt:17": its file's name and its number in the file, from 0.

    Args:
        paths: the files.
        what: name of the data in error messages.
        builder: the builder of `datasets` that reads them, e.g. "text"; None: chosen by the files' endings.
        csv_format: how files of the builder "csv" are written; None: as their endings say.

    Raises:
        InputError: a file does not exist, its ending is unknown, or two files have the same name; on iteration, a
            file cannot be read (the message says after which row) or there is no row.
    """
    files, names = [Path(path).expanduser() for path in paths], Counter[str]()
    for path in files:
        names[path.name] += 1
        if not path.is_file():
            raise InputError(f"{what}: the file {str(path)!r} does not exist; set it to where the data is.")
        if builder is None and builder_of(path.name) is None:
            raise InputError(
                f"{what}: {path.name!r} has an ending that says nothing of its format; expected one of "
                f"{', '.join(FORMATS)}, or one of them with .gz."
            )
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"{what} has several files {twice[0]!r}, whose rows would have the same ids; rename one.")

    def read() -> Iterator[dict]:
        for path in files:
            reader = builder or builder_of(path.name)
            options = (csv_format or CsvFormat()).options(path) if reader == "csv" else {}
            for number, row in enumerate(_rows(path, reader, what, options)):
                yield {"example_id": f"{path.name}:{number}", **row}

    return Stream(read, what, tuple(files))


def _rows(path: Path, builder: str | None, what: str, options: dict[str, Any]) -> Iterator[dict]:
    """The rows of one file; of one that is damaged those before the damage, then an `InputError`."""
    from datasets import load_dataset

    rows: Iterator[dict] | None = None
    number, failure, is_done = 0, None, False
    while not is_done:
        ready: list[dict] = []
        with silent_datasets():
            try:
                if rows is None:
                    rows = iter(
                        load_dataset(builder, data_files=[str(path)], split="train", streaming=True, **options)
                    )
                ready.extend(itertools.islice(rows, 256))
                is_done = not ready
            except Exception as error:  # of whatever reads the format
                failure, is_done = error, True
        if builder == "csv" and ready:
            check_columns(ready[0], f"{what}: {path.name}")
        yield from ready
        number += len(ready)
    if failure is not None:
        reason = problem_of(path, builder, "column_names" not in options) or first_line(failure)
        raise InputError(f"{what}: {path.name} cannot be read after row {number}: {reason}.") from failure


def check_columns(columns: Sequence[str] | dict, what: str) -> None:
    """Refuses CSV whose rows have more fields than there are names: pandas would shift the columns.

    Raises:
        InputError: `columns` holds an index that pandas made.
    """
    if INDEX in columns:
        raise InputError(
            f"{what}: the rows have more columns than there are names for them; expected one name per column, in the "
            "header or in column_names."
        )


def problem_of(path: Path, builder: str | None, has_header: bool = True) -> str | None:
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
        return _problem_of_lines(path, builder, has_header)
    except (OSError, ValueError, EOFError) as error:  # also of pyarrow
        return first_line(error)


def _problem_of_lines(path: Path, builder: str, has_header: bool) -> str | None:
    full, number = 0, 0
    with opened(path) as file:
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
    return "it holds a header and no row" if builder == "csv" and has_header and full == 1 else None


def opened(path: Path) -> io.BufferedIOBase:
    """The file, for reading bytes; what a .gz file holds."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


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
