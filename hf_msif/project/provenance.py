"""What a trained model and a query depend on, as they record it; and the refusal of what was made otherwise.

A record holds settings by dotted key and contents by digest. Where a content is known by its digest, the keys that say
where it lies count only if it differs: a project may be moved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..adapters.fingerprint import model_fingerprint
from ..engine import folders
from ..engine.hashing import tokenizer_fingerprint
from ..errors import InputError
from .keys import MISSING, default, model_settings, query_settings
from .schema import Config
from .tasks import Task

if TYPE_CHECKING:
    from ..influence.chain import Chain

SHOWN = 3  # differences in a message
STAGE_BEFORE = "the stage before"  # the content of its weights
STREAMED = "stream "  # begins the digest of a stream, which that of rows in memory cannot be compared with


class Run(Protocol):
    """What is asked of a `run.Run`."""

    config: Config
    folder: Path
    names: list[str]
    tasks: dict[str, Task]
    tokenizer: Any

    def rows_digest(self, name: str) -> str | None: ...

    def fingerprint(self, name: str) -> str: ...

    def new_model(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Record:
    """What something depends on.

    Attributes:
        settings: dotted key → plain value.
        contents: what → digest.
    """

    settings: dict[str, Any]
    contents: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Record | None:
        """The record among the facts of a marker; None where there is none."""
        if not all(isinstance(facts.get(key), dict) for key in ("settings", "contents")):
            return None
        return cls(facts["settings"], facts["contents"])


@dataclass(frozen=True)
class Difference:
    """A key whose value changed, or a content; `before` and `now` are MISSING where a key was or is not set."""

    key: str
    before: Any = MISSING
    now: Any = MISSING
    is_content: bool = False


# --- records, and what changed since


def model_record(run: Run, name: str) -> Record:
    """What the model of a stage depends on, if it is trained now. The stage before must be trained."""
    contents = _contents(run, [name])
    index = run.names.index(name)
    if index:
        contents[STAGE_BEFORE] = run.fingerprint(run.names[index - 1])
    return Record(model_settings(run.config, name), contents)


def query_record(run: Run) -> Record:
    """What a query depends on, if it is made now, beside the models."""
    return Record(query_settings(run.config), _contents(run, run.names))


def _contents(run: Run, names: list[str]) -> dict[str, str]:
    """Digests of the stages' rows, and of the tokenizer where one of the stages reads texts."""
    contents = {}
    for name in names:
        rows = run.rows_digest(name)
        if rows is not None:
            contents[f"stages.{name}.data"] = rows
    if run.tokenizer is not None and any(run.tasks[name].needs_tokenizer for name in names):
        contents["tokenizer"] = tokenizer_fingerprint(run.tokenizer)
    return contents


def weights_fingerprint(model: Any) -> str:
    """SHA-256 of all that a model computes: parameters, buffers, configuration, adapters."""
    return model_fingerprint(model)


def changes(before: Record, now: Record, content_of: Callable[[str], str | None]) -> list[Difference]:
    """What differs between two records.

    Args:
        before, now: the records.
        content_of: key → the content that the key only helps to find; None: the key counts by itself.
    """
    differences, explained = [], set()
    for key in dict.fromkeys([*now.settings, *before.settings]):
        old = before.settings.get(key, default(key))  # the setting may be younger than the record
        new = now.settings.get(key, MISSING)
        if _same(old, new) or _is_told_below(key, new, now.settings) or _is_told_below(key, old, before.settings):
            continue
        content = content_of(key)
        old_digest, new_digest = (record.contents.get(content or "") for record in (before, now))
        if old_digest is not None and old_digest == new_digest:
            continue
        explained.add(content)
        differences.append(Difference(key, old, new))
    for content in dict.fromkeys([*now.contents, *before.contents]):
        digests = [record.contents.get(content) for record in (before, now)]
        # Some streams have none; that a stage had none before it is a difference.
        known = content == STAGE_BEFORE or None not in digests
        if known and len({digest.startswith(STREAMED) for digest in digests if digest is not None}) > 1:
            known = False
        if known and digests[0] != digests[1] and content not in explained:
            differences.append(Difference(content, is_content=True))
    return differences


def _same(old: Any, new: Any) -> bool:
    return old is new or old == new or (MISSING not in (old, new) and repr(old) == repr(new))  # NaN


