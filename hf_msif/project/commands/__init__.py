"""The commands of `msif`, one file each; `cli.COMMANDS` lists them.

A new command is a module here that has the members of `Command`, and its name in a group of that table. `msif --help`
imports every command, so a command imports torch, pandas and the like inside its functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Protocol

from ...errors import InputError
from ..values import shortened


class Command(Protocol):
    """What a command's module states, and its three functions.

    Attributes:
        HELP: one line for `msif --help`.
        TAKES_CONFIGURATION: whether it takes `--config FILE.yaml` and `--section.key VALUE`.
        WRITES: whether it writes to the run folder, so that no other command may write there meanwhile. A command
            without configuration names the folder by its flag `--run_dir`.
        SHARES_WORK: whether the processes of a launch share its work; a launcher is refused otherwise.
        FLAGS: its own flags as its usage line shows them, if it takes a configuration; argparse writes the usage
            line of the other commands.
        run: does the work and returns the report that `--json` prints. It is called as `run(arguments, project)`,
            where `project` is the `Run` of the configuration, if the command takes one; as `run(arguments)` otherwise.
    """

    HELP: str
    TAKES_CONFIGURATION: bool
    WRITES: bool
    SHARES_WORK: bool
    FLAGS: str
    run: Callable[..., dict]

    def register(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's own flags to its parser."""

    def render(self, report: dict) -> None:
        """Prints the report of `run` for people."""


def check_positive(flag: str, value: int) -> None:
    """Refuses a count below one, or one that no machine reaches.

    Raises:
        InputError: names the flag and its value.
    """
    check_range(flag, value, 1, 2**31 - 1)


def check_range(flag: str, value: int, least: int, most: int) -> None:
    """Refuses a number out of a range.

    Raises:
        InputError: names the flag and its value.
    """
    if value < least:
        raise InputError(f"{flag} is {value}; expected at least {least}.")
    if value > most:
        raise InputError(f"{flag} is {shortened(value)}; expected at most {most}.")
