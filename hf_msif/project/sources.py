"""Where the rows of a `data` section come from: files, a saved dataset or the Hub; and why they cannot be read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any

from ..engine.corpus import as_corpus
from ..engine.corpus_files import CsvFormat, check_columns, from_files, problem_of, silent_datasets
from ..errors import InputError, first_line
from ..registry import FORMATS
from . import hub
from .schema import FILE_GROUP, Data
from .values import LONGEST_PATH, shown_text

DIGITS = "sklearn:digits"


def load_table(data: Data, split: str, key: str) -> Any:
    """All rows of one split, as `datasets` loads them; with `label_from: files` they have the column `FILE_GROUP`.

    Args:
        data: the `data` section of a stage.
        split: the split's name, or a part of it such as "train[:10%]".
        key: the section's key, for messages.

    Returns:
        A `datasets.Dataset`; with `data.streaming` for files and Hub datasets a `datasets.IterableDataset`.

    Raises:
        InputError: a file that does not exist, is empty or cannot be read; no such dataset or split; names of columns
            that do not fit the files.
    """
    from datasets import load_dataset

    if data.path == DIGITS:
        return _digits()
    if is_saved(data.path):
        return _saved(data, split, key)
    if data.label_from == "files":
        return _grouped(data, key)
    files = _data_files(data, key)
    options = _options(data, files, key)
    try:
        with silent_datasets():
            path = data.builder or hub.prepare(data.path)
            table = load_dataset(path, data.name, data_files=files, split=split, streaming=data.streaming, **options)
    except Exception as error:
        raise _unreadable(data, split, key, error) from error
    if data.builder == "csv":
        check_columns(table.column_names or (), f"{key}.{data.files_key}")
    return table


def stream_source(data: Data, key: str) -> Iterable[dict]:
    """All rows of a `data` section one after another, with ids; raises as `load_table` does."""
    files = data.data_files if data.data_files is not None else data.files
    files = [files] if isinstance(files, str) else files
    local = data.builder in FORMATS.values()
    if local and isinstance(files, list) and not any("://" in file for file in files):
        if data.split != "train":
            raise InputError(
                f"{key}.split is {data.split!r}, but streamed files have no splits; expected 'train', and max_rows to "
                "read the first rows only."
            )
        files_key = f"{key}.{data.files_key}"
        paths = [path for file in _checked(files, files_key) for path in sorted(glob(file)) or [file]]
        for path in paths if data.builder == "csv" else ():
            csv_format(data).check(Path(path), f"{key}.column_names")
        return from_files(paths, files_key, data.builder, csv_format(data))
    return as_corpus(load_table(data, data.split, key), key)


def rows_of(table: Any, data: Data, key: str) -> Iterator[dict]:
    """The rows of a table; some formats are read only now, and may turn out to be damaged.

    Raises:
        InputError: names the file.
    """
    batches = table.iter(1000)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise _unreadable(data, data.split, key, error) from error
        if batch is None:
            return
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


# --- files


def csv_format(data: Data) -> CsvFormat:
    """How the section's CSV files are written."""
    names = None if data.column_names is None else tuple(data.column_names)
    return CsvFormat(data.separator, names, data.quotes)


def _data_files(data: Data, key: str) -> dict[str, list[str]] | list[str] | None:
    """What `load_dataset` takes as `data_files`: checked, with `~` resolved."""
    if isinstance(data.data_files, dict):
        return {name: _checked(paths, f"{key}.data_files.{name}") for name, paths in data.data_files.items()}
    files = data.files if data.files_key == "path" else data.data_files
    return None if files is None else _checked(files, f"{key}.{data.files_key}")


def _options(data: Data, files: Mapping[str, list[str]] | list[str] | None, key: str) -> dict[str, Any]:
    """The builder's settings for these files, which must be the same for all of them.

    Raises:
        InputError: .tsv files beside others, or `column_names` that do not fit.
    """
    if data.builder != "csv":
        return {}
    groups = files.values() if isinstance(files, Mapping) else [files or []]
    names = [name for group in groups for file in group for name in ([file] if "://" in file else _matches(file))]
    form = csv_format(data)
    for name in names:
        if "://" not in name:
            form.check(Path(name), f"{key}.column_names")
    options = {form.options(name)["sep"]: form.options(name) for name in names}
    if len(options) > 1:
        raise InputError(
            f"{key}.{data.files_key} names .tsv files, whose columns are separated by tabs, beside others; expected "
            f"files of one kind, or {key}.separator for all of them."
        )
    return next(iter(options.values()), {})


