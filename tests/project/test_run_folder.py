"""What the user puts into a run folder stays, whatever command runs; what stands in a command's way is named first."""

import json
import os
import shutil

import pytest
from helpers.project import image_project, msif, snapshot, unrolled_project, visible

from hf_msif.engine import folders
from hf_msif.errors import InputError
from hf_msif.project.demo import run
from hf_msif.project.demo.run import demo
from hf_msif.project.lock import in_use
from hf_msif.training import trainer

FEW = ("--validation.examples", 3, "--validation.ceiling_seeds", "[]", "--validation.baselines", "[]")
CLEANSED = ("--cleanse.fraction", 0.1, "--cleanse.retrain", "warm_start", "--cleanse.seeds", 2)
COMMANDS = {"train": (), "query": (), "score": (), "sweep": ("--dampings", "[0.1]"), "validate": FEW}
COMMANDS["cleanse"] = CLEANSED
MODELS = ("pretraining", "finetuning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny project with stationary points, in which every command ran."""
    path = image_project(tmp_path_factory.mktemp("images"))
    settings = json.loads(path.read_text())
    for stage in settings["stages"].values():
        stage["solver"] = {"name": "cg", "damping": 0.1}
        stage["data"]["max_rows"] = 30
    path.write_text(json.dumps(settings | {"test": {"number": 2}}))
    for command, flags in COMMANDS.items():
        assert msif(command, "--config", path, *flags) == 0, command
    return path


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made.parent / "run", tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(json.loads(made.read_text()) | {"run_dir": str(tmp_path / "run")}))
    return path


def refused(path, capsys, command):
    """The sentence of a refusal, which changed nothing."""
    before = snapshot(path.parent)
    capsys.readouterr()
    assert msif(command, "--config", path, *COMMANDS[command]) == 2
    assert snapshot(path.parent) == before
    return visible(capsys.readouterr().err)[-1]


def test_every_folder_that_is_written_has_a_marker(made):
    run = made.parent / "run"
    written = {path for path in run.rglob("*") if path.is_dir()}
    assert {folder.name for folder in written} >= {*MODELS, "query", "bank", "validation", "cleanse", "seed-1"}
    assert all(folders.read_marker(folder) is not None for folder in (run, *written))
    assert not [path for path in run.rglob("*") if path.suffix in (".part", ".old", ".checkpoints", ".parts")]


@pytest.mark.slow
@pytest.mark.parametrize("in_models", [False, True])
def test_a_file_in_any_of_the_folders_is_alive_after_every_command(copy, in_models):
    run = copy.parent / "run"
    notes = [path / "notes.txt" for path in (run, *run.rglob("*")) if path.is_dir()]
    notes += [path / "model.json" for path in (run / "bank", run / "validation", run / "cleanse")]
    notes = [path for path in notes if in_models or path.parent.name not in MODELS]
    for number, path in enumerate(notes):
        path.write_text(f"mine {number}")
    codes = {}
    for command, flags in COMMANDS.items():
        codes[command] = msif(command, "--config", copy, *flags)
        assert [path.read_text() for path in notes] == [f"mine {number}" for number in range(len(notes))], command
    # A folder of a model is replaced as a whole: with a file of the user's in it, it stays.
    assert codes == {command: 2 if in_models and command == "train" else 0 for command in COMMANDS}


OUTPUTS = {
    **dict.fromkeys(["pretraining", "finetuning", "pretraining.json", "finetuning.json"], "train"),
    **dict.fromkeys(["pretraining.part", "finetuning.old", "finetuning.checkpoints"], "train"),
    **dict.fromkeys(["query", "query/query.json", "query/query.safetensors", "query.checkpoints"], "query"),
    **dict.fromkeys(["scores.parquet", "scores.parts", "shares.parquet", "table1.md", "table1.parquet"], "score"),
    **dict.fromkeys(["figure3.png"], "score"),
    **dict.fromkeys(["sweep.md", "sweep.parquet"], "sweep"),
    **dict.fromkeys(["validation", "bank"], "validate"),
    **{f"validation/leave_one_out.{end}": "validate" for end in ("json", "parquet", "png")},
    **dict.fromkeys(["cleanse", "cleanse/kept.parquet", "cleanse/random.parquet", "cleanse/gains.json"], "cleanse"),
}


