"""`score`: the influence of every row of a corpus, in rounds, by all processes."""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.corpus import as_corpus
from ..engine.stream import Stream
from ..errors import InputError
from ..objectives.classification import class_names, class_of, label_name
from .compared import Compared, compared
from .extremes import ExtremesInMemory, ExtremesOnDisk
from .frames import frame_of, influence_columns
from .in_memory import InMemory
from .noise import Noise
from .on_disk import PartsOnDisk
from .scorable import Measured, Scorable, measure
from .scores import Scores
from .sinks import NullSink, Sink, WriteBehind
from .summary import Extremes

if TYPE_CHECKING:
    import pandas as pd

PART_ROWS = 4096
ROUND_BATCHES = 16  # per process, at least
DTYPES = ("float32", "tf32", "bfloat16")
PRECISION_ROWS = 64  # scored in the requested and in the model's own precision


def score(
    scorable: Scorable,
    corpus,
    batch_size: int | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    keep: int | None = None,
    dtype: str | None = None,
    part_rows: int = PART_ROWS,
    noise: Noise | None = None,
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
        noise: of the query's replicates; defaults to what rows of the corpus tell, see `compared`.

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
    known = None if noise is None else Compared(noise)
    total = None if isinstance(source, Stream) else len(source)
    with opened as sink:
        with (
            engine.bar(total=total, desc=f"scoring {scorable.stage}", unit=" rows") as bar,
            scorable.model.evaluating(),
        ):
            take = partial(measure, scorable, batch_size=batch_size, dtype=reduced_dtype, bar=bar)
            for rows in engine.rounds(source, parts_per_round * part_rows):
                known = known or compared(scorable, source, rows, take)
                parts = _parts(rows, done // part_rows, part_rows)
                with engine.raising_together():
                    missing = [number for number, part in parts.items() if sink.missing(number, part)]
                missing_parts = {number: parts[number] for number in engine.broadcast_object(missing)}
                missing_rows = [row for part in missing_parts.values() for row in part]
                if missing_rows:
                    if reduced_dtype and dtype_error is None:
                        error = _precision_error(scorable, missing_rows, batch_size, reduced_dtype)
                        dtype_error = {"dtype": dtype, **error}
                    numbers = [n * part_rows + i for n, part in missing_parts.items() for i in range(len(part))]
                    measured = known.completed(numbers, missing_rows, take)
                    with engine.raising_together():
                        _add_parts(sink, scorable, missing_parts, measured, known.noise)
                done += len(rows)
                scored_before += len(rows) - len(missing_rows)
                bar.initial = scored_before  # they took no time in this call
                bar.n = done
                bar.refresh()
                engine.log({"scored": done, "sentences_a_second": done / (time.perf_counter() - started)}, done)
        metadata = {**scorable.metadata, "columns": scorable.columns}
        if known is not None and known.noise is not None:
            metadata |= {"noise": known.noise.to_dict(), "noise_text": str(known.noise)}
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


def _add_parts(
    sink: Sink, scorable: Scorable, parts: dict[int, list[dict]], measured: Measured, noise: Noise | None
) -> None:
    """Hands the parts to the sink; `measured` holds their rows, one part after another."""
    start = 0
    for number, rows in parts.items():
        measured_part = measured.slice(start, start + len(rows))
        start += len(rows)
        # A function: the thread that writes makes the frame, too.
        sink.add(
            number, rows, partial(_frame, scorable, rows, measured_part, noise), int(measured_part.truncated.sum())
        )


def _frame(scorable: Scorable, rows: list[dict], measured: Measured, noise: Noise | None) -> pd.DataFrame:
    """The columns of `Scores`, without `duplicates`."""
    contents = [{"example_id": row["example_id"], "text": scorable.objective.content(row)} for row in rows]
    columns = {"loss": measured.losses, "terms": measured.counts, **_labels(scorable, rows)}
    columns |= dict(zip(scorable.norms, measured.norms.T, strict=True))
    errors = None if noise is None else noise.standard_errors(measured.replicates)
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

    rows = rows[:: max(1, len(rows) // PRECISION_ROWS)][:PRECISION_ROWS]
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
