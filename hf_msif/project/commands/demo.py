"""`msif demo`: the main job on embedded data."""

from __future__ import annotations

import argparse

from . import check_range

HELP = "embedded data, no network: trains, explains three tweets, retrains to check"
TAKES_CONFIGURATION = False
WRITES = True
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="runs/demo", help="folder for models, scores and tables")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and masks")


def run(arguments: argparse.Namespace) -> dict:
    """The figures of the demo, which prints its tables while it works."""
    from ..demo.run import demo

    check_range("--seed", arguments.seed, 0, 2**32 - 1)  # NumPy takes no others
    return demo(arguments.output_dir, arguments.seed, quiet=arguments.json)


def render(report: dict) -> None:
    """Prints nothing: the demo takes minutes and has printed each table as soon as it was known."""
