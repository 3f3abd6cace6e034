"""What must fit together in a configuration, beyond the types of its keys: every misfit is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from .schema import FILE_BUILDERS, RESERVED, Config, Data, StageConfig
from .tasks import task_of

LONGEST_NAME = 100  # characters of a stage's name, which becomes part of names of files


def misfits(config: Config) -> Iterator[str]:
    """One sentence for everything that does not fit together.

    Raises:
        InputError: a task of the user's own cannot be imported.
    """
    names = list(config.stages)
    if config.corpus.stage not in (None, *names):
        yield f"corpus.stage is {config.corpus.stage!r}; expected one of the stages {names}."
    for index, name in enumerate(names):
        stage, key = config.stages[name], f"stages.{name}"
        if not re.fullmatch(r"[\w-]+", name) or name in RESERVED or len(name) > LONGEST_NAME:
            yield (
                f"{key[: LONGEST_NAME + 10]}: a stage is a folder beside run_dir/query; expected a name of at most "
                f"{LONGEST_NAME} letters, digits, - and _ other than {', '.join(map(repr, RESERVED))}."
            )
            continue
        task = task_of(stage.task, f"{key}.task")
        if task.needs_tokenizer and config.tokenizer is None:
            yield f"tokenizer is missing; {key} has the task {stage.task}, which reads texts."
        labelled = task.label_kind is not None
        if stage.data.label_from is not None and task.label_kind != "class":
            yield (
                f"{key}.data.label_from is {stage.data.label_from}, which gives each row one class, but {stage.task} "
                "has no classes of whole rows: leave it out."
            )
        yield from _of_files(stage.data, f"{key}.data")
        yield from _of_choice(stage.data, f"{key}.data")
        yield from _of_data(stage, key, is_first=not index, labelled=labelled)
        yield from _of_minimum(stage, key)
        yield from _of_run(stage, key)
        yield from _of_model(config, index, is_head_possible=bool(index) and labelled and task.content == "text")


def _of_files(data: Data, key: str) -> Iterator[str]:
    """Which files are read, and how."""
    if data.path in FILE_BUILDERS and data.data_files is None:
        yield f"{key}.data_files is missing; path {data.path!r} reads files and expects their names."
    if data.builder is not None and data.name is not None:
        yield (
            f"{key}.name is {data.name!r}, which is for Hub datasets; path {data.path!r} reads files: leave it out."
        )
    if data.names_file and data.data_files is not None:
        yield (
            f"{key} has data_files beside path {data.path!r}, which is a file itself; expected path: {data.builder} "
            "with data_files, or path alone."
        )
    if data.data_files is not None and not all(data.files or [""]):
        yield (
            f"{key}.data_files is {data.data_files!r}, which names no file; expected the names of files, or null for "
            "a Hub dataset."
        )
    set_keys = [name for name in ("separator", "column_names") if getattr(data, name) is not None]
    set_keys += [] if data.quotes else ["quotes"]
    if set_keys and data.builder != "csv":
        yield f"{key}.{set_keys[0]} is for CSV files; path {data.path!r} reads none: leave it out."
    if data.separator is not None and (
        len(data.separator) != 1 or not data.separator.isascii() or data.separator in '"\r\n'
    ):
        yield (
            f"{key}.separator is {data.separator!r}; expected one ASCII character such as ; or a tab, other than a "
            "quotation mark and a line break."
        )
    repeated = [name for name, count in Counter(data.column_names or ()).items() if count > 1]
    if repeated:
        yield f"{key}.column_names has {repeated[0]!r} twice; expected a name of its own for each column."
    if data.label_from == "files":
        yield from _of_file_groups(data, key)


def _of_file_groups(data: Data, key: str) -> Iterator[str]:
    """What `label_from: files` reads, and what it cannot be beside."""
    what = f"{key}.label_from is files"
    if data.builder is None or not isinstance(data.data_files, dict) or len(data.data_files) < 2:
        yield (
            f"{what}, which takes the keys of data_files for labels; expected path: text, csv, json or parquet and "
            "data_files: {CLASS: files, ...} with at least two classes."
        )
    if data.label_column is not None:
        yield f"{what} beside label_column {data.label_column!r}; expected one of them."
    if data.test_split is not None or data.split != "train":
        yield f"{what}, so data_files has no splits; expected test_fraction in the place of split and test_split."
    if data.streaming:
        yield f"{what} and streaming is true; expected streaming: false."


def _of_choice(data: Data, key: str) -> Iterator[str]:
    """Which rows are taken, and in which order."""
    if data.sample is not None and data.max_rows is not None:
        yield f"{key} has max_rows, the first N rows, and sample, N random rows; expected one of them."
    if data.shuffle and data.streaming:
        yield (
            f"{key}.shuffle is true and streaming, too: a stream is read in the order of its files; expected shuffle: "
            "false, or sample: N for N random rows."
        )
    if data.seed is not None and not data.draws:
        yield f"{key}.seed is {data.seed}, which only sample and shuffle read: leave it out."
    chosen = [name for name in ("max_rows", "sample", "shuffle") if getattr(data, name)]
    if chosen and data.part == "test":
        yield f"{key}.part is 'test', and the test side is always whole: leave {chosen[0]} out."


def _of_data(stage: StageConfig, key: str, is_first: bool, labelled: bool) -> Iterator[str]:
    """What the task and the place of a stage expect of its rows."""
    if stage.data.streaming and (not is_first or stage.curvature_samples is None or stage.data.has_test_side):
        yield (
            f"{key}.data.streaming is for a first stage with curvature_samples and without test_split or "
            "test_fraction; expected streaming: false, or those settings."
        )
    if stage.data.streaming and (stage.recorded or labelled):
        yield (f"{key}.data.streaming is for implicit stages of language models; expected streaming: false.")
    if stage.data.test_split is not None and stage.data.test_fraction > 0:
        yield f"{key}.data has test_split and test_fraction; expected one of them."
    if labelled and stage.data.label_source is None:
        yield f"{key}.data.label_column is missing; {stage.task} needs the column with the label."


def _of_minimum(stage: StageConfig, key: str) -> Iterator[str]:
    """What a polished stage, which is at a minimum, cannot be beside."""
    if (stage.mask_rounds or 1) > 1 and (stage.recorded or stage.polish is not None):
        yield (
            f"{key}.mask_rounds is {stage.mask_rounds}, but a stage with polish or link: unrolled has the "
            "masks of training in its influence, too: leave mask_rounds out."
        )
    if stage.recorded and stage.polish is not None:
        yield (
            f"{key} has polish and link: unrolled; expected one of them: an unrolled stage is what its "
            "training run left, a polished one is a minimum."
        )
    if stage.alpha == "auto" and stage.polish is not None:
        yield (
            f"{key} has polish and alpha: auto; expected α as a number: a polished stage is at the minimum "
            "that its α makes."
        )


def _of_run(stage: StageConfig, key: str) -> Iterator[str]:
    """What a differentiation reads of a training run."""
    damped_by_run = stage.solver.damping == "training"
    by_run, elsewhere = damped_by_run or stage.link == "segments", isinstance(stage.checkpoints, (str, list))
    what = f"{key}.solver.damping is 'training'" if damped_by_run else f"{key}.link is 'segments'"
    if damped_by_run and stage.link != "implicit":
        yield f"{what} and link is {stage.link!r}; expected link: implicit, which has a damping."
    if by_run and stage.polish is not None:
        yield f"{what}, for a model that a training run left; expected no polish, which moves it."
    if by_run and (stage.run is not None or elsewhere) and (stage.training or stage.model.path is None):
        yield (
            f"{what}, with {'checkpoints' if elsewhere else 'a run'} from elsewhere; expected "
            f"{key}.model.path, the model that this run left, and no training, which would move it."
        )
    if by_run and stage.run is None and not elsewhere and stage.model.path is not None and not stage.training:
        yield (
            f"{what}, but the run of {key}.model.path is not given; expected {key}.checkpoints, the folders "
            f"that its Trainer saved, or {key}.run, the folder of a recorded run."
        )
    if stage.checkpoints is not None and not (elsewhere and by_run) and stage.link != "segments":
        yield f"{key} has checkpoints, which need link: segments (or solver.damping: training)."
    if stage.link == "implicit" and (stage.max_growth is not None or (stage.run is not None and not by_run)):
        yield (
            f"{key} has run or max_growth, which need link: unrolled or segments (or run solver.damping: training)."
        )


def _of_model(config: Config, index: int, is_head_possible: bool) -> Iterator[str]:
    """Where the model of a stage comes from."""
    names = list(config.stages)
    stage, key = config.stages[names[index]], f"stages.{names[index]}"
    if index and stage.model.config is not None:
        yield (
            f"{key}.model.config is for the first stage, {names[0]!r}: later ones build on its encoder; leave it out."
        )
    if stage.model.lora is not None and not index:
        yield (
            f"{key}.model.lora is for later stages, whose encoder is inherited: leave it out, or put a "
            "stage with the pretrained model before it."
        )
    if index and stage.model.path is None and config.stages[names[index - 1]].model.lora is not None:
        yield (
            f"{key} would build on the encoder of {names[index - 1]!r}, which has adapters "
            f"(stages.{names[index - 1]}.model.lora); expected such a stage to be the last one."
        )
    if stage.recorded and stage.run is not None and stage.model.path is None:
        yield f"{key}.run needs {key}.model.path, the model that the run left."
    if stage.model.head == "feed_forward" and not is_head_possible:
        yield (
            f"{key}.model.head is 'feed_forward', which is for the classification of texts in a later stage; "
            "expected 'auto'."
        )
