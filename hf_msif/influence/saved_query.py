"""The files of a saved query: what they hold, how they are read, and when they are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from ..engine.files import checked_value, load_tensors, nested_keys, read_json
from ..engine.hashing import digest, tensors_fingerprint
from ..errors import FileError, InputError, first_line
from ..scoring.noise import Noise
from ..vectors import Block
from .replicates import load

if TYPE_CHECKING:
    from .chain import BoundStage, Chain
    from .differentiation import StageSolution

FORMAT = 6
FILES = ("query.safetensors", "query.json")
AGAIN = "query again"


class SavedStage(TypedDict):
    """What query.json holds of a stage; the differentiation adds facts of its own."""

    __pydantic_config__ = ConfigDict(extra="ignore")  # type: ignore[misc]  # not that of the query

    solve: dict[str, Any]
    text: str
    link: str
    N: float
    examples: int
    objective: dict[str, Any]
    noise: NotRequired[dict[str, Any] | None]


class SavedQuery(TypedDict):
    """What query.json holds, beside `sha256` of all of it; `tensors` is the fingerprint of query.safetensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # read by pydantic

    format: int
    tests: list[dict[str, Any]]
    aggregate: Literal["sum", "mean"] | None
    losses: list[float]
    measurement: str
    values: list[float]
    predictions: list[dict[str, Any]]
    stages: dict[str, SavedStage]
    depends_on: dict[str, dict[str, Any]]
    tensors: str


def _damaged(folder: Path, why: str) -> InputError:
    return InputError(f"{folder} holds no whole query ({why}); expected what `save_pretrained` wrote: {AGAIN}.")


def read(folder: Path) -> dict[str, Any]:
    """What query.json holds, as it was written.

    Raises:
        InputError: there is none, it was written in another format, or it is not as it was written.
    """
    path = folder / "query.json"
    if not path.is_file():
        raise InputError(
            f"{folder} holds no query; expected query.json and query.safetensors as `save_pretrained` writes."
        )
    try:
        state = read_json(path, Any, AGAIN)
        if not isinstance(state, dict) or "format" not in state:
            raise _damaged(folder, "query.json does not say its format")
        if state["format"] != FORMAT:
            raise InputError(
                f"{folder} was written in format {state['format']!r}; this version reads {FORMAT}: {AGAIN}."
            )
        if state.pop("sha256", None) != digest(state):
            raise _damaged(folder, "query.json was changed after it was written: its checksum differs")
        checked_value(state, SavedQuery, path, AGAIN)
    except FileError as error:
        raise _damaged(folder, str(error).removesuffix(f": {AGAIN}.")) from error
    except RecursionError as error:
        raise _damaged(folder, "query.json is nested too deep") from error
    if set(state["depends_on"]) != set(state["stages"]):
        raise _damaged(folder, "query.json does not say of every stage on what it depends")
    return state


def read_tensors(folder: Path, state: dict[str, Any], chain: Chain) -> dict[str, Block]:
    """The tensors of every stage, on the device of the chain.

    Raises:
        InputError: query.safetensors is not the file that was written with query.json.
    """
    path = folder / "query.safetensors"
    if not path.is_file():
        raise _damaged(folder, "there is no query.safetensors")
    try:
        tensors, _ = load_tensors(path)
    except FileError as error:
        raise _damaged(folder, str(error).rstrip(".")) from error
    if tensors_fingerprint(tensors) != state["tensors"]:
        raise _damaged(folder, "query.safetensors is not the file that was written with query.json: its values differ")
    by_stage = nested_keys({key: t.to(chain.engine.device) for key, t in tensors.items()})
    unknown = sorted(set(by_stage) - set(state["stages"]))
    if unknown:
        raise _damaged(folder, f"query.safetensors has tensors of {unknown[0]!r}, which is no stage in query.json")
    return by_stage


def solution(bound: BoundStage, tensors: Block, state: dict[str, Any], folder: Path) -> StageSolution:
    """The saved solution of a stage.

    Raises:
        InputError: tensors or certificate are not those of a solution of this stage for the query's tests.
    """
    saved = state["stages"][bound.name]
    try:
        found = load(bound.differentiation, tensors, saved["solve"])
        if saved.get("noise"):
            Noise.from_dict(saved["noise"])
        _check_solution(found, state, bound.name, folder)
    except InputError:
        raise
    except Exception as error:  # of a differentiation, which may be the user's own
        raise _damaged(folder, f"the solution of stage {bound.name!r} cannot be read: {first_line(error)}") from error
    return found


def _check_solution(solution: StageSolution, state: dict[str, Any], stage: str, folder: Path) -> None:
    """Refuses a solution that does not answer the query's tests, or holds NaN or inf."""
    columns = 1 if state["aggregate"] else len(state["tests"])
    lengths = {len(state[name]) for name in ("losses", "values", "predictions")}
    if solution.columns != columns or lengths != {len(state["tests"])}:
        raise _damaged(folder, f"{solution.columns} columns of stage {stage!r} for {len(state['tests'])} tests")
    for name, t in solution.tensors().items():
        if not t.is_floating_point():
            raise _damaged(folder, f"{name!r} of stage {stage!r} holds {t.dtype}")
        if not t.isfinite().all():
            raise _damaged(folder, f"{name!r} of stage {stage!r} holds NaN or inf")


def check_unchanged(bound: BoundStage, saved: dict[str, Any], folder: Path) -> None:
    """Refuses a saved query if anything of the stage that it depends on has changed since; all changes are named."""
    present = bound.identity
    names = [name for name in {**saved, **present} if saved.get(name) != present.get(name)]
    if not names:
        return
    changes = [_change(name, saved.get(name), present.get(name)) for name in names[:3]]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    raise InputError(
        f"stage {bound.name!r} is not as it was when the query in {folder} was made ({'; '.join(changes)}{more}): "
        "query again, or undo the change."
    )


def _change(name: str, before: Any, now: Any) -> str:
    """One difference in words; digests are not shown."""
    if any(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in (before, now)):
        return f"{name} {'differ' if name == 'the data' else 'differs'}"
    return f"{name} was {before!r} and is {now!r}"
