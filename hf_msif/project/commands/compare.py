"""`msif compare`: absolute influences of two runs side by side."""

from __future__ import annotations

import argparse
import math

from . import check_positive

HELP = "absolute influences of two runs side by side: two tasks, two models"
TAKES_CONFIGURATION = False
WRITES = False
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", required=True, nargs=2, metavar="DIR", help="two run folders that hold scores.parquet"
    )
    parser.add_argument(
        "--stages",
        nargs=2,
        metavar="NAME",
        help="the stages whose rankings are compared, one per run; defaults to those in scores.parquet",
    )
    parser.add_argument("-k", type=int, default=100, help="rows at the top of each ranking whose overlap is counted")
    parser.add_argument("--output", metavar="FILE.png", help="draw both distributions, in the format of the ending")


def run(arguments: argparse.Namespace) -> dict:
    """The figures of `validation.comparison.Comparison`; draws both distributions to `--output`."""
    from ...engine.files import write_atomically
    from ...reports.figures import picture_format
    from ...validation.comparison import compare
    from ..saved_scores import saved_scores

    check_positive("-k", arguments.k)
    picture = picture_format(arguments.output, "--output") if arguments.output else None
    stages = arguments.stages or [None, None]
    first, second = (saved_scores(folder, stage) for folder, stage in zip(arguments.runs, stages, strict=True))
    comparison = compare(first, second, k=arguments.k)
    report = {"runs": arguments.runs, "stages": arguments.stages, **comparison.to_dict()}
    if picture is not None:
        write_atomically(arguments.output, lambda path: comparison.plot(path, _names(report), picture))
        report["figure"] = arguments.output
    return report


def render(report: dict) -> None:
    means = zip(_names(report), report["mean_absolute"], report["mean_absolute_interval"], strict=True)
    for name, mean, (low, high) in means:
        print(f"{name}: mean |influence| {mean:.4g} [{low:.4g}, {high:.4g}]")
    low, high = report["ratio_interval"]
    print(f"ratio {report['ratio']:.3f}, {report['level']:.0%} [{low:.3f}, {high:.3f}]")
    if report["shared"] >= 3:  # no ranks to correlate otherwise
        print(
            f"{report['shared']:,} rows in both: Spearman of |influence| {report['spearman_r']:.3f}, "
            f"{report['top_k_shared']:.0%} of the top {min(report['k'], report['shared'])} shared"
        )
        if not math.isnan(report["signed_r"]):
            print(
                f"Spearman of the signed influences on the same test example, mean over them: {report['signed_r']:.3f}"
            )
    if "figure" in report:
        print(f"{report['figure']} written")


def _names(report: dict) -> tuple[str, str]:
    """What the two sets of scores are called: their folders, and the stages where they were named."""
    stages = report["stages"] or [None, None]
    pairs = zip(report["runs"], stages, strict=True)
    first, second = (f"{run} ({stage})" if stage else run for run, stage in pairs)
    return first, second
