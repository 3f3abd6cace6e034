"""`msif query`: pulls the test losses back through the stages."""

from __future__ import annotations

import argparse
import shutil
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..run import Run

HELP = "pull the test tweets' losses back through the stages: one inverse-curvature product per stage"
TAKES_CONFIGURATION = True
SHARES_WORK = True
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    """The command has no flags of its own."""


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Asks about the test rows; writes `run_dir/query`. Long solves write checkpoints to
    `run_dir/query.checkpoints`, from which the next call goes on when this one is interrupted."""
    from .. import memory

    started = time.perf_counter()
    models, tests = project.models(), project.tests()
    chain = project.chain(models)
    folder, checkpoints = project.folder / "query", project.folder / "query.checkpoints"
    if project.config.memory_check:
        memory.check(chain, 1 if project.aggregate else len(tests))
    query = chain.query(tests, project.aggregate, checkpoints=checkpoints)
    query.save_pretrained(folder)
    if chain.engine.is_main:
        shutil.rmtree(checkpoints, ignore_errors=True)
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "query": str(folder), **query.certificate()}


def render(report: dict) -> None:
    for name, stage in report["stages"].items():
        print(f"{name}: {stage['text']}")
    print(f"query written to {report['query']} in {report['seconds']} s")
