"""`msif plan`: what a run will cost, measured before anything is spent."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import check_positive

if TYPE_CHECKING:
    from ..run import Run

HELP = "what a run will cost: parameters in each role, memory, passes, time; nothing is written"
TAKES_CONFIGURATION = True
WRITES = False
SHARES_WORK = False
FLAGS = "[--processes N] [--budget TIME]"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", metavar="TIME", help="also tell what a time such as 10m or 1h30m buys")
    parser.add_argument("--processes", type=int, default=1, help="how many processes the planned launch has")


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Costs of every stage, and the text that tells them."""
    from ..budget import parse_budget
    from ..plan import plan

    check_positive("--processes", arguments.processes)
    budget = None if arguments.budget is None else parse_budget(arguments.budget)
    return plan(project, arguments.processes, budget)


def render(report: dict) -> None:
    print(report["text"])
