"""What a query shows of itself: the summary that `print` and Jupyter show, and the card on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..display import Displayed, Summary, Table, cut, few_rows, plural
from ..scoring.card import TAGS, stage_texts
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
        Table(["stage", "link", "rows", "N", "how it was solved"], few_rows(rows, STAGES)),
    ]
    certificate = f"print(query.certificates[{first!r}])"
    steps = ["scores = query.score(corpus)", certificate, "query.save_pretrained(folder)"]
    title = f"Query: {plural(len(asked.tests), 'test')} through {plural(len(stages), 'stage')}, {', '.join(stages)}"
    return Summary(title, sentences, tables, steps=steps)


def card(repo_id: str, summary: Summary, stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The README.md of a repository with a query.

    Args:
        repo_id: of the repository.
        summary: of the query.
        stages: as `Query.certificate` has them.
    """
    from huggingface_hub import ModelCardData

    parts = [
        "# A query of multi-stage influence functions",
        summary.markdown(),
        "`query.safetensors` holds the solution of each stage, `query.json` certificates and the rows of the tests.",
        "## How to load it",
        f'''```python
from hf_msif import Query

query = Query.from_pretrained("{repo_id}", msif)  # msif: the MultiStageInfluence of the same stages
print(query.score(corpus))
```''',
        *stage_texts(stages),
    ]
    header = ModelCardData(tags=TAGS, library_name="hf_msif").to_yaml()
    return f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n"


def _headline(certificate: StageCertificate) -> str:
    text = certificate.summary().title if isinstance(certificate, Displayed) else str(certificate)
    return cut(text.partition("\n")[0], width=120)
