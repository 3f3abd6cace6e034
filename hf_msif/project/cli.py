"""The command line `msif`: what its commands share. Each command is a file in `commands`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from .. import __version__
from ..errors import InputError, ProcessError, first_line

if TYPE_CHECKING:
    from .commands import Command
    from .run import Run

DESCRIPTION = "Which sentences of the pretraining corpus made this finetuned model say this about this tweet?"
# Each is a file in commands/; `msif --help` lists them in this order.
COMMANDS = (
    "demo",
    "plan",
    "diagnose",
    "train",
    "query",
    "score",
    "sweep",
    "validate",
    "cleanse",
    "top",
    "compare",
    "mean",
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help lists the settings of the configuration for
    commands that take one."""

    takes_configuration = False

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        if not self.takes_configuration:
            return super().format_help()
        from .config import help_text

        return (
            f"{super().format_help()}\nsettings, in YAML files (--config FILE.yaml) or as flags, later ones win; "
            f"NAME is a stage's name:\n{help_text(min(shutil.get_terminal_size((100, 24)).columns, 119))}\n"
        )


def load_commands() -> dict[str, Command]:
    """The modules of all commands by name; they import nothing heavy."""
    modules = {name: importlib.import_module(f".commands.{name}", __package__) for name in COMMANDS}
    return cast("dict[str, Command]", modules)


def make_parser(commands: dict[str, Command]) -> Parser:
    """The parser of the command line; flags of the configuration are left over for `config.parse`."""
    parser = Parser(prog="msif", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", title="commands")
    for name, command in commands.items():
        usage = None
        if command.TAKES_CONFIGURATION:
            flags = f"{command.FLAGS} " if command.FLAGS else ""
            usage = f"msif {name} --config FILE.yaml [--section.key VALUE ...] {flags}[--json]"
        subparser = subparsers.add_parser(
            name, help=command.HELP, description=command.HELP, usage=usage, allow_abbrev=False
        )
        subparser.takes_configuration = command.TAKES_CONFIGURATION
        subparser.add_argument("--json", action="store_true", help="print one JSON object; prose goes to stderr")
        command.register(subparser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command line, without the program's name; defaults to those of this process.

    Returns:
        The exit code: 0; 2 after one sentence on stderr that says what the user can mend; 130 after Ctrl-C.
    """
    commands = load_commands()
    try:
        parsed, remaining = make_parser(commands).parse_known_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    command = commands[parsed.command]
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # With --json, stdout holds the one object and nothing else. Of several processes only the main one prints.
    prose = contextlib.redirect_stdout(sys.stderr) if parsed.json else contextlib.nullcontext()
    if rank:
        prose = contextlib.redirect_stdout(io.StringIO())
    try:
        if processes > 1 and not command.SHARES_WORK:
            sharing = ", ".join(name for name, other in commands.items() if other.SHARES_WORK)
            raise InputError(
                f"it was started as {processes} processes, but only {sharing} share their work; expected "
                f"msif {parsed.command} without a launcher."
            )
        with prose, _short_warnings(silent=rank > 0):
            report = _run(command, parsed, remaining)
            command.render(report)
    except (InputError, OSError, ProcessError) as error:
        process = "" if processes == 1 else f" (process {rank})"
        text = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"msif {parsed.command}: error{process}: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"msif {parsed.command}: interrupted; finished files are whole.", file=sys.stderr)
        return 130
    if parsed.json and not rank:
        print(json.dumps(_as_json(report), ensure_ascii=False, allow_nan=False))
    return 0


def _run(command: Command, parsed: argparse.Namespace, remaining: list[str]) -> dict:
    """The command's report; arguments that its parser does not know are settings of the configuration."""
    if not command.TAKES_CONFIGURATION:
        if remaining:
            nearest = difflib.get_close_matches(remaining[0], [f"--{name}" for name in vars(parsed)], n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"see msif {parsed.command} -h."
            raise InputError(f"unknown argument {remaining[0]!r}; {hint}")
        with _held(command, parsed):
            return command.run(parsed)
    from .config import parse

    config = parse(remaining)  # before the heavy imports: an error in a setting is told at once
    import transformers

    from .run import Run

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    project = Run(config)
    with _held(command, parsed, project), _finishing(project):
        return command.run(parsed, project)


def _held(
    command: Command, parsed: argparse.Namespace, project: Run | None = None
) -> contextlib.AbstractContextManager:
    """Keeps other processes out of the run folder while a command writes to it."""
    if not command.WRITES:
        return contextlib.nullcontext()
    from .lock import in_use

    name = f"msif {parsed.command}"
    if project is not None:
        return in_use(project.folder, name)
    return in_use(Path(parsed.output_dir), name, key="--output_dir")


@contextlib.contextmanager
def _finishing(project: Run) -> Iterator[None]:
    """Ends what the command began: trackers write what they still hold, even if the command fails, and the processes
    of a launch part in order if it does not."""
    try:
        yield
    except BaseException as error:
        # An accelerator is made on first use: only one that exists has trackers.
        for tracker in project.accelerator.trackers if "accelerator" in vars(project) else ():
            try:
                tracker.finish()
            except Exception as other:
                error.add_note(f"The tracker {tracker.name} could not finish: {first_line(other)}.")
        raise
    if "accelerator" in vars(project):
        project.accelerator.end_training()


@contextlib.contextmanager
def _short_warnings(silent: bool = False) -> Iterator[None]:
    """Prints each warning as one line, without the source line that raised it."""

    def show(message, category, filename, lineno, file=None, line=None):
        if not silent:
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _as_json(value) -> object:
    """A value as strict JSON has it: a table is a list of rows, a number that is not finite is null."""
    if hasattr(value, "to_dict"):
        value = value.to_dict(orient="records")
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, type(None))) else str(value)
