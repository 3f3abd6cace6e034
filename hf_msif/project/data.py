"""Rows of a stage: what `sources` loads, filtered, split, drawn and counted as the `data` section says."""

from __future__ import annotations

import difflib
import hashlib
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ..engine.corpus import Table
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import InputError
from .schema import Data
from .sources import csv_format, load_table, rows_of, stream_source
from .values import shortened

# Beside white space, what a text may consist of and say nothing: NUL, marks of byte order and of zero width.
INVISIBLE = f"\0\ufeff\u200b{string.whitespace}\xa0\u2028\u2029\x85"


def load_rows(data: Data, stage: str, content: str = "text", label_kind: str | None = None) -> list[dict]:
    """The rows of a stage, {example_id, text[, label]} or {example_id, image[, label]}, and the further columns that
    `data.columns` names; rows that are left out are counted, and the counts printed.

    Equal texts or images fall on the same side of the split. `shuffle`, `sample` and `max_rows` are for the side that
    is trained on: the test side is whole. A whole number that a column with gaps turned into 7.0 is 7 again.

    Args:
        data: the `data` section of the stage.
        stage: its name, for messages.
        content: "text", "image" or "words".
        label_kind: what the label column holds, see `tasks.Task`; where it holds classes, a warning says which of them
            `max_rows` or `sample` left out.

    Raises:
        InputError: missing or empty files, a column or a value of `keep` that does not exist, ids that repeat, or no
            row left.
    """
    key = f"stages.{stage}.data"
    test_split = data.test_split if data.part == "test" else None
    held_out = test_split is not None
    table = load_table(data, data.split if test_split is None else test_split, key)
    columns = _columns(data, content, table.column_names, key)
    for column, values in _admitted(data).items():
        if not hasattr(table.features[column], "dtype") or table.features[column].dtype in ("list", "dict"):
            raise InputError(
                f"{key}.keep.{column}: the column holds lists, mappings or files; expected one with words or numbers."
            )
        present = {str(_whole(value)) for value in table.unique(column)}
        if values - present:
            raise InputError(
                f"{key}.keep.{column} admits {min(values - present)!r}, which no row has; the column holds "
                f"{sorted(present)[:10]}."
            )
    table, dropped = table.select_columns(sorted({*columns.values(), *data.keep})), Counter[str]()
    limit = None if data.part == "test" else data.sample or data.max_rows
    numbers: Sequence[int] = range(len(table))
    if data.part != "test" and data.draws:
        numbers = np.random.default_rng(data.seed or 0).permutation(len(table)).tolist()
        table = table.select(numbers)
    rows: list[dict] = []
    numbered = zip(numbers, rows_of(table, data, key), strict=True)
    for row in _rows(numbered, data, content, key, dropped, held_out):
        if limit is not None and len(rows) >= limit:
            beyond = len(table) - len(rows) - dropped.total()
            dropped["not in the sample" if data.sample else "beyond max_rows"] = beyond
            if label_kind in ("class", "classes"):
                _warn_of_lost_classes(rows, table.select(range(len(table) - beyond, len(table))), data, key)
            break
        rows.append(row)
    if not rows:
        raise InputError(f"{key}: no row of {len(table):,} is left{_left_out(dropped)}; expected at least one.")
    _report(data, stage, len(rows), dropped)
    _warn_of_swallowed_lines(rows, data, key)
    ids = Counter(row["example_id"] for row in rows)
    repeated = [i for i, count in ids.items() if count > 1]
    if repeated:
        raise InputError(
            f"{key}.id_column: {data.id_column!r} repeats {len(repeated):,} ids (first {repeated[0]!r}), but ids name "
            "rows and seed their masks; give a column without repeats, or none."
        )
    return rows


def stream_rows(data: Data, stage: str, content: str = "text") -> Stream:
    """The rows of a stage as `load_rows` has them, read one after another and never all held in memory.

    A row's id is that of `id_column`, else the name of its file and its place in it ("news.txt:17"), else, in a Hub
    dataset, its number. Rows that are left out are counted; the counts are printed after the first full pass.

    Args:
        data: the `data` section of the stage.
        stage: its name, for messages.
        content: "text", "image" or "words".

    Raises:
        InputError: missing or empty files, or a column that does not exist.
    """
    key = f"stages.{stage}.data"
    source = stream_source(data, key)
    head = next(iter(source))
    _columns(data, content, list(head), key)
    reported: list[bool] = []

    def read() -> Iterator[dict]:
        dropped, count = Counter[str](), 0
        for row in _rows(enumerate(source), data, content, key, dropped, held_out=False):
            if data.max_rows is not None and count >= data.max_rows:
                break
            count += 1
            yield row
        if not reported:
            reported.append(True)
            if data.sample is not None and count > data.sample:
                dropped["not in the sample"], count = count - data.sample, data.sample
            _report(data, stage, count, dropped)

    files = source.files if isinstance(source, Stream) else ()
    if isinstance(source, Table):
        files = tuple(Path(file["filename"]) for file in source.dataset.cache_files)
    return Stream(read, f"the data of stage {stage!r}", files)


def _warn_of_lost_classes(rows: list[dict], others: Any, data: Data, key: str) -> None:
    """Warns where rows that are not taken have classes that no row has that is: files are often sorted by class."""
    assert data.label_source is not None
    admitted, lost = _admitted(data), set()
    for row in rows_of(others.select_columns(sorted({data.label_source, *data.keep})), data, key):
        if all(str(_whole(row[column])) in values for column, values in admitted.items()):
            lost |= _classes(row[data.label_source])
    taken = {label for row in rows for label in _classes(row["label"])}
    lost -= taken
    if lost:
        way_out = "take more rows" if data.draws else f"{key}.sample: {data.max_rows} takes random rows"
        shown = ", ".join(sorted(map(repr, lost))[:5]) + (", ..." if len(lost) > 5 else "")
        warnings.warn(
            f"{key}: the {len(rows):,} rows that are taken have {len(taken)} of the {len(taken | lost)} classes "
            f"(without {shown}); {way_out}.",
            stacklevel=3,
        )


