"""A configuration at work: loads data and models, trains stages, builds the chain. What is asked of it then is in
`commands`."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import random
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.functional import check_vocabulary
from ..engine.corpus import Stream
from ..engine.files import write_json
from ..engine.hashing import digest
from ..errors import DivergedError, InputError, first_line
from . import build
from .data import load_rows, stream_rows
from .plugins import parameters
from .schema import Config, StageConfig
from .tasks import task_of


class Run:
    """A configuration and its folder. Settings of every stage are checked before anything is loaded or written.

    Raises:
        InputError: a setting of `training`, `objective`, `solver` or `model.config` that does not exist or has a wrong
            type, or a tokenizer that cannot be loaded.
    """

    def __init__(self, config: Config, progress: bool = True):
        import torch
        from transformers import AutoTokenizer

        from .. import models  # noqa: F401  (registers its tokenizer and classes with the Auto classes)

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config, self.progress = config, progress
        self.folder = Path(config.run_dir).expanduser()
        self.names = list(config.stages)
        self._models: dict[str, Any] = {}
        self._rows: dict[tuple[str, str], list[dict]] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"run_dir is {config.run_dir!r}, which is a file; expected a folder, or nothing yet.")
        for name in self.names:
            build.training_settings(self.config, name)
            build.polish_settings(self.config, name)
            build.new_config(self.config, name)
        self.adapters = {name: build.adapter(self.config, name) for name in self.names}
        self.tasks = {name: task_of(stage.task, f"stages.{name}.task") for name, stage in config.stages.items()}
        self.curvatures = {name: build.curvature(self.config, name) for name in self.names}
        self.differentiations = {name: build.link(self.config, name) for name in self.names}
        self.solvers = {name: build.solver(self.config, name) for name in self.names}
        self.tokenizer = None
        if config.tokenizer is not None:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(config.tokenizer))
            except (OSError, ValueError) as error:
                raise InputError(
                    f"tokenizer: cannot load {config.tokenizer!r} ({first_line(error)}); expected a Hub id or a "
                    "folder."
                ) from error
        self.objectives = {name: build.objective(self.config, name, self.tokenizer) for name in self.names}

    # --- what a stage is made of

    def arguments(self, name: str, **overrides):
        """`TrainingArguments` refuse what this machine cannot do, which is no matter once the stage is trained."""
        import torch
        from transformers import TrainingArguments

        # The filter would print the loss before it became NaN; pinning warns where there is no accelerator.
        defaults = {"report_to": [], "save_strategy": "no", "seed": self.config.seed, "logging_nan_inf_filter": False}
        defaults["dataloader_pin_memory"] = torch.cuda.is_available()
        try:
            return TrainingArguments(
                str(self._checkpoints(name)), **{**defaults, **build.training_settings(self.config, name), **overrides}
            )
        except (ValueError, TypeError, ImportError) as error:
            raise InputError(f"stages.{name}.training: {first_line(error)}.") from error

    @property
    def ranked(self) -> str:
        """The stage whose rows are ranked."""
        return self.config.corpus.stage or self.names[0]

    def output(self, name: str) -> Path:
        """Where a file about the ranked stage is written: for another stage than the first, its name is in the file's
        (scores.parquet, scores-finetuning.parquet), so that rankings of several stages lie side by side."""
        path = self.folder / name
        return path if self.ranked == self.names[0] else path.with_stem(f"{path.stem}-{self.ranked}")

    @property
    def aggregate(self) -> str | None:
        chosen = self.config.test.aggregate
        return None if chosen == "none" else chosen

    def borrow(self, other: Run) -> None:
        """Uses the rows that another run of the same data has loaded."""
        self._rows = other._rows

    def stage_config(self, name: str) -> StageConfig:
        if name not in self.config.stages:
            raise InputError(f"there is no stage {name!r} in the configuration; its stages are {self.names}.")
        return self.config.stages[name]

    def rows(self, name: str, part: str | None = None) -> list[dict] | Stream:
        """The stage's rows: those of its `data.part`, or of another part. Loaded once, their labels checked."""
        data = self.config.stages[name].data
        data = data.model_copy(update={"part": part or data.part})
        if (name, data.part) not in self._rows:
            if data.streaming:
                rows = stream_rows(data, name, self.content(name))
            else:
                rows = load_rows(data, name, self.content(name))
                self._check_labels(name, rows)
            self._rows[name, data.part] = rows
        return self._rows[name, data.part]

    def content(self, name: str) -> str:
        """What a row of the stage holds: "text" or "image"."""
        return self.tasks[name].content

    def _check_labels(self, name: str, rows: list[dict]) -> None:
        if self.tasks[name].label_kind is None:
            return
        labels = self.objectives[name].labels or ()
        numbers = range(len(labels)) if labels else range(2**31)
        if any(isinstance(label, int) for label in labels):  # they say which numbers there are
            numbers = ()

        def is_class(label) -> bool:
            return label in labels or (isinstance(label, int) and not isinstance(label, bool) and label in numbers)

        unknown = {label for label in {row["label"] for row in rows} if not is_class(label)}
        if unknown:
            raise InputError(
                f"stages.{name}.objective.labels is {list(labels)}, but the label column holds "
                f"{sorted(map(str, unknown))[:5]}; list all classes in the order of the model's, or drop rows with "
                f"stages.{name}.data.keep."
            )

    def objective(self, name: str, model):
        """The stage's objective; texts are cut after as many tokens as the model takes, unless max_length is less."""
        if not self.objectives[name].is_fitted:
            self.objectives[name] = self.objectives[name].fitted(self.rows(name))
        objective = self.objectives[name]
        check_vocabulary(name, model, objective)
        if objective.tokenizer is None or "max_length" not in parameters(type(objective)):
            return objective
        limit = getattr(model.base_model.config, "max_position_embeddings", None)
        if limit is None or (objective.max_length or objective.tokenizer.model_max_length) <= limit:
            return objective
        if objective.max_length is not None:
            raise InputError(
                f"stages.{name}.objective.max_length is {objective.max_length}; expected at most {limit}, which is "
                "what the model takes."
            )
        if dataclasses.is_dataclass(objective):
            return dataclasses.replace(objective, max_length=limit)
        objective = copy.copy(objective)
        objective.max_length = limit
        return objective

    def model(self, name: str):
        """The trained model of a stage: from `run_dir/<stage>`, else from `model.path`."""
        if name not in self._models:
            folder, path = self.folder / name, self.config.stages[name].model.path
            if not folder.is_dir() and path is None:
                raise InputError(
                    f"stage {name!r} is not trained yet: {folder} does not exist; run msif train --stage {name}, or "
                    f"set stages.{name}.model.path to a trained model."
                )
            model, missing = build.load_model(self.config, name, folder if folder.is_dir() else path)
            if missing:
                raise InputError(
                    f"stage {name!r}: {folder if folder.is_dir() else path} has no weights for {missing[0]!r} "
                    f"({len(missing)} tensors), so it is not a trained model of the task "
                    f"{self.config.stages[name].task}; run msif train --stage {name}."
                )
            self._models[name] = model
        return self._models[name]

    def is_trained(self, name: str) -> bool:
        """Whether the stage's training is over, or never to be."""
        return (self.folder / name).is_dir() or self._is_given(name)

    def _is_given(self, name: str) -> bool:
        """Whether the configuration names a finished model and no way to train it, or the run that left it."""
        stage = self.config.stages[name]
        idle = stage.run is not None or not (stage.training or stage.polish is not None)
        return stage.model.path is not None and idle

    def present_model(self, name: str):
        """The trained model, or an untrained one where training is still to come."""
        if name not in self._models and not self.is_trained(name):
            self.arguments(name)
            self._models[name] = self.new_model(name)
        return self.model(name)

    def models(self) -> dict[str, Any]:
        return {name: self.model(name) for name in self.names}

    def new_model(self, name: str):
        """The untrained model of a stage: from `model.path`, else from `model.config` (the first stage) or on the
        encoder of the stage before."""
        before = self.model(self.names[self.names.index(name) - 1]) if self.names.index(name) else None
        return self._made(name, before, self.config.seed)

    def fresh(self, seed: int) -> list:
        """Untrained models of all stages under a seed, the later ones on the encoders of the earlier ones."""
        found = []
        for name in self.names:
            found.append(self._made(name, found[-1] if found else None, seed))
        return found

    def _made(self, name: str, before, seed: int):
        classes = None
        if self.tasks[name].label_kind == "class":
            labels = self.objectives[name].labels
            classes = len(labels) if labels else max(2, 1 + max(row["label"] for row in self.rows(name)))
        return build.new_model(self.config, name, before, seed, self.adapters[name], classes)

    # --- commands

    def to_train(self) -> list[str]:
        """The stages that `msif train` trains: all but those whose model is given and that have no training settings,
        or a run."""
        from ..training.record import check_arguments

        given = [name for name in self.names if self._is_given(name)]
        for name in given:
            print(f"{name}: {self.config.stages[name].model.path} is taken as it is (not trained here)")
        names = [name for name in self.names if name not in given]
        for name in names:  # before the first one is trained for hours
            arguments = self.arguments(name)
            if self.config.stages[name].link == "unrolled":
                check_arguments(arguments, name)
        return names

    def train(self, name: str) -> dict:
        """Trains one stage, writes `run_dir/<stage>` and `run_dir/<stage>.json` with losses and wall time.

        An interrupted training goes on from its last checkpoint; a finished one starts anew. When it fails, what an
        earlier one wrote stays.
        """
        from .. import training
        from ..adapters.split import split

        stage, index = self.stage_config(name), self.names.index(name)
        if stage.run is not None:
            raise InputError(
                f"stages.{name}.run is a run that was recorded elsewhere; leave it out to train the stage here."
            )
        if stage.data.streaming:
            raise InputError(
                f"stages.{name}.data.streaming is for a stage whose model is given (model.path); expected streaming: "
                "false to train it here."
            )
        arguments = self.arguments(name)
        previous = self.model(self.names[index - 1]) if index else None
        parts = {"train": self.rows(name)}
        if stage.data.has_test_side:
            parts["test"] = self.rows(name, "test")
        model = self.new_model(name)
        objective = self.objective(name, model)
        tied = split(name, model, previous, stage.trainable, stage.resized).proximal
        if tied and stage.alpha is None and stage.link == "proximal":
            raise InputError(
                f"stages.{name}.alpha is missing, but the stage trains {len(tied)} inherited tensors (first "
                f"{tied[0]!r}); give the α of eq. (12), trainable: head, or link: unrolled."
            )
        checkpoints, recorded = self._checkpoints(name), stage.link == "unrolled"
        last = _last_checkpoint(checkpoints)
        if last is not None and (recorded or arguments.save_strategy != "no"):
            print(f"{name}: an interrupted training left {last}, to go on from")
        report: dict[str, Any] = {"stage": name}
        if "test" in parts and build.inherits_head(self.config, name, model, previous):
            report["test_before"] = training.evaluate(model, objective, parts["test"], stage.batch_size)
        started = time.perf_counter()
        terms = self._terms(name, previous)
        terms["alpha"] = None if stage.alpha == "auto" else stage.alpha
        try:
            if recorded:
                training.record(
                    model, objective, parts["train"], arguments, checkpoints, progress=self.progress, **terms
                )
            elif stage.uses_trainer:
                report["training_loss"] = training.train(
                    model, objective, parts["train"], arguments, progress=self.progress, **terms
                )
            if stage.polish is not None:
                polished = self.polish(name, model, previous)
                print(polished)
                report["polish"] = polished.to_dict()
            report["seconds"] = round(time.perf_counter() - started, 1)
            for part, rows in parts.items():
                report[part] = training.evaluate(model, objective, rows, stage.batch_size)
                if not math.isfinite(report[part]["loss"]):
                    raise DivergedError(
                        f"the {part} loss of stage {name!r} is {report[part]['loss']} after training: lower "
                        f"stages.{name}.training.learning_rate."
                    )
        except BaseException as error:
            if isinstance(error, DivergedError) or _last_checkpoint(checkpoints) is None:
                shutil.rmtree(checkpoints, ignore_errors=True)
            raise
        if recorded:
            shutil.rmtree(self.recording(name), ignore_errors=True)
            os.replace(checkpoints, self.recording(name))
        training.save(model, self.tokenizer, self.folder / name)
        write_json(self.folder / f"{name}.json", report)
        shutil.rmtree(checkpoints, ignore_errors=True)
        self._models.pop(name, None)
        return report

    def polish(self, name: str, model, previous):
        """Brings a model of the stage to a stationary point, in place, as the stage's `polish` says."""
        from .. import training
        from ..engine.accelerated import Engine

        return training.polish(
            model,
            self.objective(name, model),
            self.rows(name),
            batch_size=self.config.stages[name].batch_size,
            engine=Engine(progress=self.progress),
            **build.polish_settings(self.config, name),
            **self._terms(name, previous),
        )

    def _terms(self, name: str, previous) -> dict[str, Any]:
        """What belongs to F beside the rows' losses, as `train` and `polish` take it."""
        shared = ("trainable", "weight_decay", "alpha", "resized")
        stage = self.config.stages[name]
        return {"previous": previous, "name": name, **{key: getattr(stage, key) for key in shared}}

    def _checkpoints(self, name: str) -> Path:
        return self.folder / f"{name}.checkpoints"

    def recording(self, name: str) -> Path:
        """Where the training run of an unrolled stage is kept."""
        own = self.config.stages[name].run
        return self.folder / f"{name}.run" if own is None else Path(own).expanduser()

    def chain(self, models: dict[str, Any] | None = None, planned: bool = False):
        """The `MultiStageInfluence` of the configuration, from the trained models (or those given); `planned`: stages
        whose training run is still to be recorded count as proximal ones."""
        from .. import MultiStageInfluence, Stage

        models = models or self.models()
        shared = ("trainable", "weight_decay", "alpha", "curvature_samples", "batch_size", "resized")
        stages = [
            Stage(
                name,
                models[name],
                self.objective(name, models[name]),
                self.rows(name),
                curvature=self.curvatures[name],
                solver=self.solvers[name],
                seed=self.config.seed,
                **{**{key: getattr(stage, key) for key in shared}, **self._link(name, planned)},
            )
            for name, stage in self.config.stages.items()
        ]
        return MultiStageInfluence(stages, self.accelerator, self.progress, self.config.sharded)

    @cached_property
    def accelerator(self):
        """One for all passes, with the trackers that the configuration asks for."""
        from ..engine.accelerated import new_accelerator

        trackers = self.config.trackers
        try:
            made = new_accelerator(log_with=trackers or None, project_dir=str(self.folder))
            if trackers:
                missing = set(trackers) - {str(getattr(found, "value", found)) for found in made.log_with}
                if missing:
                    raise ValueError(f"{sorted(missing)} cannot be used here, is it installed")
                made.init_trackers("hf_msif", config={"config": self.config.model_dump_json()})
        except (ValueError, ImportError) as error:
            raise InputError(f"trackers: {first_line(error)}.") from error
        return made

    def _link(self, name: str, planned: bool) -> dict[str, Any]:
        stage = self.config.stages[name]
        if stage.link == "proximal":
            return {}
        if planned and not self.is_trained(name):
            return {"alpha": 1.0}
        return {"link": self.differentiations[name], "run": self.recording(name), "max_growth": stage.max_growth}

    def tests(self) -> list[dict]:
        """The test rows asked about: from the test side of the last stage's data where there is one."""
        chosen = self.config.test
        name, rows = self.names[-1], self.test_side()
        if chosen.ids is not None:
            by_id = {str(row["example_id"]): row for row in rows}
            missing = [i for i in chosen.ids if str(i) not in by_id]
            if missing:
                raise InputError(
                    f"test.ids names {missing}, which are not rows of the test side of stage {name!r}; its ids are "
                    f"{list(by_id)[:5]}, ..."
                )
            return [by_id[str(i)] for i in chosen.ids]
        if chosen.wrong:
            rows = self._wrong(name, rows)
        content = self.content(name)
        distinct = list({digest(row[content]): row for row in rows}.values())
        if chosen.number > len(distinct):
            raise InputError(
                f"test.number is {chosen.number}; expected at most {len(distinct)}, the distinct {content}s on the "
                f"test side of stage {name!r}{' that the model classifies wrongly' if chosen.wrong else ''}."
            )
        return random.Random(chosen.seed).sample(distinct, chosen.number)

    def test_side(self) -> list[dict]:
        """All test rows of the last stage; its training rows where nothing is set aside."""
        name = self.names[-1]
        return self.rows(name, "test" if self.config.stages[name].data.has_test_side else None)

    def _wrong(self, name: str, rows: list[dict]) -> list[dict]:
        from .. import training

        model = self.model(name)
        objective = self.objective(name, model)
        if objective.predictions is None:
            raise InputError(f"test.wrong is for classification; stage {name!r} has another task.")
        return training.mistakes(model, objective, rows, self.config.stages[name].batch_size)

    def corpus(self) -> list[dict] | Stream:
        """The rows that are ranked."""
        from ..engine.accelerated import Engine

        chosen = self.config.corpus
        rows = self.rows(self.ranked)
        if isinstance(rows, Stream):
            if chosen.sample is None:
                return rows
            return Engine(self.accelerator, progress=False).sample(rows, chosen.sample, chosen.seed)
        if chosen.sample is None or chosen.sample >= len(rows):
            return rows
        return random.Random(chosen.seed).sample(rows, chosen.sample)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a `Trainer`, or state of a recorded run, in a folder."""
    from transformers.trainer_utils import get_last_checkpoint

    if not folder.is_dir():
        return None
    states = sorted(str(path) for path in folder.glob("state-*.safetensors"))
    return states[-1] if states else get_last_checkpoint(str(folder))
