"""Settings of a run: YAML files and `--section.key value` flags into pydantic models. Nothing here imports torch, so
that help and errors are instant."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .errors import InputError

RULES = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, use_attribute_docstrings=True)
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
RESERVED = ("query", "bank", "validation", "cleanse")
Scalar = str | int | float | bool | None


class Section(BaseModel):
    """A section of the configuration; the sentence below a key is its line in `--help`."""

    model_config = RULES


class Data(Section):
    """Where rows come from and which of them are used."""

    path: str
    """a Hub dataset id, a builder of `datasets` (text, csv, json, parquet) with data_files, or sklearn:digits"""
    name: str | None = None
    """configuration of a Hub dataset"""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """local files or URLs for a builder, or a mapping of them: split → files"""
    split: str = "train"
    """split of the dataset"""
    test_split: str | None = None
    """split whose rows are the test side, where the data come with one"""
    text_column: str = "text"
    """column with the text"""
    image_column: str = "image"
    """column with the image, for image-classification"""
    label_column: str | None = None
    """column with the label, for classification"""
    id_column: str | None = None
    """column that names rows; null: the row's number in the file"""
    keep: dict[str, list[Scalar]] = {}
    """column → admitted values; other rows are dropped and counted"""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the texts or images (not rows: equal ones stay together) set aside for testing, by hash"""
    part: Literal["train", "test", "all"] = "train"
    """which side of that split the stage is trained on"""
    streaming: bool = False
    """read rows when they are needed instead of holding them: a corpus larger than memory, for a first stage with
    curvature_samples whose model is given"""
    max_rows: Count | None = None
    """use the first so many rows (of the side that is trained on, where there is a test_split)"""

    @property
    def has_test_side(self) -> bool:
        return self.test_fraction > 0 or self.test_split is not None


class Model(Section):
    """The model of a stage; null in both path and config: a new head on the encoder of the stage before."""

    path: str | None = None
    """Hub id or folder: loaded instead of training, or, where `training` has settings, to start training from"""
    config: dict[str, Any] | None = None
    """settings of a new model, model_type among them, for a first stage trained from scratch"""
    head: Literal["auto", "feed_forward"] = "auto"
    """auto: the head of AutoModelFor...; feed_forward: `FeedForwardClassifier` on the mean embedding"""
    hidden_size: Count = 64
    """units of the feed-forward head"""
    dtype: Literal["float32", "float64"] | None = None
    """of the parameters; null: as the model comes. float64 for stages that are brought to a stationary point"""
    lora: dict[str, Any] | None = None
    """settings of `peft.LoraConfig` (r, lora_alpha, target_modules, ...): adapters in a later stage's encoder"""


class Solver(Section):
    """Which solver of `hf_msif.solvers`; null keeps the solver's own default."""

    name: Literal["cg", "squared_cg", "minres", "identity", "dense"] = "cg"
    """cg (positive definite), squared_cg (eq. (16)), minres (indefinite), dense (small models), identity (baseline)"""
    damping: NonNegative | Literal["auto"] | None = None
    """λ added to the curvature; auto: damping_fraction × its mean eigenvalue"""
    damping_fraction: Positive | None = None
    """used by damping: auto alone"""
    tol: NonNegative | None = None
    """relative residual at which a column is done"""
    max_iter: Count | None = None
    """most iterations a column"""
    max_parameters: Count | None = None
    """dense: refuse larger systems"""


