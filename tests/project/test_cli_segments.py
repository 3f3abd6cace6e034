"""The command line with stages that are pulled back through the checkpoints of their training."""

import json

import numpy as np
import pytest
import torch
from helpers.project import answer, listing, msif, project

from hf_msif import Scores

PRE, FINE = "--stages.pretraining", "--stages.finetuning"


def segments_project(folder):
    """Both stages trained whole by AdamW, of which 2 and 3 checkpoints are kept."""
    path = project(folder)
    settings = json.loads(path.read_text())
    run = {"learning_rate": 0.01, "per_device_train_batch_size": 8, "warmup_steps": 2}
    for name, steps in (("pretraining", 8), ("finetuning", 6)):
        stage = {"link": "segments", "training": {**run, "max_steps": steps}, "solver": {"tol": 1e-6}}
        settings["stages"][name] |= stage
    settings["stages"]["pretraining"]["checkpoints"] = 2
    settings["stages"]["finetuning"] |= {"trainable": "all"}
    path.write_text(json.dumps(settings, indent=1))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = segments_project(tmp_path_factory.mktemp("made"))
    assert msif("train", "--config", path, "--json") == 0
    return path


def test_from_plan_to_scores(made, tmp_path, capsys):
    flags, run = ["--config", made], made.parent / "run"
    before = answer(capsys, "plan", *flags, "--run_dir", tmp_path / "other")
    assert "not trained yet" in before["text"]
    assert "solve: 2 segments, usually" in before["text"]
    assert "solve: 3 segments, usually" in before["text"]
    assert listing(run) >= {"pretraining.run", "finetuning.run"}
    assert not list(run.glob("*.checkpoints"))
    for name, steps in (("pretraining", [4, 8]), ("finetuning", [2, 4, 6])):
        assert sorted(int(p.name.split("-")[1]) for p in (run / f"{name}.run").glob("checkpoint-*")) == steps
    assert "solve: 2 segments, usually" in answer(capsys, "plan", *flags)["text"]
    report = answer(capsys, "query", *flags)
    pretraining, finetuning = (report["stages"][name] for name in ("pretraining", "finetuning"))
    assert [pretraining["steps"], finetuning["steps"]] == [8, 6]
    assert [segment["step"] for segment in finetuning["segments"]] == [2, 4, 6]
    assert all(finetuning["solve"]["converged"])
    rates = [0.01 * min(t / 2, (8 - t) / 6) for t in range(8)]
    assert pretraining["time"] == pytest.approx(sum(rates), rel=0.3)  # less what momentum has still to do
    assert msif("score", *flags) == 0
    scores = Scores.from_parquet(run / "scores.parquet")
    assert all(np.abs(scores.influence(q)).min() > 0 for q in range(2))
    assert msif("score", *flags, "--corpus.stage", "finetuning") == 0


def test_the_same_from_elsewhere(made, tmp_path, capsys):
    """Models and checkpoints that something else trained: the answer of the run that made them."""
    here = answer(capsys, "query", "--config", made)
    run = made.parent / "run"
    flags = ["--config", made, "--run_dir", tmp_path / "run", f"{PRE}.model.config", "null"]
    for stage, name in ((PRE, "pretraining"), (FINE, "finetuning")):
        flags += [f"{stage}.model.path", run / name, f"{stage}.training", "{}"]
        flags += [f"{stage}.checkpoints", run / f"{name}.run" / "checkpoint-*"]
    there = answer(capsys, "query", *flags)
    for name in ("pretraining", "finetuning"):
        assert there["stages"][name]["solve"] == here["stages"][name]["solve"]


def test_one_checkpoint_is_kept_for_the_training_time(tmp_path, capsys):
    path = segments_project(tmp_path)
    flags = ["--config", path, f"{PRE}.link", "implicit", f"{PRE}.checkpoints", "null", f"{FINE}.link", "implicit"]
    flags += [f"{PRE}.solver.damping", "training", f"{FINE}.trainable", "head"]
    assert "not trained yet" in answer(capsys, "plan", *flags)["text"]
    assert msif("train", *flags) == 0
    capsys.readouterr()
    assert {p.name for p in (tmp_path / "run" / "pretraining.run").glob("checkpoint-*")} == {"checkpoint-8"}
    stage = answer(capsys, "query", *flags, "--test.replicates", "1")["stages"]["pretraining"]
    assert stage["training_damping"]["optimiser"] == "AdamW"
    assert stage["solve"]["damping"] == pytest.approx(1 / stage["training_damping"]["time"])
    assert "in the coordinates of AdamW" in stage["text"]
    # Another link needs other checkpoints: the model counts as trained under other settings.
    assert msif("query", *flags, f"{PRE}.solver.damping", "auto", f"{PRE}.link", "segments") == 2
    assert "checkpoints" in capsys.readouterr().err


def test_moments_are_those_of_the_training(made):
    state = torch.load(made.parent / "run" / "pretraining.run" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert all("exp_avg_sq" in entry for entry in state["state"].values())
