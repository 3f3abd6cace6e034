"""Files that are written whole or not at all, and checked when they are read: JSON, and tensors with metadata. Nested
tensors under flat keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError, InputError, first_line

if TYPE_CHECKING:
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
    processes may write the same path. If `write` raises, the temporary file is removed and `path` is unchanged; a
    folder that was made for it goes, too.

    Raises:
        FileError: the disk is full, or something else keeps the file from being written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "note.txt", lambda path: path.write_text("whole"))
    ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
    [('note.txt', 'whole')]
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        is_new = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            _sync(part)
            for watcher in _watchers:
                watcher(part, path)
            os.replace(part, path)
            _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # it holds the file
                    path.parent.rmdir()


# What the writers of other libraries say of a full disk, which they do not report as an `OSError`.
_DISK = re.compile(r"I/O error|os error \d+|No space left|File too large|PytorchStreamWriter|file write failed")


@contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Inside, what the disk refuses becomes a `FileError` that names `path`.

    >>> with disk_errors("run/x.json"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
        ...
    hf_msif.errors.FileError: run/x.json cannot be written (No space left on device): free space, or write elsewhere.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        # Safetensors and PyTorch have errors of their own for it.
        if not isinstance(error, OSError) and not (_DISK.search(str(error)) and not isinstance(error, InputError)):
            raise
        reason = getattr(error, "strerror", None) or first_line(error).rpartition("I/O error: ")[2]
        is_full = re.search(r"No space|too large|quota|PytorchStreamWriter|write failed", reason)
        if is_full:
            way_out = "free space, or write elsewhere"
        elif isinstance(error, IsADirectoryError):
            way_out = "a folder is in its place: write elsewhere"
        elif isinstance(error, (FileExistsError, NotADirectoryError)):
            way_out = "a file is in the place of its folder: write elsewhere"
        else:
            way_out = "set its permissions, or write elsewhere"
        raise FileError(f"{path} cannot be written ({reason}): {way_out}.") from error


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def read_json(path: str | os.PathLike, kind: Any, way_out: str) -> Any:
    """Reads a JSON file that the library wrote, after checking that it holds what the library writes there.

    Args:
        path: the file.
        kind: what it holds, as a type that pydantic knows: a `TypedDict`, or `dict[str, Any]`.
        way_out: what to do where it is damaged, for the message.

    Raises:
        FileError: the file cannot be read, is no JSON, or holds something else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(f"{folder}/x.json", {"step": 3})
    ...     read_json(f"{folder}/x.json", dict[str, int], "delete it")
    {'step': 3}
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error}): {way_out}.") from error
    return parse_json(content, kind, path, way_out)


def parse_json(content: bytes, kind: Any, path: str | os.PathLike, way_out: str) -> Any:
    """The content of a JSON file, checked as by `read_json`."""
    try:
        value = json.loads(content.decode())
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs could not be written again
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise FileError(f"{path} cannot be read (it is no JSON: {reason}): {way_out}.") from error
    return checked_value(value, kind, path, way_out)


def checked_value(value: Any, kind: Any, path: str | os.PathLike, way_out: str) -> Any:
    """`value`, of the file `path`, if it is of that kind.

    Raises:
        FileError: names the first entry that is missing, unknown, or of another type.
    """
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_python(value, strict=True)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise FileError(f"{path} is damaged (nested too deep): {way_out}.") from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"][:6]) or "the whole"
        raise FileError(f"{path} is damaged ({place}: {first['msg']}): {way_out}.") from error
    return value


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
        FileError: the file cannot be read, is no complete safetensors file, or its header is not as it was written.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors({"w": torch.ones(2), "b": torch.zeros(1)}, f"{folder}/x.safetensors", {"step": 3})
    ...     load_tensors(f"{folder}/x.safetensors")
    ({'w': tensor([1., 1.]), 'b': tensor([0.])}, {'step': 3})
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
            if "names" in header:
                ordered = json.loads(header["names"])
                if not isinstance(ordered, list) or sorted(map(str, ordered)) != sorted(names):
                    raise FileError(f"{path} is damaged: its header names other tensors than it holds.")
                names = ordered
            metadata = json.loads(header.get("hf_msif", "{}"))
            if not isinstance(metadata, dict):
                raise FileError(f"{path} is damaged: its metadata are no mapping.")
            return {name: file.get_tensor(name) for name in names}, metadata
    except FileError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read: {first_line(error)}.") from error


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
        part, _, name = key.partition("/")
        blocks.setdefault(part, {})[name] = t
    return blocks