class StageConfig(Section):
    """One stage: what is trained on what, and how it is differentiated (see `hf_msif.Stage`)."""

    task: Literal[
        "masked-lm", "causal-lm", "bidirectional-lm", "skip-gram", "sequence-classification", "image-classification"
    ]
    """decides objective and model class"""
    data: Data
    model: Model = Model()
    objective: dict[str, Any] = {}
    """settings of the objective: mask_probability, draws, max_length, labels, ... (see `hf_msif.objectives`)"""
    training: dict[str, Any] = {}
    """Hugging Face's TrainingArguments, by name"""
    polish: dict[str, Any] | None = None
    """settings of `training.polish`, which ends training at a stationary point; {} for its defaults. Without
    `training` it does all of it"""
    trainable: str | list[str] = "all"
    """all, head (everything not inherited), or a list of name patterns"""
    weight_decay: NonNegative = 0.0
    """λ of the penalty (λ/2)‖φ‖² that belongs to the objective"""
    alpha: Positive | Literal["auto"] | None = None
    """α of eq. (12), which ties inherited, trained parameters to the stage before; auto: training does not tie them,
    and α is estimated from the finished model"""
    link: Literal["proximal", "unrolled"] = "proximal"
    """how the stage hangs on what came before: proximal takes it for a minimum; unrolled goes back through its
    training run, which is recorded"""
    run: str | None = None
    """folder of that run where it was recorded elsewhere (a RecordCallback); null: run_dir/NAME.run"""
    max_growth: Positive | None = None
    """refuse an unrolled pull-back whose adjoint grows more than so many times; null: by the dtype"""
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    """gauss_newton is positive semi-definite; the exact hessian is for models at a minimum"""
    curvature_samples: Count | None = None
    """random rows on which the curvature is estimated; null: all"""
    solver: Solver = Solver()
    batch_size: Count = 64
    """rows a batch in passes over the data"""
    resized: bool = False
    """accept embeddings that gained rows since the stage before"""

    @property
    def uses_trainer(self) -> bool:
        """Whether training goes by `training`, as it does unless `polish` is all that is said of it."""
        return bool(self.training) or self.polish is None


class Tests(Section):
    """Which predictions are asked about: rows of the last stage's test side."""

    number: Count = 3
    """so many random ones"""
    ids: Annotated[list[int | str], Field(min_length=1)] | None = None
    """or these example ids"""
    seed: int = 0
    """of the choice"""
    aggregate: Literal["none", "sum", "mean"] = "none"
    """none: one column a test example; sum or mean: one for the group"""
    wrong: bool = False
    """only rows that the finetuned model classifies wrongly"""


class Corpus(Section):
    """Which rows are ranked."""

    stage: str | None = None
    """of which stage; null: the first. Files about another one have its name in theirs: scores-NAME.parquet"""
    sample: Count | None = None
    """so many random rows of that stage's data; null: all"""
    seed: int = 0
    """of the choice"""
    dtype: Literal["float32", "tf32", "bfloat16"] | None = None
    """of scoring; tf32 (matrix products of a GPU) and bfloat16 are measured against the model's own precision on some
    rows, and the error printed"""
    part_rows: Count = 4096
    """rows a part of a scoring under way; an interruption costs those in hand, sixteen batches a process or a part"""


class Validation(Section):
    """What `msif validate` removes, and how it trains again."""

    experiment: Literal["leave_one_out", "remove_groups", "datamodelling_score"] = "leave_one_out"
    """single rows of the largest absolute influence; groups along the ranking; random subsets (LDS)"""
    retrain: Literal["warm_start", "from_scratch"] = "warm_start"
    """warm_start polishes the finished stages again, or repeats the runs of unrolled ones; from_scratch
    repeats `training` and `polish` from new weights"""
    examples: Count = 100
    """leave_one_out: so many rows"""
    groups: Annotated[int, Field(ge=3)] = 20
    """remove_groups: so many, evenly spread from the most helpful rows to the most harmful ones"""
    group_size: Count = 10
    """remove_groups: rows a group"""
    subsets: Annotated[int, Field(ge=3)] = 100
    """datamodelling_score: so many random subsets"""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """datamodelling_score: share of the rows in a subset"""
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    """of the retrainings that are averaged; null: the run's own start"""
    ceiling_seeds: list[int] | None = None
    """of the second measurement, whose correlation with the first is the ceiling; null: the same start moved by 1e-6;
    []: none"""
    baselines: list[str] | None = None
    """names in `hf_msif.validation`, identity, gradient_dot, tfidf, ...; null: all that apply; []: none"""


