"""Commands that the documentation shows: run where they are quick, else parsed by their own parsers."""

import argparse
import configparser
import contextlib
import io
import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path

from hf_msif.errors import InputError
from hf_msif.project import cli, config

# What stands beside the commands of a recipe and is too plain to be checked.
PLAIN = {"cp", "export"}


class CommandError(Exception):
    """A command that the documentation shows and that does not exist, or not so."""


def execute(words: list[str], root: Path) -> None:
    """Runs an `msif` command on what lies in the working folder; checks any other command."""
    if words[0] == "msif" and words[1] != "demo" and _is_here(words):
        code = cli.main(words[1:])
        if code:
            raise CommandError(f"{' '.join(words)} ended with exit code {code}")
        return
    with contextlib.chdir(root):
        check(words, root)


def _is_here(words: list[str]) -> bool:
    paths = [b for a, b in pairwise(words) if a in ("--config", "--run", "--runs")]
    return bool(paths) and all(Path(path).exists() for path in paths)


def check(words: list[str], root: Path) -> None:
    """Parses a command as the program itself would, in the repository's root.

    Raises:
        CommandError: the program, its flag, a setting, a file or a make target does not exist.
    """
    program, *arguments = words
    if program == "msif":
        _msif(arguments)
    elif program == "python":
        _python(arguments)
    elif program in ("accelerate", "torchrun"):
        _launcher(program, arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE)
        _expect(set(arguments) <= set(targets), f"make {' '.join(arguments)}: the targets are {targets}")
    elif program == "pip":
        _pip(arguments, root)
    else:
        _expect(program in PLAIN, f"{program} is no command that this test knows")


def _expect(true: bool, message: str) -> None:
    if not true:
        raise CommandError(message)


@contextlib.contextmanager
def _complaints(words: list[str]):
    """What a parser says before it ends the process, as an exception."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        raise CommandError(f"{' '.join(words)}: {said.getvalue().strip() or end.code}") from None
    except InputError as error:
        raise CommandError(f"{' '.join(words)}: {error}") from None


def _msif(arguments: list[str]) -> None:
    rest = _remaining(["msif", *arguments], lambda: cli.main(arguments))
    with _complaints(["msif", *arguments]):
        if not cli.load_commands()[arguments[0]].TAKES_CONFIGURATION:
            _expect(not rest, f"msif {arguments[0]} knows no {rest}")
        else:
            config.parse(rest)


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "hf_msif"]:
        _msif(arguments[2:])
        return
    script = arguments[1:]
    if arguments[0] == "-m":
        script = arguments[2:]
        rest = _remaining(script, lambda: runpy.run_module(arguments[1], run_name="__main__"))
    else:
        path = Path(arguments[0])
        _expect(path.is_file(), f"there is no script {path}")
        if "argparse" not in path.read_text():
            rest = script
        else:
            with _beside(path.parent):
                rest = _remaining(script, lambda: runpy.run_path(str(path), run_name="__main__"))
    if "--config" in script:  # of a recipe, whose other arguments override settings
        place = script.index("--config")
        with _complaints(arguments):
            config.parse([*script[place : place + 2], *rest])
    else:
        _expect(not rest, f"{arguments[0]} knows no {rest}")


@contextlib.contextmanager
def _beside(folder: Path):
    """The folder's modules can be imported, as by a script that lies in it, and are forgotten afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(folder) == str(Path(getattr(sys.modules[name], "__file__", None) or "").parent):
                del sys.modules[name]


class _ParsedError(Exception):
    """The parser is done, and its program need not go on."""


def _remaining(arguments: list[str], run) -> list[str]:
    """Runs a program as far as its argument parser; returns the arguments that the parser left for a configuration."""
    original, command, depth = argparse.ArgumentParser.parse_known_args, sys.argv, 0
    remaining: list[str] = []

    def parse_and_end(parser, *args, **settings):
        nonlocal depth
        depth += 1  # a command's own parser is called by that of the program
        try:
            namespace, rest = original(parser, *args, **settings)
        finally:
            depth -= 1
        if depth:
            return namespace, rest
        remaining[:] = rest
        raise _ParsedError

    argparse.ArgumentParser.parse_known_args = parse_and_end
    sys.argv = ["script", *arguments]
    try:
        with _complaints(arguments):
            code = run()
    except _ParsedError:
        return remaining
    finally:
        argparse.ArgumentParser.parse_known_args, sys.argv = original, command
    raise CommandError(f"{' '.join(arguments)}: its arguments were not accepted ({code!r:.50})")


def _launcher(program: str, arguments: list[str]) -> None:
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        _expect(arguments[0] == "launch", f"accelerate {arguments[0]} is not shown anywhere")
        parser, arguments = launch_command_parser(), arguments[1:]
    else:
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    with _complaints([program, *arguments]):
        given = parser.parse_args(arguments)
    _expect(given.training_script == "hf_msif" and given.module, f"{program} starts {given.training_script}")
    file = getattr(given, "config_file", None)
    _expect(file is None or Path(file).is_file(), f"there is no launch file {file}")
    _msif(given.training_script_args)


def _pip(arguments: list[str], root: Path) -> None:
    metadata = configparser.ConfigParser()
    metadata.read(root / "setup.cfg")
    extras = set(metadata["options.extras_require"])
    _expect(arguments[0] == "install", f"pip {arguments[0]} is not shown anywhere")
    for word in arguments[1:]:
        package = re.fullmatch(r"(\.|hf_msif)(?:\[([\w, ]+)\])?", word)
        _expect(package is not None or word in ("-e", "--editable"), f"pip install {word}: not this package")
        named = set(re.split(r"[, ]+", package[2])) if package and package[2] else set()
        _expect(named <= extras, f"pip install {word}: the extras are {sorted(extras)}")
