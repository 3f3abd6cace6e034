"""`Shares`: the shares of tokens and layers in the influence of the rows that a report shows, computed with the models
and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import TypedDict

from ..engine.corpus import as_corpus
from ..engine.files import parse_json
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import FileError, InputError, first_line
from ..influence.representations import cosines, representations
from ..objectives import token_spans
from ..scoring.scores import METADATA_KEY, pack_metadata, write_frame
from .lists import LENGTH, lists_of

if TYPE_CHECKING:
    import pandas as pd

    from ..influence.query import Query
    from ..objectives import Objective
    from ..scoring.scores import Scores

COLUMNS = ("kind", "query", "example_id", "position", "name", "start", "end", "value")


class SavedReasons(TypedDict):
    """The metadata of a file of shares."""

    scores: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class Shares:
    """What the models say of the rows in the lists of a report (`lists.lists_of`).

    Attributes:
        frame: a line per query column, row and part, with the columns

            - `kind`: "token", "layer" or "encoder";
            - `query`: number of the query column; `example_id`: of the row;
            - `position` of a token, from 0, special ones included; `name`: its text, or the layer's name;
            - `start`, `end`: where the token stands in the row's text, in characters; −1 where that is not known;
            - `value`: of a token or layer its part of the influence; those of a row sum to it. Of "encoder" the
              cosine of the encoder's outputs of row and test, the mean over tests that are put together.
        reasons: kind → one sentence on why nothing is known of it.

    Raises:
        InputError: in `of_scores`, scores whose rows or tests the query does not know.
    """

    frame: pd.DataFrame
    reasons: dict[str, str]

    @classmethod
    def of_scores(cls, scores: Scores, query: Query, corpus: Any = None, k: int = LENGTH) -> Shares:
        """Computes the shares of the rows in the lists of a report; every process of a launch takes part.

        Costs about 6 forward passes per shown row and test example, on those rows alone.

        Args:
            scores: those of the query.
            query: what made them.
            corpus: the rows that were scored, for what the objective reads beside their text; None: the text is all.
            k: rows per list.
        """
        import pandas as pd

        stage = scores.metadata.get("stage")
        if scores.columns != query.columns:
            raise InputError(
                f"the scores have {scores.columns} query columns and the query {query.columns}; expected the query "
                "that made them."
            )
        objective = query.chain.stage(stage).objective
        shown = [
            pd.concat(lists_of(scores, q, k).values()).drop_duplicates("example_id") for q in range(query.columns)
        ]
        rows = _rows(query, objective, corpus, shown)
        rounds = scores.metadata.get("mask_rounds")
        parts: list[dict] = []
        reasons: dict[str, str] = {}
        for kind, lines in (
            (
                "token",
                lambda q, own: _tokens(query.token_scores(own, stage, query=q, mask_rounds=rounds), objective, own),
            ),
            ("layer", lambda q, own: _layers(query.layer_scores(own, stage, query=q, mask_rounds=rounds))),
            ("encoder", lambda q, own: _cosines(query, stage, q, own)),
        ):
            of_kind: list[dict] = []
            try:
                for q, ids in enumerate(shown):
                    own = [rows[i] for i in ids["example_id"].tolist()]
                    of_kind += [{"kind": kind, "query": q, **line} for line in (lines(q, own) if own else ())]
            except InputError as error:
                reasons[kind] = str(error)
            else:
                parts += of_kind
        return cls(_frame(parts), reasons)

    def of(self, kind: str, query: int, example_id: Any) -> pd.DataFrame:
        """The lines of one row."""
        frame = self.frame
        return frame[(frame["kind"] == kind) & (frame["query"] == query) & (frame["example_id"] == example_id)]

    def save(self, path: str | os.PathLike, scores: Scores) -> None:
        """Writes one Parquet file, whole or not at all, which says of which scores these are the shares."""
        write_frame(self.frame, {"scores": _digest(scores), "reasons": self.reasons}, path)

    @classmethod
    def load(cls, path: str | os.PathLike, scores: Scores) -> Shares | None:
        """Reads what `save` wrote; None where there is no such file, or it has the shares of other scores.

        Raises:
            InputError: a file that holds no shares.
        """
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            return None
        way_out = "expected what `msif score` writes: score again, or delete it"
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, ValueError) as error:  # also of pyarrow
            raise FileError(f"{path} holds no shares ({first_line(error)}); {way_out}.") from error
        metadata = parse_json((table.schema.metadata or {}).get(METADATA_KEY, b"{}"), SavedReasons, path, way_out)
        missing = set(COLUMNS) - set(table.column_names)
        if missing:
            raise FileError(f"{path} is damaged (it has no column {min(missing)!r}); {way_out}.")
        return cls(table.to_pandas(), metadata["reasons"]) if metadata["scores"] == _digest(scores) else None


def _digest(scores: Scores) -> str:
    """Of what the scores are about: query, stage and settings, as their metadata say."""
    return digest(json.loads(pack_metadata(scores.metadata)))


def _frame(parts: Sequence[dict]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(parts, columns=list(COLUMNS))
    whole = {name: frame[name].fillna(-1).astype(np.int64) for name in ("query", "position", "start", "end")}
    texts = {name: frame[name].fillna("").astype(str) for name in ("kind", "name")}
    return frame.assign(**whole, **texts, value=frame["value"].astype(float))


def _rows(query: Query, objective: Objective, corpus: Any, shown: Sequence[pd.DataFrame]) -> dict[Any, dict]:
    """example_id → the row as the objective reads it, for all rows that are shown."""
    import pandas as pd

    wanted = pd.concat(shown).drop_duplicates("example_id")
    if corpus is None:
        column = objective.content_column
        pairs = zip(wanted["example_id"].tolist(), wanted["text"], strict=True)
        return {i: {"example_id": i, column: text} for i, text in pairs}
    ids, engine = set(wanted["example_id"].tolist()), query.chain.engine
    source, rows = as_corpus(corpus, "the corpus"), dict[Any, dict]()
    with engine.raising_together():
        if engine.is_main or not isinstance(source, Stream):  # a stream is read once
            for row in source:
                if row["example_id"] in ids:
                    rows[row["example_id"]] = row
                    if len(rows) == len(ids):
                        break
            else:
                raise InputError(
                    f"the corpus has no row {sorted(ids - set(rows), key=str)[0]!r}, of which there is a score; "
                    "expected the rows that were scored."
                )
    return engine.broadcast_object(rows) if isinstance(source, Stream) else rows


def _tokens(terms: pd.DataFrame, objective: Objective, rows: Sequence[dict]) -> Iterator[dict]:
    """A line per token of each row: the sum over the terms that predict it, in all masks of the row."""
    if terms["position"].isna().any():
        raise InputError(
            f"the terms of {type(objective).__name__} predict no tokens, so that no token has a share of an influence."
        )
    sums = terms.groupby(["example_id", "position", "token"], sort=True, as_index=False)["influence"].sum()
    by_row = dict(list(sums.groupby("example_id")))
    for row in rows:
        tokens = by_row.get(row["example_id"])
        if tokens is None:
            continue
        spans = _spans(objective, row, tokens)
        for (_, line), (start, end) in zip(tokens.iterrows(), spans, strict=True):
            place = {"position": int(line["position"]), "start": start, "end": end}
            yield {"example_id": row["example_id"], "name": line["token"], **place, "value": float(line["influence"])}


def _spans(objective: Objective, row: dict, tokens: pd.DataFrame) -> list[tuple[int, int]]:
    """Where the tokens stand in the row's text; (−1, −1) for all of them where one cannot be found there."""
    unknown, text = [(-1, -1)] * len(tokens), objective.content(row)
    is_text = isinstance(text, str) and text == row.get(objective.text_column)
    told = token_spans(objective, text) if is_text else None
    if told is None:
        return unknown
    ids, spans = told
    positions = tokens["position"].astype(int).tolist()
    if max(positions) >= len(ids) or objective.token_texts([ids[p] for p in positions]) != tokens["token"].tolist():
        return unknown  # they are not tokens of this text: those of a target, say
    return [spans[p] for p in positions]


def _layers(shares: pd.DataFrame) -> Iterator[dict]:
    for line in shares.to_dict("records"):
        yield {"example_id": line["example_id"], "name": line["layer"], "value": line["influence"]}


def _cosines(query: Query, stage: str | None, q: int, rows: list[dict]) -> Iterator[dict]:
    """The cosine of the encoders' outputs of each row and the test."""
    bound, last = query.chain.stage(stage), query.chain.stages[-1]
    tests = [query.tests[q]] if len(query.tests) == query.columns else query.tests
    for each in (bound, last):
        if each.objective.text_column is None:
            raise InputError(f"stage {each.name!r} has no texts, whose similarity could be shown.")
    of_rows, of_tests = representations(bound, rows), representations(last, tests)
    if of_rows.shape[1] != of_tests.shape[1]:
        raise InputError(
            f"the encoders' outputs have {of_rows.shape[1]} and {of_tests.shape[1]} features, and therefore no cosine."
        )
    for row, cosine in zip(rows, cosines(of_rows, of_tests).mean(1), strict=True):
        yield {"example_id": row["example_id"], "name": "", "value": float(cosine)}
