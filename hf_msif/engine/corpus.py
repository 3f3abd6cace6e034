"""Tables and streams of rows: dicts in a fixed order, each with an `example_id` that is the same in every reading."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..errors import InputError
from .corpus_files import from_files
from .stream import Stream

if TYPE_CHECKING:
    from datasets import Dataset


class Table(Sequence[dict]):
    """A map-style `datasets.Dataset` as a sequence of rows, which are read from its Arrow file on access.

    Rows without an `example_id` are numbered from 0. A slice returns a list of dicts. Values are plain ones, whatever
    `with_format` says; a transform (`set_transform`) is applied, and rows keep the ids of the columns below it.

    Attributes:
        dataset: the dataset.
        numbered: whether the rows get their number as `example_id`.
    """

    def __init__(self, dataset: Dataset):
        self.plain = dataset.with_format(None)
        self.dataset = dataset if dataset.format["type"] == "custom" else self.plain
        self.numbered = "example_id" not in dataset.column_names

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict]: ...

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            return list(self._rows(start, stop))
        place = range(len(self))[index]
        return next(self._rows(place, place + 1))

    def __iter__(self) -> Iterator[dict]:
        for start in range(0, len(self), 1000):
            yield from self[start : start + 1000]

    def _rows(self, start: int, stop: int) -> Iterator[dict]:
        columns: Mapping[str, Sequence] = self.dataset[start:stop]
        if not self.numbered and "example_id" not in columns:  # a transform left it out
            columns = {"example_id": self.plain.select_columns("example_id")[start:stop]["example_id"], **columns}
        for number, values in enumerate(zip(*columns.values(), strict=True), start):
            row = dict(zip(columns, values, strict=True))
            yield {"example_id": number, **row} if self.numbered else row


def as_corpus(data: Any, what: str) -> Sequence[dict] | Stream:
    """Rows that can be scored, from any kind of data; neither files nor datasets are read here.

    Rows get an `example_id` if they have none: in files "file.txt:17" (the name and the row's number from 0), else
    the row's number.

    Args:
        data: a `datasets.Dataset` (stays on disk), a list of dicts or strings, a `datasets.IterableDataset`, a
            `Stream`, or one `pathlib.Path` or several (text, JSON lines, CSV, Parquet; also gzipped).
        what: name of the data in error messages.

    Returns:
        A `Stream` for files and streamed datasets, else a sequence of dicts.

    Raises:
        InputError: `data` is none of these, is empty, or repeats an id; a file does not exist, its ending is unknown,
            or two files have the same name.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(data, Stream):
        return data
    if isinstance(data, Path):
        data = [data]
    if isinstance(data, (list, tuple)) and data and all(isinstance(path, Path) for path in data):
        return from_files(data, what)
    if isinstance(data, IterableDataset):
        return Stream(lambda: ({"example_id": number, **row} for number, row in enumerate(data)), what)
    if isinstance(data, Dataset) and len(data):
        table = Table(data)
        if not table.numbered:
            _check_ids(table.plain["example_id"], what)
        return table
    return as_rows(data, what)


def as_rows(data: Any, what: str) -> list[dict]:
    """A table as a list of dicts that carry `example_id`: the row's number from 0, unless the row has one.

    Args:
        data: a `datasets.Dataset`, or a list of dicts or of strings (which become the column "text").
        what: name of the data in error messages.

    Raises:
        InputError: `data` is no such table (several splits, a stream, a data frame), is empty, or repeats an id.

    >>> as_rows(["we won", {"text": "they lost", "example_id": "b"}], "the corpus")
    [{'example_id': 0, 'text': 'we won'}, {'example_id': 'b', 'text': 'they lost'}]
    """
    # A mapping (several splits, or one row) and a data frame iterate over their keys, which would look like sentences.
    named = isinstance(data, Mapping) or hasattr(data, "iterrows")
    if isinstance(data, (str, Path)) or named or not hasattr(data, "__len__"):
        way_out = ""
        if hasattr(data, "iterrows"):
            way_out = ": convert it with Dataset.from_pandas"
        elif named:
            way_out = f" (it has the keys {list(data)[:5]}: pick one split, or put a single row into a list)"
        raise InputError(
            f"{what} is a {type(data).__name__}; expected a datasets.Dataset or a list of rows or of strings{way_out}."
        )
    if len(data) == 0:
        raise InputError(f"{what} is empty; expected at least one row: check the path, the split and the filters.")
    rows = []
    for index, row in enumerate(Table(data) if hasattr(data, "set_transform") else data):
        if not isinstance(row, (str, Mapping)):
            raise InputError(f"{what}: row {index} is a {type(row).__name__}; expected a dict or a string.")
        rows.append({"example_id": index, **({"text": row} if isinstance(row, str) else row)})
    _check_ids((row["example_id"] for row in rows), what)
    return rows


def _check_ids(ids: Iterable, what: str) -> None:
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise InputError(
            f"{what} repeats an example_id ({repeated[0]!r}); ids name rows and seed their masks, so each must occur "
            "once."
        )


def first_rows(rows: Iterable[dict], size: int) -> list[dict]:
    """The first `size` rows of a table or a stream; all of them if there are fewer."""
    return list(rows[:size] if isinstance(rows, Sequence) else itertools.islice(iter(rows), size))


def checked_omission(omit: Collection[Any], rows: list[dict], name: str) -> frozenset:
    """`omit` as a set, after checking that it names rows of `rows` and not all of them.

    Args:
        omit: the ids to leave out.
        rows: the data of the stage.
        name: the stage's name, for messages.

    Raises:
        InputError: an id that no row has, or nothing would be left.
    """
    omitted, known = frozenset(omit), {row["example_id"] for row in rows}
    if omitted - known:
        raise InputError(
            f"omit names {sorted(omitted - known, key=repr)[:5]}, which are no example_id of the data of stage "
            f"{name!r}; they look like {rows[0]['example_id']!r}."
        )
    if omitted == known:
        raise InputError(f"omit names every row of the data of stage {name!r}; expected at least one row to be left.")
    return omitted
