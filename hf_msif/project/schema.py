"""What a configuration holds: pydantic models, every key with its meaning and default, and what must fit together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InputError

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
    link: Literal["implicit", "unrolled"] = "implicit"
    """how the stage is differentiated: implicit takes it for a minimum; unrolled goes back through its training run,
    which is recorded"""
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
    def recorded(self) -> bool:
        """Whether the stage's training run is recorded, to go back through it."""
        return self.link == "unrolled"

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
            if stage.data.streaming and (stage.recorded or classifies):
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
            if stage.recorded and stage.polish is not None:
                raise InputError(
                    f"{key} has polish and link: unrolled; expected one of them: an unrolled stage is what its "
                    "training run left, a polished one is a minimum."
                )
            if stage.alpha == "auto" and stage.polish is not None:
                raise InputError(
                    f"{key} has polish and alpha: auto; expected α as a number: a polished stage is at the minimum "
                    "that its α makes."
                )
            if stage.link == "implicit" and (stage.run is not None or stage.max_growth is not None):
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
