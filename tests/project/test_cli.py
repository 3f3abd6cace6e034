"""The command line from plan to sweep on tiny data, its JSON, its help, and what it says of every bad input."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from helpers import tiny
from helpers.project import copied, listing, msif, project, rerecord, snapshot, visible

from hf_msif import Scores
from hf_msif.engine.files import load_tensors, save_tensors
from hf_msif.project import cli, commands
from hf_msif.project.commands import query

COMMANDS = ("plan", "train", "query", "score", "sweep")


@pytest.fixture
def copy(scored_project, tmp_path):
    """The folder of a copy, which --run_dir and data files must point to."""
    return copied(scored_project, tmp_path).parent


@pytest.fixture
def untrained(tmp_path):
    return project(tmp_path)


@pytest.mark.slow
def test_from_plan_to_sweep(tmp_path, capsys):
    path = project(tmp_path)
    run = tmp_path / "run"

    assert msif("plan", "--config", path) == 0
    said = capsys.readouterr().out
    assert "stage 'finetuning'" in said
    assert "not trained yet" in said
    assert not run.exists()

    assert msif("train", "--config", path) == 0
    said = capsys.readouterr().out
    assert "pretraining: trained in" in said
    assert "test loss" in said
    assert listing(run) == {"pretraining", "pretraining.json", "finetuning", "finetuning.json"}

    assert msif("plan", "--config", path) == 0
    assert "not trained yet" not in capsys.readouterr().out

    assert msif("query", "--config", path) == 0
    said = capsys.readouterr().out
    assert "converged" in said
    assert listing(run / "query") == {"query.json", "query.safetensors"}

    assert msif("score", "--config", path) == 0
    said = capsys.readouterr().out
    scores = Scores.from_parquet(run / "scores.parquet")
    assert scores.columns == 2
    assert f"{len(scores)} rows scored" in said
    assert (run / "table1.md").read_text().startswith("| test sentence")
    table = pd.read_parquet(run / "table1.parquet")
    assert table["strongest influence"].abs().tolist() == [abs(scores.influence(q)).max() for q in range(2)]

    assert msif("top", "--run", run, "-k", 3) == 0
    said = capsys.readouterr().out
    assert scores.top(1).text[0] in said
    assert said.count("absolute influence on:") == 2

    assert msif("sweep", "--config", path) == 0
    capsys.readouterr()
    assert pd.read_parquet(run / "sweep.parquet")["damping"].tolist() == [0.1, 1.0]
    assert not list(run.rglob("*.part"))
    assert not list(run.glob("*.checkpoints"))


def test_removal_effect_is_minus_influence_over_the_number_of_masked_words(scored_project):
    scores = Scores.from_parquet(scored_project.parent / "run" / "scores.parquet")
    count = scores.metadata["N"]
    assert count == scores.frame.terms.sum()
    for q in range(scores.columns):
        np.testing.assert_array_equal(scores.frame[f"removal_effect_{q}"], -scores.influence(q) / count)


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_and_prose_goes_to_stderr(copy, capsys, command):
    assert msif(command, "--config", copy / "config.yaml", "--json") == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert isinstance(report, dict)
    assert "left out (not in keep)" in said.err
    if command == "train":
        assert [stage["stage"] for stage in report["stages"]] == ["pretraining", "finetuning"]
    elif command == "sweep":
        assert report["table"][0]["rank_correlation"] is None  # NaN is no JSON
        assert -1 <= report["table"][1]["rank_correlation"] <= 1
    elif command == "score":
        assert report["rows"] == len(Scores.from_parquet(report["scores"]))
    elif command == "query":
        assert all(all(stage["solve"]["converged"]) for stage in report["stages"].values())


@pytest.mark.parametrize("by", ["absolute", "harmful", "helpful"])
def test_top_as_json_is_what_the_scores_say(scored_project, capsys, by):
    run = scored_project.parent / "run"
    assert msif("top", "--run", run, "-k", 4, "--by", by, "--json") == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    scores = Scores.from_parquet(run / "scores.parquet")
    assert report["by"] == by
    assert [test["test"] for test in report["tests"]] == [test["text"] for test in scores.metadata["tests"]]
    for q, test in enumerate(report["tests"]):
        assert test["top"] == scores.top(4, by, q).to_dict(orient="records")
        for row in test["top"]:
            assert row["removal_effect"] == -row["influence"] / scores.metadata["N"]


def test_top_by_relative_influence_and_what_is_common(copy, capsys):
    run = copy / "run"
    assert msif("top", "--run", run, "--by", "relative") == 2
    assert "corpus.norms: gradient" in capsys.readouterr().err
    assert msif("score", "--config", copy / "config.yaml", "--corpus.norms", "gradient") == 0
    capsys.readouterr()
    assert msif("top", "--run", run, "-k", 4, "--by", "relative", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    scores = Scores.from_parquet(run / "scores.parquet")
    for q, test in enumerate(report["tests"]):
        assert test["top"] == scores.top(4, "relative", q).to_dict(orient="records")
    common = scores.common(4, "relative")
    assert report["common"] == common.to_dict(orient="records")
    assert len(common)
    assert msif("top", "--run", run, "-k", 4, "--by", "relative") == 0
    said = capsys.readouterr().out
    assert said.count(f"│ {'2 of 2'}") == 2 * len(common)
    assert f"{len(common)} rows are common" in said
    assert said.count("relative_influence") == 2


@pytest.mark.parametrize(("stage", "name"), [("pretraining", "scores"), ("finetuning", "scores-finetuning")])
def test_a_shortlist_keeps_the_users_files(copy, capsys, stage, name):
    run = copy / "run"
    reduced = ("--keep", "top=2", "--corpus.dtype", "bfloat16", "--corpus.stage", stage)
    arguments = ("score", "--config", copy / "config.yaml", *reduced)
    mine = run / f"{name}.shortlist.parquet"
    mine.write_text("my own file")
    assert msif(*arguments) == 2
    assert f"{mine} exists, and msif did not write it" in capsys.readouterr().err
    assert mine.read_text() == "my own file"
    mine.unlink()
    assert msif(*arguments) == 0
    said = capsys.readouterr().out
    assert "shortlist: " in said
    assert "weakest" not in said
    assert not mine.exists()
    assert Scores.from_parquet(run / f"{name}.parquet").metadata["shortlist"]["dtype"] == "bfloat16"


def test_score_of_the_last_stage_and_of_a_group(copy):
    options = ("--config", copy / "config.yaml", "--test.aggregate", "sum", "--corpus.stage=finetuning", "--json")
    assert msif("query", *options) == 0
    assert msif("score", *options) == 0
    scores = Scores.from_parquet(copy / "run" / "scores-finetuning.parquet")
    assert scores.columns == 1
    assert scores.metadata["stage"] == "finetuning"
    assert scores.frame.example_id.min() >= 100  # data.id_column


def test_a_finished_training_may_have_needed_another_machine(copy):
    options = ("--config", copy / "config.yaml", "--stages.pretraining.training.bf16", "true", "--json")
    for folder in ("pretraining", "query"):
        rerecord(copy / "run" / folder, "stages.pretraining.training.bf16", True)
    assert msif("score", *options) == 0
    if not torch.cuda.is_available():
        assert msif("train", *options) == 2


@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings_are_one_line(copy, capsys):
    path = copy / "config.yaml"
    solver = [f"{PRE}.solver.max_iter", 1, f"{PRE}.solver.damping", 10, f"{PRE}.solver.tol", 1e-6]
    assert msif("query", "--config", path, *solver, "--test.replicates", 1, "--json") == 0  # each replicate warns
    lines = [line for line in visible(capsys.readouterr().err) if "not solved to tolerance" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: stage 'pretraining'")


def nan(folder):
    path = folder / "run" / "pretraining" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def cut(folder):
    path = folder / "run" / "pretraining" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def remove(*names):
    def prepare(folder):
        for name in names:
            path = folder / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def replaced(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


PRE, FINE = "--stages.pretraining", "--stages.finetuning"
# What is done to the folder, command and flags, what the one sentence holds; FOLDER is the folder.
# The schema or the parser alone decides these: no stage is trained.
BAD_ARGUMENTS = {
    "no configuration": (None, "plan --config FOLDER/nowhere.yaml", ["nowhere.yaml", "cannot read"]),
    "no arguments": (None, "plan", ["no configuration was given", "--config"]),
    "invalid YAML": (write("c.yaml", "a: [1"), "plan --config FOLDER/c.yaml", ["c.yaml", "not valid YAML"]),
    "unknown key": (None, f"plan {PRE}.solver.dampng 1", ["'stages.pretraining.solver.dampng'", ".damping'"]),
    "wrong type": (None, f"train {PRE}.batch_size x", ["stages.pretraining.batch_size is x", "whole number"]),
    "unknown stage": (None, "plan --stages.x.batch_size 1", ["no stage 'x'", "['pretraining', 'finetuning']"]),
    "a negative number": (None, f"plan {PRE}.solver.damping -1e-4", ["pretraining.solver.damping is -0.0001"]),
    "no tests": (None, "query --test.number 0", ["test.number is 0", "at least 1"]),
    "a run_dir with NUL": (None, r'plan --run_dir "a\0b"', [r"run_dir is 'a\x00b'", "text without NUL"]),
    "a value in itself": (
        write("c.yaml", "test: &a {ids: [*a]}"),
        "plan --config FOLDER/c.yaml",
        ["test.ids.0 contains"],
    ),
    "no such run": (None, "top --run FOLDER/nowhere", ["nowhere", "does not exist"]),
    "not a number of rows": (None, "top --run FOLDER/run -k x", ["-k", "'x'"]),
    "unknown flag": (None, "top --run FOLDER/run --bye absolute", ["'--bye'", "did you mean --by?"]),
    "no run": (None, "top", ["--run"]),
    "unknown command": (None, "trian", ["'trian'", "train"]),
}
# A setting of a stage or of the run, its value, and what the one sentence holds beside both.
SETTINGS = {
    "no steps": (f"{PRE}.training.max_steps", 0, "at least 1, or -1 for num_train_epochs"),
    "steps below zero": (f"{PRE}.training.max_steps", -2, "at least 1, or -1"),
    "no epochs": (f"{PRE}.training", "{num_train_epochs: 0}", "num_train_epochs is 0", "or max_steps"),
    "epochs below zero": (f"{PRE}.training", "{num_train_epochs: -1, max_steps: -1}", "epochs is -1", "positive"),
    "no learning rate": (f"{FINE}.training.learning_rate", 0.0, "a positive number"),
    "a rate below zero": (f"{FINE}.training.learning_rate", -0.1, "a positive number"),
    "an infinite rate": (f"{FINE}.training.learning_rate", ".inf", "a number"),
    "no rows per batch": (f"{PRE}.training.per_device_train_batch_size", 0, "at least 1"),
    "no micro-batches": (f"{PRE}.training.gradient_accumulation_steps", 0, "at least 1"),
    "workers below zero": (f"{PRE}.training.dataloader_num_workers", -1, "at least 0"),
    "a seed below zero": (f"{PRE}.training.seed", -1, "from 0 to 4294967295"),
    "a seed too large": (f"{PRE}.training.seed", 2**32, "from 0 to 4294967295"),
    "an order's seed": (f"{PRE}.training.data_seed", -1, "from 0 to 4294967295"),
    "no steps between checkpoints": (f"{PRE}.training.save_steps", 0.0, "at least 1, or a fraction"),
    "checkpoints every so many and a half": (f"{PRE}.training.save_steps", 1.5, "a whole number of steps"),
    "no checkpoints at all": (f"{PRE}.training.save_total_limit", 0, "at least 1, or null"),
    "a norm below zero": (f"{PRE}.training.max_grad_norm", -1.0, "at least 0"),
    "AdamW's decay": (f"{PRE}.training.weight_decay", -0.1, "at least 0"),
    "no ε": (f"{PRE}.training.adam_epsilon", 0.0, "a positive number"),
    "a first β of one": (f"{PRE}.training.adam_beta1", 1.0, "below 1"),
    "a second β below zero": (f"{PRE}.training.adam_beta2", -0.5, "at least 0"),
    "a checkpoint of one's own": (f"{PRE}.training", "{resume_from_checkpoint: x}", "resume_from_checkpoint has no"),
    "the best model": (f"{PRE}.training", "{load_best_model_at_end: true}", "has no effect here: no model is eval"),
    "to train": (f"{PRE}.training", "{do_train: true}", "do_train has no effect here", "leave it out"),
    "to evaluate": (f"{PRE}.training", "{do_eval: true}", "do_eval has no effect here", "leave it out"),
    "to predict": (f"{PRE}.training", "{do_predict: true}", "do_predict has no effect here"),
    "when to evaluate": (f"{PRE}.training", "{eval_strategy: epoch}", "eval_strategy has no effect here"),
    "the run's seed": ("--seed", -1, "at least 0 and at most 4294967295"),
    "the run's seed, too large": ("--seed", 2**32, "at most 4294967295"),
    "polish, no steps": (f"{PRE}.polish", "{max_iter: 0, lbfgs_iter: 0}", "max_iter is 0", "no step would be taken"),
    "polish, steps below zero": (f"{PRE}.polish.max_iter", -1, "at least 0"),
    "polish, L-BFGS": (f"{PRE}.polish.lbfgs_iter", -1, "at least 0"),
    "polish, CG": (f"{PRE}.polish.cg_iter", -1, "at least 0"),
    "polish, dense": (f"{PRE}.polish.dense_limit", -1, "at least 0"),
    "polish, no tolerance": (f"{PRE}.polish.tol", 0.0, "a positive number"),
    "layers below zero": (f"{PRE}.model.config.num_hidden_layers", -1, "at least 0: bert has 12 of them by default"),
    "heads below zero": (f"{PRE}.model.config.num_attention_heads", -2, "at least 0"),
}
# These need a trained project.
BAD = {
    "unknown stage to train": (None, "train --stage x", ["no stage 'x'", "['pretraining', 'finetuning']"]),
    "unknown model type": (None, f"plan {PRE}.model.config.model_type brt", ["pretraining.model.config", "brt"]),
    "no model type": (None, f'plan {PRE}.model.config {{"a":1}}', ["model.config.model_type is missing"]),
    "unknown model setting": (None, f"plan {PRE}.model.config.hiden_size 4", ["hiden_size'", "config.hidden_size'"]),
    "impossible model": (
        remove("pretraining"),
        f"train {PRE}.model.config.hidden_size 7",
        ["pretraining.model.config.hidden_size is 7, which is refused", "multiple"],
    ),
    "neither path nor config": (remove("pretraining"), f"plan {PRE}.model.config null", ["neither path nor config"]),
    "bad training value": (
        None,
        f"train {FINE}.training.save_strategy never",
        ["stages.finetuning.training.save_strategy is never, which is refused"],
    ),
    "bad training value to plan": (
        remove("pretraining"),
        f"plan {PRE}.training.optim magic",
        ["stages.pretraining.training.optim is magic, which is refused"],
    ),
    "bad training type": (None, f"score {PRE}.training.bf16 maybe", ["stages.pretraining.training.bf16 is maybe"]),
    "our training key": (None, f"plan {PRE}.training.output_dir x", ["stages.pretraining.training.output_dir"]),
    "bad objective": (None, f"plan {PRE}.objective.mask_probability 2", ["mask_probability=2.0", "(0, 1]"]),
    "no room for a word": (None, f"plan {PRE}.objective.max_length 2", ["max_length is 2", "at least 3 tokens"]),
    "a length of zero": (None, f"plan {FINE}.objective.max_length 0", ["max_length is 0", "give max_length=3"]),
    "setting of another solver": (
        None,
        f'plan {PRE}.solver {{"name":"minres","max_parameters":3}}',
        ["stages.pretraining.solver.max_parameters"],
    ),
    "no tokenizer": (None, "plan --tokenizer FOLDER/nowhere", ["tokenizer: cannot load", "nowhere"]),
    "a file for a run": (None, "plan --run_dir FOLDER/corpus.txt", ["run_dir is", "which is a file"]),
    "no data": (None, f"train {PRE}.data.data_files FOLDER/nowhere.txt", ["data_files", "nowhere.txt", "not exist"]),
    "an empty corpus": (write("corpus.txt", ""), "train", ["stages.pretraining.data", "is empty"]),
    "blank lines": (write("corpus.txt", "\n \n"), "train", ["stages.pretraining.data", "2 left out (no text)"]),
    "no label column": (None, f"train --stage finetuning {FINE}.data.label_column x", ["label_column", "'x'"]),
    "labels not listed": (
        None,
        f"train --stage finetuning {FINE}.objective.labels [Negative,Neutral]",
        ["stages.finetuning.objective.labels is ['Negative', 'Neutral']", "['Positive']", "keep"],
    ),
    "no labels listed": (None, f"train --stage finetuning {FINE}.objective {{}}", ["labels is []", "Negative"]),
    "too few classes": (
        replaced("tweets.csv", ",1\n", ",2\n"),
        f"plan {FINE}.data.label_column stars {FINE}.objective.labels [one,two]",
        ["stages.finetuning.objective.labels is ['one', 'two']", "['2']"],
    ),
    "rows of one class": (
        None,
        f"train --stage finetuning {FINE}.data.keep.sentiment [Negative]",
        ["stages.finetuning.data.label_column: all training rows have the label 'Negative'", "at least two classes"],
    ),
    "one label": (None, f"plan {FINE}.objective.labels [Negative]", ["labels=('Negative',)", "at least 2"]),
    "a label twice": (
        None,
        f"plan {FINE}.objective.labels [Negative,Positive,Negative]",
        ["'Negative' twice", "expected each class once"],
    ),
    "more labels than the model has": (
        None,
        f"query {FINE}.objective.labels [Negative,Positive,Neutral]",
        [
            "was trained with",
            f'{FINE[2:]}.objective.labels = ["Negative", "Positive"]',
            "Neutral",
            "train the stage again",
        ],
    ),
    "labels in another order": (
        None,
        f"query {FINE}.objective.labels [Positive,Negative]",
        ["was trained with", f'{FINE[2:]}.objective.labels = ["Negative", "Positive"]', '["Positive", "Negative"]'],
    ),
    "earlier stage not trained": (
        remove("pretraining"),
        "train --stage finetuning",
        ["stage 'pretraining' is not trained yet", "msif train --stage pretraining"],
    ),
    "query before training": (remove("finetuning"), "query", ["stage 'finetuning' is not trained yet"]),
    "sweep before training": (remove("finetuning"), "sweep", ["stage 'finetuning' is not trained yet"]),
    "score before the query": (remove("query"), "score", ["no query", "run msif query"]),
    "another model than the query's": (
        remove("pretraining"),
        f"score {PRE}.model.path FOLDER/other {PRE}.training {{}}",
        ["stages.pretraining.model.path was null", "query again (msif query)"],
    ),
    "no such model": (
        remove("pretraining"),
        f"query {PRE}.model.path FOLDER/other {PRE}.training {{}}",
        ["cannot load the model", "other"],
    ),
    "diverged": (None, f"train --stage pretraining {PRE}.training.learning_rate 1e10", ["loss", "learning rate"]),
    "diverged, with checkpoints": (
        None,
        f"train {PRE}.training.learning_rate 1e10 {PRE}.training.save_strategy steps {PRE}.training.save_steps 2",
        ["loss", "learning rate"],
    ),
    "NaN in a checkpoint": (nan, "query", ["run/pretraining holds another model", "train --stage pretraining"]),
    "a damaged checkpoint": (cut, "query", ["stage 'pretraining': cannot load the model", "pretraining"]),
    "too many tests": (None, "query --test.number 1000", ["test.number is 1000", "at most"]),
    "too many tests to plan": (None, "plan --test.number 1000", ["test.number is 1000", "at most"]),
    "no such test": (None, "query --test.ids [1]", ["test.ids names [1]", "finetuning"]),
    "a test of the training side": (None, "query --test.ids [100,101,102,103]", ["test.ids names"]),
    "a solve that is worse than none": (
        None,
        f"query --test.number 1 {PRE}.solver.damping 1e-6 {PRE}.solver.max_iter 1",
        ["stage 'pretraining': the relative residual", "expected below 1", "more iterations"],
    ),
    "no damping to sweep": (None, f'sweep {PRE}.solver {{"name":"identity"}}', ["identity", "no damping"]),
    "no number of rows": (None, "top --run FOLDER/run -k 0", ["-k is 0", "at least 1"]),
    "no such order": (None, "top --run FOLDER/run --by size", ["by is 'size'", "absolute"]),
    "damaged scores": (
        write("run/scores.parquet", "x"),
        "top --run FOLDER/run",
        ["scores.parquet", "holds no scores"],
    ),
}


def at_home(folder):
    """Says that the run was made where it lies, not where it was copied from."""
    files = {"pretraining": "corpus.txt", "finetuning": "tweets.csv"}
    for part in (*files, "query"):
        rerecord(folder / "run" / part, "tokenizer", str(folder / "tokenizer"))
        for stage, name in files.items():
            if part in (stage, "query"):
                rerecord(folder / "run" / part, f"stages.{stage}.data.data_files", str(folder / name))


def edited(folder):
    at_home(folder)
    replaced("corpus.txt", (folder / "corpus.txt").read_text().split()[0], "wall")(folder)


def permuted(folder):
    """The tokenizer's words with other ids."""
    at_home(folder)
    special, words = tiny.SPECIAL, tiny.WORDS[len(tiny.SPECIAL) :]
    tiny.tokenizer(words=[*special, *reversed(words)]).save_pretrained(folder / "tokenizer")


