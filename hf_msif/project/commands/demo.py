"""`msif demo`: the main job on embedded data."""

from __future__ import annotations

import argparse

from .. import launch
from . import check_range

HELP = "embedded data, no network: trains, explains three tweets, retrains to check"
TAKES_CONFIGURATION = False
WRITES = True
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run_dir", default="runs/demo", metavar="DIR", help="folder for models, scores and tables")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and masks")


def run(arguments: argparse.Namespace) -> dict:
    """The figures of the demo, which prints its tables while it works."""
    check_range("--seed", arguments.seed, 0, 2**32 - 1)  # NumPy takes no others
    from ..demo.run import demo

    launch.quieten_transformers()
    return demo(arguments.run_dir, arguments.seed, quiet=arguments.json)


def render(report: dict) -> None:
    """Prints nothing: the demo takes minutes and has printed each table as soon as it was known."""
