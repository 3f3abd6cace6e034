"""`msif score`: ranks the corpus for the saved query, and writes the paper's Table 1."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...influence.query import Query
    from ...scoring.scores import Scores
    from ..run import Run

HELP = "rank the corpus for the query, and write the paper's Table 1"
TAKES_CONFIGURATION = True
WRITES = True
SHARES_WORK = True
FLAGS = "[--resume] [--keep top=K]"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted scoring")
    parser.add_argument("--keep", metavar="top=K", help="write only the K most extreme rows of each order")


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Scores the corpus for the saved query, by `rank`."""
    keep = _rows_to_keep(arguments.keep)
    project.outputs.check(*_written(project))  # before models are loaded
    return rank(project, saved_query(project), arguments.resume, keep)


def saved_query(project: Run) -> Query:
    """The query that `msif query` left in the run folder.

    Raises:
        InputError: there is none, or it is none of this configuration.
    """
    from ...influence.query import Query
    from ..provenance import check_query

    folder = project.folder / "query"
    if not (folder / "query.json").is_file():
        raise InputError(f"there is no query in {project.folder} yet; run msif query with the same --config first.")
    check_query(project, folder)
    return Query.from_pretrained(folder, project.chain())


def rank(
    project: Run, query: Query, resume: bool, keep: int | None = None, show: Callable[[Scores], None] = lambda _: None
) -> dict:
    """Scores the corpus; writes scores and Table 1 as Parquet and Markdown, the shares of tokens and layers that
    `msif report` shows, and for images the paper's Figure 3.

    Finished parts lie in `run_dir/scores.parts` until all are there, and `--resume` goes on from them. With
    `--keep top=K` only the K most extreme rows of each order are written; with `corpus.dtype` or `corpus.mask_rounds`
    too, they are scored again in the model's own precision and with all masks.

    Args:
        project: the configuration at work.
        query: what is asked.
        resume: go on with an interrupted scoring.
        keep: K of `--keep top=K`; None: all rows are written.
        show: called with the scores before the shares are computed, which takes a while.
    """
    files, into = _written(project)
    with project.outputs.writing(files, into):
        return _score(project, query, resume, keep, show)


def _written(project: Run) -> tuple[list[Path], list[Path]]:
    """The files that are written, and the folders of unfinished parts."""
    from ...reports.tables import files_of_table
    from ...scoring.shortlist import first_pass_name
    from ..saved_scores import SHARES

    path = project.output("scores.parquet")
    first_pass = path.with_name(first_pass_name(path.name))
    files = [path, first_pass, project.output(SHARES), *files_of_table(project.output("table1"))]
    if _has_figure(project):
        files.append(project.output("figure3.png"))
    return files, [p.with_suffix(".parts") for p in (path, first_pass)]


def _score(project: Run, query: Query, resume: bool, keep: int | None, show: Callable[[Scores], None]) -> dict:
    from ...engine.corpus import Stream
    from ...reports.shares import Shares
    from ...reports.tables import table_one, write_table
    from ..saved_scores import SHARES

    settings, corpus = project.config.corpus, project.corpus()
    started = time.perf_counter()
    scores = query.score(
        corpus,
        stage=settings.stage,
        output_dir=project.folder,
        resume=resume,
        keep=keep,
        method=settings.method,
        mask_rounds=settings.mask_rounds,
        norms=settings.norms,
        dtype=settings.dtype,
        part_rows=settings.part_rows,
    )
    show(scores)
    shares = Shares.of_scores(scores, query, corpus)
    seconds = round(time.perf_counter() - started, 1)
    path, table_path = project.output("scores.parquet"), project.output("table1")
    report: dict[str, Any] = {"seconds": seconds, "rows": len(scores), "scores": str(path), "table1": str(table_path)}
    report |= {"shares": str(project.output(SHARES)), "noise": scores.metadata["noise_text"]}
    if "kept" in scores.metadata:
        report |= {"kept": scores.metadata["kept"], "rows_kept": len(scores)}
        report["rows"] = report["kept"]["all"][0]["count"]
    with query.chain.engine.raising_together():
        report["table"] = table_one(scores)
        if query.chain.engine.is_main:
            write_table(report["table"], table_path)
            shares.save(project.output(SHARES), scores)
            if _has_figure(project):
                assert not isinstance(corpus, Stream)  # streams are of texts
                report["figure"] = _write_figure(project, query, scores, corpus)
    return report


def render(report: dict) -> None:
    from ...reports.tables import terminal

    print(report["noise"])
    print(terminal(report["table"]))
    kept_text = f" ({report['rows_kept']:,} of them kept)" if "kept" in report else ""
    print(
        f"{report['rows']:,} rows scored{kept_text} in {report['seconds']} s; {report['scores']} and "
        f"{report['table1']}.md, .parquet written"
    )
    print(f"msif report --run {Path(report['scores']).parent} shows the rows in a browser")
    if report.get("figure"):
        print(f"{report['figure']} written: each test image beside its most harmful and most helpful ones")


def _rows_to_keep(text: str | None) -> int | None:
    """K of `--keep top=K`."""
    if text is None:
        return None
    match = re.fullmatch(r"top=([1-9]\d*)", text)
    if match is None:
        raise InputError(f"--keep is {text!r}; expected top=K, for example --keep top=1000.")
    return int(match[1])


def _has_figure(project: Run) -> bool:
    return project.content(project.ranked) == project.content(project.names[-1]) == "image"


def _write_figure(project: Run, query: Query, scores: Scores, corpus: Sequence[dict]) -> str | None:
    """Draws the paper's Figure 3 for the images that the query asks about; returns the path of the PNG."""
    from ...reports.figures import extremes, write_figure
    from ..explained import side

    rows = {row["example_id"]: row for row in side(project)}
    tests = [rows[test["example_id"]] for test in query.tests]
    return write_figure(project.output("figure3.png"), lambda path: extremes(scores, tests, corpus, path))
