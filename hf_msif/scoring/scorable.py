"""`Scorable`: what scoring needs to know of a question; `measure`: the influences of rows, by all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import Engine
from ..errors import InputError
from ..objectives import Objective
from .noise import Noise


class RowInfluence(NamedTuple):
    """The influences of the rows of a batch.

    Attributes:
        influence: (B, Q) in float64: I(x) of each row for each query column, eq. (6).
        losses: (B,): ℓ of each row, a sum.
        counts: (B,): how many terms ℓ sums.
        replicates: (B, R, Q) in float64: the influences by each of R independent replicates of the query, of which
            `influence` is the mean; None: there is one.
        norms: (B, len(`Scorable.norms`)): what relative influence divides by; None where nothing is asked for.
    """

    influence: Tensor
    losses: Tensor
    counts: Tensor
    replicates: Tensor | None = None
    norms: Tensor | None = None


@dataclass(frozen=True)
class Scorable:
    """What scoring needs to know of a question and of the stage whose rows are ranked; `influence.Query` makes it.

    Attributes:
        stage: name of the stage.
        file_name: of the finished file: "scores.parquet", or "scores-NAME.parquet" for another stage than the first.
        engine: deals the rows out to the processes.
        model: the stage's model.
        objective: makes batches of rows; its `content(row)` is written beside the scores.
        batch_size: rows per batch, unless `score` is asked for another size.
        columns: Q, the number of query columns.
        count: N of the stage: the removal of a row has the effect −influence / N.
        influence: (batch on the device, its rows) → `RowInfluence`; called inside `model.evaluating()` and in the
            requested precision.
        dtype: the model's own precision, for messages.
        metadata: of the finished scores: the stage, N, its objective, the certificate, the test rows.
        identity: returns what the scores depend on: name for people → digest; called for scores on disk only.
        noise: returns the noise of the query's replicates, for standard errors; asked where the rows that are scored
            are too few to tell it, see `compared`; None: there is one replicate.
        seed: of the sample on which replicates are compared.
        norms: names of the columns of `RowInfluence.norms`, see `orders.NORMS`.
    """

    stage: str
    file_name: str
    engine: Engine
    model: FunctionalModel
    objective: Objective
    batch_size: int
    columns: int
    count: float
    influence: Callable[[dict, list[dict]], RowInfluence]
    dtype: torch.dtype
    metadata: dict[str, Any]
    identity: Callable[[], dict[str, Any]]
    noise: Callable[[], Noise] | None = None
    seed: int = 0
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What was measured of n rows.

    Attributes:
        values: one line per row: its loss, number of terms, 1 where it was truncated, its norms, its influences, and
            those by each replicate, where there are several.
        norms_per_row: how many columns are norms.
        columns: Q.
    """

    values: np.ndarray
    norms_per_row: int
    columns: int

    @property
    def losses(self) -> np.ndarray:
        """(n,)."""
        return self.values[:, 0]

    @property
    def counts(self) -> np.ndarray:
        """(n,)."""
        return self.values[:, 1]

    @property
    def truncated(self) -> np.ndarray:
        """(n,)."""
        return self.values[:, 2]

    @property
    def norms(self) -> np.ndarray:
        """(n, len(`Scorable.norms`))."""
        return self.values[:, 3 : 3 + self.norms_per_row]

    @property
    def influence(self) -> np.ndarray:
        """(n, Q)."""
        return self.values[:, 3 + self.norms_per_row :][:, : self.columns]

    @property
    def replicates(self) -> np.ndarray:
        """(n, R, Q), with R = 0 where there is one replicate."""
        return self.values[:, 3 + self.norms_per_row + self.columns :].reshape(len(self.values), -1, self.columns)

    def slice(self, start: int, end: int) -> Measured:
        """The rows from `start` to before `end`."""
        return replace(self, values=self.values[start:end])


def measure(scorable: Scorable, rows: list[dict], batch_size: int, dtype: str | None, bar=None) -> Measured:
    """Every process scores its share of the rows; every process gets all results."""
    engine = scorable.engine
    share: list[tuple[list[int], np.ndarray]] = []  # (places of a batch's rows, their columns)
    end = len(rows) + (bar.n if bar is not None else 0)
    with engine.raising_together():
        for indices, batch in engine.batches(rows, scorable.objective, batch_size):
            batch_rows = [rows[i] for i in indices]
            with _matrix_products_in(dtype, engine.device):
                influence, losses, counts, replicates, norms = scorable.influence(batch, batch_rows)
            truncated = batch.get("truncated", torch.zeros(len(indices))).to(losses.device)
            norms = losses.new_zeros(len(losses), 0) if norms is None else norms
            columns = [column.double() for column in (losses, counts, truncated, norms, influence)]
            if replicates is not None:
                columns.append(replicates.flatten(1).double())
            values = torch.column_stack(columns).cpu().numpy()  # one transfer per batch
            check_finite(values, batch_rows)
            share.append((indices, values))
            if bar is not None:
                bar.update(min(len(indices) * engine.processes, end - bar.n))
    # One array per process: many small ones are slow to gather.
    whole_share = [tuple(np.concatenate(arrays) for arrays in zip(*share, strict=True))] if share else []
    places, values = (np.concatenate(arrays) for arrays in zip(*engine.gather(whole_share), strict=True))
    return Measured(values[np.argsort(places)], len(scorable.norms), scorable.columns)


def check_finite(values: np.ndarray, rows: list[dict]) -> None:
    """Refuses a NaN or inf in the lines of `values`, one per entry of `rows`."""
    finite = np.isfinite(values).all(1)
    bad_ids = [row["example_id"] for row, is_finite in zip(rows, finite, strict=True) if not is_finite]
    if bad_ids:
        raise InputError(
            f"the loss (or its derivative) of the rows with example_id {bad_ids[:5]} is not finite: check the model's "
            "weights and inputs."
        )


@contextmanager
def _matrix_products_in(dtype: str | None, device: torch.device) -> Iterator[None]:
    # TF32 where the hardware has it. Inside, the older torch.get_float32_matmul_precision raises.
    if dtype == "tf32":
        before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16) if dtype else nullcontext():
            yield