def _is_told_below(key: str, value: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a key is not set because keys below it are: a mapping in the place of null."""
    return value is MISSING and any(other.startswith(f"{key}.") for other in settings)


# --- refusals


def check_model(run: Run, name: str) -> None:
    """Refuses the model in a run folder that was not trained by the present configuration.

    Raises:
        InputError: names the settings, or the content, that changed.
    """
    folder = run.folder / name
    way_out = f"train the stage again (msif train --stage {name}), or give another run_dir"
    before = _model_record_of(folder)
    if before is None:
        raise InputError(
            f"{folder} holds a model that msif train did not write: give stages.{name}.model.path: {folder} to take "
            "it as it is, or another run_dir."
        )
    differences = model_changes(run, name, before)
    contents = [difference.key for difference in differences if difference.is_content]
    settings = [difference for difference in differences if not difference.is_content]
    if settings:
        old, new = _lists(settings)
        raise InputError(f"{folder} was trained with {old}; the configuration says {new}: undo the change, {way_out}.")
    if f"stages.{name}.data" in contents:
        raise InputError(f"{folder} was trained on other rows than stages.{name}.data has now: {way_out}.")
    if "tokenizer" in contents:
        raise InputError(f"{folder} was trained with another tokenizer than {run.config.tokenizer} is now: {way_out}.")
    if contents:
        index = run.names.index(name)
        present = f"the present one of {run.names[index - 1]!r}" if index else "none, as it is the first stage now"
        raise InputError(
            f"{folder} was trained on another model of the stage before than {present} (trained again, or replaced, "
            f"since): {way_out}."
        )


def model_changes(run: Run, name: str, before: Record) -> list[Difference]:
    """What changed since the stage's model was trained."""

    def content_of(key: str) -> str | None:
        if key.startswith(f"stages.{name}.data."):
            return f"stages.{name}.data"
        return "tokenizer" if key == "tokenizer" else None

    return changes(before, model_record(run, name), content_of)


def is_outdated(run: Run, name: str) -> bool:
    """Whether the model in the run folder was trained by another configuration, or by something else."""
    before = _model_record_of(run.folder / name)
    return before is None or bool(model_changes(run, name, before))


def _model_record_of(folder: Path) -> Record | None:
    marker = folders.read_marker(folder)
    return None if marker is None else Record.of_facts(marker.facts)


def check_weights(run: Run, name: str) -> None:
    """Refuses a model in a run folder whose weights are not those that `msif train` wrote."""
    folder = run.folder / name
    marker = folders.read_marker(folder)
    if marker is not None and marker.facts.get("weights") != run.fingerprint(name):
        raise InputError(
            f"{folder} holds another model (weights or config.json) than msif train wrote: put it back, "
            f"train the stage again (msif train --stage {name}), or give stages.{name}.model.path: {folder} to take "
            "the model as it is."
        )


def check_initial_weights(run: Run, name: str) -> None:
    """Refuses to train a stage from scratch again where `model.path` holds other weights than it was trained from.

    Raises:
        InputError: names the folder or Hub id.
    """
    path, marker = run.config.stages[name].model.path, folders.read_marker(run.folder / name)
    before = None if marker is None else marker.facts.get("initial")
    if path is not None and before is not None and weights_fingerprint(run.new_model(name)) != before:
        raise InputError(
            f"stages.{name}.model.path is {path!r}, which holds other weights now than those from which "
            f"{run.folder / name} was trained: put these back, or train the stage again (msif train --stage {name})."
        )


def check_query(run: Run, folder: Path, needed: bool = True) -> None:
    """Refuses a query that was made by another configuration.

    Args:
        run: the present configuration.
        folder: of the query.
        needed: whether a query without a record is refused too.

    Raises:
        InputError: names the settings that changed.
    """
    marker = folders.read_marker(folder)
    before = None if marker is None else Record.of_facts(marker.facts)
    if before is None:
        if needed:
            raise InputError(
                f"{folder} does not say by which settings it was made: msif query did not write it, or was "
                f"interrupted; move {folder} away and query again (msif query)."
            )
        return

    def content_of(key: str) -> str | None:
        place = re.match(r"(stages\.[^.]+\.data)\.(path|data_files)(\.|$)", key)
        if place:
            return place[1]
        return "tokenizer" if key == "tokenizer" else None

    # Contents as such, and models wherever they lie, are compared by `Query.from_pretrained`.
    differences = [
        d for d in changes(before, query_record(run), content_of) if not d.is_content and not _is_moved_model(d)
    ]
    if differences:
        first = differences[:SHOWN]
        each = "; ".join(
            f"{d.key} was {_word(d.before)} when {folder} was made and is {_word(d.now)} now" for d in first
        )
        more = f" (and {len(differences) - SHOWN} more settings changed)" if len(differences) > SHOWN else ""
        raise InputError(f"{each}{more}: query again (msif query), or undo the change.")


def _is_moved_model(difference: Difference) -> bool:
    """Whether a difference is only another place of a model."""
    places = (difference.before, difference.now)
    return bool(re.fullmatch(r"stages\.[^.]+\.model\.path", difference.key)) and all(
        isinstance(place, str) for place in places
    )


def check_query_content(run: Run, chain: Chain, tests: list[dict]) -> None:
    """Refuses to go on beside a query in the run folder about other tests, or made with other models or rows.

    `check_query` compares settings by their keys, before anything is loaded; this compares everything by content.

    Raises:
        InputError: names what changed.
    """
    from ..influence.query import Query

    folder = run.folder / "query"
    if (folder / "query.json").is_file():
        Query.check(folder, chain, tests)


def _lists(differences: list[Difference]) -> tuple[str, str]:
    """The first differences as they were and as they are."""
    first = differences[:SHOWN]
    old = ", ".join(
        f"{d.key} {_word(d.before)}" if d.before is MISSING else f"{d.key} = {_word(d.before)}" for d in first
    )
    more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return old + more, ", ".join(_word(d.now) for d in first) + more


def _word(value: Any) -> str:
    if value is MISSING:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
