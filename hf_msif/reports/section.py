"""`Section`: what the HTML report says of one test: its facts, the distribution of influences, and lists of texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scoring.noise import UNRELIABLE
from ..scoring.similarity import BM25, TFIDF
from .histogram import Histogram, histogram
from .lists import lists_of
from .shares import Shares
from .tables import test_sentence

if TYPE_CHECKING:
    import pandas as pd

    from ..scoring.scores import Scores

TITLES = {"helpful": "Most helpful", "harmful": "Most harmful", "least": "Least influential"}
EFFECTS = {"helpful": "more of them lowers", "harmful": "more of them raises", "least": "more of them hardly changes"}
CORPUS_ROWS = 100_000  # that tell how frequent a word is
SOLID = 0.8  # reliability from which single rows can be read


@dataclass(frozen=True)
class Part:
    """A piece of a text, or a layer, with its part of a row's influence.

    Attributes:
        text: of the piece, or the layer's name.
        value: its part, in the unit of the influence; None: it has none.
        share: the same as a share of the row's influence; the shares of a row sum to 1.
        strength: its absolute value relative to the largest one of the row, from 0 to 1.
    """

    text: str
    value: float | None = None
    share: float | None = None
    strength: float = 0.0


@dataclass(frozen=True)
class Line:
    """A line of a list: a text, its figures as `Scores` has them, and what is to be known of it.

    Attributes:
        strength: the absolute influence relative to the largest one of the list.
        copies: how many rows have this text.
        pieces: the text, cut at its shaded tokens; or these tokens alone where `in_text` is false.
        layers: the parts of layers; empty where they are not known.
    """

    example_id: Any
    influence: float
    strength: float
    removal_effect: float
    error: float | None
    probability: float | None
    bm25: float
    cosine: float
    copies: int
    marks: list[str]
    pieces: list[Part]
    in_text: bool
    layers: list[Part]


@dataclass(frozen=True)
class List:
    """A list of one test: `effect` says what more of its rows do to what is explained."""

    name: str
    title: str
    effect: str
    lines: list[Line]


@dataclass(frozen=True)
class Section:
    """What the page says of one query column.

    Attributes:
        facts: (name, value) of the test: its id, label, prediction and loss, as far as they are known.
        reliability: of the ranking, in words; empty where there is no noise.
        marks: list → the influences of its rows, to be marked in the histogram.
    """

    number: int
    text: str
    facts: list[tuple[str, Any]]
    reliability: str
    histogram: Histogram
    lists: list[List]

    @property
    def marks(self) -> dict[str, list[float]]:
        return {part.name: [line.influence for line in part.lines] for part in self.lists}


class Sections:
    """Makes the sections of a page.

    Args:
        scores: those of a query.
        k: texts per list.
        shares: of tokens and layers; None: they are not known.
        common: example_id → in how many lists the row is, of those that lead nearly all of them.
    """

    def __init__(self, scores: Scores, k: int, shares: Shares | None, common: dict[Any, int]):
        self.scores, self.k, self.shares, self.common = scores, k, shares, common
        texts = scores.texts()
        self.held = Counter(texts)
        corpus = texts[:: -(-len(texts) // CORPUS_ROWS)]
        self.bm25 = BM25(corpus)
        self.tfidf = None if self.has_cosines else TFIDF(corpus)

    @cached_property
    def has_cosines(self) -> bool:
        """Whether the encoder's similarity is known."""
        return self.shares is not None and bool((self.shares.frame["kind"] == "encoder").any())

    def make(self, q: int) -> Section:
        """The section of one query column."""
        noise, tests = self.scores.noise, self.scores.tests
        is_one = len(tests) == self.scores.columns
        own, values = ([tests[q]] if is_one else tests), (self.scores.metadata.get("certificate") or {}).get("values")
        if values and is_one:
            values = [values[q]]
        lists = [self._list(name, rows, q, own) for name, rows in lists_of(self.scores, q, self.k).items()]
        reliability = "" if noise is None else reliability_text(noise.reliability[q])
        text, figure = test_sentence(self.scores, q), histogram(self.scores, q)
        return Section(q, text, self._facts(own, values or []), reliability, figure, lists)

    def _facts(self, tests: Sequence[dict], values: Sequence[float]) -> list[tuple[str, Any]]:
        facts = list[tuple[str, Any]]()
        if len(tests) == 1:
            (test,) = tests
            facts += [(name, test[key]) for name, key in (("id", "example_id"), ("label", "label")) if key in test]
            if "prediction" in test:
                sure = f" ({test['probability']:.0%})" if "probability" in test else ""
                facts.append(("prediction", f"{test['prediction']}{sure}"))
        measured = [("loss", [test["loss"] for test in tests if "loss" in test])]
        measurement = self.scores.metadata.get("measurement", "loss")
        if measurement != "loss":
            measured.append((measurement, list(values)))
        for name, known in measured:
            if known and len(known) == len(tests):
                facts.append((name if len(known) == 1 else f"mean {name}", float(np.mean(known))))
        return facts

    def _list(self, name: str, table: pd.DataFrame, q: int, tests: Sequence[dict]) -> List:
        texts = table["text"].tolist()
        queries = [test["text"] for test in tests if isinstance(test.get("text"), str)] or [""]
        words = self.bm25(texts, queries).mean(1) if texts else []
        cosines = self.tfidf(texts, queries).mean(1) if texts and self.tfidf is not None else None
        largest = float(table["influence"].abs().max()) if texts else 0.0
        own = {_folded(query) for query in queries}
        lines = []
        for i, row in enumerate(table.to_dict("records")):
            example_id, text = row["example_id"], row["text"]
            marks = ["same text as the test"] if text and _folded(text) in own else []
            if example_id in self.common:
                marks.append(f"in the lists of {self.common[example_id]} of {self.scores.columns} tests")
            marks += [f"label {row['label']}"] if "label" in row else []
            pieces, in_text = self._pieces(q, example_id, text or f"example {example_id}", row["influence"])
            lines.append(
                Line(
                    example_id=example_id,
                    influence=row["influence"],
                    strength=abs(row["influence"]) / largest if largest else 0.0,
                    removal_effect=row["removal_effect"],
                    error=row.get("influence_se"),
                    probability=row.get("top_probability"),
                    bm25=float(words[i]),
                    cosine=self._cosine(q, example_id) if cosines is None else float(cosines[i]),
                    copies=int(row.get("duplicates", self.held[text] if text else 1)),
                    marks=marks,
                    pieces=pieces,
                    in_text=in_text,
                    layers=self._layers(q, example_id, row["influence"]),
                )
            )
        return List(name, TITLES[name], EFFECTS[name], lines)

    def _cosine(self, q: int, example_id: Any) -> float:
        assert self.shares is not None
        values = self.shares.of("encoder", q, example_id)["value"]
        return float(values.iloc[0]) if len(values) else math.nan

    def _layers(self, q: int, example_id: Any, influence: float) -> list[Part]:
        if self.shares is None:
            return []
        shares = self.shares.of("layer", q, example_id)
        return _parts(shares["name"].tolist(), shares["value"].tolist(), influence)

    def _pieces(self, q: int, example_id: Any, text: str, influence: float) -> tuple[list[Part], bool]:
        """The text cut at its tokens, or the tokens in their order where their places in it are not known; and which
        of both it is."""
        tokens = None if self.shares is None else self.shares.of("token", q, example_id)
        if tokens is None or not len(tokens):
            return [Part(text)], True
        if (tokens["start"] < 0).any() or tokens["end"].max() > len(text):
            return _parts(tokens["name"].tolist(), tokens["value"].tolist(), influence), False
        return _cut(text, tokens, influence), True


