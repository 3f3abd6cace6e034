"""`score`: the influence of every row of a corpus, in rounds, by all processes; `Scorable`: what it needs to know."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import Engine
from ..engine.corpus import as_corpus
from ..engine.stream import Stream
from ..errors import InputError
from ..objectives import Objective
from ..objectives.classification import class_names, class_of, label_name
from .extremes import ExtremesInMemory, ExtremesOnDisk
from .frames import frame_of, influence_columns
from .in_memory import InMemory
from .noise import Noise
from .on_disk import PartsOnDisk
from .scores import Scores
from .sinks import NullSink, Sink, WriteBehind
from .summary import Extremes

if TYPE_CHECKING:
    import pandas as pd

PART_ROWS = 4096
ROUND_BATCHES = 16  # per process, at least
DTYPES = ("float32", "tf32", "bfloat16")
COMPARED_ROWS = 64  # scored in the requested and in the model's own precision


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
        noise: of the query's replicates, for standard errors; None: there is one replicate.
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
    noise: Noise | None = None
    norms: tuple[str, ...] = ()


def score(
    scorable: Scorable,
    corpus,
    batch_size: int | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    keep: int | None = None,
    dtype: str | None = None,
    part_rows: int = PART_ROWS,
) -> Scores:
    """I(x), eq. (6), of every row x of `corpus` for every query column.

    The corpus is read in rounds of consecutive rows, and a round is cut into parts of `part_rows` rows. The processes
    share the rows of the parts that are missing in the sink, and gather their influences once per round; the main
    process hands them to the sink, which writes them while the next round is scored.

    Args:
        scorable: the question, and the stage whose rows are ranked.
        corpus: a table or a stream of rows, see `corpus.as_corpus`.
        batch_size: rows per batch; defaults to the stage's. It does not change a score.
        output_dir: folder for the finished file, and for the parts until it is finished. Defaults to none: the scores
            are in memory, on every process.
        resume: continue an interrupted scoring in `output_dir`, on any number of processes.
        keep: keep only the `keep` rows of largest, of smallest and of least absolute influence per query column, and
            the first and last ones by each relative order whose norms are there, with moments and a histogram of all;
            defaults to all rows.
        dtype: "tf32" or "bfloat16": the precision of matrix products. Its error is measured on 64 rows, printed, and
            in the metadata as `dtype_error`. Defaults to the model's own precision, as does "float32".
        part_rows: rows per part.

    Returns:
        `Scores`, on every process.

    Raises:
        InputError: the corpus is empty, a setting is out of range, a loss is not finite (the rows are named), the
            disk is full, or `output_dir` holds an interrupted scoring and either `resume` is false or what that
            scoring depends on has changed (it is named).
    """
    check_settings(batch_size, keep, dtype, part_rows, resume, output_dir)
    engine, source = scorable.engine, as_corpus(corpus, "the corpus")
    batch_size, reduced_dtype = batch_size or scorable.batch_size, None if dtype == "float32" else dtype
    # A round is long enough that sorting its rows by length pays on every process, and that what happens once per
    # round (waiting for its first batch, gathering its results) costs little.
    parts_per_round = math.ceil(ROUND_BATCHES * batch_size * engine.processes / part_rows)
    path = None if output_dir is None else Path(output_dir) / scorable.file_name
    with engine.raising_together():
        opened = _open_sink(scorable, path, resume, keep, dtype, part_rows, parts_per_round)
    done, scored_before, started, dtype_error = 0, 0, time.perf_counter(), None
    total = None if isinstance(source, Stream) else len(source)
    with opened as sink:
        with (
            engine.bar(total=total, desc=f"scoring {scorable.stage}", unit=" rows") as bar,
            scorable.model.evaluating(),
        ):
            for rows in engine.rounds(source, parts_per_round * part_rows):
                parts = _parts(rows, done // part_rows, part_rows)
                with engine.raising_together():
                    missing = [number for number, part in parts.items() if sink.missing(number, part)]
                missing_parts = {number: parts[number] for number in engine.broadcast_object(missing)}
                missing_rows = [row for part in missing_parts.values() for row in part]
                if missing_rows:
                    if reduced_dtype and dtype_error is None:
                        error = _precision_error(scorable, missing_rows, batch_size, reduced_dtype)
                        dtype_error = {"dtype": dtype, **error}
                    measured = measure(scorable, missing_rows, batch_size, reduced_dtype, bar)
                    with engine.raising_together():
                        _add_parts(sink, scorable, missing_parts, measured)
                done += len(rows)
                scored_before += len(rows) - len(missing_rows)
                bar.initial = scored_before  # they took no time in this call
                bar.n = done
                bar.refresh()
                engine.log({"scored": done, "sentences_a_second": done / (time.perf_counter() - started)}, done)
        metadata = {**scorable.metadata, "columns": scorable.columns}
        if dtype_error is not None:
            metadata["dtype_error"] = dtype_error
        for turn in (engine.is_main, not engine.is_main):  # the other processes read the file of the main one
            with engine.raising_together():
                if turn:
                    scores = sink.finish(math.ceil(done / part_rows), metadata)
    return scores


def check_settings(batch_size, keep, dtype, part_rows, resume, output_dir) -> None:
    for name, value in (("batch_size", batch_size), ("keep", keep), ("part_rows", part_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            way_out = ", or None for the stage's own" if name == "batch_size" else ""
            raise InputError(f"{name} is {value!r}; expected at least 1{way_out}.")
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}; expected one of {list(DTYPES)}, or None for the model's own.")
    if resume and output_dir is None:
        raise InputError("resume needs output_dir, the folder in which the interrupted scoring kept its parts.")


def _open_sink(
    scorable: Scorable,
    path: Path | None,
    resume: bool,
    keep: int | None,
    dtype: str | None,
    part_rows: int,
    parts_per_round: int,
) -> AbstractContextManager[Sink]:
    """The sink of this process: every process has its own scores in memory, the main one alone has a file."""
    extremes = Extremes(keep, influence_columns(scorable.columns), scorable.norms) if keep else None
    sink: Sink
    if path is None:
        sink = InMemory() if extremes is None else ExtremesInMemory(extremes)
    elif not scorable.engine.is_main:
        return nullcontext(NullSink(path))  # without a thread, so that no frame is made
    else:
        manifest = {**scorable.identity(), "keep": keep, "dtype": dtype or "float32", "part_rows": part_rows}
        manifest["norms"] = scorable.norms or None
        if extremes is None:
            sink = PartsOnDisk(path, manifest, resume)
        else:
            sink = ExtremesOnDisk(path, manifest, resume, extremes)
    return WriteBehind(sink, ahead=parts_per_round)


def _parts(rows: list[dict], first: int, part_rows: int) -> dict[int, list[dict]]:
    """Number → rows of the parts that consecutive rows are cut into; the first part has the number `first`."""
    starts = range(0, len(rows), part_rows)
    return {number: rows[start : start + part_rows] for number, start in enumerate(starts, first)}


def _add_parts(sink: Sink, scorable: Scorable, parts: dict[int, list[dict]], measured: Measured) -> None:
    """Hands the parts to the sink; `measured` holds their rows, one part after another."""
    start = 0
    for number, rows in parts.items():
        measured_part = measured.slice(start, start + len(rows))
        start += len(rows)
        # A function: the thread that writes makes the frame, too.
        sink.add(number, rows, partial(_frame, scorable, rows, measured_part), int(measured_part.truncated.sum()))


@dataclass(frozen=True)
class Measured:
    """Of n rows in their order: influence (n, Q); loss, number of terms, and 1 where the row was truncated, (n,); the
    norms (n, len(`Scorable.norms`)); the influences by each replicate, (n, R, Q), with R = 0 where there is one."""

    influence: np.ndarray
    losses: np.ndarray
    counts: np.ndarray
    truncated: np.ndarray
    norms: np.ndarray
    replicates: np.ndarray

    def slice(self, start: int, end: int) -> Measured:
        columns = (self.influence, self.losses, self.counts, self.truncated, self.norms, self.replicates)
        return Measured(*(column[start:end] for column in columns))


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
    values = values[np.argsort(places)]
    start = 3 + len(scorable.norms)
    end = start + scorable.columns
    return Measured(
        influence=values[:, start:end],
        losses=values[:, 0],
        counts=values[:, 1],
        truncated=values[:, 2],
        norms=values[:, 3:start],
        replicates=values[:, end:].reshape(len(values), -1, scorable.columns),
    )


def check_finite(values: np.ndarray, rows: list[dict]) -> None:
    """Refuses a NaN or inf in the lines of `values`, one per entry of `rows`."""
    finite = np.isfinite(values).all(1)
    bad_ids = [row["example_id"] for row, is_finite in zip(rows, finite, strict=True) if not is_finite]
    if bad_ids:
        raise InputError(
            f"the loss (or its derivative) of the rows with example_id {bad_ids[:5]} is not finite: check the model's "
            "weights and inputs."
        )


def _frame(scorable: Scorable, rows: list[dict], measured: Measured) -> pd.DataFrame:
    """The columns of `Scores`, without `duplicates`."""
    contents = [{"example_id": row["example_id"], "text": scorable.objective.content(row)} for row in rows]
    columns = {"loss": measured.losses, "terms": measured.counts, **_labels(scorable, rows)}
    columns |= dict(zip(scorable.norms, measured.norms.T, strict=True))
    errors = None if scorable.noise is None else scorable.noise.standard_errors(measured.replicates)
    return frame_of(contents, measured.influence, scorable.count, columns, errors=errors)


def _labels(scorable: Scorable, rows: list[dict]) -> dict[str, list[str]]:
    """The column `label`, names of classes, of rows that have one class each."""
    objective = scorable.objective
    column = getattr(objective, "label_column", None)
    if objective.label_kind != "class" or column is None:
        return {}
    names, values = class_names(objective, scorable.model.model), [row[column] for row in rows]
    numbers = [class_of(value, objective.labels) for value in values]
    return {"label": [str(v) if n is None else label_name(n, names) for v, n in zip(values, numbers, strict=True)]}


def _precision_error(scorable: Scorable, rows: list[dict], batch_size: int, dtype: str) -> dict[str, Any]:
    """How far influences in `dtype` are from those in the model's own precision, on some of the rows: the root mean
    square of the differences relative to that of the influences, and Spearman's rank correlation; of the worst query
    column."""
    from scipy.stats import spearmanr

    rows = rows[:: max(1, len(rows) // COMPARED_ROWS)][:COMPARED_ROWS]
    reduced, exact = (measure(scorable, rows, batch_size, precision).influence for precision in (dtype, None))
    scale = np.sqrt((exact**2).mean(0)).clip(min=np.finfo(float).tiny)
    relative = float((np.sqrt(((reduced - exact) ** 2).mean(0)) / scale).max())
    correlations = [np.nan]
    if len(rows) > 2:
        correlations = [spearmanr(x, y).statistic for x, y in zip(reduced.T, exact.T, strict=True)]
    error = {"rows": len(rows), "relative": relative, "rank_correlation": float(min(correlations))}
    if scorable.engine.is_main:
        print(
            f"{dtype} against {scorable.dtype} on {len(rows)} rows: relative error {relative:.1e}, rank correlation "
            f"{error['rank_correlation']:.4f}"
        )
    return error


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
