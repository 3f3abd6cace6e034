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
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from .. import __version__
from ..errors import InputError, ProcessError, first_line
from . import launch
from .values import LONGEST_PATH, shown_text

if TYPE_CHECKING:
    from .commands import Command
    from .run import Run

DESCRIPTION = "Which sentences of the pretraining corpus made this finetuned model say this about this tweet?"
# Each is a file in commands/; `msif --help` lists the groups, and the commands in them, in this order.
COMMANDS = {
    "ask which sentences made the model say this": ("explain", "demo", "top", "report"),
    "prepare a run": ("init", "diagnose", "plan", "train"),
    "measure influence": ("query", "score", "sweep", "validate"),
    "use what was measured": ("cleanse", "compare", "mean"),
}
FIRST_STEPS = """\
first steps:
  msif demo                         the main job on embedded data, in about two minutes
  msif diagnose --config FILE.yaml  whether your own models and data are fit for it
  msif plan --config FILE.yaml      what it will cost, before anything is spent"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help lists the settings of the configuration for
    commands that take one."""

    takes_configuration = False
    of_commands: dict[str, Parser]

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
    names = [name for group in COMMANDS.values() for name in group]
    modules = {name: importlib.import_module(f".commands.{name}", __package__) for name in names}
    return cast("dict[str, Command]", modules)


def make_parser(commands: dict[str, Command]) -> Parser:
    """The parser of the command line; flags of the configuration are left over for `config.parse`."""
    parser = Parser(
        prog="msif",
        usage="msif COMMAND [--flag VALUE ...]",
        description=_overview(commands),
        epilog=f"{FIRST_STEPS}\n\nmsif COMMAND --help tells a command's flags, and the settings of a configuration.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(
        prog="msif", required=True, dest="command", metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, command in commands.items():
        usage = None
        if command.TAKES_CONFIGURATION:
            flags = f"{command.FLAGS} " if command.FLAGS else ""
            usage = f"msif {name} --config FILE.yaml [--section.key VALUE ...] {flags}[--json] [--debug]"
        subparser = subparsers.add_parser(name, description=command.HELP, usage=usage, allow_abbrev=False)
        subparser.takes_configuration = command.TAKES_CONFIGURATION
        subparser.add_argument("--json", action="store_true", help="print one JSON object; prose goes to stderr")
        subparser.add_argument(
            "--debug", action="store_true", help="print the traceback of an error in the place of one sentence"
        )
        command.register(subparser)
    parser.of_commands = subparsers.choices
    return parser


def _overview(commands: dict[str, Command]) -> str:
    """What the library answers, and its commands by group, each with its line."""
    width = max(map(len, commands)) + 4
    columns = min(shutil.get_terminal_size((100, 24)).columns, 119)
    paragraphs = [textwrap.fill(DESCRIPTION, columns)]
    for title, names in COMMANDS.items():
        lines = [
            textwrap.fill(
                commands[name].HELP,
                columns,
                initial_indent=f"  {name}".ljust(width),
                subsequent_indent=" " * width,
            )
            for name in names
        ]
        paragraphs.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join(paragraphs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command line, without the program's name; defaults to those of this process.

    Returns:
        The exit code: 0; 2 after one sentence on stderr that says what the user can mend, or what nobody expected
        (with `--debug` its traceback in the place of the sentence);
        130 after Ctrl-C; 141 where nobody reads the output any more (`| head`), as for other programs.
    """
    # The handler of a launch (`__main__`) is for the imports.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    launch.print_anything()
    commands = load_commands()
    parser = make_parser(commands)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        from .completion import complete

        complete(parser, [subparser for subparser in parser.of_commands.values() if subparser.takes_configuration])
    try:
        parsed, remaining = parser.parse_known_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    name = f"msif {parsed.command}"
    try:
        _execute(commands, parsed, remaining)
        sys.stdout.flush()  # what cannot be written is told here, and not while the process ends
    except BrokenPipeError:
        launch.silence(sys.stdout)
        return 141
    except KeyboardInterrupt:
        print(f"{name}: interrupted; finished files are whole.", file=sys.stderr)
        return 130
    except Exception as error:
        if _is_full(sys.stdout):
            launch.silence(sys.stdout)
        if parsed.debug:
            traceback.print_exception(error)
        else:
            print(f"{name}: error{_process()}: {_told(error)}", file=sys.stderr)
        return 2
    return 0


def _execute(commands: dict[str, Command], parsed: argparse.Namespace, remaining: list[str]) -> None:
    """Runs a command, and prints its report."""
    command, rank, processes = commands[parsed.command], launch.rank(), launch.processes()
    if processes > 1 and not command.SHARES_WORK:
        sharing = ", ".join(name for name, other in commands.items() if other.SHARES_WORK)
        raise InputError(
            f"it was started as {processes} processes, but only {sharing} share their work; expected "
            f"msif {parsed.command} without a launcher."
        )
    # With --json, stdout holds the one object and nothing else. Of several processes only the main one prints.
    prose = contextlib.redirect_stdout(sys.stderr) if parsed.json else contextlib.nullcontext()
    if rank:
        prose = contextlib.redirect_stdout(io.StringIO())
    with prose, _short_warnings(silent=rank > 0):
        report = _run(command, parsed, remaining)
        command.render(report)
    if parsed.json and not rank:
        is_unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        print(json.dumps(_as_json(report), ensure_ascii=not is_unicode, allow_nan=False))


def _told(error: Exception) -> str:
    """What an error says, in one line. One that nobody expected says where it was raised."""
    if isinstance(error, (InputError, ProcessError)):
        text = str(error)
    elif isinstance(error, OSError):
        places = [os.fsdecode(place) for place in (error.filename, error.filename2) if isinstance(place, (str, bytes))]
        place = f" at {' and '.join([shown_text(place, LONGEST_PATH) for place in places])}" if places else ""
        text = f"the system refused{place}: {error.strerror or first_line(error)}; give another path, or free space."
    elif isinstance(error, MemoryError) or "allocate memory" in str(error):
        text = f"there is not enough memory ({first_line(error)}): use smaller models or batches, or another machine."
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"{type(error).__name__}: {first_line(error)} (raised in {Path(last.filename).name}, line {last.lineno}); "
            "msif did not expect this: check the input, or report it with the traceback that --debug prints."
        )
    return " ".join(" ".join([text, *getattr(error, "__notes__", ())]).split())


def _process() -> str:
    """Which process of a launch speaks; empty where there is one."""
    try:
        return "" if launch.processes() == 1 else f" (process {launch.rank()})"
    except InputError:
        return ""


def _is_full(stream: TextIO) -> bool:
    """Whether what was printed cannot be written."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


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
    from .run import Run

    launch.quieten_transformers()
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
    return in_use(Path(parsed.run_dir), name, key="--run_dir")


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
