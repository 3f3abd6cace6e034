"""Rows of a stage: what `datasets` loads, filtered, split and counted as the `data` section says."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .config import Data
from .errors import InputError


def load_rows(data: Data, stage: str) -> list[dict]:
    """Rows {example_id, text[, label]} of a stage's `data` section; rows left out are counted and printed.

    Equal texts fall on the same side of the split. A number that a column with gaps turned into 7.0 is 7 again.

    Raises:
        InputError: missing or empty files, a column or an admitted value that does not exist, ids that repeat, or no
            row left.
    """
    key = f"stages.{stage}.data"
    table = _table(data, key)
    roles = {"text_column": data.text_column, "label_column": data.label_column, "id_column": data.id_column}
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
        if data.max_rows is not None and len(rows) >= data.max_rows:
            dropped["beyond max_rows"] = len(table) - number
            break
        row = {"example_id": number, "text": source[data.text_column]}
        if data.id_column is not None:
            row["example_id"] = source[data.id_column]
        if data.label_column is not None:
            row["label"] = source[data.label_column]
        text = row["text"]
        if not isinstance(text, (str, type(None))):
            raise InputError(f"{key}.text_column: {data.text_column!r} holds {text!r} in row {number}; expected text.")
        if any(str(source[column]) not in values for column, values in admitted.items()):
            dropped["not in keep"] += 1
        elif text is None or not text.strip():
            dropped["no text"] += 1
        elif None in row.values():
            dropped["no label" if row["example_id"] is not None else "no id"] += 1
        elif data.part != "all" and (_position(text) < data.test_fraction) != (data.part == "test"):
            dropped[f"not in the {data.part} part"] += 1
        else:
            rows.append(row)
    part = f" ({data.part})" if data.test_fraction > 0 else ""
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


def _table(data: Data, key: str):
    from datasets import load_dataset

    files = [data.data_files] if isinstance(data.data_files, str) else data.data_files
    for number, file in enumerate(files or []):
        if "://" in file or any(c in file for c in "*?["):
            continue
        files = [*files[:number], os.path.expanduser(file), *files[number + 1 :]]
        if not os.path.isfile(files[number]):
            raise InputError(f"{key}.data_files: the file {file!r} does not exist; set it to where the data is.")
        if not os.path.getsize(files[number]):
            raise InputError(f"{key}.data_files: the file {file!r} is empty; expected at least one row.")
    try:
        with _silent_datasets():
            return load_dataset(os.path.expanduser(data.path), data.name, data_files=files, split=data.split)
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:  # "an error occurred while generating the dataset" says nothing
            cause = cause.__cause__
        raise InputError(
            f"{key}: cannot load {data.path!r} (split {data.split!r}): {first_line(cause)}; expected a Hub dataset "
            "id, or one of text, csv, json, parquet with data_files."
        ) from error


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


def _position(text: str) -> float:
    """A text's place in [0, 1): a hash, so that equal texts (retweets) fall on the same side of a split."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:6]) / 2**48
