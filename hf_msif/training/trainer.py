"""Trains a stage with Hugging Face's `Trainer` on the very objective that is differentiated later."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..adapters.fingerprint import model_identity
from ..adapters.peft import unwrap
from ..adapters.positions import forward
from ..adapters.split import Split, split
from ..engine.corpus import as_rows, checked_omission
from ..engine.files import disk_errors, write_json
from ..engine.hashing import contents, digest, objective_fingerprint, tensors_fingerprint
from ..engine.progress import bar
from ..errors import DivergedError, FileError, InputError, first_line
from ..objectives import Objective, checked_objective
from .objective import QuadraticTerms, data_term, example_weights
from .settings import check_arguments as check_settings_of
from .settings import decisive_arguments

# What a checkpoint holds beside the weights; without it a run would go on otherwise than it began.
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json")

# What Trainer and Accelerate leave on modules. A `forward` that autocasts would be differentiated later.
TOUCHED = (
    *("training", "gradient_checkpointing", "forward", "_original_forward", "_is_accelerate_prepared"),
    *("_require_grads_hook", "_require_grads_hooks"),
    "_hf_peft_config_loaded",  # where it is set, `save_pretrained` writes checkpoints of the adapters alone
)


def train(
    model: nn.Module,
    objective: Objective,
    data: Any,
    arguments: TrainingArguments,
    *,
    previous: nn.Module | None = None,
    trainable: str | Sequence[str] = "all",
    weight_decay: float = 0.0,
    alpha: float | None = None,
    resized: bool = False,
    omit: Collection[Any] = (),
    name: str = "stage",
    progress: bool = True,
) -> float:
    """Minimises F = Σ ℓ_i / Σ count_i + (weight_decay/2) ‖φ_decayed‖² [+ α ‖W − W_before‖², eq. (12)], in place.

    This is the F of `Stage`: what is trained is what is differentiated later. Each optimiser step takes F on the rows
    of its batch; the sums run over all micro-batches and processes of the step, so that it is no mean of means.

    Args:
        model: trained in place. Its modes, `requires_grad` and `forward` are left as they were.
        objective: an object of `hf_msif.objectives`, or another `Objective`, with `counts` where a step has several
            micro-batches or processes. Epoch e trains on `objective.of_epoch(e)`: a masked LM then draws new masks.
        data: the stage's examples: a `datasets.Dataset`, a list of dicts that the objective reads, or a list of
            strings.
        arguments: Hugging Face's `TrainingArguments`, not modified. Dropout that the model configures is on.
        previous: the model of the stage before, which says what is inherited; None for a first stage.
        trainable: "all", "head" (everything that is not inherited) or a list of name patterns; all other parameters
            are held constant.
        weight_decay: of the quadratic penalty, which acts on the trained parameters but biases and normalisation
            layers.
        alpha: α, which ties inherited, trained parameters to their values in `previous`; None: they move freely.
        resized: accept embeddings that gained rows since the stage before; the new rows are not tied.
        omit: example ids to train without. Order, batches and masks of all others stay as they are, so that two runs
            differ by the omission alone; Σ count_i is that of the examples that are left.
        name: the stage's name, for messages and the progress bar.
        progress: show the bar.

    Returns:
        The mean of F over the steps of this call.

    A run whose `save_strategy` writes checkpoints is resumed from the last one when it is called again with the same
    arguments, and ends at the weights of a run that was not interrupted. (Checkpoints that `save_only_model` wrote do
    not count: the run starts anew.)

    Raises:
        InputError: bad rows, ids to omit that no row has, arguments under which another F would be minimised, or
            checkpoints of another run in `output_dir`.
        DivergedError: a loss or parameter stopped being finite (at the step where it did; no checkpoint of it is
            written).
    """
    rows, objective = (
        as_rows(data, f"the data of stage {name!r}"),
        checked_objective(objective, f"stage {name!r}", model),
    )
    model = unwrap(model)  # the checkpoints of a PeftModel are its adapters alone
    objective.check_model(model)
    roles = split(name, model, previous, trainable, resized)
    omit = checked_omission(omit, rows, name)
    arguments = _checked_arguments(arguments, objective, name)
    identity = model_identity(model)
    del identity["the model"]  # its weights, which have an entry of their own
    facts = {
        "the objective": objective_fingerprint(objective),
        "the model's configuration": digest(contents(identity)),
        "trainable": list(roles.trained),
        "the stage's weight_decay": weight_decay,
        "alpha": alpha,
        "omit": sorted(map(repr, omit)),
        "the rows": digest(rows),
        "the initial weights": tensors_fingerprint(dict(model.named_parameters())),
        **decisive_arguments(arguments),
    }
    checkpoint = _last_checkpoint(arguments, facts, name)
    collator = _Collator(objective, omit)
    watch = _Watch(collator, name, progress)
    with _borrowed(model, set(roles.trained)):
        trainer = _StageTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[watch],
            roles=roles,
            previous=previous,
            stage_weight_decay=weight_decay,
            alpha=alpha,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            with disk_errors(arguments.output_dir or "."):
                loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        except Exception as error:
            if checkpoint is None or watch.steps or isinstance(error, DivergedError):
                raise
            reason = first_line(error.__cause__ or error)  # not what `disk_errors` makes of it: it was read
            raise FileError(
                f"stage {name!r}: training cannot go on from {checkpoint}, which is damaged ({reason}): delete "
                f"{arguments.output_dir} to train anew."
            ) from error
        finally:
            watch.close()
        _check_finite(model, name, trainer.state.global_step)
    # Each process adds up its own share of the steps after the last log.
    return float(trainer.accelerator.gather(torch.tensor([loss], device=arguments.device)).mean())


def _checked_arguments(arguments: TrainingArguments, objective: Objective, name: str) -> TrainingArguments:
    """A copy of the arguments, set as our batches and bar need it; arguments that would change F are refused."""
    check_settings_of(arguments, name)
    micro_batches = arguments.gradient_accumulation_steps * arguments.world_size
    refused = {
        "label_smoothing_factor": (arguments.label_smoothing_factor, "the loss is the objective's own"),
        "fsdp": (arguments.fsdp, "the penalties of F need whole parameters"),
        "deepspeed": (arguments.deepspeed, "the penalties of F need whole parameters"),
        "dataloader_persistent_workers": (
            arguments.dataloader_persistent_workers,
            "workers that outlive an epoch would go on with its masks",
        ),
        "n_gpu": (
            arguments.n_gpu > 1,
            "DataParallel cannot split masked positions: use `accelerate launch`, or one GPU (CUDA_VISIBLE_DEVICES=0)",
        ),
        "several micro-batches or processes per step": (
            micro_batches > 1 and objective.counts is None,
            f"{type(objective).__name__} has no method `counts(batch)`, by which F is normalised over a whole step",
        ),
    }
    for setting, (wrong, why) in refused.items():
        if wrong:
            raise InputError(f"stage {name!r} cannot be trained with {setting} (see its TrainingArguments): {why}.")
    if arguments.weight_decay:
        warnings.warn(
            f"stage {name!r}: weight_decay={arguments.weight_decay} in TrainingArguments is AdamW's own, which is no "
            "term of the objective and is not differentiated; the stage's weight_decay is.",
            stacklevel=3,
        )
    arguments = copy.copy(arguments)
    arguments.remove_unused_columns = False
    arguments.disable_tqdm = True  # our bar in its place: Trainer's also prints a dictionary per log entry
    arguments.logging_nan_inf_filter = False  # it would replace a NaN by the mean of the losses before
    arguments.dataloader_pin_memory = arguments.dataloader_pin_memory and arguments.device.type == "cuda"
    return arguments


def _last_checkpoint(arguments: TrainingArguments, facts: Mapping[str, Any], name: str) -> str | None:
    """The checkpoint from which an interrupted run is resumed, if it belongs to the run that `facts` describes."""
    if arguments.save_strategy == "no":
        return None
    assert arguments.output_dir is not None
    folder = Path(arguments.output_dir)
    file = folder / "run.json"
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        if file.exists() and not _is_ours(file):
            raise InputError(f"{file} exists, and hf_msif did not write it: move it away, or give another output_dir.")
        if arguments.process_index == 0:
            write_json(file, facts)
        return None
    way_out = f"delete {folder}, or give another output_dir (on the command line: run_dir), to train anew"
    state = Path(checkpoint) / "trainer_state.json"
    for written, key in ((file, "the initial weights"), (state, "global_step")):
        if written.exists() and key not in _content(written):
            raise InputError(
                f"stage {name!r}: {written} is damaged; expected what the interrupted training wrote: {way_out}."
            )
    before = _content(file)
    differences = [key for key in {**facts, **before} if before.get(key) != facts.get(key)]
    if differences:
        raise InputError(
            f"stage {name!r}: {checkpoint} is a checkpoint of a run that differs in {', '.join(differences)}: "
            f"{way_out}."
        )
    return checkpoint


def _is_ours(file: Path) -> bool:
    """Whether a file holds the facts of a run, as `train` writes them."""
    return "the initial weights" in _content(file)


def _content(file: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a `Trainer` in a folder, with all that a run needs to go on from it.

    Under `save_only_model` no checkpoint has that.
    """
    complete = (path for path in folder.glob("checkpoint-*") if all(any(path.glob(name)) for name in NEEDED))
    steps = {path.name.removeprefix("checkpoint-"): path for path in complete}
    newest = max((step for step in steps if step.isdecimal()), key=int, default=None)
    return None if newest is None else str(steps[newest])


