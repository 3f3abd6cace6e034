"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
