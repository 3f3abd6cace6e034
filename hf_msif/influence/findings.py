"""`Finding`: what a check of a stage found; `check` and `findings` run the checks of `registry.CHECKS` in order, and
`diagnosed` those and the diagnostics of `registry.DIAGNOSTICS`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import InputError
from ..registry import CHECKS, DIAGNOSTICS, registered


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name in `registry.CHECKS` or `registry.DIAGNOSTICS`.
        text: the result, for people; where the stage is refused, why, and the way out.
        value: what was measured, relative; None where the check does not apply, was skipped or refuses.
        refused: whether the stage is refused.
        seconds: how long it took.
    """

    check: str
    text: str
    value: float | None = None
    refused: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        measured = "" if self.value is None else f" (relative difference {self.value:.0e})"
        return f"{self.check}: {'REFUSED. ' if self.refused else ''}{self.text}{measured}"


def check(bound: Any, names: Collection[str] = tuple(CHECKS)) -> list[Finding]:
    """The findings about a stage that no check refuses.

    Args:
        bound: the stage, a `chain.BoundStage` (whose module imports this one).
        names: of the checks; defaults to all.

    Warns:
        UserWarning: padding reaches the loss, so that batches of rows of equal length are used.

    Raises:
        InputError: a check refuses the stage.
    """
    results = []
    for finding in findings(bound, names):
        if finding.refused:
            raise InputError(finding.text)
        results.append(finding)
    return results


def findings(bound: Any, names: Collection[str] = tuple(CHECKS)) -> Iterator[Finding]:
    """Runs the checks that a bound stage does not skip, by all processes together; all get what the main one found.

    Args:
        bound: the stage.
        names: of the checks; defaults to all.
    """
    for name in names:
        if name in bound.stage.skip_checks:
            yield Finding(name, "skipped")
            continue
        yield _finding(bound, name, registered(CHECKS, name))


def diagnosed(bound: Any) -> list[Finding]:
    """The findings of all checks and, if none refuses the stage, of all diagnostics."""
    results = list(findings(bound))
    if any(finding.refused for finding in results):
        return results
    return results + [_finding(bound, name, registered(DIAGNOSTICS, name)) for name in DIAGNOSTICS]


def _finding(bound: Any, name: str, run: Callable[[Any], Finding]) -> Finding:
    started = time.perf_counter()
    try:
        finding = bound.engine.broadcast_object(run(bound))
    except InputError as error:
        finding = Finding(name, str(error), refused=True)
    return replace(finding, seconds=round(time.perf_counter() - started, 3))
