"""`explain`: from two checkpoints, a corpus and a text to a ranking, by settings that are found and measured."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import config as configuration
from .budget import parse_budget
from .values import LONGEST_PATH, shown_text

if TYPE_CHECKING:
    from ..scoring.scores import Scores
    from .run import Run

PRETRAINING, FINETUNING = "pretraining", "finetuning"
SOLVING = 0.6  # share of the budget for the query, before rows of the curvature are left out
LEAST_ROWS = 128  # of a curvature sample; below, EK-FAC estimates more of it by two passes
HEADER = "# Written by msif explain. The same answer again: msif query --config {0}, then msif score --config {0}\n"


def explain(
    pretrained: str,
    finetuned: str,
    corpus: str,
    finetuning_data: str,
    text: str | Sequence[str] | None = None,
    file: str | None = None,
    label: str | int | None = None,
    budget: str = "10m",
    labels: Sequence[str] | None = None,
    corpus_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    tokenizer: str | None = None,
    pretraining_run: str | None = None,
    run_dir: str | None = None,
    report: str | os.PathLike | None = None,
    save_config: str | os.PathLike | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    progress: bool = True,
) -> Scores:
    """Which sentences of the pretraining corpus made the finetuned model say this about these texts?

    Tasks and heads are those of the classes that the checkpoints name; whether finetuning moved the encoder is seen
    from the weights. Every setting is the library's default; where these would take longer than the budget, first the
    curvature is estimated on fewer rows, and then fewer rows of the corpus are ranked. What was chosen is printed.

    Args:
        pretrained: Hub id or folder of the pretrained model with its head; a Trainer's output folder counts as its
            last checkpoint.
        finetuned: the same of the model finetuned from it, or a folder with a PEFT adapter.
        corpus: the sentences to be ranked: a file (.txt, .csv, .tsv, .jsonl, .parquet), a saved dataset or a Hub id.
        finetuning_data: the rows on which the model was finetuned, likewise, with labels.
        text: the text to be explained, or several.
        file: a file of texts instead, as `test.file` of a configuration.
        label: their label; defaults to the class that the model predicts.
        budget: of time, such as "90s", "10m" or "2h".
        labels: what the label column calls the classes, in the order of the model's; needed where the model's
            configuration does not name them.
        corpus_column: column of the corpus with the sentences; found if it has a usual name, or is the only text.
        text_column: the same of the finetuning data.
        label_column: column of the finetuning data with the labels; found if it has a usual name.
        tokenizer: Hub id or folder; defaults to that of the finetuned model, else of the pretrained one.
        pretraining_run: the folder of a recorded run (`training.RecordCallback`) of the pretraining, to go back
            through it, or a Trainer's output folder, to go through its checkpoints; defaults to neither.
        run_dir: folder of everything that is written; defaults to one of the question's own in runs/explain, in which
            the same question goes on after an interruption.
        report: HTML file to be written.
        save_config: YAML file to be written, which repeats the answer.
        overrides: (dotted key of the configuration, value) over all of it, such as ("corpus.norms", "gradient").
        progress: print what was chosen, and progress bars.

    Returns:
        The scores of the corpus, one query column per text.

    Raises:
        InputError: a checkpoint without a head, tables whose columns cannot be told, labels that are no classes of the
            model, or whatever a configuration is refused for; it says what to give.
    """
    from .run import Run

    given = argparse.Namespace(**{name: value for name, value in locals().items() if name != "Run"})
    seconds, draft = parse_budget(budget), _draft(given)
    run = Run(configuration.from_values(draft.values), progress)
    draft = _with_trained(draft, run)
    run = _changed(run, draft)
    _fit(draft, run, seconds)
    run = _changed(run, draft)
    if progress:
        print("\n".join(draft.lines))
    if save_config is not None:
        save(draft.values, save_config)
    return _answer(run, report)


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
        configuration.override(self.values, [(key, value)])
        return True


def save(values: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a configuration as YAML, whole or not at all."""
    import yaml

    from ..engine.files import write_atomically

    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    write_atomically(path, lambda part: part.write_text(HEADER.format(path) + text, encoding="utf-8"))


# --- what is found


def _draft(given: argparse.Namespace) -> Draft:
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
        draft.set("run_dir", f"runs/explain/{_digest(draft.values)}")
    return draft


def _digest(values: dict[str, Any]) -> str:
    from ..engine.hashing import digest

    return digest(values)[:12]


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
    from . import detection
    from .schema import Data
    from .sources import load_table
    from .tasks import task_of

    columns = {PRETRAINING: given.corpus_column, FINETUNING: given.text_column}
    for stage, flag in ((PRETRAINING, "--corpus"), (FINETUNING, "--finetuning-data")):
        settings = draft.values["stages"][stage]
        data = Data.model_validate(settings["data"])
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


