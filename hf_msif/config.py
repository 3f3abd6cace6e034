"""Settings of a run: dataclasses ⇄ YAML ⇄ flags. Nothing here imports torch, so that help and errors are instant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse import ArgumentParser

from .errors import InputError


@dataclass
class Data:
    """Where rows come from and which of them are used.

    Args:
        path: a Hub dataset id, or a builder of `datasets` ("text", "csv", "json", "parquet") with `data_files`.
        name: configuration of a Hub dataset.
        data_files: local files or URLs for a builder.
        split: split of the dataset.
        text_column: column with the text.
        label_column: column with the label, for classification.
        id_column: column that names rows; default: the row's number in the file.
        keep: column → admitted values; other rows are dropped and counted.
        test_fraction: share of the *texts* (not rows: equal texts stay together) set aside for testing, by hash.
        part: "all" rows, or the "train" or "test" side of that split.
        max_rows: use the first so many rows.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    text_column: str = "text"
    label_column: str | None = None
    id_column: str | None = None
    keep: dict[str, list[str]] = field(default_factory=dict)
    test_fraction: float = 0.0
    part: Literal["all", "train", "test"] = "all"
    max_rows: int | None = None


@dataclass
class Model:
    """The model of a stage.

    Args:
        path: Hub id or folder to load instead of training (or to start the first stage's training from).
        config: settings of a new model, `model_type` among them, for a first stage trained from scratch.
        head: "auto": the head of `AutoModelFor...`; "feed_forward": `hf_msif.models.FeedForwardClassifier` on the
            mean embedding.
        hidden_size: units of the feed-forward head.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    head: Literal["auto", "feed_forward"] = "auto"
    hidden_size: int = 64


@dataclass
class Solver:
    """Which solver, see `hf_msif.solvers`; settings left out keep the solver's default."""

    name: Literal["cg", "squared_cg", "minres", "identity", "dense"] = "cg"
    damping: float | Literal["auto"] | None = None
    damping_fraction: float | None = None
    tol: float | None = None
    max_iter: int | None = None


@dataclass
class StageConfig:
    """One stage: what is trained on what, and how it is differentiated (see `hf_msif.Stage`).

    Args:
        task: decides objective and model class.
        data: the stage's training examples.
        model: what is loaded or built.
        objective: settings of the objective (`mask_probability`, `draws`, `max_length`, `labels`, ...).
        training: Hugging Face's `TrainingArguments`, by name.
        trainable, weight_decay, alpha, curvature, curvature_samples, solver, batch_size, resized: as in
            `hf_msif.Stage`.
    """

    task: Literal["masked-lm", "causal-lm", "sequence-classification"]
    data: Data
    model: Model = field(default_factory=Model)
    objective: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    trainable: str | list[str] = "all"
    weight_decay: float = 0.0
    alpha: float | None = None
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    curvature_samples: int | None = None
    solver: Solver = field(default_factory=Solver)
    batch_size: int = 64
    resized: bool = False


@dataclass
class Tests:
    """Which predictions are asked about: rows of the last stage's test side.

    Args:
        number: so many random ones.
        ids: or these example ids.
        seed: of the choice.
        aggregate: "none": one column a test example; "sum" or "mean": one for the group.
    """

    number: int = 3
    ids: list[int] | None = None
    seed: int = 0
    aggregate: Literal["none", "sum", "mean"] = "none"


@dataclass
class Corpus:
    """Which rows are ranked.

    Args:
        stage: of which stage; default: the first.
        sample: so many random rows of that stage's data; default: all.
        seed: of the choice.
    """

    stage: str | None = None
    sample: int | None = None
    seed: int = 0


@dataclass
class Config:
    """A whole run.

    Args:
        run_dir: where everything is written.
        tokenizer: Hub id or folder.
        stages: name → stage, first to last.
        test: which predictions are asked about.
        corpus: which rows are ranked.
        dampings: λ of `msif sweep`, for the ranked stage.
        seed: of training and of the masks.
    """

    run_dir: str
    tokenizer: str
    stages: dict[str, StageConfig]
    test: Tests = field(default_factory=Tests)
    corpus: Corpus = field(default_factory=Corpus)
    dampings: list[float] = field(default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0])
    seed: int = 0


class Parser(ArgumentParser):
    """An argument parser whose complaints are one line, an unknown key with the nearest known one. Exit code 2."""

    def error(self, message: str, ex: Exception | None = None):
        if not self.exit_on_error:  # a parser inside a parser, which knows the key's section
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"{parser.prog}: error: {_sentence(message, parser)}\n")


