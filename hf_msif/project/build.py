"""A stage's model as its configuration says: loaded, or made new, on the encoder of the stage before."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from ..errors import InputError, first_line
from . import choices
from .schema import Config, StageConfig


def loaded(config: Config, name: str, source: str | Path, **more):
    """A model that `save_pretrained` wrote, and the names of tensors that it does not have."""
    from ..adapters import peft

    stage, folder = config.stages[name], Path(source).expanduser()
    try:
        if (folder / peft.FOLDER).is_dir():
            return _cast(stage, peft.load(folder, _auto(stage))), []
        model, found = _auto(stage).from_pretrained(os.path.expanduser(source), output_loading_info=True, **more)
        model = _cast(stage, model)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"stage {name!r}: cannot load the model {str(source)!r} ({first_line(error)}); expected a Hub id, or "
            "a folder as save_pretrained writes it."
        ) from error
    return model, sorted(found["missing_keys"])


def made(config: Config, name: str, before, seed: int, adapter, classes: int | None):
    """An untrained model: from `model.path`, else from `model.config` or on the encoder of the model before.

    Args:
        adapter: the `LoraConfig` of its new adapters, or None.
        classes: how many its head tells apart, or None.
    """
    import transformers

    from ..models import FeedForwardClassifier

    stage = config.stages[name]
    transformers.set_seed(seed)
    head = {} if classes is None else {"num_labels": classes}
    if stage.model.path is not None:
        model = loaded(config, name, stage.model.path, **head)[0]
    elif before is not None and stage.model.head == "feed_forward":
        model = FeedForwardClassifier.from_encoder(before.base_model, stage.model.hidden_size, **head)
    else:
        model = _new(config, name, before, head)
    return _cast(stage, _adapted(name, model, adapter))


def goes_on(stage: StageConfig, model, before) -> bool:
    """Whether a stage goes on with the task of the stage before, and so with its head."""
    return stage.model.path is None and type(model) is type(before) and not stage.task.endswith("-classification")


def _new(config: Config, name: str, before, head: dict):
    stage = config.stages[name]
    settings = choices.new_config(config, name) if before is None else copy.deepcopy(before.base_model.config)
    if settings is None:
        raise InputError(
            f"stages.{name}.model has neither path nor config; expected a checkpoint to start from, or the "
            "settings of a new model."
        )
    settings.update(head)
    try:
        model = _auto(stage).from_config(settings)
    except Exception as error:
        raise InputError(f"stages.{name}.model: cannot build it ({first_line(error)}).") from error
    if before is not None:
        model.base_model.load_state_dict(before.base_model.state_dict(), strict=False)  # poolers differ
        if goes_on(stage, model, before):
            model.load_state_dict(before.state_dict())
    return model


def _auto(stage: StageConfig):
    import transformers

    from .. import models  # noqa: F401  (registers its classes with the Auto classes)

    return getattr(transformers, choices.KINDS[stage.task][1])


def _cast(stage: StageConfig, model):
    import torch

    if stage.model.dtype is None:
        return model
    # As a saved model has it: a new head on this encoder is drawn in the same dtype before saving and after.
    dtype = model.config.dtype = model.base_model.config.dtype = getattr(torch, stage.model.dtype)
    return model.to(dtype)


def _adapted(name: str, model, adapter):
    """The model with new adapters where the stage has some and the model has none yet."""
    from ..adapters import peft

    if adapter is None or peft.has_adapters(model):
        return model
    key = f"stages.{name}.model.lora"
    try:
        return peft.library(key).inject_adapter_in_model(copy.deepcopy(adapter), model)
    except (ValueError, TypeError) as error:  # no such modules, no adapter for them
        raise InputError(f"{key}: {first_line(error)}.") from error