class Cleanse(Section):
    """What `msif cleanse` leaves out, and whether it trains again to see what that does."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the ranked stage's rows: the most harmful ones, and as many random ones as a control"""
    seeds: Count = 1
    """repetitions with other initial weights, other test rows and other random rows, for the interval"""
    retrain: Literal["no", "warm_start", "from_scratch"] = "no"
    """train again without either, and measure test rows that the ranking did not see"""
    held_out: Count | None = None
    """so many of those; null: all"""


class Config(Section):
    """A whole run."""

    run_dir: str
    """where everything is written"""
    tokenizer: str | None = None
    """Hub id or folder; needed by every task with texts"""
    stages: Annotated[dict[str, StageConfig], Field(min_length=1)]
    """name → stage, first to last"""
    test: Tests = Tests()
    corpus: Corpus = Corpus()
    validation: Validation = Validation()
    cleanse: Cleanse = Cleanse()
    dampings: Annotated[list[Positive], Field(min_length=1)] = [1e-3, 1e-2, 1e-1, 1.0]
    """λ of `msif sweep`, for the ranked stage"""
    seed: int = 0
    """of training and of the masks"""
    sharded: bool = False
    """each process holds its slice of a solver's vectors, whose memory then falls with the number of processes"""
    memory_check: bool = True
    """refuse a query whose vectors and activations cannot fit into memory, before it starts"""
    trackers: list[str] = []
    """of Accelerate (tensorboard, wandb, ...): residuals of the solvers, sentences scored a second"""
    threads: Count | None = None
    """of the CPU; null: PyTorch's choice. One is the fastest for models of a few thousand parameters"""

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        names = list(self.stages)
        if self.corpus.stage not in (None, *names):
            raise InputError(f"corpus.stage is {self.corpus.stage!r}; expected one of the stages {names}.")
        for index, (name, stage) in enumerate(self.stages.items()):
            key = f"stages.{name}"
            if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
                raise InputError(
                    f"{key}: stages are folders beside run_dir/query; expected a name of letters, digits, - and _ "
                    f"other than {', '.join(map(repr, RESERVED))}."
                )
            classifies = stage.task.endswith("-classification")
            if stage.task != "image-classification" and self.tokenizer is None:
                raise InputError(f"tokenizer is missing; {key} has the task {stage.task}, which reads texts.")
            if stage.data.streaming and (index or stage.curvature_samples is None or stage.data.has_test_side):
                raise InputError(
                    f"{key}.data.streaming is for a first stage with curvature_samples and without test_split or "
                    "test_fraction; expected its rows to be at hand, or those settings to be so."
                )
            if stage.data.streaming and (stage.link == "unrolled" or classifies):
                raise InputError(
                    f"{key}.data.streaming is for implicit stages of language models; expected streaming: false."
                )
            if stage.data.test_split is not None and stage.data.test_fraction > 0:
                raise InputError(f"{key}.data has test_split and test_fraction; expected one of them.")
            if classifies and stage.data.label_column is None:
                raise InputError(f"{key}.data.label_column is missing; {stage.task} needs the column with the label.")
            if index and stage.model.config is not None:
                raise InputError(
                    f"{key}.model.config is for the first stage, {names[0]!r}: later ones build on its encoder; "
                    "leave it out."
                )
            if stage.link == "unrolled" and stage.polish is not None:
                raise InputError(
                    f"{key} has polish and link: unrolled; expected one of them: an unrolled stage is what its "
                    "training run left, a polished one is a minimum."
                )
            if stage.alpha == "auto" and stage.polish is not None:
                raise InputError(
                    f"{key} has polish and alpha: auto; expected α as a number: a polished stage is at the minimum "
                    "that its α makes."
                )
            if stage.link == "proximal" and (stage.run is not None or stage.max_growth is not None):
                raise InputError(f"{key} has run or max_growth, which need link: unrolled.")
            if stage.model.lora is not None and not index:
                raise InputError(
                    f"{key}.model.lora is for later stages, whose encoder is inherited: leave it out, or put a "
                    "stage with the pretrained model before it."
                )
            if index and stage.model.path is None and self.stages[names[index - 1]].model.lora is not None:
                raise InputError(
                    f"{key} would build on the encoder of {names[index - 1]!r}, which has adapters "
                    f"(stages.{names[index - 1]}.model.lora); expected such a stage to be the last one."
                )
            if stage.run is not None and stage.model.path is None:
                raise InputError(f"{key}.run needs {key}.model.path, the model that the run left.")
            if stage.model.head == "feed_forward" and not (index and stage.task == "sequence-classification"):
                raise InputError(
                    f"{key}.model.head is 'feed_forward'; expected 'auto', unless a later stage has the task "
                    "sequence-classification."
                )
        return self


