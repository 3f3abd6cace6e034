"""`msif init`: what it writes runs on tiny data and models in the place of the public ones, and overwrites nothing."""

import json

import pandas as pd
import pytest
import torch
from helpers import tiny
from helpers.project import msif, project

from hf_msif.models import ElmoTokenizer
from hf_msif.project import config
from hf_msif.project.commands import init
from hf_msif.project.run import Run

PRE, FINE = "--stages.pretraining", "--stages.finetuning"
SHORT = [f"{PRE}.objective.max_length", "12", f"{FINE}.objective.max_length", "12"]
QUICK = [f"{FINE}.training", "{max_steps: 2, per_device_train_batch_size: 4}", "--test.number", "1"]
QUICK += ["--test.replicates", "1", f"{PRE}.solver.tol", "0.1", f"{PRE}.curvature_samples", "8"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Tiny files and models."""
    folder = project(tmp_path_factory.mktemp("local") / "project").parent
    for name, task in (("bert", "masked"), ("llama", "causal")):
        tiny.model(name, task, dtype=torch.float32).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    with open(folder / "labelled.csv", "w") as file:
        file.write("text,label\n")
        file.writelines(f"{row['text']},{row['label']}\n" for row in tiny.rows(40, seed=3, shortest=3))
    lines = (folder / "corpus.txt").read_text().splitlines()
    ElmoTokenizer.train(lines, 50).save_pretrained(folder / "elmo")
    return folder


def flags(name, folder):
    """Settings that name local files and models in the place of public ones."""
    data = [f"{PRE}.data.path", folder / "corpus.txt", f"{PRE}.data.name", "null"]
    if name == "vision":
        return []
    if name == "elmo":
        return ["--tokenizer", folder / "elmo", *data, f"{FINE}.data.path", folder / "tweets.csv"]
    model = folder / {"bert": "bert", "llm": "llama"}[name]
    labelled = {"path": str(folder / "labelled.csv"), "test_fraction": 0.3}
    labelled |= {"label_column": "label"} if name == "bert" else {"sample": 10}
    return [
        *("--tokenizer", model, f"{PRE}.model.path", model, *data),
        *(f"{FINE}.data", json.dumps(labelled), *SHORT),
    ]


def written(name, folder):
    path = folder / "config.yaml"
    assert msif("init", name, "--output", path) == 0
    return path


@pytest.mark.parametrize("name", init.templates())
def test_a_configuration_passes_the_checks(name, local, tmp_path, capsys):
    path = written(name, tmp_path)
    assert f"msif plan --config {path}" in capsys.readouterr().out
    arguments = ["--config", path, *flags(name, local), "--run_dir", tmp_path / "run"]
    run = Run(config.parse([str(argument) for argument in arguments]))
    for stage in run.names:
        assert len(list(run.rows(stage))) > 1
    assert len(run.tests()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llm"])
def test_a_configuration_runs(name, local, tmp_path, capsys):
    path = written(name, tmp_path)
    arguments = ["--config", path, "--run_dir", tmp_path / "run", *flags(name, local), *QUICK]
    for command in ("plan", "train", "query", "score"):
        assert msif(command, *arguments) == 0, capsys.readouterr().err
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert scores.influence.abs().max() > 0
    assert len(scores) > 20


def test_without_a_name_the_configurations_are_listed(capsys):
    assert msif("init") == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["msif", "init", name] for name in init.templates()
    ]
    assert msif("init", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["templates"]) == set(init.templates())


def test_the_default_file_has_the_configuration_s_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert msif("init", "bert", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"template": "bert", "output": "bert.yaml"}
    assert (tmp_path / "bert.yaml").read_text() == init.templates()["bert"]