def tensors(change):
    """Changes the tensors of the query, and writes them as a whole file."""

    def prepare(folder):
        path = folder / "run" / "query" / "query.safetensors"
        found, _ = load_tensors(path)
        save_tensors(change(found), path)

    return prepare


def instead(name, content=None):
    """A file of the user's, or a folder with one, in the place of something of ours."""

    def prepare(folder):
        path = folder / "run" / name
        if path.exists():
            remove(name)(folder)
        if content is None:
            path.mkdir()
            path = path / "notes.txt"
        path.write_text(content or "mine")

    return prepare


ID2LABEL = "stages:\n pretraining:\n  model:\n   config:\n    id2label:\n"
BOMB = (
    ID2LABEL
    + "     a0: &a0 [x]\n"
    + "".join(f"     a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 9))
)
ITSELF = "stages: {pretraining: {model: {config: {id2label: &a {x: *a}}}}}"
ANOTHER = ["is not as it was when the query in", "query again, or undo the change"]
NO_QUERY = ["holds no whole query", "query again"]
# What was accepted without a word, and gave something else than was asked.
SILENT = {
    "values without an end": (
        write("c.yaml", BOMB),
        "plan --config FOLDER/config.yaml --config FOLDER/c.yaml",
        ["id2label"],
    ),
    "a model's setting in itself": (
        write("c.yaml", ITSELF),
        "plan --config FOLDER/config.yaml --config FOLDER/c.yaml",
        ["stages.pretraining.model.config.id2label"],
    ),
    "half a character": (None, "plan --run_dir HALF", ["run_dir"]),
    "NUL in a path": (None, r'query --stages.pretraining.model.path "a\0b"', ["stages.pretraining.model.path", "NUL"]),
    "a model elsewhere": (None, f"query {PRE}.model.path FOLDER/other", ["model.path = null", "FOLDER/other"]),
    "a picture of no kind": (None, "compare --runs FOLDER/run FOLDER/run --output FOLDER/x.xyz", ["xyz", "png"]),
    "a class of number a million": (
        replaced("tweets.csv", ",1\n", ",1000000\n"),
        f"train --stage finetuning {FINE}.data.label_column stars {FINE}.objective {{}} {FINE}.data.keep {{}}",
        ["[0, 1000000]", "1,000,001 classes", "stages.finetuning.objective.labels"],
    ),
    "another task": (None, f"query {PRE}.task causal-lm", ["stages.pretraining.task", "causal-lm"]),
    "an edited text": (
        edited,
        "score",
        ["trained on other rows than stages.pretraining.data", "train the stage again"],
    ),
    "permuted tokens": (permuted, "score", ["trained with another tokenizer"]),
    "a file in the place of a model": (instead("pretraining", "mine"), "train", ["run/pretraining is a file", "move"]),
    "a folder in the place of parts": (instead("scores.parts"), "score", ["scores.parts holds notes.txt", "move"]),
    "a folder in the place of checkpoints": (
        instead("pretraining.checkpoints"),
        "train",
        ["pretraining.checkpoints holds notes.txt", "move"],
    ),
    "a folder in the place of a query's checkpoints": (
        instead("query.checkpoints"),
        "query",
        ["query.checkpoints holds notes.txt", "move"],
    ),
    "a file beside a model": (write("run/pretraining/notes.txt", "mine"), "train", ["pretraining holds notes.txt"]),
    "losses in words": (replaced("run/query/query.json", '"losses": [', '"losses": ["a", '), "score", NO_QUERY),
    "a query's tensor missing": (tensors(lambda x: dict(list(x.items())[1:])), "score", NO_QUERY),
    "a query's column missing": (tensors(lambda x: {k: t[:1] for k, t in x.items()}), "score", NO_QUERY),
    "a query's values doubled": (tensors(lambda x: {k: 2 * t for k, t in x.items()}), "score", NO_QUERY),
    "other masks": (None, f"score {PRE}.objective.mask_probability 0.3", ["objective.mask_probability", "0.3"]),
    "another length": (None, f"score {PRE}.objective.max_length 8", ["stages.pretraining.objective.max_length", "8"]),
    "another size": (None, f"query {PRE}.model.config.hidden_size 12", ["model.config.hidden_size = 8", "12"]),
    "another size before": (
        None,
        f"train --stage finetuning {PRE}.model.config.hidden_size 12",
        ["model.config.hidden_size = 8", "12", "run_dir"],
    ),
}


@pytest.mark.parametrize(("prepare", "line", "parts"), SILENT.values(), ids=SILENT)
def test_what_is_not_what_was_asked_is_refused(copy, capsys, monkeypatch, prepare, line, parts):
    parts = [part.replace("FOLDER", str(copy)) for part in parts]
    assert_refused(copy, capsys, monkeypatch, prepare, line, parts, HALF="a\ud800")


@pytest.mark.parametrize("command", ["score", "sweep", "validate"])
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([f"{PRE}.objective.mask_probability", "0.3"], "stages.pretraining.objective.mask_probability"),
        ([f"{FINE}.objective.max_length", "8"], "stages.finetuning.objective.max_length"),
        ([f"{PRE}.solver.tol", "0.5"], "stages.pretraining.solver.tol"),
        (["--test.number", "1"], "test.number"),
    ],
)
def test_every_command_that_follows_a_query_names_what_changed(copy, capsys, command, flags, named):
    assert msif(command, "--config", copy / "config.yaml", *flags) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(("prepare", "line", "parts"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_one_sentence_and_nothing_is_written(untrained, capsys, monkeypatch, prepare, line, parts):
    assert_refused(untrained.parent, capsys, monkeypatch, prepare, line, parts)


@pytest.mark.parametrize(("prepare", "line", "parts"), BAD.values(), ids=BAD)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(copy, capsys, monkeypatch, prepare, line, parts):
    assert_refused(copy, capsys, monkeypatch, prepare, line, parts)


@pytest.mark.parametrize(("key", "value", "parts"), [(k, v, p) for k, v, *p in SETTINGS.values()], ids=SETTINGS)
def test_a_setting_that_does_nothing_is_refused_by_its_key(untrained, capsys, monkeypatch, key, value, parts):
    named = [key.removeprefix("--"), *([f" is {value}; expected"] if "{" not in str(value) else [])]
    line = f"plan --config FOLDER/config.yaml {key} VALUE"
    assert_refused(untrained.parent, capsys, monkeypatch, None, line, [*named, *parts], VALUE=str(value))


def assert_refused(copy, capsys, monkeypatch, prepare, line, parts, **words):
    # An absent Hub id is looked up; no test waits for a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if prepare:
        prepare(copy)
    arguments = [words.get(word, word.replace("FOLDER", str(copy))) for word in line.split()]
    if arguments[0] in COMMANDS and "--config" not in arguments and line != "plan":
        arguments += ["--config", copy / "config.yaml"]
    before, folders_before = snapshot(copy), {path for path in copy.rglob("*") if path.is_dir()}

    assert msif(*arguments) == 2
    (message,) = visible(capsys.readouterr().err)
    assert message.startswith("msif")
    assert ": error: " in message
    assert all(part in message for part in parts), message
    assert "Traceback" not in message

    assert msif(*arguments, "--json") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert visible(said.err)[-1] == message
    assert snapshot(copy) == before
    assert {path for path in copy.rglob("*") if path.is_dir()} <= folders_before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        (f"{PRE}.training.learning_rat", "stages.pretraining.training.learning_rate"),
        (f"{FINE}.objective.lables", "stages.finetuning.objective.labels"),
        (f"{PRE}.model.config.hidden_sise", "stages.pretraining.model.config.hidden_size"),
    ],
)
def test_every_command_checks_every_setting_before_it_works(untrained, capsys, command, flag, nearest):
    assert msif(command, "--config", untrained, flag, 1) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"unknown key {flag[2:]!r}; the nearest known key is {nearest!r}." in said.err


