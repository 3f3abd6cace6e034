"""What `print`, Jupyter and a card on the Hub show of an object: one `Summary`, as text, HTML and Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

TEXT_WIDTH = 60  # characters at which a user's text is cut
LINES = 20  # of a summary


@dataclass(frozen=True)
class Table:
    """A small table of a summary.

    Attributes:
        headings: of the columns.
        rows: cells, each a text.
        title: what the rows are.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Summary:
    """A title, a few sentences, small tables, and what to type next.

    >>> print(Summary("Scores: 2 rows", ["Positive is harmful."], [Table(["influence", "text"], [["+1", "tax"]])]))
    Scores: 2 rows
    Positive is harmful.
    influence    text
    +1           tax

    Attributes:
        title: one line.
        sentences: what a reader needs to know, the most important first.
        tables: small ones.
        notes: sentences on the tables, below them.
        steps: expressions that a reader may type next.
    """

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    steps: Sequence[str] = ()

    def __str__(self) -> str:
        from tabulate import tabulate

        parts = [self.title, *self.sentences]
        for table in self.tables:
            parts += [table.title] * bool(table.title)
            parts.append(tabulate(table.rows, table.headings, tablefmt="plain", disable_numparse=True))
        parts += self.notes
        if self.steps:
            parts.append("next: " + "; ".join(self.steps))
        return "\n".join(parts)

    def html(self) -> str:
        """The same for Jupyter; every text is escaped.

        >>> "<b>" in Summary("Scores", tables=[Table(["text"], [["<b>"]])]).html()
        False
        """
        parts = [f"<p><strong>{escape(self.title)}</strong></p>"]
        parts += [f"<p>{escape(sentence)}</p>" for sentence in self.sentences]
        parts += [_html_table(table) for table in self.tables]
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        if self.steps:
            parts.append("<p>next: " + "; ".join(f"<code>{escape(step)}</code>" for step in self.steps) + "</p>")
        return "\n".join(parts)

    def markdown(self) -> str:
        """The same for a card, without what to type next; no text is read as Markdown or HTML."""
        parts = [f"**{markdown_text(self.title)}**", *map(markdown_text, self.sentences)]
        for table in self.tables:
            parts += [markdown_text(table.title)] * bool(table.title)
            rows = [table.headings, ["---"] * len(table.headings), *table.rows]
            cells = [row if n == 1 else list(map(markdown_text, row)) for n, row in enumerate(rows)]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in cells))
        return "\n\n".join([*parts, *map(markdown_text, self.notes)])


@dataclass(frozen=True)
class Curves:
    """What a picture of a certificate shows, on a logarithmic axis y.

    Attributes:
        x, y: what the axes are.
        lines: name → values of x and of y.
        limit: the value of y that is accepted at most; None: there is none.
        are_points: whether a line is a cloud of points, such as one per column.
    """

    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    limit: float | None = None
    are_points: bool = False


class Displayed:
    """An object that is shown by its summary: all of it by `print` and Jupyter, the title by the interpreter.

    A subclass writes `summary`. A dataclass must be made with `repr=False`.
    """

    def summary(self) -> Summary:
        """What is shown of the object."""
        raise NotImplementedError

    def curves(self) -> Curves | None:
        """What a picture of the object shows; None: there is none."""
        return None

    def __str__(self) -> str:
        return str(self.summary())

    def __repr__(self) -> str:
        return f"<{self.summary().title}>"

    def _repr_html_(self) -> str:
        return self.summary().html()


def cut(text: object, width: int = TEXT_WIDTH) -> str:
    """A text on one line of at most `width` characters; what cannot be printed, such as a terminal's control
    characters, becomes �.

    >>> cut("vote\\n for the wall", 10), cut("tax")
    ('vote for…', 'tax')
    """
    line = " ".join(str(text).split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def plural(number: int, noun: str) -> str:
    """A number with its noun.

    >>> plural(1, "iteration"), plural(1200, "row")
    ('1 iteration', '1,200 rows')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def few_lines(lines: Sequence[str], most: int = LINES) -> list[str]:
    """The lines, or the first ones and how many more there are: `most` at most.

    >>> few_lines(["a", "b", "c", "d"], most=3)
    ['a', 'b', '… and 2 more lines']
    """
    if len(lines) <= most:
        return list(lines)
    return [*lines[: most - 1], f"… and {plural(len(lines) - most + 1, 'more line')}"]


def few_rows(rows: Sequence[Sequence[str]], most: int = LINES) -> list[Sequence[str]]:
    """The rows of a table, or the first ones and a row that says how many more there are: `most` at most.

    >>> few_rows([["a", "1"], ["b", "2"], ["c", "3"]], most=2)
    [['a', '1'], ['… 2 more', '']]
    """
    if len(rows) <= most:
        return list(rows)
    return [*rows[: most - 1], [f"… {len(rows) - most + 1:,} more", *[""] * (len(rows[0]) - 1)]]


def markdown_text(text: str) -> str:
    """A text in which no character means something in Markdown or HTML.

    >>> print(markdown_text("[a|b] <i>"))
    \\[a\\|b\\] &lt;i&gt;
    """
    return re.sub(r"([\\`*_{}\[\]()#|~!])", r"\\\1", escape(text, quote=False))


def _html_table(table: Table) -> str:
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    rows = [("th", table.headings), *(("td", row) for row in table.rows)]
    lines = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in rows]
    return f"<table>{caption}" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
