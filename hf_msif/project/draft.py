"""A configuration made from two checkpoints, a corpus and a text: what is found in them, and what is chosen."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from ..errors import InputError
from . import config as configuration
from .budget import Solve, within
from .values import LONGEST_PATH, shown_text

if TYPE_CHECKING:
    from ..influence.cost import Cost
    from .run import Run

PRETRAINING, FINETUNING = "pretraining", "finetuning"
EKFAC_PASSES = 12  # forward passes over the rows that a fit of EK-FAC takes, with what it takes however few they are
TYPICAL = 1.25  # times a batch's best time is what it takes in a whole pass (measured: 1.15 on one thread, 1.4 on two)
CHOICES = "explain.json"
FEWEST_RANKED = 100  # rows of the corpus, whatever the budget
HEADER = "# Written by msif explain. The same answer again: msif query --config {0}, then msif score --config {0}\n"


@dataclass
class Draft:
    """A configuration under way.

    Attributes:
        values: what its YAML file will hold.
        fixed: dotted keys that the user set.
        lines: what was found and chosen, for people.
    """

    values: dict[str, Any]
    fixed: set[str]
    lines: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> bool:
        """Sets a dotted key, unless the user did; returns whether it is set so."""
        if key in self.fixed:
            return False
        configuration.put(self.values, key, value)
        return True


@dataclass
class Clock:
    """A budget of time for everything since `started`, both in seconds (`time.perf_counter`)."""

    budget: float
    started: float

    @property
    def spent(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds from now; negative where more is spent than the budget."""
        return self.budget - self.spent