def _with_trained(draft: Draft, run: Run) -> Draft:
    """Sees from the weights what finetuning trained."""
    from . import detection

    key, models = f"stages.{FINETUNING}.trainable", run.models()
    if key in draft.fixed:
        return draft
    trainable = detection.changed(models[FINETUNING], models[PRETRAINING])
    draft.set(key, trainable)
    seen = {"head": "every weight of the encoder is equal in both checkpoints: finetuning trained the head alone"}
    seen["all"] = "the encoder's weights differ: finetuning trained all of them, tied to the pretrained ones by α"
    why = seen.get(str(trainable)) or "finetuning trained " + ", ".join(list(trainable)[:3])
    if trainable != "head" and not _only_adapters(trainable):
        draft.set(f"stages.{FINETUNING}.alpha", "auto")
    for stage in run.names:
        what = type(models[stage]).__name__
        draft.lines.append(f"{stage}: {run.config.stages[stage].task} ({what}), {len(list(run.rows(stage))):,} rows")
    draft.lines[-1] += f"; {why}"
    return draft


def _only_adapters(trainable: str | list[str]) -> bool:
    return isinstance(trainable, list) and all("lora" in name or "modules_to_save" in name for name in trainable)


def _changed(run: Run, draft: Draft) -> Run:
    """The run of the draft as it is now, with the rows and models that are loaded."""
    from .run import Run

    new = Run(configuration.from_values(draft.values), run.progress)
    new.borrow_rows(run)
    new.borrow_models(run)
    return new


# --- what is chosen


def _fit(draft: Draft, run: Run, budget: float) -> None:
    """Chooses the rows of the curvature and of the corpus so that the answer is there within the budget."""
    from ..influence.cost import time_text

    chain, tests = run.chain(), run.tests()
    number = chain.number_of_replicates(run.config.test.replicates)
    adjoints = chain.sketched_adjoints(tests, run.aggregate, run.measurement)
    costs = {
        bound.name: run.planned(bound).cost(1 if run.aggregate else len(tests), 1, adjoints.get(bound.name))
        for bound in chain.stages
    }
    seconds = {name: cost.details.get("usual_solve_seconds", cost.solve_seconds) for name, cost in costs.items()}
    for bound in chain.stages:
        if bound.differentiation.sampled_rows is None and bound.differentiation.draws:
            seconds[bound.name] *= number
    solving, allowed = sum(seconds.values()), SOLVING * budget
    how = "curvature: Gauss-Newton, damping a thousandth of its largest eigenvalue (the defaults"
    if run.config.stages[PRETRAINING].link != "implicit":
        how = f"link: {run.config.stages[PRETRAINING].link}, as its run is given ("
    if solving > allowed:
        how += "; " + _fewer_rows(draft, costs, allowed / solving)
        solving = allowed
    draft.lines.append(f"{how})")
    rows, per_row = len(list(run.corpus())), number * costs[run.ranked].score_seconds_per_row
    affordable = int((budget - solving) / max(per_row, 1e-12))
    ranked = f"all {rows:,} rows are ranked"
    if affordable < rows and draft.set("corpus.sample", max(affordable, 1)):
        ranked = f"{max(affordable, 1):,} random rows of {rows:,} are ranked: a larger --budget ranks more"
        rows = max(affordable, 1)
    draft.lines.append(
        f"time: {time_text(solving)} for the query, {time_text(rows * per_row)} for scores, of {time_text(budget)}; "
        f"{ranked}"
    )


def _fewer_rows(draft: Draft, costs: dict[str, Any], share: float) -> str:
    """Estimates each curvature on that share of its rows, or by EK-FAC where that is too few; says so."""
    texts = []
    for name, cost in costs.items():
        rows = int(share * cost.details.get("curvature_examples", 0))
        if rows >= LEAST_ROWS:
            draft.set(f"stages.{name}.curvature_samples", rows)
            texts.append(f"{name}'s on {rows:,} random rows")
        elif "curvature_examples" in cost.details:
            draft.set(f"stages.{name}.curvature", "ekfac")
            texts.append(f"{name}'s by EK-FAC")
    return " and ".join(texts) + ", for the budget"


# --- the answer


def _answer(run: Run, report: str | os.PathLike | None) -> Scores:
    """Queries and scores as `msif query` and `msif score` do, in the run folder."""
    from .commands import query, score
    from .lock import in_use
    from .saved_scores import saved_scores

    parts = run.output("scores.parts")
    with in_use(run.folder, "msif explain"):
        query.run(argparse.Namespace(), run)
        score.run(argparse.Namespace(resume=parts.exists(), keep=None), run)
    return saved_scores(str(run.folder))
