"""`msif mean`: the mean ranking of several runs, with the error bars of their scatter."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "the mean ranking of several runs: other starts, checkpoints or dampings"
TAKES_CONFIGURATION = False
WRITES = True
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", required=True, nargs="+", metavar="DIR", help="run folders that hold scores of the same rows"
    )
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="where the mean is written")
    parser.add_argument(
        "--stage", metavar="NAME", help="the stage whose rankings are taken; defaults to those in scores.parquet"
    )


def run(arguments: argparse.Namespace) -> dict:
    """Writes `scores.parquet` to `--run_dir`, and reports its reliability."""
    from ...errors import InputError
    from ...scoring import Scores, mean
    from ..saved_scores import saved_scores

    path = Path(arguments.run_dir).expanduser() / "scores.parquet"
    if path.exists() and "runs" not in Scores.from_parquet(path).metadata:
        raise InputError(
            f"{path} exists, and msif mean did not write it: it would be lost; expected another --run_dir."
        )
    scores = mean([saved_scores(run, arguments.stage) for run in arguments.runs])
    scores.metadata["runs"] = arguments.runs
    path.parent.mkdir(parents=True, exist_ok=True)
    scores.to_parquet(path)
    facts = {"stage": scores.metadata["stage"], "rows": len(scores), "noise": scores.metadata["noise_text"]}
    return {"runs": arguments.runs, "scores": str(path), **facts}


def render(report: dict) -> None:
    print(report["noise"])
    print(f"{report['scores']}: {report['rows']:,} rows; msif top --run {Path(report['scores']).parent} shows them")
