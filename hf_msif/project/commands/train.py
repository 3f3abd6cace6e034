"""`msif train`: trains one stage, or all of them from the first to the last."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..run import Run

HELP = "train a stage (--stage NAME) or all of them, first to last"
TAKES_CONFIGURATION = True
WRITES = True
SHARES_WORK = False
FLAGS = "[--stage NAME]"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", metavar="NAME", help="the stage to train; defaults to all stages, in order")


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Trains; writes `run_dir/<stage>` and `run_dir/<stage>.json` for every stage."""
    from ...reports.tables import training_line
    from ..train import stages_to_train, train

    reports = []
    for name in stages_to_train(project) if arguments.stage is None else [arguments.stage]:
        reports.append(train(project, name))
        print(training_line(reports[-1]))  # at once: the next stage may take hours, or fail
    return {"stages": reports}


def render(report: dict) -> None:
    """Prints nothing: `run` has printed the line of each stage as soon as it was trained."""
