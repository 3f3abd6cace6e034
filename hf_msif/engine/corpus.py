"""Tables and streams of rows: dicts in a fixed order, each with an `example_id` that is the same at every reading."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, first_line

# What `datasets` reads a file of such a name with; an ending .gz is its own affair.
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Stream:
    """Rows that are read anew each time and never held together: `read` yields dicts that carry `example_id`.

    Memory is flat in its length. A stage can be trained on one elsewhere and differentiated here on a random subset
    (`curvature_samples`), and a corpus to be scored can be one.
    """

    read: Callable[[], Iterator[dict]]
    what: str = "the corpus"

    def __iter__(self) -> Iterator[dict]:
        empty = True
        for row in self.read():
            empty = False
            yield row
        if empty:
            raise InputError(f"{self.what} is empty; expected at least one row: check the path and the filters.")

    def sample(self, size: int, seed: int) -> list[dict]:
        """So many random rows in one reading, the same for the same seed; all of them where there are fewer."""
        # Reservoir sampling (Vitter, 1985, algorithm R): row n replaces a kept one with probability size / n.
        generator, kept = random.Random(seed), []
        for number, row in enumerate(self):
            if number < size:
                kept.append(row)
            elif (place := generator.randrange(number + 1)) < size:
                kept[place] = row
        return kept


class Table(Sequence):
    """A map-style `datasets.Dataset` as rows: read from its Arrow file when asked for, never held as a whole."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.numbered = "example_id" not in dataset.column_names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            return list(self._rows(start, self.dataset[start:stop]))
        return next(self._rows(range(len(self))[index], {k: [v] for k, v in self.dataset[index].items()}))

    def __iter__(self) -> Iterator[dict]:
        for start in range(0, len(self), 1000):
            yield from self[start : start + 1000]

    def _rows(self, start: int, columns: Mapping[str, list]) -> Iterator[dict]:
        for number, values in enumerate(zip(*columns.values(), strict=True), start):
            row = dict(zip(columns, values, strict=True))
            yield {"example_id": number, **row} if self.numbered else row


def as_corpus(data, what: str) -> Sequence[dict] | Stream:
    """Anything whose rows can be scored, without reading it: a table (`as_rows`; a Dataset stays on disk), a
    `datasets.IterableDataset`, a `Stream`, or files as `pathlib.Path`s (text, JSON lines, CSV, Parquet; gzip too).

    Rows of files are named "file.txt:17", those of a streamed dataset are numbered as those of a table, unless they
    have an `example_id`.

    Raises:
        InputError: it is none of these, or a file does not exist or has another ending.
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
            _check_ids(data["example_id"], what)
        return table
    return as_rows(data, what)


def as_rows(data, what: str) -> list[dict]:
    """Any sensible table (a Dataset, dicts, or strings, column "text") as a list of dicts that carry `example_id`.

    Raises:
        InputError: it is no such table (several splits, a stream, a data frame), is empty, or repeats an id.
    """
    # Iterated, a mapping (several splits, one row) or a data frame would pass off its column names as sentences.
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
    for index, row in enumerate(data):
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


def from_files(paths: Sequence[str | os.PathLike], what: str = "the corpus", builder: str | None = None) -> Stream:
    """Local files as one stream, in the order given; rows are named by their file and their place in it.

    `builder`: of `datasets`, that reads them; None: by their endings.
    """
    paths, names = [Path(path).expanduser() for path in paths], Counter()
    for path in paths:
        names[path.name] += 1
        if not path.is_file():
            raise InputError(f"{what}: the file {str(path)!r} does not exist; set it to where the data is.")
        if builder is None and _builder(path) is None:
            raise InputError(
                f"{what}: {path.name!r} has an ending that says nothing of its format; expected one of "
                f"{', '.join(BUILDERS)}, or one of them with .gz."
            )
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"{what} has several files {twice[0]!r}, whose rows would have the same ids; rename one.")

    def read() -> Iterator[dict]:
        from datasets import load_dataset

        for path in paths:
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

    return Stream(read, what)


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def first(rows: Iterable[dict], size: int) -> list[dict]:
    """The first rows of a table or a stream."""
    return rows[:size] if isinstance(rows, Sequence) else list(itertools.islice(iter(rows), size))


def checked_omission(omit: Collection[Any], rows: list[dict], name: str) -> frozenset:
    """The ids to leave out of `rows`, some of them but not all."""
    omit, known = frozenset(omit), {row["example_id"] for row in rows}
    if omit - known:
        raise InputError(
            f"omit names {sorted(omit - known, key=repr)[:5]}, which are no example_id of the data of stage {name!r}; "
            f"they look like {rows[0]['example_id']!r}."
        )
    if omit == known:
        raise InputError(f"omit names every row of the data of stage {name!r}; expected some to be left.")
    return omit
