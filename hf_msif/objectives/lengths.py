"""How many tokens a model reads: the one limit of length, for Python and the command line; checked objectives."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import TypeVar

from torch import nn

from ..errors import InputError
from ._base import Objective

SETTINGS = ("max_length", "max_target_length", "chunk")  # of an objective, each a number of tokens

Some = TypeVar("Some", bound=Objective)


def positions_of(model: nn.Module) -> int | None:
    """The number of tokens for which a model has positions; None where its configuration names no limit.

    It is `config.max_position_embeddings`. A table of positions with a `padding_idx`, as RoBERTa has it, keeps the
    rows up to this one for itself, and has padding_idx + 1 positions less.
    """
    config = getattr(getattr(model, "base_model", model), "config", None)
    size = getattr(config, "max_position_embeddings", None)
    if not isinstance(size, int) or size < 1:
        return None
    tables = (
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.num_embeddings == size
    )
    offset = max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
    return size - offset


def within_positions(objective: Some, model: nn.Module) -> Some:
    """The objective, whose texts are cut after as many tokens as both the tokenizer and the model allow.

    `checked_objective` asks for it wherever a model comes together with an objective: in a `Stage` and in training.

    Args:
        objective: one without the parameter `max_length` stays as it is.
        model: with any number of positions.

    Raises:
        InputError: `max_length` (or `max_target_length`, or `chunk`) is larger than the number of positions.
    """
    limit = positions_of(model)
    if limit is None or objective.tokenizer is None:
        return objective
    usual = getattr(objective.tokenizer, "model_max_length", None)
    takes, lower = inspect.signature(type(objective)).parameters, {}
    for name in SETTINGS:
        value = getattr(objective, name, None)
        if name not in takes:
            continue
        if value is not None and value > limit:
            raise InputError(f"{name} is {value}; expected at most {limit}, which is what the model takes.")
        in_chunks = getattr(objective, "chunk", None) is not None
        if value is None and name != "chunk" and not in_chunks and usual is not None and usual > limit:
            lower[name] = limit
    if not lower:
        return objective
    if dataclasses.is_dataclass(objective):
        changed = dataclasses.replace(objective, **lower)
        return changed if objective.pads else changed.unpadded()
    changed = copy.copy(objective)
    for name, value in lower.items():
        setattr(changed, name, value)
    return changed


def checked_objective(objective: object, owner: str, model: nn.Module | None = None) -> Objective:
    """The objective itself; of a model, `within_positions`.

    Args:
        objective: what a user gave.
        owner: whose objective it is, for messages.
        model: that the objective trains; None: it is not known yet.

    Raises:
        InputError: it is no object of a subclass of `Objective`, or reads more tokens than the model takes.
    """
    if not isinstance(objective, Objective):
        what = f"the class {objective.__name__}" if isinstance(objective, type) else f"a {type(objective).__name__}"
        raise InputError(
            f"the objective of {owner} is {what}; expected an object of hf_msif.objectives, or of your own subclass "
            "of hf_msif.objectives.Objective with the methods collate(rows) and losses(call, batch)."
        )
    try:
        return objective if model is None else within_positions(objective, model)
    except InputError as error:
        raise InputError(f"the objective of {owner}: {error}") from error
