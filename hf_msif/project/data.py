"""Rows of a stage: what `datasets` loads, filtered, split and counted as the `data` section says."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path
from types import NoneType
from typing import Any

from ..engine.corpus import as_corpus
from ..engine.corpus_files import from_files, problem_of, silent_datasets
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import InputError, first_line
from . import hub
from .schema import FILE_BUILDERS, Data
from .values import LONGEST_PATH, shortened, shown_text

DIGITS = "sklearn:digits"
# Beside white space, what a text may consist of and say nothing: NUL, marks of byte order and of zero width.
INVISIBLE = f"\0\ufeff\u200b{string.whitespace}\xa0\u2028\u2029\x85"


def load_rows(data: Data, stage: str, content: str = "text") -> list[dict]:
    """The rows of a stage, {example_id, text[, label]} or {example_id, image[, label]}, and the further columns that
    `data.columns` names; rows that are left out are counted, and the counts printed.

    Equal texts or images fall on the same side of the split. A whole number that a column with gaps turned into 7.0
    is 7 again.

    Args:
        data: the `data` section of the stage.
        stage: its name, for messages.
        content: "text", "image" or "words".

    Raises:
        InputError: missing or empty files, a column or a value of `keep` that does not exist, ids that repeat, or no
            row left.
    """
    key = f"stages.{stage}.data"
    test_split = data.test_split if data.part == "test" else None
    held_out = test_split is not None
    table = _table(data, data.split if test_split is None else test_split, key)
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
    limit = None if held_out else data.max_rows
    rows: list[dict] = []
    for row in _rows(_sources(table, data, key), data, content, key, dropped, held_out):
        if limit is not None and len(rows) >= limit:
            dropped["beyond max_rows"] = len(table) - len(rows) - dropped.total()
            break
        rows.append(row)
    if not rows:
        raise InputError(f"{key}: no row of {len(table):,} is left{_left_out(dropped)}; expected at least one.")
    _report(data, stage, len(rows), dropped)
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
    source = _source(data, key)
    head = next(iter(source))
    _columns(data, content, list(head), key)
    reported: list[bool] = []

    def read() -> Iterator[dict]:
        dropped, count = Counter[str](), 0
        for row in _rows(source, data, content, key, dropped, held_out=False):
            if data.max_rows is not None and count >= data.max_rows:
                break
            count += 1
            yield row
        if not reported:
            reported.append(True)
            _report(data, stage, count, dropped)

    files = source.files if isinstance(source, Stream) else ()
    return Stream(read, f"the data of stage {stage!r}", files)


def _source(data: Data, key: str) -> Iterable[dict]:
    """All rows of a `data` section, streamed, with ids."""
    files = data.data_files
    local = data.path in ("text", "json", "csv", "parquet")
    if isinstance(files, str):
        files = [files]
    if local and isinstance(files, list) and not any("://" in file for file in files):
        if data.split != "train":
            raise InputError(
                f"{key}.split is {data.split!r}, but streamed files have no splits; expected 'train', and max_rows to "
                "read the first rows only."
            )
        paths = [path for file in _files(files, f"{key}.data_files") for path in sorted(glob(file)) or [file]]
        return from_files(paths, f"{key}.data_files", data.path)
    return as_corpus(_table(data, data.split, key), key)


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
    roles = {role: column, "label_column": data.label_column, "id_column": data.id_column}
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
    sources: Iterable[dict], data: Data, content: str, key: str, dropped: Counter, held_out: bool
) -> Iterator[dict]:
    """The rows that are used, each with its id, content and label; rows that are left out are counted by reason."""
    admitted, (role, source_column) = _admitted(data), _content_role(data, content)
    place = content_key(data, content)
    expected: tuple[type, ...] = {"text": (str,), "words": (list,)}.get(content, (object,))
    for number, source in enumerate(sources):
        source = {column: _whole(value) for column, value in source.items()}
        row = {"example_id": source.get("example_id", number), place: source[source_column]}
        row |= {name: source[column] for name, column in data.columns.items()}
        if data.id_column is not None:
            row["example_id"] = source[data.id_column]
        if data.label_column is not None:
            row["label"] = source[data.label_column]
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


def _table(data: Data, split: str, key: str):
    from datasets import load_dataset

    if data.path == DIGITS:
        return _digits()
    files: dict[str, list[str]] | list[str] | None
    if isinstance(data.data_files, dict):
        files = {name: _files(paths, f"{key}.data_files.{name}") for name, paths in data.data_files.items()}
    else:
        files = None if data.data_files is None else _files(data.data_files, f"{key}.data_files")
    try:
        with silent_datasets():
            path = data.path if data.path in FILE_BUILDERS else hub.prepare(data.path)
            return load_dataset(path, data.name, data_files=files, split=split, streaming=data.streaming)
    except Exception as error:
        raise _unreadable(data, split, key, error) from error


def _unreadable(data: Data, split: str, key: str, error: Exception) -> InputError:
    """What to raise where `datasets` cannot load or read the rows: names the file, and the line where it is known."""
    cause: BaseException = error
    while cause.__cause__ is not None:  # "an error occurred while generating the dataset" says nothing
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return InputError(
            f"{key}: the cache of datasets cannot be written ({cause.strerror}): free space, or set the "
            "environment variable HF_DATASETS_CACHE to a folder elsewhere."
        )
    for file in _local_paths(data):
        problem = problem_of(file, data.path)
        if problem:
            what = f"{shown_text(str(file), LONGEST_PATH)} cannot be read as {data.path}"
            return InputError(f"{key}.data_files: {what}: {problem}.")
    is_local = data.path in FILE_BUILDERS or os.path.exists(os.path.expanduser(data.path))
    offline = "" if is_local else hub.reason(cause)
    return InputError(
        f"{key}: cannot load {data.path!r} (split {split!r}): {first_line(cause)}{offline}; expected a Hub "
        "dataset id, or one of text, csv, json, parquet with data_files."
    )


def _files(paths: str | list[str], key: str) -> list[str]:
    """The files, with `~` resolved; local files must exist and not be empty."""
    files = []
    for file in [paths] if isinstance(paths, str) else paths:
        files.append(file if "://" in file else os.path.expanduser(file))
        if "://" in file:
            continue
        shown, matches = shown_text(file, LONGEST_PATH), _matches(files[-1])
        if not matches:
            raise InputError(f"{key}: the pattern {shown} matches no file; set it to where the data is.")
        try:
            if any(map(os.path.isdir, matches)) and len(matches) == 1:
                raise InputError(f"{key}: {shown} is a folder; expected a file, or a pattern such as FOLDER/*.txt.")
            if not any(map(os.path.exists, matches)):
                raise InputError(f"{key}: the file {shown} does not exist; set it to where the data is.")
            if not any(map(os.path.getsize, matches)):
                raise InputError(f"{key}: the file {shown} is empty; expected at least one row.")
        except OSError as error:
            raise InputError(f"{key}: the file {shown} cannot be read ({error.strerror}); give another.") from error
    return files


def _matches(file: str) -> list[str]:
    """The local files that a pattern matches; a plain name as it is."""
    return glob(file, recursive=True) if any(c in file for c in "*?[") else [file]


def _local_paths(data: Data) -> list[Path]:
    files = [os.path.expanduser(file) for file in data.files if file and "://" not in file]
    return [Path(path) for file in files for path in _matches(file)]


def _digits():
    """scikit-learn's 1,797 images of 8 × 8, brightness 0 to 16."""
    from datasets import Dataset
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Dataset.from_dict({"image": digits.images.tolist(), "label": digits.target.tolist()})


def _sources(table, data: Data, key: str) -> Iterator[dict]:
    batches = table.iter(1000)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # some formats are not checked when they are loaded
            raise _unreadable(data, data.split, key, error) from error
        if batch is None:
            return
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_on_side(value, data: Data) -> bool:
    """Whether a text or image belongs to `data.part`: by its hash, a number in [0, 1), so that equal texts (retweets)
    fall on the same side."""
    if data.test_fraction == 0:
        return data.part == "train"
    hashed = hashlib.sha256(value.strip().encode()).hexdigest() if isinstance(value, str) else digest(value)
    return (int(hashed[:12], 16) / 2**48 < data.test_fraction) == (data.part == "test")
