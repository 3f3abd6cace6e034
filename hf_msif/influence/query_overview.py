"""What a query shows of itself: the summary that `print` and Jupyter show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..display import Displayed, Summary, Table, cut, first_rows, plural
from ..scoring.overview import table_of_tests

if TYPE_CHECKING:
    from .differentiation import StageCertificate

STAGES = 6  # lines about the stages


class Asked(NamedTuple):
    """What a query asks: attributes of `Query` of the same names."""

    tests: Sequence[Mapping[str, Any]]
    values: Sequence[float]
    measurement: str
    aggregate: str | None


def summary(asked: Asked, stages: Mapping[str, tuple[dict, StageCertificate]], noise_text: str) -> Summary:
    """What is asked, and how well each stage was solved.

    Args:
        asked: the question.
        stages: name → facts about the stage, and the certificate of its solution; in the order of training.
        noise_text: on the ranking of the first stage.
    """
    columns = f"one column for the {asked.aggregate} over all tests" if asked.aggregate else "one column for each test"
    first = next(iter(stages))
    sentences = [
        f"asks which training rows move f, the {asked.measurement} of a test; {columns}",
        f"ranking of stage {first!r}: {noise_text}",
    ]
    rows = [
        [name, facts["link"], f"{facts['examples']:,}", f"{facts['N']:,.6g}", _headline(certificate)]
        for name, (facts, certificate) in stages.items()
    ]
    tables = [
        table_of_tests(asked.tests, asked.values, asked.measurement),
        Table(["stage", "link", "rows", "N", "how it was solved"], first_rows(rows, STAGES)),
    ]
    certificate = f"print(query.certificates[{first!r}])"
    steps = ["scores = query.score(corpus)", certificate, "query.save_pretrained(folder)"]
    title = f"Query: {plural(len(asked.tests), 'test')} through {plural(len(stages), 'stage')}, {', '.join(stages)}"
    return Summary(title, sentences, tables, steps=steps)


def _headline(certificate: StageCertificate) -> str:
    text = certificate.summary().title if isinstance(certificate, Displayed) else str(certificate)
    return cut(text.partition("\n")[0], width=120)
