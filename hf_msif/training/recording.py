"""`Recording`: a training run that can be repeated step by step; `record` makes one.

A folder holds `run.json` (settings and fingerprints), `schedule.safetensors` (rows, epoch and learning rate of every
step) and about √T states, each written whole. What lies between two states is computed again when it is needed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.functional import FunctionalModel
from ..adapters.split import Split, decayed_names, split, write
from ..curvature.derivatives import reached
from ..engine.accelerated import Engine
from ..engine.corpus import as_rows
from ..engine.files import load_tensors, save_tensors, write_json
from ..engine.hashing import describe, digest, tensors_fingerprint
from ..errors import DivergedError, InputError
from . import optimisers
from .optimisers import SGD, AdamW, Slots
from .replay import Replay

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
    def marks(self) -> list[int]:
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
        missing = [mark for mark in made.marks if not made.path(mark).is_file()]
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
        """The state after so many steps, one of `marks`."""
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


def record(
    model: nn.Module,
    objective: Any,
    data: Any,
    arguments: Any,
    folder: str | os.PathLike | None,
    *,
    previous: nn.Module | None = None,
    trainable: str | Sequence[str] = "all",
    weight_decay: float = 0.0,
    alpha: float | None = None,
    resized: bool = False,
    omit: Collection[Any] = (),
    dropout: bool = True,
    name: str = "stage",
    progress: bool = True,
) -> Recording:
    """Trains in place by steps that can be replayed and differentiated (`Stage(link="unrolled", run=folder)`).

    A step takes F of `Stage` on the rows of its batch, F_B = Σ ℓ_i / Σ count_i + quadratic terms, clips its gradient
    and updates, as `train` does: the order of the rows is a permutation an epoch drawn from the seed, the last batch
    of an epoch may be shorter, and every run of the same arguments ends at the same weights.

    Args:
        model: trained in place; left in evaluation mode.
        objective, data, previous, trainable, weight_decay, alpha, resized: as in `train`.
        arguments: Hugging Face's `TrainingArguments`. Read are the batch size, gradient accumulation, epochs or
            max_steps, learning rate, schedule and warm-up (any of transformers'), max_grad_norm, seed, and the
            optimiser: optim adamw_torch or sgd, its Adam settings, weight_decay, and optim_args such as
            "momentum=0.9" or "eps_inside_root=true".
        folder: where the run is kept. A run of the same settings that was interrupted goes on there; one that is
            finished is not repeated. None: nothing is written.
        omit: example ids whose losses are taken out of every F_B. Σ count_i stays that of all rows of the batch: this
            is the removal that `removal_effect` predicts.
        dropout: that the model configures; False switches it off.
        name: the stage's name, for messages and the progress bar.
        progress: show the bar.

    Raises:
        InputError: bad rows or arguments, or a folder with another run.
        DivergedError: a parameter stopped being finite.
    """
    engine = Engine(progress=progress)
    rows = as_rows(data, f"the data of stage {name!r}")
    roles = split(name, model, previous, trainable, resized)
    functional = FunctionalModel(model, engine.device)
    recording = compose(functional, objective, rows, arguments, roles, weight_decay, alpha, omit, dropout)
    recording = replace(recording, folder=None if folder is None else Path(folder).expanduser())
    replay = Replay(functional, objective, rows, recording, engine, roles, previous, omit, name)
    _run(replay, *_go_on(recording, functional, name), model, name)
    return recording


def rerun(
    recording: Recording,
    model: nn.Module,
    objective: Any,
    data: Any,
    *,
    previous: nn.Module | None = None,
    trainable: str | Sequence[str] = "all",
    resized: bool = False,
    omit: Collection[Any] = (),
    name: str = "stage",
    engine: Engine | None = None,
) -> None:
    """Trains in place by the steps of a recorded run, from the model's present parameters; nothing is written.

    Args:
        recording: whose schedule, optimiser and quadratic terms are used; α ties to `previous`.
        model: trained in place; left in evaluation mode.
        objective, data, previous, trainable, resized, omit, name: as in `record`.
        engine: made when none is given.
    """
    engine = engine or Engine(progress=False)
    rows = as_rows(data, f"the data of stage {name!r}")
    roles, functional = split(name, model, previous, trainable, resized), FunctionalModel(model, engine.device)
    recording = replace(recording, folder=None)
    replay = Replay(functional, objective, rows, recording, engine, roles, previous, omit, name)
    _run(replay, *_go_on(recording, functional, name), model, name)


def _run(replay: Replay, slots: Slots, begin: int, model: nn.Module, name: str) -> None:
    """The rest of a run, states written where they are kept; ends in the model's parameters."""
    recording = replay.recording
    with replay.engine.bar(total=recording.steps, initial=begin, desc=f"training {name}", unit=" steps") as bar:
        for t in range(begin, recording.steps):
            slots = replay.forward(slots, t)
            bar.update()
            if t + 1 in replay.marks:
                check_finite(slots, name, t + 1)
                if recording.folder is not None:
                    recording.write(t + 1, slots)
    write(model, slots["parameters"])
    model.eval()


def compose(
    model: FunctionalModel,
    objective: Any,
    rows: list[dict],
    arguments: Any,
    roles: Split,
    weight_decay: float = 0.0,
    alpha: float | None = None,
    omit: Collection[Any] = (),
    dropout: bool = True,
) -> Recording:
    """The run that `record` would make of these arguments, before its first step."""
    optimiser = check_arguments(arguments, roles.stage)
    trained = reached(model, objective, rows, roles.trained)
    if not trained:
        raise InputError(f"stage {roles.stage!r}: the loss depends on none of the trained parameters.")
    check_precision(model.model, trained, roles.stage)
    return Recording(
        optimiser,
        arguments.max_grad_norm or None,
        trained,
        frozenset(trained) & decayed_names(model.model),
        weight_decay,
        alpha,
        arguments.per_device_train_batch_size,
        dropout,
        arguments.seed,
        schedule(arguments, len(rows)),
        known_by(rows, tensors_fingerprint(model.parameters), objective, omit),
    )


def known_by(rows: list[dict], initial: str, objective: Any, omit: Collection[Any] = ()) -> dict[str, Any]:
    """`Recording.facts`: what a run is of; `initial` is the fingerprint of its first weights."""
    return {
        "rows": digest(rows),
        "initial": initial,
        "objective": describe(objective),
        "omit": sorted(map(repr, omit)),
    }


def schedule(arguments: Any, size: int) -> Schedule:
    """Rows, epoch and learning rate of every step that `TrainingArguments` mean for `size` rows."""
    from transformers import get_scheduler

    if arguments.dataloader_drop_last or str(arguments.train_sampling_strategy) != "random":
        raise InputError(
            "training.record draws every row once an epoch, in random order; expected no dataloader_drop_last and no "
            "train_sampling_strategy (a RecordCallback records what a Trainer draws)."
        )
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    an_epoch = math.ceil(size / batch)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * an_epoch)
    rows: list[list[int]] = []
    for epoch in range(math.ceil(steps / an_epoch)):
        order = np.random.default_rng([arguments.seed, epoch]).permutation(size).tolist()
        if an_epoch == 1:  # all rows at once: their order is no matter, and a batch is collated once
            order = list(range(size))
        rows += [order[i : i + batch] for i in range(0, size, batch)]
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimiser,
        arguments.get_warmup_steps(steps),
        steps,
        arguments.lr_scheduler_kwargs or {},
    )
    rates = []
    for _ in range(steps):
        rates.append(float(optimiser.param_groups[0]["lr"]))
        optimiser.step()
        scheduler.step()
    return Schedule(rows[:steps], [t // an_epoch for t in range(steps)], rates)


def check_arguments(arguments: Any, name: str) -> SGD | AdamW:
    """The optimiser of a run; refuses `TrainingArguments` of one that cannot be replayed."""
    refused = {
        "bf16 or fp16": arguments.bf16 or arguments.fp16,
        f"{arguments.world_size} processes": arguments.world_size > 1,
        "several GPUs in one process": arguments.n_gpu > 1,
        "reduce_lr_on_plateau": arguments.lr_scheduler_type == "reduce_lr_on_plateau",
        "label_smoothing_factor": arguments.label_smoothing_factor,
        "neftune_noise_alpha": arguments.neftune_noise_alpha,
    }
    for setting, wrong in refused.items():
        if wrong:
            raise InputError(
                f"stage {name!r}: a run with {setting} cannot be recorded; expected one process in full precision "
                "that minimises the objective itself."
            )
    return optimisers.from_arguments(arguments, name)


def check_precision(model: nn.Module, trained: Sequence[str], name: str) -> None:
    """Refuses parameters that cannot hold what a run leaves."""
    for key in trained:
        dtype = model.get_parameter(key).dtype
        if dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"stage {name!r}: {key!r} is {dtype}; a recorded run needs float32 or float64: convert it first "
                "(model.float())."
            )


def _go_on(recording: Recording, model: FunctionalModel, name: str) -> tuple[Slots, int]:
    """The state that a run begins with, and how many steps lie behind it; writes the head of a new recording."""
    first = optimisers.start(recording.optimiser, {n: model.parameters[n] for n in recording.trained})
    if recording.folder is None:
        return first, 0
    file = recording.folder / "run.json"
    if not file.is_file():
        recording.save()
        recording.write(0, first)
        return first, 0
    before = json.loads(file.read_text())
    other = [key for key, value in json.loads(json.dumps(recording.settings)).items() if before.get(key) != value]
    if other:
        raise InputError(
            f"stage {name!r}: {recording.folder} holds a run that differs in {', '.join(other)}: delete it, or choose "
            "another folder, to train anew."
        )
    kept = [step for step in recording.kept() if step in recording.marks] or [0]
    if kept == [0]:
        recording.write(0, first)
    return recording.state(kept[-1], next(iter(model.parameters.values())).device), kept[-1]


def check_finite(slots: Slots, name: str, step: int) -> None:
    """Ends a run whose parameters are no numbers any more."""
    for key, value in slots["parameters"].items():
        if not value.isfinite().all():
            raise DivergedError(
                f"the parameter {key!r} of stage {name!r} is not finite after step {step}: lower the learning rate."
            )
