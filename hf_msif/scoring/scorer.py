"""Scores a corpus for a query by per-example directional derivatives; no per-example gradient is ever stored."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import vectors
from ..curvature.derivatives import Evaluation, directional
from ..engine.corpus import Stream, as_corpus
from ..engine.hashing import describe, digest, objective_fingerprint, tensors_fingerprint
from ..errors import InputError
from ..influence.chain import Link
from ..influence.query import Query
from .scores import Scores, frame_of, influence_columns
from .sinks import Collected, KeptParts, Parts
from .summary import Extremes

if TYPE_CHECKING:
    import pandas as pd

PART_ROWS = 4096
DTYPES = ("float32", "tf32", "bfloat16")
COMPARED = 64  # rows scored in both precisions


def score(
    query: Query,
    corpus,
    stage: str | None = None,
    batch_size: int | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    keep: int | None = None,
    dtype: str | None = None,
    part_rows: int = PART_ROWS,
) -> Scores:
    """I(x) = −⟨u_k, ∇ℓ_x⟩ for every row x of `corpus`: one forward-mode pass a query column, 3 F a column.

    Of an unrolled stage the rows are its own, and I(x) = N ∂f/∂w_x is known already; a forward pass adds their losses.
    See `Query.score` for the arguments.

    Raises:
        InputError: empty corpus, unknown stage, a setting out of range, a loss that is not finite (rows are named), a
            row that an unrolled stage's run did not see, or an interrupted scoring of something else in `output_dir`.
    """
    link = query.chain.link(stage)
    _check(batch_size, keep, dtype, part_rows, resume, output_dir)
    source = as_corpus(corpus, "the corpus")
    engine, size = link.engine, batch_size or link.stage.batch_size
    scorer = _Scorer(query, link, size, None if dtype == "float32" else dtype)
    path = None if output_dir is None else Path(output_dir) / _file_name(query, link)
    with engine.together():
        sink = _sink(scorer, path, resume, keep, dtype, part_rows) if path is None or engine.is_main else None
    # Enough rows at a time that sorting them by length pays, on every process, and that what happens once a round
    # (its first batch is waited for, results are gathered) is little.
    parts_a_round = math.ceil(16 * size * engine.processes / part_rows)
    done, started, error = 0, time.perf_counter(), None
    total = None if isinstance(source, Stream) else len(source)
    bar = engine.bar(total=total, desc=f"scoring {link.stage.name}", unit=" sentences")
    with bar, link.model.evaluating(), _Writer() as writer:
        for rows in engine.rounds(source, parts_a_round * part_rows):
            numbered = {(done + i) // part_rows: rows[i : i + part_rows] for i in range(0, len(rows), part_rows)}
            with engine.together():
                writer.check()
                todo = [n for n, some in numbered.items() if sink.missing(n, some)] if sink is not None else None
            todo = engine.broadcast(todo)
            pending = [row for n in todo for row in numbered[n]]
            if pending:
                if scorer.dtype and error is None:
                    error = scorer.error(pending)
                found = scorer.measured(pending, bar)
                with engine.together():
                    writer.wait()
                    if sink is not None:
                        writer.start(_hand_over, scorer, sink, todo, numbered, found)
            done += len(rows)
            bar.n = done
            bar.refresh()
            engine.log({"scored": done, "sentences_a_second": done / (time.perf_counter() - started)}, done)
        with engine.together():
            writer.wait()
    metadata = scorer.metadata | {"columns": query.columns}
    if error is not None:
        metadata["dtype_error"] = {"dtype": dtype, **error}
    if path is None:
        return sink.scores(metadata)
    with engine.together():
        if engine.is_main:
            sink.finish(-(-done // part_rows), metadata)
    return Scores.from_parquet(path)


class _Writer:
    """One write at a time, in a thread, while the next round is scored."""

    def __enter__(self) -> _Writer:
        self.pool, self.pending = ThreadPoolExecutor(1), None
        return self

    def start(self, write: Callable, *arguments) -> None:
        self.pending: Future | None = self.pool.submit(write, *arguments)

    def check(self) -> None:
        """Raises what a write that has ended raised."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        if self.pending is not None:
            wait([self.pending])  # interrupted, it stays to be asked for
            pending, self.pending = self.pending, None
            pending.result()

    def __exit__(self, kind, error, trace) -> None:
        self.pool.shutdown()
        failed = self.pending.exception() if self.pending is not None else None
        if failed is not None:  # then the block has failed, too
            error.add_note(f"Writing the scores before failed as well: {failed}")


