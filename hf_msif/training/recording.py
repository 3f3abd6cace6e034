"""`Recording`: the data of a training run that can be repeated step by step, and its files.

The computation is elsewhere: `record` makes a recording, `replay` repeats and differentiates its steps. The folder of
a run of T steps holds

    run.json               settings, and fingerprints of rows, initial weights and objective
    schedule.safetensors   rows, epoch and learning rate of every step
    state-<step>.safetensors   parameters and optimiser buffers after that many steps; about √T such files

Each file is written whole or not at all. States between two saved ones are computed again when they are needed.
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

from .. import vectors
from ..engine.files import load_tensors, save_tensors, write_json
from ..engine.folders import add_names
from ..engine.hashing import contents, digest, objective_identity
from ..errors import InputError
from ..objectives import Objective
from . import optimisers
from .optimisers import SGD, AdamW, Slots
from .response import linear_form

FORMAT = 1
FILES = ("run.json", "schedule.safetensors", "state-" + 8 * "[0-9]" + ".safetensors")  # of a recorded run


@dataclass(frozen=True)
class Schedule:
    """What every step of a run reads; T steps.

    Attributes:
        rows: indices of the rows of each step in the stage's data.
        epochs: the epoch of each step, by which an objective numbers its masks.
        rates: the learning rate of each step.
        generators: states of the random number generator at the start of each step, (T, bytes), where a
            `RecordCallback` recorded the run of a `Trainer`; None: each step is seeded by the run's seed and its
            number.
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
        tensors, _ = load_tensors(path)
        rows = [part.tolist() for part in tensors["rows"].tensor_split(tensors["ends"][:-1])]
        return cls(rows, tensors["epochs"].tolist(), tensors["rates"].tolist(), tensors.get("generators"))