def parse(arguments: Sequence[str]) -> Config:
    """The configuration of `--config file.yaml --section.key value --section.key=value ...`; later ones win."""
    paths, overrides, remaining = [], [], iter(arguments)
    for argument in remaining:
        flag, equals, text = argument.partition("=")
        if not flag.startswith("--") or flag == "--":
            raise InputError(f"unexpected argument {argument!r}; expected --config FILE.yaml or --section.key value.")
        text = text if equals else next(remaining, "--")
        if not equals and text.startswith("--"):
            raise InputError(f"{flag} has no value; expected {flag} VALUE.")
        if flag == "--config":
            paths.append(text)
        else:
            overrides.append((flag[2:], text))
    return load(paths, overrides)


def load(
    paths: str | os.PathLike | Sequence[str | os.PathLike] = (), overrides: Sequence[tuple[str, Any]] = ()
) -> Config:
    """The configuration of YAML files, later ones laid over earlier ones, and of (dotted key, value) overrides.

    A value that is text is read as YAML, as on the command line.

    Raises:
        InputError: a file that cannot be read, or a key or value that the configuration does not know.
    """
    values: dict[str, Any] = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        values = _laid_over(values, _read(path))
    for key, value in overrides:
        _put(values, key, _value(value) if isinstance(value, str) else value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(_sentence(error, values)) from None


def settings(kind: Callable, given: Mapping[str, Any], key: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """The given settings of a dataclass or a function, names and types checked against its fields or its arguments;
    `key` is where they are in the configuration."""
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        known = [f.name for f in dataclasses.fields(kind) if f.init]
    else:
        known = list(inspect.signature(kind).parameters)
    known = [name for name in known if name not in without]
    checked = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(unknown_key(f"{key}.{name}", [f"{key}.{k}" for k in known]))
        try:
            checked[name] = TypeAdapter(hints[name], config=RULES).validate_python(value)
        except ValidationError:
            raise InputError(f"{key}.{name} is {_shown(value)}; expected {_expected(hints[name])}.") from None
    return checked


def help_text(width: int = 100) -> str:
    """Every key with its meaning, type and default, for `--help`."""
    lines = []
    for key, field in _keys(Config, "", ["NAME"]):
        if _is_section(field.annotation):
            lines += ["", *textwrap.wrap(f"{key}: {field.annotation.__doc__}", width)]
            continue
        default = "required" if field.is_required() else f"default: {_shown(field.get_default())}"
        text = f"{field.description}; {_expected(field.annotation, field.metadata)}; {default}"
        lines += [f"  --{key}", *textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    return "\n".join(lines)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-4 is a number; no, 007 and 2016-02-06 are words. Keys are words, and occur once."""

    yaml_implicit_resolvers: typing.ClassVar = {}

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                key.tag = "tag:yaml.org,2002:str"
                if key.value in names:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} occurs twice", problem_mark=key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""])


def _read(path: str | os.PathLike) -> dict:
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the configuration {str(path)!r} ({reason}); expected a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"the configuration {str(path)!r} is not valid YAML: {reason}{place}.") from None
    if not isinstance(values, (dict, NoneType)):
        raise InputError(f"the configuration {str(path)!r} holds {_shown(values)}; expected keys such as run_dir.")
    return values or {}


def _value(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:  # *.csv and @name are words here
        return text


def _laid_over(below: dict, above: dict) -> dict:
    def both(key):
        return isinstance(below.get(key), dict) and isinstance(above[key], dict)

    return {**below, **{key: _laid_over(below[key], above[key]) if both(key) else above[key] for key in above}}


def _put(values: dict, key: str, value: Any) -> None:
    path = key.split(".")
    stages = values.get("stages")
    if path[0] == "stages" and len(path) > 1 and path[1] not in (stages or {}):
        raise InputError(f"--{key}: there is no stage {path[1]!r}; the stages are {list(stages or {})}.")
    for depth, section in enumerate(path[:-1], 1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise InputError(f"unknown key {key!r}: {'.'.join(path[:depth])} is {_shown(values)}, which has no keys.")
    values[path[-1]] = value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _keys(kind: type[Section], prefix: str, stages: Sequence[str]) -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a section, dotted; those of the sections in it come last."""
    last = {name: name == "stages" or _is_section(field.annotation) for name, field in kind.model_fields.items()}
    for name in sorted(last, key=last.get):
        field = kind.model_fields[name]
        yield prefix + name, field
        if name == "stages":
            for stage in stages:
                yield f"stages.{stage}", FieldInfo.from_annotation(StageConfig)
                yield from _keys(StageConfig, f"stages.{stage}.", ())
        elif _is_section(field.annotation):
            yield from _keys(field.annotation, f"{prefix}{name}.", ())


def _sentence(error: ValidationError, values: dict) -> str:
    """The first of pydantic's complaints; an unknown key first, since a missing one is often the same one misspelt."""
    found = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    stages = values.get("stages")
    known = dict(_keys(Config, "", [str(s) for s in stages] if isinstance(stages, dict) else []))
    path = [str(part) for part in found["loc"]]
    if found["type"] == "extra_forbidden":
        return unknown_key(".".join(path), list(known))
    while ".".join(path) not in known:  # beyond a key come indices and the members of a union
        path.pop()
    key, field = ".".join(path), known[".".join(path)]
    expected = _expected(field.annotation, field.metadata)
    if found["type"] == "missing":
        return f"{key} is missing; expected {expected} in the file of --config, or --{key} VALUE."
    value = values
    for part in path:
        value = value[part]
    return f"{key} is {_shown(value)}; expected {expected}."


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Names the known key of the same section, else of any, that most resembles `key`; else all of the section."""
    section, _, name = key.rpartition(".")
    same_stage_last = sorted(known, key=lambda k: k.split(".")[:2] == key.split(".")[:2])
    everywhere = {k.rpartition(".")[2]: k for k in same_stage_last}
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    for pool in (siblings, everywhere):
        near = difflib.get_close_matches(name, pool, n=1)
        if near:
            return f"unknown key {key!r}; the nearest known key is {pool[near[0]]!r}."
    return f"unknown key {key!r}; expected {'one of ' + ', '.join(siblings) if siblings else 'none here'}."


def _expected(kind: Any, rules: Sequence = ()) -> str:
    """A type annotation in words."""
    words = {
        Scalar: "a word or number",
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: "null",
    }
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in words:
        text = words[kind]
    elif origin is Annotated:
        return _expected(inner[0], [*getattr(inner[1], "metadata", ()), *rules])
    elif origin is Literal:
        text = ", ".join(map(str, inner))
        text = f"one of {text}" if len(inner) > 1 else text
    elif origin in (Union, UnionType):
        text = " or ".join(map(_expected, inner))
    elif origin in (list, tuple, dict):
        each = inner[0 if origin is not dict else 1]
        text = "a mapping" if origin is dict else "a list"
        text += "" if each is Any or _is_section(each) else f" (each {_expected(each)})"
    elif _is_section(kind):
        text = f"a section with the keys {', '.join(kind.model_fields)}"
    else:
        text = getattr(kind, "__name__", str(kind))
    limits = {"ge": "at least", "gt": "above", "lt": "below", "min_length": "of length at least"}
    limits = [f"{word} {getattr(rule, r):g}" for rule in rules for r, word in limits.items() if hasattr(rule, r)]
    return " ".join([text, " and ".join(limits)]).strip()


def _shown(value: Any) -> str:
    """A value as YAML's flow style, which is what the user typed; cut where it is long."""
    text = yaml.dump(value, Dumper=yaml.SafeDumper, default_flow_style=True, allow_unicode=True, width=10**6)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 80 else f"{text[:77]}..."
