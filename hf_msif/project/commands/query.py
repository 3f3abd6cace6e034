"""`msif query`: pulls the test losses, or what else is measured, back through the stages."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ...influence.query import Query
    from ..run import Run

HELP = "pull the test losses back through the stages: one inverse-curvature product per stage"
TAKES_CONFIGURATION = True
WRITES = True
SHARES_WORK = True
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    """The command has no flags of its own."""


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Asks about the test rows, and compares the query's replicates."""
    started = time.perf_counter()
    query = ask(project)
    seconds = round(time.perf_counter() - started, 1)
    noise = {name: query.noise_text(name) for name in project.names}
    return {"seconds": seconds, "query": str(project.folder / "query"), "noise": noise, **query.certificate()}


def ask(project: Run, compare: bool = True) -> Query:
    """Asks about the test rows; writes `run_dir/query`. Long solves write checkpoints to
    `run_dir/query.checkpoints`, from which the next call goes on when this one is interrupted.

    Args:
        project: the configuration at work.
        compare: as of `MultiStageInfluence.query`.
    """
    from ...influence.query import FILES

    folder, checkpoints = project.folder / "query", project.folder / "query.checkpoints"
    with project.outputs.writing([folder / name for name in FILES], into=[folder, checkpoints]):
        return _query(project, folder, checkpoints, compare)


def _query(project: Run, folder: Path, checkpoints: Path, compare: bool) -> Query:
    from ...engine import folders
    from ...influence.multistage import checkpoint_name
    from ...influence.query import FILES
    from .. import memory
    from ..provenance import query_record

    models, tests = project.models(), project.tests()
    chain = project.chain(models)
    if project.config.memory_check:
        memory.check(chain, 1 if project.aggregate else len(tests))
    is_main = chain.engine.is_main
    with chain.engine.raising_together():
        if is_main:
            replicates = range(project.config.test.replicates)
            names = [f"{checkpoint_name(name, r)}.safetensors" for name in project.names for r in replicates]
            names.append("ekfac-*.safetensors")
            folders.add_names(checkpoints, "checkpoints of a query", names)
    try:
        asked = (tests, project.aggregate, checkpoints, project.config.test.replicates, project.measurement)
        query = chain.query(*asked, compare=compare)
        query.save_pretrained(folder)  # its marker says nothing of settings: a crash leaves a query that is refused
        with chain.engine.raising_together():
            if is_main:
                folders.write_marker(folder, "query", FILES, query_record(project).facts())
                folders.remove(checkpoints)
    except BaseException:
        if is_main:
            for written in (checkpoints, folder):
                folders.remove_if_empty(written)
        raise
    return query


def render(report: dict) -> None:
    for name, stage in report["stages"].items():
        measured = stage.get("noise") is not None  # then it is the first line of the text
        print(f"{name}: {stage['text']}" + ("" if measured else f"\n{report['noise'][name]}"))
    if report["measurement"] != "loss":
        print(f"explained: the {report['measurement']} of each test row, which positive influences raise")
    print(f"query written to {report['query']} in {report['seconds']} s")