def _sentence(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message, several lines that speak of Python types, as one line in the words of the
    configuration."""
    text = " ".join(message.split())
    stage = StageConfig.__name__ in text
    text = re.sub(r"Parser key \"stages\": Problem with given class_path '\S+': ", "in a stage: ", text)
    text = re.sub(r"Parser key \"([\w.]+)\": ", r"\1: ", text)
    text = re.sub(r"Group '([\w.]+)' does not accept option '([\w.]+)'", r"unknown key '\1.\2'", text)
    text = re.sub(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", r"unknown key '\1'", text)
    text = re.sub(
        r"Does not validate .*? Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$", r"expected \1; got \2", text
    )
    text = re.sub(r"Expected a (.*?)\. Got value: (.*)$", r"expected \1; got \2", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text).replace("typing.", "")
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace(", NoneType;", " or nothing;")
    unknown = re.search(r"unknown key '([\w.]+)'|unrecognized arguments: --?([\w.]+)", text)
    if unknown:
        near = _nearest(unknown[1] or unknown[2], stage, parser)
        return f"{text}." + (f" The nearest known key is {near!r}." if near else "")
    if "arguments are required" in text:
        text = re.sub(r"\b(?:train|plan|query|score|sweep|top)\.(?=\w)", "", text)
        if stage:
            return f"{text}; a stage that is not in the YAML file needs them: is its name spelled as there?"
        if "run_dir" in text or "stages" in text:
            return f"{text}; give them in a file: --config FILE.yaml"
    return text


def _nearest(wanted: str, stage: bool, parser: ArgumentParser) -> str | None:
    """The known key that most resembles `wanted`: of a stage, or of the command."""
    flags = {flag.lstrip("-") for flag in parser._option_string_actions}
    found = difflib.get_close_matches(wanted, known_keys(StageConfig) if stage else flags, n=1)
    if found or stage:
        return found[0] if found else None
    found = difflib.get_close_matches(wanted, known_keys(StageConfig), n=1) if "stages" in flags else []
    return f"stages.NAME.{found[0]}" if found else None


def known_keys(section: type) -> list[str]:
    """Every key of a section, dotted."""
    nested = {"data": Data, "model": Model, "solver": Solver, "test": Tests, "corpus": Corpus}
    keys = []
    for name in section.__dataclass_fields__:
        keys += [name, *(f"{name}.{key}" for key in (known_keys(nested[name]) if name in nested else ()))]
    return keys


def add_config(parser: ArgumentParser) -> None:
    """`--config file.yaml` and `--section.key value` for every key of `Config`."""
    parser.add_argument("--config", action="config", help="YAML file with the settings below")
    parser.add_class_arguments(Config)


def parse(arguments: Sequence[str]) -> Config:
    """The configuration of `--config file.yaml --section.key value ...`; the command line and recipe scripts share
    it."""
    parser = Parser(prog="msif")
    add_config(parser)
    arguments, entries = set_apart(arguments)
    return build(parser, parser.parse_args(arguments), entries)


def build(parser: ArgumentParser, namespace, entries: Sequence[Entry] = ()) -> Config:
    """The dataclass of parsed arguments, with the entries that `set_apart` kept."""
    values = parser.instantiate(namespace)
    config = Config(**{name: values[name] for name in Config.__dataclass_fields__})
    for stage, section, key, value in entries:
        if stage not in config.stages:
            raise InputError(
                f"--stages.{stage}.{section}.{key}: there is no stage {stage!r}; the stages are {list(config.stages)}."
            )
        owner, (*path, name) = config.stages[stage], section.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, {**(getattr(owner, name) or {}), key: value})
    return config


# (stage, section, key, value)
Entry = tuple[str, str, str, Any]
FREE = re.compile(r"--stages\.([^.=]+)\.(training|objective|model\.config|data\.keep)\.([^.=]+)(?:=(.*))?", re.DOTALL)


def set_apart(arguments: Sequence[str]) -> tuple[list[str], list[Entry]]:
    """Takes entries of a stage's free dictionaries, `--stages.NAME.training.learning_rate 1e-4`, out of the arguments.

    jsonargparse, which cannot know the keys of such a dictionary inside a stage, would refuse them.
    """
    rest, entries = [], []
    remaining = iter(arguments)
    for argument in remaining:
        match = FREE.fullmatch(argument)
        value = match and (match[4] if match[4] is not None else next(remaining, None))
        if match is None or value is None:
            rest.append(argument)
        else:
            entries.append((match[1], match[2], match[3], _value(value)))
    return rest, entries


def _value(text: str) -> Any:
    import yaml

    try:
        return json.loads(text)  # 1e-4 is a number in JSON, but text in YAML
    except ValueError:
        return yaml.safe_load(text)
