"""`Scores`: the result. One row a sentence, one pair of columns a query, every setting in the metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .digests import digest
from .errors import InputError
from .files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

ORDERS = ("absolute", "harmful", "helpful")
METADATA_KEY = b"hf_msif"


@dataclass
class Scores:
    """Influence of every scored row on the test loss.

    Columns of `frame`: `example_id`, `text` (empty for an image), `text_sha256` (of the text or the image),
    `duplicates` (rows with the same one, this one included), `loss` (ℓ of the row, a sum), `terms` (how many it
    sums), then a pair a query column:

    - `influence` = ∂f/∂ε for F + ε ℓ_x, eq. (6). Positive: more of x raises the test loss (harmful). Negative: it
      helps.
    - `removal_effect` = −influence / N: predicted change of the test loss when x is removed and all stages are
      trained again.

    With several query columns the names end in `_0`, `_1`, … in the order of the test examples.
    """

    frame: pd.DataFrame
    metadata: dict = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        rows: Sequence[dict],
        influence: np.ndarray,
        count: float,
        columns: dict[str, list],
        metadata: dict,
        text_column: str = "text",
    ) -> Scores:
        """Assembles scores from rows in corpus order and an array of influences, shape (rows, Q)."""
        import pandas as pd

        contents = [row.get(text_column, "") for row in rows]
        texts = [value if isinstance(value, str) else "" for value in contents]  # an image has none
        table = {
            "example_id": [row["example_id"] for row in rows],
            "text": texts,
            "text_sha256": [
                hashlib.sha256(value.encode()).hexdigest() if isinstance(value, str) else digest(value)
                for value in contents
            ],
        }
        frame = pd.DataFrame({**table, **columns})
        frame.insert(3, "duplicates", frame.groupby("text_sha256")["text_sha256"].transform("size"))
        width, pairs = influence.shape[1], {}
        for q in range(width):
            suffix = "" if width == 1 else f"_{q}"
            pairs[f"influence{suffix}"] = influence[:, q]
            pairs[f"removal_effect{suffix}"] = -influence[:, q] / count
        # At once: pandas warns about a frame that grows by more than a hundred columns, one by one.
        return cls(pd.concat([frame, pd.DataFrame(pairs)], axis=1), {**metadata, "columns": width})

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def columns(self) -> int:
        """Number of query columns."""
        return self.metadata["columns"]

    def influence(self, query: int = 0) -> np.ndarray:
        """Influence on the loss of test example number `query`, in corpus order."""
        return self.frame[f"influence{self._suffix(query)}"].to_numpy()

    def removal_effects(self) -> np.ndarray:
        """Predicted changes of all test losses on removal of each row, shape (rows, queries)."""
        return self.frame[[f"removal_effect{self._suffix(q)}" for q in range(self.columns)]].to_numpy()

    def top(self, k: int = 10, by: str = "absolute", query: int = 0) -> pd.DataFrame:
        """The first k rows by "absolute" influence, or as "harmful" (most positive), or "helpful" (most negative)."""
        return self._ordered(by, query).head(k)

    def bottom(self, k: int = 10, by: str = "absolute", query: int = 0) -> pd.DataFrame:
        """The k rows at the other end of the order: with "absolute", the least influential ones, smallest first."""
        return self._ordered(by, query).iloc[::-1].head(k).reset_index(drop=True)

    def to_pandas(self) -> pd.DataFrame:
        return self.frame.copy()

    def to_dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_pandas(self.frame, preserve_index=False)

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Writes one Parquet file with the metadata in its schema, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        packed = json.dumps(self.metadata, default=str, ensure_ascii=False).encode()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: packed})
        write_whole(path, lambda part: pq.write_table(table, part))

    @classmethod
    def from_parquet(cls, path: str | os.PathLike) -> Scores:
        """Reads what `to_parquet` wrote.

        Raises:
            InputError: there is no such file, or it holds no scores.
        """
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise InputError(
                f"{path} does not exist; expected the Parquet file that `msif score` or `Scores.to_parquet` writes."
            )
        table = pq.read_table(path)
        packed = (table.schema.metadata or {}).get(METADATA_KEY)
        if packed is None:
            raise InputError(
                f"{path} is a Parquet file without scores' metadata; expected one that `Scores.to_parquet` wrote."
            )
        return cls(table.to_pandas(), json.loads(packed))

    def _suffix(self, query: int) -> str:
        if not 0 <= query < self.columns:
            raise InputError(
                f"query column {query} does not exist; these scores have {self.columns} (numbered from 0)."
            )
        return "" if self.columns == 1 else f"_{query}"

    def _ordered(self, by: str, query: int) -> pd.DataFrame:
        if by not in ORDERS:
            raise InputError(f"by is {by!r}; expected one of {list(ORDERS)}.")
        suffix = self._suffix(query)
        value = self.frame[f"influence{suffix}"]
        key = {"absolute": -value.abs(), "harmful": -value, "helpful": value}[by]
        shown = self.frame.rename(
            columns={f"influence{suffix}": "influence", f"removal_effect{suffix}": "removal_effect"}
        )
        names = ["example_id", "influence", "removal_effect", "loss", "terms", "duplicates", "text"]
        return shown.loc[key.sort_values(kind="stable").index, names].reset_index(drop=True)