@contextmanager
def _borrowed(model: nn.Module, trained: set[str]) -> Iterator[None]:
    """Inside, only `trained` requires gradients; on leaving, all but weights and device is as it was."""
    required = {p: p.requires_grad for p in model.parameters()}
    state = {m: {key: vars(m)[key] for key in TOUCHED if key in vars(m)} for m in model.modules()}
    hooks = {m: set(m._forward_hooks) for m in model.modules()}
    config: Any = model.config
    use_cache = getattr(config, "use_cache", None)
    try:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in trained)
        vars(model).pop("_hf_peft_config_loaded", None)
        yield
    finally:
        model.zero_grad()
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        for module, attributes in state.items():
            for key in TOUCHED:
                vars(module).pop(key, None)
            vars(module).update(attributes)
            for hook in set(module._forward_hooks) - hooks[module]:  # of activation checkpointing, of NEFTune
                del module._forward_hooks[hook]
        if use_cache is not None:
            config.use_cache = use_cache


def _check_finite(model: nn.Module, name: str, step: int) -> None:
    for parameter_name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DivergedError(
                f"the parameter {parameter_name!r} of stage {name!r} is not finite after step {step}: lower the "
                "learning rate."
            )


class _Collator:
    """Makes the objective's batches, with a weight for each row (zero where it is omitted) and the epoch's masks."""

    def __init__(self, objective: Objective, omit: frozenset):
        self.objective, self.omit, self.epoch = objective, omit, 0

    def __call__(self, rows: list[dict]) -> dict:
        objective = self.objective.of_epoch(self.epoch)
        return {**objective.collate(rows), "weights": example_weights(rows, self.omit)}