def save(values: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a configuration as YAML, whole or not at all."""
    import yaml

    from ..engine.files import write_atomically

    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    write_atomically(path, lambda part: part.write_text(HEADER.format(path) + text, encoding="utf-8"))


# --- what is found


def found(given: argparse.Namespace) -> Draft:
    """The configuration as far as checkpoints' configurations and tables tell it, with the user's settings over it."""
    from . import detection

    if (given.text is None) == (given.file is None):
        raise InputError("expected the texts to be explained, by --text or by --file, and not by both.")
    models = {
        PRETRAINING: detection.checkpoint(given.pretrained, "--pretrained"),
        FINETUNING: detection.checkpoint(given.finetuned, "--finetuned"),
    }
    stages: dict[str, Any] = {
        PRETRAINING: {"data": {"path": given.corpus}, "model": {"path": models[PRETRAINING].source}},
        FINETUNING: {"data": {"path": given.finetuning_data}, "model": {"path": models[FINETUNING].source}},
    }
    texts = [given.text] if isinstance(given.text, str) else given.text
    test = {"text": None if texts is None else list(texts), "file": given.file, "label": given.label}
    values = {
        "run_dir": given.run_dir or "runs/explain",
        "tokenizer": given.tokenizer or _tokenizer(models),
        "stages": stages,
        "test": {name: value for name, value in test.items() if value is not None},
    }
    configuration.override(values, given.overrides)
    draft = Draft(values, {key for key, _ in given.overrides})
    for stage, flag, labelled in ((PRETRAINING, "--pretrained", False), (FINETUNING, "--finetuned", True)):
        if f"stages.{stage}.task" not in draft.fixed:
            stages[stage] = {"task": detection.task(models[stage], flag, labelled), **stages[stage]}
    _set_columns(draft, given, models)
    if given.pretraining_run is not None:
        _set_run(draft, given.pretraining_run)
    if given.run_dir is None:
        draft.set("run_dir", f"runs/explain/{question(draft, given.budget)[:12]}")
    return draft


def question(draft: Draft, budget: str) -> str:
    """SHA-256 of what was found, and of the budget: with the same it goes on with the same choices."""
    from ..engine.hashing import digest

    return digest([draft.values, budget])


def _tokenizer(models: dict[str, Any]) -> str:
    """The first checkpoint, finetuned before pretrained, that has a tokenizer's files."""
    for model in (models[FINETUNING], models[PRETRAINING]):
        folder = Path(model.source).expanduser()
        if not folder.is_dir() or any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")):
            return model.source
    raise InputError(
        f"neither {models[FINETUNING].source} nor {models[PRETRAINING].source} holds a tokenizer; expected "
        "--tokenizer with a Hub id or folder."
    )


def _set_columns(draft: Draft, given: argparse.Namespace, models: dict[str, Any]) -> None:
    """Columns of both tables, and the classes of the labels."""
    from pydantic import ValidationError

    from . import detection
    from .schema import Data
    from .sources import load_table
    from .tasks import task_of

    columns = {PRETRAINING: given.corpus_column, FINETUNING: given.text_column}
    for stage, flag in ((PRETRAINING, "--corpus"), (FINETUNING, "--finetuning-data")):
        settings = draft.values["stages"][stage]
        try:
            data = Data.model_validate(settings["data"])
        except ValidationError:
            configuration.from_values(draft.values)  # tells it by the keys
            raise
        try:
            table = load_table(data, data.split, flag)
        except InputError as error:
            raise InputError(str(error).replace(f"{flag}.path", flag)) from error
        column = detection.text_column(table, columns[stage], flag)
        if column != "text":
            draft.set(f"stages.{stage}.data.text_column", column)
        if task_of(settings["task"], f"stages.{stage}.task").label_kind is None:
            continue
        column = detection.label_column(table, given.label_column, flag)
        draft.set(f"stages.{stage}.data.label_column", column)
        present = table.unique(column) if column in table.column_names else []
        if settings["task"] != "sequence-classification" or f"stages.{stage}.objective.labels" in draft.fixed:
            continue
        classes = detection.classes(present, models[stage].config, given.labels, flag)
        if classes is not None:
            draft.set(f"stages.{stage}.objective.labels", classes)
            others = sorted({str(value) for value in present if value is not None} - set(map(str, classes)))
            if others and draft.set(f"stages.{stage}.data.keep", {column: classes}):
                draft.lines.append(
                    f"{stage}: rows labelled {', '.join(others[:5])} are left out, which the model has no class for"
                )


def _set_run(draft: Draft, folder: str) -> None:
    """A stage's training run: a Trainer's checkpoints, or a recorded run."""
    path = Path(folder).expanduser()
    if any(path.glob("checkpoint-*/trainer_state.json")):
        draft.set(f"stages.{PRETRAINING}.link", "segments")
        draft.set(f"stages.{PRETRAINING}.checkpoints", str(path / "checkpoint-*"))
    elif path.is_dir():
        draft.set(f"stages.{PRETRAINING}.link", "unrolled")
        draft.set(f"stages.{PRETRAINING}.run", str(path))
    else:
        raise InputError(
            f"--pretraining-run is {shown_text(folder, LONGEST_PATH)}, which is no folder; expected that of a "
            "recorded run, or a Trainer's output folder."
        )


def see_trained(draft: Draft, run: Run) -> None:
    """Sees from the weights what finetuning trained."""
    from . import detection

    key, models = f"stages.{FINETUNING}.trainable", run.models()
    if key in draft.fixed:
        return
    trainable = detection.changed(models[FINETUNING], models[PRETRAINING])
    draft.set(key, trainable)
    seen = {"head": "every weight of the encoder is equal in both checkpoints: finetuning trained the head alone"}
    seen["all"] = "the encoder's weights differ: finetuning trained all of them, tied to the pretrained ones by α"
    why = seen.get(str(trainable)) or "finetuning trained " + ", ".join(list(trainable)[:3])
    if trainable not in ("head", detection.ADAPTERS):
        draft.set(f"stages.{FINETUNING}.alpha", "auto")
    for stage in run.names:
        what = type(models[stage]).__name__
        draft.lines.append(f"{stage}: {run.config.stages[stage].task} ({what}), {len(list(run.rows(stage))):,} rows")
    draft.lines[-1] += f"; {why}"


def tie(draft: Draft, run: Run) -> None:
    """Gives α a number where its estimate means nothing: the one with which the tie pulls as hard as the data do.

    At the end of a short finetuning the gradient does not point back to where it began, and no α explains that end.
    α = ‖∇F‖ / (2 ‖W − W_before‖) has at least the size that the gradient asks for.
    """
    from ..influence.implicit import UNEXPLAINED, Implicit
    from ..registry import CHECKS

    if run.config.stages[FINETUNING].alpha != "auto":
        return
    differentiation = run.chain(skip_checks=list(CHECKS)).stage(FINETUNING).differentiation
    if not isinstance(differentiation, Implicit):
        return
    estimate = differentiation.estimate
    if estimate.alpha > 0 and estimate.remaining <= UNEXPLAINED:
        return
    alpha = float(f"{estimate.gradient_norm / (2 * estimate.distance):.3g}")
    if draft.set(f"stages.{FINETUNING}.alpha", alpha):
        draft.lines[-1] += (
            f"; no α explains where it ended, so that α = {alpha:g} is taken, whose tie pulls as hard as the data: "
            "take the ranking with care, or give its recorded run (--set stages.finetuning.link=unrolled "
            "--set stages.finetuning.run=DIR)"
        )


def changed(run: Run, draft: Draft) -> Run:
    """The run of the draft as it is now, with the rows and models that are loaded."""
    new = type(run)(configuration.from_values(draft.values), run.progress)
    new.borrow_rows(run)
    new.borrow_models(run)
    return new


# --- what is chosen


def choose_curvatures(draft: Draft, run: Run, clock: Clock) -> float:
    """Chooses curvatures, and the rows that tell them, so that the query takes no more than half of the time that is
    left, if there are enough rows to fill the other half, also if solvers need all iterations that they may take.

    Returns:
        Seconds that scoring one row will take.
    """
    from ..influence.cost import time_text

    costs = _costs(run)
    solves = {name: Solve.of(cost, usual=False) for name, cost in costs.items()}
    for name in solves:
        if f"stages.{name}.curvature_samples" in draft.fixed:
            solves[name] = replace(solves[name], samples=None)
    approximated = _approximate(draft, solves, costs, clock.left / 2)
    rows, per_row = len(list(run.corpus())), TYPICAL * costs[run.ranked].score_seconds_per_row
    bought = within(clock.left, per_row, rows, solves, fewest_rows=FEWEST_RANKED)
    how = "curvature: Gauss-Newton, damped by a thousandth of its largest eigenvalue (the defaults)"
    if run.config.stages[PRETRAINING].link != "implicit":
        how = f"link: {run.config.stages[PRETRAINING].link}, since the run is given"
    changes = [f"of {' and '.join(approximated)} by EK-FAC"] if approximated else []
    fewer = {name: n for name, n in bought.curvature_samples.items() if n != solves[name].samples}
    if fewer:
        changes.append("on " + " and ".join(f"{n:,} random rows of {name}" for name, n in fewer.items()))
    for name, n in fewer.items():
        draft.set(f"stages.{name}.curvature_samples", n)
    draft.lines.append(f"{how}; {' '.join(changes)}, for the budget" if changes else how)
    draft.lines.append(
        f"time: {time_text(clock.spent)} until here, {time_text(bought.solve_seconds)} for the query, and the rest of "
        f"{time_text(clock.budget)} for the scores; all {rows:,} rows take {time_text(rows * per_row)}"
    )
    return per_row


def choose_rows(draft: Draft, run: Run, clock: Clock, seconds_per_row: float) -> None:
    """Chooses how many rows are ranked, in the time that the query left."""
    from ..influence.cost import time_text

    rows = len(list(run.corpus()))
    bought = within(clock.left, seconds_per_row, rows, fewest_rows=FEWEST_RANKED).rows
    text = f"all {rows:,} rows are ranked"
    if bought < rows and draft.set("corpus.sample", bought):
        text, rows = f"{bought:,} random rows of {rows:,} are ranked (a larger --budget ranks more)", bought
    draft.lines.append(f"{text}, in {time_text(rows * seconds_per_row)}, after {time_text(clock.spent)}")


def _costs(run: Run) -> dict[str, Cost]:
    """What differentiating each stage costs, by a few batches."""
    from ..influence.implicit import Implicit
    from ..influence.implicit_cost import implicit_cost
    from ..influence.replicates import replicated
    from ..registry import CHECKS

    # The query checks the stages.
    chain, columns = run.chain(skip_checks=list(CHECKS)), 1 if run.aggregate else len(run.tests())
    replicates, costs = chain.number_of_replicates(run.config.test.replicates), {}
    for place, bound in enumerate(chain.stages):
        differentiation, onwards = bound.differentiation, [each.differentiation for each in chain.stages[place:]]
        if isinstance(differentiation, Implicit):
            cost = implicit_cost(differentiation, columns, 1, None, brief=True)
        else:
            cost = differentiation.cost(columns)
        costs[bound.name] = replicated(cost, bound, replicates, onwards, compare=False)
    return costs


def _approximate(draft: Draft, solves: dict[str, Solve], costs: dict[str, Cost], allowed: float) -> list[str]:
    """Takes EK-FAC, which reads the rows twice, for the dearest stages, until all solves fit; returns these stages."""
    approximated = []
    for name in sorted(solves, key=lambda name: solves[name].seconds, reverse=True):
        details = costs[name].details
        cheap = details.get("replicates", 1) * EKFAC_PASSES * details.get("forward_seconds", math.inf)
        fits = sum(solve.seconds + solve.fixed_seconds for solve in solves.values()) <= allowed
        if not fits and cheap < solves[name].seconds and draft.set(f"stages.{name}.curvature", "ekfac"):
            solves[name] = replace(solves[name], seconds=cheap)
            approximated.append(name)
    return approximated


# --- an answer that was interrupted


class Choices(TypedDict):
    """What an explanation keeps in its run folder until it is finished, so that it goes on with what it chose."""

    question: str
    values: dict[str, Any]
    lines: list[str]
    seconds_per_row: float
    has_rows: bool


def keep(draft: Draft, run: Run, question: str, seconds_per_row: float, has_rows: bool) -> None:
    """Writes what was chosen; `has_rows`: the rows that are ranked, too."""
    from ..engine.files import write_json

    chosen = Choices(
        question=question,
        values=draft.values,
        lines=draft.lines,
        seconds_per_row=seconds_per_row,
        has_rows=has_rows,
    )
    with run.outputs.writing([run.folder / CHOICES]):
        write_json(run.folder / CHOICES, chosen)


def kept(run: Run, question: str) -> Choices | None:
    """What was chosen for the same question, which was interrupted; None where there is no such."""
    from ..engine.files import read_json

    path = run.folder / CHOICES
    if not path.is_file():
        return None
    chosen = read_json(path, Choices, "delete it, and what was chosen is chosen anew")
    return chosen if chosen["question"] == question else None


def forget(run: Run) -> None:
    """Deletes what `keep` wrote."""
    run.outputs.forget(run.folder / CHOICES)


@contextmanager
def forgotten_if_refused(run: Run) -> Iterator[None]:
    """Forgets what was chosen where the block raises an `InputError`: under the same choices it would raise again."""
    try:
        yield
    except InputError:
        forget(run)
        raise
