"""A configuration at work: loads its data and models, and builds the chain of its stages."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.functional import check_vocabulary
from ..engine import folders
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import Complaints, InputError, first_line
from ..objectives import within_positions
from ..objectives.classification import class_of
from ..registry import CHECKS, DIFFERENTIATIONS, registered
from . import build, explained, provenance
from .data import load_rows, stream_rows
from .outputs import Outputs
from .schema import Config, StageConfig
from .tasks import Task, task_of
from .trial import refusal, try_training
from .values import LONGEST_PATH, shortened, shown_text

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

    from ..influence.chain import BoundStage
    from ..influence.differentiation import Differentiation
    from ..influence.multistage import MultiStageInfluence
    from ..influence.stage import Stage
    from ..objectives import Objective


class Run:
    """A configuration and its folder. Settings of every stage are checked before anything is loaded or written.

    Raises:
        InputError: a setting of `training`, `objective`, `solver` or `model.config` that does not exist or has a wrong
            type, or a tokenizer that cannot be loaded.
    """

    def __init__(self, config: Config, progress: bool = True):
        import torch

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config, self.progress = config, progress
        self.folder = Path(config.run_dir).expanduser()
        self.names = list(config.stages)
        self._models: dict[str, Any] = {}
        self._fingerprints: dict[str, str] = {}
        self._digests: dict[str, str | None] = {}
        self._tried: set[str] = set()  # stages whose training arguments were tried
        self._rows: dict[tuple[str, str], list[dict] | Stream] = {}
        self._tests: list[dict] | None = None
        self.outputs = Outputs(self.folder)
        self.adapters, self.tasks, self.curvatures = dict[str, Any](), dict[str, Task](), dict[str, Any]()
        self.differentiations, self.solvers = dict[str, Any](), dict[str, Any]()
        self.objectives: dict[str, Objective] = {}
        self.tokenizer: Any = None
        complaints = Complaints()
        with complaints.collected():
            self._check_folder()
        for name in self.names:
            for check in (build.training_settings, build.polish_settings, build.new_config):
                with complaints.collected():
                    check(config, name)
            made: tuple[tuple[dict[str, Any], Callable[[Config, str], Any]], ...] = (
                (self.adapters, build.adapter),
                (self.curvatures, build.curvature),
                (self.differentiations, build.link),
                (self.solvers, build.solver),
            )
            for by_stage, make in made:
                with complaints.collected():
                    by_stage[name] = make(config, name)
            self.tasks[name] = task_of(config.stages[name].task, f"stages.{name}.task")
        with complaints.collected():
            self.measurement = build.measurement(config)
        with complaints.collected():
            if config.tokenizer is not None:
                self.tokenizer = build.load_tokenizer(config.tokenizer)
        for name in self.names:
            if self.tokenizer is None and self.tasks[name].needs_tokenizer:
                continue  # there is a complaint about it
            with complaints.collected():
                self.objectives[name] = build.objective(config, name, self.tokenizer)
        complaints.tell()

    def _check_folder(self) -> None:
        """Refuses a `run_dir` that cannot be a folder.

        Raises:
            InputError: a file, or a path that the system does not take.
        """
        shown = shown_text(self.config.run_dir, LONGEST_PATH)
        try:
            is_there = self.folder.exists() or self.folder.is_symlink()
            if is_there and not self.folder.is_dir():
                what = "a link that leads nowhere" if self.folder.is_symlink() else "a file"
                raise InputError(f"run_dir is {shown}, which is {what}; expected a folder, or nothing yet.")
            for folder in () if is_there else self.folder.absolute().parents:
                if folder.is_dir():
                    break
                if folder.exists():
                    raise InputError(f"run_dir is {shown}, but {str(folder)!r} is a file; give another run_dir.")
        except OSError as error:
            raise InputError(f"run_dir is {shown}: {error.strerror or error}; give another run_dir.") from error

    # --- what a stage is made of

    def arguments(self, name: str, **overrides) -> TrainingArguments:
        """The stage's `TrainingArguments`: the configuration's `training` over our defaults, `overrides` over both.

        They are made only when the stage is to be trained: `TrainingArguments` refuse what this machine cannot do
        (`bf16`), although another machine may have trained the stage.

        Raises:
            InputError: a setting that `TrainingArguments` refuse.
        """
        import torch
        from transformers import TrainingArguments

        # The filter would report the last finite loss in the place of NaN; pinning warns where there is no
        # accelerator.
        defaults = {"report_to": [], "save_strategy": "no", "seed": self.config.seed, "logging_nan_inf_filter": False}
        defaults["dataloader_pin_memory"] = torch.cuda.is_available()
        kept = self.config.stages[name].kept_checkpoints
        if kept:  # a Trainer saves the end of a run, too
            defaults |= {"save_strategy": "steps", "save_steps": 1 / kept if kept > 1 else 10**9}
        values, key = build.training_settings(self.config, name), f"stages.{name}.training"

        def make(settings: dict[str, Any]) -> TrainingArguments:
            return TrainingArguments(str(self.checkpoints(name)), **{**defaults, **settings, **overrides})

        try:
            arguments = make(values)
        except Exception as error:
            raise refusal(key, values, make, error) from error
        if self.config.stages[name].uses_trainer and not self.config.stages[name].recorded:
            if name not in self._tried:
                try_training(make, values, key)
            self._tried.add(name)
        return arguments

    @property
    def ranked(self) -> str:
        """The stage whose rows are ranked."""
        return self.config.corpus.stage or self.names[0]

    @property
    def aggregate(self) -> str | None:
        """How the test rows' losses are put together, as `MultiStageInfluence.query` takes it: None, sum or mean."""
        aggregate = self.config.test.aggregate
        return None if aggregate == "none" else aggregate

    def borrow_rows(self, other: Run) -> None:
        """Uses the rows that another run of the same data has loaded."""
        self._rows = other._rows

    def borrow_models(self, other: Run) -> None:
        """Uses the models and the test rows of another run of the same checkpoints and tests."""
        self._models, self._tests = other._models, other._tests

    def stage_config(self, name: str) -> StageConfig:
        """The stage's settings.

        Raises:
            InputError: the configuration has no stage of this name.
        """
        if name not in self.config.stages:
            raise InputError(f"there is no stage {name!r} in the configuration; its stages are {self.names}.")
        return self.config.stages[name]

    def rows(self, name: str, part: str | None = None) -> list[dict] | Stream:
        """The stage's rows: those of its `data.part`, or of another part. Loaded once, their labels checked."""
        data = self.config.stages[name].data
        columns = {**{column: column for column in self.tasks[name].columns}, **data.columns}
        seed = self.config.seed if data.seed is None else data.seed
        data = data.model_copy(update={"part": part or data.part, "columns": columns, "seed": seed})
        if (name, data.part) not in self._rows:
            if data.streaming:
                stream = stream_rows(data, name, self.content(name))
                self._rows[name, data.part] = (
                    stream if data.sample is None else self._sampled(stream, data.sample, seed)
                )
            else:
                rows = load_rows(data, name, self.content(name), self.tasks[name].label_kind)
                self._check_labels(name, rows)
                self._rows[name, data.part] = rows
        return self._rows[name, data.part]

    def _sampled(self, stream: Stream, size: int, seed: int) -> list[dict]:
        """Random rows of a stream, the same on every process."""
        from ..engine.accelerated import Engine

        return Engine(self.accelerator, progress=False).sample(stream, size, seed)

    def rows_digest(self, name: str) -> str | None:
        """SHA-256 of the stage's rows; of a stream that of its files, marked as such, or None where it has none."""
        if name not in self._digests:
            rows = self.rows(name)
            if isinstance(rows, Stream):
                self._digests[name] = provenance.STREAMED + rows.fingerprint() if rows.files else None
            else:
                self._digests[name] = digest(rows)
        return self._digests[name]

    def content(self, name: str) -> str:
        """What a row of the stage holds: "text", "image" or "words"."""
        return self.tasks[name].content

    def _check_labels(self, name: str, rows: list[dict]) -> None:
        if self.tasks[name].label_kind != "class":
            for row in rows if self.objectives[name].outputs_for is not None else ():
                self._outputs_for(name, row)
            return
        nested = next((row["label"] for row in rows if isinstance(row["label"], (list, dict))), None)
        if nested is not None and self.tasks[name].label_kind == "class":
            raise InputError(
                f"stages.{name}.data.label_column: {self.config.stages[name].data.label_column!r} holds "
                f"{shortened(nested)}; expected one word or number per row."
            )
        labels = self.objectives[name].labels or ()
        classes = {label: class_of(label, labels) for label in {row["label"] for row in rows}}
        # A range is asked for integers alone: for anything else it would compare all of its numbers.
        numbers = range(len(labels)) if labels else range(2**31)
        unknown = {label for label, c in classes.items() if not isinstance(c, int) or c not in numbers}
        if unknown:
            raise InputError(
                f"stages.{name}.objective.labels is {list(labels)}, but the label column holds "
                f"{sorted(map(str, unknown))[:5]}; list all classes in the order of the model's, or drop rows with "
                f"stages.{name}.data.keep."
            )

    def _outputs_for(self, name: str, row: dict) -> int:
        outputs_for = self.objectives[name].outputs_for
        assert outputs_for is not None
        try:
            return outputs_for(row)
        except InputError as error:
            raise InputError(f"stages.{name}.data.label_column: {error}") from error

    def objective(self, name: str, model) -> Objective:
        """The stage's objective; texts are cut after as many tokens as the model takes, unless max_length is less."""
        if not self.objectives[name].is_fitted:
            self.objectives[name] = self.objectives[name].fitted(self.rows(name))
        objective = self.objectives[name]
        check_vocabulary(name, model, objective)
        objective.check_model(model)
        try:
            return within_positions(objective, model)
        except InputError as error:
            raise InputError(f"stages.{name}.objective.{error}") from error

    def model(self, name: str):
        """The trained model of a stage: from `run_dir/<stage>`, else from `model.path`.

        Raises:
            InputError: there is none, or the one in the run folder was not trained by this configuration, or its
                weights are not those that were written.
        """
        if name not in self._models:
            folder = self.folder / name
            folders.check_no_file(folder)
            is_here, path = self._has_folder(name), self.config.stages[name].model.path
            if is_here and not self._is_named(name):
                provenance.check_model(self, name)
            source = folder if is_here else path
            if source is None:
                raise InputError(
                    f"stage {name!r} is not trained yet: {folder} does not exist; run msif train --stage {name}, or "
                    f"set stages.{name}.model.path to a trained model."
                )
            model, missing = build.load_model(self.config, name, source)
            if missing:
                raise InputError(
                    f"stage {name!r}: {source} has no weights for {missing[0]!r} "
                    f"({len(missing)} tensors), so it is not a trained model of the task "
                    f"{self.config.stages[name].task}; run msif train --stage {name}."
                )
            self._models[name] = model
            if is_here and not self._is_named(name):
                try:
                    provenance.check_weights(self, name)
                except InputError:
                    self.forget_model(name)
                    raise
        return self._models[name]

    def fingerprint(self, name: str) -> str:
        """SHA-256 of the weights of a stage's trained model."""
        if name not in self._fingerprints:
            self._fingerprints[name] = provenance.weights_fingerprint(self.model(name))
        return self._fingerprints[name]

    def _has_folder(self, name: str) -> bool:
        """Whether the run folder has a model of the stage."""
        folder = self.folder / name
        return folder.is_dir() and any(folder.iterdir())

    def _is_named(self, name: str) -> bool:
        """Whether `model.path` names the stage's folder in the run folder, to be taken as it is."""
        path, folder = self.config.stages[name].model.path, self.folder / name
        if path is None or not self.is_taken_as_it_is(name):
            return False
        return os.path.abspath(os.path.expanduser(path)) == os.path.abspath(folder)

    def is_trained(self, name: str) -> bool:
        """Whether the stage has its final model: it was trained here, or its model is taken as it is."""
        return self._has_folder(name) or self.is_taken_as_it_is(name)

    def is_taken_as_it_is(self, name: str) -> bool:
        """Whether the stage is not trained here: the configuration names a finished model (`model.path`), and either
        no way to train it or the run that made it (`run`)."""
        stage = self.config.stages[name]
        recorded_elsewhere = stage.recorded and stage.run is not None
        is_trained_here = not recorded_elsewhere and (bool(stage.training) or stage.polish is not None)
        return stage.model.path is not None and not is_trained_here

    def forget_model(self, name: str) -> None:
        """Loads the stage's model anew when it is next asked for."""
        self._models.pop(name, None)
        self._fingerprints.pop(name, None)

    def present_model(self, name: str):
        """The trained model, or an untrained one if the stage is not trained yet."""
        if name not in self._models and not self.is_trained(name):
            self.arguments(name)
            self._models[name] = self.new_model(name)
        return self.model(name)

    def models(self) -> dict[str, Any]:
        """The trained models of all stages."""
        return {name: self.model(name) for name in self.names}

    def new_model(self, name: str):
        """The untrained model of a stage: from `model.path`, else from `model.config` (the first stage) or on the
        encoder of the stage before."""
        before = self.model(self.names[self.names.index(name) - 1]) if self.names.index(name) else None
        return self._made(name, before, self.config.seed)

    def new_models(self, seed: int) -> list:
        """Untrained models of all stages under a seed, each on the encoder of the one before."""
        models: list[Any] = []
        for name in self.names:
            models.append(self._made(name, models[-1] if models else None, seed))
        return models

    def _made(self, name: str, before, seed: int):
        return build.new_model(self.config, name, before, seed, self.adapters[name], self.classes(name))

    def classes(self, name: str) -> list[str] | None:
        """Names of the outputs of the stage's head, in the order of its logits; None for tasks without labels.

        Raises:
            InputError: no labels are listed, and the numbers in the label column are none of classes.
        """
        kind, labels = self.tasks[name].label_kind, self.objectives[name].labels
        if labels:
            return [str(label) for label in labels]
        if kind is None:
            return None
        if kind == "class":
            return self._unnamed_classes(name)
        return [f"LABEL_{i}" for i in range(max(self._outputs_for(name, row) for row in self.rows(name)))]

    def _unnamed_classes(self, name: str) -> list[str]:
        """One class for every integer up to the largest label, named as transformers does where it knows no name.

        Raises:
            InputError: fewer than half of them occur: they are names, and no numbers of classes.
        """
        present = {row["label"] for row in self.rows(name)}
        number = max(2, 1 + max(present))
        if 2 * len(present) < number:
            raise InputError(
                f"the label column of stage {name!r} holds {sorted(present)[:10]}, so its head would have {number:,} "
                f"classes, most of them without a row; expected integers from 0: list the classes in "
                f"stages.{name}.objective.labels."
            )
        return [f"LABEL_{i}" for i in range(number)]

    # --- files of the run folder

    def output(self, name: str) -> Path:
        """The path of a file about the ranked stage. Unless that is the first stage, the file's name has the stage's
        (scores.parquet, scores-finetuning.parquet), so that rankings of several stages lie side by side."""
        path = self.folder / name
        return path if self.ranked == self.names[0] else path.with_stem(f"{path.stem}-{self.ranked}")

    def checkpoints(self, name: str) -> Path:
        """The folder of a stage's checkpoints while it is trained."""
        return self.folder / f"{name}.checkpoints"

    def recording(self, name: str) -> Path:
        """The folder of a stage's training run, recorded or in checkpoints."""
        folder = self.config.stages[name].run
        return self.folder / f"{name}.run" if folder is None else Path(folder).expanduser()

    # --- the chain and what it is asked

    def chain(
        self, models: dict[str, Any] | None = None, planned: bool = False, **settings: Any
    ) -> MultiStageInfluence:
        """The `MultiStageInfluence` of the configuration.

        Args:
            models: name → model; defaults to the trained models.
            planned: stages whose training run is still to be recorded count as implicit ones.
            settings: of every `Stage`, in the place of the configuration's.
        """
        from .. import MultiStageInfluence

        models = models or self.models()
        stages = [self._stage(name, models[name], **{**self._link(name, planned), **settings}) for name in self.names]
        return MultiStageInfluence(stages, self.accelerator, self.progress, self.config.sharded)

    def _stage(self, name: str, model: Any, **settings: Any) -> Stage:
        from .. import Stage

        stage = self.config.stages[name]
        shared = ("trainable", "weight_decay", "alpha", "curvature_samples", "batch_size", "resized", "skip_checks")
        return Stage(
            name,
            model,
            self.objective(name, model),
            self.rows(name),
            curvature=self.curvatures[name],
            seed=self.config.seed,
            **{
                "solver": self.solvers[name],
                **{key: getattr(stage, key) for key in shared},
                # A polished stage is a minimum of F with the masks of training.
                "mask_rounds": stage.mask_rounds if stage.polish is None else None,
                **settings,
            },
        )

    def check_untrained(self, name: str, model: Any) -> None:
        """Binds a stage as it is before its training, as an implicit one: what its checks will refuse of the trained
        model (a masked model under a causal task, say) is refused before hours are spent.

        Raises:
            InputError: see `influence.chain.BoundStage`.
        """
        from ..engine.accelerated import Engine
        from ..influence.chain import BoundStage
        from ..solvers import Auto

        engine, implicit = Engine(progress=False), {"link": "implicit", "run": None, "alpha": 1.0, "solver": Auto()}
        index, before = self.names.index(name), None
        if index:
            previous = self.names[index - 1]
            stage = self._stage(previous, self.model(previous), **{**implicit, "skip_checks": list(CHECKS)})
            before = BoundStage(stage, None, engine)
        BoundStage(self._stage(name, model, **implicit), before, engine)

    @cached_property
    def accelerator(self) -> Accelerator:
        """One `Accelerator` for all passes, with the trackers that the configuration names."""
        from ..engine.accelerated import new_accelerator

        trackers = self.config.trackers
        try:
            accelerator = new_accelerator(log_with=trackers or None, project_dir=str(self.folder))
            if trackers:
                available = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
                missing = set(trackers) - available
                if missing:
                    raise ValueError(f"{sorted(missing)} cannot be used here, is it installed")
                accelerator.init_trackers("hf_msif", config={"config": self.config.model_dump_json()})
        except (ValueError, ImportError) as error:
            key = "trackers" if trackers else "the settings of Accelerate (environment variables ACCELERATE_*)"
            raise InputError(f"{key}: {first_line(error)}; change or leave them out.") from error
        return accelerator

    def _link(self, name: str, planned: bool) -> dict[str, Any]:
        """How a stage is differentiated; `planned`: an implicit stage stands for one whose run is still to come."""
        from ..solvers import Auto

        stage = self.config.stages[name]
        if stage.recorded:
            if planned and not self.is_trained(name):
                return {"alpha": 1.0}
            return {"link": stage.link, "run": self.recording(name), "max_growth": stage.max_growth}
        if stage.kept_checkpoints and planned and not self.is_trained(name):
            return {"alpha": 1.0, "solver": Auto()}
        checkpoints = str(self.recording(name) / "checkpoint-*") if stage.kept_checkpoints else stage.checkpoints
        settings = {"run": stage.run, "checkpoints": checkpoints, "max_growth": stage.max_growth}
        return {"link": self.differentiations[name], **settings}

    def planned(self, bound: BoundStage) -> Differentiation:
        """How a bound stage of `chain(planned=True)` will be differentiated, once it is trained."""
        stage = self.config.stages[bound.name]
        if self.is_trained(bound.name) or not (stage.recorded or stage.link == "segments"):
            return bound.differentiation
        return registered(DIFFERENTIATIONS, stage.link).planned(bound, self.arguments(bound.name))

    def tests(self) -> list[dict]:
        """The test rows that the query asks about, see `explained.rows`."""
        if self._tests is None:
            self._tests = explained.rows(self)
        return self._tests

    def corpus(self) -> list[dict] | Stream:
        """The rows that are ranked: those of the ranked stage, or a sample of them."""
        settings = self.config.corpus
        rows = self.rows(self.ranked)
        if isinstance(rows, Stream):
            if settings.sample is None:
                return rows
            return self._sampled(rows, settings.sample, settings.seed)
        if settings.sample is None or settings.sample >= len(rows):
            return rows
        return random.Random(settings.seed).sample(rows, settings.sample)
