"""What the commands do with a configuration: load data and models, train, build the chain, query, score; every file a
run writes."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .config import Config, Data, StageConfig
from .errors import InputError

FIELDS = ("example_id", "text", "label")


def load_rows(data: Data, what: str) -> list[dict]:
    """Rows {example_id, text[, label]} of a `Data` section; rows left out are counted and printed.

    Raises:
        InputError: missing files or dataset, a column that does not exist, or no row left.
    """
    from datasets import load_dataset

    files = [data.data_files] if isinstance(data.data_files, str) else data.data_files
    for file in files or []:
        if "://" not in file and not any(c in file for c in "*?[") and not Path(file).expanduser().is_file():
            raise InputError(f"{what}: the file {file!r} does not exist; set data.data_files to where the data is.")
    try:
        table = load_dataset(data.path, data.name, data_files=files, split=data.split)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{what}: cannot load {data.path!r} (split {data.split!r}): {reason}; give a Hub dataset id, or one of "
            "text, csv, json, parquet with data_files."
        ) from error
    wanted = {"text": data.text_column, "label": data.label_column, "example_id": data.id_column}
    for role, column in wanted.items():
        if column is not None and column not in table.column_names:
            near = difflib.get_close_matches(column, table.column_names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": set data.{role}_column."
            raise InputError(f"{what}: there is no column {column!r} among {table.column_names}{hint}")
    for column in data.keep:
        if column not in table.column_names:
            raise InputError(f"{what}: keep names the column {column!r}, which is not among {table.column_names}.")
    rows, dropped = [], Counter()
    for number, source in enumerate(table):
        if data.max_rows is not None and len(rows) >= data.max_rows:
            dropped["beyond max_rows"] = len(table) - number
            break
        text = source[data.text_column]
        if not isinstance(text, str) or not text.strip():
            dropped["no text"] += 1
        elif any(str(source[column]) not in values for column, values in data.keep.items()):
            dropped["not in keep"] += 1
        elif data.part != "all" and (_position(text) < data.test_fraction) != (data.part == "test"):
            dropped[f"not in the {data.part} part"] += 1
        else:
            row = {"example_id": source[data.id_column] if data.id_column else number, "text": text}
            rows.append(row | ({"label": source[data.label_column]} if data.label_column else {}))
    note = "".join(f", {count:,} left out ({why})" for why, count in dropped.items())
    print(f"{what}: {len(rows):,} rows of {len(table):,}{note}")
    if not rows:
        raise InputError(f"{what}: no row of {len(table):,} is left; check path, keep and part.")
    return rows


def _position(text: str) -> float:
    """A text's place in [0, 1): a hash, so that equal texts (retweets) fall on the same side of a split."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:6]) / 2**48


