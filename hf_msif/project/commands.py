"""What is done with trained stages, one function a command: query, score, sweep, validate, cleanse. Each writes its
files below `run_dir`, whole or not at all, and returns what the command line prints."""

from __future__ import annotations

import shutil
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.files import write_json, write_whole
from ..engine.hashing import digest
from ..errors import InputError
from . import build

if TYPE_CHECKING:
    import pandas as pd

    from ..influence.multistage import MultiStageInfluence
    from .run import Run


def query(run: Run) -> dict:
    """Asks about the test rows; writes `run_dir/query`. Long solves are kept in `run_dir/query.checkpoints`, and an
    interrupted one goes on from there."""
    from . import memory

    started = time.perf_counter()
    models, tests = run.models(), run.tests()
    chain, kept = run.chain(models), run.folder / "query.checkpoints"
    if run.config.memory_check:
        memory.check(chain.links, 1 if run.aggregate else len(tests))
    found = chain.query(tests, run.aggregate, checkpoints=kept)
    found.save_pretrained(run.folder / "query")
    if chain.engine.is_main:
        shutil.rmtree(kept, ignore_errors=True)
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "query": str(run.folder / "query"), **found.certificate()}


def score(run: Run, resume: bool = False, keep: int | None = None) -> dict:
    """Scores the corpus for the saved query; writes scores and Table 1 as Parquet and Markdown, and for images the
    paper's Figure 3. Parts that are finished lie in `run_dir/scores.parts` meanwhile, for `resume`; with `keep` only
    so many extreme rows of each order are written."""
    from ..influence.query import Query
    from ..reports.figures import extremes
    from ..reports.tables import table_one, write_table

    if not (run.folder / "query" / "query.json").is_file():
        raise InputError(f"there is no query in {run.folder} yet; run msif query with the same --config first.")
    asked, chosen = Query.from_pretrained(run.folder / "query", run.chain()), run.config.corpus
    corpus, engine = run.corpus(), asked.chain.engine
    started = time.perf_counter()
    scores = asked.score(
        corpus,
        stage=chosen.stage,
        output_dir=run.folder,
        resume=resume,
        keep=keep,
        dtype=chosen.dtype,
        part_rows=chosen.part_rows,
    )
    seconds = round(time.perf_counter() - started, 1)
    path, beside = run.output("scores.parquet"), run.output("table1")
    report = {"seconds": seconds, "rows": len(scores), "scores": str(path), "table1": str(beside)}
    if "kept" in scores.metadata:
        report |= {"kept": scores.metadata["kept"], "rows_kept": len(scores)}
        report["rows"] = report["kept"]["all"][0]["count"]
    with engine.together():
        report["table"] = table_one(scores)
        if engine.is_main:
            write_table(report["table"], beside)
            if run.content(run.ranked) == run.content(run.names[-1]) == "image":
                by_id = {row["example_id"]: row for row in run.test_side()}
                tests = [by_id[row["example_id"]] for row in asked.tests]
                figure = run.output("figure3.png")
                report["figure"] = _drawn(figure, lambda path: extremes(scores, tests, corpus, path))
    return report


def sweep(run: Run) -> dict:
    """How the ranking moves with the damping of the ranked stage; writes `run_dir/sweep.parquet` and `.md`."""
    from ..influence.sweep import damping_sweep
    from ..reports.tables import write_table

    if not hasattr(run.solvers[run.ranked], "damping"):
        raise InputError(
            f"stages.{run.ranked}.solver.name is identity, which has no damping; expected another solver."
        )
    started = time.perf_counter()
    models, tests, corpus = run.models(), run.tests(), run.corpus()
    table = damping_sweep(run.chain(models), tests, corpus, run.config.dampings, run.config.corpus.stage)
    write_table(table, run.output("sweep"))
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "sweep": str(run.output("sweep.parquet")), "table": table}


