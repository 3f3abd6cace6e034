"""`Sink`: where the scores of a corpus go, part by part; `NullSink`, and `WriteBehind`, which writes in a thread.

A corpus is cut into *parts* of consecutive rows, all of the same size but the last, whatever number of processes
scores them. The sinks themselves are in `in_memory` (all rows), `on_disk` (all rows) and `extremes` (the
extreme rows and a summary of all, in memory or on disk).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .scores import Scores

if TYPE_CHECKING:
    import pandas as pd


@runtime_checkable
class Sink(Protocol):
    """Takes the scores of a corpus, one part after another in the order of the corpus."""

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        """Whether part `number`, which consists of `rows`, is still to be scored. Asked of every part once.

        Raises:
            InputError: other rows were scored as this part before the scoring was interrupted.
        """
        ...

    def add(self, number: int, rows: Sequence[dict], frame: pd.DataFrame, truncated: int) -> None:
        """Takes the scores of a part that was missing.

        Args:
            number: of the part; the first part of a corpus has number 0.
            rows: of the part.
            frame: the columns of `Scores`, without `duplicates`.
            truncated: how many of the rows were longer than the model reads.
        """
        ...

    def finish(self, parts: int, metadata: dict) -> Scores:
        """The scores of the whole corpus, which had `parts` parts; `metadata` becomes part of theirs."""
        ...


class NullSink:
    """Takes nothing: the sink of the processes that leave writing to the main one.

    Args:
        path: the file that the main process writes; it exists by the time that `finish` is called.
    """

    def __init__(self, path: Path):
        self.path = path

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        return False

    def add(self, number: int, rows: Sequence[dict], frame: object, truncated: int) -> None:
        pass

    def finish(self, parts: int, metadata: dict) -> Scores:
        return Scores.from_parquet(self.path)


class WriteBehind:
    """A sink whose `add` returns at once: a thread adds the part to `sink`, one part at a time and in order.

    What `sink.add` raised is raised by the next call of any method; nothing is added to `sink` after that. Used as a
    context manager: where the block fails for another reason, a failure that was not raised yet becomes a note of the
    block's exception.

    Args:
        sink: any sink.
        ahead: how many parts may wait to be added; `add` blocks while there are as many.
    """

    def __init__(self, sink: Sink, ahead: int = 1):
        self.sink, self.ahead = sink, ahead
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque()
        self._failure: BaseException | None = None
        self._raised = False

    def missing(self, number: int, rows: Sequence[dict]) -> bool:
        self._wait(self.ahead)
        return self.sink.missing(number, rows)

    def add(
        self, number: int, rows: Sequence[dict], frame: pd.DataFrame | Callable[[], pd.DataFrame], truncated: int
    ) -> None:
        """As `Sink.add`; `frame` may also be a function that makes the frame, which then runs in the thread."""
        self._wait(self.ahead - 1)
        self._pending.append(self._pool.submit(self._add, number, rows, frame, truncated))

    def finish(self, parts: int, metadata: dict) -> Scores:
        self._wait(0)
        return self.sink.finish(parts, metadata)

    def _add(self, number: int, rows: Sequence[dict], frame, truncated: int) -> None:
        if self._failure is None:
            try:
                self.sink.add(number, rows, frame() if callable(frame) else frame, truncated)
            except BaseException as error:
                self._failure = error

    def _wait(self, pending: int) -> None:
        """Waits until at most that many parts are pending, and raises what adding one raised."""
        while len(self._pending) > pending:
            wait([self._pending[0]])  # where this is interrupted, the part stays pending
            self._pending.popleft()
        if self._failure is not None:
            self._raised = True
            raise self._failure

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._pool.shutdown()
        if self._failure is None or self._raised:
            return
        if error is None:
            raise self._failure
        error.add_note(f"Writing the scores of earlier rows failed as well: {self._failure}")
