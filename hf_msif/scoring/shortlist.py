"""`shortlist`: a cheaper pass over the corpus (in reduced precision, with fewer masks), and exact scores of the rows
that it puts first."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.accelerated import Engine
from ..engine.corpus import as_corpus
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import InputError
from .compared import noise_of
from .extremes import extended
from .folder import read_facts_if_intact
from .orders import relative_keys
from .scorable import Measured, Scorable, measure
from .scorer import PART_ROWS, check_settings, score
from .scores import Scores

WIDTH = 4  # rows on the shortlist for each row that is kept
SAMPLE_ROWS = 512  # on which the recall is measured
RECALL_AT = 10

Values = tuple[np.ndarray, dict[str, np.ndarray]]  # influences, (rows, Q), and the norms by name


def shortlist(
    scorable: Scorable,
    corpus: Any,
    keep: int,
    dtype: str | None = None,
    batch_size: int | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    part_rows: int = PART_ROWS,
    first: Scorable | None = None,
) -> Scores:
    """The `keep` most harmful and most helpful rows of a corpus, with their exact scores, found by two passes.

    The first pass, in `dtype` or of fewer masks, puts the 4 × `keep` rows of largest and of smallest influence (and,
    where the norms are asked for, the first ones by relative influence) on a shortlist for each column; these alone
    are scored exactly (in the model's own precision, with all masks), which needs the corpus to be read once more.
    What the shortlists may have missed is measured and printed: the recall of such a list on a random sample that is
    scored in both ways, and how deep in its list each row stood that is kept.

    Rows of least absolute influence are not sought: near zero, what a cheap pass says is its error.

    Args:
        scorable, corpus, batch_size, output_dir, part_rows: as those of `scorer.score`.
        keep: rows of each order.
        dtype: "tf32" or "bfloat16", the precision of the first pass; defaults to the model's own.
        first: what the first pass scores, such as the same question with fewer masks; defaults to `scorable`.
        resume: continue an interrupted scoring in `output_dir`, also where the pass over the corpus was finished. (The
            exact scores of the rows on the shortlists are made again.)

    Returns:
        `Scores` whose `metadata["kept"]` has the moments of all rows in the first pass. `metadata["shortlist"]`:

        - `dtype`, `first_pass`: what was cheaper in the first pass, in words; `candidates`: how many rows were scored
          exactly;
        - `recall`: on `recall_rows` random rows, which share of the `recall_at` (ten) rows of largest and of smallest
          influence is among the forty first of the first pass, mean of the query columns; None for a corpus too small
          to tell. `lowest_recall` is that of one column and end;
        - `deepest`, `length`: the last place on the shortlist of its order of a row that is kept, and the length of
          such a list; `deepest` is `length` + 1 where a row was found by the list of another order or column alone.

    Raises:
        InputError: as `scorer.score`; or the corpus has other rows when it is read again, or repeats an id.
    """
    check_settings(batch_size, keep, dtype, part_rows, resume, output_dir)
    engine, source = scorable.engine, as_corpus(corpus, "the corpus")
    dtype = None if dtype == "float32" else dtype
    cheap = first or scorable
    passed = _first_pass(cheap, source, WIDTH * keep, dtype, batch_size, output_dir, resume, part_rows)
    total = passed.metadata["kept"]["all"][0]["count"]
    frame = passed.frame[_at_the_ends(*_values(passed, scorable), WIDTH * keep)].reset_index(drop=True)
    candidates, sample = _rows(engine, source, frame["example_id"].tolist(), passed, part_rows)
    recall, measured = _recall([(cheap, dtype), (scorable, None)], sample, batch_size, keep)
    # That of random rows: the candidates lie at the ends.
    exact = score(scorable, candidates, batch_size, noise=noise_of(scorable, measured))
    facts = {
        "dtype": dtype,
        "first_pass": _in_words(cheap, scorable, dtype),
        "candidates": len(candidates),
        **recall,
        **_depth(_values(Scores(frame, passed.metadata), scorable), _values(exact, scorable), keep),
    }
    if engine.is_main:
        _tell(facts, keep, total)
    kept = exact.frame[_at_the_ends(*_values(exact, scorable), keep)].drop(columns="duplicates").reset_index(drop=True)
    metadata = {name: value for name, value in passed.metadata.items() if name != "depends_on"}
    metadata |= {**scorable.metadata, "kept": {**passed.metadata["kept"], "keep": keep}, "shortlist": facts}
    metadata |= {name: exact.metadata[name] for name in ("noise", "noise_text") if name in exact.metadata}
    scores = Scores(kept, metadata)
    if output_dir is not None:
        with engine.raising_together():
            if engine.is_main:
                scores.to_parquet(Path(output_dir) / scorable.file_name)
                (Path(output_dir) / first_pass_name(scorable.file_name)).unlink()
    return scores


def _in_words(cheap: Scorable, scorable: Scorable, dtype: str | None) -> str:
    """What is cheaper in the first pass."""
    words = [] if dtype is None else [f"in {dtype}"]
    if cheap is not scorable:
        words.append(f"with {cheap.objective.inputs_per_row} masks per row")
    return " ".join(words)


def first_pass_name(file_name: str) -> str:
    """The file of the first pass, until the exact scores are there.

    >>> first_pass_name("scores.parquet")
    'scores.shortlist.parquet'
    """
    return str(Path(file_name).with_suffix(".shortlist.parquet"))


def _first_pass(
    scorable: Scorable,
    source: Sequence[dict] | Stream,
    keep: int,
    dtype: str | None,
    batch_size: int | None,
    output_dir: str | os.PathLike | None,
    resume: bool,
    part_rows: int,
) -> Scores:
    """Its scores; those of an earlier pass, where one was finished that depends on the same things."""
    settings: dict[str, Any] = {"keep": keep, "dtype": dtype, "output_dir": output_dir, "part_rows": part_rows}
    if output_dir is None:
        return score(scorable, source, batch_size, **settings)
    engine, path = scorable.engine, Path(output_dir) / first_pass_name(scorable.file_name)
    with engine.raising_together():
        depends_on = digest([scorable.identity(), keep, dtype, part_rows, scorable.norms]) if engine.is_main else None
        facts = read_facts_if_intact(path, dict[str, Any]) if engine.is_main and resume and path.is_file() else None
        finished = facts is not None and facts.get("depends_on") == depends_on
    depends_on, finished = engine.broadcast_object((depends_on, finished))
    if finished:
        return Scores.from_parquet(path)
    first = replace(scorable, file_name=path.name, metadata={**scorable.metadata, "depends_on": depends_on})
    return score(first, source, batch_size, resume=resume, **settings)


def _rows(
    engine: Engine, source: Sequence[dict] | Stream, ids: list, first: Scores, part_rows: int
) -> tuple[list[dict], list[dict]]:
    """The rows with these ids, and a random sample of all rows; both in the order of the corpus, which must be that of
    the first pass."""
    total, wanted = first.metadata["kept"]["all"][0]["count"], set(ids)
    drawn = set(np.random.default_rng(0).choice(total, min(SAMPLE_ROWS, total), replace=False).tolist())
    candidates, sample, place, chain = list[dict](), list[dict](), 0, ""
    for rows in engine.rounds(source, part_rows):
        candidates += [row for row in rows if row["example_id"] in wanted]
        sample += [row for number, row in enumerate(rows, place) if number in drawn]
        place, chain = place + len(rows), extended(chain, rows)
    if chain != first.metadata["rows_sha256"]:
        raise InputError(
            f"the corpus gave {place:,} rows when it was read for the exact scores, and {total:,} other ones in "
            "the pass before; expected the same rows each time: score without keep, which reads it once, or delete "
            "what an interrupted scoring left."
        )
    if len(candidates) != len(ids):
        counts = Counter(row["example_id"] for row in candidates)
        repeated = next(name for name, count in counts.items() if count > 1)
        raise InputError(
            f"the corpus repeats an example_id ({repeated!r}); a shortlist finds its rows by their ids, so each must "
            "occur once."
        )
    return candidates, sample


def _recall(
    passes: Sequence[tuple[Scorable, str | None]], rows: list[dict], batch_size: int | None, keep: int
) -> tuple[dict[str, Any], Measured]:
    """`recall` and what belongs to it, see `shortlist`; and the time that a row takes in the first of the two passes,
    relative to exact scores. Then what the second pass measured."""
    orders, seconds, each = [], [], []
    with passes[0][0].model.evaluating():
        for scorable, dtype in passes:
            started = time.perf_counter()
            each.append(measure(scorable, rows, batch_size or scorable.batch_size, dtype))
            seconds.append(time.perf_counter() - started)
            norms = dict(zip(scorable.norms, each[-1].norms.T, strict=True))
            orders.append(_orders(each[-1].influence, norms))
    at = min(RECALL_AT, keep, len(rows) // (4 * WIDTH))
    facts: dict[str, Any] = {"recall_rows": len(rows), "recall_at": at, "relative_time": seconds[0] / seconds[1]}
    if not at:
        return {**facts, "recall": None, "lowest_recall": None}, each[-1]
    shares = [np.isin(other[:at], one[: WIDTH * at]).mean() for one, other in zip(*orders, strict=True)]
    return {**facts, "recall": float(np.mean(shares)), "lowest_recall": float(min(shares))}, each[-1]


def _values(scores: Scores, scorable: Scorable) -> Values:
    return scores.influences(), {name: scores.frame[name].to_numpy() for name in scorable.norms}


def _depth(reduced: Values, exact: Values, keep: int) -> dict[str, int]:
    """`deepest` and `length`, see `shortlist`, of candidates in the same order."""
    deepest, length = 0, min(len(exact[0]), WIDTH * keep)
    for one, other in zip(_orders(*reduced), _orders(*exact), strict=True):
        places = np.empty(len(one), dtype=int)
        places[one] = np.arange(1, len(one) + 1)
        deepest = max(deepest, int(places[other[:keep]].max()))
    return {"deepest": min(deepest, length + 1), "length": length}


def _at_the_ends(influences: np.ndarray, norms: dict[str, np.ndarray], number: int) -> np.ndarray:
    """Whether a row is among the `number` first ones of some order, (rows,)."""
    at_an_end = np.zeros(len(influences), dtype=bool)
    for order in _orders(influences, norms):
        at_an_end[order[:number]] = True
    return at_an_end


def _orders(influences: np.ndarray, norms: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The orders of the rows, of each column largest first, smallest first, then by the relative orders."""
    for column in influences.T:
        for key in (-column, column, *relative_keys(column, norms)):
            yield np.argsort(key, kind="stable")


def _tell(facts: dict[str, Any], keep: int, total: int) -> None:
    at, rows = facts["recall_at"], facts["recall_rows"]
    recall = f"{rows:,} rows are too few to measure a recall"
    if at:
        recall = (
            f"Of {rows:,} random rows, the {at} first of an order are among the {WIDTH * at} first "
            f"{facts['first_pass']}, with a recall of {facts['recall']:.3f} (the lowest of a test and an order: "
            f"{facts['lowest_recall']:.2f})"
        )
    depth = f"were among the {facts['deepest']:,} first of {facts['length']:,}"
    if facts["deepest"] > facts["length"]:
        depth = f"were not all among its {facts['length']:,} first"
    print(
        f"shortlist: {total:,} rows {facts['first_pass']}, at {facts['relative_time']:.2f} of the time of exact "
        f"scores; {facts['candidates']:,} of them exactly. {recall}. The {keep:,} first of an order, which are kept, "
        f"{depth}."
    )
    if facts["length"] < total and facts["deepest"] > 0.9 * facts["length"]:
        warnings.warn(
            f"the {keep:,} rows of an order that are kept {depth} {facts['first_pass']}, so that others may have been "
            "missed: keep more rows, or score all of them exactly.",
            stacklevel=2,
        )
