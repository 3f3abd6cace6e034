"""Tries out settings that other libraries take, before any work: what they refuse is told by our keys."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError, first_line
from ..influence.cost import size_text
from .memory import available_bytes
from .values import shortened

if TYPE_CHECKING:
    from transformers import TrainingArguments

Attempt = Callable[[dict[str, Any]], object]


def refusal(key: str, values: Mapping[str, Any], attempt: Attempt, error: Exception) -> InputError:
    """What to raise where another library refused settings by `error`; the settings to blame are named.

    Args:
        key: the configuration key that holds the settings.
        values: the settings that the user gave.
        attempt: does with given settings what failed.
        error: with all of them.
    """
    if not _works(attempt, {}):
        return InputError(f"{key} cannot be used: {first_line(error)}; change it.")
    alone = [name for name in values if not _works(attempt, {name: values[name]})]
    blamed = alone or [name for name in values if _works(attempt, {n: v for n, v in values.items() if n != name})]
    if len(blamed) != 1:
        listed = f" ({', '.join(blamed)})" if blamed else ""
        return InputError(f"{key}{listed} cannot be used ({first_line(error)}); change or leave out one of them.")
    (name,) = blamed
    return InputError(f"{key}.{name} is {shortened(values[name])}, which is refused: {first_line(error)}; change it.")


def _works(attempt: Attempt, values: dict[str, Any]) -> bool:
    try:
        attempt(values)
    except Exception:
        return False
    return True


def try_training(make: Callable[[dict[str, Any]], TrainingArguments], values: Mapping[str, Any], key: str) -> None:
    """Makes what a `Trainer` makes of its arguments before the first step, for a model of one number.

    Args:
        make: settings → the `TrainingArguments`.
        values: the settings that the user gave.
        key: the configuration key that holds them.

    Raises:
        InputError: names the setting that is refused.
    """

    def attempt(settings: dict[str, Any]) -> None:
        from transformers import Trainer

        with _undisturbed(), tempfile.TemporaryDirectory() as folder:
            arguments = copy.copy(make(settings))
            arguments.output_dir, arguments.push_to_hub = folder, False
            trainer = Trainer(model=nn.Linear(1, 1), args=arguments, train_dataset=[{}, {}])
            trainer.create_optimizer_and_scheduler(num_training_steps=2)
            trainer.get_train_dataloader()

    try:
        attempt(dict(values))
    except InputError:
        raise
    except Exception as error:
        raise refusal(key, values, attempt, error) from error


def built(make: Callable[[dict[str, Any]], Any], values: Mapping[str, Any], key: str) -> Any:
    """A new model, after checking that it fits into memory.

    Args:
        make: settings → the model.
        values: the settings that the user gave.
        key: the configuration key that holds them.

    Raises:
        InputError: the model does not fit, or cannot be built; names the setting that is refused.
    """

    def attempt(settings: dict[str, Any]) -> nn.Module:
        with _undisturbed(), torch.device("meta"):
            return make(settings)

    try:
        empty = attempt(dict(values))
    except Exception:  # some models cannot be made without memory
        empty = None
    if empty is not None:
        size = sum(p.numel() * p.element_size() for p in empty.parameters())
        free = available_bytes(torch.device("cpu"))
        if size > free:
            raise InputError(
                f"{key} makes a model of {size_text(size)}, but {size_text(free)} are free; expected a smaller one."
            )
    try:
        return make(dict(values))
    except InputError:
        raise
    except Exception as error:
        raise refusal(key, values, attempt, error) from error


@contextmanager
def _undisturbed():
    """Inside, nothing is warned of, and random numbers afterwards are those that they would have been."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(state)