def _parts(texts: Sequence[str], values: Sequence[float], influence: float) -> list[Part]:
    largest = max(map(abs, values), default=0.0)
    return [
        Part(text, value, value / influence if influence else None, abs(value) / largest if largest else 0.0)
        for text, value in zip(texts, values, strict=True)
    ]


def _cut(text: str, tokens: pd.DataFrame, influence: float) -> list[Part]:
    """A text at its tokens, and what lies between them; then special tokens, which stand nowhere in the text."""
    is_special = tokens["end"] <= tokens["start"]
    # Tokens may share their characters: an emoji has several of a vocabulary of bytes.
    spans = tokens[~is_special].groupby(["start", "end"], as_index=False)["value"].sum()
    place, pieces, shaded = 0, list[str](), list[int]()
    for start, end in spans[["start", "end"]].itertuples(index=False):
        pieces += [text[place:start], text[max(start, place) : end]]
        shaded.append(len(pieces) - 1)
        place = max(place, end)
    pieces.append(text[place:])
    special = tokens[is_special]
    parts = _parts(
        [pieces[i] for i in shaded] + special["name"].tolist(),
        spans["value"].tolist() + special["value"].tolist(),
        influence,
    )
    by_place = dict(zip(shaded, parts, strict=False))
    whole = [by_place.get(i, Part(piece)) for i, piece in enumerate(pieces) if piece]
    return whole + parts[len(shaded) :]


def reliability_text(reliability: float) -> str:
    """What a rank correlation of replicates means, in words."""
    if reliability != reliability:
        return "It is not known how reliable this ranking is."
    if reliability < UNRELIABLE:
        verdict = "This ranking is mostly noise: do not read single rows"
    elif reliability < SOLID:
        verdict = "This ranking has noise: read the lists, not the places in them"
    else:
        verdict = "This ranking is reliable"
    return f"{verdict} (two replicates have the rank correlation {reliability:.2f})."


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
