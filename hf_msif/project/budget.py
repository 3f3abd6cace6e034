"""What a budget of time buys: rows that are scored, rounds of masks, and rows of the curvature's sample.

Torch is not imported before something is measured, so that a flag can be checked at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import InputError
from .values import shown_text

if TYPE_CHECKING:
    from ..influence.cost import Cost

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
class Solve:
    """What a stage's pull-backs take.

    Attributes:
        seconds: that are proportional to the curvature's sample; all of them where there is none.
        samples: rows on which the curvature is estimated; None: it has none.
        fixed_seconds: that do not depend on the sample.
    """

    seconds: float
    samples: int | None = None
    fixed_seconds: float = 0.0

    @classmethod
    def of(cls, cost: Cost, usual: bool) -> Solve:
        """Of a stage's replicates, as they usually take or at most."""
        samples, fixed = cost.details.get("curvature_examples"), cost.details.get("fixed_seconds", 0.0)
        seconds = cost.usual_seconds if usual else cost.solve_seconds
        return cls(seconds - fixed, None if samples is None else int(samples), fixed)


@dataclass(frozen=True)
class Affordable:
    """What a budget of time buys.

    Attributes:
        rows: that are scored.
        mask_rounds: rounds of masks per row; None where rows are scored without them.
        curvature_samples: stage → rows on which its curvature is estimated, for the stages that have such.
        solve_seconds: what the query takes.
        seconds: what all of this takes.
    """

    rows: int
    mask_rounds: int | None
    curvature_samples: dict[str, int]
    solve_seconds: float
    seconds: float


def within(
    budget: float,
    seconds_per_row: float,
    rows: int,
    solves: Mapping[str, Solve] = MappingProxyType({}),
    *,
    mask_rounds: int | None = None,
    fewest_rows: int | None = None,
) -> Affordable:
    """What a query and a scoring can do within a budget of time.

    Everything as it is configured, if that fits; what is left buys further rounds of masks for all rows, as many as
    `mask_rounds="auto"` takes at most. Otherwise fewer rows are scored. Solves that take more than half of the
    budget, and more than the scoring leaves to them, get smaller samples of their curvatures, all in proportion.

    Args:
        budget: seconds for all of it.
        seconds_per_row: of scoring one row, with its `mask_rounds`.
        rows: that there are to score.
        solves: stage → what its pull-backs take.
        mask_rounds: rounds of masks in `seconds_per_row`; None: rows are scored without them.
        fewest_rows: that are scored, if there are as many, also where that takes longer than the budget; None: a
            budget that is too short for one row is refused.

    Raises:
        InputError: the budget is too short to score one row.

    >>> bought = within(60.0, 0.01, 1000, {"pretraining": Solve(20.0, 2048)}, mask_rounds=1)
    >>> bought.rows, bought.mask_rounds, bought.curvature_samples, bought.seconds
    (1000, 4, {'pretraining': 2048}, 60.0)
    >>> bought = within(60.0, 0.01, 9000, {"pretraining": Solve(120.0, 2048)}, mask_rounds=1)
    >>> bought.rows, bought.mask_rounds, bought.curvature_samples, bought.seconds
    (3000, 1, {'pretraining': 512}, 60.0)
    """
    from ..engine.progress import duration
    from ..scoring.mask_noise import MOST_ROUNDS

    sampled = {name: solve.samples for name, solve in solves.items() if solve.samples is not None}
    elastic = sum(solves[name].seconds for name in sampled)
    fixed = sum(solve.seconds + solve.fixed_seconds for solve in solves.values()) - elastic
    available = budget - fixed
    allowed = max(0.0, available / 2, available - rows * seconds_per_row)
    solving = fixed
    if elastic > allowed:
        share = allowed / elastic
        for name, samples in sampled.items():
            sampled[name] = min(samples, max(FEWEST_SAMPLES, int(samples * share)))
            solving += solves[name].seconds * sampled[name] / samples
    else:
        solving += elastic
    available = budget - solving
    if available < seconds_per_row and fewest_rows is None:
        raise InputError(
            f"a budget of {duration(budget)} is too short to score one row; expected at least "
            f"{duration(solving + seconds_per_row)}, or a configuration with fewer test rows or a cheaper solver."
        )
    affordable = rows if seconds_per_row <= 0 else min(rows, max(fewest_rows or 1, int(available / seconds_per_row)))
    rounds = mask_rounds
    seconds = affordable * seconds_per_row
    if mask_rounds is not None and affordable == rows and seconds > 0:
        times = max(1, min(int(available / seconds), MOST_ROUNDS // mask_rounds))
        rounds, seconds = times * mask_rounds, times * seconds
    return Affordable(affordable, rounds, sampled, solving, solving + seconds)
