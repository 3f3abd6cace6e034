"""Deals rows out to the processes in batches, with little padding and about the same work for every process."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# One more batch per process is worth its overhead if the largest load falls by more than this share.
WORTH_A_BATCH = 0.25
# Characters per token, about the most that occur. Some scripts have fewer: their long rows then count as longer than
# they are.
CHARACTERS = 6


class TextSettings(Protocol):
    """What is read of an objective to tell how long a row's text is; `objectives.Objective` has it."""

    @property
    def text_column(self) -> str | None: ...

    @property
    def max_length(self) -> int | None: ...

    @property
    def tokenizer(self) -> Any: ...


class Collator(TextSettings, Protocol):
    """What is read of an objective to make batches of its rows."""

    @property
    def pads(self) -> bool: ...

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]: ...


def row_cost(row: Mapping[str, Any], objective: TextSettings) -> float:
    """Cost of a row, in characters of its text: what the objective reads before it truncates.

    The text is in the objective's `text_column`, a string or a list of words; a token of `input_ids` counts as 6
    characters. At most 6 · max_length characters count, where `max_length` is the objective's, or else its tokenizer's
    `model_max_length`; all of a document that is read in chunks. A row without a text costs 0.

    >>> from types import SimpleNamespace
    >>> row_cost({"text": "word " * 1000}, SimpleNamespace(text_column="text", max_length=128, tokenizer=None))
    768
    """
    text = None if objective.text_column is None else row.get(objective.text_column)
    if text is None and "input_ids" in row:
        length = CHARACTERS * len(row["input_ids"])
    elif isinstance(text, (list, tuple)):  # of words
        length = sum(len(word) for word in text)
    else:
        length = len(text) if isinstance(text, str) else 0
    if getattr(objective, "chunk", None) is not None:  # a document, which is read whole
        return length
    limit = objective.max_length or getattr(objective.tokenizer, "model_max_length", None) or math.inf
    return min(length, CHARACTERS * limit)


def row_shape(row: Mapping[str, Any], objective: Collator) -> tuple:
    """The shapes of a batch of this row alone, without the axes of one dimension that count rows or terms.

    Rows of the same shape share a batch without padding.
    """
    batch = objective.collate([row])
    return tuple((key, tuple(t.shape[1:])) for key, t in sorted(batch.items()) if getattr(t, "ndim", 0) > 1)


def deal_equal(shapes: Sequence[Hashable], costs: Sequence[float], size: int, processes: int) -> list[list[list[int]]]:
    """Deals n rows out to the processes in batches of rows of the same shape.

    The rows of a shape are cut into as few batches as possible, of about the same size. The batches are assigned, the
    costliest first, to the process with the least work so far (Graham's rule).

    Args:
        shapes: one per row, as `row_shape` returns it.
        costs, size, processes: as in `deal_batches`.

    Returns:
        process → its batches, the costliest first → row indices. Each row is in exactly one batch.

    >>> deal_equal([4, 2, 2, 4, 2], [9, 1, 1, 9, 1], size=2, processes=2)
    [[[0, 3]], [[1, 2], [4]]]
    """
    groups: dict[Hashable, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(i)
    batches = []
    for rows in groups.values():
        number = -(-len(rows) // size)
        length = -(-len(rows) // number)
        batches += [rows[start : start + length] for start in range(0, len(rows), length)]
    work = [len(batch) * max(1.0, *(costs[i] for i in batch)) for batch in batches]
    by_work = sorted(range(len(batches)), key=lambda b: -work[b])
    return [[batches[by_work[b]] for b in share] for share in _assigned([work[b] for b in by_work], processes)[1]]


def deal_batches(costs: Sequence[float], size: int, processes: int) -> list[list[list[int]]]:
    """Deals n rows out to the processes in batches.

    A batch costs its number of rows times the cost of its costliest row, since all its rows are padded to that one.
    The rows are sorted by cost and cut into ⌈n/(size · processes)⌉ batches per process, so that the costliest batch is
    as cheap as possible. The batches are then assigned, the costliest first, to the process with the least work so far
    (Graham's rule). Each process gets one batch more if that lowers the largest load by over a quarter.

    Args:
        costs: one cost per row, as `row_cost` returns it.
        size: most rows per batch.
        processes: number of processes.

    Returns:
        process → its batches, the costliest first → row indices. Each row is in exactly one batch.

    >>> deal_batches([1, 9, 1, 1, 9, 1, 1, 1], size=4, processes=2)
    [[[1], [0, 2, 3, 5]], [[4], [6, 7]]]
    """
    values = np.maximum(np.asarray(costs, dtype=float), 1.0)  # rows without a cost count alike
    order = np.argsort(-values, kind="stable")
    values = values[order]
    fewest = -(-len(values) // (size * processes))
    load, shares = _assign(values, size, processes, fewest)
    if processes > 1 and fewest:
        finer_load, finer_shares = _assign(values, size, processes, fewest + 1)
        if finer_load < (1 - WORTH_A_BATCH) * load:
            shares = finer_shares
    return [[order[start:end].tolist() for start, end in share] for share in shares]


def _assign(
    values: np.ndarray, size: int, processes: int, batches_each: int
) -> tuple[float, list[list[tuple[int, int]]]]:
    """The largest load, and every process's intervals of rows: on average at most `batches_each` per process."""
    # The costliest row is in some batch, so the largest batch cost is at least that row's.
    low, high = (float(values[0]), float(values[0] * size)) if len(values) else (0.0, 0.0)
    if len(_intervals(values, size, low)) <= batches_each * processes:
        high = low
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if len(_intervals(values, size, middle)) <= batches_each * processes:
            high = middle
        else:
            low = middle
    intervals = _intervals(values, size, high)
    by_work = sorted(((values[s] * (e - s), (s, e)) for s, e in intervals), key=lambda pair: -pair[0])
    load, shares = _assigned([work for work, _ in by_work], processes)
    return load, [[by_work[b][1] for b in share] for share in shares]


def _assigned(work: Sequence[float], processes: int) -> tuple[float, list[list[int]]]:
    """The largest load, and every process's batches, where each goes to the process with the least work so far."""
    loads = [(0.0, rank) for rank in range(processes)]
    shares: list[list[int]] = [[] for _ in range(processes)]
    for batch, cost in enumerate(work):
        load, rank = heapq.heappop(loads)
        shares[rank].append(batch)
        heapq.heappush(loads, (load + cost, rank))
    return max(loads)[0], shares


def _intervals(values: np.ndarray, size: int, budget: float) -> list[tuple[int, int]]:
    """Cuts the falling `values` into intervals of at most `size` rows that cost at most `budget`, or of one row."""
    intervals, start = [], 0
    while start < len(values):
        end = min(len(values), start + min(size, max(1, int(budget // values[start]))))
        intervals.append((start, end))
        start = end
    return intervals
