"""`shortlist`: a pass over the corpus in reduced precision, and exact scores of the rows that it puts first."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.corpus import as_corpus
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import InputError
from .scorer import PART_ROWS, Scorable, check_settings, measure, score
from .scores import Scores, influence_columns
from .summary import Extremes

WIDTH = 4  # rows on the shortlist for each row that is kept
SAMPLE_ROWS = 512  # on which the recall is measured
RECALL_AT = 10
READ_ROWS = 65_536  # at a time, where the rows of the shortlist are looked up


def shortlist(
    scorable: Scorable,
    corpus: Any,
    keep: int,
    dtype: str,
    batch_size: int | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    part_rows: int = PART_ROWS,
) -> Scores:
    """The `keep` extreme rows of each order with their exact scores, of a corpus that is scored in `dtype`.

    The pass in `dtype` puts 4 × `keep` rows per order on a shortlist; these alone are scored in the model's own
    precision, which needs the corpus to be read once more. What the shortlist may have missed is measured and printed:
    its recall on a random sample that is scored in both ways, and how deep in it the rows lie that are kept.

    Args:
        scorable, corpus, batch_size, output_dir, part_rows: as those of `scorer.score`.
        keep: rows of each order.
        dtype: "tf32" or "bfloat16".
        resume: continue an interrupted scoring in `output_dir`; also where the pass over the corpus was finished.

    Returns:
        `Scores` whose `metadata["kept"]` has the moments of all rows in `dtype`. `metadata["shortlist"]`:

        - `dtype`, `candidates`: how many rows were scored exactly;
        - `recall`: on `recall_rows` random rows, which share of the ten largest and the ten smallest influences
          is among the forty first by `dtype`, mean of the query columns; None for a corpus too small to tell.
          `recall_at_least` is what it exceeds with 95 % confidence (Clopper & Pearson, 1934);
        - `deepest`, `length`: the last place on the shortlist of a row that is kept in the order of most harmful or of
          most helpful rows, and the length of the shortlist of one order.

    Raises:
        InputError: as `scorer.score`; or the corpus has other rows when it is read again.
    """
    check_settings(batch_size, keep, dtype, part_rows, resume, output_dir)
    engine, source = scorable.engine, as_corpus(corpus, "the corpus")
    first = _first_pass(scorable, source, WIDTH * keep, dtype, batch_size, output_dir, resume, part_rows)
    total = first.metadata["kept"]["all"][0]["count"]
    candidates, sample = _rows(engine, source, first, total)
    exact = score(scorable, candidates, batch_size)
    facts = {
        "dtype": dtype,
        "candidates": len(candidates),
        **_recall(scorable, sample, batch_size or scorable.batch_size, dtype, keep),
        "deepest": _deepest(first, exact, keep),
        "length": min(total, WIDTH * keep),
    }
    if engine.is_main:
        _tell(facts, keep, total)
    extremes = Extremes(keep, influence_columns(scorable.columns))
    extremes.add(exact.frame.drop(columns="duplicates"))
    metadata = {name: value for name, value in first.metadata.items() if name != "depends_on"}
    metadata |= {"kept": {**first.metadata["kept"], "keep": keep}, "shortlist": facts}
    scores = Scores(extremes.frame, metadata)
    if output_dir is not None:
        with engine.raising_together():
            if engine.is_main:
                scores.to_parquet(Path(output_dir) / scorable.file_name)
                (Path(output_dir) / first_pass_name(scorable.file_name)).unlink()
    return scores


def first_pass_name(file_name: str) -> str:
    """The file of the pass in reduced precision, until the exact scores are there.

    >>> first_pass_name("scores.parquet")
    'scores.shortlist.parquet'
    """
    return str(Path(file_name).with_suffix(".shortlist.parquet"))


def _first_pass(
    scorable: Scorable,
    source: Sequence[dict] | Stream,
    keep: int,
    dtype: str,
    batch_size: int | None,
    output_dir: str | os.PathLike | None,
    resume: bool,
    part_rows: int,
) -> Scores:
    """The scores in `dtype`; those of an earlier pass, where one was finished that depends on the same things."""
    settings: dict[str, Any] = {"keep": keep, "dtype": dtype, "output_dir": output_dir, "part_rows": part_rows}
    if output_dir is None:
        return score(scorable, source, batch_size, **settings)
    engine, file_name = scorable.engine, first_pass_name(scorable.file_name)
    with engine.raising_together():
        depends_on = digest([scorable.identity(), keep, dtype]) if engine.is_main else None
    depends_on, path = engine.broadcast_object(depends_on), Path(output_dir) / file_name
    if resume and path.is_file():
        finished = Scores.from_parquet(path)
        if finished.metadata.get("depends_on") == depends_on:
            return finished
    first = replace(scorable, file_name=file_name, metadata={**scorable.metadata, "depends_on": depends_on})
    return score(first, source, batch_size, resume=resume, **settings)


def _rows(engine, source: Sequence[dict] | Stream, first: Scores, total: int) -> tuple[list[dict], list[dict]]:
    """The rows on the shortlist, and a random sample of all rows; both in the order of the corpus."""
    wanted = set(first.frame["example_id"])
    drawn = set(np.random.default_rng(0).choice(total, min(SAMPLE_ROWS, total), replace=False).tolist())
    candidates, sample, place = list[dict](), list[dict](), 0
    for rows in engine.rounds(source, READ_ROWS):
        candidates += [row for row in rows if row["example_id"] in wanted]
        sample += [row for number, row in enumerate(rows, place) if number in drawn]
        place += len(rows)
    if place != total or [row["example_id"] for row in candidates] != first.frame["example_id"].tolist():
        raise InputError(
            f"the corpus gave {place:,} rows when it was read for the exact scores, and {total:,} before, or others; "
            "expected the same rows each time: score without dtype, which reads it once."
        )
    return candidates, sample


def _recall(scorable: Scorable, rows: list[dict], batch_size: int, dtype: str, keep: int) -> dict[str, Any]:
    """`recall` and what belongs to it, see `shortlist`; and the time that a row takes in `dtype`, relative to exact
    scores."""
    from scipy.stats import binomtest

    influences, seconds = [], []
    with scorable.model.evaluating():
        for precision in (dtype, None):
            started = time.perf_counter()
            influences.append(measure(scorable, rows, batch_size, precision).influence)
            seconds.append(time.perf_counter() - started)
    reduced, exact = influences
    at = min(RECALL_AT, keep, len(rows) // (4 * WIDTH))
    facts: dict[str, Any] = {"recall_rows": len(rows), "recall_at": at, "relative_time": seconds[0] / seconds[1]}
    if not at:
        return {**facts, "recall": None, "recall_at_least": None}
    hits = 0
    for one, other in _orders(reduced, exact):
        hits += len(np.intersect1d(other[:at], one[: WIDTH * at]))
    trials = at * 2 * exact.shape[1]
    interval = binomtest(hits, trials, alternative="greater").proportion_ci(0.95)
    return {**facts, "recall": hits / trials, "recall_at_least": float(interval.low)}


def _deepest(first: Scores, exact: Scores, keep: int) -> int:
    """The last place by the first pass, counted from 1, of a row that is kept, of all columns and both ends."""
    influences = [np.stack([s.influence(q) for q in range(s.columns)], axis=1) for s in (first, exact)]
    deepest = 0
    for one, other in _orders(*influences):
        places = np.empty(len(one), dtype=int)
        places[one] = np.arange(1, len(one) + 1)
        deepest = max(deepest, int(places[other[:keep]].max()))
    return deepest


def _orders(reduced: np.ndarray, exact: np.ndarray):
    """(order by the first, order by the second) of the rows, largest first and smallest first, for each column."""
    for one, other in zip(reduced.T, exact.T, strict=True):
        for sign in (-1, 1):
            yield np.argsort(sign * one, kind="stable"), np.argsort(sign * other, kind="stable")


def _tell(facts: dict[str, Any], keep: int, total: int) -> None:
    recall = "not measured, for too few rows"
    if facts["recall"] is not None:
        recall = (
            f"{facts['recall']:.3f} (at least {facts['recall_at_least']:.3f} with 95 % confidence) for the "
            f"{facts['recall_at']} first of {facts['recall_rows']:,} random rows"
        )
    print(
        f"shortlist: {total:,} rows in {facts['dtype']}, at {facts['relative_time']:.2f} of the time of exact scores; "
        f"{facts['candidates']:,} of them exactly. Its recall is {recall}. The {keep:,} first of each order were "
        f"among the {facts['deepest']:,} first of {facts['length']:,}."
    )
    if facts["length"] < total and facts["deepest"] > math.ceil(0.9 * facts["length"]):
        warnings.warn(
            f"a row that is kept was number {facts['deepest']:,} of {facts['length']:,} on the shortlist, so that "
            "others may have been missed: keep more rows, or score without dtype.",
            stacklevel=2,
        )