class _Watch(TrainerCallback):
    """Tells the collator the epoch, shows a bar, and keeps weights that are not finite out of checkpoints."""

    def __init__(self, collator: _Collator, name: str, progress: bool):
        self.collator, self.name, self.progress = collator, name, progress
        self.bar: Any = None  # of tqdm
        self.steps = 0  # that were done by this call

    def on_train_begin(self, args, state, control, **kwargs):
        shown = self.progress and state.is_world_process_zero
        steps = {"total": state.max_steps, "initial": state.global_step, "unit": " steps"}
        self.bar = bar(shown=shown, desc=f"training {self.name}", **steps)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Workers of the data loader start after this. A run that is resumed begins inside of an epoch.
        self.collator.epoch = math.floor((state.epoch or 0) + 1e-6)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update()
        self.steps += 1
        if control.should_save:
            _check_finite(model, self.name, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.bar.set_postfix(loss=logs["loss"])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _StageTrainer(Trainer):
    """Minimises F: the data term of each step and the quadratic terms, in the place of the model's own loss."""

    # Otherwise Trainer divides each micro-batch's loss once more, or not, depending on the model's signature.
    loss_is_scaled_for_ga = True

    def __init__(self, model, *, roles: Split, previous, stage_weight_decay: float, alpha: float | None, **kwargs):
        super().__init__(model, **kwargs)
        self.name, self.parameters = roles.stage, {n: model.get_parameter(n) for n in roles.trained}
        before = None
        if alpha:  # copies: the model is trained in place, and may share parameters with the one before
            inherited = [roles.inherited[n] for n in roles.proximal]
            before = {n: previous.get_parameter(n).detach().clone() for n in inherited}
        # Trainer has moved the model by now: the anchors are put where their parameters are.
        self.quadratic = QuadraticTerms.of(model, roles, self.parameters, stage_weight_decay, alpha or None, before)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, and the number of terms they count on all processes (None: ask the one batch)."""
        if self.state.global_step >= self.state.max_steps:  # Trainer adds a step to a finished run that it resumes
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.gradient_accumulation_steps == self.args.world_size == 1:
            return batches, None
        counts = cast(_Collator, self.data_collator).objective.counts
        assert counts is not None  # `_checked_arguments` asks for it
        count = cast(Tensor, sum((batch["weights"].double() * counts(batch).double()).sum() for batch in batches))
        return batches, self.accelerator.gather(count.to(device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of F on the rows of the step."""
        inputs = dict(inputs)
        weights = inputs.pop("weights")

        def call(positions=None, **kwargs):
            return forward(self.accelerator.unwrap_model(model), lambda inputs: model(**inputs), positions, kwargs)

        sums, counts = cast(_Collator, self.data_collator).objective.losses(call, inputs)
        weights = weights.to(sums)
        count = (weights * counts).sum() if num_items_in_batch is None else num_items_in_batch.to(sums)
        # Processes' gradients are averaged, but their sums must add up.
        loss = self.args.world_size * data_term(weights, sums, count)
        loss = loss + self.quadratic.value(self.parameters) / self.current_gradient_accumulation_steps
        if not loss.isfinite():
            raise DivergedError(
                f"the loss of stage {self.name!r} is {loss.item()} at step {self.state.global_step + 1}: lower the "
                "learning rate, or check the data."
            )
        return (loss, None) if return_outputs else loss
