"""What a model computes, as names and digests: by these a saved query, a run folder and a checkpoint know it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.hashing import contents, digest, tensors_fingerprint
from .peft import adapter_settings

# Entries of a configuration that name, describe or speed up, and change no output of the model.
UNREAD = {
    "architectures",
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
    "problem_type",
}
UNREAD |= {"id2label", "label2id", "num_labels", "_attn_implementation", "attn_implementation", "_commit_hash"}
UNREAD |= {"model_type", "return_dict", "output_hidden_states", "output_attentions"}  # the class is compared


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Everything that a model's outputs depend on: name for people → plain value or SHA-256.

    Its class, what its configuration sets otherwise than the default, its parameters and buffers, and the settings of
    its adapters. Half precision counts as float32. (Attributes that were set on its modules by hand are not seen.)
    """
    named = {n: p for n, p in model.named_parameters() if ".original_module." not in n} | dict(model.named_buffers())
    config: Any = getattr(model, "config", None)
    settings = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    adapters = adapter_settings(model)
    return {
        "the model": digest([[name, _tensor_fingerprint(named[name])] for name in sorted(named)]),
        "the model's class": type(model).__name__,
        **{f"model.config.{key}": value for key, value in _read(settings).items()},
        **({"the adapters": digest(contents(adapters))} if adapters else {}),
    }


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of `model_identity`."""
    return digest(contents(model_identity(model)))


def _tensor_fingerprint(t: Tensor) -> str:
    """Of a parameter in the precision in which it is used. A buffer that is computed when a model is made may have
    another dtype in a model that was converted: it counts as float64."""
    if not isinstance(t, nn.Parameter):
        t = t.double() if t.is_floating_point() else t
    elif t.dtype in (torch.float16, torch.bfloat16):
        t = t.float()
    return tensors_fingerprint({"": t})


def _read(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings without the unread ones."""
    return {
        key: _read(value) if isinstance(value, dict) else contents(value)
        for key, value in settings.items()
        if key not in UNREAD
    }
