"""Trains a stage with Hugging Face's `Trainer` on the very objective that is differentiated later, and measures it."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .adapters import FunctionalModel, Split, decayed_names, forward, split
from .autodiff import Evaluation
from .engine import Engine, as_rows
from .errors import InputError
from .polishing import PolishReport, polish

__all__ = ["PolishReport", "evaluate", "polish", "save", "train"]


def train(
    model: nn.Module,
    objective: Any,
    data: Any,
    arguments: TrainingArguments,
    *,
    previous: nn.Module | None = None,
    trainable: str | Sequence[str] = "all",
    weight_decay: float = 0.0,
    alpha: float | None = None,
    omit: Collection[Any] = (),
    name: str = "stage",
    progress: bool = True,
) -> float:
    """Minimises F = Σ ℓ_i / Σ count_i + (weight_decay/2) ‖φ_decayed‖² [+ α ‖W − W_before‖², eq. (12)], in place.

    This is the F of `Stage`: what is trained is what is differentiated later.

    Args:
        model: trained in place, left in evaluation mode.
        objective: an object of `hf_msif.objectives`; a masked LM draws new masks in each epoch.
        data: rows as the objective reads them.
        arguments: Hugging Face's `TrainingArguments`; a weight decay in *them* is AdamW's, which no F_k contains.
        previous: the model of the stage before, which says what is inherited.
        trainable: as in `Stage`; everything else is held constant.
        weight_decay: of the quadratic penalty, as in `Stage`.
        alpha: ties inherited, trained parameters to their values in `previous`.
        omit: example ids to train without. Order, batches and masks of all others stay as they are, so that two runs
            differ by the omission alone.
        name: the stage's name, for messages and the progress bar.
        progress: show the bar.

    Returns:
        The mean training loss.

    Raises:
        InputError: bad rows, or a loss that stops being finite.
    """
    rows = as_rows(data, f"the data of stage {name!r}")
    roles = split(name, model, previous, trainable)
    trained = set(roles.trained)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
    collator = _Collator(objective, frozenset(omit))
    arguments.remove_unused_columns = False
    arguments.disable_tqdm = True  # one bar, ours: Trainer's prints a dictionary a log entry beside it
    trainer = _StageTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[_Watch(collator, name, progress)],
        penalty=_penalty(model, previous, roles, weight_decay, alpha),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        result = trainer.train(resume_from_checkpoint=_last_checkpoint(arguments))
    finally:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(before[parameter_name])
        model.eval()
    if not math.isfinite(result.training_loss):
        raise InputError(
            f"the training loss of stage {name!r} became {result.training_loss}: lower the learning rate."
        )
    return result.training_loss


def evaluate(
    model: nn.Module, objective: Any, data: Any, batch_size: int = 64, engine: Engine | None = None
) -> dict[str, float]:
    """Σ ℓ / Σ counts over `data`, and the accuracy where the objective predicts classes.

    Returns:
        {"loss", "examples"} and, for classification, "accuracy".
    """
    engine = engine or Engine(progress=False)
    rows = as_rows(data, "the evaluation data")
    functional = FunctionalModel(model, engine.device)
    parts = []
    with torch.no_grad(), functional.evaluating():
        for _, batch in engine.batches(rows, objective.collate, batch_size):
            evaluation = Evaluation(functional, objective, batch)
            sums, counts = evaluation.losses({})
            right = 0.0
            if hasattr(objective, "predictions"):
                right = float((objective.predictions(functional.bind({}), batch) == batch["labels"]).sum())
            parts.append((float(sums.double().sum()), float(counts.double().sum()), right))
    losses, counts, right = (sum(column) for column in zip(*engine.gather(parts), strict=True))
    found = {"loss": losses / counts, "examples": len(rows)}
    return found | ({"accuracy": right / len(rows)} if hasattr(objective, "predictions") else {})


def save(model: nn.Module, tokenizer: Any, folder: str | os.PathLike) -> None:
    """Writes model and tokenizer as `from_pretrained` reads them, whole or not at all."""
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


class _Collator:
    """The objective's batches, each row with a weight of one or (omitted) zero, masks numbered by the epoch."""

    def __init__(self, objective: Any, omit: frozenset):
        self.objective, self.omit, self.epoch = objective, omit, 0

    def __call__(self, rows: list[dict]) -> dict:
        objective = self.objective
        if hasattr(objective, "first_draw"):
            objective = dataclasses.replace(objective, first_draw=objective.first_draw + self.epoch * objective.draws)
        weights = torch.tensor([0.0 if row["example_id"] in self.omit else 1.0 for row in rows])
        return {**objective.collate(rows), "weights": weights}


class _Watch(TrainerCallback):
    """Numbers the epochs for the collator, shows a bar, and stops at the first loss that is not finite."""

    def __init__(self, collator: _Collator, name: str, progress: bool):
        self.collator, self.name, self.progress = collator, name, progress
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = not (self.progress and state.is_world_process_zero)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=f"training {self.name}", disable=hidden, leave=False
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = round(state.epoch or 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.bar.set_postfix(loss=loss)
        if not math.isfinite(float(loss)):
            raise InputError(
                f"the loss of stage {self.name!r} is {loss} at step {state.global_step}: lower the learning rate, or "
                "check the data."
            )


class _StageTrainer(Trainer):
    def __init__(self, *args, penalty, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalty = penalty

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        weights = inputs.pop("weights")
        objective = self.data_collator.objective

        def call(positions=None, **kwargs):
            return forward(self.accelerator.unwrap_model(model), lambda given: model(**given), positions, kwargs)

        sums, counts = objective.losses(call, inputs)
        weights = weights.to(sums)
        loss = (weights * sums).sum() / (weights * counts).sum().clamp(min=1.0)
        loss = loss + self.penalty()
        return (loss, None) if return_outputs else loss


def _penalty(
    model: nn.Module, previous: nn.Module | None, roles: Split, weight_decay: float, alpha: float | None
) -> Callable[[], torch.Tensor | float]:
    """The quadratic terms of F as a function of the model's present state."""
    decayed = [n for n in roles.trained if n in decayed_names(model)] if weight_decay else []
    tied = roles.proximal if alpha and previous is not None else ()
    anchors = {n: previous.get_parameter(roles.inherited[n]).detach().clone() for n in tied}

    def penalty() -> torch.Tensor | float:
        total = weight_decay / 2 * sum((model.get_parameter(n) ** 2).sum() for n in decayed)
        for n, anchor in anchors.items():
            p = model.get_parameter(n)
            total = total + alpha * ((p - anchor.to(p)) ** 2).sum()
        return total

    return penalty


def _last_checkpoint(arguments: TrainingArguments) -> str | None:
    """A run that was interrupted goes on from its last checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = arguments.output_dir
    return (
        get_last_checkpoint(folder) if folder and os.path.isdir(folder) and arguments.save_strategy != "no" else None
    )
