"""Tables that people read: the paper's Table 1, printed, as Markdown and as Parquet."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..engine.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

    from ..scoring.scores import Scores


def table_one(scores: Scores, k: int = 1) -> pd.DataFrame:
    """The paper's Table 1: for every test example the k rows of largest and of smallest absolute influence, with
    their scores."""
    import pandas as pd

    rows = []
    for q in range(scores.columns):
        test = test_sentence(scores, q)
        top, bottom = scores.top(k, query=q), scores.bottom(k, query=q)
        rows += [
            {
                "test sentence": test,
                "max |influence|": top.influence[i],
                "sentence with it": _shown(top, i),
                "min |influence|": bottom.influence[i],
                "sentence with that": _shown(bottom, i),
            }
            for i in range(min(k, len(scores)))
        ]
    return pd.DataFrame(rows)


def _shown(rows: pd.DataFrame, i: int) -> str:
    """A row's text; an image, which has none, by its id."""
    return rows.text[i] or f"example {rows.example_id[i]}"


def test_sentence(scores: Scores, query: int) -> str:
    """The test example behind a query column."""
    tests = scores.metadata["tests"]
    if len(tests) == scores.columns:
        return tests[query].get("text", f"example {tests[query].get('example_id')}")
    return f"{len(tests)} test examples together"


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown; a bar inside a text is escaped."""
    from tabulate import tabulate

    safe = table.map(lambda x: " ".join(x.split()).replace("|", "\\|") if isinstance(x, str) else x)
    headers = [c.replace("|", "\\|") for c in table.columns]
    return tabulate(safe, headers, tablefmt="pipe", showindex=False, floatfmt=".4g", disable_numparse=_texts(table))


def plain(table: pd.DataFrame, width: int = 46) -> str:
    """A table for the terminal, long texts wrapped."""
    from tabulate import tabulate

    texts = _texts(table)
    return tabulate(
        table,
        headers="keys",
        tablefmt="simple_grid",
        showindex=False,
        floatfmt=".3g",
        maxcolwidths=[width if number in texts else None for number in range(table.shape[1])],
        disable_numparse=texts,
    )


def _texts(table: pd.DataFrame) -> list[int]:
    """Columns with text, in which tabulate must not take "007" for a number."""
    return [n for n, column in enumerate(table) if table[column].map(lambda x: isinstance(x, str)).any()]


def write_table(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Writes `path`.md and `path`.parquet, each whole or not at all."""
    write_whole(f"{path}.md", lambda part: part.write_text(markdown(table) + "\n", encoding="utf-8"))
    write_whole(f"{path}.parquet", lambda part: table.to_parquet(part, index=False))


def training_line(report: dict) -> str:
    """One line on what training a stage reached."""
    parts = [f"{report['stage']}: trained in {report['seconds']} s"]
    for side in ("train", "test"):
        if side in report:
            found = report[side]
            accuracy = f", accuracy {found['accuracy']:.3f}" if "accuracy" in found else ""
            before = f"{report['test_before']['loss']:.3f} before, " if f"{side}_before" in report else ""
            parts.append(f"{side} loss {before}{found['loss']:.3f}{accuracy} ({found['examples']:,} rows)")
    return "; ".join(parts)
