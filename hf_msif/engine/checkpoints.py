"""Long work that survives its process: one file of tensors a piece of work, replaced about once a minute."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vectors import Block
from .accelerated import Engine
from .files import load_tensors, save_tensors

EVERY = 60.0  # seconds between two copies


@dataclass
class Checkpoint:
    """The latest copy of some work's state, at `path`.

    The main process writes it, whole or not at all, and reads it for all of them: work may go on with another number
    of processes. A copy that is damaged, or that answers another `question`, is as none.
    """

    path: Path
    question: str
    engine: Engine
    every: float = EVERY
    kept: float = field(default_factory=time.perf_counter)

    def due(self) -> bool:
        """Whether it is time for a new copy; the main process's clock counts."""
        late = float(self.engine.is_main and time.perf_counter() - self.kept >= self.every)
        return bool(self.engine.add(torch.tensor([late], device=self.engine.device))[0])

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replaces the copy; `facts` is what JSON knows."""
        with self.engine.together():
            if self.engine.is_main:
                save_tensors(tensors, self.path, {"question": self.question, **facts})
        self.kept = time.perf_counter()

    def load(self, place: Callable[[str, Tensor], Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The copy, on every process; None where there is none that can be used.

        `place` makes of each tensor, on the device, what is kept of it: they come one after another.
        """
        found: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        with self.engine.together():
            if self.engine.is_main:
                found = self._read()
        shapes = None if found is None else ({k: (t.shape, t.dtype) for k, t in found[0].items()}, found[1])
        shapes = self.engine.broadcast(shapes)
        if shapes is None:
            return None
        tensors = {}
        for key, (shape, dtype) in shapes[0].items():
            own = found[0].pop(key) if found is not None else torch.empty(shape, dtype=dtype)
            t = self.engine.from_main(own.to(self.engine.device))
            tensors[key] = t if place is None else place(key, t)
        return tensors, shapes[1]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        from safetensors import SafetensorError

        try:
            tensors, facts = load_tensors(self.path)
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            return None
        return (tensors, facts) if facts.get("question") == self.question else None

    def forget(self) -> None:
        """Removes the copy."""
        with self.engine.together():
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


def at(folder: str | os.PathLike | None, name: str, question: str, engine: Engine) -> Checkpoint | None:
    """The checkpoint of that name in a folder; None without a folder."""
    return None if folder is None else Checkpoint(Path(folder) / f"{name}.safetensors", question, engine)
