"""What scores show of themselves: the summary that `print` and Jupyter show, and the card of a data set on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..display import Summary, Table, cut, few_rows, plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

TESTS = 4  # lines about the tests
ROWS = 3  # of the most helpful and of the most harmful rows


def summary(metadata: Mapping[str, Any], rows: int, first_rows: Mapping[str, pd.DataFrame]) -> Summary:
    """What scores are about, their sign and unit, how reliable they are, and their first rows for test 0.

    Args:
        metadata: of the scores.
        rows: their number.
        first_rows: "helpful" and "harmful" → the first rows of that order, as `Scores.top` has them.
    """
    sentences = meaning(metadata)
    if "kept" in metadata:
        everything = plural(metadata["kept"]["all"][0]["count"], "row")
        sentences.append(f"only the most extreme of {everything} are here (keep={metadata['kept']['keep']:,})")
    if metadata.get("noise_text"):
        sentences.append(metadata["noise_text"])
    tables = [_asked(metadata)] if "tests" in metadata else []
    tables.append(_both_ends(first_rows, metadata["columns"]))
    steps = ['scores.top(10, by="harmful", query=0)', "scores.plot.distribution()", "scores.to_parquet(path)"]
    if metadata["columns"] > 1:
        steps.insert(1, "scores.long()")
    return Summary(title(metadata, rows), sentences, tables, steps=steps)


def title(metadata: Mapping[str, Any], rows: int) -> str:
    """How many rows, of which stage, for how many tests."""
    tests = plural(metadata["columns"], "test")
    if "tests" in metadata and len(metadata["tests"]) != metadata["columns"]:
        tests = f"{plural(len(metadata['tests']), 'test')} together"
    stage = f" of stage {metadata['stage']!r}" if "stage" in metadata else ""
    return f"Scores: {plural(rows, 'row')}{stage}, {tests}"


def meaning(metadata: Mapping[str, Any]) -> list[str]:
    """Sign and unit of the columns, one sentence each."""
    what = metadata.get("measurement", "loss")
    f = "test loss" if what == "loss" else what
    signs = "positive is harmful, negative is helpful" if what == "loss" else "positive raises f, negative lowers f"
    number = f" = {metadata['N']:,.6g}" if "N" in metadata else ""
    return [
        f"influence = ∂f/∂ε, where f is the {f} and ε is more weight on the row: {signs}",
        f"removal_effect = −influence / N, N{number}: the change of f that is predicted where the row is removed",
    ]


def table_of_tests(
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
        return Table(["test", "text"], few_rows(rows, most))
    shown = [[number, f"{value:.4g}", text] for (number, text), value in zip(rows, values, strict=True)]
    return Table(["test", measurement, "text"], few_rows(shown, most))


def name_of(row: Mapping[str, Any]) -> str:
    """The text of a row, or its id where it has no text, as an image."""
    return row.get("text") or f"example {row.get('example_id')}"


def _asked(metadata: Mapping[str, Any]) -> Table:
    values = (metadata.get("certificate") or {}).get("values", [])
    return table_of_tests(metadata["tests"], values, metadata.get("measurement", "loss"))


def _both_ends(first_rows: Mapping[str, pd.DataFrame], columns: int) -> Table:
    """The rows of most negative and of most positive influence on test 0."""
    rows = []
    for by, sign in (("helpful", -1), ("harmful", 1)):
        frame = first_rows[by]
        for row in frame[sign * frame["influence"] > 0].to_dict("records"):
            error = f" ± {row['influence_se']:.2g}" if "influence_se" in row else ""
            numbers = [f"{row['influence']:+.3g}{error}", f"{row['removal_effect']:+.3g}"]
            rows.append([by, *numbers, cut(name_of(row))])
    about = "" if columns == 1 else " for test 0"
    return Table(["", "influence", "removal_effect", "text"], rows, f"the most helpful and harmful rows{about}")