def _grouped(data: Data, key: str) -> Any:
    """The files of each class, one class after another; the class is in the column `FILE_GROUP`."""
    from datasets import concatenate_datasets, load_dataset

    groups = _data_files(data, key)
    assert isinstance(groups, dict)
    class_of: dict[str, str] = {}
    for label, files in groups.items():
        for path in [os.path.abspath(path) for file in files if "://" not in file for path in _matches(file)]:
            if class_of.setdefault(path, label) != label:
                raise InputError(
                    f"{key}.data_files: {shown_text(path, LONGEST_PATH)} is among the files of {class_of[path]!r} and "
                    f"of {label!r}; expected each file in one class."
                )
    options = _options(data, groups, key)
    try:
        with silent_datasets():
            tables = []
            for label, files in groups.items():
                table = load_dataset(data.builder, data_files=files, split="train", **options)
                tables.append(table.add_column(FILE_GROUP, [label] * len(table)))
            table = concatenate_datasets(tables)
    except Exception as error:
        raise _unreadable(data, data.split, key, error) from error
    if data.builder == "csv":
        check_columns(table.column_names, f"{key}.data_files")
    return table


def _checked(paths: str | list[str], key: str) -> list[str]:
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


# --- datasets that are no files


def is_saved(path: str) -> bool:
    """Whether `path` is a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    folder = Path(path).expanduser()
    try:
        is_dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
        return is_dataset or (folder / "dataset_dict.json").is_file()
    except OSError:  # a name that is too long
        return False


def _saved(data: Data, split: str, key: str) -> Any:
    """One split, or a part of one, of a saved dataset; a saved `Dataset` is the split "train"."""
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_from_disk

    if data.data_files is not None or data.name is not None:
        needless = "data_files" if data.data_files is not None else "name"
        raise InputError(f"{key}.{needless} is given, but {key}.path is a saved dataset: leave {needless} out.")
    try:
        with silent_datasets():
            saved = load_from_disk(os.path.expanduser(data.path))
    except Exception as error:
        raise InputError(
            f"{key}.path: the saved dataset {shown_text(data.path, LONGEST_PATH)} cannot be read "
            f"({first_line(error)}); save it again."
        ) from error
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    try:
        sizes = {name: len(table) for name, table in splits.items()}
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
        rows = [splits[part.splitname].select(range(part.from_ or 0, part.to)) for part in parts]
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"{key}: the saved dataset {shown_text(data.path, LONGEST_PATH)} has no split {split!r}; expected one of "
            f"{list(splits)}, or a part of it, such as {next(iter(splits))}[:80%]."
        ) from error
    return concatenate_datasets(rows).with_format(None)


def _digits():
    """scikit-learn's 1,797 images of 8 × 8, brightness 0 to 16."""
    from datasets import Dataset
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Dataset.from_dict({"image": digits.images.tolist(), "label": digits.target.tolist()})


# --- failures


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
        problem = problem_of(file, data.builder, has_header=data.column_names is None)
        if problem:
            what = f"{shown_text(str(file), LONGEST_PATH)} cannot be read as {data.builder}"
            return InputError(f"{key}.{data.files_key}: {what}: {problem}.")
    is_local = data.builder is not None or os.path.exists(os.path.expanduser(data.path))
    offline = "" if is_local else hub.reason(cause)
    return InputError(
        f"{key}: cannot load {data.path!r} (split {split!r}): {first_line(cause)}{offline}; expected a Hub "
        f"dataset id, a file ({', '.join(FORMATS)}), a folder that save_to_disk wrote, or one of text, csv, json, "
        "parquet with data_files."
    )


def _local_paths(data: Data) -> list[Path]:
    files = [os.path.expanduser(file) for file in data.files if file and "://" not in file]
    return [Path(path) for file in files for path in _matches(file)]
