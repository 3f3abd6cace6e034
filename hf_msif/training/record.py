"""Computes a training run whose steps can be replayed and differentiated (`record`), or repeats one (`rerun`).

What is written, and where, is `recording`'s; the arithmetic of a step is `replay`'s.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters.fingerprint import model_fingerprint
from ..adapters.functional import FunctionalModel
from ..adapters.split import Split, decayed_names, split, write
from ..curvature.derivatives import parameters_in_use
from ..engine.accelerated import Engine
from ..engine.corpus import as_rows
from ..engine.files import read_json
from ..errors import DivergedError, InputError
from ..objectives import Objective, checked_objective
from . import optimisers
from .optimisers import SGD, AdamW, Slots
from .recording import Recording, Schedule, facts_of
from .replay import Replay
from .settings import check_arguments as check_settings_of


def record(
    model: nn.Module,
    objective: Objective,
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
    and updates, as `train` does. The order of the rows is drawn anew for each epoch, from the seed; the last batch of
    an epoch may be shorter. Every run of the same arguments ends at the same weights.

    Args:
        model: trained in place; left in evaluation mode.
        objective: an object of `hf_msif.objectives`, or another `Objective`.
        data: the stage's examples: a `datasets.Dataset`, a list of dicts that the objective reads, or a list of
            strings.
        arguments: Hugging Face's `TrainingArguments`. Read are the batch size, gradient accumulation, epochs or
            max_steps, learning rate, schedule and warm-up (any of transformers'), max_grad_norm, seed, and the
            optimiser: optim adamw_torch or sgd, its Adam settings, weight_decay, and optim_args such as
            "momentum=0.9" or "eps_inside_root=true".
        folder: where the run is written. An interrupted run of the same settings is resumed there, a finished one is
            not repeated. None: nothing is written.
        previous: the model of the stage before, which says what is inherited; None for a first stage.
        trainable: "all", "head" (everything that is not inherited) or a list of name patterns; all other parameters
            are held constant.
        weight_decay: of the quadratic penalty of F, (weight_decay/2) ‖φ_decayed‖².
        alpha: α of eq. (12), which ties inherited, trained parameters to their values in `previous`; None: they move
            freely.
        resized: accept embeddings that gained rows since the stage before; the new rows are not tied.
        omit: example ids whose losses have the weight zero in every F_B. Σ count_i stays that of all rows of the
            batch: this is the removal that `removal_effect` predicts.
        dropout: that the model configures; False switches it off.
        name: the stage's name, for messages and the progress bar.
        progress: show the bar.

    Raises:
        InputError: bad rows or arguments, or a folder with another run.
        DivergedError: a parameter stopped being finite.
    """
    engine, objective = Engine(progress=progress), checked_objective(objective, f"stage {name!r}", model)
    objective.check_model(model)
    rows = as_rows(data, f"the data of stage {name!r}")
    roles = split(name, model, previous, trainable, resized)
    functional = FunctionalModel(model, engine.device)
    recording = compose(functional, objective, rows, arguments, roles, weight_decay, alpha, omit, dropout)
    recording = replace(recording, folder=None if folder is None else Path(folder).expanduser())
    replay = Replay(functional, objective, rows, recording, engine, roles, previous, omit, name)
    _run(replay, *_resume(recording, functional, name), model, name)
    return recording


def rerun(
    recording: Recording,
    model: nn.Module,
    objective: Objective,
    data: Any,
    *,
    previous: nn.Module | None = None,
    trainable: str | Sequence[str] = "all",
    resized: bool = False,
    omit: Collection[Any] = (),
    weights: torch.Tensor | None = None,
    name: str = "stage",
    engine: Engine | None = None,
) -> None:
    """Trains in place by the steps of a recorded run, from the model's present parameters; nothing is written.

    Args:
        recording: the run whose schedule, optimiser and quadratic terms are used.
        model: trained in place; left in evaluation mode.
        objective: the one that the run minimised.
        data: the run's rows, in its order; their contents may differ.
        previous: the model of the stage before, to whose values α ties.
        trainable, resized: those of the run; they give the parameters their roles.
        omit: example ids whose losses have the weight zero; Σ count_i stays that of all rows of a batch.
        weights: ω of every row in the order of `data`, (rows,), in the place of `omit`; Σ count_i stays as it is.
        name: the stage's name, for messages.
        engine: runs the passes; made when none is given.

    Raises:
        InputError: bad rows, ids in `omit` that no row has, or not one weight per row.
        DivergedError: a parameter stopped being finite.
    """
    engine = engine or Engine(progress=False)
    rows = as_rows(data, f"the data of stage {name!r}")
    roles, functional = split(name, model, previous, trainable, resized), FunctionalModel(model, engine.device)
    recording = replace(recording, folder=None)
    replay = Replay(functional, objective, rows, recording, engine, roles, previous, omit, name, weights)
    _run(replay, *_resume(recording, functional, name), model, name)


