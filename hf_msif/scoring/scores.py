"""`Scores`: the result. One row a sentence, one pair of columns a query, every setting in the metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.files import write_whole
from ..engine.hashing import digest
from ..errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

ORDERS = ("absolute", "harmful", "helpful")
METADATA_KEY = b"hf_msif"
DUPLICATES = 3  # place of that column


def pack(metadata: dict) -> bytes:
    """Metadata as a Parquet schema holds it."""
    return json.dumps(metadata, default=str, ensure_ascii=False).encode()


def write_frame(frame: pd.DataFrame, metadata: dict, path: str | os.PathLike) -> None:
    """Writes a Parquet file with metadata in its schema and checksums of its pages, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: pack(metadata)})
    write_whole(path, lambda part: pq.write_table(table, part, write_page_checksum=True))


class Scores:
    """Influence of every scored row on the test loss.

    Columns of `frame`: `example_id`, `text` (empty for an image), `text_sha256` (of the text or the image),
    `duplicates` (rows with the same one, this one included), `loss` (ℓ of the row, a sum), `terms` (how many it
    sums), then a pair a query column:

    - `influence` = ∂f/∂ε for F + ε ℓ_x, eq. (6). Positive: more of x raises the test loss (harmful). Negative: it
      helps.
    - `removal_effect` = −influence / N: predicted change of the test loss when x is removed and all stages are
      trained again.

    With several query columns the names end in `_0`, `_1`, … in the order of the test examples. Of a file the frame
    is read when it is asked for; `top`, `bottom` and `influence` read the columns and rows that they need.

    Where only the extremes were kept, `metadata["kept"]` says how many, with moments and a histogram of all
    influences, and there is no column `duplicates`.
    """

    def __init__(self, frame: pd.DataFrame, metadata: dict | None = None):
        self._source: _Frame | _File = _Frame(frame)
        self.metadata = metadata or {}

    @classmethod
    def build(
        cls,
        rows: Sequence[dict],
        influence: np.ndarray,
        count: float,
        columns: dict[str, Any],
        metadata: dict,
        text_column: str = "text",
    ) -> Scores:
        """Assembles scores from rows in corpus order and an array of influences, shape (rows, Q)."""
        found = with_duplicates(frame_of(rows, influence, count, columns, text_column))
        return cls(found, {**metadata, "columns": influence.shape[1]})

    @property
    def frame(self) -> pd.DataFrame:
        """All rows and columns."""
        if isinstance(self._source, _File):
            self._source = _Frame(self._source.whole())
        return self._source.frame

    def __len__(self) -> int:
        return len(self._source)

    @property
    def columns(self) -> int:
        """Number of query columns."""
        return self.metadata["columns"]

    def influence(self, query: int = 0) -> np.ndarray:
        """Influence on the loss of test example number `query`, in corpus order."""
        return self._source.column(f"influence{self._suffix(query)}")

    def removal_effects(self) -> np.ndarray:
        """Predicted changes of all test losses on removal of each row, shape (rows, queries)."""
        return self.frame[[f"removal_effect{self._suffix(q)}" for q in range(self.columns)]].to_numpy()

    def top(self, k: int = 10, by: str = "absolute", query: int = 0) -> pd.DataFrame:
        """The first k rows by "absolute" influence, or as "harmful" (most positive), or "helpful" (most negative)."""
        return self._picked(self._order(by, query)[:k], query)

    def bottom(self, k: int = 10, by: str = "absolute", query: int = 0) -> pd.DataFrame:
        """The k rows at the other end of the order: with "absolute", the least influential ones, smallest first."""
        return self._picked(self._order(by, query)[::-1][:k], query)

    def to_pandas(self) -> pd.DataFrame:
        return self.frame.copy()

    def to_dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_pandas(self.frame, preserve_index=False)

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Writes one Parquet file with the metadata in its schema, whole or not at all."""
        write_frame(self.frame, self.metadata, path)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike) -> Scores:
        """Reads what `to_parquet` wrote.

        Raises:
            InputError: there is no such file, or it holds no scores.
        """
        if not Path(path).is_file():
            raise InputError(
                f"{path} does not exist; expected the Parquet file that `msif score` or `Scores.to_parquet` writes."
            )
        found = cls.__new__(cls)
        found._source = _File(path)
        packed = found._source.metadata.get(METADATA_KEY)
        if packed is None:
            raise InputError(
                f"{path} is a Parquet file without scores' metadata; expected one that `Scores.to_parquet` wrote."
            )
        found.metadata = json.loads(packed)
        return found

    def _suffix(self, query: int) -> str:
        if not 0 <= query < self.columns:
            raise InputError(
                f"query column {query} does not exist; these scores have {self.columns} (numbered from 0)."
            )
        return "" if self.columns == 1 else f"_{query}"

    def _order(self, by: str, query: int) -> np.ndarray:
        """Places of the rows, first to last; ties in corpus order."""
        if by not in ORDERS:
            raise InputError(f"by is {by!r}; expected one of {list(ORDERS)}.")
        value = self.influence(query)
        key = {"absolute": -abs(value), "harmful": -value, "helpful": value}[by]
        return np.argsort(key, kind="stable")

    def _picked(self, places: np.ndarray, query: int) -> pd.DataFrame:
        kept = self.metadata.get("kept", {}).get("keep")
        if kept is not None and len(places) > kept:
            raise InputError(f"these scores kept the {kept:,} most extreme rows of each order, not {len(places):,}.")
        suffix = self._suffix(query)
        names = {f"influence{suffix}": "influence", f"removal_effect{suffix}": "removal_effect"}
        shown = self._source.rows(places).rename(columns=names)
        order = ["example_id", "influence", "removal_effect", "loss", "terms", "duplicates", "text"]
        return shown[[name for name in order if name in shown]]


class _Frame:
    """Scores in memory."""

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> np.ndarray:
        return self.frame[name].to_numpy()

    def rows(self, places: np.ndarray) -> pd.DataFrame:
        return self.frame.iloc[places].reset_index(drop=True)


class _File:
    """Scores in a Parquet file, held open: what replaces it later does not mix with it."""

    def __init__(self, path: str | os.PathLike):
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path, page_checksum_verification=True)
        self.metadata = self.file.schema_arrow.metadata or {}

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def whole(self) -> pd.DataFrame:
        return self.file.read().to_pandas()

    def column(self, name: str) -> np.ndarray:
        return self.file.read([name])[name].to_numpy()

    def rows(self, places: np.ndarray) -> pd.DataFrame:
        """A row group at a time."""
        import pandas as pd

        sizes = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        group = np.searchsorted(starts, places, side="right") - 1
        found = []
        for g in np.unique(group):
            here = np.flatnonzero(group == g)
            frame = self.file.read_row_group(int(g)).take(places[here] - starts[g]).to_pandas()
            found.append(frame.set_axis(here))
        if not found:
            return self.file.schema_arrow.empty_table().to_pandas()
        return pd.concat(found).sort_index().reset_index(drop=True)


def frame_of(
    rows: Sequence[dict], influence: np.ndarray, count: float, columns: dict[str, Any], text_column: str = "text"
) -> pd.DataFrame:
    """The columns of `Scores` but `duplicates`."""
    import pandas as pd

    contents = [row.get(text_column, "") for row in rows]
    table = {
        "example_id": [row["example_id"] for row in rows],
        "text": [value if isinstance(value, str) else "" for value in contents],  # an image has none
        "text_sha256": [
            hashlib.sha256(value.encode()).hexdigest() if isinstance(value, str) else digest(value)
            for value in contents
        ],
    }
    width, pairs = influence.shape[1], {}
    for q in range(width):
        suffix = "" if width == 1 else f"_{q}"
        pairs[f"influence{suffix}"] = influence[:, q]
        pairs[f"removal_effect{suffix}"] = -influence[:, q] / count
    # At once: pandas warns about a frame that grows by more than a hundred columns, one by one.
    return pd.concat([pd.DataFrame({**table, **columns}), pd.DataFrame(pairs)], axis=1)


def influence_columns(width: int) -> list[str]:
    """Names of the influence columns of so many queries."""
    return ["influence"] if width == 1 else [f"influence_{q}" for q in range(width)]


def with_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with how often each row's text or image occurs in it."""
    frame.insert(DUPLICATES, "duplicates", frame.groupby("text_sha256")["text_sha256"].transform("size"))
    return frame
