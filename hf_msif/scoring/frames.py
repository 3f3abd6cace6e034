"""The table of scores: made of rows and influences, kept in memory or read from a Parquet file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.files import write_atomically
from ..engine.hashing import digest
from ..errors import FileError, first_line

if TYPE_CHECKING:
    import pandas as pd

METADATA_KEY = b"hf_msif"
DUPLICATES = 3  # position of the column "duplicates"
QUERY_COLUMNS = ("influence", "influence_se", "removal_effect")  # which exist for each query column


def pack_metadata(metadata: dict) -> bytes:
    """Metadata as the value that a Parquet schema has under `METADATA_KEY`."""
    return json.dumps(metadata, default=str, ensure_ascii=False).encode()


def write_frame(frame: pd.DataFrame, metadata: dict, path: str | os.PathLike) -> None:
    """Writes a Parquet file with metadata in its schema and checksums of its pages, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: pack_metadata(metadata)})
    write_atomically(path, lambda part: pq.write_table(table, part, write_page_checksum=True))


class FrameInMemory:
    """A table of scores in memory."""

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def names(self) -> list[str]:
        return list(self.frame)

    def column(self, name: str) -> np.ndarray:
        return self.frame[name].to_numpy()

    def rows(self, places: np.ndarray) -> pd.DataFrame:
        return self.frame.iloc[places].reset_index(drop=True)


class FrameInFile:
    """A table of scores in a Parquet file, which stays open: a file that replaces it later does not mix with it."""

    def __init__(self, path: str | os.PathLike):
        import pyarrow.parquet as pq

        self.path = path
        self.file = pq.ParquetFile(path, page_checksum_verification=True)
        self.metadata = self.file.schema_arrow.metadata or {}

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def whole(self) -> pd.DataFrame:
        with self._damage_named():
            return self.file.read().to_pandas()

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Inside, what cannot be read is said of this file."""
        try:
            yield
        except (OSError, ValueError) as error:  # of pyarrow, too
            raise FileError(f"{self.path} is damaged ({first_line(error)}): score again.") from error

    @property
    def names(self) -> list[str]:
        return self.file.schema_arrow.names

    def column(self, name: str) -> np.ndarray:
        with self._damage_named():
            return self.file.read([name])[name].to_numpy()

    def rows(self, places: np.ndarray) -> pd.DataFrame:
        """Reads one row group at a time."""
        import pandas as pd

        sizes = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        groups = np.searchsorted(starts, places, side="right") - 1
        frames = []
        for group in np.unique(groups):
            positions = np.flatnonzero(groups == group)
            with self._damage_named():
                frame = self.file.read_row_group(int(group)).take(places[positions] - starts[group]).to_pandas()
            frames.append(frame.set_axis(positions))
        if not frames:
            return self.file.schema_arrow.empty_table().to_pandas()
        return pd.concat(frames).sort_index().reset_index(drop=True)


def frame_of(
    rows: Sequence[dict],
    influence: np.ndarray,
    count: float,
    columns: dict[str, Any],
    text_column: str = "text",
    errors: np.ndarray | None = None,
) -> pd.DataFrame:
    """The columns of `Scores`, without `duplicates`.

    Args:
        rows: in the order of the corpus, each with its `example_id`.
        influence: (rows, Q), eq. (6).
        count: N of the stage.
        columns: more columns: name → one value per row; scoring has `loss` and `terms`.
        text_column: key of a row's text or image.
        errors: standard errors of the influences, (rows, Q); None: they are not known.
    """
    import pandas as pd

    contents = [row.get(text_column, "") for row in rows]
    table = {
        "example_id": [row["example_id"] for row in rows],
        "text": [value if isinstance(value, str) else "" for value in contents],
        "text_sha256": [
            hashlib.sha256(value.encode()).hexdigest() if isinstance(value, str) else digest(value)
            for value in contents
        ],
    }
    # All at once: pandas warns about a frame to which more than a hundred columns are added one by one.
    return pd.concat([pd.DataFrame({**table, **columns}), query_columns(influence, count, errors)], axis=1)


def query_columns(influence: np.ndarray, count: float, errors: np.ndarray | None = None) -> pd.DataFrame:
    """The columns that exist for each query column, from the same arguments as `frame_of`."""
    import pandas as pd

    columns = {}
    for q, name in enumerate(influence_columns(influence.shape[1])):
        suffix = name.removeprefix("influence")
        columns[name] = influence[:, q]
        if errors is not None:
            columns[f"influence_se{suffix}"] = errors[:, q]
        columns[f"removal_effect{suffix}"] = -influence[:, q] / count
    return pd.DataFrame(columns)


def influence_columns(width: int) -> list[str]:
    """Names of the influence columns of `width` query columns.

    >>> influence_columns(1), influence_columns(2)
    (['influence'], ['influence_0', 'influence_1'])
    """
    return ["influence"] if width == 1 else [f"influence_{q}" for q in range(width)]


def with_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame itself, to which the column `duplicates` is added: how often each row's text or image occurs in it."""
    frame.insert(DUPLICATES, "duplicates", frame.groupby("text_sha256")["text_sha256"].transform("size"))
    return frame
