"""What a budget of time buys: rows that are scored, rounds of masks, and rows of the curvature's sample.

Torch is not imported before something is measured, so that a flag can be checked at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError
from .values import shown_text

SECONDS = {"h": 3600, "m": 60, "s": 1}
BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
LONGEST = 10 * 365 * 24 * 3600  # seconds; a longer budget is a slip of the keyboard
FEWEST_SAMPLES = 64  # rows of a curvature's sample: fewer estimate too few directions


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


@dataclass(frozen=True)
class Affordable:
    """What a budget of time buys.

    Attributes:
        rows: that are scored.
        mask_rounds: rounds of masks per row; None where rows are scored without them.
        curvature_samples: rows on which the curvature of the ranked stage is estimated; None where it has none.
        seconds: what all of this takes.
    """

    rows: int
    mask_rounds: int | None
    curvature_samples: int | None
    seconds: float


def within(
    budget: float,
    seconds_per_row: float,
    rows: int,
    *,
    mask_rounds: int | None = None,
    solve_seconds: float = 0.0,
    curvature_samples: int | None = None,
    other_seconds: float = 0.0,
) -> Affordable:
    """What a query and a scoring can do within a budget of time.

    Everything as it is configured, if that fits; what is left buys further rounds of masks for all rows, as many as
    `mask_rounds="auto"` takes at most. Otherwise fewer rows are scored. A solve that takes more than half of the
    budget, and more than the scoring leaves to it, gets a smaller sample of the curvature: its time is proportional
    to the sample.

    Args:
        budget: seconds for all of it.
        seconds_per_row: of scoring one row, with its `mask_rounds`.
        rows: that there are to score.
        mask_rounds: rounds of masks in `seconds_per_row`; None: rows are scored without them.
        solve_seconds: of the pull-back through the ranked stage, as it usually takes.
        curvature_samples: rows on which this pull-back estimates its curvature; None: it has none.
        other_seconds: of all that does not change, such as the pull-backs through the other stages.

    Raises:
        InputError: the budget is too short to score one row.

    >>> within(60.0, 0.01, 1000, mask_rounds=1, solve_seconds=20.0, curvature_samples=2048)
    Affordable(rows=1000, mask_rounds=4, curvature_samples=2048, seconds=60.0)
    >>> within(60.0, 0.01, 9000, mask_rounds=1, solve_seconds=120.0, curvature_samples=2048)
    Affordable(rows=3000, mask_rounds=1, curvature_samples=512, seconds=60.0)
    """
    from ..engine.progress import duration
    from ..scoring.mask_noise import MOST_ROUNDS

    available = budget - other_seconds
    solve, samples = solve_seconds, curvature_samples
    allowed = max(available / 2, available - rows * seconds_per_row)
    if curvature_samples is not None and solve_seconds > allowed:
        samples = min(curvature_samples, max(FEWEST_SAMPLES, int(curvature_samples * allowed / solve_seconds)))
        solve = solve_seconds * samples / curvature_samples
    available -= solve
    if available < seconds_per_row:
        least = other_seconds + solve + seconds_per_row
        raise InputError(
            f"a budget of {duration(budget)} is too short to score one row; expected at least {duration(least)}, or "
            "a configuration with fewer test rows or a cheaper solver."
        )
    affordable = rows if seconds_per_row <= 0 else min(rows, int(available / seconds_per_row))
    rounds = mask_rounds
    seconds = affordable * seconds_per_row
    if mask_rounds is not None and affordable == rows and seconds > 0:
        times = max(1, min(int(available / seconds), MOST_ROUNDS // mask_rounds))
        rounds, seconds = times * mask_rounds, times * seconds
    return Affordable(affordable, rounds, samples, other_seconds + solve + seconds)
