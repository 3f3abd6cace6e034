"""Settings of a training under which nothing would be trained, or something else than they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError

SEEDS = 2**32  # NumPy takes no others

_SEED = (lambda value: value is None or 0 <= value < SEEDS, f"a whole number from 0 to {SEEDS - 1}")
_AT_LEAST_ONE = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "at least 0")
_POSITIVE = (lambda value: 0 < value < math.inf, "a positive number")

# Name in `TrainingArguments` → whether a value is one, and what is expected.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda value: value == -1 or value > 0, "at least 1, or -1 for num_train_epochs"),
    "learning_rate": _POSITIVE,
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "seed": _SEED,
    "data_seed": _SEED,
}


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
