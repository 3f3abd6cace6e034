"""`msif sweep`: how the ranking moves with the damping."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    from ..run import Run

HELP = "how the ranking moves with the damping"
TAKES_CONFIGURATION = True
WRITES = True
SHARES_WORK = True
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    """The command has no flags of its own."""


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Ranks the corpus with each of the configuration's `dampings` of the ranked stage; writes
    `run_dir/sweep.parquet` and `.md`."""
    from ...reports.tables import files_of_table
    from ..provenance import check_query

    if not getattr(project.solvers[project.ranked], "damped", False):
        name = project.config.stages[project.ranked].solver.name
        raise InputError(f"stages.{project.ranked}.solver.name is {name}, which has no damping; expected another.")
    with project.outputs.writing(files_of_table(project.output("sweep"))):
        check_query(project, project.folder / "query", needed=False)
        return _sweep(project)


def _sweep(project: Run) -> dict:
    from ...influence.sweep import damping_sweep, recommendation
    from ...reports.tables import write_table
    from ..provenance import check_query_content

    started = time.perf_counter()
    models, tests, corpus = project.models(), project.tests(), project.corpus()
    chain = project.chain(models)
    check_query_content(project, chain, tests)
    config = project.config
    table = damping_sweep(chain, tests, corpus, config.dampings, config.corpus.stage, measurement=project.measurement)
    with chain.engine.raising_together():
        if chain.engine.is_main:
            write_table(table, project.output("sweep"))
    advice = recommendation(table, getattr(project.solvers[project.ranked], "tol", 0.0))
    seconds = round(time.perf_counter() - started, 1)
    report = {"seconds": seconds, "sweep": str(project.output("sweep.parquet")), "table": table}
    return {**report, "stage": project.ranked, "recommended": advice.damping, "reason": advice.reason}


def render(report: dict) -> None:
    from ...reports.tables import terminal

    print(terminal(report["table"]))
    if report["recommended"] is not None:
        print(f"recommended: stages.{report['stage']}.solver.damping: {report['recommended']:g}, {report['reason']}")
    else:
        print(f"nothing to recommend: {report['reason']}")
    print(f"{report['sweep']} and its .md written in {report['seconds']} s")
