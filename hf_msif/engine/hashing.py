"""What things are known by: SHA-256 of rows (plain values, arrays, images), the plain fields of settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256 of rows of plain values, arrays and images."""
    found = hashlib.sha256()
    _update(found, value)
    return found.hexdigest()


def _update(found, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(f"\x1e{key}\x1f".encode())
            _update(found, value[key])
    elif isinstance(value, (list, tuple)) and not all(isinstance(x, (int, float, str)) for x in value):
        found.update(f"\x1d{len(value)}".encode())
        for item in value:
            _update(found, item)
    elif hasattr(value, "tobytes"):  # a NumPy array, or an image
        shape = getattr(value, "shape", None) or (getattr(value, "size", None), getattr(value, "mode", None))
        found.update(f"{shape}{getattr(value, 'dtype', '')}".encode())
        found.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else value.tobytes())
    elif isinstance(value, bytes):
        found.update(value)
    else:
        found.update(repr(value).encode())


def describe(settings) -> dict:
    """Class and plain fields of a settings object, for metadata."""
    plain = {
        k: v for k, v in vars(settings).items() if isinstance(v, (str, int, float, bool, tuple, list, type(None)))
    }
    return {"class": type(settings).__name__, **plain}


def tensors_fingerprint(x: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and values of tensors, in their order."""
    found = hashlib.sha256()
    for name, t in x.items():
        found.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        found.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy())  # bfloat16 is unknown to NumPy
    return found.hexdigest()


def objective_fingerprint(objective) -> str:
    """SHA-256 of an objective's settings, and of its tokenizer or image processor where it has one."""
    parts = [describe(objective)]
    tokenizer, processor = objective.tokenizer, objective.processor
    if tokenizer is not None:
        vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
        parts += [type(tokenizer).__name__, repr(vocabulary), getattr(tokenizer, "model_max_length", None)]
        parts.append(str(getattr(tokenizer, "special_tokens_map", "")))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            rules = json.loads(backend.to_str())
            # What the latest call asked for is no part of it.
            parts.append(repr({key: rule for key, rule in rules.items() if key not in ("truncation", "padding")}))
    if hasattr(processor, "to_dict"):
        parts.append(repr(processor.to_dict()))
    return digest(parts)
