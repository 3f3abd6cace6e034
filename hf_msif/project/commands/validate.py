"""`msif validate`: removes rows, trains all stages again, and compares the effect with the predicted one."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from ...scoring.scores import Scores
    from ...validation import Bank
    from ...validation.experiments import Validation
    from ...validation.rankings import TopRemoval
    from ...validation.truth import Truth
    from ..run import Run

HELP = "remove rows, train all stages again, and compare with the prediction"
TAKES_CONFIGURATION = True
WRITES = True
SHARES_WORK = False
FLAGS = ""
ENDINGS = (".json", ".parquet", ".png")  # of the files of an experiment


def register(parser: argparse.ArgumentParser) -> None:
    """The command has no flags of its own."""


def run(arguments: argparse.Namespace, project: Run) -> dict:
    """Runs the configuration's experiment; writes `run_dir/validation`. Retrainings are kept in `run_dir/bank`, where
    the next call finds them."""
    from ..provenance import check_query
    from ..retraining import checkpoint_folders, refuse_streams

    refuse_streams(project, "validate")
    settings = project.config.validation
    kind = settings.experiment if settings.truth == "own" else f"{settings.experiment}-{settings.truth}"
    path = project.output(f"validation/{kind}")
    files = [path.with_name(f"{path.name}{end}") for end in ENDINGS]
    into = [path.parent, project.folder / "bank"]
    with project.outputs.writing(files, into):
        check_query(project, project.folder / "query", needed=False)
        with checkpoint_folders(project, settings.way):
            return _validate(project, path, files)


def _validate(project: Run, path: Path, files: list[Path]) -> dict:
    from ... import validation
    from ...engine.files import write_atomically, write_json
    from ...engine.folders import add_names
    from ...reports.figures import write_figure
    from ..provenance import check_query_content
    from ..retraining import retraining

    settings, stage = project.config.validation, project.ranked
    methods = _baselines(settings.baselines)
    started = time.perf_counter()
    models, tests = project.models(), project.tests()
    chain = project.chain(models)
    check_query_content(project, chain, tests)
    # Random subsets and draws are taken from all rows that the stage was trained on.
    whole = settings.experiment in ("datamodelling_score", "remove_top")
    corpus = project.rows(stage) if whole else project.corpus()
    retrain, truth = retraining(project, chain, tests, settings.way, settings.vary), _truth(project)
    truth.check(retrain)
    query = chain.query(tests, project.aggregate, replicates=project.config.test.replicates)
    scores = query.score(corpus, stage=stage)
    groups = {}
    if settings.experiment == "remove_groups":
        groups = _groups_along_ranking(scores, settings.groups, settings.group_size)
    baselines = validation.baselines(chain, tests, corpus, stage, methods, project.config.seed)
    bank = validation.Bank(retrain, project.folder / "bank", progress=project.progress)
    smoothness = _smoothness(project, bank, scores) if settings.truth == "own" else None
    result = _experiment(project, bank, scores, groups, baselines=baselines, truth=truth)
    add_names(path.parent, "validation", [file.name for file in files])
    report = {**result.to_dict(), "seconds": round(time.perf_counter() - started, 1)}
    report |= {"metasmoothness": smoothness, "retrainings": bank.computed, "accuracy": _accuracies(project, models)}
    write_json(f"{path}.json", report)
    write_atomically(f"{path}.parquet", lambda part: result.removals.to_parquet(part, index=False))
    report["figure"] = write_figure(path.with_suffix(".png"), result.plot)
    return report | {"text": str(result), "validation": f"{path}.json"}


def render(report: dict) -> None:
    accuracy = ", ".join(f"{name} {value:.3f}" for name, value in report["accuracy"].items())
    print(f"accuracy: {accuracy}" if accuracy else "no classifier among the stages", report["text"], sep="\n\n")
    print(f"{report['validation']} written in {report['seconds']} s, {report['retrainings']} retrainings")


def _baselines(names: list[str] | None) -> list | None:
    """The baselines that the configuration names; None for those that fit the chain."""
    from ... import validation

    if names is None:
        return None
    known = {baseline.__name__: baseline for baseline in validation.BASELINES}
    unknown_names = [name for name in names if name not in known]
    if unknown_names:
        raise InputError(f"validation.baselines names {unknown_names[0]!r}; expected some of {', '.join(known)}.")
    return [known[name] for name in names]


def _groups_along_ranking(scores: Scores, number: int, size: int) -> dict[str, list]:
    """`number` groups of `size` neighbours, from the most helpful rows to the most harmful ones; the keys are places
    in the ranking, the values example ids."""
    import numpy as np

    effects = np.mean([scores.influence(column) for column in range(scores.columns)], axis=0)
    if number * size > len(effects):
        raise InputError(
            f"validation.groups × group_size is {number * size}, but there are {len(effects)} rows; expected groups "
            "that do not overlap."
        )
    order, ids = np.argsort(effects, kind="stable"), scores.frame["example_id"].tolist()
    starts = np.linspace(0, len(effects) - size, number).round().astype(int)
    return {f"{start}–{start + size - 1}": [ids[i] for i in order[start : start + size]] for start in starts}


def _experiment(
    project: Run, bank: Bank, scores: Scores, groups: dict[str, list], **shared: Any
) -> Validation | TopRemoval:
    """The experiment that the configuration names."""
    from ... import validation

    settings = project.config.validation
    shared["aggregate"] = project.aggregate
    if settings.experiment == "leave_one_out":
        return validation.leave_one_out(bank, scores, examples=settings.examples, **shared)
    if settings.experiment == "remove_groups":
        return validation.remove_groups(bank, scores, groups, **shared)
    shared["seed"] = project.config.seed
    if settings.experiment == "remove_top":
        return validation.remove_top(bank, scores, fraction=settings.top_fraction, draws=settings.draws, **shared)
    return validation.datamodelling_score(bank, scores, subsets=settings.subsets, fraction=settings.fraction, **shared)


def _smoothness(project: Run, bank: Bank, scores: Scores) -> dict | None:
    """Whether the run of the ranked stage can be predicted at all, printed before time is spent on retrainings; None
    where no run is repeated."""
    from ... import validation
    from ...engine.hashing import digest
    from ..smoothness import of_own_rows, smoothness

    retrain = bank.retrain
    if not isinstance(retrain, validation.WarmStart) or not retrain.repeats_run:
        return None
    predicted = of_own_rows(project, scores)
    effects = None if predicted is None else digest([{"effects": predicted.removal_effects()}])
    name = f"metasmoothness, predicted by {effects}"
    metasmoothness = bank.once(name, lambda: smoothness(project, retrain, predicted))
    print(metasmoothness["text"], flush=True)
    return metasmoothness


def _truth(project: Run) -> Truth:
    """What the configuration compares predictions with."""
    from ... import validation

    settings, seed = project.config.validation, project.config.seed
    if settings.truth == "expected":
        others = range(validation.OTHER_STARTS, validation.OTHER_STARTS + settings.starts + 1)
        return validation.ExpectedTruth([start for start in others if start != seed][: settings.starts])
    # From scratch, a seed draws the initial weights, and -1 is the configuration's own start plus a little noise. A
    # warm start begins at the finished models under seed 0, and at these plus a little noise under any other.
    from_scratch = settings.way == "from_scratch"
    ceiling_seeds = settings.ceiling_seeds
    if ceiling_seeds is None:
        ceiling_seeds = [-1] if from_scratch else [1]
    return validation.OwnTruth(settings.seeds or [seed if from_scratch else 0], ceiling_seeds)


def _accuracies(project: Run, models: dict[str, Any]) -> dict[str, float]:
    """Accuracy of every stage that classifies, on its own rows and on its test side where it has one."""
    from ... import training

    accuracies = {}
    for name in project.names:
        objective, stage = project.objective(name, models[name]), project.config.stages[name]
        if objective.predictions is not None:
            sides = {name: project.rows(name)}
            if stage.data.has_test_side:
                sides[f"{name}, test"] = project.rows(name, "test")
            for side, rows in sides.items():
                report = training.evaluate(models[name], objective, rows, stage.batch_size)
                accuracies[side] = report["accuracy"]
    return accuracies
