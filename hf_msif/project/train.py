"""Trains the stages of a run as its configuration says."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import training
from ..adapters.split import split
from ..engine import folders
from ..engine.accelerated import Engine
from ..engine.files import write_json
from ..errors import DivergedError, InputError
from ..objectives.classification import class_of
from ..training.record import check_arguments
from ..training.recording import FILES as FILES_OF_A_RUN
from ..training.trainer import last_checkpoint
from . import build, provenance

if TYPE_CHECKING:
    from ..training.polish import PolishReport
    from .run import Run
    from .schema import StageConfig

# What Transformers' Trainer and the library write while a stage is trained.
FILES_OF_A_TRAINING = (
    *FILES_OF_A_RUN,
    "checkpoint-[0-9]*",
    *(
        f"checkpoint-[0-9]*/{name}"
        for name in (
            *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
            *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
            *("trainer_state.json", "training_args.bin"),
        )
    ),
    *("runs", "runs/*", "runs/*/events.out.tfevents.*"),
)


def stages_to_train(run: Run) -> list[str]:
    """The stages that `msif train` trains, in order: all but those whose model is taken as it is, which are printed.

    The training arguments and the rows of all of them, and the places of their files, are checked here, before the
    first one is trained for hours.

    Raises:
        InputError: training arguments that Transformers refuses, or that a recorded run cannot repeat; something in
            the run folder that the library did not write.
    """
    names = []
    for name in run.names:
        if run.is_taken_as_it_is(name):
            print(f"{name}: {run.config.stages[name].model.path} is taken as it is (not trained here)")
        else:
            names.append(name)
    for name in names:
        arguments = run.arguments(name)
        if run.config.stages[name].recorded:
            check_arguments(arguments, name)
        run.outputs.check(**_written(run, name))
    for name in names:
        for part in (None, "test") if run.config.stages[name].data.has_test_side else (None,):
            run.rows(name, part)
        _require_classes(run, name)
        run.classes(name)
    return names


def train(run: Run, name: str) -> dict:
    """Trains one stage; writes `run_dir/<stage>`, and `run_dir/<stage>.json` with losses and wall time.

    An interrupted training goes on from its last checkpoint; a finished one starts anew. If it fails, the model of an
    earlier training stays.

    Args:
        run: of the configuration. Earlier stages must be trained.
        name: of the stage.

    Returns:
        What `run_dir/<stage>.json` holds: `stage`, `seconds`, and `loss`, `examples` and, for a classifier, `accuracy`
        under `train` and `test`.

    Raises:
        InputError: a stage that cannot be trained here, an inherited encoder that is trained without α, or something
            in the run folder that the library did not write.
        DivergedError: a loss that is not finite after training.
    """
    stage = run.stage_config(name)
    _refuse_given_model(name, stage)
    with run.outputs.writing(**_written(run, name)):
        return _train(run, name, stage)


def _written(run: Run, name: str) -> dict[str, list[Path]]:
    """What training a stage writes, as `Outputs.check` takes it."""
    files, replaced, checkpoints = [run.folder / f"{name}.json"], [run.folder / name], run.checkpoints(name)
    stage = run.config.stages[name]
    # The checkpoints of a recorded run become the run, and those that are kept, too; under a limit, Trainer deletes
    # the older ones as they are.
    if not stage.recorded and not stage.kept_checkpoints and stage.training.get("save_total_limit") is None:
        return {"files": files, "into": [checkpoints], "replaced": replaced}
    recording = [run.recording(name)] if stage.recorded or stage.kept_checkpoints else []
    return {"files": files, "replaced": [*replaced, checkpoints, *recording]}


def _train(run: Run, name: str, stage: StageConfig) -> dict:
    arguments, index = run.arguments(name), run.names.index(name)
    previous = run.model(run.names[index - 1]) if index else None
    sides = {"train": run.rows(name)}
    _require_classes(run, name)
    if stage.data.has_test_side:
        sides["test"] = run.rows(name, "test")
    model = run.new_model(name)
    initial = provenance.weights_fingerprint(model)
    objective = run.objective(name, model)
    _require_alpha(name, stage, model, previous)
    run.check_untrained(name, model)
    checkpoints, is_recorded = run.checkpoints(name), stage.recorded
    last_checkpoint = _last_checkpoint(checkpoints)
    if last_checkpoint is not None and (is_recorded or arguments.save_strategy != "no"):
        print(f"{name}: an interrupted training left {last_checkpoint}, to go on from")
    record = provenance.model_record(run, name)
    report: dict[str, Any] = {"stage": name}
    if "test" in sides and build.inherits_head(run.config, name, model, previous):
        report["test_before"] = training.evaluate(model, objective, sides["test"], stage.batch_size)
    started = time.perf_counter()
    # α is estimated from finished models, so that training itself is without it.
    terms = _objective_terms(run, name, previous) | {"alpha": None if stage.alpha == "auto" else stage.alpha}
    folders.write_marker(checkpoints, "checkpoints of a training", FILES_OF_A_TRAINING)
    try:
        if is_recorded:
            training.record(model, objective, sides["train"], arguments, checkpoints, progress=run.progress, **terms)
        elif stage.uses_trainer:
            report["training_loss"] = training.train(
                model, objective, sides["train"], arguments, progress=run.progress, **terms
            )
        if stage.polish is not None:
            polish_report = polish(run, name, model, previous)
            print(polish_report)
            report["polish"] = polish_report.to_dict()
        report["seconds"] = round(time.perf_counter() - started, 1)
        for side, rows in sides.items():
            report[side] = training.evaluate(model, objective, rows, stage.batch_size)
            if not math.isfinite(report[side]["loss"]):
                raise DivergedError(
                    f"the {side} loss of stage {name!r} is {report[side]['loss']} after training: lower "
                    f"stages.{name}.training.learning_rate."
                )
        if is_recorded or stage.kept_checkpoints:
            folders.remove(run.recording(name))
            os.replace(checkpoints, run.recording(name))
        facts = record.facts() | {"weights": provenance.weights_fingerprint(model), "initial": initial}
        training.save(model, run.tokenizer, run.folder / name, facts)
        write_json(run.folder / f"{name}.json", report)
    except BaseException as error:
        if isinstance(error, DivergedError) or _last_checkpoint(checkpoints) is None:
            folders.remove(checkpoints)
        raise
    folders.remove(checkpoints)
    run.forget_model(name)
    return report


def polish(run: Run, name: str, model, previous) -> PolishReport:
    """Brings a model of the stage to a stationary point of its F, in place, as the stage's `polish` says.

    Args:
        run: of the configuration.
        name: of the stage.
        model: of the stage; changed in place.
        previous: the model of the stage before, or None for the first stage.
    """
    return training.polish(
        model,
        run.objective(name, model),
        run.rows(name),
        batch_size=run.config.stages[name].batch_size,
        engine=Engine(progress=run.progress),
        **(build.polish_settings(run.config, name) or {}),
        **_objective_terms(run, name, previous),
    )


def _refuse_given_model(name: str, stage: StageConfig) -> None:
    """Refuses a stage whose settings are for a model that was trained elsewhere."""
    if stage.recorded and stage.run is not None:
        raise InputError(
            f"stages.{name}.run is a run that was recorded elsewhere; leave it out to train the stage here."
        )
    if stage.data.streaming:
        raise InputError(
            f"stages.{name}.data.streaming is for a stage whose model is given (model.path); expected streaming: "
            "false to train it here."
        )


def _require_classes(run: Run, name: str) -> None:
    """Refuses to train a classifier on rows of one class: the best model would read none of them."""
    if run.tasks[name].label_kind != "class":
        return
    values = {row["label"] for row in run.rows(name)}
    classes = {class_of(value, run.objectives[name].labels) for value in values}
    if len(classes) == 1:
        data, key = run.config.stages[name].data, f"stages.{name}.data"
        raise InputError(
            f"{key}.{data.label_key}: all training rows have the label {min(values, key=str)!r}; expected rows of at "
            f"least two classes: check {getattr(data, data.label_key)!r}, {key}.keep, and max_rows (sample takes "
            "random rows)."
        )


def _require_alpha(name: str, stage: StageConfig, model, previous) -> None:
    """Refuses to train inherited tensors that nothing ties to the stage before, eq. (12)."""
    tied = split(name, model, previous, stage.trainable, stage.resized).proximal
    if tied and stage.alpha is None and stage.link == "implicit":
        raise InputError(
            f"stages.{name}.alpha is missing, but the stage trains {len(tied)} inherited tensors (first "
            f"{tied[0]!r}); give the α of eq. (12), trainable: head, or link: unrolled."
        )


def _objective_terms(run: Run, name: str, previous) -> dict[str, Any]:
    """What belongs to the stage's F beside its rows' losses, as `training.train`, `record` and `polish` take it."""
    stage = run.config.stages[name]
    terms = {key: getattr(stage, key) for key in ("trainable", "weight_decay", "alpha", "resized")}
    return {"previous": previous, "name": name, **terms}


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a `Trainer`, or the newest state of a recorded run, in a folder."""
    states = sorted(str(path) for path in folder.glob("state-*.safetensors"))
    return states[-1] if states else last_checkpoint(folder)
