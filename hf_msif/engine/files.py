"""Files that are written whole or not at all: JSON, and tensors with metadata. Nested tensors under flat keys."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

_watchers: list[Callable[[Path, Path], object]] = []


@contextmanager
def watched(watcher: Callable[[Path, Path], object]) -> Iterator[None]:
    """Inside, `watcher(part, path)` is called before each complete file `part` is renamed to `path`, by any thread."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, and renames it to `path` when it is complete and on the disk.

    A crash or a power cut never damages an older file at `path`. Each process has a temporary file of its own, so
    processes may write the same path. If `write` raises, the temporary file is removed and `path` is unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "note.txt", lambda path: path.write_text("whole"))
    ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
    [('note.txt', 'whole')]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        _sync(part)
        for watcher in _watchers:
            watcher(part, path)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk: a rename could get there before the content."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Writes `value` as UTF-8 JSON, whole or not at all; what JSON cannot hold is written as its `str`."""
    text = json.dumps(value, indent=indent, default=str, ensure_ascii=False)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_tensors(x: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict | None = None) -> None:
    """Writes tensors as safetensors, whole or not at all, in their own dtypes and order.

    `metadata` must be JSON-able; it is kept in the header of the file.
    """
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in x.items()}
    # safetensors sorts the names, but `vectors.flatten` depends on their order: the header records it.
    header = {"hf_msif": json.dumps(metadata or {}), "names": json.dumps(list(tensors))}
    write_atomically(path, lambda part: save_file(tensors, part, metadata=header))


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Reads a file of `save_tensors`: the tensors on the CPU, in the order in which they were saved, and the metadata.

    Files of other programs are read too; their metadata is then empty.

    Raises:
        FileNotFoundError: there is no such file.
        safetensors.SafetensorError: the file is no complete safetensors file.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors({"w": torch.ones(2), "b": torch.zeros(1)}, f"{folder}/x.safetensors", {"step": 3})
    ...     load_tensors(f"{folder}/x.safetensors")
    ({'w': tensor([1., 1.]), 'b': tensor([0.])}, {'step': 3})
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        names = json.loads(header["names"]) if "names" in header else list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(header.get("hf_msif", "{}"))


def flat_keys(blocks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Puts nested tensors under flat keys: {"u": {"w": t}} → {"u/w": t}."""
    return {f"{part}/{name}": t for part, block in blocks.items() for name, t in block.items()}


def nested_keys(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flat_keys`: what precedes the first slash of a key is the outer name.

    >>> nested_keys({"u/w": 1, "u/b": 2, "v/w": 3})
    {'u': {'w': 1, 'b': 2}, 'v': {'w': 3}}
    """
    blocks: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        part, name = key.split("/", 1)
        blocks.setdefault(part, {})[name] = t
    return blocks
