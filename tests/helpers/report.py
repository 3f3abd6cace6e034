"""Scores to be reported, and the rows of an HTML report as a program reads them."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from helpers import tiny
from hf_msif import MultiStageInfluence, Scores, Stage, objectives, solvers

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "'; window.hacked = 1; //",
    "</style></script><svg onload='window.hacked = 1'>",
    "{{ 7 * 7 }} {% raw %} ${1}",
    "\u202eright to left \u2067 override",
    "שלום vote",
    "emoji 🙂👩‍👩‍👧 vote",
    "nul \x00 escape \x1b[31m bell \x07",
    "vote " + "x" * 10_000,
    "javascript:window.hacked=1",
    "&lt;b&gt; &amp; <b>bold</b>",
]


def scores_of(influence, texts, tests, errors=None, **metadata):
    """Scores of texts on tests."""
    influence = np.asarray(influence, dtype=float)
    rows = [{"example_id": i, "text": text} for i, text in enumerate(texts)]
    columns = {"loss": np.ones(len(rows)), "terms": np.ones(len(rows))}
    facts = {"tests": tests, "stage": "pretraining", "N": 4.0, **metadata}
    return Scores.build(rows, influence, 4.0, columns, facts, errors=errors)


class Asked:
    """A masked LM and a classifier on its encoder, a query of two tweets with replicates, and its scores."""

    def __init__(self, rows=12):
        before = tiny.model("bert", "masked", layers=2)
        after = tiny.finetuned(before, "bert", layers=2)
        self.corpus = tiny.rows(rows, seed=4, longest=12, shortest=3)
        pretraining = Stage("pretraining", before, tiny.objective("masked"), self.corpus, solver=solvers.Identity())
        finetuning = Stage(
            "finetuning",
            after,
            objectives.SequenceClassification(tiny.tokenizer()),
            tiny.rows(12, seed=2),
            trainable="head",
            solver=solvers.Identity(),
        )
        self.tests = [{**row, "text": f"{row['text']} vote"} for row in tiny.rows(2, seed=9, shortest=3)]
        self.query = MultiStageInfluence([pretraining, finetuning], progress=False).query(self.tests, replicates=2)
        self.scores = self.query.score(self.corpus)


@dataclass
class Line:
    """A line of a report's list."""

    list: str
    test: int
    cells: dict[str, str] = field(default_factory=dict)  # data-label → data-value
    text: str = ""
    chips: list[str] = field(default_factory=list)
    tokens: list[tuple[str, float]] = field(default_factory=list)  # text and part of the influence
    layers: list[tuple[str, float]] = field(default_factory=list)


class Report(HTMLParser):
    """What a report holds: `lines`, the `tags` of all elements, the whole `text`, and the text of every bdi."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.lines: list[Line] = []
        self.tags, self.attributes, self.isolated, self.warnings = set(), [], [], []
        self.stack, self.text, self.section, self.list = [], "", -1, ""
        self.feed(Path(path).read_text(encoding="utf-8"))

    def of(self, name, test=0):
        return [line for line in self.lines if line.list == name and line.test == test]

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.attributes += attributes
        if tag in ("meta", "link", "input", "br", "rect", "line", "img"):
            return
        self.stack.append((tag, found))
        classes = (found.get("class") or "").split()
        if tag == "section" and "test" in classes:
            self.section += 1
        if tag == "table":
            self.list = classes[0]
        if tag == "tr" and "data-row" in found:
            self.lines.append(Line(self.list, self.section))
        if tag == "td":
            self.lines[-1].cells[found["data-label"]] = found.get("data-value")
        if tag == "bdi":
            self.isolated.append("")
        if tag == "span" and "token" in classes and "data-value" in found:
            self.lines[-1].tokens.append(["", float(found["data-value"])])
        if tag == "li" and self._inside("layers"):
            self.lines[-1].layers.append(["", None])
        if tag == "span" and "bar" in classes and self._inside("layers"):
            self.lines[-1].layers[-1][1] = float(found["data-value"])
        if self._inside("td") and "chip" in classes:
            self.lines[-1].chips.append("")

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if not self.stack:
            return
        tag, found = self.stack[-1]
        classes = (found.get("class") or "").split()
        if self._inside("bdi"):
            self.isolated[-1] += data
        if self._inside("td") and self._inside("bdi"):
            self.lines[-1].text += data
        if "token" in classes and "data-value" in found:
            self.lines[-1].tokens[-1][0] += data
        if "chip" in classes and self._inside("td"):
            self.lines[-1].chips[-1] += data
        if tag == "span" and not classes and self._inside("layers") and self.lines[-1].layers[-1][1] is None:
            self.lines[-1].layers[-1][0] += data
        if self._inside("warnings") and tag == "bdi":
            self.warnings.append(data)

    def _inside(self, name):
        return any(name == tag or name in (found.get("class") or "").split() for tag, found in self.stack)