class Run:
    """A configuration and its folder."""

    def __init__(self, config: Config, progress: bool = True):
        self.config, self.progress = config, progress
        self.folder = Path(config.run_dir)
        self.names = list(config.stages)
        self._models: dict[str, Any] = {}
        if not self.names:
            raise InputError(
                "the configuration has no stages; expected at least one, e.g. pretraining and finetuning."
            )

    # --- what a stage is made of
    # -----------------------------------------------------------------------------------------

    def tokenizer(self):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.config.tokenizer)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot load the tokenizer {self.config.tokenizer!r} ({str(error).splitlines()[0]}): give a Hub id "
                "or a folder."
            ) from error

    def stage_config(self, name: str) -> StageConfig:
        if name not in self.config.stages:
            raise InputError(f"there is no stage {name!r} in the configuration; its stages are {self.names}.")
        return self.config.stages[name]

    def rows(self, name: str, part: str | None = None) -> list[dict]:
        data = self.stage_config(name).data
        if part is not None:
            data = dataclasses.replace(data, part=part)
        return load_rows(data, f"{name}{f' ({data.part})' if data.part != 'all' else ''}")

    def objective(self, name: str):
        from . import objectives

        stage = self.stage_config(name)
        kind = {
            "masked-lm": objectives.MaskedLM,
            "causal-lm": objectives.CausalLM,
            "sequence-classification": objectives.SequenceClassification,
        }[stage.task]
        settings = dict(stage.objective)
        if stage.task == "masked-lm":
            settings.setdefault("seed", self.config.seed)
        if "labels" in settings:
            settings["labels"] = tuple(settings["labels"])
        known = {f.name for f in dataclasses.fields(kind)} - {"tokenizer"}
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise InputError(
                    f"stage {name!r}: {kind.__name__} has no setting {key!r}; it has {sorted(known)}"
                    + (f". The nearest known key is {near[0]!r}." if near else ".")
                )
        return kind(self.tokenizer(), **settings)

    def model(self, name: str):
        """The trained model of a stage: from `run_dir/<stage>`, else from `model.path`."""
        if name in self._models:
            return self._models[name]
        stage = self.stage_config(name)
        folder = self.folder / name
        source = str(folder) if folder.is_dir() else stage.model.path
        if source is None:
            raise InputError(
                f"stage {name!r} is not trained yet: {folder} does not exist; run `msif train --config ... --stage "
                f"{name}`, or set stages.{name}.model.path to a trained model."
            )
        self._models[name] = self._auto(name).from_pretrained(source)
        return self._models[name]

    def _auto(self, name: str):
        import transformers

        from . import models  # noqa: F401  (registers its classes with the Auto classes)

        return {
            "masked-lm": transformers.AutoModelForMaskedLM,
            "causal-lm": transformers.AutoModelForCausalLM,
            "sequence-classification": transformers.AutoModelForSequenceClassification,
        }[self.stage_config(name).task]

    def new_model(self, name: str):
        """The untrained model of a stage: for the first one from `model.path` or `model.config`, else on the encoder
        before it."""
        import transformers

        from .models import FeedForwardClassifier

        stage, index = self.stage_config(name), self.names.index(name)
        transformers.set_seed(self.config.seed)
        labels = {"num_labels": len(stage.objective["labels"])} if "labels" in stage.objective else {}
        if index == 0:
            if stage.model.path is not None:
                return self._auto(name).from_pretrained(stage.model.path, **labels)
            if stage.model.config is None:
                raise InputError(
                    f"stage {name!r} needs model.path (a checkpoint) or model.config (a new model); it has neither."
                )
            settings = dict(stage.model.config)
            kind = settings.pop("model_type", None)
            if kind is None:
                raise InputError(f"stage {name!r}: model.config needs model_type, e.g. bert.")
            return self._auto(name).from_config(transformers.AutoConfig.for_model(kind, **settings))
        before = self.model(self.names[index - 1])
        if stage.model.head == "feed_forward":
            return FeedForwardClassifier.from_encoder(before, stage.model.hidden_size, **labels)
        return self._auto(name).from_pretrained(before.name_or_path, **labels)

    # --- commands
    # --------------------------------------------------------------------------------------------------------

    def train(self, name: str) -> dict:
        """Trains one stage, writes `run_dir/<stage>` and `run_dir/<stage>.json` with losses and wall time."""
        from transformers import TrainingArguments

        from . import training

        stage, index = self.stage_config(name), self.names.index(name)
        objective, rows = self.objective(name), self.rows(name)
        model = self.new_model(name)
        settings = {"report_to": [], "save_strategy": "no", "seed": self.config.seed, **stage.training}
        settings["output_dir"] = str(self.folder / f"{name}.checkpoints")
        known = {f.name for f in dataclasses.fields(TrainingArguments)}
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise InputError(
                    f"stage {name!r}: TrainingArguments has no {key!r}; the nearest known key is {near!r}."
                )
        started = time.perf_counter()
        loss = training.train(
            model,
            objective,
            rows,
            TrainingArguments(**settings),
            previous=self.model(self.names[index - 1]) if index else None,
            trainable=stage.trainable,
            weight_decay=stage.weight_decay,
            alpha=stage.alpha,
            name=name,
            progress=self.progress,
        )
        report = {"stage": name, "seconds": round(time.perf_counter() - started, 1), "training_loss": loss}
        report["train"] = training.evaluate(model, objective, rows, stage.batch_size)
        if stage.data.test_fraction > 0:
            report["test"] = training.evaluate(model, objective, self.rows(name, "test"), stage.batch_size)
        training.save(model, objective.tokenizer, self.folder / name)
        write_json(self.folder / f"{name}.json", report)
        self._models.pop(name, None)
        return report

    def chain(self, models: dict[str, Any] | None = None):
        """The `MultiStageInfluence` of the configuration, from the trained models (or those given)."""
        from . import MultiStageInfluence, Stage, solvers

        kinds = {
            "cg": solvers.CG,
            "squared_cg": solvers.SquaredCG,
            "minres": solvers.MinRes,
            "identity": solvers.Identity,
            "dense": solvers.Dense,
        }
        stages = []
        for name, stage in self.config.stages.items():
            kind = kinds[stage.solver.name]
            given = {k: v for k, v in vars(stage.solver).items() if k != "name" and v is not None}
            known = {f.name for f in dataclasses.fields(kind)}
            odd = sorted(set(given) - known)
            if odd:
                raise InputError(
                    f"stage {name!r}: the solver {stage.solver.name!r} has no setting {odd[0]!r}; it has "
                    f"{sorted(known)}."
                )
            shared = ("trainable", "weight_decay", "alpha", "curvature", "curvature_samples", "batch_size", "resized")
            stages.append(
                Stage(
                    name,
                    models[name] if models else self.model(name),
                    self.objective(name),
                    self.rows(name),
                    solver=kind(**given),
                    seed=self.config.seed,
                    **{key: getattr(stage, key) for key in shared},
                )
            )
        return MultiStageInfluence(stages, progress=self.progress)

    def tests(self) -> list[dict]:
        """The test rows asked about: from the test side of the last stage's data where there is one."""
        settings, name = self.config.test, self.names[-1]
        rows = self.rows(name, "test" if self.stage_config(name).data.test_fraction > 0 else None)
        if settings.ids is not None:
            by_id = {row["example_id"]: row for row in rows}
            missing = [i for i in settings.ids if i not in by_id]
            if missing:
                raise InputError(f"test.ids names {missing}, which are not rows of the test side of stage {name!r}.")
            return [by_id[i] for i in settings.ids]
        distinct = list({row["text"]: row for row in rows}.values())
        return random.Random(settings.seed).sample(distinct, min(settings.number, len(distinct)))

    def corpus(self) -> list[dict]:
        """The rows that are ranked."""
        settings = self.config.corpus
        rows = self.rows(settings.stage or self.names[0])
        if settings.sample is None or settings.sample >= len(rows):
            return rows
        return random.Random(settings.seed).sample(rows, settings.sample)

    def query(self) -> dict:
        """Asks about the test rows; writes `run_dir/query`."""
        aggregate = None if self.config.test.aggregate == "none" else self.config.test.aggregate
        started = time.perf_counter()
        query = self.chain().query(self.tests(), aggregate)
        query.save_pretrained(self.folder / "query")
        return {
            "seconds": round(time.perf_counter() - started, 1),
            "query": str(self.folder / "query"),
            **query.certificate(),
        }

    def score(self) -> dict:
        """Scores the corpus for the saved query; writes scores and Table 1 as Parquet and Markdown."""
        from .query import Query
        from .tables import table_one, write_table

        chain = self.chain()
        query = Query.from_pretrained(self.folder / "query", chain)
        corpus = self.corpus()
        started = time.perf_counter()
        scores = query.score(corpus, stage=self.config.corpus.stage)
        seconds = round(time.perf_counter() - started, 1)
        scores.to_parquet(self.folder / "scores.parquet")
        table = table_one(scores)
        write_table(table, self.folder / "table1")
        return {"seconds": seconds, "rows": len(scores), "scores": str(self.folder / "scores.parquet"), "table": table}

    def sweep(self):
        """How the ranking moves with the damping of the ranked stage; writes `run_dir/sweep.parquet` and `.md`."""
        from .sweep import damping_sweep
        from .tables import write_table

        table = damping_sweep(
            self.chain(), self.tests(), self.corpus(), self.config.dampings, self.config.corpus.stage
        )
        write_table(table, self.folder / "sweep")
        return table


def write_json(path: Path, value: dict) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, default=str, ensure_ascii=False))
    os.replace(part, path)