def _warn_of_swallowed_lines(rows: list[dict], data: Data, key: str) -> None:
    """Warns where lines of tab-separated texts look as if an odd quotation mark had joined them."""
    if data.builder != "csv" or not data.quotes or csv_format(data).options(data.files[0])["sep"] != "\t":
        return
    texts = [row["text"] for row in rows if isinstance(row.get("text"), str)]
    joined = [text for text in texts if "\t" in text and "\n" in text]
    if joined:
        warnings.warn(
            f"{key}: {len(joined):,} texts hold tabs and line breaks (the first is {shortened(joined[0])!r}); if "
            f"quotation marks are characters of the texts, give {key}.quotes: false.",
            stacklevel=3,
        )


def _classes(label: Any) -> set:
    """The classes that a row is labelled with."""
    labels = label if isinstance(label, list) else [label]
    return {_whole(each) for each in labels if isinstance(each, (str, int, float))}


def content_key(data: Data, content: str) -> str:
    """Where a row holds its content: "text" (or a list of words), "image", or "input_ids" where it is tokenised."""
    if content == "image":
        return content
    return "input_ids" if "input_ids" in data.columns else "text"


def _content_role(data: Data, content: str) -> tuple[str, str]:
    """Which key of the configuration names the content's column, and this column."""
    if content_key(data, content) == "input_ids":
        return "columns.input_ids", data.columns["input_ids"]
    role = "image_column" if content == "image" else "text_column"
    return role, getattr(data, role)


def _columns(data: Data, content: str, known: list[str], key: str) -> dict[str, str]:
    """Role → column, where every column exists."""
    role, column = _content_role(data, content)
    roles = {role: column, data.label_key: data.label_source, "id_column": data.id_column}
    roles |= {f"columns.{name}": column for name, column in data.columns.items()}
    columns = {role: column for role, column in roles.items() if column is not None}
    for role, column in [*columns.items(), *((f"keep.{column}", column) for column in data.keep)]:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InputError(f"{key}.{role}: there is no column {column!r} among {known}{hint}")
    return columns


def _admitted(data: Data) -> dict[str, set[str]]:
    return {column: {str(_whole(value)) for value in values} for column, values in data.keep.items()}


def _is_empty(value: Any, content: str) -> bool:
    if value is None or content == "image":
        return value is None
    return not (value.strip(INVISIBLE) if isinstance(value, str) else len(value))


def _rows(
    numbered: Iterable[tuple[int, dict]], data: Data, content: str, key: str, dropped: Counter, held_out: bool
) -> Iterator[dict]:
    """The rows that are used, each with its id, content and label; rows that are left out are counted by reason.

    `numbered` are all rows as they are loaded, each with its number in the table.
    """
    admitted, (role, source_column) = _admitted(data), _content_role(data, content)
    place = content_key(data, content)
    expected: tuple[type, ...] = {"text": (str,), "words": (list,)}.get(content, (object,))
    for number, source in numbered:
        source = {column: _whole(value) for column, value in source.items()}
        row = {"example_id": source.get("example_id", number), place: source[source_column]}
        row |= {name: source[column] for name, column in data.columns.items()}
        if data.id_column is not None:
            row["example_id"] = source[data.id_column]
        if data.label_source is not None:
            row["label"] = source[data.label_source]
        if not isinstance(row["example_id"], (str, int, float, NoneType)):
            raise InputError(
                f"{key}.id_column: {data.id_column or 'example_id'!r} holds {shortened(row['example_id'])} in row "
                f"{number}; expected one word or number per row."
            )
        value = row[place]
        if place == "text" and not isinstance(value, (*expected, type(None))):
            what = "text" if content == "text" else "a list of words"
            raise InputError(
                f"{key}.{role}: {source_column!r} holds {shortened(value)} in row {number}; expected {what}."
            )
        if any(str(source[column]) not in values for column, values in admitted.items()):
            dropped["not in keep"] += 1
        elif _is_empty(value, content):
            dropped[f"no {content}"] += 1
        elif None in row.values():
            missing = next(name for name, found in row.items() if found is None)
            dropped[f"no {'id' if missing == 'example_id' else missing}"] += 1
        elif not held_out and data.part != "all" and not _is_on_side(value, data):
            dropped[f"not in the {data.part} part"] += 1
        else:
            yield row


def _left_out(dropped: Counter) -> str:
    return "".join(f", {count:,} left out ({why})" for why, count in dropped.items())


def _report(data: Data, stage: str, count: int, dropped: Counter) -> None:
    part = f" ({data.part})" if data.has_test_side else ""
    print(f"{stage}{part}: {count:,} rows of {count + dropped.total():,}{_left_out(dropped)}")


def _whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_on_side(value, data: Data) -> bool:
    """Whether a text or image belongs to `data.part`: by its hash, a number in [0, 1), so that equal texts (retweets)
    fall on the same side."""
    if data.test_fraction == 0:
        return data.part == "train"
    hashed = hashlib.sha256(value.strip().encode()).hexdigest() if isinstance(value, str) else digest(value)
    return (int(hashed[:12], 16) / 2**48 < data.test_fraction) == (data.part == "test")
