"""Tables that people read, for the terminal, as Markdown and as Parquet; the paper's Table 1."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.files import write_atomically
from ..errors import InputError
from ..scoring.overview import name_of

if TYPE_CHECKING:
    import pandas as pd

    from ..scoring.scores import Scores


def table_one(scores: Scores, k: int = 1) -> pd.DataFrame:
    """The paper's Table 1: for every test example the k rows of the largest and of the smallest absolute influence.

    Args:
        scores: of any corpus.
        k: how many of either.

    Returns:
        One row per test example and rank below min(k, rows of the corpus). `strongest influence` is that of
        `most influential sentence`, the largest in absolute value; `weakest influence` that of
        `least influential sentence`. Both are signed: positive raises the test loss, or what else the column
        `explained` names. Without the weakest ones where the scores come from a shortlist, which does not seek them.
    """
    import pandas as pd

    lines = []
    for column in range(scores.columns):
        test = {"test sentence": test_sentence(scores, column)}
        if scores.metadata.get("measurement", "loss") != "loss":
            test["explained"] = scores.metadata["measurement"]
        ends = {"strongest": ("most influential sentence", scores.top(k, query=column))}
        if "shortlist" not in scores.metadata:
            ends["weakest"] = ("least influential sentence", scores.bottom(k, query=column))
        for rank in range(len(ends["strongest"][1])):
            line = dict(test)
            for end, (heading, rows) in ends.items():
                row = rows.iloc[rank].to_dict()
                line |= {f"{end} influence": row["influence"], heading: name_of(row)}
            lines.append(line)
    return pd.DataFrame(lines)


def test_sentence(scores: Scores, query: int) -> str:
    """What a query column is about: the test example's text, its id where it has no text, or how many test examples
    it puts together."""
    tests = scores.metadata.get("tests")
    if tests is None:
        raise InputError("these scores do not say which tests they are about; expected those of a query: score again.")
    return name_of(tests[query]) if len(tests) == scores.columns else f"{len(tests)} test examples together"


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
