"""What a budget of time buys: how many rows can be scored, with how many rounds of masks."""

from __future__ import annotations

import re

from ..errors import InputError
from .values import shown_text

SECONDS = {"h": 3600, "m": 60, "s": 1}
BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
LONGEST = 10 * 365 * 24 * 3600  # seconds; a longer budget is a slip of the keyboard


def parse_budget(text: str) -> float:
    """Seconds of a budget of time: hours, minutes and seconds, in this order, each with its letter.

    Raises:
        InputError: the text is no such time, or none from 0 (not included) to ten years.

    >>> parse_budget("90s"), parse_budget("10m"), parse_budget("1h30m")
    (90.0, 600.0, 5400.0)
    """
    match = BUDGET.fullmatch(text.strip())
    numbers = match.groups() if match else ()
    seconds = sum(float(number or 0) * unit for number, unit in zip(numbers, SECONDS.values(), strict=False))
    if not 0 < seconds <= LONGEST:
        raise InputError(f"the budget is {shown_text(text)}; expected a time such as 90s, 10m, 2h or 1h30m.")
    return seconds
