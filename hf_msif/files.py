"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` and moves it there when it is complete: a crash never spoils an older
    one, and processes that write the same file do not meet."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Writes JSON whole or not at all; what JSON does not know is written as text."""
    text = json.dumps(value, indent=indent, default=str, ensure_ascii=False)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
