"""`msif cleanse`: the ranked stage's rows without the most harmful ones, and what training without them gains (the
paper's §4.2)."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd

    from ...influence.multistage import MultiStageInfluence
    from ..run import Run

HELP = "write the corpus without its most harmful rows; train again without them if asked to"
TAKES_CONFIGURATION = True
WRITES = True
SHARES_WORK = False
FLAGS = ""


def register(parser: argparse.ArgumentParser) -> None:
    """The command has no flags of its own."""


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Writes the ranked stage's rows without the most harmful ones, and without as many random ones, to
    `run_dir/cleanse`; trains again without either if `cleanse.retrain` says so.

    The ranking is by influence on the mean loss of the rows of `test`; what is measured are other rows of the test
    side. Each repetition has its own initial weights, test rows, ranking and random rows.
    """
    from ..retraining import checkpoint_folders, refuse_measurements, refuse_streams

    refuse_streams(project, "cleanse")
    refuse_measurements(project, "cleanse")
    settings = project.config.cleanse
    if settings.retrain == "no" and settings.seeds > 1:
        raise InputError("cleanse.seeds are repetitions of a retraining; set cleanse.retrain, or leave seeds out.")
    into = [project.folder / "cleanse", project.folder / "bank"]
    with project.outputs.writing(_files(project), into), checkpoint_folders(project, settings.retrain):
        return _run(project)


def _files(project: Run) -> list[Path]:
    return [project.output(f"cleanse/{name}") for name in ("kept.parquet", "random.parquet", "gains.json")]


def _run(project: Run) -> dict:
    import pandas as pd

    from ...engine.files import write_json

    settings = project.config.cleanse
    started = time.perf_counter()
    repetitions = [
        _cleanse(_repetition(project, number) if number else project, write=not number)
        for number in range(settings.seeds)
    ]
    report: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "repetitions": len(repetitions)}
    report |= {"kept": str(project.output("cleanse/kept.parquet")), "removed": repetitions[0]["removed"]}
    if settings.retrain != "no":
        report |= _gains(repetitions)
        write_json(project.output("cleanse/gains.json"), {**report, "table": repetitions})
        report["table"] = pd.DataFrame(repetitions).drop(columns=["removed", "held out"])
        report["held_out"] = repetitions[0]["held out"]
    return report


def render(report: dict) -> None:
    from ...reports.tables import terminal

    print(f"{report['removed']:,} rows left out; {report['kept']} and random rows beside it written")
    if "table" in report:
        print(terminal(report["table"]))
    for name, gain in report.items():
        if "_gain_over_" in name:
            low, high = gain["interval"]
            interval = f", 95 % [{low:+.5f}, {high:+.5f}]" if report["repetitions"] > 1 else ""
            print(
                f"{name.replace('_', ' ')}: {gain['mean']:+.5f}{interval} over {report['repetitions']} repetition(s)"
            )


def _repetition(project: Run, number: int) -> Run:
    """The configuration with its seeds raised by `number`, trained in a folder of its own."""
    from ..provenance import is_outdated
    from ..run import Run
    from ..train import train

    config = project.config
    update: dict[str, Any] = {
        "seed": config.seed + number,
        "run_dir": str(project.folder / "cleanse" / f"seed-{number}"),
        "test": config.test.model_copy(update={"seed": config.test.seed + number}),
    }
    repetition = Run(config.model_copy(update=update), project.progress)
    repetition.borrow_rows(project)
    for name in repetition.names:
        is_here = repetition.is_trained(name)
        if not is_here or (not repetition.is_taken_as_it_is(name) and is_outdated(repetition, name)):
            train(repetition, name)
    return repetition


