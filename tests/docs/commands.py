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
    with _complaints(["msif", *arguments]):
        given, rest = cli.parser().parse_known_args(arguments)
        if given.command in ("demo", "top", "compare"):
            _expect(not rest, f"msif {given.command} knows no {rest}")
        else:
            config.parse(rest)


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "hf_msif"]:
        _msif(arguments[2:])
    elif arguments[0] == "-m":
        _script(arguments[2:], lambda: runpy.run_module(arguments[1], run_name="__main__"))
    else:
        path = Path(arguments[0])
        _expect(path.is_file(), f"there is no script {path}")
        if "argparse" in path.read_text():
            _script(arguments[1:], lambda: runpy.run_path(str(path), run_name="__main__"))
        else:
            _expect(arguments[1:] == [], f"{path} takes no arguments")


class _ParsedError(Exception):
    """The arguments were accepted: the script need not go on."""


def _script(arguments: list[str], run) -> None:
    """Runs a script as far as its argument parser, which must accept the arguments."""
    parse, path, command = argparse.ArgumentParser.parse_known_args, list(sys.path), sys.argv

    def parse_and_end(parser, args=None, namespace=None):
        _, rest = parse(parser, args, namespace)
        if rest and "--config" not in arguments:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise _ParsedError

    argparse.ArgumentParser.parse_known_args = parse_and_end
    sys.argv = ["script", *arguments]
    try:
        with _complaints(sys.argv), contextlib.suppress(_ParsedError):
            run()
            raise CommandError(f"{' '.join(arguments)}: the script has no argument parser")
    finally:
        argparse.ArgumentParser.parse_known_args, sys.path, sys.argv = parse, path, command


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
