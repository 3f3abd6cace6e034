"""`Outputs`: what the library wrote to a run folder, so that it replaces its own files and never one of the user's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..engine import folders
from ..engine.files import checked_value, watched
from ..errors import InputError
from .launch import rank
from .lock import LOCK, OWNER

KIND = "run folder"
Seal = tuple[int, int, str]  # of a file: size in bytes, time of the last change in ns, SHA-256
SavedSeal = Annotated[list[int | str], Field(min_length=3, max_length=3)]  # as JSON has it


class Outputs:
    """The files of a run folder that the library wrote, with their sizes, times and SHA-256, kept in its marker.

    A file is entered before it takes its place: a crash leaves no file of ours that the marker does not know.

    Args:
        folder: the run folder; it may still be to be made.
        key: how the user names it, for messages.
    """

    def __init__(self, folder: Path, key: str = "run_dir"):
        self.folder, self.key = folder, key

    def check(self, files: Sequence[Path] = (), into: Sequence[Path] = (), replaced: Sequence[Path] = ()) -> None:
        """Refuses to write where something stands that the library did not write. Nothing is changed.

        Args:
            files: paths in the run folder of files that are written or replaced.
            into: folders in which files are written.
            replaced: folders that are replaced as a whole; they must not hold files of the user's either.

        Raises:
            InputError: names the file or folder.
        """
        way_out = f"move it away, or give another {self.key}"
        for folder in into:
            folders.check(folder)
        for folder in replaced:
            folders.check_neighbours(folder)
        entries = self._entries()
        for file in files:
            if file.is_dir():
                raise InputError(f"{file} is a folder, but msif writes a file of that name: {way_out}.")
            if file.is_symlink():
                raise InputError(f"{file} is a symbolic link, and msif did not write it: {way_out}.")
            if not file.exists():
                continue
            known = entries.get(self._name(file))
            if known is None:
                raise InputError(f"{file} exists, and msif did not write it: {way_out}.")
            if not _is_one_of(file, known):
                raise InputError(f"{file} was changed since msif wrote it: {way_out}.")

    @contextmanager
    def writing(
        self, files: Sequence[Path] = (), into: Sequence[Path] = (), replaced: Sequence[Path] = ()
    ) -> Iterator[None]:
        """Checks as `check` does; inside, those of `files` that are written are entered in the marker."""
        self.check(files, into, replaced)
        if rank():  # of a launch, the main process alone writes
            yield
            return
        names = {os.path.abspath(file): self._name(file) for file in files}

        def enter(part: Path, path: Path) -> None:
            name = names.get(os.path.abspath(path))
            if name is None:
                return
            entries = self._entries()
            # Until the rename, the file that is replaced is ours too.
            before = [seal for seal in entries.get(name, []) if path.exists() and _is_one_of(path, [seal])]
            entries[name] = [*before, _seal(part)]
            folders.write_marker(self.folder, KIND, (), {"files": entries})

        with watched(enter):
            yield

    def forget(self, file: Path) -> None:
        """Deletes a file that was written, and its entry in the marker; the marker too, if nothing else is there."""
        if not file.is_file():
            return
        file.unlink()
        entries = {name: seals for name, seals in self._entries().items() if name != self._name(file)}
        if entries or {path.name for path in self.folder.iterdir()} - {folders.MARKER, LOCK, OWNER}:
            folders.write_marker(self.folder, KIND, (), {"files": entries})
        else:
            (self.folder / folders.MARKER).unlink()

    def _entries(self) -> dict[str, list[Seal]]:
        marker = folders.read_marker(self.folder)
        entries = {} if marker is None else marker.facts.get("files", {})
        way_out = f"it says what msif wrote; move {self.folder} away, or give another {self.key}"
        checked_value(entries, dict[str, list[SavedSeal]], self.folder / folders.MARKER, way_out)
        return {name: [tuple(seal) for seal in seals] for name, seals in entries.items()}

    def _name(self, file: Path) -> str:
        return Path(os.path.abspath(file)).relative_to(os.path.abspath(self.folder)).as_posix()


def _seal(file: Path) -> Seal:
    status = file.stat()
    with open(file, "rb") as content:
        return status.st_size, status.st_mtime_ns, hashlib.file_digest(content, "sha256").hexdigest()


def _is_one_of(file: Path, seals: Sequence[Seal]) -> bool:
    """Whether a file is as one of the seals says; it is read only where size or time differ."""
    status = file.stat()
    if any((status.st_size, status.st_mtime_ns) == seal[:2] for seal in seals):
        return True
    same_size = [seal for seal in seals if seal[0] == status.st_size]
    return bool(same_size) and _seal(file)[2] in {sha for *_, sha in same_size}
