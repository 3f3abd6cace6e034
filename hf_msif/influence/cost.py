"""What a pull-back costs: the record that `plan` prints, and how time and memory are measured on one batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..curvature import Curvature
from ..engine.progress import duration


@dataclass(frozen=True)
class Cost:
    """Cost of differentiating one stage for Q columns, on each process.

    Attributes:
        solve_seconds: time of the pull-back; an upper bound.
        score_seconds_per_row: time of scoring one row for all columns.
        memory_bytes: bytes held at a time beside the model.
        model_bytes: bytes of the model's parameters.
        vector_bytes: bytes of the stage's solution in a saved query.
        disk_bytes: bytes written beside the query.
        details: further numbers by name, JSON-able.
        text: lines for people.
    """

    solve_seconds: float
    score_seconds_per_row: float
    memory_bytes: int
    model_bytes: int
    vector_bytes: int
    disk_bytes: int = 0
    details: Mapping[str, float] = field(default_factory=dict)
    text: tuple[str, ...] = ()

    @property
    def usual_seconds(self) -> float:
        """Time that the pull-back usually takes; `solve_seconds` where nothing foretells less."""
        return self.details.get("usual_solve_seconds", self.solve_seconds)

    def to_dict(self) -> dict[str, float]:
        """All numbers by name, ready for JSON."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("details", "text")}
        return {**numbers, **self.details}


def best_seconds(work: Callable, *arguments, once: bool = False) -> float:
    """Wall time of `work(*arguments)` in seconds, the best of up to three calls.

    No further call starts after 0.2 s, or where `once` is true.
    """
    times: list[float] = []
    while not times or (not once and len(times) < 3 and sum(times) < 0.2):
        started = time.perf_counter()
        work(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def time_text(seconds: float) -> str:
    """Seconds for people: "about 12 s", "about 5 min", "about 2.5 h"."""
    return f"about {duration(seconds)}"


def size_text(size: float) -> str:
    """Bytes for people.

    >>> size_text(12), size_text(2048)
    ('12 B', '2.0 KiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""


def attended(batch: Mapping[str, Any]) -> int:
    """Number of rows times squared length, of the widest tensor of a batch: the work of attention grows with it."""
    shapes = [t.shape for t in batch.values() if isinstance(t, Tensor) and t.dim() > 1]
    return max((shape[0] * shape[1] ** 2 for shape in shapes), default=0)


def activation_bytes(operator: Curvature, columns: int) -> int:
    """The most bytes that autograd holds during a product with Q = `columns` columns, on this process's batch with the
    most attention work."""
    evaluation = max(operator._passing(), key=lambda evaluation: attended(evaluation.batch), default=None)
    if evaluation is None:
        return 0
    v = vectors.rademacher(operator.parameters, min(columns, 2), seed=0)  # all columns from the second share one graph
    parameters = {p.untyped_storage()._cdata for p in operator.model.parameters.values()}
    saved = _SavedBytes(parameters)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x.t if isinstance(x, _SavedTensor) else x)
    with operator.model.evaluating(), hooks:
        operator.rehearse(evaluation, v)
    return saved.peak


class _SavedBytes:
    """Bytes of the storages that autograd holds: now, and the most at any time; those of the model are not counted."""

    def __init__(self, ignored: set[int]):
        self.ignored, self.holders = ignored, Counter[int]()
        self.now = self.peak = 0

    def pack(self, t: Tensor) -> Tensor | _SavedTensor:
        storage = t.untyped_storage()
        if t._is_zerotensor() or storage._cdata in self.ignored:  # a zero tensor has no memory
            return t
        return _SavedTensor(self, t, storage._cdata, storage.nbytes())

    def change(self, key: int, size: int, holders: int) -> None:
        before = self.holders[key]
        self.holders[key] += holders
        if not before or not self.holders[key]:
            self.now += holders * size
            self.peak = max(self.peak, self.now)


class _SavedTensor:
    """Counts a saved tensor for as long as the graph holds it: addresses of freed storages are used again."""

    def __init__(self, saved: _SavedBytes, t: Tensor, key: int, size: int):
        self.saved, self.t, self.key, self.size = saved, t, key, size
        saved.change(key, size, 1)

    def __del__(self):
        self.saved.change(self.key, self.size, -1)
