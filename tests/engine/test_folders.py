"""Folders of the library: what in them is ours, and that everything else stays."""

import os

import pytest
from helpers.project import snapshot

from hf_msif.engine import folders
from hf_msif.errors import InputError

NAMES = ("run.json", "step-[0-9]*", "step-[0-9]*/weights.bin")


@pytest.fixture
def ours(tmp_path):
    """A folder of ours with what its marker lists, and what a crash left of one such file."""
    folder = tmp_path / "ours"
    folders.write_marker(folder, "checkpoints", NAMES, {"seed": 3})
    (folder / "step-1").mkdir()
    for name in ("run.json", "step-1/weights.bin", "step-1/weights.bin.123.part"):
        (folder / name).write_text("ours")
    return folder


def test_a_marker_says_what_was_written(ours):
    marker = folders.read_marker(ours)
    assert (marker.kind, marker.names, marker.facts) == ("checkpoints", NAMES, {"seed": 3})
    folders.add_names(ours, "another", ["run.json", "more"])
    assert folders.read_marker(ours) == folders.Marker("checkpoints", (*NAMES, "more"), {"seed": 3})
    (ours / folders.MARKER).write_text('{"format": 0}')
    with pytest.raises(InputError, match="format 0; this version reads 1"):
        folders.read_marker(ours)
    (ours / folders.MARKER).write_text("{}")
    with pytest.raises(InputError, match=r"\.hf_msif\.json.*is damaged.*move .* away"):
        folders.read_marker(ours)


def test_a_folder_of_ours_is_removed_with_what_a_crash_left(ours):
    assert folders.foreign_files(ours) == []
    folders.check_replaceable(ours)
    folders.remove(ours)
    assert not ours.exists()


@pytest.mark.parametrize("name", ["notes.txt", "step-1/notes.txt", "step-1/deep/weights.bin", "step-x/weights.bin"])
def test_a_file_of_the_users_stays_and_is_named(ours, name):
    (ours / name).parent.mkdir(exist_ok=True)
    (ours / name).write_text("mine")
    folders.check(ours)  # files may be written beside it
    with pytest.raises(InputError, match=f"holds {name}, which msif did not write: move it away"):
        folders.check_replaceable(ours)
    folders.remove(ours)
    assert (ours / name).read_text() == "mine"
    assert not (ours / "run.json").exists()
    folders.remove(ours)
    assert {path.name for path in ours.rglob("*") if path.is_file()} == {folders.MARKER, (ours / name).name}


def test_an_empty_folder_of_the_users_stays(ours):
    (ours / "empty").mkdir()
    folders.remove(ours)
    assert (ours / "empty").is_dir()


def test_what_has_no_marker_is_not_ours(tmp_path):
    folder = tmp_path / "theirs"
    folders.check(folder)
    folder.mkdir()
    folders.check(folder)  # nothing is lost
    (folder / "run.json").write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"theirs holds run\.json, which msif did not write.*move .* away"):
        folders.check(folder)
    folders.remove(folder)
    with pytest.raises(InputError, match="did not write"), folders.replaced(folder, "model"):
        pytest.fail("it began")
    assert snapshot(tmp_path) == before
    with pytest.raises(InputError, match="is a file, but msif writes a folder"):
        folders.check(folder / "run.json")


def fill(folder, text="new"):
    with folders.replaced(folder, "model", {"seed": 1}) as part:
        (part / "inner").mkdir()
        (part / "inner" / "a[1].txt").write_text(text)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "ours"])
def test_a_folder_is_replaced_as_a_whole(tmp_path, before):
    folder = tmp_path / "model"
    if before == "an empty folder":
        folder.mkdir()
    elif before == "ours":
        fill(folder, "old")
    fill(folder)
    assert (folder / "inner" / "a[1].txt").read_text() == "new"
    assert folders.read_marker(folder).facts == {"seed": 1}
    assert folders.foreign_files(folder) == []
    assert os.listdir(tmp_path) == ["model"]


def test_a_failure_leaves_the_old_folder(tmp_path, monkeypatch):
    fill(tmp_path / "model", "old")
    before, replace = snapshot(tmp_path), os.replace

    def full(part):
        (part / "a").write_text("new")
        raise OSError("full")

    with pytest.raises(OSError, match="full"), folders.replaced(tmp_path / "model", "model") as part:
        full(part)
    assert snapshot(tmp_path) == before

    def fails(source, target):
        if str(source).endswith("model.part"):
            raise OSError("lost")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="lost"):
        fill(tmp_path / "model")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["model.part", "model.old"])
def test_temporary_neighbours_are_ours_or_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=f"{name} holds notes.txt, which msif did not write"):
        fill(tmp_path / "model")
    assert (tmp_path / name / "notes.txt").read_text() == "mine"
    (tmp_path / name / "notes.txt").unlink()
    folders.write_marker(tmp_path / name, "model", [folders.EVERYTHING])  # what a crash leaves
    (tmp_path / name / "half").write_text("half")
    fill(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
