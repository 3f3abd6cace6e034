"""`write_report`: scores as one HTML file, which opens from disk and needs no network."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.files import write_atomically
from ..errors import InputError
from .lists import LENGTH
from .page import Page
from .shares import Shares
from .visible import visible

if TYPE_CHECKING:
    from ..influence.query import Query
    from ..scoring.scores import Scores

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = '<meta name="generator" content="hf_msif">'


def write_report(
    scores: Scores,
    path: str | os.PathLike,
    k: int = LENGTH,
    query: Query | None = None,
    corpus: Any = None,
    shares: Shares | None = None,
    command: str | None = None,
) -> None:
    """Writes what `Scores.to_html` describes, whole or not at all.

    Args:
        scores: those of a query.
        path: of the file; one of this name is replaced.
        k: texts per list.
        query: computes the shares of tokens and layers, see `Shares.of_scores`.
        corpus: the rows that were scored; only read with `query`.
        shares: those that were computed before, in the place of `query`.
        command: prints the same report again, as the reader would type it.

    Raises:
        InputError: k is below 1, a path that is a folder, or scores that do not say which tests they are about.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k is {k!r}; expected at least 1, the number of texts per list.")
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; expected the path of an HTML file, such as report.html in it.")
    if query is not None:
        shares = Shares.of_scores(scores, query, corpus, k)
    text = rendered(Page(scores, k, shares, command))
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def is_report(path: str | os.PathLike) -> bool:
    """Whether a file is one that `write_report` wrote."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(4096)


def rendered(page: Page) -> str:
    """The page as HTML. Texts are escaped, and a policy in the file itself lets no script run but its own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
    environment.filters |= {"number": number, "percent": percent, "log": math.log}
    style, script = ((TEMPLATES / f"report.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"style": style, "script": script, "generator": GENERATOR}
    return environment.get_template("report.html").render(page=page, script_digest=digest, **own)


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, a true minus sign, and a dash where it is not known.

    >>> number(-0.012345), number(12.0, signed=True), number(None), number(1234567.0)
    ('−0.0123', '+12', '–', '1.23e+06')
    """
    if value is None or value != value:
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share for people.

    >>> percent(0.123), percent(-2.0), percent(0.001), percent(None)
    ('12 %', '−200 %', '0.1 %', '–')
    """
    if value is None or value != value:
        return "–"
    return f"{100 * value:.{1 if abs(value) < 0.01 and value else 0}f} %".replace("-", "−")
