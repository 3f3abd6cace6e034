"""What no configuration may hold: text that no file holds, and values without an end."""

from __future__ import annotations

import datetime
from typing import Any

from ..errors import InputError

LONGEST_PATH = 250  # characters of a path that are shown
DEEPEST, MOST_VALUES = 100, 100_000  # what is beyond is no list of settings


def check_values(values: Any) -> None:
    """Checks the values of a configuration before any other code walks through them.

    Raises:
        InputError: text with a NUL or half of a surrogate pair, a value that contains itself, values nested deeper
            than `DEEPEST`, or more than `MOST_VALUES` of them (what a YAML alias names counts each time).
    """
    count = 0

    def visit(value: Any, path: tuple[str, ...], above: tuple[int, ...]) -> None:
        nonlocal count
        count += 1
        if count > MOST_VALUES:
            raise InputError(
                f"{shown_key(path)} holds more than {MOST_VALUES:,} values, aliases counted each time; expected the "
                "settings of a run: shorten it."
            )
        if isinstance(value, str) and not _is_plain(value):
            raise InputError(
                f"{shown_key(path)} is {shown_text(value)}; expected text without NUL and halves of surrogate pairs."
            )
        if isinstance(value, (bytes, datetime.date, set)):  # of the tags !!binary, !!timestamp and !!set of YAML
            raise InputError(
                f"{shown_key(path)} is a {type(value).__name__}; expected text, numbers and lists of them."
            )
        if not isinstance(value, (dict, list, tuple)):
            return
        if id(value) in above:
            raise InputError(f"{shown_key(path)} contains itself, by an alias of YAML; expected values with an end.")
        if len(above) > DEEPEST:
            raise too_deep(shown_key(path))
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            inner_path = (*path, str(name))
            if not _is_plain(str(name)):
                raise InputError(
                    f"the key {shown_key(inner_path)} holds NUL or half of a surrogate pair; expected plain text."
                )
            visit(inner, inner_path, (*above, id(value)))

    visit(values, (), ())


def too_deep(what: str) -> InputError:
    """The refusal of values that are nested too deep."""
    return InputError(f"{what} is nested deeper than {DEEPEST} levels; expected the settings of a run: flatten it.")


def shown_key(path: tuple[str, ...]) -> str:
    """A dotted key, in characters that every terminal shows; its first parts where there are many."""
    return ascii(".".join(path[:8]))[1:-1] or "the configuration"


def shown_text(text: str, most: int = 80) -> str:
    """Text in quotes, in characters that every terminal shows; cut where it has more than `most` of them.

    >>> print(shown_text("a\\0b"))
    'a\\x00b'
    """
    shown = ascii(text)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def shortened(value: Any) -> str:
    """A value as text; its beginning where it is long.

    >>> shortened(10**200)
    'a number of 201 digits'
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of {len(str(abs(value))) if abs(value) < 10**4000 else 'thousands of'} digits"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_plain(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
