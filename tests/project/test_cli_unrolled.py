"""The command line with stages that are pulled back through their own training runs."""

import json
import shutil

import numpy as np
import pytest
from helpers.project import listing, msif, snapshot, unrolled_project, visible

from hf_msif import Scores
from hf_msif.engine.files import load_tensors
from hf_msif.training.replay import Replay

PRE, FINE = "--stages.pretraining", "--stages.finetuning"


def answer(capsys, *arguments):
    assert msif(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = unrolled_project(tmp_path_factory.mktemp("made"))
    assert msif("train", "--config", path, "--json") == 0
    return path


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.yaml"
    path.write_text(made.read_text().replace(str(made.parent), str(tmp_path)))
    return path


def weights(path, name):
    return load_tensors(path.parent / "run" / name / "model.safetensors")[0]


def test_from_plan_to_scores(tmp_path, capsys):
    path = unrolled_project(tmp_path)
    run = tmp_path / "run"
    before = answer(capsys, "plan", "--config", path)
    assert not run.exists()
    assert "not trained yet" in before["text"]
    assert "run of 7 steps of up to 8 rows" in before["text"]
    assert "run of 5 steps of up to 8 rows" in before["text"]

    assert msif("train", "--config", path) == 0
    assert "pretraining: trained in" in capsys.readouterr().out
    assert listing(run) == {f"{name}{end}" for name in ("pretraining", "finetuning") for end in ("", ".json", ".run")}
    after = answer(capsys, "plan", "--config", path)
    assert "not trained yet" not in after["text"]
    for name in ("pretraining", "finetuning"):
        both = [x["stages"][name] for x in (before, after)]
        for key in ("steps", "state_bytes", "states_kept", "states_held", "disk_bytes", "vector_bytes"):
            assert both[0][key] == both[1][key]
        states = sum(p.stat().st_size for p in (run / f"{name}.run").glob("state-*"))
        assert 0 < states - both[0]["disk_bytes"] < 12_000 * both[0]["states_kept"]  # names and shapes

    report = answer(capsys, "query", "--config", path)
    for name, stage in report["stages"].items():
        assert stage["link"] == "unrolled"
        assert stage["solve"]["steps"] == {"pretraining": 7, "finetuning": 5}[name]
        assert stage["solve"]["replay_difference"] == 0.0
    assert msif("score", "--config", path) == 0
    scores = Scores.from_parquet(run / "scores.parquet")
    assert all(np.abs(scores.influence(q)).min() > 0 for q in range(2))
    corpus = (tmp_path / "corpus.txt").read_text().strip().splitlines()
    assert scores.frame.text.tolist() == corpus
    assert not list(run.glob("*.checkpoints"))
    assert not list(run.rglob("sweep-*"))


def test_an_implicit_stage_is_damped_by_its_training_time(made, tmp_path, capsys):
    run, flags = made.parent / "run", ["--config", made, "--run_dir", tmp_path / "run"]
    for stage, name in ((PRE, "pretraining"), (FINE, "finetuning")):
        flags += [f"{stage}.model.path", run / name, f"{stage}.run", run / f"{name}.run", f"{stage}.training", "{}"]
    flags += [f"{PRE}.model.config", "null", f"{PRE}.link", "implicit", f"{PRE}.solver.damping", "training"]
    plan = answer(capsys, "plan", *flags)
    assert "damping='training' is damping" in plan["text"]
    stage = answer(capsys, "query", *flags, "--test.replicates", "1")["stages"]["pretraining"]
    rates = [0.1 * (7 - t) / 7 for t in range(7)]
    tau = sum(rate * (1 - 0.5 ** (t + 1)) / 0.5 for t, rate in enumerate(rates))  # momentum 0.5
    assert stage["solve"]["damping"] == pytest.approx(1 / tau)
    assert "for the training time τ = " in stage["text"]
    assert "× what damping='auto' takes" in stage["text"]


def test_smoothness_needs_models(made, tmp_path, capsys):
    assert msif("diagnose", "--config", made, "--run_dir", tmp_path / "empty", "--smoothness") == 2
    assert "run msif train first" in capsys.readouterr().err


def test_diagnose_tells_whether_the_run_can_be_predicted(copied, capsys):
    flags = ["--config", copied]
    stages = answer(capsys, "diagnose", *flags)["stages"]
    assert "--smoothness repeats the run" in stages["pretraining"]["text"][-1]
    assert "--smoothness" not in stages["finetuning"]["text"][-1]  # another stage is ranked
    found = answer(capsys, "diagnose", *flags, "--smoothness")["metasmoothness"]
    assert found["smooth"] is True
    assert found["first_order_error"] is None  # nothing is predicted yet
    assert msif("query", *flags) == msif("score", *flags) == 0
    capsys.readouterr()
    near, far = answer(capsys, "diagnose", *flags, "--smoothness")["metasmoothness"]["first_order_error"]
    assert near < 0.2
    assert far == pytest.approx(2 * near, rel=0.1)
    assert msif("diagnose", *flags, f"{PRE}.weight_decay", "0.5", "--smoothness") == 2
    shown = capsys.readouterr()
    assert "determinism" not in shown.out  # refused before any check
    assert "weight_decay was" in shown.err
    assert "query again" in shown.err
    (copied.parent / "run" / "scores.parquet").write_bytes(b"damaged")
    assert msif("diagnose", *flags, "--smoothness") == 2
    assert "holds no scores" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("retrain", ["warm_start", "from_scratch"])
def test_validate(copied, capsys, retrain):
    report = answer(capsys, "validate", "--config", copied, "--validation.retrain", retrain)
    assert report["retrainings"] == 10  # four rows and none, twice
    assert report["n"] == 4
    assert report["pearson_r"] > 0.99
    assert report["ceiling"]["pearson_r"] > 0.99
    assert {"implicit", "random"} <= set(report)
    if retrain == "from_scratch":
        assert report["metasmoothness"] is None
    else:
        assert report["metasmoothness"]["losses"] > 0.9
        assert report["metasmoothness"]["smooth"] is True
        near, far = report["metasmoothness"]["first_order_error"]
        assert far == pytest.approx(2 * near, rel=0.1)  # of second order
        assert near < 0.2


@pytest.mark.slow
def test_validate_against_the_mean_over_other_starts(copied, capsys):
    report = answer(capsys, "validate", "--config", copied, "--validation.truth", "expected", "--validation.starts", 2)
    assert report["retrainings"] == 10  # four rows and none, from two starts
    assert report["settings"]["truth"] == "expected"
    assert report["settings"]["starts"] == [1000, 1001]
    assert {"ceiling", "halves", "implicit", "random"} <= set(report)
    assert report["validation"].endswith("leave_one_out-expected.json")
    assert "against the mean of retrainings from 2 other starts" in report["text"]
    own = ("--validation.retrain", "from_scratch", "--validation.seeds", "[1001]", "--validation.ceiling_seeds", "[]")
    report = answer(capsys, "validate", "--config", copied, *own)
    assert report["retrainings"] == 0  # the truths share what is the same
    assert report["settings"]["truth"] == "own"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretraining", "finetuning"])
def test_an_interrupted_training_goes_on(copied, capsys, monkeypatch, stage):
    whole, report = weights(copied, stage), snapshot(copied.parent / "run" / stage)
    steps, forward = [], Replay.forward

    def interrupted(self, slots, t):
        if t == 4:
            raise KeyboardInterrupt
        return forward(self, slots, t)

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "forward", interrupted)
        assert msif("train", "--config", copied, "--stage", stage) == 130
    assert snapshot(copied.parent / "run" / stage) == report  # what an earlier training wrote stays
    capsys.readouterr()
    monkeypatch.setattr(Replay, "forward", lambda self, slots, t: steps.append(t) or forward(self, slots, t))
    assert msif("train", "--config", copied, "--stage", stage) == 0
    assert f"{stage}: an interrupted training left" in capsys.readouterr().out
    assert steps == list(range(3, {"pretraining": 7, "finetuning": 5}[stage]))
    assert all(t.equal(whole[n]) for n, t in weights(copied, stage).items())
    assert not list((copied.parent / "run").glob("*.checkpoints"))
    assert msif("query", "--config", copied, "--json") == 0


