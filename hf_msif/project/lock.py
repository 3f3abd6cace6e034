"""`in_use`: one process at a time writes to a run folder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from .launch import rank

LOCK = ".hf_msif.lock"
OWNER = ".hf_msif.lock.json"


@contextmanager
def in_use(folder: Path, command: str, key: str = "run_dir") -> Iterator[None]:
    """Holds a run folder for a command, and says meanwhile who holds it. Of a launch, the main process holds it.

    The lock is the operating system's, which releases it when the process ends, however it ends.

    Args:
        folder: the run folder; made if needed, and removed again if nothing was written to it.
        command: what is at work, for messages.
        key: how the user names the folder, for messages.

    Raises:
        InputError: another process holds the folder, or it cannot be written to.
    """
    if rank():
        yield
        return
    from filelock import FileLock, Timeout

    was_there = folder.exists()
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{key} {str(folder)!r} is in use by {_owner(owner)}: wait until it has ended, or give another {key}."
        ) from None
    except OSError as error:
        raise InputError(
            f"{key} {str(folder)!r} cannot be written to ({error.strerror or error}); give another {key}."
        ) from error
    try:
        facts = {"command": command, "process": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        owner.write_text(json.dumps(facts), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
        if not was_there and folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _owner(path: Path) -> str:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        since = time.strftime("%H:%M", time.localtime(facts["since"]))
        return f"{facts['command']} (process {facts['process']} on {facts['host']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):  # it began, or ended, this very moment
        return "another msif command"
