"""`msif diagnose` and what `msif plan` prints of the checks."""

import json

import pytest
from helpers.project import copied, msif, project

from hf_msif.registry import CHECKS

MADE_CAUSAL = ["--stages.pretraining.task", "causal-lm"]


@pytest.fixture
def path(tmp_path):
    return project(tmp_path / "p")


def test_every_check_of_every_stage_is_told_and_nothing_is_written(path, capsys):
    assert msif("diagnose", "--config", path) == 0
    shown = capsys.readouterr().out
    for name in ("pretraining", "finetuning"):
        assert f"{name}, not trained yet (untrained weights):" in shown
    for check in CHECKS:
        assert shown.count(f"  {check}: ") == 2
    assert "REFUSED" not in shown
    assert not (path.parent / "run").exists()


def test_it_goes_on_after_a_refusal(path, capsys):
    assert msif("diagnose", "--config", path, *MADE_CAUSAL, "--json") == 0
    found = json.loads(capsys.readouterr().out)["stages"]["pretraining"]["checks"]
    assert [finding["check"] for finding in found] == list(CHECKS)
    assert [finding["check"] for finding in found if finding["refused"]] == ["causality"]


def test_plan_refuses_what_diagnose_refuses(path, capsys):
    assert msif("plan", "--config", path, *MADE_CAUSAL) == 2
    assert "the loss would see its own targets; expected a causal model" in capsys.readouterr().err


def test_train_refuses_before_it_trains(path, capsys):
    assert msif("train", "--config", path, *MADE_CAUSAL) == 2
    assert "the loss would see its own targets; expected a causal model" in capsys.readouterr().err
    assert not (path.parent / "run" / "pretraining").exists()


def test_a_skipped_check_is_skipped(path, capsys):
    assert msif("diagnose", "--config", path, *MADE_CAUSAL, "--stages.pretraining.skip_checks", "[causality]") == 0
    shown = capsys.readouterr().out
    assert "  causality: skipped" in shown
    assert "REFUSED" not in shown


def test_plan_tells_the_checks_and_their_cost(trained_project, tmp_path, capsys):
    path = copied(trained_project, tmp_path / "p")
    assert msif("plan", "--config", path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"].count("\n  checks: ") == 2
    assert "of the solve" in report["text"]
    assert [finding["check"] for finding in report["checks"]["pretraining"]] == list(CHECKS)


@pytest.mark.filterwarnings("default")
def test_a_model_into_whose_loss_padding_reaches_is_said_to_be(path, capsys):
    fnet = (
        '{"model_type": "fnet", "vocab_size": 25, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 12}'
    )
    flags = ["--stages.pretraining.model.config", fnet, "--stages.finetuning.model", "{head: auto}"]
    assert msif("diagnose", "--config", path, *flags) == 0
    shown = capsys.readouterr()
    assert "padding: padding reaches the loss: batches of rows of equal length are used" in shown.out
    assert "warning: stage 'pretraining': padding reaches the loss" in shown.err
    assert "set model.config.pad_token_id = 0" in shown.err


def test_smoothness_needs_a_run(path, capsys):
    assert msif("diagnose", "--config", path, "--smoothness") == 2
    assert "has link='implicit', and no recorded run" in capsys.readouterr().err