@pytest.mark.slow
def test_a_run_recorded_elsewhere_is_used_and_not_trained_over(copied, capsys):
    run = copied.parent / "run"
    expected = answer(capsys, "query", "--config", copied)["losses"]
    elsewhere, model = copied.parent / "elsewhere", copied.parent / "model"
    (run / "finetuning.run").rename(elsewhere)
    (run / "finetuning").rename(model)
    options = ["--config", copied, f"{FINE}.run", elsewhere, f"{FINE}.model.path", model]
    before = snapshot(elsewhere)
    assert answer(capsys, "query", *options)["losses"] == expected
    assert [stage["stage"] for stage in answer(capsys, "train", *options)["stages"]] == ["pretraining"]
    assert answer(capsys, "query", *options)["losses"] == expected
    assert msif("train", *options, "--stage", "finetuning") == 2
    assert "stages.finetuning.run" in visible(capsys.readouterr().err)[-1]
    assert snapshot(elsewhere) == before


BAD = {
    "polish": (f"{FINE}.polish {{}}", "has polish and link: unrolled; expected one of them"),
    "run without link": (f"{FINE}.link implicit {FINE}.alpha 0.1 {FINE}.run x", "run or max_growth, which need link"),
    "growth without link": (f"{FINE}.link implicit {FINE}.alpha 0.1 {FINE}.max_growth 9", "run or max_growth"),
    "run without model": (f"{FINE}.run x", "stages.finetuning.run"),
    "link": (f"{FINE}.link unroled", "stages.finetuning.link is unroled; expected one of implicit, unrolled"),
    "growth": (f"{FINE}.max_growth 0", "stages.finetuning.max_growth is 0"),
    "optimiser": (f"{FINE}.training.optim adafactor", "has optim 'adafactor'"),
    "alpha": (f"{FINE}.link implicit {FINE}.alpha large", "stages.finetuning.alpha is large"),
    "alpha and polish": (f"{FINE}.link implicit {FINE}.alpha auto {FINE}.polish {{}}", "alpha: auto"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_one_sentence(copied, capsys, flags, message):
    before = snapshot(copied.parent)
    assert msif("train", "--config", copied, *flags.split(" ")) == 2
    error = visible(capsys.readouterr().err)[-1]
    assert error.startswith("msif train: error: ")
    assert message in error
    assert snapshot(copied.parent) == before


def test_training_that_explodes_is_named(copied, capsys):
    assert msif("query", "--config", copied, f"{PRE}.max_growth", 0.01) == 2
    error = visible(capsys.readouterr().err)[-1]
    assert "stage 'pretraining': on the way back the adjoint grew" in error
    assert "expected at most 1.0e-02 (max_growth)" in error


def test_there_is_no_damping_to_sweep(copied, capsys):
    assert msif("sweep", "--config", copied) == 2
    assert "without a linear system to damp" in visible(capsys.readouterr().err)[-1]


def test_alpha_is_estimated(copied, capsys):
    options = ["--config", copied, f"{FINE}.link", "implicit", f"{FINE}.alpha", "auto"]
    assert msif("query", *options) == 2
    error = visible(capsys.readouterr().err)[-1]
    assert "run/finetuning was trained with stages.finetuning.link = unrolled; the configuration says impl" in error
    taken = [f"{FINE}.model.path", copied.parent / "run" / "finetuning", f"{FINE}.training", "{}"]
    report = answer(capsys, "query", *options, *taken)
    stage = report["stages"]["finetuning"]
    assert stage["alpha"] == stage["alpha_estimate"]["alpha"]
    assert "estimated from the checkpoints" in stage["text"]
