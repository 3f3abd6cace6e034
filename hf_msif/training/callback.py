"""`RecordCallback`: records the run of a user's own Hugging Face `Trainer`, so that it can be pulled back through."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..adapters.fingerprint import model_fingerprint
from ..adapters.functional import FunctionalModel, has_dropout
from ..adapters.split import split
from ..curvature.derivatives import parameters_in_use
from ..engine.corpus import as_rows
from ..errors import InputError
from ..objectives import Objective, checked_objective
from . import optimisers
from .optimisers import Slots
from .record import check_arguments, check_finite, check_precision
from .recording import Recording, Schedule, facts_of, interval, write_state

# Buffer of a recording → its name in torch's optimisers.
BUFFERS = {"momentum": "momentum_buffer", "first_moment": "exp_avg", "second_moment": "exp_avg_sq"}


class RecordCallback(TrainerCallback):
    """Writes a recorded run while a `Trainer` trains.

    Recorded are the order of the rows, the learning rates, the random numbers of dropout, and every √T steps the
    parameters and the optimiser's state. Losses and gradients are computed again, from the stage's objective, when the
    run is replayed. So the `Trainer` must minimise that objective, the mean over a step's counted terms, in one
    process and full precision: replaying checks it, see `Stage(link="unrolled")` and `unrolled.check_replay`. (Under
    gradient accumulation the loss that many of transformers' models compute is not such a mean: pass
    `compute_loss_func` there.)

    Args:
        folder: where the run is written; must not hold a run.
        objective: the stage's objective.
        data: the stage's rows, in the order of the `Trainer`'s train_dataset.
        previous: the model of the stage before; None for a first stage.
        trainable: "all", "head" (everything that is not inherited) or a list of name patterns; parameters that the
            `Trainer` does not optimise must be left out.
        resized: accept embeddings that gained rows since the stage before.
        name: the stage's name, for messages.

    Raises:
        InputError: bad rows, a folder that holds a run, or, when training begins, a `Trainer` whose run cannot be
            recorded.

    Example:

        callback = RecordCallback("runs/gop/finetuning.run", objectives.SequenceClassification(tokenizer), tweets,
                                  previous=pretrained)
        Trainer(model, arguments, train_dataset=tokenized_tweets, callbacks=[callback]).train()
        stage = Stage("finetuning", model, objectives.SequenceClassification(tokenizer), tweets,
                      link="unrolled", run="runs/gop/finetuning.run")
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        objective: Objective,
        data: Any,
        previous: nn.Module | None = None,
        trainable: str | Sequence[str] = "all",
        resized: bool = False,
        name: str = "stage",
    ):
        self.folder, self.name = Path(folder).expanduser(), name
        self.objective = checked_objective(objective, f"stage {name!r}")
        self.rows = as_rows(data, f"the data of stage {name!r}")
        self.previous, self.trainable, self.resized = previous, trainable, resized
        self._check_folder()

    def _check_folder(self) -> None:
        if (self.folder / "run.json").exists():
            raise InputError(
                f"stage {self.name!r}: {self.folder} holds a recorded run already; expected a new folder."
            )

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        self._check_folder()  # again: a Trainer may train twice
        self.optimiser = check_arguments(args, self.name)
        if args.load_best_model_at_end:
            raise InputError(
                f"stage {self.name!r}: load_best_model_at_end takes the model back from its end; a recorded "
                "run ends with its last step: leave it out."
            )
        if state.global_step:
            raise InputError(
                f"stage {self.name!r}: the Trainer goes on from step {state.global_step}, and what came before was "
                "not recorded; expected a run from its first step."
            )
        if getattr(self.optimiser, "eps_inside_root", False):
            raise InputError(
                f"stage {self.name!r}: optim_args has eps_inside_root, which torch's AdamW does not know; expected a "
                "run by `training.record` for it."
            )
        sampler = getattr(getattr(train_dataloader, "batch_sampler", None), "sampler", None)
        if sampler is None or len(sampler) != len(self.rows):
            raise InputError(
                f"stage {self.name!r}: the Trainer draws from "
                f"{'a stream' if sampler is None else f'{len(sampler):,} rows'}; expected the {len(self.rows):,} rows "
                "of the stage's data, in their order."
            )
        self.sampler = sampler
        self.orders: list[list[int]] = []
        train_dataloader.batch_sampler.sampler = _OrderRecorder(sampler, self.orders)
        self.drop_last = train_dataloader.batch_sampler.drop_last
        self.objective = checked_objective(self.objective, f"stage {self.name!r}", model)
        functional = FunctionalModel(model)
        self.initial = model_fingerprint(functional.model)
        roles = split(self.name, model, self.previous, self.trainable, self.resized)
        self.trained = parameters_in_use(functional, self.objective, self.rows, roles.trained)
        check_precision(model, self.trained, self.name)
        optimised = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        constant = [n for n in self.trained if id(model.get_parameter(n)) not in optimised]
        if constant:
            raise InputError(
                f"stage {self.name!r}: the Trainer does not optimise {constant[0]!r}, which "
                f"trainable={self.trainable!r} includes; expected trainable to say what is trained ('head' where the "
                "optimiser has no tensor of the encoder)."
            )
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        self.decayed = frozenset(n for n in self.trained if id(model.get_parameter(n)) in decayed)
        self.dropout, self.rates, self.generators = has_dropout(model), [], []
        self.interval = interval(state.max_steps)
        self._write(0, self._state(model, optimizer))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        device = next(model.parameters()).device
        if self.dropout:
            self.generators.append(
                torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        if len(rates) > 1:
            raise InputError(
                f"stage {self.name!r}: the optimiser has groups with rates {sorted(rates)}; expected one rate."
            )
        self.rates.append(rates.pop())

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % self.interval == 0:
            self._write(state.global_step, self._state(model, optimizer))

    def on_train_end(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        train_dataloader.batch_sampler.sampler = self.sampler
        recording = self._recording(args, state.global_step)
        if recording.interval != self.interval:  # it ended before max_steps: other states should have been saved
            raise InputError(
                f"stage {self.name!r}: training stopped after {state.global_step} of {state.max_steps} steps; a "
                "recorded run must not be stopped early: set max_steps."
            )
        self._write(state.global_step, self._state(model, optimizer))
        recording.save()

    def _recording(self, args, steps: int) -> Recording:
        size, batch = args.gradient_accumulation_steps * args.per_device_train_batch_size, []
        for epoch, order in enumerate(self.orders):
            if self.drop_last:
                order = order[: len(order) // args.per_device_train_batch_size * args.per_device_train_batch_size]
            batch += [(epoch, order[i : i + size]) for i in range(0, len(order), size)]
        batch = batch[:steps]  # the loader reads ahead
        return Recording(
            self.optimiser,
            args.max_grad_norm or None,
            self.trained,
            self.decayed,
            0.0,
            None,
            args.per_device_train_batch_size,
            self.dropout,
            args.seed,
            Schedule(
                [rows for _, rows in batch],
                [epoch for epoch, _ in batch],
                self.rates,
                torch.stack(self.generators) if self.dropout else None,
            ),
            facts_of(self.rows, self.initial, self.objective),
            self.folder,
        )

    def _state(self, model: nn.Module, optimizer: Any) -> Slots:
        parameters = {n: model.get_parameter(n) for n in self.trained}
        slots = optimisers.start(self.optimiser, parameters)
        for slot in self.optimiser.buffers:
            for n, p in parameters.items():
                buffer = optimizer.state.get(p, {}).get(BUFFERS[slot])
                if isinstance(buffer, Tensor):
                    slots[slot][n] = buffer.detach().clone()
        return slots

    def _write(self, step: int, slots: Slots) -> None:
        check_finite(slots, self.name, step)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_state(self.folder, step, slots)


class _OrderRecorder:
    """A sampler that records what it draws, one list per epoch."""

    def __init__(self, sampler: Any, orders: list[list[int]]):
        self.sampler, self.orders = sampler, orders

    def __iter__(self) -> Iterator[int]:
        order: list[int] = []
        self.orders.append(order)
        for index in self.sampler:
            order.append(int(index))
            yield index

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["sampler"], name)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
