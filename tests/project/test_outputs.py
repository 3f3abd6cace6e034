"""Files of a run folder: replaced where the library wrote them, refused where the user did; one process at a time."""

import json
import os
import subprocess
import sys

import pytest
from helpers.project import snapshot

from hf_msif.engine.files import write_json
from hf_msif.errors import InputError
from hf_msif.project.lock import LOCK, in_use
from hf_msif.project.outputs import Outputs


@pytest.fixture
def outputs(tmp_path):
    return Outputs(tmp_path / "run")


def write(outputs, value, name="a.json"):
    with outputs.writing([outputs.folder / name]):
        write_json(outputs.folder / name, value)


def test_our_own_file_is_replaced_as_often_as_one_likes(outputs):
    for value in range(4):
        write(outputs, value)
        write(outputs, value, "inner/a.json")
    assert json.loads((outputs.folder / "a.json").read_text()) == 3
    os.utime(outputs.folder / "a.json")  # copied without its times
    Outputs(outputs.folder).check([outputs.folder / "a.json"])


@pytest.mark.parametrize(
    "owner", ["never ours", "changed since", "as long as ours", "a folder", "a dead link", "a link"]
)
def test_a_file_of_the_users_is_refused_and_stays(outputs, owner):
    path = outputs.folder / "a.json"
    if owner in ("changed since", "as long as ours", "a link"):
        write(outputs, "our")
    path.parent.mkdir(exist_ok=True)
    if owner == "a folder":
        path.mkdir()
    elif owner == "a dead link":
        path.symlink_to("nowhere")
    elif owner == "a link":  # to what was ours
        path.rename(path.with_name("b.json"))
        path.symlink_to("b.json")
    else:
        path.write_text('"his"' if owner == "as long as ours" else "mine")
        os.utime(path, (1, 1))
    before = snapshot(outputs.folder)
    words = {"changed since": "was changed since msif wrote it", "as long as ours": "was changed since"}
    words["a folder"] = "is a folder, but msif writes a file"
    words["a link"] = words["a dead link"] = "is a symbolic link, and msif did not"
    with pytest.raises(InputError, match=rf"a\.json {words.get(owner, 'exists, and msif did not')}.*another run_dir"):
        write(outputs, "new")
    assert snapshot(outputs.folder) == before


def test_a_crash_beside_the_rename_leaves_a_file_that_is_ours(outputs, monkeypatch):
    replace = os.replace

    def fails(source, target, first=True):
        if str(target).endswith("a.json") and first:
            raise KeyboardInterrupt
        replace(source, target)

    for before in ("nothing", "a file of ours"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fails)
            with pytest.raises(KeyboardInterrupt):
                write(outputs, before)
        outputs.check([outputs.folder / "a.json"])  # the old file, or none
        write(outputs, before)
    assert json.loads((outputs.folder / "a.json").read_text()) == "a file of ours"


def test_what_is_written_elsewhere_meanwhile_is_not_entered(outputs):
    with outputs.writing([outputs.folder / "a.json"]):
        write_json(outputs.folder / "b.json", 1)
    with pytest.raises(InputError, match=r"b\.json exists"):
        outputs.check([outputs.folder / "b.json"])


def test_a_run_folder_is_held_by_one_process(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from hf_msif.project.lock import in_use\n"
        "with in_use(Path(sys.argv[1]), 'msif train'):\n  print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        message = (
            rf"run_dir '.*run' is in use by msif train \(process {holder.pid} on .*, since \d\d:\d\d\): wait until"
        )
        with pytest.raises(InputError, match=message), in_use(folder, "msif query"):
            pytest.fail("two at once")
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):  # a process that was killed holds nothing
        with in_use(folder, "msif query"):
            assert json.loads((folder / ".hf_msif.lock.json").read_text())["process"] == os.getpid()
    assert not (folder / ".hf_msif.lock.json").exists()


def test_holding_a_new_folder_leaves_nothing_unless_something_is_written(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="refused"), in_use(tmp_path / "run", "msif train"):
        raise InputError("refused")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "1")
    with in_use(tmp_path / "run", "msif query"):  # the main process of the launch holds it
        assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be written to .*another run_dir"),
        in_use(tmp_path / "file/run", "x"),
    ):
        pytest.fail("it began")