@dataclass(frozen=True)
class Recording:
    """A training run: its settings, what every step reads, and, in a folder, its state about every √T steps.

    Attributes:
        optimiser: `SGD` or `AdamW` of `training.optimisers`.
        clip: largest norm of a step's gradient; None: gradients are not clipped.
        trained: names of the parameters that the run moves.
        decayed: the names on which weight decay acts, that of the optimiser and that of F.
        weight_decay: of the quadratic penalty of F, (weight_decay/2) ‖φ_decayed‖².
        alpha: α of eq. (12), which ties inherited parameters to the stage before; None: they are not tied.
        micro_batch: rows that are evaluated at once.
        dropout: whether dropout is on; it is replayed from its seeds.
        seed: of the order of the rows and of dropout.
        schedule: what every step reads.
        facts: fingerprints of the rows and of the initial weights, and a description of the objective.
        folder: where the run is written; None: nowhere.
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
        """Steps between two saved states: ⌈√T⌉."""
        return interval(self.steps)

    @property
    def saved_steps(self) -> list[int]:
        """The numbers of steps after which the state is saved, from 0 to T."""
        return [*range(0, self.steps, self.interval), self.steps]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the final weights, as plain values."""
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

    def exposure(self, number: int) -> np.ndarray:
        """How much of the training each row had, by the learning rates of the steps that read it; mean 1.

        e_i = number / (Σ_t c_t) · Σ_t c_t [i ∈ B_t] / |B_t|,    c_t = Σ_{s ≥ t} η_s μ^{s−t}

        c_t is how far the gradient of step t moves the parameters in all, its momentum μ (Adam's β₁) included.

        An implicit stage, and segments, take all rows for read in every step. Where a run reads each row once or a few
        times, its schedule decides how much each of them did: for what *this* run would have done without a row
        (`validation.OwnTruth`), e_i times its removal effect is the better prediction. In the mean over other orders
        (`validation.ExpectedTruth`) all rows have the same.

        Args:
            number: of rows in the stage's data.

        Returns:
            (number,), in the order of the data; 0 for a row that no step read.
        """
        descent, rates = linear_form(self.optimiser, self.schedule.rates)
        reach, found, total = 0.0, np.zeros(number), 0.0
        for rate, rows in zip(reversed(rates), reversed(self.schedule.rows), strict=True):
            reach = rate + descent.momentum * reach
            moved = rate + descent.momentum * reach if descent.nesterov else reach
            np.add.at(found, rows, moved / len(rows))
            total += moved
        return found * number / total

    def save(self) -> None:
        """Writes settings and schedule; states are written during the run (`write`)."""
        add_names(self._folder, "recorded run", FILES)
        self.schedule.save(self._folder / "schedule.safetensors")
        write_json(self._folder / "run.json", self.settings)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, name: str = "stage") -> Recording:
        """Loads a recorded run.

        Args:
            folder: where it was written.
            name: the stage's name, for messages.

        Raises:
            InputError: the folder holds no run, or one that was not finished.
        """
        folder = Path(folder).expanduser()
        if not (folder / "run.json").is_file():
            raise InputError(
                f"stage {name!r}: {folder} holds no recorded run; expected what `training.record` or a "
                "`RecordCallback` writes."
            )
        facts = json.loads((folder / "run.json").read_text())
        if facts.pop("format") != FORMAT:
            raise InputError(f"stage {name!r}: the run in {folder} was recorded by another version: record it again.")
        settings = {key: facts.pop(key) for key in ("clip", "weight_decay", "alpha", "micro_batch", "dropout", "seed")}
        settings |= {"trained": tuple(facts.pop("trained")), "decayed": frozenset(facts.pop("decayed"))}
        settings |= {"optimiser": optimisers.from_dict(facts.pop("optimiser"))}
        for derived in ("steps", "order"):
            del facts[derived]
        schedule = Schedule.load(folder / "schedule.safetensors")
        recording = cls(schedule=schedule, facts=facts, folder=folder, **settings)
        missing = [step for step in recording.saved_steps if not recording.path(step).is_file()]
        if missing:
            raise InputError(
                f"stage {name!r}: the run in {folder} lacks its state after step {missing[0]} of {recording.steps}: "
                "let its training end, or record it again."
            )
        return recording

    def bytes_of(self, parameters: Mapping[str, Tensor]) -> int:
        """Size of one state in bytes: the trained parameters and as much again for each buffer of the optimiser."""
        return vectors.nbytes(vectors.select(parameters, self.trained)) * (1 + len(self.optimiser.buffers))

    @property
    def _folder(self) -> Path:
        assert self.folder is not None  # None for a run that is still to come
        return self.folder

    def path(self, step: int) -> Path:
        return _state_path(self._folder, step)

    def write(self, step: int, slots: Slots) -> None:
        """Writes the state after `step` steps."""
        write_state(self._folder, step, slots)

    def state(self, step: int, device: torch.device | str = "cpu") -> Slots:
        """The state after `step` steps, which must be one of `saved_steps`."""
        slots: Slots = {}
        for key, tensor in load_tensors(self.path(step))[0].items():
            slot, name = key.split("/", 1)
            slots.setdefault(slot, {})[name] = tensor.to(device)
        return slots

    def steps_on_disk(self) -> list[int]:
        """The numbers of steps whose states are in the folder, in ascending order."""
        matches = (re.fullmatch(r"state-(\d+)\.safetensors", path.name) for path in self._folder.glob("state-*"))
        return sorted(int(match[1]) for match in matches if match)


def interval(steps: int) -> int:
    """⌈√T⌉."""
    return max(1, math.ceil(math.sqrt(steps)))


def write_state(folder: Path, step: int, slots: Slots) -> None:
    """Writes the state of a run after `step` steps to its folder."""
    flat = {f"{slot}/{name}": t for slot, tensors in slots.items() for name, t in tensors.items()}
    save_tensors(flat, _state_path(folder, step))


def _state_path(folder: Path, step: int) -> Path:
    return folder / f"state-{step:08d}.safetensors"


def facts_of(rows: list[dict], initial: str, objective: Objective, omit: Collection[Any] = ()) -> dict[str, Any]:
    """`Recording.facts`: what the run was trained on; `initial` is the fingerprint of its initial weights."""
    return {
        "rows": digest(rows),
        "initial": initial,
        "objective": contents(objective_identity(objective)),
        "omit": sorted(map(repr, omit)),
    }
