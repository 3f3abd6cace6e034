"""Folders that the library writes: each says in a marker file which names in it are ours. The rest is the user's.

Nothing that the library did not write is deleted or replaced. The marker `.hf_msif.json` of a folder holds its kind,
patterns of the names that the library writes there, and facts about them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from ..errors import InputError
from .files import checked_value, read_json, write_json

MARKER = ".hf_msif.json"
FORMAT = 1
EVERYTHING = "**"  # of a folder that is being filled under a temporary name
# What a crash leaves of `files.write_atomically`: NAME.PID.part belongs to whom NAME belongs to.
UNFINISHED = re.compile(r"\.\d+\.part$")


class SavedMarker(TypedDict):
    """What `.hf_msif.json` holds."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # read by pydantic

    format: int
    kind: str
    names: list[str]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Marker:
    """What a folder says of itself.

    Attributes:
        kind: what the folder holds, in words.
        names: patterns, relative to the folder, of the files and folders in it that the library writes; each part of
            a path has its own pattern, as `fnmatch` reads it.
        facts: about the content; JSON-able.
    """

    kind: str
    names: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def covers(self, name: Path) -> bool:
        """Whether the library writes the path `name` (relative to the folder).

        >>> Marker("checkpoints", ("checkpoint-[0-9]*/*.bin",)).covers(Path("checkpoint-12/training_args.bin"))
        True
        """
        parts = Path(UNFINISHED.sub("", name.as_posix())).parts
        return any(_matches(parts, Path(pattern).parts) for pattern in self.names)


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if list(patterns) == [EVERYTHING]:
        return True
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None where it has none.

    Raises:
        InputError: the marker cannot be read, or was written in another format.
    """
    path, way_out = folder / MARKER, f"it says what msif wrote there; move {folder} away"
    if not path.is_file():
        return None
    state = read_json(path, dict[str, Any], way_out)
    if state.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path} was written in format {state['format']!r}; this version reads {FORMAT}: move {folder} away."
        )
    checked_value(state, SavedMarker, path, way_out)
    return Marker(state["kind"], tuple(state["names"]), state["facts"])


def write_marker(folder: Path, kind: str, names: Sequence[str], facts: Mapping[str, Any] | None = None) -> None:
    """Says of a folder, which is made if needed, what the library writes there. Other files in it are not touched."""
    state = {"format": FORMAT, "kind": kind, "names": list(names), "facts": dict(facts or {})}
    write_json(folder / MARKER, state)


def add_names(folder: Path, kind: str, names: Sequence[str]) -> None:
    """Says of a folder that the library writes these names there, too; the folder is made if needed."""
    marker = read_marker(folder) or Marker(kind, ())
    if not set(names) <= set(marker.names):
        write_marker(folder, marker.kind, [*dict.fromkeys([*marker.names, *names])], marker.facts)


def check(folder: Path) -> None:
    """Refuses a folder in which the library is to write, unless it is ours, empty, or still to be made.

    Raises:
        InputError: a file, or a folder with files and without a marker.
    """
    check_no_file(folder)
    if not folder.is_dir():
        return
    if read_marker(folder) is None and any(folder.iterdir()):
        first = min(path.name for path in folder.iterdir())
        raise InputError(
            f"{folder} holds {first}, which msif did not write, but msif writes a folder of that name: move {folder} "
            "away."
        )


def check_no_file(folder: Path) -> None:
    """Refuses a file at the place of a folder.

    Raises:
        InputError: there is a file, or a link that leads nowhere.
    """
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise InputError(f"{folder} is a file, but msif writes a folder of that name: move the file away.")


def check_replaceable(folder: Path) -> None:
    """As `check`, for a folder that is to be replaced as a whole: it must hold nothing else.

    Raises:
        InputError: also a folder of ours that holds files of the user's.
    """
    check(folder)
    foreign = foreign_files(folder)
    if foreign:
        raise InputError(f"{folder} holds {foreign[0]}, which msif did not write: move it away.")


def foreign_files(folder: Path) -> list[Path]:
    """The paths, relative to a folder of ours, of everything in it that the library did not write, sorted."""
    marker = read_marker(folder)
    if marker is None:
        return []
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.relative_to(folder) != Path(MARKER) and not _is_ours(path, folder, marker)
    )


def _is_ours(path: Path, folder: Path, marker: Marker) -> bool:
    name = path.relative_to(folder)
    if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
        return True  # what is in it is asked for itself
    return marker.covers(name)


def unfinished_files(folder: Path) -> list[Path]:
    """What crashes left of files that the library was writing to a folder of ours."""
    marker = read_marker(folder)
    if marker is None:
        return []
    return [p for p in folder.iterdir() if UNFINISHED.search(p.name) and marker.covers(Path(p.name))]


def remove(folder: Path) -> None:
    """Deletes what the library wrote in a folder; the folder too, unless anything is left in it.

    A folder without a marker stays as it is.
    """
    if not folder.is_dir():
        return
    marker = read_marker(folder)
    if marker is None:
        return
    emptied = set()
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        name = path.relative_to(folder)
        if name == Path(MARKER):
            continue
        if path.is_dir() and not path.is_symlink():
            if (path in emptied or marker.covers(name)) and not any(path.iterdir()):
                path.rmdir()
                emptied.add(path.parent)
        elif marker.covers(name):
            path.unlink(missing_ok=True)
            emptied.add(path.parent)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Deletes a folder of ours that holds nothing but its marker."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [MARKER]:
        (folder / MARKER).unlink()
        if not folder.is_symlink():  # the user's
            folder.rmdir()


@contextmanager
def replaced(folder: Path, kind: str, facts: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Inside, a new folder is filled; on leaving without an error, it takes the place of `folder`.

    An interruption leaves the old folder or the new one. The marker of the new one lists its files.

    Args:
        folder: what is replaced; it must be ours, empty, or still to be made.
        kind: what it holds, in words.
        facts: for the marker.

    Yields:
        The folder to fill, which lies beside `folder`.

    Raises:
        InputError: there is something that the library did not write, at `folder` or at its temporary neighbours.
    """
    part, old = _neighbours(folder)
    check_neighbours(folder)
    for leftover in (part, old):
        remove(leftover)
    write_marker(part, kind, [EVERYTHING])
    try:
        yield part
        names = sorted(p.relative_to(part).as_posix() for p in part.rglob("*") if p != part / MARKER)
        write_marker(part, kind, [_literal(name) for name in names], facts)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(part, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        remove(part)
    remove(old)


def check_neighbours(folder: Path) -> None:
    """Refuses what `replaced` would refuse: before the work whose result it is to hold.

    Raises:
        InputError: see `replaced`.
    """
    check_replaceable(folder)
    for neighbour in _neighbours(folder):
        check(neighbour)


def _neighbours(folder: Path) -> tuple[Path, Path]:
    """Where the new folder is filled, and where the old one is put meanwhile."""
    return folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")


def _literal(name: str) -> str:
    """The pattern that matches `name` alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
