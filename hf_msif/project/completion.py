"""Completion in a shell, by argcomplete: commands, their flags, and keys and values of the configuration."""

from __future__ import annotations

import argparse
import os
import shlex
import typing
from collections.abc import Iterable
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from .config import settable_keys


def complete(parser: argparse.ArgumentParser, configured: Iterable[argparse.ArgumentParser]) -> None:
    """Tells the shell what may follow, and ends the process. Does nothing where argcomplete is not installed.

    The stages are those of the files that `--config` names on the line so far.

    Args:
        parser: of the command line.
        configured: the parsers of its commands that take a configuration, to which its keys are added.
    """
    try:
        import argcomplete
    except ImportError:
        return
    words = _words(os.environ.get("COMP_LINE", ""))
    files = [value for flag, value in pairwise(words) if flag == "--config"]
    keys = settable_keys(files)
    for subparser in configured:
        subparser.add_argument("--config", action="append")
        for key, field in keys.items():
            action = subparser.add_argument(f"--{key}")
            values = _values(field.annotation)
            if values - {"null"}:
                action.completer = argcomplete.ChoicesCompleter(dict.fromkeys(sorted(values), ""))  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a quote that is still open
        return line.split()


def _values(kind: Any) -> set[str]:
    """The words among the values of a type; what else it takes is typed by hand."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return {"true", "false"}
    if kind is NoneType:
        return {"null"}
    if origin is Literal:
        return set(map(str, inner))
    if origin is Annotated:
        return _values(inner[0])
    return set().union(*map(_values, inner)) if origin in (Union, UnionType) else set()
