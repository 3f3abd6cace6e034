"""Models with LoRA or other PEFT adapters inside: what a tensor was called before, which are in use; save and load.

Two shapes of one thing are understood: a `PeftModel` around a `PreTrainedModel`, and a `PreTrainedModel` into which
adapters were injected. Nothing here imports PEFT unless a model or a configuration asks for adapters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError

FOLDER, WEIGHTS = "lora", "model.safetensors"  # beside a model's config.json


def library(what: str) -> Any:
    """The module `peft`, which is an optional requirement, for `what`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(f'{what} needs peft, which is not installed: pip install "hf_msif[peft]".') from None
    return peft


def unwrapped(model: nn.Module) -> nn.Module:
    """The `PreTrainedModel` in a `PeftModel`, with its adapters inside; any other model is returned as it is.

    Raises:
        InputError: prompt or prefix tuning, whose virtual tokens are not inside of the model.
    """
    peft = sys.modules.get("peft")  # whoever made adapters has imported it
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise InputError(
                f"the {type(model).__name__} has virtual tokens ({config.peft_type.value}), which are fed to the "
                "encoder and no part of it; expected LoRA or another method that adds parameters to layers."
            )
    return model.base_model.model


def former_name(name: str) -> str:
    """What a tensor of a model with adapters was called before PEFT wrapped its module.

    >>> former_name("layer.0.query.base_layer.weight"), former_name("pooler.modules_to_save.default.dense.bias")
    ('layer.0.query.weight', 'pooler.dense.bias')
    """
    parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    return ".".join(parts)


def survey(model: nn.Module, stage: str) -> tuple[set[str], dict[str, str]]:
    """The tensors that active adapters added to layers, and those that no prediction depends on: name → why.

    Raises:
        InputError: merged adapters; DoRA, whose gradient is that of no function.
    """
    added, idle = set(), {}
    for path, layer in _adapted(model):
        active = [] if layer.disable_adapters else list(layer.active_adapters)
        _check(path, layer, active, stage)
        for kind in layer.adapter_layer_names:
            for name, _ in _named(getattr(layer, kind), f"{path}.{kind}"):
                adapter = name.removeprefix(f"{path}.{kind}.").partition(".")[0]
                if adapter not in active:
                    idle[name] = f"of the adapter {adapter!r}, which is not active"
                if kind != "modules_to_save":
                    added.add(name)
        saved = [adapter for adapter in active if adapter in getattr(layer, "modules_to_save", ())]
        if saved:
            for name, _ in _named(layer.original_module, f"{path}.original_module"):
                idle[name] = f"modules_to_save.{saved[0]} stands in its place"
    # A tied tensor is in use where any of its names is.
    used = {id(p) for name, p in _named(model, "") if name not in idle} if idle else set()
    idle = {name: idle[name] for name, p in model.named_parameters() if name in idle and id(p) not in used}
    return added - set(idle), idle


def _named(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    return module.named_parameters(prefix, remove_duplicate=False)


def _check(path: str, layer: nn.Module, active: Collection[str], stage: str) -> None:
    if getattr(layer, "merged", False):
        raise InputError(
            f"stage {stage!r}: the adapters {layer.merged_adapters} are merged into the weights of {path!r}, which "
            "are no longer the inherited ones; call unmerge_adapter() on the model."
        )
    if any(getattr(layer, "use_dora", {}).get(adapter) for adapter in active):
        raise InputError(
            f"stage {stage!r}: the adapter of {path!r} is a DoRA, which takes the norm of its weight for a constant "
            "in every gradient, so that it has no second derivatives; expected use_dora=False."
        )


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with adapters, and modules of which each adapter has a trained copy."""
    if sys.modules.get("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            yield path, module


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer has an adapter, active or not."""
    return any(True for _ in _adapted(model))


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a model with one adapter, all of its tensors included, as `load` reads it.

    PEFT's own folder has the adapter alone, and the name of a base model elsewhere: here the base model is a stage's
    encoder and a head, which have no such name. A plain `from_pretrained` finds no weights and says so, where it would
    make new ones of those that adapters have renamed.

    Raises:
        InputError: several adapters.
    """
    model = unwrapped(model)
    if len(model.peft_config) != 1:
        raise InputError(
            f"cannot save a model with the adapters {sorted(model.peft_config)}; expected one: delete_adapter() "
            "removes one that is not in use."
        )
    ((adapter, config),) = model.peft_config.items()
    survey(model, "to be saved")  # not merged
    inner = Path(folder) / FOLDER
    inner.mkdir(parents=True)
    model.config.save_pretrained(folder)
    config.save_pretrained(inner)
    tensors = {name: t.detach().contiguous() for name, t in _state(model).items()}
    save_file(tensors, inner / WEIGHTS, {"adapter": adapter})


def load(folder: str | os.PathLike, auto: Any) -> nn.Module:
    """A model that `save` wrote, with its adapter inside, in evaluation mode; `auto` is the Auto class of its task.

    Raises:
        InputError: PEFT is not installed.
        ValueError: a folder that does not fit together.
    """
    from transformers import AutoConfig

    inner = Path(folder) / FOLDER
    peft = library(f"the model in {folder}")
    model = auto.from_config(AutoConfig.from_pretrained(folder))
    with safe_open(inner / WEIGHTS, "pt") as file:
        adapter = file.metadata()["adapter"]
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    model = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(inner), model, adapter)
    own = _state(model)
    if set(own) != set(state):
        raise ValueError(f"the tensor {min(set(own) ^ set(state))!r} is in the model or in {inner / WEIGHTS} only")
    for name, tensor in own.items():
        tensor.data = state[name]  # in its own dtype, and to everything that is tied to it
    return model.eval()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and those buffers that belong to a checkpoint, ties once."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}