def _run(replay: Replay, slots: Slots, begin: int, model: nn.Module, name: str) -> None:
    """Takes the steps from `begin` on, writes the states that are saved, and puts the end into the model."""
    recording, saved_steps = replay.recording, frozenset(replay.recording.saved_steps)
    with replay.engine.bar(total=recording.steps, initial=begin, desc=f"training {name}", unit=" steps") as bar:
        for t in range(begin, recording.steps):
            slots = replay.forward(slots, t)
            bar.update()
            if t + 1 in saved_steps:
                check_finite(slots, name, t + 1)
                if recording.folder is not None:
                    recording.write(t + 1, slots)
    write(model, slots["parameters"])
    model.eval()


def compose(
    model: FunctionalModel,
    objective: Objective,
    rows: list[dict],
    arguments: Any,
    roles: Split,
    weight_decay: float = 0.0,
    alpha: float | None = None,
    omit: Collection[Any] = (),
    dropout: bool = True,
) -> Recording:
    """The recording that `record` starts from: settings and schedule, no step taken and nothing written."""
    optimiser = check_arguments(arguments, roles.stage)
    trained = parameters_in_use(model, objective, rows, roles.trained)
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
        facts_of(rows, model_fingerprint(model.model), objective, omit),
    )


def schedule(arguments: Any, size: int) -> Schedule:
    """Rows, epoch and learning rate of every step, as `TrainingArguments` ask for them on `size` rows."""
    if arguments.dataloader_drop_last or str(arguments.train_sampling_strategy) != "random":
        raise InputError(
            "training.record draws every row once per epoch, in random order; expected no dataloader_drop_last and no "
            "train_sampling_strategy (a RecordCallback records what a Trainer draws)."
        )
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    per_epoch = math.ceil(size / batch)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    rows: list[list[int]] = []
    for epoch in range(math.ceil(steps / per_epoch)):
        order = np.random.default_rng([arguments.seed, epoch]).permutation(size).tolist()
        if per_epoch == 1:  # all rows at once: their order does not matter, and one order is collated once
            order = list(range(size))
        rows += [order[i : i + batch] for i in range(0, size, batch)]
    rates = learning_rates(arguments, steps)
    return Schedule(rows[:steps], [t // per_epoch for t in range(steps)], rates)


def learning_rates(arguments: Any, steps: int) -> list[float]:
    """The learning rate of each of `steps` steps, by the schedule that `TrainingArguments` name."""
    from transformers import get_scheduler

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
    return rates


def check_arguments(arguments: Any, name: str) -> SGD | AdamW:
    """The optimiser that `TrainingArguments` name.

    Raises:
        InputError: a setting under which a run cannot be replayed.
    """
    check_settings_of(arguments, name)
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
    """Refuses trained parameters of less than single precision: a replayed run would lose its small steps."""
    for key in trained:
        dtype = model.get_parameter(key).dtype
        if dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"stage {name!r}: {key!r} is {dtype}; a recorded run needs float32 or float64: convert it first "
                "(model.float())."
            )


def _resume(recording: Recording, model: FunctionalModel, name: str) -> tuple[Slots, int]:
    """The last saved state and its number of steps; in a new folder, settings and the first state are written."""
    first = optimisers.start(recording.optimiser, {n: model.parameters[n] for n in recording.trained})
    if recording.folder is None:
        return first, 0
    file = recording.folder / "run.json"
    if not file.is_file():
        recording.save()
        recording.write(0, first)
        return first, 0
    before = read_json(file, dict[str, Any], f"delete {recording.folder}, or choose another folder, to train anew")
    settings = json.loads(json.dumps(recording.settings))
    differences = [key for key, value in settings.items() if before.get(key) != value]
    if differences:
        raise InputError(
            f"stage {name!r}: {recording.folder} holds a run that differs in {', '.join(differences)}: delete it, or "
            "choose another folder, to train anew."
        )
    last = max((step for step in recording.steps_on_disk() if step in recording.saved_steps), default=0)
    if last == 0:
        recording.write(0, first)
    return recording.state(last, next(iter(model.parameters.values())).device), last


def check_finite(slots: Slots, name: str, step: int) -> None:
    """Raises `DivergedError` where a parameter holds NaN or inf."""
    for key, value in slots["parameters"].items():
        if not value.isfinite().all():
            raise DivergedError(
                f"the parameter {key!r} of stage {name!r} is not finite after step {step}: lower the learning rate."
            )
