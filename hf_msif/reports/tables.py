"""Tables that people read, for the terminal, as Markdown and as Parquet; the paper's Table 1."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from ..scoring.scores import Scores


def table_one(scores: Scores, k: int = 1) -> pd.DataFrame:
    """The paper's Table 1: for every test example the k rows of the largest and of the smallest absolute influence.

    Args:
        scores: of any corpus.
        k: how many of either.

    Returns:
        One row per test example and rank below min(k, rows of the corpus). Influences are signed: positive raises the
        test loss, or what else the column `explained` names.
        Without the columns of the smallest influence where the scores come from a shortlist, which does not seek it.
    """
    import pandas as pd

    rows = []
    for column in range(scores.columns):
        test: dict[str, Any] = {"test sentence": test_sentence(scores, column), **_said_of_test(scores, column)}
        if scores.metadata.get("measurement", "loss") != "loss":
            test["explained"] = scores.metadata["measurement"]
        top = scores.top(k, query=column)
        found = [{"max |influence|": top.influence[i], "sentence with it": _shown(top, i)} for i in range(len(top))]
        if "shortlist" not in scores.metadata:
            bottom = scores.bottom(k, query=column)
            for i, row in enumerate(found):
                row |= {"min |influence|": bottom.influence[i], "sentence with that": _shown(bottom, i)}
        rows += [{**test, **row} for row in found]
    return pd.DataFrame(rows)


def _shown(rows: pd.DataFrame, i: int) -> str:
    """The text of row i, or its id where it has no text, as an image."""
    return rows.text[i] or f"example {rows.example_id[i]}"


def _said_of_test(scores: Scores, query: int) -> dict[str, Any]:
    """The label, the prediction and the loss of a test example, where a query column is about one."""
    test = scores.tests[query] if len(scores.tests) == scores.columns else {}
    said = {name: test[name] for name in ("label", "prediction") if "prediction" in test}
    return {**said, "test loss": test["loss"]} if "loss" in test else said


def test_sentence(scores: Scores, query: int) -> str:
    """What a query column is about: the test example's text, its id where it has no text, or how many test examples
    it puts together."""
    tests = scores.tests
    if len(tests) == scores.columns:
        return tests[query].get("text", f"example {tests[query].get('example_id')}")
    return f"{len(tests)} test examples together"


def test_line(scores: Scores, query: int) -> str:
    """A query column in one line: the test example, with its label, the prediction and the loss where they are
    known."""
    said = _said_of_test(scores, query)
    parts = [f"label {said['label']}, predicted {said['prediction']}"] if "prediction" in said else []
    if parts:
        parts[0] += f" ({scores.tests[query]['probability']:.0%})"
    parts += [f"loss {said['test loss']:.3g}"] if "test loss" in said else []
    return f"{test_sentence(scores, query)} [{', '.join(parts)}]" if parts else test_sentence(scores, query)


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown; a bar inside a text is escaped, and a line break becomes a space."""
    from tabulate import tabulate

    escaped = table.map(lambda cell: " ".join(cell.split()).replace("|", "\\|") if isinstance(cell, str) else cell)
    headers = [name.replace("|", "\\|") for name in table.columns]
    texts = _text_columns(table)
    return tabulate(escaped, headers, tablefmt="pipe", showindex=False, floatfmt=".4g", disable_numparse=texts)


def plain(table: pd.DataFrame, width: int = 46) -> str:
    """A table for the terminal.

    Args:
        table: any.
        width: characters at which a text is wrapped.
    """
    from tabulate import tabulate

    texts = _text_columns(table)
    return tabulate(
        table,
        headers="keys",
        tablefmt="simple_grid" if shows("┌") else "grid",  # a terminal of ASCII has no lines
        showindex=False,
        floatfmt=".3g",
        maxcolwidths=[width if n in texts else None for n in range(table.shape[1])],
        disable_numparse=texts,
    )


def shows(text: str) -> bool:
    """Whether stdout can show all characters of a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        return False
    return True


def _text_columns(table: pd.DataFrame) -> list[int]:
    """Numbers of the columns that hold text, in which tabulate must not take "007" for a number."""
    return [n for n, name in enumerate(table) if table[name].map(lambda cell: isinstance(cell, str)).any()]


def files_of_table(path: str | os.PathLike) -> list[Path]:
    """The files that `write_table` writes."""
    return [Path(f"{path}.md"), Path(f"{path}.parquet")]


def write_table(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Writes `path`.md and `path`.parquet, each whole or not at all."""
    text, parquet = files_of_table(path)
    write_atomically(text, lambda part: part.write_text(markdown(table) + "\n", encoding="utf-8"))
    write_atomically(parquet, lambda part: table.to_parquet(part, index=False))


def training_line(report: dict) -> str:
    """One line on what training a stage reached, from what `run_dir/<stage>.json` holds."""
    parts = [f"{report['stage']}: trained in {report['seconds']} s"]
    for side in ("train", "test"):
        if side in report:
            figures = report[side]
            accuracy = f", accuracy {figures['accuracy']:.3f}" if "accuracy" in figures else ""
            before = f"{report['test_before']['loss']:.3f} before, " if f"{side}_before" in report else ""
            parts.append(f"{side} loss {before}{figures['loss']:.3f}{accuracy} ({figures['examples']:,} rows)")
    return "; ".join(parts)
