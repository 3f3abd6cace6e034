"""What a launcher (torchrun, accelerate) says of this process, and the terminal that it prints to."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from ..errors import InputError


def rank() -> int:
    """The number of this process in its launch, from 0; 0 without a launcher.

    Raises:
        InputError: the environment variable RANK is no such number.
    """
    return _number("RANK", 0)


def processes() -> int:
    """The number of processes of the launch.

    Raises:
        InputError: the environment variable WORLD_SIZE is no such number.
    """
    return _number("WORLD_SIZE", 1)


def _number(name: str, least: int) -> int:
    text = os.environ.get(name) or str(least)
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise InputError(
            f"the environment variable {name} is {text!r}; expected a whole number from {least} on, as torchrun and "
            f"accelerate launch set it: unset {name} to run without a launcher."
        )
    return int(text)


def print_anything() -> None:
    """From now on, text that the terminal cannot show is printed by its escape sequences, and ends no finished run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def silence(stream: TextIO) -> None:
    """Nothing more is written to a stream whose reader has gone, nor at the end of the process."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def quieten_transformers() -> None:
    """From now on, transformers prints no bars ("Loading weights") and no log lines beside those of a command."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
