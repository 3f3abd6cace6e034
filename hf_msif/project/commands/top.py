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
    parser.add_argument("--by", default="absolute", help="absolute, harmful, helpful, relative or self_relative")


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
    facts["measurement"] = scores.metadata.get("measurement", "loss")
    report = {"run": arguments.run, **facts, "tests": tests}
    if scores.columns > 1:
        report["common"] = scores.common(arguments.k, arguments.by)
    return report


def render(report: dict) -> None:
    from ...reports.tables import plain

    if report["noise"]:
        print(report["noise"])
    of = "" if report["measurement"] == "loss" else f" the {report['measurement']} of"
    common, lists = report.get("common"), len(report["tests"])
    shown = ["example_id", "influence", "influence_se", "top_probability", f"{report['by']}_influence"]
    shown += ["removal_effect", "text"]
    for test in report["tests"]:
        table = test["top"][[name for name in shown if name in test["top"]]]
        if common is not None and len(common):
            counts = dict(zip(common["example_id"], common["columns"], strict=True))
            marks = [f"{counts[name]} of {lists}" if name in counts else "" for name in table["example_id"]]
            table = table.assign(common=marks)
        print(f"\n{report['by']} influence on{of}: {test['test']}")
        print(plain(table, width=80))
    if common is not None and len(common):
        print(
            f"\n{len(common)} rows are common: they are in the lists of nearly all tests, as the column says, and "
            "tell little about any one of them."
        )
