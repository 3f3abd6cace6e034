"""`msif top`: the most influential rows of a finished run."""

from __future__ import annotations

import argparse

from . import check_positive

HELP = "the most influential rows of a finished run"
TAKES_CONFIGURATION = False
WRITES = False
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder that holds scores.parquet")
    parser.add_argument(
        "--stage", metavar="NAME", help="the stage whose ranking is shown; defaults to the one in scores.parquet"
    )
    parser.add_argument("-k", type=int, default=10, help="rows per test example")
    parser.add_argument("--by", default="absolute", help="absolute, harmful or helpful")


def run(arguments: argparse.Namespace) -> dict:
    """The first k rows of the order `--by`, for every test example."""
    from ...reports.tables import test_sentence
    from ..saved_scores import saved_scores

    check_positive("-k", arguments.k)
    scores = saved_scores(arguments.run, arguments.stage)
    tests = [
        {"test": test_sentence(scores, column), "top": scores.top(arguments.k, arguments.by, column)}
        for column in range(scores.columns)
    ]
    facts = {"stage": scores.metadata.get("stage"), "by": arguments.by, "noise": scores.metadata.get("noise_text")}
    return {"run": arguments.run, **facts, "tests": tests}


def render(report: dict) -> None:
    from ...reports.tables import plain

    if report["noise"]:
        print(report["noise"])
    for test in report["tests"]:
        print(f"\n{report['by']} influence on: {test['test']}")
        shown = ["example_id", "influence", "influence_se", "top_probability", "removal_effect", "text"]
        print(plain(test["top"][[name for name in shown if name in test["top"]]], width=80))