def _check(batch_size, keep, dtype, part_rows, resume, output_dir) -> None:
    for name, value in (("batch_size", batch_size), ("keep", keep), ("part_rows", part_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            way_out = ", or None for the stage's own" if name == "batch_size" else ""
            raise InputError(f"{name} is {value!r}; expected at least 1{way_out}.")
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}; expected one of {list(DTYPES)}, or None for the model's own.")
    if resume and output_dir is None:
        raise InputError("resume needs output_dir, the folder in which the interrupted scoring kept its parts.")


def _file_name(query: Query, link: Link) -> str:
    first = query.chain.links[0] is link
    return "scores.parquet" if first else f"scores-{link.stage.name}.parquet"


def _sink(scorer: _Scorer, path: Path | None, resume: bool, keep: int | None, dtype: str | None, part_rows: int):
    """Where scores go: memory, parts on disk, or an account of the extremes in either."""
    extremes = Extremes(keep, influence_columns(scorer.query.columns)) if keep else None
    if path is None:
        return Collected(extremes)
    manifest = {**scorer.identity, "keep": keep, "dtype": dtype or "float32", "part_rows": part_rows}
    if extremes is not None:
        return KeptParts(path, manifest, resume, extremes)
    return Parts(path, manifest, resume)


def _hand_over(scorer: _Scorer, sink, todo: Sequence[int], numbered: dict[int, list[dict]], found: _Found) -> None:
    start = 0
    for number in todo:
        rows = numbered[number]
        own = slice(start, start + len(rows))
        start += len(rows)
        sink.add(number, rows, scorer.frame(rows, found, own), int(found.cut[own].sum()))


@dataclass
class _Found:
    """Of rows in their order: influence (rows, Q), and loss, terms and whether the text was cut, (rows,)."""

    influence: np.ndarray
    loss: np.ndarray
    terms: np.ndarray
    cut: np.ndarray


class _Scorer:
    """A query's stage at work on rows."""

    def __init__(self, query: Query, link: Link, batch_size: int, dtype: str | None):
        self.query, self.link, self.engine = query, link, link.engine
        self.objective, self.batch_size, self.dtype = link.stage.objective, batch_size, dtype
        self.u = query.solutions[link.stage.name]
        self.count = query.facts[link.stage.name]["N"]

    def measured(self, rows: list[dict], bar=None, reduced: bool = True) -> _Found:
        """Every process scores its share; all of them get everything."""
        mine: list[tuple[list[int], np.ndarray]] = []
        end = len(rows) + (bar.n if bar is not None else 0)
        with self.engine.together():
            recorded = self._recorded(rows) if self.link.recording is not None else None
            for indices, batch in self.engine.batches(rows, self.objective, self.batch_size):
                known = None if recorded is None else recorded[indices]
                values = self._batch(batch, known, self.dtype if reduced else None)
                _check_finite(values, [rows[i] for i in indices])
                cut = batch.get("truncated", torch.zeros(len(indices))).to(values)
                mine.append((indices, torch.column_stack([values, cut]).cpu().numpy()))
                if bar is not None:
                    bar.update(min(len(indices) * self.engine.processes, end - bar.n))
        own = [(np.concatenate([i for i, _ in mine]), np.concatenate([v for _, v in mine]))] if mine else []
        found = self.engine.gather(own)
        order, values = (np.concatenate(column) for column in zip(*found, strict=True))
        values = values[np.argsort(order)]
        return _Found(values[:, 2:-1], values[:, 0], values[:, 1], values[:, -1])

    def _batch(self, batch: dict, recorded: torch.Tensor | None, dtype: str | None) -> torch.Tensor:
        """(B, 2 + Q) in float64: loss, terms, influences."""
        evaluation = Evaluation(self.link.model, self.objective, batch)
        with _computing_in(dtype, self.engine.device):
            if recorded is not None:
                with torch.no_grad():
                    sums, counts = evaluation.losses({})
                slopes = [recorded]
            else:
                slopes = []
                for q in range(self.query.columns):
                    slope, sums, counts = directional(evaluation, vectors.column(self.u, q))
                    slopes.append(-slope.double())
        return torch.column_stack([sums.double(), counts.double(), *slopes])

    def frame(self, rows: list[dict], found: _Found, own: slice) -> pd.DataFrame:
        """The rows' columns of `Scores`."""
        column = self.objective.content_column
        columns = {"loss": found.loss[own], "terms": found.terms[own]}
        return frame_of(rows, found.influence[own], self.count, columns, column)

    def error(self, rows: list[dict]) -> dict[str, Any]:
        """Of the reduced precision against the model's own, on some of the rows: the root mean square of the
        differences in units of that of the influences, and the rank correlation; worst column."""
        from scipy.stats import spearmanr

        some = rows[:: max(1, len(rows) // COMPARED)][:COMPARED]
        low, high = (self.measured(some, reduced=on).influence for on in (True, False))
        size = np.sqrt((high**2).mean(0)).clip(min=np.finfo(float).tiny)
        relative = float((np.sqrt(((low - high) ** 2).mean(0)) / size).max())
        ranks = [spearmanr(x, y).statistic for x, y in zip(low.T, high.T, strict=True)] if len(some) > 2 else [np.nan]
        found = {"rows": len(some), "relative": relative, "rank_correlation": float(min(ranks))}
        if self.engine.is_main:
            print(
                f"{self.dtype} against {next(iter(self.u.values())).dtype} on {len(some)} rows: relative error "
                f"{relative:.1e}, rank correlation {found['rank_correlation']:.4f}"
            )
        return found

    @cached_property
    def metadata(self) -> dict[str, Any]:
        found = {"stage": self.link.stage.name, "N": self.count, "objective": describe(self.objective)}
        return found | {"certificate": self.query.certificate(), "tests": self.query.tests}

    @property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on, name → digest."""
        found = {"the ranked stage": self.link.stage.name}
        for name, facts in self.query.facts.items():
            found[f"the model of stage {name!r}"] = facts["fingerprint"]
        found["the query"] = digest(
            [tensors_fingerprint(self.u), self.query.plain_tests, self.query.aggregate or "", self.count]
        )
        found["the objective or its tokenizer"] = objective_fingerprint(self.objective)
        return found

    def _recorded(self, rows: list[dict]) -> torch.Tensor:
        """N ∂f/∂w of the rows, (rows, Q)."""
        places = self._places
        for row in rows:
            if places.get(row["example_id"], ("", ""))[1] != digest(row):
                raise InputError(
                    f"the row {row['example_id']!r} is not one of the rows that stage {self.link.stage.name!r} was "
                    "trained on: through its run (link='unrolled') only those have an influence. Score rows of its "
                    "data, or use link='proximal'."
                )
        return self.count * self.u["weights"].T[[places[row["example_id"]][0] for row in rows]]

    @cached_property
    def _places(self) -> dict[Any, tuple[int, str]]:
        return {row["example_id"]: (i, digest(row)) for i, row in enumerate(self.link.rows)}


@contextmanager
def _computing_in(dtype: str | None, device: torch.device) -> Iterator[None]:
    # Matrix products alone, where the hardware has them; inside, torch.get_float32_matmul_precision (older) raises.
    if dtype == "tf32":
        before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16) if dtype else nullcontext():
            yield


def _check_finite(values: torch.Tensor, rows: list[dict]) -> None:
    fine = torch.isfinite(values).all(1).tolist()
    bad = [row["example_id"] for row, ok in zip(rows, fine, strict=True) if not ok]
    if bad:
        raise InputError(
            f"the loss (or its derivative) of the rows with example_id {bad[:5]} is not finite: check the model's "
            "weights and inputs."
        )
