"""Tables that people read, for terminals and pipes, as Markdown and as Parquet; the paper's Table 1."""

from __future__ import annotations

import os
import re
import sys
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.files import write_atomically
from ..scoring.overview import name_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import JustifyMethod

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
        test: dict[str, Any] = {"test sentence": test_sentence(scores, column), **_said_of_test(scores, column)}
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


def _said_of_test(scores: Scores, query: int) -> dict[str, Any]:
    """The label, the prediction and the loss of a test example, where a query column is about one."""
    test = scores.tests[query] if len(scores.tests) == scores.columns else {}
    said = {name: test[name] for name in ("label", "prediction") if "prediction" in test}
    return {**said, "test loss": test["loss"]} if "loss" in test else said


def test_sentence(scores: Scores, query: int) -> str:
    """What a query column is about: the test example's text, its id where it has no text, or how many test examples
    it puts together."""
    tests = scores.tests
    return name_of(tests[query]) if len(tests) == scores.columns else f"{len(tests)} test examples together"


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


NARROWEST = 16  # characters of a column of texts in a terminal; where it has fewer, rows are lists


def terminal(table: pd.DataFrame, width: int = 46) -> str:
    """A table for stdout: as wide as the terminal, with wrapped texts; or plain text in a pipe or a file.

    Args:
        table: any; what its texts hold is shown, and is no markup.
        width: characters at which a text is wrapped in plain text.
    """
    if not sys.stdout.isatty():
        return plain(table, width)
    from rich.box import SQUARE
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells, texts = table.map(_cell), _text_columns(table)
    rows, names = cells.values.tolist(), list(map(visible, table.columns))
    headers, narrowest = [], []  # per column; a header may be broken behind its underscores
    for n, name in enumerate(names):
        longest = max(map(cell_len, cells.iloc[:, n]), default=0)
        headers.append(name if cell_len(name) <= longest else name.replace("_", "_\n"))
        needed = max(longest, *map(cell_len, headers[n].split("\n")))
        narrowest.append(min(needed, NARROWEST) if n in texts else needed)
    console = Console()
    # Beside the text of a column stand a border and, where there is room, two spaces.
    paddings = [p for p in (1, 0) if sum(narrowest) + len(names) * (1 + 2 * p) + 1 <= console.width]
    if not paddings:  # a number that is cut short would be another one
        lists = [[f"{name}: {cell}" for name, cell in zip(names, row, strict=True)] for row in rows]
        return "\n\n".join(map("\n".join, lists))
    grid = Table(box=SQUARE, show_lines=True, padding=(0, paddings[0]))
    for n, header in enumerate(headers):
        justify: JustifyMethod = "left" if n in texts else "right"
        grid.add_column(Text(header), justify=justify, overflow="fold", min_width=narrowest[n], no_wrap=n not in texts)
    for row in rows:
        grid.add_row(*map(Text, row))
    with console.capture() as capture:
        console.print(grid)
    return capture.get().rstrip("\n")


def _cell(value: object) -> str:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.3g}"
    return "" if value is None else str(value)


# Control characters but line breaks, and those that turn the direction of what follows; half a character.
INVISIBLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text whose control characters a terminal shows instead of obeying them: colours, bells, other directions.

    >>> print(visible("a \\x1b[31mred\\x1b[0m word"))
    a \\x1b[31mred\\x1b[0m word
    """
    return INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain(table: pd.DataFrame, width: int = 46) -> str:
    """A table as plain text.

    Args:
        table: any.
        width: characters at which a text is wrapped.
    """
    from tabulate import tabulate

    texts = _text_columns(table)
    return tabulate(
        table.map(lambda cell: visible(cell) if isinstance(cell, str) else cell),
        headers=list(map(visible, table.columns)),
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
