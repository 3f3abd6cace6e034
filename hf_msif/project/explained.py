"""The rows whose predictions a query explains: texts of one's own, or rows of the last stage's test side."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Protocol

from ..engine.hashing import digest
from ..errors import InputError
from ..registry import builder_of
from .data import content_key, load_rows
from .schema import Config, Data
from .sources import load_table
from .tasks import Task

if TYPE_CHECKING:
    from ..engine.stream import Stream


class Run(Protocol):
    """What is asked of a `run.Run`."""

    config: Config
    names: list[str]
    tasks: dict[str, Task]

    def rows(self, name: str, part: str | None = None) -> list[dict] | Stream: ...

    def content(self, name: str) -> str: ...

    def model(self, name: str) -> Any: ...

    def objective(self, name: str, model: Any) -> Any: ...


def rows(run: Run) -> list[dict]:
    """The test rows, as the section `test` of a configuration chooses them.

    Raises:
        InputError: `test.ids` that are no rows of the test side, more rows than it has, or texts that are no rows of
            the last stage's task.
    """
    settings = run.config.test
    if settings.gives_texts:
        return _labelled(run, _texts(run))
    name, candidates = run.names[-1], side(run)
    if settings.ids is not None:
        by_id = {str(row["example_id"]): row for row in candidates}
        missing = [i for i in settings.ids if str(i) not in by_id]
        if missing:
            raise InputError(
                f"test.ids names {missing}, which are not rows of the test side of stage {name!r}; its ids are "
                f"{list(by_id)[:5]}, ..."
            )
        return [by_id[str(i)] for i in settings.ids]
    if settings.wrong:
        candidates = _misclassified(run, name, candidates)
    content = run.content(name)
    place = content_key(run.config.stages[name].data, content)
    distinct = list({digest(row[place]): row for row in candidates}.values())
    if settings.number > len(distinct):
        raise InputError(
            f"test.number is {settings.number}; expected at most {len(distinct)}, the distinct {content}s on the "
            f"test side of stage {name!r}{' that the model classifies wrongly' if settings.wrong else ''}."
        )
    return random.Random(settings.seed).sample(distinct, settings.number)


def side(run: Run) -> list[dict] | Stream:
    """All rows of the last stage that `test.split` names: those that are set aside, or its training rows.

    Raises:
        InputError: no rows are set aside from training, and `test.split` does not say that training rows are meant.
    """
    return run.rows(run.names[-1], checked_part(run))


def checked_part(run: Run) -> str | None:
    """Which `data.part` of the last stage the test rows are; None for its own, or for texts of one's own. Raises as
    `side` does, before any row is loaded."""
    name, split = run.names[-1], run.config.test.split
    data = run.config.stages[name].data
    if split == "train" or run.config.test.gives_texts:
        return None
    if data.has_test_side and not data.trains_on_test_side:
        return "test"
    key = f"stages.{name}.data"
    why = f"{key} sets no rows aside"
    if data.has_test_side:
        why = f"{key}.part is {data.part!r}"
        if data.part == "train":
            why = f"{key}.test_split names the rows of {key}.split"
    raise InputError(
        f"{why}, so the test rows would be rows that stage {name!r} is trained on; expected {key}.test_fraction or "
        f"{key}.test_split (and part: train), test.text with texts of your own, or test.split: train where training "
        "rows are meant."
    )


def _texts(run: Run) -> list[dict]:
    """The rows of `test.text` or `test.file`, their labels where they have some."""
    settings, name = run.config.test, run.names[-1]
    if run.content(name) != "text" or run.tasks[name].columns:
        raise InputError(
            f"test.{'file' if settings.text is None else 'text'} gives texts, but the task "
            f"{run.config.stages[name].task} of stage {name!r} does not read one text per row; expected test.ids or "
            "test.number: rows of its data."
        )
    if settings.text is not None:
        texts = [settings.text] if isinstance(settings.text, str) else settings.text
        return [{"example_id": f"text-{i}", "text": text} for i, text in enumerate(texts)]
    assert settings.file is not None
    return _rows_of_file(run, settings.file)


def _rows_of_file(run: Run, file: str) -> list[dict]:
    """The rows of a file, with labels where it has the label column of the last stage's data."""
    name, key = run.names[-1], "test.file"
    stage = run.config.stages[name]
    is_text = builder_of(file) == "text"
    data = Data(path=file, text_column="text" if is_text else stage.data.text_column)
    try:
        known = load_table(data, "train", f"stages.{name}.data").column_names
        if stage.data.label_column in known and run.tasks[name].label_kind is not None:
            data = data.model_copy(update={"label_column": stage.data.label_column})
        return load_rows(data, name)
    except InputError as error:
        text = str(error).replace(f"stages.{name}.data.path", key).replace(f"stages.{name}.data", key)
        raise InputError(text) from error


def _labelled(run: Run, rows: list[dict]) -> list[dict]:
    """The rows with labels: their own, that of `test.label`, or the class that the model predicts."""
    settings, name = run.config.test, run.names[-1]
    kind = run.tasks[name].label_kind
    if kind is None or all("label" in row for row in rows):
        return rows
    if settings.label is not None:
        return [{**row, "label": settings.label} for row in rows]
    if kind != "class":
        raise InputError(
            f"the texts of test.text or test.file have no label, and stage {name!r} ({run.config.stages[name].task}) "
            "predicts no one class that could stand for it; expected test.label, or a file with a label column."
        )
    from ..training.evaluation import predicted

    model = run.model(name)
    objective = run.objective(name, model)
    any_label: Any = (objective.labels or (0,))[0]
    numbers = predicted(model, objective, [{**row, "label": any_label} for row in rows])
    labels = objective.labels or range(max(numbers) + 1)
    print("the test texts have no label: the class that the model predicts counts as theirs (test.label: another)")
    return [{**row, "label": labels[number]} for row, number in zip(rows, numbers, strict=True)]


def _misclassified(run: Run, name: str, rows: list[dict] | Stream) -> list[dict]:
    """Those of the rows that the trained model of the stage classifies wrongly."""
    from .. import training

    model = run.model(name)
    objective = run.objective(name, model)
    if objective.predictions is None:
        raise InputError(f"test.wrong is for classification; stage {name!r} has another task.")
    return training.mistakes(model, objective, rows, run.config.stages[name].batch_size)
