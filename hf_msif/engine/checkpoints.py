"""Checkpoints of long computations: each has one file of tensors, which is replaced about once a minute."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..vectors import Block
from .accelerated import Engine
from .files import load_tensors, save_tensors

SECONDS_BETWEEN_WRITES = 60.0


@dataclass
class Checkpoint:
    """The latest state of a computation, in one file.

    The main process writes the file, whole or not at all, and reads it for all processes: a computation may go on
    with another number of processes. A checkpoint that is damaged, or whose cache key differs, is ignored.

    Attributes:
        path: the file.
        cache_key: identifies the computation, so that the state of another one is not taken for its own.
        engine: the processes that share the checkpoint.
        interval: seconds between two writes.
        written_at: time of the last write on the clock of `time.perf_counter`; at first, when this object was made.
    """

    path: Path
    cache_key: str
    engine: Engine
    interval: float = SECONDS_BETWEEN_WRITES
    written_at: float = field(default_factory=time.perf_counter)

    def due(self) -> bool:
        """Whether `interval` seconds have passed since the last write, by the clock of the main process.

        All processes must call it together, and all get the same answer.
        """
        late = float(self.engine.is_main and time.perf_counter() - self.written_at >= self.interval)
        return bool(self.engine.all_reduce(torch.tensor([late], device=self.engine.device))[0])

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by `tensors` and `facts` (JSON-able); all processes must call it together."""
        with self.engine.raising_together():
            if self.engine.is_main:
                save_tensors(tensors, self.path, {"question": self.cache_key, **facts})
        self.written_at = time.perf_counter()

    def load(self, place: Callable[[str, Tensor], Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(tensors, facts) on every process; None if there is no usable checkpoint.

        The tensors are read one after another. `place(key, tensor)` gets each of them whole, on the device, and
        returns what is to be held in its place, e.g. this process's slice of it.
        """
        content: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        with self.engine.raising_together():
            if self.engine.is_main:
                content = self._read()
        header = None if content is None else ({k: (t.shape, t.dtype) for k, t in content[0].items()}, content[1])
        header = self.engine.broadcast_object(header)
        if header is None:
            return None
        tensors = {}
        for key, (shape, dtype) in header[0].items():
            t = content[0].pop(key) if content is not None else torch.empty(shape, dtype=dtype)
            t = self.engine.broadcast_tensor(t.to(self.engine.device))
            tensors[key] = t if place is None else place(key, t)
        return tensors, header[1]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        try:
            tensors, facts = load_tensors(self.path)
        except FileError:
            return None
        return (tensors, facts) if facts.get("question") == self.cache_key else None

    def delete(self) -> None:
        """Removes the checkpoint's file, if it exists."""
        with self.engine.raising_together():
            if self.engine.is_main:
                self.path.unlink(missing_ok=True)


class SolverCheckpoint:
    """Saves and loads the state of a solver in a `Checkpoint`.

    Blocks are saved as plain matrices, so that a solve may continue with another number of processes, sharded or not.

    Args:
        checkpoint: the file, and when to write it.
        flatten: block → its matrix of whole vectors, (Q, P), on the main process at least; called on all processes.
        unflatten: its inverse.
    """

    def __init__(
        self, checkpoint: Checkpoint, flatten: Callable[[Block], Tensor], unflatten: Callable[[Tensor], Block]
    ):
        self.checkpoint, self.flatten, self.unflatten = checkpoint, flatten, unflatten

    def due(self) -> bool:
        """Whether it is time to save; the same on all processes."""
        return self.checkpoint.due()

    def save(self, blocks: Mapping[str, Block], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replaces the state that was saved before.

        Args:
            blocks: the solver's vectors, by name.
            tensors: what it knows of each column, the same on all processes.
            facts: values that JSON can hold.
        """
        flat = {f"tensor/{name}": t.clone() for name, t in tensors.items()}
        for name, block in blocks.items():
            matrix = self.flatten(block)  # all processes together, where they hold shards
            if self.checkpoint.engine.is_main:
                flat[f"block/{name}"] = matrix.cpu()
        self.checkpoint.save(flat, dict(facts))

    def load(self) -> tuple[dict[str, Block], dict[str, Tensor], dict[str, Any]] | None:
        """The blocks, tensors and facts that were saved last; None where no state was saved for this solve."""
        saved = self.checkpoint.load(lambda key, t: self.unflatten(t) if key.startswith("block/") else t)
        if saved is None or "done" in saved[1]:
            return None
        blocks: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for key, value in saved[0].items():
            kind, name = key.split("/", 1)
            (blocks if kind == "block" else tensors)[name] = value
        return blocks, tensors, saved[1]


def open_checkpoint(folder: str | os.PathLike | None, name: str, cache_key: str, engine: Engine) -> Checkpoint | None:
    """The checkpoint `folder/name.safetensors` of the computation `cache_key`; None if `folder` is None."""
    return None if folder is None else Checkpoint(Path(folder) / f"{name}.safetensors", cache_key, engine)
