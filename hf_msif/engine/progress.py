"""Progress of long work: a bar in a terminal or a notebook, and a plain line now and then in a log."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import auto, std
from tqdm.asyncio import tqdm_asyncio

SECONDS = 10.0  # from one line of a log to the next


def bar(iterable: Iterable | None = None, *, shown: bool = True, **settings: Any) -> auto.tqdm:
    """A bar on stderr that vanishes at the end; where stderr is no terminal, a line every ten seconds in its place.

    Args:
        iterable: what is passed through, if anything.
        shown: whether anything is printed.
        settings: tqdm's: `desc`, `total`, `initial`, and `unit` with a space before it.
    """
    in_notebook = auto.tqdm is not tqdm_asyncio
    if in_notebook or sys.stderr.isatty():
        return auto.tqdm(iterable, disable=not shown, dynamic_ncols=True, leave=False, **settings)
    return _Lines(iterable, disable=not shown, mininterval=SECONDS, leave=False, **settings)


class _Lines(std.tqdm):
    """A bar of lines: a carriage return makes one endless line of a log."""

    told = math.inf  # when the last line was printed; tqdm displays a bar while it makes it

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        if not self.disable:
            self.told, self.sp = self.start_t, None  # without `sp`, which prints bars, `close` clears none

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints the line, if the last one was printed ten seconds ago."""
        now = self._time()
        if now - self.told >= SECONDS:
            self.told = now
            print(_line(self.format_dict), file=self.fp, flush=True)


def _line(state: dict[str, Any]) -> str:
    n, total, elapsed = state["n"], state["total"], state["elapsed"]
    done = n - state["initial"]
    if total and done > 0:
        text = f"{n:,} of {total:,}{state['unit']}, {duration((total - n) * elapsed / done)} left"
    else:
        text = f"{n:,}{state['unit']} in {duration(elapsed)}"
    described = f"{state['prefix']}: {text}" if state["prefix"] else text
    return f"{described}, {state['postfix']}" if state["postfix"] else described


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(5.25), duration(75), duration(300), duration(9000)
    ('5.2 s', '75 s', '5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