def _cleanse(project: Run, write: bool) -> dict:
    """One repetition: ranks the rows, writes those that are kept if told to, and retrains if the configuration says
    so. Returns one row of the report's table."""
    from ...engine.corpus import Stream
    from ...engine.folders import add_names

    settings = project.config.cleanse
    tests, chain, rows = project.tests(), project.chain(), project.rows(project.ranked)
    assert not isinstance(rows, Stream)  # `run` refuses them
    influence = chain.query(tests, "mean").score(rows, stage=project.ranked).influence()
    removed = _removed(influence, settings.fraction, project.config.seed)
    if write:
        names = [path.name for path in _files(project)]
        add_names(project.folder / "cleanse", "cleansed rows", [*names, "seed-[0-9]*"])
        for name, file in (("harmful", "kept"), ("random", "random")):
            _write_kept(project.output(f"cleanse/{file}.parquet"), rows, removed[name])
    report: dict[str, Any] = {"removed": len(removed["harmful"])}
    if settings.retrain == "no":
        return report
    held_out = _held_out(project, tests)
    ids = {name: [rows[i]["example_id"] for i in indices] for name, indices in removed.items()}
    report |= _measured(project, chain, held_out, {"all": [], **ids})
    return {"seed": project.config.seed, **report, "held out": len(held_out)}


def _removed(influence: np.ndarray, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the most harmful rows, and of as many random ones."""
    import numpy as np

    size = round(fraction * len(influence))
    if not 0 < size < len(influence):
        raise InputError(
            f"cleanse.fraction {fraction} of {len(influence)} rows is {size} rows; expected at least one, and one "
            "left."
        )
    generator = np.random.default_rng(seed)
    return {
        "harmful": np.argsort(-influence, kind="stable")[:size],
        "random": generator.choice(len(influence), size, replace=False),
    }


def _write_kept(path, rows: list[dict], removed: np.ndarray) -> None:
    """Writes the rows that are not removed."""
    from ...engine.files import write_atomically

    indices = set(removed.tolist())
    table = _table([row for i, row in enumerate(rows) if i not in indices])
    write_atomically(path, lambda part: table.to_parquet(part, index=False))


def _table(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table; images become PNG bytes, as `datasets` stores them."""
    import pandas as pd

    from ...reports.figures import encoded

    return pd.DataFrame(
        [{key: encoded(value) if key == "image" else value for key, value in row.items()} for row in rows]
    )


def _held_out(project: Run, tests: list[dict]) -> list[dict]:
    """Rows of the test side whose content is in none of `tests`: the ranking must not be measured on its own rows."""
    from ...engine.hashing import digest
    from ..data import content_key

    last = project.names[-1]
    data = project.config.stages[last].data
    content = content_key(data, project.content(last))
    ranked_by = {digest(row[content]) for row in tests}
    aside = project.rows(last, "test") if data.has_test_side and not data.trains_on_test_side else []
    held_out = [row for row in aside if digest(row[content]) not in ranked_by][: project.config.cleanse.held_out]
    if not held_out:
        raise InputError(
            f"stage {last!r} has no test rows beside those of `test`: give data.test_split or a larger test_fraction, "
            "or a smaller test.number."
        )
    return held_out


def _measured(
    project: Run, chain: MultiStageInfluence, held_out: list[dict], omissions: dict[str, list]
) -> dict[str, float]:
    """Mean loss, and accuracy of a classifier, on the held-out rows after training without each set of rows."""
    import numpy as np

    from ... import validation
    from ..retraining import retraining

    how = project.config.cleanse.retrain
    retrain = retraining(project, chain, held_out, how)
    bank = validation.Bank(retrain, project.folder / "bank", progress=project.progress)
    entries = bank.entries(list(omissions.values()), project.config.seed if how == "from_scratch" else 0)
    measured = {}
    for name, entry in zip(omissions, entries, strict=True):
        measured[f"loss, {name}"] = float(np.mean(entry["losses"]))
        if "accuracy" in entry["notes"]:
            measured[f"accuracy, {name}"] = entry["notes"]["accuracy"]
    return measured


def _gains(repetitions: list[dict]) -> dict:
    """Mean gains of leaving out the harmful rows over leaving out random ones or none, with 95 % t intervals over
    repetitions; a positive gain is an improvement."""
    import numpy as np
    from scipy.stats import t

    report = {}
    for measure, sign in (("loss", -1), ("accuracy", 1)):
        if f"{measure}, all" not in repetitions[0]:
            continue
        for base in ("random", "all"):
            gains = np.array([sign * (row[f"{measure}, harmful"] - row[f"{measure}, {base}"]) for row in repetitions])
            half_width = np.nan
            if len(gains) > 1:
                half_width = t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
            interval = [float(gains.mean() - half_width), float(gains.mean() + half_width)]
            report[f"{measure}_gain_over_{base}"] = {"mean": float(gains.mean()), "interval": interval}
    return report
