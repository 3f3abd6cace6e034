"""Deals rows out to processes in batches: little padding, as much work for each."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# One batch more for every process, where the largest load falls by more than this.
WORTH_A_BATCH = 0.25
CHARACTERS = 6  # of a token, about at most; fewer in some scripts, where long rows then seem longer than they are


def cost(row: Mapping[str, Any], objective: Any) -> float:
    """What a row costs: the characters of the text that the objective reads (its `text_column`), as far
    as it reads them; without a text all rows cost alike.

    >>> from types import SimpleNamespace
    >>> cost({"text": "word " * 1000}, SimpleNamespace(text_column="text", max_length=128, tokenizer=None))
    768
    """
    text = row.get(objective.text_column)
    if not isinstance(text, str):
        return 0
    limit = objective.max_length or getattr(objective.tokenizer, "model_max_length", None) or math.inf
    return min(len(text), CHARACTERS * limit)


def deal(costs: Sequence[float], size: int, processes: int) -> list[list[list[int]]]:
    """The row indices of every process's batches, each row in exactly one, each batch of at most `size` rows.

    A batch costs its number of rows times its costliest one, since all are padded to that. Rows sorted by cost are cut
    into ⌈n/(size · processes)⌉ batches a process so that the costliest batch is as cheap as it can be, and these are
    given away, the costliest first, to whoever has least (Graham's rule): its costliest batch comes first.

    >>> deal([1, 9, 1, 1, 9, 1, 1, 1], size=4, processes=2)
    [[[1], [0, 2, 3, 5]], [[4], [6, 7]]]
    """
    values = np.maximum(np.asarray(costs, dtype=float), 1.0)  # rows without a cost count alike
    order = np.argsort(-values, kind="stable")
    values = values[order]
    least = -(-len(values) // (size * processes))
    load, shares = _dealt(values, size, processes, least)
    if processes > 1 and least:
        finer, more = _dealt(values, size, processes, least + 1)
        if finer < (1 - WORTH_A_BATCH) * load:
            shares = more
    return [[order[start:end].tolist() for start, end in share] for share in shares]


def _dealt(values: np.ndarray, size: int, processes: int, each: int):
    """The largest load, and every process's intervals: at most so many batches for each in the mean."""
    # The costliest row is in a batch: none can be cheaper.
    low, high = (float(values[0]), float(values[0] * size)) if len(values) else (0.0, 0.0)
    if len(_cut(values, size, low)) <= each * processes:
        high = low
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if len(_cut(values, size, middle)) <= each * processes:
            high = middle
        else:
            low = middle
    intervals = _cut(values, size, high)
    loads, shares = [(0.0, rank) for rank in range(processes)], [[] for _ in range(processes)]
    for work, interval in sorted(((values[s] * (e - s), (s, e)) for s, e in intervals), key=lambda pair: -pair[0]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(interval)
        heapq.heappush(loads, (load + work, rank))
    return max(loads)[0], shares


def _cut(values: np.ndarray, size: int, budget: float) -> list[tuple[int, int]]:
    """Intervals of the falling `values`: at most `size` long, and within the budget where one row is."""
    found, start = [], 0
    while start < len(values):
        end = min(len(values), start + min(size, max(1, int(budget // values[start]))))
        found.append((start, end))
        start = end
    return found
