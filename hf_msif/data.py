"""Rows of a stage: what `datasets` loads, filtered, split and counted as the `data` section says."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .config import Data
from .digests import digest
from .errors import InputError

DIGITS = "sklearn:digits"


def load_rows(data: Data, stage: str, content: str = "text") -> list[dict]:
    """Rows {example_id, text[, label]} of a stage's `data` section, or {example_id, image[, label]}; rows left out are
    counted and printed.

    Equal texts or images fall on the same side of the split. A number that a column with gaps turned into 7.0 is 7
    again.

    Raises:
        InputError: missing or empty files, a column or an admitted value that does not exist, ids that repeat, or no
            row left.
    """
    key = f"stages.{stage}.data"
    held_out = data.part == "test" and data.test_split is not None
    table = _table(data, data.test_split if held_out else data.split, key)
    source_column, limit = getattr(data, f"{content}_column"), None if held_out else data.max_rows
    roles = {f"{content}_column": source_column, "label_column": data.label_column, "id_column": data.id_column}
    columns = {role: column for role, column in roles.items() if column is not None}
    for role, column in [*columns.items(), *((f"keep.{column}", column) for column in data.keep)]:
        if column not in table.column_names:
            near = difflib.get_close_matches(column, table.column_names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InputError(f"{key}.{role}: there is no column {column!r} among {table.column_names}{hint}")
    admitted = {column: {str(_whole(value)) for value in values} for column, values in data.keep.items()}
    for column, values in admitted.items():
        found = {str(_whole(value)) for value in table.unique(column)}
        if values - found:
            raise InputError(
                f"{key}.keep.{column} admits {min(values - found)!r}, which no row has; the column holds "
                f"{sorted(found)[:10]}."
            )
    rows, dropped = [], Counter()
    table = table.select_columns(sorted({*columns.values(), *admitted}))
    for number, source in enumerate(_sources(table)):
        if limit is not None and len(rows) >= limit:
            dropped["beyond max_rows"] = len(table) - number
            break
        row = {"example_id": number, content: source[source_column]}
        if data.id_column is not None:
            row["example_id"] = source[data.id_column]
        if data.label_column is not None:
            row["label"] = source[data.label_column]
        value = row[content]
        if content == "text" and not isinstance(value, (str, type(None))):
            raise InputError(
                f"{key}.text_column: {data.text_column!r} holds {value!r} in row {number}; expected text."
            )
        if any(str(source[column]) not in values for column, values in admitted.items()):
            dropped["not in keep"] += 1
        elif value is None or (content == "text" and not value.strip()):
            dropped[f"no {content}"] += 1
        elif None in row.values():
            dropped["no label" if row["example_id"] is not None else "no id"] += 1
        elif not held_out and data.part != "all" and not _is_on_side(value, data):
            dropped[f"not in the {data.part} part"] += 1
        else:
            rows.append(row)
    part = f" ({data.part})" if data.has_test_side else ""
    left_out = "".join(f", {count:,} left out ({why})" for why, count in dropped.items())
    if not rows:
        raise InputError(f"{key}: no row of {len(table):,} is left{left_out}; expected at least one.")
    print(f"{stage}{part}: {len(rows):,} rows of {len(table):,}{left_out}")
    ids = Counter(row["example_id"] for row in rows)
    repeated = [i for i, count in ids.items() if count > 1]
    if repeated:
        raise InputError(
            f"{key}.id_column: {data.id_column!r} repeats {len(repeated):,} ids (first {repeated[0]!r}), but ids name "
            "rows and seed their masks; give a column without repeats, or none."
        )
    return rows


def _table(data: Data, split: str, key: str):
    from datasets import load_dataset

    if data.path == DIGITS:
        return _digits()
    if isinstance(data.data_files, dict):
        files = {name: _files(some, f"{key}.data_files.{name}") for name, some in data.data_files.items()}
    else:
        files = None if data.data_files is None else _files(data.data_files, f"{key}.data_files")
    try:
        with _silent_datasets():
            return load_dataset(os.path.expanduser(data.path), data.name, data_files=files, split=split)
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:  # "an error occurred while generating the dataset" says nothing
            cause = cause.__cause__
        raise InputError(
            f"{key}: cannot load {data.path!r} (split {split!r}): {first_line(cause)}; expected a Hub dataset "
            "id, or one of text, csv, json, parquet with data_files."
        ) from error


def _files(given: str | list[str], key: str) -> list[str]:
    """The files, `~` resolved; a local one must be there and hold something."""
    files = []
    for file in [given] if isinstance(given, str) else given:
        if "://" in file or any(c in file for c in "*?["):
            files.append(file)
            continue
        files.append(os.path.expanduser(file))
        if not os.path.isfile(files[-1]):
            raise InputError(f"{key}: the file {file!r} does not exist; set it to where the data is.")
        if not os.path.getsize(files[-1]):
            raise InputError(f"{key}: the file {file!r} is empty; expected at least one row.")
    return files


def _digits():
    """scikit-learn's 1,797 images of 8 × 8, brightness 0 to 16."""
    from datasets import Dataset
    from sklearn.datasets import load_digits

    found = load_digits()
    return Dataset.from_dict({"image": found.images.tolist(), "label": found.target.tolist()})


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """No "Generating train split" bars, and no log lines beside the error that says the same."""
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


def _sources(table) -> Iterator[dict]:
    for batch in table.iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, map(_whole, values), strict=True))


def _whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_on_side(value, data: Data) -> bool:
    """Whether a text or image belongs to `data.part`. Its place in [0, 1) is a hash, so that equal ones (retweets)
    fall on the same side."""
    if data.test_fraction == 0:
        return data.part == "train"
    found = hashlib.sha256(value.strip().encode()).hexdigest() if isinstance(value, str) else digest(value)
    return (int(found[:12], 16) / 2**48 < data.test_fraction) == (data.part == "test")