@pytest.mark.slow
def test_a_recipe_is_its_commands_one_after_another(tmp_path, capsys, monkeypatch):
    (recipe,) = Path(__file__).parents[2].glob("recipes/bert_gop_debate/run.py")
    path = project(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--config", str(path), "--json"])
    runpy.run_path(str(recipe), run_name="__main__")
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(key in report for key, report in zip(("text", "stages", "query", "scores"), reports, strict=True))
    assert (tmp_path / "run" / "table1.md").exists()
    monkeypatch.setattr(sys, "argv", ["run.py", "--config", str(path), "--sed", "1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(recipe), run_name="__main__")
    assert end.value.code == 2


def test_an_interruption_says_so(untrained, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(query, "run", interrupt)
    assert msif("query", "--config", untrained) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_command_is_a_file_and_a_name_in_one_group():
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert sorted(name for group in cli.COMMANDS.values() for name in group) == sorted(files)
    for command in cli.load_commands().values():
        assert all(callable(getattr(command, name)) for name in ("register", "run", "render"))
        assert command.TAKES_CONFIGURATION or not (command.FLAGS or command.SHARES_WORK)
        assert command.HELP
        assert isinstance(command.WRITES, bool)


HEAVY = {"torch", "transformers", "datasets", "pandas", "numpy", "rich"}


def test_help_lists_every_key_and_imports_nothing_heavy():
    code = (
        "import sys; from hf_msif.project.cli import main; code = main(sys.argv[1:]);"
        f"heavy = {HEAVY} & set(sys.modules);"
        "sys.exit(code or ' '.join(heavy) or 0)"
    )
    said = []
    for arguments in (["--help"], ["plan", "--help"], ["top", "-h"], ["--version"]):
        environment = {**os.environ, "COLUMNS": "100"}
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        said.append(process.stdout)
    for group, names in cli.COMMANDS.items():
        paragraph = said[0].partition(f"\n{group}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  (\w+)", paragraph, re.MULTILINE) == list(names)
    assert "msif demo" in said[0].partition("first steps:")[2]
    assert "\n  --stages.NAME.solver.damping\n" in said[1]
    assert "--config FILE.yaml" in said[1]
    assert max(map(len, said[1].splitlines())) <= 119
    assert "NAME.solver" not in said[2]


def test_errors_of_the_configuration_import_nothing_heavy_either(untrained):
    code = (
        "import sys; from hf_msif.project.cli import main; code = main(sys.argv[1:]);"
        f"sys.exit(code + len({HEAVY} & set(sys.modules)))"
    )
    arguments = ["plan", "--config", str(untrained), "--sed", "1"]
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "msif plan: error: unknown key 'sed'; the nearest known key is 'seed'.\n"
