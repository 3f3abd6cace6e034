"""What a configuration holds: pydantic models, every key with its meaning and default, and what must fit together."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from ..errors import InputError
from ..registry import CHECKS, CURVATURES, DIFFERENTIATIONS, PRECONDITIONERS, SOLVERS, builder_of
from .plugins import DOTTED, is_dotted
from .tasks import TASKS

RULES = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, use_attribute_docstrings=True)
LARGEST = 2**31 - 1  # of anything that is counted
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy takes no others
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
# What a shell passes on of "\t" is two characters.
Separator = Annotated[str, BeforeValidator(lambda value: "\t" if value == r"\t" else value)]
Dotted = Annotated[str, Field(pattern=DOTTED)]
RESERVED = ("query", "bank", "validation", "cleanse")
SEGMENTS = 3  # checkpoints that are kept for link: segments where the configuration does not say how many
# Builders of `datasets` that read files; without data_files they would read the folder in which the command runs.
FILE_BUILDERS: tuple[str, ...] = ("text", "csv", "json", "parquet", "arrow", "pandas", "xml", "hdf5", "webdataset")
FILE_BUILDERS += ("imagefolder", "audiofolder", "videofolder", "pdffolder")
FILE_GROUP = "data_files"  # the column of a row's key in data_files, for label_from: files
Scalar = str | int | float | bool | None


class Section(BaseModel):
    """A section of the configuration; the sentence below a key is its line in `--help`."""

    model_config = RULES


class Data(Section):
    """Where rows come from and which of them are used."""

    path: str
    """a Hub dataset id; a file whose ending says its format (.txt, .csv, .tsv, .json, .jsonl, .parquet, also with .gz)
    or a pattern of such files; a folder that save_to_disk wrote; a builder of `datasets` (text, csv, json, parquet)
    with data_files; or sklearn:digits"""
    name: str | None = None
    """configuration of a Hub dataset"""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """local files or URLs for a builder, or a mapping of them: split → files, or with label_from class → files"""
    separator: Separator | None = None
    """csv: the character between columns; null: a tab in .tsv files, else a comma"""
    column_names: Annotated[list[str], Field(min_length=1)] | None = None
    """csv: names of the columns, for files without a header; null: the first line has them"""
    quotes: bool = True
    """csv: fields in quotation marks may hold separators and line breaks; false: quotation marks are characters of the
    text, as in many .tsv files"""
    split: str = "train"
    """split of the dataset, or a part of it, such as train[:10%]"""
    test_split: str | None = None
    """split whose rows are the test side, where the data come with one"""
    text_column: str = "text"
    """column with the text; for token-classification with its words, a list"""
    image_column: str = "image"
    """column with the image, for tasks with images"""
    label_column: str | None = None
    """column with the label, for classification; with the number, for regression; with a list of classes, for
    multi-label-classification and token-classification"""
    label_from: Literal["files"] | None = None
    """files: the label of a row is the key of its file in data_files, as in {Positive: pos/*.txt, Negative:
    neg/*.txt}; in the place of label_column"""
    columns: dict[str, str] = {}
    """further columns: what the task calls it → the column, such as target: summary, text_pair: hypothesis, or
    input_ids: tokens for rows that are tokenised already, which need no text; columns of the task's own names are
    found without it"""
    id_column: str | None = None
    """column that names rows; null: the row's number in the file"""
    keep: dict[str, list[Scalar]] = {}
    """column → values; rows with other values are dropped, and counted"""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the texts or images that is set aside for testing, by hash: rows with equal ones stay together"""
    part: Literal["train", "test", "all"] = "train"
    """which side of that split the stage is trained on"""
    streaming: bool = False
    """read rows when they are needed instead of holding them in memory; for a first stage with curvature_samples whose
    model is given"""
    max_rows: Count | None = None
    """use the first N rows of the side that is trained on; the test side is whole"""
    sample: Count | None = None
    """use N random rows of the side that is trained on; the test side is whole"""
    shuffle: bool = False
    """take the rows of the side that is trained on in random order; max_rows then takes random ones"""
    seed: Seed | None = None
    """seed of sample and shuffle; null: the configuration's"""

    @property
    def names_file(self) -> bool:
        """Whether `path` is a file, or a pattern of files."""
        return self.path not in FILE_BUILDERS and builder_of(self.path) is not None

    @property
    def builder(self) -> str | None:
        """The builder of `datasets` that reads files; None where no files are read."""
        return self.path if self.path in FILE_BUILDERS else builder_of(self.path)

    @property
    def files_key(self) -> Literal["path", "data_files"]:
        """The key that names the files."""
        return "path" if self.names_file and self.data_files is None else "data_files"

    @property
    def label_source(self) -> str | None:
        """The column that holds the label when the rows are loaded."""
        return FILE_GROUP if self.label_from == "files" else self.label_column

    @property
    def label_key(self) -> Literal["label_from", "label_column"]:
        """The key that says where labels come from."""
        return "label_column" if self.label_from is None else "label_from"

    @property
    def draws(self) -> bool:
        """Whether rows are taken in random order."""
        return self.shuffle or self.sample is not None

    @property
    def files(self) -> list[str]:
        """All names in `data_files`, or the file that is `path`; an empty list in it counts as an empty name."""
        if self.files_key == "path":
            return [self.path]
        groups = self.data_files.values() if isinstance(self.data_files, dict) else [self.data_files or []]
        return [name for group in groups for name in ([group] if isinstance(group, str) else group or [""])]

    @property
    def has_test_side(self) -> bool:
        return self.test_fraction > 0 or self.test_split is not None

    @property
    def trains_on_test_side(self) -> bool:
        """Whether the stage is trained on rows of its own test side."""
        return self.part == "test" or (self.part == "all" and self.test_fraction > 0) or self._tests_are_training_rows

    @property
    def _tests_are_training_rows(self) -> bool:
        """Whether `test_split` names the rows of `split`: by the same name, or by the same file."""
        if self.test_split is None or self.test_split == self.split:
            return self.test_split is not None
        files = self.data_files if isinstance(self.data_files, dict) else {}
        sides = [files.get(side) or [] for side in (self.split, self.test_split)]
        training, tests = (
            {os.path.abspath(os.path.expanduser(file)) for file in ([side] if isinstance(side, str) else side)}
            for side in sides
        )
        return bool(training & tests)


class Model(Section):
    """The model of a stage. Without path and config: a new head on the encoder of the stage before."""

    path: str | None = None
    """Hub id or folder of a model: taken as it is, or, where `training` has settings, trained further"""
    config: dict[str, Any] | None = None
    """settings of a new model, among them model_type, for a first stage that is trained from scratch"""
    head: Literal["auto", "feed_forward"] = "auto"
    """auto: the head of the AutoModelFor... class; feed_forward: `FeedForwardClassifier` on the mean embedding"""
    hidden_size: Count = 64
    """units of the feed-forward head"""
    dtype: Literal["float32", "float64"] | None = None
    """type of the parameters; null: that of the model as it is loaded. float64 is for stages that are polished"""
    lora: dict[str, Any] | None = None
    """settings of `peft.LoraConfig` (r, lora_alpha, target_modules, ...): adapters in the encoder of a later stage"""


class Solver(Section):
    """The solver of the stage's linear system and its settings; null keeps the solver's own default."""

    model_config = RULES | {"extra": "allow"}  # a solver of one's own has settings of its own

    name: Literal[tuple(SOLVERS)] | Dotted = "auto"  # type: ignore[valid-type]  # the names in a table
    """auto (suits the curvature and the number of test rows), cg (positive definite), block_cg (the same, for all test
    rows together), squared_cg (eq. (16)), minres (indefinite), dense (small models), closed_form (with curvature:
    ekfac), stochastic (mini-batches of all rows), identity (baseline), or your own class, whose settings stand beside
    name"""
    damping: NonNegative | Literal["auto", "training"] | None = None
    """λ added to the curvature; auto: damping_fraction × its largest eigenvalue; training: 1/τ, one over the summed
    learning rates of the stage's training, in the coordinates of its optimiser"""
    damping_fraction: Positive | None = None
    """only used by damping: auto; default 0.001, for squared_cg (of squared eigenvalues) 1e-6"""
    tol: NonNegative | None = None
    """relative residual at which a column is solved"""
    max_iter: Count | None = None
    """most iterations per column"""
    preconditioner: Literal[tuple(PRECONDITIONERS)] | None = None  # type: ignore[valid-type]  # the names in a table
    """cg, block_cg and stochastic: nystrom spends 64 products once, ekfac two to three, for fewer iterations of every
    test row"""
    max_passes: Positive | None = None
    """stochastic: most work, in products with all rows"""
    rows: Count | None = None
    """stochastic: rows per mini-batch"""
    max_parameters: Count | None = None
    """dense: refuse larger systems"""

    @model_validator(mode="after")
    def _no_unknown_settings(self) -> Solver:
        if self.model_extra and not is_dotted(self.name):
            extra = self.model_extra.items()
            unknown = [InitErrorDetails(type="extra_forbidden", loc=(key,), input=value) for key, value in extra]
            raise ValidationError.from_exception_data("Solver", unknown)
        return self


class StageConfig(Section):
    """One stage: what is trained on which rows, and how it is differentiated (see `hf_msif.Stage`)."""

    task: Literal[tuple(TASKS)] | Dotted  # type: ignore[valid-type]  # the names in a table
    """which objective and which class of models; or an objective of your own"""
    data: Data
    model: Model = Model()
    objective: dict[str, Any] = {}
    """settings of the objective: mask_probability, draws, max_length, labels, ... (see `hf_msif.objectives`)"""
    training: dict[str, Any] = {}
    """Hugging Face's TrainingArguments, by name"""
    polish: dict[str, Any] | None = None
    """settings of `training.polish`, which brings the model to a stationary point after `training`, or from its
    initial weights where `training` has no settings; {}: its defaults"""
    trainable: str | list[str] = "all"
    """all, head (everything that is not inherited), or a list of name patterns"""
    weight_decay: NonNegative = 0.0
    """λ of the penalty (λ/2)‖φ‖², which is part of the objective"""
    alpha: Positive | Literal["auto"] | None = None
    """α of eq. (12), which ties inherited, trained parameters to the stage before; auto: training does not tie them,
    and α is estimated from the trained model"""
    link: Literal[tuple(DIFFERENTIATIONS)] | Dotted = "implicit"  # type: ignore[valid-type]
    """how the stage is differentiated: implicit assumes that training ended at a minimum; unrolled goes back through
    the training run, which is recorded; segments through a few checkpoints of it; or a differentiation of your own"""
    run: str | None = None
    """folder of the training run where it was recorded elsewhere (by a RecordCallback); null: run_dir/NAME.run. An
    implicit stage reads it for solver.damping: training; a differentiation of your own may read another folder here"""
    checkpoints: str | Annotated[list[str], Field(min_length=1)] | Count | None = None
    """states of the training run, for link: segments: how many are kept while the stage is trained here, or the
    folders that a Trainer saved while it trained the model of model.path, as a pattern
    (runs/pretraining/checkpoint-*) or a list; null: 3. solver.damping: training needs the last one alone"""
    max_growth: Positive | None = None
    """refuse a run whose adjoint grows by more than this factor; null: a limit by the dtype"""
    curvature: Literal[tuple(CURVATURES)] | Dotted = "gauss_newton"  # type: ignore[valid-type]
    """gauss_newton is positive semi-definite; hessian is exact, for models at a minimum; ekfac approximates
    gauss_newton by two passes over the rows in all; auto: gauss_newton, or ekfac where a solve would take more than an
    hour per test row; or a class of your own"""
    curvature_samples: Count | None = None
    """number of random rows on which the curvature is estimated; null: all rows"""
    solver: Solver = Solver()
    batch_size: Count = 64
    """inputs of the model per batch in passes over the data: rows, or their masks"""
    mask_rounds: Count | None = 1
    """rounds of masks per row of a masked-lm in curvature and scores: each masks every word once, by eight masks;
    null: the masks of training, which are taken anyway where the stage is polished or unrolled"""
    resized: bool = False
    """accept embeddings that gained rows since the stage before"""
    skip_checks: list[Literal[tuple(CHECKS)]] = []  # type: ignore[valid-type]  # the names in a table
    """checks that are left out when the stage is bound; msif diagnose tells what each of them finds"""

    @property
    def recorded(self) -> bool:
        """Whether the stage's training run is recorded, to go back through it."""
        return self.link == "unrolled"

    @property
    def kept_checkpoints(self) -> int:
        """How many of the Trainer's checkpoints are kept when the stage is trained here."""
        if self.run is not None or isinstance(self.checkpoints, (str, list)):
            return 0
        if self.link == "segments":
            return self.checkpoints or SEGMENTS
        return int(self.solver.damping == "training")

    @property
    def uses_trainer(self) -> bool:
        """Whether a `Trainer` trains the stage: yes, unless it has settings of `polish` and none of `training`."""
        return bool(self.training) or self.polish is None


class Tests(Section):
    """The predictions that are explained: texts of your own, or rows of the last stage's test side."""

    text: str | Annotated[list[str], Field(min_length=1)] | None = None
    """texts that are in no data set, one or a list, in the place of rows of the test side"""
    file: str | None = None
    """a file of such texts: one per line (.txt), or a table (.csv, .tsv, .jsonl, .parquet) with the columns of the
    last stage's data; without a label column, label counts"""
    label: Scalar = None
    """label of the texts; null: the class that the model predicts"""

    number: Count = 3
    """number of random rows"""
    ids: Annotated[list[int | str], Field(min_length=1)] | None = None
    """example ids of the rows, in the place of random rows"""
    seed: Seed = 0
    """seed of the random rows"""
    aggregate: Literal["none", "sum", "mean"] = "none"
    """none: one column per test example; sum or mean: one column for all of them"""
    replicates: Annotated[int, Field(ge=1, le=1000)] = 2
    """how often everything is done with other masks and another part of the curvature_samples, for error bars; 1: no
    error bars"""
    measurement: Literal["loss", "log_probability", "logit_margin", "span_log_probability"] | Dotted = "loss"
    """what is explained of each test row: its loss; the log-probability or the logit margin of a class; the
    log-probability of words that a language model predicts; or a function of your own, (call, batch) -> one number per
    row"""
    of: int | str | None = None
    """of log_probability and logit_margin the class, or predicted, the one that the model predicts (null: the row's
    label); of span_log_probability the words"""
    wrong: bool = False
    """only rows that the finetuned model classifies wrongly"""
    split: Literal["train", "test"] | None = None
    """which rows of the last stage: test, those that its data set aside; train, those that it is trained on, where
    that is meant; null: test"""

    @property
    def gives_texts(self) -> bool:
        """Whether the test rows are texts of the user's own."""
        return self.text is not None or self.file is not None

    @model_validator(mode="after")
    def _fits_together(self) -> Tests:
        ways = [name for name in ("text", "file", "ids", "wrong", "split") if getattr(self, name) not in (None, False)]
        if self.gives_texts and len(ways) > 1:
            raise InputError(
                f"test.{ways[0]} and test.{ways[1]} are both set; expected one of them: texts of your own, or rows of "
                "the test side."
            )
        if self.label is not None and not self.gives_texts:
            raise InputError(
                f"test.label is {self.label!r}, which is for texts of your own, but there is no test.text or "
                "test.file; expected one of these: rows of the test side have their own labels."
            )
        if self.of is not None and (self.measurement == "loss" or is_dotted(self.measurement)):
            raise InputError(
                f"test.of is {self.of!r}, which is for log_probability, logit_margin and span_log_probability; "
                f"test.measurement is {self.measurement}."
            )
        if self.measurement == "span_log_probability" and not isinstance(self.of, str):
            raise InputError(f"test.of is {self.of!r}; test.measurement: span_log_probability expects the words.")
        return self


class Corpus(Section):
    """The rows that are ranked."""

    stage: str | None = None
    """the stage whose rows are ranked; null: the first. Files about another one have its name: scores-NAME.parquet"""
    sample: Count | None = None
    """number of random rows of that stage; null: all rows"""
    seed: Seed = 0
    """seed of the random rows"""
    dtype: Literal["float32", "tf32", "bfloat16"] | None = None
    """precision of scoring; null: the model's own. tf32 (matrix products on a GPU) and bfloat16 are compared with the
    model's own on a few rows, and the error is printed"""
    method: Literal["auto", "forward", "layerwise"] = "auto"
    """how rows are scored, exact in any case: forward mode per column, or the gradients of rows layer by layer for all
    columns at once; auto: the latter from two columns on"""
    mask_rounds: Count | Literal["auto"] | None = None
    """rounds of masks per row, with --keep of the rows that are kept alone; null: those of the stage; auto: doubled
    until masks have at most 5 % of the variance between rows"""
    norms: Literal["gradient", "self"] | None = None
    """norms for the orders of relative influence, of an implicit stage's rows: gradient, for --by relative; self, for
    --by self_relative as well, with a fit of EK-FAC; null: neither"""
    part_rows: Count = 4096
    """rows per part while scoring is under way; an interruption loses the rows in hand: sixteen batches per process,
    or one part"""


class Validation(Section):
    """Which rows `msif validate` removes, and how it trains again."""

    experiment: Literal["leave_one_out", "remove_groups", "datamodelling_score", "remove_top"] = "leave_one_out"
    """leave_one_out: single rows of the largest absolute influence; remove_groups: groups along the ranking;
    datamodelling_score: random subsets (LDS); remove_top: the rows that help most, against random ones"""
    truth: Literal["own", "expected"] = "own"
    """own: what the trained run itself does without the rows; expected: what training does without them in the mean
    over other starts"""
    starts: Annotated[int, Field(ge=2, le=10_000)] = 8
    """expected: number of other starts, each of which trains all stages again; an even number halves best for the
    ceiling"""
    vary: Annotated[list[Literal["weights", "order"]], Field(min_length=1)] = ["weights"]
    """from_scratch: what another start draws anew: initial weights, and the order of the batches (with dropout)"""
    retrain: Literal["warm_start", "from_scratch"] | None = None
    """warm_start polishes the trained stages again, or repeats the runs of unrolled stages; from_scratch repeats
    `training` and `polish` from new weights; null: warm_start for the own truth, from_scratch for the expected one"""
    examples: Annotated[int, Field(ge=3, le=LARGEST)] = 100
    """leave_one_out: number of rows"""
    groups: Annotated[int, Field(ge=3, le=LARGEST)] = 20
    """remove_groups: number of groups, evenly spread from the most helpful rows to the most harmful rows"""
    group_size: Count = 10
    """remove_groups: rows per group"""
    subsets: Annotated[int, Field(ge=3, le=LARGEST)] = 100
    """datamodelling_score: number of random subsets"""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """datamodelling_score: share of the rows in a subset"""
    top_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """remove_top: share of the rows that is left out"""
    draws: Annotated[int, Field(ge=2, le=LARGEST)] = 20
    """remove_top: number of draws of as many random rows"""
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    """own: seeds of the retrainings that are averaged; null: one retraining that starts as the run did"""
    ceiling_seeds: list[Seed] | None = None
    """own: seeds of a second measurement, whose correlation with the first is the ceiling; null: the start of the run
    moved by 1e-6; []: no second measurement"""
    baselines: list[str] | None = None
    """names of functions in `hf_msif.validation` (identity, gradient_dot, tfidf, ...); null: all that apply;
    []: none"""

    @property
    def way(self) -> Literal["warm_start", "from_scratch"]:
        """How stages are trained again."""
        return self.retrain or ("warm_start" if self.truth == "own" else "from_scratch")

    @model_validator(mode="after")
    def _fits_together(self) -> Validation:
        if self.truth == "expected":
            if self.retrain == "warm_start":
                raise InputError(
                    "validation.retrain is warm_start, which goes on from the finished models, but validation.truth "
                    "is expected, a mean over other starts; expected from_scratch, or truth: own."
                )
            if self.seeds is not None or self.ceiling_seeds is not None:
                raise InputError(
                    "validation.seeds and ceiling_seeds are those of truth: own; for truth: expected, give the number "
                    "of validation.starts."
                )
        return self


class Cleanse(Section):
    """Which rows `msif cleanse` leaves out, and whether it trains again to measure the gain."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the ranked stage's rows to leave out: the most harmful rows, and as many random rows as a control"""
    seeds: Count = 1
    """number of repetitions, each with its own initial weights, test rows and random rows, for the interval"""
    retrain: Literal["no", "warm_start", "from_scratch"] = "no"
    """whether and how to train again without the rows, to measure the loss on test rows that the ranking did not
    see"""
    held_out: Count | None = None
    """number of those test rows; null: all"""


class Config(Section):
    """A whole run."""

    run_dir: str
    """folder to which everything is written"""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; needed by tasks with texts"""
    stages: Annotated[dict[str, StageConfig], Field(min_length=1)]
    """name → stage, from first to last"""
    test: Tests = Tests()
    corpus: Corpus = Corpus()
    validation: Validation = Validation()
    cleanse: Cleanse = Cleanse()
    dampings: Annotated[list[Positive], Field(min_length=1)] | Literal["auto"] = "auto"
    """values of λ that `msif sweep` compares, for the ranked stage; auto: 1e-4 to 1 times the largest eigenvalue"""
    seed: Seed = 0
    """seed of training and of the masks"""
    sharded: bool = False
    """each process holds a slice of the solver's vectors, so that their memory falls with the number of processes"""
    memory_check: bool = True
    """refuse a query before it starts where its vectors and activations cannot fit into memory"""
    trackers: list[str] = []
    """trackers of Accelerate (tensorboard, wandb, ...): they log residuals of solvers and rows scored per second"""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """number of CPU threads; null: PyTorch's choice. 1 is the fastest for models of a few thousand parameters"""