def test_the_outputs_are_all_that_is_written(made):
    run = made.parent / "run"
    top = {path.name for path in run.iterdir() if not path.name.startswith(".hf_msif")}
    assert top <= set(OUTPUTS)
    listed = folders.read_marker(run).facts["files"]
    assert set(listed) <= set(OUTPUTS)
    assert {path for path in OUTPUTS if (run / path).is_file()} == set(listed)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(("output", "command"), OUTPUTS.items())
def test_what_the_user_has_at_an_outputs_place_is_never_replaced(copy, capsys, output, command, kind):
    path = copy.parent / "run" / output
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "folder":
        path.mkdir()
    (path / "mine" if kind == "folder" else path).write_text("mine")
    assert f"run/{output} " in refused(copy, capsys, command)


@pytest.mark.slow
def test_recorded_runs_and_their_checkpoints(tmp_path, capsys):
    path, run = unrolled_project(tmp_path), tmp_path / "run"
    assert msif("train", "--config", path) == 0
    assert all(folders.read_marker(run / f"{name}.run") is not None for name in MODELS)
    for name in ("finetuning.run", "finetuning.checkpoints"):
        (run / name).mkdir(exist_ok=True)
        (run / name / "notes.txt").write_text("mine")
        sentence = refused(path, capsys, "train")
        assert f"run/{name} holds notes.txt, which msif did not write" in sentence
        (run / name / "notes.txt").unlink()
    assert msif("train", "--config", path) == 0


@pytest.mark.slow
def test_checkpoints_are_removed_and_a_file_beside_them_is_not(tmp_path, monkeypatch, trained_project):
    flags = ("--config", trained_project, "--run_dir", tmp_path / "run", "--stages.pretraining.training.save_steps", 2)
    flags = (*flags, "--stages.pretraining.training.save_strategy", "steps")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Watch, "on_step_end", on_step_end)
        assert msif("train", *flags) == 130
    checkpoints = tmp_path / "run" / "pretraining.checkpoints"
    notes = [checkpoints / "notes.txt", checkpoints / "checkpoint-4" / "notes.txt"]
    for path in notes:
        path.write_text("mine")
    assert msif("train", *flags) == 0
    assert {path.name for path in checkpoints.rglob("*") if path.is_file()} == {"notes.txt", folders.MARKER}
    assert [path.read_text() for path in notes] == ["mine", "mine"]
    assert msif("train", *flags) == 0
    assert [path.read_text() for path in notes] == ["mine", "mine"]
    assert msif("train", *flags, "--stages.pretraining.training.save_total_limit", 1) == 2
    assert [path.read_text() for path in notes] == ["mine", "mine"]


def test_the_second_process_is_told_who_is_at_work_and_may_read(copy, capsys):
    with in_use(copy.parent / "run", "msif train"):
        for command in COMMANDS:
            sentence = refused(copy, capsys, command)
            assert f"run_dir '{copy.parent / 'run'}' is in use by msif train (process {os.getpid()} on " in sentence
            assert "wait until it has ended, or give another run_dir." in sentence
        assert msif("plan", "--config", copy) == 0
        assert msif("top", "--run", copy.parent / "run") == 0
    assert msif("score", "--config", copy) == 0


@pytest.mark.slow
def test_a_demo_replaces_an_earlier_one_and_nothing_else(tmp_path, monkeypatch):
    demo(tmp_path, quiet=True, steps=(4, 4), check=False)
    monkeypatch.setattr(run, "_demo", lambda *_: {})
    demo(tmp_path, quiet=True)
    assert not (tmp_path / "checkpoints").exists()
    for name in ("pretraining/notes.txt", "table1.md", "sweep.md", "checkpoints/notes.txt", "query/query.json"):
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(InputError, match=name.split("/")[-1]):
            demo(tmp_path, quiet=True, check=False)
        assert path.read_text() == "mine"
        path.unlink()
        if before is not None:
            path.write_bytes(before)
