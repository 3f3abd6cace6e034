"""`msif report`: a finished run as one HTML file."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from pathlib import Path

from ...errors import InputError
from . import check_positive

HELP = "a finished run as one HTML file, to be read in a browser"
TAKES_CONFIGURATION = False
WRITES = False  # to a run folder it writes under the lock that `run` takes
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder that holds scores.parquet")
    parser.add_argument("--output", metavar="FILE.html", help="defaults to report.html in the run folder")
    parser.add_argument(
        "--stage", metavar="NAME", help="the stage whose ranking is shown; defaults to the one in scores.parquet"
    )
    parser.add_argument("-k", type=int, default=10, help="texts per list")


def run(arguments: argparse.Namespace) -> dict:
    """Writes the HTML file; tokens are shaded where `msif score` left their shares in the run folder."""
    from ...reports.html import write_report
    from ..saved_scores import saved_scores, saved_shares

    check_positive("-k", arguments.k)
    scores, folder = saved_scores(arguments.run, arguments.stage), Path(arguments.run).expanduser()
    shares = saved_shares(arguments.run, scores)
    words = ["msif", "report", "--run", arguments.run]
    for flag, value, default in (
        ("--output", arguments.output, None),
        ("--stage", arguments.stage, None),
        ("-k", arguments.k, 10),
    ):
        words += [] if value == default else [flag, str(value)]
    name = "report.html" if arguments.stage is None else f"report-{arguments.stage}.html"
    path = folder / name if arguments.output is None else Path(arguments.output).expanduser()
    with _writing(folder, path):
        write_report(scores, path, k=arguments.k, shares=shares, command=shlex.join(words))
    facts = {
        "stage": scores.metadata.get("stage"),
        "tests": scores.columns,
        "noise": scores.metadata.get("noise_text"),
    }
    return {"run": arguments.run, "report": str(path), "shares": shares is not None, **facts}


def _writing(folder: Path, path: Path) -> contextlib.AbstractContextManager:
    """Inside, the file may be written: in the run folder as every output of it, elsewhere in the place of an earlier
    report or of nothing.

    Raises:
        InputError: something else stands there, or another process writes to the run folder.
    """
    from ..lock import in_use
    from ..outputs import Outputs

    _check_ending(path, "--output")
    if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        stack = contextlib.ExitStack()
        stack.enter_context(in_use(folder, "msif report", key="--run"))
        stack.enter_context(Outputs(folder, "--output").writing([path]))
        return stack
    check_path(path, "--output")
    return contextlib.nullcontext()


def check_path(path: Path, flag: str) -> None:
    """Refuses a path at which no report can be written.

    Raises:
        InputError: it has another ending, or a file that is no report is there.
    """
    from ...reports.html import is_report

    _check_ending(path, flag)
    if path.exists() and not is_report(path):
        raise InputError(f"{path} exists, and msif report did not write it: it would be lost; give another {flag}.")


def _check_ending(path: Path, flag: str) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{flag} is {str(path)!r}; expected the path of an HTML file, such as report.html.")


def render(report: dict) -> None:
    shading = (
        "" if report["shares"] else "; its tokens are not shaded, since msif score left no shares of these scores"
    )
    print(f"{report['report']} written: open it in a browser{shading}")