def validate(run: Run) -> dict:
    """Removes rows, trains all stages again and compares with the prediction; writes `run_dir/validation`, and keeps
    the retrainings in `run_dir/bank`, where the next call finds them."""
    from .. import validation

    _refuse_streams(run, "validate")
    settings, name = run.config.validation, run.ranked
    chosen = _baselines(settings.baselines)
    started = time.perf_counter()
    models, tests = run.models(), run.tests()
    chain = run.chain(models)
    whole = settings.experiment == "datamodelling_score"
    corpus = run.rows(name) if whole else run.corpus()
    retrain = retraining(run, chain, tests, settings.retrain)
    scores = chain.query(tests, run.aggregate).score(corpus, stage=name)
    groups = _along(scores, settings.groups, settings.group_size) if settings.experiment == "remove_groups" else {}
    others = validation.baselines(chain, tests, corpus, name, chosen, run.config.seed)
    bank = validation.Bank(retrain, run.folder / "bank", progress=run.progress)
    common = {"baselines": others, "aggregate": run.aggregate}
    scratch = settings.retrain == "from_scratch"
    seeds = settings.seeds or [run.config.seed if scratch else 0]
    ceiling = settings.ceiling_seeds
    common |= {"seeds": seeds, "ceiling_seeds": ([-1] if scratch else [1]) if ceiling is None else ceiling}
    if settings.experiment == "leave_one_out":
        found = validation.leave_one_out(bank, scores, examples=settings.examples, **common)
    elif settings.experiment == "remove_groups":
        found = validation.remove_groups(bank, scores, groups, **common)
    else:
        found = validation.datamodelling_score(
            bank, scores, subsets=settings.subsets, fraction=settings.fraction, seed=run.config.seed, **common
        )
    path = run.output(f"validation/{settings.experiment}")
    report = {**found.to_dict(), "seconds": round(time.perf_counter() - started, 1)}
    report |= {"retrainings": bank.computed, "accuracy": _accuracies(run, models)}
    write_json(f"{path}.json", report)
    write_whole(f"{path}.parquet", lambda part: found.removals.to_parquet(part, index=False))
    report["figure"] = _drawn(path.with_suffix(".png"), found.plot)
    return report | {"text": str(found), "validation": f"{path}.json"}


def cleanse(run: Run) -> dict:
    """Writes the ranked stage's rows without the most harmful ones, and without as many random ones, to
    `run_dir/cleanse`; trains again without either where the configuration says so (the paper's §4.2).

    The ranking is by influence on the mean loss of the rows of `test`; what is measured are other rows of the test
    side. A repetition has initial weights, a choice of test rows, a ranking and random rows of its own.
    """
    import pandas as pd

    from .run import Run

    _refuse_streams(run, "cleanse")
    settings = run.config.cleanse
    if settings.retrain == "no" and settings.seeds > 1:
        raise InputError("cleanse.seeds are repetitions of a retraining; set cleanse.retrain, or leave seeds out.")
    started, rows = time.perf_counter(), []
    for number in range(settings.seeds):
        one = run
        if number:
            folder = str(run.folder / "cleanse" / f"seed-{number}")
            update = {"seed": run.config.seed + number, "run_dir": folder}
            update["test"] = run.config.test.model_copy(update={"seed": run.config.test.seed + number})
            one = Run(run.config.model_copy(update=update), run.progress)
            one.borrow(run)
            for name in one.names:
                if not one.is_trained(name):
                    one.train(name)
        rows.append(_cleansed(one, settings, write=not number))
    report: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "repetitions": len(rows)}
    report |= {"kept": str(run.output("cleanse/kept.parquet")), "removed": rows[0]["removed"]}
    if settings.retrain != "no":
        report |= _gains(rows)
        write_json(run.output("cleanse/gains.json"), {**report, "table": rows})
        report["table"] = pd.DataFrame(rows).drop(columns=["removed", "held out"])
        report["held_out"] = rows[0]["held out"]
    return report


def retraining(run: Run, chain: MultiStageInfluence, tests: list[dict], how: str):
    """`WarmStart` or `FromScratch` of a configuration's stages, which `chain` holds."""
    from .. import validation

    stages = [link.stage for link in chain.links]
    given = {name: build.polish_settings(run.config, name) for name in run.names}
    # Which method finds a stage's minimum is no matter of the retraining, which takes the one for any stage.
    own = [
        {key: value for key, value in some.items() if key != "method"} for some in given.values() if some is not None
    ]
    own = {tuple(sorted(some.items())) for some in own}
    if len(own) > 1:
        raise InputError(
            f"the stages' polish settings differ ({given}), but a retraining polishes all stages alike: give them the "
            "same."
        )
    settings = dict(own.pop()) if own else {}
    if how == "warm_start":
        again = stages[run.names.index(run.ranked) :]  # what comes before stays as it is
        missing = next((s.name for s in again if s.link == "proximal" and given[s.name] is None), None)
        if missing is not None:
            raise InputError(
                f"stages.{missing}.polish is missing: a warm start goes from stationary point to stationary point. "
                "Give polish: {} and train again, or retrain from_scratch."
            )
        return validation.WarmStart(stages, tests, stage=run.ranked, **settings)
    arguments = [
        run.arguments(name, save_strategy="no") if stage.uses_trainer else None
        for name, stage in run.config.stages.items()
    ]
    polished = [some is not None for some in given.values()]
    return validation.FromScratch(
        stages, tests, run.fresh, arguments, polished, run.ranked, run.config.seed, **settings
    )


def _refuse_streams(run: Run, command: str) -> None:
    streamed = [name for name, stage in run.config.stages.items() if stage.data.streaming]
    if streamed:
        raise InputError(
            f"stages.{streamed[0]}.data.streaming is true, but msif {command} trains again and needs the rows at "
            "hand; expected streaming: false, with data.max_rows where they are too many."
        )


def _baselines(names: list[str] | None):
    from .. import validation

    if names is None:
        return None
    known = {baseline.__name__: baseline for baseline in validation.BASELINES}
    odd = [name for name in names if name not in known]
    if odd:
        raise InputError(f"validation.baselines names {odd[0]!r}; expected some of {', '.join(known)}.")
    return [known[name] for name in names]


