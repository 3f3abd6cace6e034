"""Files that are written whole or not at all: JSON, and tensors with metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` and moves it there when it is complete and on the disk: a crash or a
    power cut never spoils an older one, and processes that write the same file do not meet."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk: a rename may get there before what it names."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Writes JSON whole or not at all; what JSON does not know is written as text."""
    text = json.dumps(value, indent=indent, default=str, ensure_ascii=False)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_tensors(x: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict | None = None) -> None:
    """Writes tensors as safetensors, whole or not at all; `metadata` (JSON-able) travels in the header."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in x.items()}
    # safetensors sorts the names; `vectors.flatten` depends on their order, so the order is kept beside them.
    header = {"hf_msif": json.dumps(metadata or {}), "names": json.dumps(list(tensors))}
    write_whole(path, lambda part: save_file(tensors, part, metadata=header))


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Reads what `save_tensors` wrote: the tensors, in the order they were saved in, and the metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        names = json.loads(header["names"]) if "names" in header else list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(header.get("hf_msif", "{}"))


def flat_keys(blocks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Nested tensors under one key each: {"u": {"w": t}} → {"u/w": t}."""
    return {f"{part}/{name}": t for part, block in blocks.items() for name, t in block.items()}


def nested_keys(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flat_keys`; a name may hold slashes, a part may not.

    >>> nested_keys({"u/w": 1, "u/b": 2, "v/w": 3})
    {'u': {'w': 1, 'b': 2}, 'v': {'w': 3}}
    """
    blocks: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        part, name = key.split("/", 1)
        blocks.setdefault(part, {})[name] = t
    return blocks
