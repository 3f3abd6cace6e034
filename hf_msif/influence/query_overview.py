"""What a query shows of itself: the summary that `print` and Jupyter show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..display import Displayed, Summary, Table, cut, plural
from ..scoring.overview import tests_table

if TYPE_CHECKING:
    from .differentiation import StageCertificate
    from .query import Query

STAGES = 6  # lines about the stages


def summary(query: Query) -> Summary:
    """What is asked, and how well each stage was solved."""
    names = [bound.name for bound in query.chain.stages if bound.name in query.solutions]
    title = f"Query: {plural(len(query.tests), 'test')} through {plural(len(names), 'stage')}, {', '.join(names)}"
    explained = "loss" if query.measurement == "loss" else query.measurement
    columns = f"one column for the {query.aggregate} over all tests" if query.aggregate else "one column for each test"
    sentences = [f"asks which training rows move f, the {explained} of a test; {columns}"]
    sentences.append(f"ranking of stage {names[0]!r}: {query.noise_text(names[0])}")
    rows = []
    for name in names:
        facts = query.facts[name]
        rows.append([name, facts["link"], f"{facts['examples']:,}", f"{facts['N']:,.6g}", _headline(query, name)])
    tables = [
        tests_table(query.tests, query.values, query.measurement),
        Table(["stage", "link", "rows", "N", "how it was solved"], rows[:STAGES]),
    ]
    steps = [
        "scores = query.score(corpus)",
        f"print(query.certificates[{names[0]!r}])",
        "query.save_pretrained(folder)",
    ]
    return Summary(title, sentences, tables, steps=steps)


def _headline(query: Query, stage: str) -> str:
    certificate: StageCertificate = query.solutions[stage].certificate
    text = certificate.summary().title if isinstance(certificate, Displayed) else str(certificate)
    return cut(text.partition("\n")[0], width=120)
