"""Settings of a training under which nothing would be trained, or something else than they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..errors import InputError

SEEDS = 2**32  # NumPy takes no others

_SEED = (lambda value: value is None or 0 <= value < SEEDS, f"a whole number from 0 to {SEEDS - 1}")
_AT_LEAST_ONE = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "at least 0")
_BELOW_ONE = (lambda value: 0 <= value < 1, "a number at least 0 and below 1")
_POSITIVE = (lambda value: 0 < value < math.inf, "a positive number")

# Names in `TrainingArguments` that do not change the weights.
NOT_OF_THE_WEIGHTS = (
    *("logging_*", "log_*", "save_*", "eval_*", "hub_*", "push_to_hub", "trackio_*", "project"),
    *("report_to", "run_name", "disable_tqdm", "per_device_eval_batch_size", "skip_memory_metrics"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    "dataloader_prefetch_factor",
)
# Names that say where a training runs and where its files are.
OF_THE_PLACE = ("output_dir", "local_rank", "ddp_*", "use_cpu", "no_cuda", "use_mps_device", "resume_from_checkpoint")

# Name in `TrainingArguments` → whether a value is one, and what is expected.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda value: value == -1 or 0 < value < 2**31, "at least 1, or -1 for num_train_epochs"),
    "num_train_epochs": (lambda value: value < 1e6, "a number of epochs that ends"),
    "learning_rate": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "logging_steps": _NOT_NEGATIVE,
    "neftune_noise_alpha": (lambda value: value is None or value >= 0, "at least 0"),
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "max_grad_norm": (lambda value: value is None or value >= 0, "at least 0"),
    "weight_decay": _NOT_NEGATIVE,
    "adam_epsilon": _POSITIVE,
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "save_steps": (
        lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
        "a whole number of steps, at least 1, or a fraction of all steps between 0 and 1",
    ),
    "save_total_limit": (lambda value: value is None or value >= 1, "at least 1, or null for no limit"),
    "seed": _SEED,
    "data_seed": _SEED,
}


_NOT_EVALUATED = "no model is evaluated while it is trained"
# Name in `TrainingArguments` → why a value other than the default has no effect where a stage is trained.
WITHOUT_EFFECT = {
    "resume_from_checkpoint": "an interrupted training goes on from its own last checkpoint",
    "load_best_model_at_end": _NOT_EVALUATED,
    "do_train": "the stage is trained in any case",
    "do_eval": _NOT_EVALUATED,
    "do_predict": _NOT_EVALUATED,
    "eval_strategy": _NOT_EVALUATED,
}
_SILENT = (None, False, "no")  # values that ask for nothing


def check_effects(values: Mapping[str, Any], prefix: str) -> None:
    """Refuses settings of `TrainingArguments` that a stage's training does not read.

    Args:
        values: name → value, those that the user gave.
        prefix: what stands before a name in messages.

    Raises:
        InputError: such a setting.

    >>> check_effects({"do_train": True}, "training.")
    Traceback (most recent call last):
        ...
    hf_msif.errors.InputError: training.do_train has no effect here: the stage is trained in any case; leave it out.
    """
    for name, why in WITHOUT_EFFECT.items():
        value = values.get(name)
        if getattr(value, "value", value) not in _SILENT:  # of an enumeration, too
            raise InputError(f"{prefix}{name} has no effect here: {why}; leave it out.")


def decides_weights(name: str) -> bool:
    """Whether an argument of `TrainingArguments` can change the trained weights.

    >>> decides_weights("learning_rate"), decides_weights("logging_steps")
    (True, False)
    """
    return not any(fnmatchcase(name, pattern) for pattern in NOT_OF_THE_WEIGHTS)


def decisive_arguments(arguments: Any) -> dict[str, str]:
    """Name → value, as text, of all finished `TrainingArguments` that decide the weights, and the number of
    processes."""
    values = {
        name: str(value)
        for name, value in arguments.to_dict().items()
        if decides_weights(name) and not any(fnmatchcase(name, pattern) for pattern in OF_THE_PLACE)
    }
    return values | {"world_size": str(arguments.world_size)}


def check_settings(values: Mapping[str, Any], prefix: str) -> None:
    """Checks settings of `TrainingArguments`, those that are given.

    Args:
        values: name → value.
        prefix: what stands before a name in messages, for example "stages.pretraining.training.".

    Raises:
        InputError: a setting under which nothing is trained, or that no training could follow.

    >>> check_settings({"max_steps": 0}, "training.")
    Traceback (most recent call last):
        ...
    hf_msif.errors.InputError: training.max_steps is 0; expected at least 1, or -1 for num_train_epochs.
    """
    for name, (is_valid, expected) in RULES.items():
        if name in values and not is_valid(values[name]):
            raise InputError(f"{prefix}{name} is {values[name]!r}; expected {expected}.")
    epochs, steps = values.get("num_train_epochs"), values.get("max_steps", -1)
    if epochs is not None and steps <= 0 and not _POSITIVE[0](epochs):
        raise InputError(
            f"{prefix}num_train_epochs is {epochs!r}, so no step is taken; expected a positive number, or max_steps."
        )


def check_arguments(arguments: Any, name: str) -> None:
    """Checks finished `TrainingArguments`, to which max_steps=0 means the same as -1.

    Args:
        arguments: the `TrainingArguments`.
        name: the stage's name, for messages.

    Raises:
        InputError: as for `check_settings`.
    """
    values = {key: getattr(arguments, key) for key in (*RULES, "num_train_epochs") if hasattr(arguments, key)}
    if values.get("max_steps") == 0:
        values["max_steps"] = -1
    check_settings(values, f"stage {name!r}: TrainingArguments: ")
