"""Models with LoRA or other PEFT adapters: former names of their tensors, tensors not in use, saving and loading.

Two forms are supported: a `PeftModel` around a `PreTrainedModel`, and a `PreTrainedModel` into which adapters were
injected. PEFT is imported only if a model or a configuration has adapters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

FOLDER, WEIGHTS = "lora", "model.safetensors"  # beside a model's config.json
PUBLISHED = "adapter_config.json"  # in a folder that PEFT wrote


def import_peft(what: str) -> ModuleType:
    """The module `peft`, which is an optional requirement.

    Args:
        what: what needs it, for the message.

    Raises:
        InputError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(f'{what} needs peft, which is not installed: pip install "hf_msif[peft]".') from None
    return peft


def unwrap(model: nn.Module) -> nn.Module:
    """The `PreTrainedModel` in a `PeftModel`, with its adapters; any other model is returned as it is.

    Raises:
        InputError: the model uses prompt or prefix tuning, whose virtual tokens are outside the `PreTrainedModel`.
    """
    peft = sys.modules.get("peft")  # a model with adapters cannot exist before PEFT was imported
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise InputError(
                f"the {type(model).__name__} has virtual tokens ({config.peft_type.value}), which are inputs of the "
                "encoder and not part of it; expected LoRA or another method that adds parameters to layers."
            )
    return model.base_model.model


def name_before_adapters(name: str) -> str:
    """The name that a tensor of a model with adapters had before PEFT wrapped its module.

    >>> name_before_adapters("layer.0.query.base_layer.weight")
    'layer.0.query.weight'
    >>> name_before_adapters("pooler.modules_to_save.default.dense.bias")
    'pooler.dense.bias'
    """
    parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
    if "modules_to_save" in parts:
        index = parts.index("modules_to_save")
        del parts[index : index + 2]
    return ".".join(parts)


def inspect_adapters(model: nn.Module, stage: str) -> tuple[set[str], dict[str, str]]:
    """Which tensors of a model come from adapters, and which are not in use.

    Args:
        model: any model.
        stage: the stage's name, for messages.

    Returns:
        The names of the tensors that active adapters added to layers, and the tensors on which no prediction depends:
        name → reason. Both are empty for a model without adapters.

    Raises:
        InputError: an adapter is merged, or is a DoRA, whose gradient is not the derivative of any function.
    """
    added, idle = set(), {}
    for path, layer in _adapted(model):
        active = [] if layer.disable_adapters else list(layer.active_adapters)
        _check(path, layer, active, stage)
        for kind in layer.adapter_layer_names:
            for name, _ in _named_with_ties(getattr(layer, kind), f"{path}.{kind}"):
                adapter = name.removeprefix(f"{path}.{kind}.").partition(".")[0]
                if adapter not in active:
                    idle[name] = f"of the adapter {adapter!r}, which is not active"
                if kind != "modules_to_save":
                    added.add(name)
        saved = [adapter for adapter in active if adapter in getattr(layer, "modules_to_save", ())]
        if saved:
            for name, _ in _named_with_ties(layer.original_module, f"{path}.original_module"):
                idle[name] = f"modules_to_save.{saved[0]} stands in its place"
    # A tied tensor is in use if any of its names is.
    used = {id(p) for name, p in _named_with_ties(model, "") if name not in idle} if idle else set()
    idle = {name: idle[name] for name, p in model.named_parameters() if name in idle and id(p) not in used}
    return added - set(idle), idle


