"""`Recording`: a training run that can be repeated step by step; `record` makes one.

A folder holds `run.json` (settings and fingerprints), `schedule.safetensors` (rows, epoch and learning rate of every
step) and about √T states, each written whole. What lies between two states is computed again when it is needed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.files import load_tensors, save_tensors, write_json
from ..engine.hashing import describe, digest
from ..errors import InputError
from . import optimisers
from .optimisers import SGD, AdamW, Slots

FORMAT = 1


@dataclass(frozen=True)
class Schedule:
    """What every step of a run reads.

    Attributes:
        rows: indices of the rows of each step.
        epochs: the epoch of each step, by which an objective numbers its masks.
        rates: the learning rate of each step.
        generators: states of the random numbers at the start of each step, (T, bytes), where a run was recorded from
            outside; None: each step is seeded by the run's seed and its number.
    """

    rows: list[list[int]]
    epochs: list[int]
    rates: list[float]
    generators: Tensor | None = None

    def save(self, path: Path) -> None:
        ends = np.cumsum([len(rows) for rows in self.rows])
        tensors = {
            "rows": torch.tensor([i for rows in self.rows for i in rows]),
            "ends": torch.from_numpy(ends),
            "epochs": torch.tensor(self.epochs),
            "rates": torch.tensor(self.rates, dtype=torch.float64),
        }
        save_tensors(tensors | ({} if self.generators is None else {"generators": self.generators}), path)

    @classmethod
    def load(cls, path: Path) -> Schedule:
        found, _ = load_tensors(path)
        rows = [part.tolist() for part in found["rows"].tensor_split(found["ends"][:-1])]
        return cls(rows, found["epochs"].tolist(), found["rates"].tolist(), found.get("generators"))


@dataclass(frozen=True)
class Recording:
    """A training run: its settings, what every step reads, and, in a folder, its state every ~√T steps.

    Attributes:
        optimiser: `SGD` or `AdamW` of `hf_msif.optimisers`.
        clip: largest norm of a step's gradient, or None.
        trained: names of the parameters that the run moves.
        decayed: those on which the optimiser's own weight decay acts.
        weight_decay, alpha: of the quadratic terms of the objective F, as in `Stage`.
        micro_batch: rows that are evaluated at once.
        dropout: whether dropout is on; it is replayed from its seeds.
        seed: of the order of the rows and of dropout.
        schedule: the steps.
        facts: fingerprints (rows, initial weights) and a description of the objective.
        folder: where it lies, or None.
    """

    optimiser: SGD | AdamW
    clip: float | None
    trained: tuple[str, ...]
    decayed: frozenset[str]
    weight_decay: float
    alpha: float | None
    micro_batch: int
    dropout: bool
    seed: int
    schedule: Schedule
    facts: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def steps(self) -> int:
        return len(self.schedule.rates)

    @property
    def interval(self) -> int:
        """Steps between two states that are kept: ⌈√T⌉."""
        return interval(self.steps)

    @property
    def saved_steps(self) -> list[int]:
        """The steps before which a state is kept; the last one is the end of the run."""
        return [*range(0, self.steps, self.interval), self.steps]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides the final weights, as plain values."""
        return {
            "format": FORMAT,
            "optimiser": optimisers.to_dict(self.optimiser),
            "clip": self.clip,
            "trained": list(self.trained),
            "decayed": sorted(self.decayed),
            "weight_decay": self.weight_decay,
            "alpha": self.alpha,
            "micro_batch": self.micro_batch,
            "dropout": self.dropout,
            "seed": self.seed,
            "steps": self.steps,
            "order": digest([self.schedule.rows, self.schedule.epochs, self.schedule.rates]),
            **self.facts,
        }

    def save(self) -> None:
        """Writes settings and schedule; states are written as the run goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.schedule.save(self.folder / "schedule.safetensors")
        write_json(self.folder / "run.json", self.settings)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, name: str = "stage") -> Recording:
        """Loads a recorded run.

        Raises:
            InputError: the folder holds none, or one that was not finished.
        """
        folder = Path(folder).expanduser()
        if not (folder / "run.json").is_file():
            raise InputError(
                f"stage {name!r}: {folder} holds no recorded run; expected what `training.record` or a "
                "`RecordCallback` writes."
            )
        found = json.loads((folder / "run.json").read_text())
        if found.pop("format") != FORMAT:
            raise InputError(f"stage {name!r}: the run in {folder} was recorded by another version: record it again.")
        given = {key: found.pop(key) for key in ("clip", "weight_decay", "alpha", "micro_batch", "dropout", "seed")}
        given |= {"trained": tuple(found.pop("trained")), "decayed": frozenset(found.pop("decayed"))}
        optimiser, schedule = found.pop("optimiser"), Schedule.load(folder / "schedule.safetensors")
        facts = {key: value for key, value in found.items() if key not in ("steps", "order")}
        made = cls(optimisers.from_dict(optimiser), schedule=schedule, facts=facts, folder=folder, **given)
        missing = [mark for mark in made.saved_steps if not made.path(mark).is_file()]
        if missing:
            raise InputError(
                f"stage {name!r}: the run in {folder} lacks its state after step {missing[0]} of {made.steps}: let "
                "its training end, or record it again."
            )
        return made

    def bytes_of(self, parameters: Mapping[str, Tensor]) -> int:
        """Size of one state."""
        size = sum(parameters[name].numel() * parameters[name].element_size() for name in self.trained)
        return size * (1 + len(self.optimiser.buffers))

    def path(self, step: int) -> Path:
        return _state_path(self.folder, step)

    def write(self, step: int, slots: Slots) -> None:
        """Keeps the state after so many steps."""
        write_state(self.folder, step, slots)

    def state(self, step: int, device: torch.device | str = "cpu") -> Slots:
        """The state after so many steps, one of `saved_steps`."""
        slots: Slots = {}
        for key, tensor in load_tensors(self.path(step))[0].items():
            slot, name = key.split("/", 1)
            slots.setdefault(slot, {})[name] = tensor.to(device)
        return slots

    def kept(self) -> list[int]:
        """The steps whose states are in the folder."""
        found = (re.fullmatch(r"state-(\d+)\.safetensors", path.name) for path in self.folder.glob("state-*"))
        return sorted(int(match[1]) for match in found if match)


def interval(steps: int) -> int:
    """⌈√T⌉."""
    return max(1, math.ceil(math.sqrt(steps)))


def write_state(folder: Path, step: int, slots: Slots) -> None:
    """Keeps the state of a run after so many steps in its folder."""
    flat = {f"{slot}/{name}": t for slot, own in slots.items() for name, t in own.items()}
    save_tensors(flat, _state_path(folder, step))


def _state_path(folder: Path, step: int) -> Path:
    return folder / f"state-{step:08d}.safetensors"


def facts_of(rows: list[dict], initial: str, objective: Any, omit: Collection[Any] = ()) -> dict[str, Any]:
    """`Recording.facts`: what a run is of; `initial` is the fingerprint of its first weights."""
    return {
        "rows": digest(rows),
        "initial": initial,
        "objective": describe(objective),
        "omit": sorted(map(repr, omit)),
    }
