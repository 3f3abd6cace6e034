"""Bad inputs and faults as rows of a table: what is done to a project, the command, and its one sentence."""

import contextlib
import csv
import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from helpers.project import msif, snapshot, visible
from hf_msif.engine.files import load_tensors, save_tensors
from hf_msif.engine.hashing import digest

PRE, FINE = "--stages.pretraining", "--stages.finetuning"
WITHOUT_CONFIGURATION = ("top", "compare", "mean", "demo", "init")


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        line: the command and its flags, separated by white space; FOLDER is the project's folder, and `--config` is
            added where it takes one and has none. A list is taken as it is.
        words: parts of the one sentence.
        change: what is done to the project's folder before.
        around: a context in which the command runs.
    """

    line: str | list
    words: tuple[str, ...]
    change: Callable[[Path], object] | None = None
    around: Callable[[Path], contextlib.AbstractContextManager] | None = None

    def arguments(self, folder: Path) -> list:
        parts = self.line.split() if isinstance(self.line, str) else self.line
        parts = [str(part).replace("FOLDER", str(folder)) for part in parts]
        if parts[0] not in WITHOUT_CONFIGURATION and "--config" not in parts:
            parts += ["--config", str(folder / "config.yaml")]
        return parts


def assert_refused(fault: Fault, folder: Path, capfd) -> str:
    """Runs the command on the changed project: exit code 2, one sentence with the words, and no file that the command
    wrote, changed or deleted. Returns the sentence."""
    if fault.change is not None:
        fault.change(folder)
    before, folders = snapshot(folder), {path for path in folder.rglob("*") if path.is_dir()}
    capfd.readouterr()
    with fault.around(folder) if fault.around is not None else contextlib.nullcontext():
        code = msif(*fault.arguments(folder))
    said = capfd.readouterr()
    lines = visible(said.err)
    assert code == 2, said
    assert "Traceback" not in said.out + said.err
    assert lines, "no sentence"
    message = lines[-1]
    assert re.match(r"msif (\w+: )?error: ", message), lines
    assert all(line.startswith("warning: ") for line in lines[:-1]), lines
    missing = [word for word in fault.words if word.replace("FOLDER", str(folder)) not in message]
    assert not missing, (missing, message)
    assert len(message) < 900, message
    assert snapshot(folder) == before
    assert {path for path in folder.rglob("*") if path.is_dir()} <= folders
    return message


# --- what is done to a project's folder


def several(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() or path.exists():
                path.unlink()

    return change


def folder_at(name: str) -> Callable[[Path], None]:
    """A folder with a file of the user's at this place."""
    return several(remove(name), write(f"{name}/notes.txt", "mine"))


def file_at(name: str, content: str | bytes = "mine") -> Callable[[Path], None]:
    """A file of the user's at this place."""
    return several(remove(name), write(name, content))


def link_at(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).symlink_to(target)

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edited_json(name: str, change: Callable) -> Callable[[Path], None]:
    """The JSON in a file, changed in place or replaced by what `change` returns."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        returned = change(value)
        (folder / name).write_text(json.dumps(value if returned is None else returned))

    return edit


def sealed_query(change: Callable) -> Callable[[Path], None]:
    """query.json, changed by somebody who knows how its checksum is made."""

    def edit(state):
        state.pop("sha256")
        returned = change(state)
        state = state if returned is None else returned
        return {**state, "sha256": digest(state)}

    return edited_json("run/query/query.json", edit)


def query_tensors(change: Callable, sealed: bool = False) -> Callable[[Path], None]:
    """query.safetensors, changed; `sealed`: query.json says that these are its tensors."""

    def edit(folder: Path) -> None:
        from hf_msif.engine.hashing import tensors_fingerprint

        path = folder / "run" / "query" / "query.safetensors"
        tensors = change(load_tensors(path)[0])
        save_tensors(tensors, path)
        if sealed:
            sealed_query(lambda state: state.update(tensors=tensors_fingerprint(tensors)))(folder)

    return edit


def weights(name: str, change: Callable) -> Callable[[Path], None]:
    """The tensors of a model's folder, changed."""

    def edit(folder: Path) -> None:
        path = folder / name / "model.safetensors"
        safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, {"format": "pt"})

    return edit


def table(name: str, rows: list[list]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)

    return change


@contextlib.contextmanager
def largest_file(size: int):
    """Inside, no file can grow beyond `size` bytes: what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