def _named_with_ties(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    return module.named_parameters(prefix, remove_duplicate=False)


def _check(path: str, layer: Any, active: Collection[str], stage: str) -> None:
    if getattr(layer, "merged", False):
        raise InputError(
            f"stage {stage!r}: the adapters {layer.merged_adapters} are merged into the weights of {path!r}, which "
            "therefore differ from the inherited ones; call unmerge_adapter() on the model."
        )
    if any(getattr(layer, "use_dora", {}).get(adapter) for adapter in active):
        raise InputError(
            f"stage {stage!r}: the adapter of {path!r} is a DoRA, which treats the norm of its weight as a constant "
            "in every gradient and so has no second derivatives; expected use_dora=False."
        )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module of PEFT) of every layer with adapters and of every module that adapters train as a copy."""
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


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """What of a model's adapters is no tensor: path of a layer → scaling, active adapters, whether disabled."""
    return {
        path: [getattr(layer, "scaling", {}), list(layer.active_adapters), bool(layer.disable_adapters)]
        for path, layer in _adapted(model)
    }


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a model with one adapter, all tensors included, to a folder that `load` reads.

    PEFT itself would save the adapter alone, with the name of a published base model; here the base model is a stage's
    encoder with a head, which has no such name. The weights lie in the subfolder "lora", so that a plain
    `from_pretrained` of the folder fails with a message: it would replace the tensors that adapters renamed by random
    ones.

    Args:
        model: a model with one adapter, not merged.
        folder: where to write; it must have no subfolder "lora".

    Raises:
        InputError: the model has several adapters, or a merged one.
        FileExistsError: the subfolder exists.
    """
    base: Any = unwrap(model)
    if len(base.peft_config) != 1:
        raise InputError(
            f"cannot save a model with the adapters {sorted(base.peft_config)}; expected one: delete_adapter() "
            "removes an adapter."
        )
    ((adapter, config),) = base.peft_config.items()
    inspect_adapters(base, "to be saved")  # refuses merged adapters
    inner = Path(folder) / FOLDER
    inner.mkdir(parents=True)
    base.config.save_pretrained(folder)
    config.save_pretrained(inner)
    tensors = {name: t.detach().contiguous() for name, t in _state(base).items()}
    save_file(tensors, inner / WEIGHTS, {"adapter": adapter})


def load(folder: str | os.PathLike, auto: type[_BaseAutoModelClass]) -> nn.Module:
    """Reads a model with its adapter from a folder of `save`.

    Args:
        folder: the folder.
        auto: the Auto class of the model's task, e.g. `AutoModelForSequenceClassification`.

    Returns:
        The model in evaluation mode, with the adapter injected; each tensor in the dtype in which it was saved.

    Raises:
        InputError: PEFT is not installed.
        ValueError: the tensors in the folder are not those of the model that its configurations describe.
    """
    from transformers import AutoConfig

    inner = Path(folder) / FOLDER
    peft = import_peft(f"the model in {folder}")
    model = auto.from_config(AutoConfig.from_pretrained(folder))
    with safe_open(inner / WEIGHTS, "pt") as file:
        adapter = file.metadata()["adapter"]
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    model = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(inner), model, adapter)
    tensors = _state(model)
    if set(tensors) != set(state):
        raise ValueError(f"the tensor {min(set(tensors) ^ set(state))!r} is in the model or in {inner / WEIGHTS} only")
    for name, tensor in tensors.items():
        tensor.data = state[name]  # with its dtype, and for all modules that share the tensor
    return model.eval()


def load_published(folder: str | os.PathLike, auto: type[_BaseAutoModelClass], base: str | None = None) -> nn.Module:
    """Reads a model of which PEFT saved the adapter alone (`adapter_config.json`, `adapter_model.safetensors`).

    Args:
        folder: the folder, as `PeftModel.save_pretrained` or a `Trainer` writes it.
        auto: the Auto class of the model's task, e.g. `AutoModelForSequenceClassification`.
        base: folder or Hub id of the model below the adapter; defaults to the one that the adapter names.

    Returns:
        The `PreTrainedModel` with its adapter, in evaluation mode.

    Raises:
        InputError: PEFT is not installed; or tensors of the head are neither in the adapter nor in the base model, so
            that nobody knows them any more.
    """
    peft = import_peft(f"the adapter in {folder}")
    settings = peft.PeftConfig.from_pretrained(str(folder))
    base = base or settings.base_model_name_or_path
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
    saved = {name.removeprefix("base_model.model."): shape for name, shape in shapes.items() if ".lora_" not in name}
    # The classifier's last layer has one row per class; layers before it are wider.
    classes = [shape[0] for name, shape in saved.items() if len(shape) == 2 and name.endswith("weight")]
    labels = {"num_labels": min(classes)} if classes and "SequenceClassification" in auto.__name__ else {}
    model, report = auto.from_pretrained(base, output_loading_info=True, **labels)
    unknown = sorted(set(report["missing_keys"]) - set(saved))
    if unknown:
        modules = sorted({name.rpartition(".")[0] for name in unknown})
        raise InputError(
            f"the adapter in {folder} has no weights for {unknown[0]!r}, and {base} has none either, so that the "
            f"model that it was trained in is lost; expected an adapter trained with modules_to_save={modules} (or a "
            "base model that has them)."
        )
    return peft.PeftModel.from_pretrained(model, str(folder)).base_model.model.eval()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; tied tensors appear once."""
    persistent = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in persistent}
