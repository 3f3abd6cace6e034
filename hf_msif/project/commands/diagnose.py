"""`msif diagnose`: what the checks find on the configuration's own models and data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..run import Run

HELP = "small checks on your own models and data: what would make a score meaningless, and what to do about it"
TAKES_CONFIGURATION = True
WRITES = False
SHARES_WORK = True
FLAGS = "[--smoothness]"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smoothness",
        action="store_true",
        help="also repeat the recorded run of the ranked stage three times with other weights of its rows: whether "
        "any prediction of it can be right",
    )


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Runs every check of every stage, those that follow a refusal too; writes nothing. Stages that are not trained
    yet are checked with untrained weights."""
    from ...influence.findings import diagnosed as diagnose
    from ...registry import CHECKS

    if arguments.smoothness:
        from ..smoothness import check_measurable, diagnosed

        check_measurable(project)
    models = {name: project.present_model(name) for name in project.names}
    chain = project.chain(models, planned=True, skip_checks=list(CHECKS))
    report: dict[str, dict] = {}
    for bound in chain.stages:
        bound.stage.skip_checks = project.config.stages[bound.name].skip_checks
        results = diagnose(bound)
        report[bound.name] = {
            "trained": project.is_trained(bound.name),
            "checks": [finding.to_dict() for finding in results],
            "text": [str(finding) for finding in results],
        }
    if arguments.smoothness:
        return {"stages": report, "metasmoothness": diagnosed(project)}
    ranked = project.config.stages[project.ranked]
    if ranked.link == "unrolled" and report[project.ranked]["trained"]:
        text = "metasmoothness of its run: not measured, --smoothness repeats the run three times"
        report[project.ranked]["text"].append(text)
    return {"stages": report}


def render(report: dict) -> None:
    for name, stage in report["stages"].items():
        print(f"{name}:" if stage["trained"] else f"{name}, not trained yet (untrained weights):")
        for line in stage["text"]:
            print(f"  {line}")
    if "metasmoothness" in report:
        print(report["metasmoothness"]["text"])