def _along(scores, number: int, size: int) -> dict[str, list]:
    """`number` groups of `size` neighbours, from the most helpful rows to the most harmful ones."""
    effects = np.mean([scores.influence(q) for q in range(scores.columns)], axis=0)
    if number * size > len(effects):
        raise InputError(
            f"validation.groups × group_size is {number * size}, but there are {len(effects)} rows; expected groups "
            "that do not overlap."
        )
    order, ids = np.argsort(effects, kind="stable"), scores.frame["example_id"].tolist()
    starts = np.linspace(0, len(effects) - size, number).round().astype(int)
    return {f"{start}–{start + size - 1}": [ids[i] for i in order[start : start + size]] for start in starts}


def _cleansed(run: Run, settings, write: bool) -> dict:
    from .. import validation

    tests, chain, rows = run.tests(), run.chain(), run.rows(run.ranked)
    influence = chain.query(tests, "mean").score(rows, stage=run.ranked).influence()
    size = round(settings.fraction * len(rows))
    if not 0 < size < len(rows):
        raise InputError(
            f"cleanse.fraction {settings.fraction} of {len(rows)} rows is {size} rows; expected at least one, and one "
            "left."
        )
    generator = np.random.default_rng(run.config.seed)
    left_out = {
        "harmful": np.argsort(-influence, kind="stable")[:size],
        "random": generator.choice(len(rows), size, replace=False),
    }
    if write:
        for name, which in left_out.items():
            gone = set(which.tolist())
            kept = [row for i, row in enumerate(rows) if i not in gone]
            path = run.output(f"cleanse/{'kept' if name == 'harmful' else 'random'}.parquet")
            write_whole(path, lambda part, kept=kept: _frame(kept).to_parquet(part, index=False))
    found: dict[str, Any] = {"removed": size}
    if settings.retrain == "no":
        return found
    content = run.content(run.names[-1])
    seen = {digest(row[content]) for row in tests}
    held_out = [row for row in run.test_side() if digest(row[content]) not in seen][: settings.held_out]
    if not held_out or not run.config.stages[run.names[-1]].data.has_test_side:
        raise InputError(
            f"stage {run.names[-1]!r} has no test rows beside those of `test`: give data.test_split or a larger "
            "test_fraction, or a smaller test.number."
        )
    retrain = retraining(run, chain, held_out, settings.retrain)
    bank = validation.Bank(retrain, run.folder / "bank", progress=run.progress)
    sets = {"all": [], **{name: [rows[i]["example_id"] for i in which] for name, which in left_out.items()}}
    entries = bank.entries(list(sets.values()), run.config.seed if settings.retrain == "from_scratch" else 0)
    for name, entry in zip(sets, entries, strict=True):
        found[f"loss, {name}"] = float(np.mean(entry["losses"]))
        if "accuracy" in entry["notes"]:
            found[f"accuracy, {name}"] = entry["notes"]["accuracy"]
    return {"seed": run.config.seed, **found, "held out": len(held_out)}


def _gains(rows: list[dict]) -> dict:
    """Mean gains of leaving out the harmful rows over the random ones, with 95 % t intervals over repetitions."""
    from scipy.stats import t

    found = {}
    for what, sign in (("loss", -1), ("accuracy", 1)):
        if f"{what}, all" not in rows[0]:
            continue
        for base in ("random", "all"):
            gains = np.array([sign * (row[f"{what}, harmful"] - row[f"{what}, {base}"]) for row in rows])
            half = np.nan
            if len(gains) > 1:
                half = t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
            interval = [float(gains.mean() - half), float(gains.mean() + half)]
            found[f"{what}_gain_over_{base}"] = {"mean": float(gains.mean()), "interval": interval}
    return found


def _accuracies(run: Run, models: dict[str, Any]) -> dict[str, float]:
    """Of classifiers, on their own rows and on the last stage's test side."""
    from .. import training

    found = {}
    for name in run.names:
        objective, stage = run.objective(name, models[name]), run.config.stages[name]
        if objective.predictions is not None:
            sides = {name: run.rows(name)}
            if stage.data.has_test_side:
                sides[f"{name}, test"] = run.rows(name, "test")
            for side, rows in sides.items():
                found[side] = training.evaluate(models[name], objective, rows, stage.batch_size)["accuracy"]
    return found


def _drawn(path, draw) -> str | None:
    """Draws a picture where matplotlib is installed; a command does not fail for want of one."""
    try:
        write_whole(path, draw)
    except InputError as error:
        warnings.warn(str(error), stacklevel=2)
        return None
    return str(path)


def _frame(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table; images become PNG bytes, as `datasets` stores them."""
    import pandas as pd

    from ..reports.figures import encoded

    return pd.DataFrame([{k: encoded(v) if k == "image" else v for k, v in row.items()} for row in rows])
