"""What scores show of themselves: the summary that `print` and Jupyter show, and the card of a data set on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..display import Summary, Table, cut, first_rows, plural
from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .scores import Scores

TESTS = 4  # lines about the tests
ROWS = 3  # of the most helpful and of the most harmful rows


def summary(scores: Scores) -> Summary:
    """What the scores are about, their unit and sign, how reliable they are, and their first rows for test 0."""
    metadata = scores.metadata
    sentences = meaning(metadata)
    if "kept" in metadata:
        everything = metadata["kept"]["all"][0]["count"]
        sentences.append(f"only the most extreme of {plural(everything, 'row')} are here (keep={_most(scores)})")
    if metadata.get("noise_text"):
        sentences.append(metadata["noise_text"])
    tables = [_table_of_tests(metadata)] if "tests" in metadata else []
    tables += [_first_rows(scores)] if len(scores) else []
    steps = ['scores.top(10, by="harmful", query=0)', "scores.plot.distribution()", "scores.to_parquet(path)"]
    if scores.columns > 1:
        steps.insert(1, "scores.long()")
    return Summary(title(scores), sentences, tables, steps=steps)


def title(scores: Scores) -> str:
    """How many rows, of which stage, for how many tests."""
    metadata, tests = scores.metadata, plural(scores.columns, "test")
    if "tests" in metadata and len(metadata["tests"]) != scores.columns:
        tests = f"{plural(len(metadata['tests']), 'test')} together"
    stage = f" of stage {metadata['stage']!r}" if "stage" in metadata else ""
    return f"Scores: {plural(len(scores), 'row')}{stage}, {tests}"


def meaning(metadata: Mapping[str, Any]) -> list[str]:
    """Sign and unit of the columns, one sentence each."""
    what = metadata.get("measurement", "loss")
    f, up, down = (
        ("the test loss", "harmful", "helpful") if what == "loss" else (f"the {what}", "raises f", "lowers f")
    )
    number = f" = {metadata['N']:,.6g}" if "N" in metadata else ""
    return [
        f"influence = ∂f/∂ε, where f is {f} and ε is more weight on the row: positive is {up}, negative is {down}"
        if what == "loss"
        else f"influence = ∂f/∂ε, where f is {f} and ε is more weight on the row: positive {up}, negative {down}",
        f"removal_effect = −influence / N, N{number}: the change of f that is predicted where the row is removed",
    ]


def tests_table(
    tests: Sequence[Mapping[str, Any]], values: Sequence[float], measurement: str = "loss", most: int = TESTS
) -> Table:
    """A table of test examples.

    Args:
        tests: rows with a `text` or an `example_id`.
        values: what is explained, of each test; none: it is not known.
        measurement: its name.
        most: rows of the table.
    """
    rows = [[str(q), cut(name_of(test))] for q, test in enumerate(tests)]
    if len(values) != len(tests):
        return Table(["test", "text"], first_rows(rows, most))
    shown = [[number, f"{value:.4g}", text] for (number, text), value in zip(rows, values, strict=True)]
    return Table(["test", measurement, "text"], first_rows(shown, most))


def name_of(row: Mapping[str, Any]) -> str:
    """The text of a row, or its id where it has no text, as an image."""
    return row.get("text") or f"example {row.get('example_id')}"


def test_sentence(scores: Scores, query: int) -> str:
    """What a query column is about: the test example's text, its id where it has no text, or how many test examples
    it puts together.

    Raises:
        InputError: the scores do not say which tests they are about.
    """
    tests = scores.metadata.get("tests")
    if tests is None:
        raise InputError("these scores do not say which tests they are about; expected those of a query: score again.")
    return name_of(tests[query]) if len(tests) == scores.columns else f"{len(tests)} test examples together"


def _table_of_tests(metadata: Mapping[str, Any]) -> Table:
    values = (metadata.get("certificate") or {}).get("values", [])
    return tests_table(metadata["tests"], values, metadata.get("measurement", "loss"))


def _first_rows(scores: Scores) -> Table:
    """The rows of most negative and of most positive influence on test 0."""
    rows = []
    for by, sign in (("helpful", -1), ("harmful", 1)):
        # Without `top`, which computes a probability of every row.
        top = scores._picked(scores._order(by, 0)[: min(ROWS, _most(scores))], 0, by)
        for row in top[sign * top["influence"] > 0].to_dict("records"):
            error = f" ± {row['influence_se']:.2g}" if "influence_se" in row else ""
            numbers = [f"{row['influence']:+.3g}{error}", f"{row['removal_effect']:+.3g}"]
            rows.append([by, *numbers, cut(name_of(row))])
    about = "" if scores.columns == 1 else " for test 0"
    return Table(["", "influence", "removal_effect", "text"], rows, f"the most helpful and harmful rows{about}")


def _most(scores: Scores) -> int:
    """How many rows of an order may be asked for."""
    return scores.metadata.get("kept", {}).get("keep", len(scores))
