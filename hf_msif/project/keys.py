"""A configuration as flat dotted keys with plain values, and the keys on which a model or a query depends.

All keys are read off the schema, so that a new setting counts unless it is named here as one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ..training.settings import decides_weights
from .schema import Config, Section, StageConfig
from .tasks import task_of

# Keys below stages.NAME that do not change the trained model: how it is differentiated, how fast rows are read, what
# is accepted. A key stands for all keys below it.
NOT_OF_THE_MODEL = (
    *("batch_size", "curvature", "curvature_samples", "solver", "max_growth", "run", "resized", "skip_checks"),
    "data.streaming",
)
# Keys on which a query does not depend: where and how fast it is computed, what is done with it later.
NOT_OF_THE_QUERY = (
    *("run_dir", "threads", "sharded", "memory_check", "trackers"),
    *("dampings", "corpus", "validation", "cleanse"),
)
NOT_OF_THE_QUERY_BY_STAGE = ("batch_size", "max_growth", "skip_checks")

MOST_VALUES = 10_000  # of a configuration; larger ones are not compared in full
DEEPEST = 50
MISSING = object()  # in the place of a value that is not set


def flat_settings(config: Config) -> dict[str, Any]:
    """Dotted key → plain value of a whole configuration.

    Mappings are keys of their own, down to their values. What is recursive, or too large, is replaced by a sentence.
    """
    return {key: value for name, item in _items(config) for key, value in _flat(name, item, [MOST_VALUES], ())}


def _items(section: BaseModel) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        yield name, getattr(section, name)
    yield from (section.model_extra or {}).items()


def _flat(key: str, value: Any, budget: list[int], above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        for name, item in _items(value):  # each with a budget of its own: a huge value must not hide the others
            yield from _flat(f"{key}.{name}", item, [MOST_VALUES], above)
        return
    reason = _not_comparable(value, budget, above) if isinstance(value, Mapping) else None
    if reason or not (isinstance(value, Mapping) and value):
        yield key, reason or _plain(value, budget, above)
        return
    for name, item in value.items():
        yield from _flat(f"{key}.{name}", item, budget, (*above, id(value)))


def _plain(value: Any, budget: list[int], above: tuple[int, ...]) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, (str, int, float, type(None))):
        budget[0] -= 1
        return value
    reason = _not_comparable(value, budget, above)
    if reason:
        return reason
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(item, budget, above) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, budget, above) for item in value]
    return str(value)


def _not_comparable(value: Any, budget: list[int], above: tuple[int, ...]) -> str | None:
    budget[0] -= 1
    if id(value) in above:
        return "a value that holds itself"
    if len(above) >= DEEPEST:
        return "a value that is nested too deeply"
    return f"a value beyond the first {MOST_VALUES:,}" if budget[0] < 0 else None


def _is_below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_passing_argument(key: str) -> bool:
    """Whether the key below a stage is a training argument that does not change the weights."""
    section, _, name = key.partition(".")
    return section == "training" and not decides_weights(name.partition(".")[0])


def model_settings(config: Config, name: str) -> dict[str, Any]:
    """Key → value of the settings that decide the trained model of a stage."""
    stage = config.stages[name]
    settings = {}
    for key, value in flat_settings(config).items():
        prefix = f"stages.{name}."
        below = key.removeprefix(prefix)
        if key.startswith(prefix):
            decides = not _is_below(below, NOT_OF_THE_MODEL) and not _is_passing_argument(below)
        else:
            decides = key == "seed" or (key == "tokenizer" and _reads_texts(stage, name))
        if decides:
            settings[key] = value
    # Only whether the run is recorded, and how much of it is kept, matters to training, and it does not tie to an α
    # that is estimated later.
    if not stage.recorded:
        settings[f"stages.{name}.link"] = "implicit"
    settings[f"stages.{name}.checkpoints"] = stage.kept_checkpoints or None
    if stage.alpha == "auto":
        settings[f"stages.{name}.alpha"] = None
    return settings


def query_settings(config: Config) -> dict[str, Any]:
    """Key → value of the settings on which a query depends."""
    settings = {}
    for key, value in flat_settings(config).items():
        if key.startswith("stages."):
            below = key.split(".", 2)[2]
            if _is_below(below, NOT_OF_THE_QUERY_BY_STAGE) or _is_passing_argument(below):
                continue
        elif _is_below(key, NOT_OF_THE_QUERY):
            continue
        settings[key] = value
    return settings


def _reads_texts(stage: StageConfig, name: str) -> bool:
    return task_of(stage.task, f"stages.{name}.task").needs_tokenizer


def default(key: str) -> Any:
    """The default of a key of the configuration as a plain value; MISSING where it has none."""
    parts = key.split(".")
    kind: type[Section] = Config
    if parts[0] == "stages":
        parts, kind = parts[2:], StageConfig
    for depth, part in enumerate(parts, 1):
        known = kind.model_fields.get(part)
        if known is None:
            return MISSING
        if isinstance(known.annotation, type) and issubclass(known.annotation, Section):
            kind = known.annotation
        elif depth < len(parts) or known.is_required():
            return MISSING
        else:
            return _plain(known.get_default(call_default_factory=True), [MOST_VALUES], ())
    return MISSING
