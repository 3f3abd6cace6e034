"""Deals rows out to the processes in batches, with little padding and about the same work for every process."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
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

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]: ...


def row_cost(row: Mapping[str, Any], objective: TextSettings) -> float:
    """Cost of a row, in characters of its text: what the objective reads before it truncates.

    The text is in the objective's `text_column`. At most 6 · max_length characters count,
    where `max_length` is the objective's, or else its tokenizer's `model_max_length`. A row without a text costs 0.

    >>> from types import SimpleNamespace
    >>> row_cost({"text": "word " * 1000}, SimpleNamespace(text_column="text", max_length=128, tokenizer=None))
    768
    """
    text = None if objective.text_column is None else row.get(objective.text_column)
    if not isinstance(text, str):
        return 0
    limit = objective.max_length or getattr(objective.tokenizer, "model_max_length", None) or math.inf
    return min(len(text), CHARACTERS * limit)


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
    loads = [(0.0, rank) for rank in range(processes)]
    shares: list[list[tuple[int, int]]] = [[] for _ in range(processes)]
    for work, interval in sorted(((values[s] * (e - s), (s, e)) for s, e in intervals), key=lambda pair: -pair[0]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(interval)
        heapq.heappush(loads, (load + work, rank))
    return max(loads)[0], shares


def _intervals(values: np.ndarray, size: int, budget: float) -> list[tuple[int, int]]:
    """Cuts the falling `values` into intervals of at most `size` rows that cost at most `budget`, or of one row."""
    intervals, start = [], 0
    while start < len(values):
        end = min(len(values), start + min(size, max(1, int(budget // values[start]))))
        intervals.append((start, end))
        start = end
    return intervals
