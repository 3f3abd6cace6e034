"""Fingerprints (SHA-256) of rows, tensors and objectives, and the plain fields of settings objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of nested lists and mappings of plain values, NumPy arrays, images and bytes.

    The order of a mapping's keys does not matter; the order of a list does.

    >>> digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    True
    """
    sha = hashlib.sha256()
    _update(sha, value)
    return sha.hexdigest()


def _update(sha: hashlib._Hash, value: Any) -> None:
    """Feeds a value to the hash; separators mark keys and the lengths of lists."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            sha.update(f"\x1e{key}\x1f".encode())
            _update(sha, value[key])
    elif isinstance(value, (list, tuple)) and not all(isinstance(x, (int, float, str)) for x in value):
        sha.update(f"\x1d{len(value)}".encode())
        for item in value:
            _update(sha, item)
    elif hasattr(value, "tobytes"):  # a NumPy array, or an image
        shape = getattr(value, "shape", None) or (getattr(value, "size", None), getattr(value, "mode", None))
        sha.update(f"{shape}{getattr(value, 'dtype', '')}".encode())
        sha.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else value.tobytes())
    elif isinstance(value, bytes):
        sha.update(value)
    else:
        sha.update(repr(value).encode())


def describe(settings: object) -> dict[str, Any]:
    """The class name and the plain fields (text, numbers, lists, None) of a settings object, for metadata.

    >>> from types import SimpleNamespace
    >>> describe(SimpleNamespace(tol=1e-3, model=object()))
    {'class': 'SimpleNamespace', 'tol': 0.001}
    """
    plain = {
        k: v for k, v in vars(settings).items() if isinstance(v, (str, int, float, bool, tuple, list, type(None)))
    }
    return {"class": type(settings).__name__, **plain}


def tensors_fingerprint(x: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of the names, shapes, dtypes and values of tensors, in their order."""
    sha = hashlib.sha256()
    for name, t in x.items():
        sha.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        sha.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)  # bfloat16 is unknown to NumPy
    return sha.hexdigest()


class Preprocessing(Protocol):
    """What is read of an objective beside its settings; `objectives.Objective` has it."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def processor(self) -> Any: ...


def objective_fingerprint(objective: Preprocessing) -> str:
    """SHA-256, in hexadecimal, of an objective's settings, and of its tokenizer or image processor if it has one."""
    parts: list[Any] = [describe(objective)]
    tokenizer, processor = objective.tokenizer, objective.processor
    if tokenizer is not None:
        parts += _tokenizer_parts(tokenizer)
    if hasattr(processor, "to_dict"):
        parts.append(repr(processor.to_dict()))
    return digest(parts)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256, in hexadecimal, of a tokenizer: its class, vocabulary, special tokens and rules."""
    return digest(_tokenizer_parts(tokenizer))


def _tokenizer_parts(tokenizer: Any) -> list[Any]:
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    parts = [type(tokenizer).__name__, repr(vocabulary), getattr(tokenizer, "model_max_length", None)]
    parts.append(str(getattr(tokenizer, "special_tokens_map", "")))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Truncation and padding are what the latest call asked for, not properties of the tokenizer.
        parts.append(repr({key: rule for key, rule in rules.items() if key not in ("truncation", "padding")}))
    return parts
