"""Fingerprints (SHA-256) of rows, tensors and objectives, and the plain fields of settings objects."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of nested sequences and mappings of plain values, NumPy arrays, images and bytes.

    The order of a mapping's keys does not matter; the order of a list does.

    >>> digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    True
    """
    sha = hashlib.sha256()
    _update(sha, value)
    return sha.hexdigest()


def _update(sha: hashlib._Hash, value: Any) -> None:
    """Feeds a value to the hash; separators mark keys and the lengths of lists."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            sha.update(f"\x1e{key}\x1f".encode())
            _update(sha, value[key])
    elif isinstance(value, Tensor):
        sha.update(tensors_fingerprint({"": value}).encode())
    elif isinstance(value, Sequence) and not _is_plain(value):
        sha.update(f"\x1d{len(value)}".encode())
        for item in value:
            _update(sha, item)
    elif hasattr(value, "tobytes"):  # a NumPy array, or an image
        shape = getattr(value, "shape", None) or (getattr(value, "size", None), getattr(value, "mode", None))
        sha.update(f"{shape}{getattr(value, 'dtype', '')}".encode())
        sha.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else value.tobytes())
        if getattr(value, "mode", None) == "P":  # an image whose bytes are numbers of colours
            sha.update(repr(value.getpalette()).encode())
    elif isinstance(value, bytes):
        sha.update(value)
    else:
        sha.update(repr(value).encode())


def _is_plain(value: Sequence) -> bool:
    """Text, bytes, or a list of plain values, whose `repr` is all of it."""
    if isinstance(value, (str, bytes)):
        return True
    return isinstance(value, (list, tuple)) and all(isinstance(x, (int, float, str)) for x in value)


def contents(value: Any) -> Any:
    """A value of any kind as plain values, by which it can be compared: what it holds, not where it lies.

    Arrays and tensors become their SHA-256, objects their class and fields. A class is known by its name, a function
    by its name and code.

    >>> contents({"b": (1, 2.0), "a": {3, 4}})
    {'a': ['set', 3, 4], 'b': [1, 2.0]}
    """
    return _contents(value, ())


def _contents(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if id(value) in above:
        return "itself"
    above = (*above, id(value))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, enum.Enum):
        return f"{kind}.{value.name}"
    if isinstance(value, Mapping):
        return {str(key): _contents(value[key], above) for key in sorted(value, key=str)}
    if isinstance(value, (set, frozenset)):
        return [type(value).__name__, *sorted((_contents(item, above) for item in value), key=repr)]
    if isinstance(value, (list, tuple)):
        return [_contents(item, above) for item in value]
    if isinstance(value, Tensor):
        return tensors_fingerprint({"": value})
    if isinstance(value, torch.nn.Module):
        return [kind, tensors_fingerprint(value.state_dict())]
    if isinstance(value, (np.ndarray, bytes)):
        return digest([value])
    if hasattr(value, "get_vocab"):
        return tokenizer_fingerprint(value)
    if isinstance(value, functools.partial):
        return [_contents(part, above) for part in (value.func, value.args, value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):
        code = getattr(value, "__code__", None)  # lambdas have one name
        return [f"{value.__module__}.{value.__qualname__}", "" if code is None else code.co_code.hex()]
    return [kind, _contents(fields_of(value), above)]


def fields_of(value: object) -> dict[str, Any]:
    """The fields of an object by name: those of a dataclass that count in its equality, else all but cached ones."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
        # What was set beside the fields, as by `Objective.unpadded`.
        return fields | {k: v for k, v in getattr(value, "__dict__", {}).items() if k == "pads"}
    own = getattr(value, "__dict__", {})
    return {k: v for k, v in own.items() if not isinstance(getattr(type(value), k, None), functools.cached_property)}


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


def objective_identity(objective: Preprocessing) -> dict[str, Any]:
    """Everything that an objective's losses depend on beside the model: name for people → plain value or SHA-256.

    Its class and settings, by name; its tokenizer and image processor, by content.
    """
    settings = {name: value for name, value in fields_of(objective).items() if name not in ("tokenizer", "processor")}
    identity = {"objective": type(objective).__name__}
    identity |= {f"objective.{name}": contents(value) for name, value in settings.items()}
    if objective.tokenizer is not None:
        identity["the tokenizer"] = tokenizer_fingerprint(objective.tokenizer)
    if objective.processor is not None:
        processor = objective.processor
        known = processor.to_dict() if hasattr(processor, "to_dict") else fields_of(processor)
        # As it is after it was saved: an enumeration is a number, a tuple a list.
        identity["the image processor"] = digest(json.dumps(known, sort_keys=True, default=str))
    return identity


def objective_fingerprint(objective: Preprocessing) -> str:
    """SHA-256, in hexadecimal, of `objective_identity`."""
    return digest(objective_identity(objective))


# What a tokenizer makes of it tells rules that it states nowhere: case, accents, white space, numbers, special tokens.
PROBE = "Hello  hello, WORLD! Naïve café 12345 don't #tag @name http://x.y\tübung 中文 🗳"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256, in hexadecimal, of a tokenizer's class, vocabulary, limit, special tokens and rules, and of what it
    makes of a text, whole and cut."""
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    parts: list[Any] = [type(tokenizer).__name__, repr(vocabulary), getattr(tokenizer, "model_max_length", None)]
    parts.append(str(getattr(tokenizer, "special_tokens_map", "")))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Truncation and padding are what the latest call asked for, not properties of the tokenizer.
        parts.append(repr({key: rule for key, rule in rules.items() if key not in ("truncation", "padding")}))
    if callable(tokenizer):
        text = " ".join([PROBE, *map(str, getattr(tokenizer, "all_special_tokens", []))])
        parts.append(repr(tokenizer([text])["input_ids"]))
        parts.append(repr(tokenizer([text], truncation=True, max_length=8)["input_ids"]))
    return digest(parts)
