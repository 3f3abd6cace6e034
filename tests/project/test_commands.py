"""Image stages by configuration, and what trained stages are used for: validation, cleansing, comparison."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers.project import answer, image_project, listing, msif, project

from hf_msif.errors import InputError
from hf_msif.project import config
from hf_msif.project.retraining import retraining
from hf_msif.project.run import Run
from hf_msif.scoring.scores import Scores


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained and scored image project."""
    path = image_project(tmp_path_factory.mktemp("images"))
    for command in ("plan", "train", "query", "score"):
        assert msif(command, "--config", path) == 0
    return path


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made.parent / "run", tmp_path / "run")
    return made, "--run_dir", tmp_path / "run"


@pytest.mark.slow
def test_image_stages_end_at_stationary_points(made):
    for name in ("pretraining", "finetuning"):
        report = json.loads((made.parent / "run" / f"{name}.json").read_text())
        assert report["polish"]["reached"]
        assert report["polish"]["gradient_norm"] < 1e-9
        assert "training_loss" not in report
    run = Run(config.load(made), progress=False)
    # Labels are counted in the order of `labels`, here 3 before 2.
    batch = run.objectives["finetuning"].collate(run.rows("finetuning"))
    assert [3 - int(label) for label in batch["labels"]] == [row["label"] for row in run.rows("finetuning")]
    assert not {r["example_id"] for r in run.tests()} & {r["example_id"] for r in run.rows("finetuning")}


def test_images_get_figure_3_and_ids_in_table_1(made):
    folder = made.parent / "run"
    assert (folder / "figure3.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_parquet(folder / "table1.parquet")["most influential sentence"][0].startswith("example ")
    saved = json.loads((folder / "query" / "query.json").read_text())["tests"]
    assert {key for row in saved for key in row} == {"example_id", "label"}


@pytest.mark.slow
def test_leave_one_out_agrees_with_retraining_and_is_kept(copied, capsys):
    path, *where = copied
    arguments = ("validate", "--config", path, *where, "--validation.examples", 6)
    report = answer(capsys, *arguments)
    assert report["pearson_r"] > 0.95
    assert report["n"] == 6
    assert report["ceiling"]["pearson_r"] > 0.99
    assert report["identity"]["pearson_r"] < report["pearson_r"]
    assert "tfidf" not in report
    assert set(report["accuracy"]) == {"pretraining", "finetuning", "finetuning, test"}
    assert report["retrainings"] == 2 * (1 + 6)
    folder = where[1] / "validation"
    assert listing(folder) == {f"leave_one_out.{end}" for end in ("json", "parquet", "png")}
    removals = pd.read_parquet(folder / "leave_one_out.parquet")
    assert np.corrcoef(removals.measured, removals.influence)[0, 1] == pytest.approx(report["pearson_r"])
    again = answer(capsys, *arguments, "--validation.baselines", "[random]")
    assert again["retrainings"] == 0
    assert again["pearson_r"] == report["pearson_r"]
    assert "identity" not in again


@pytest.mark.slow
def test_other_experiments_and_groups_along_the_ranking(copied, capsys):
    path, *where = copied
    few = ("--validation.ceiling_seeds", "[]", "--validation.baselines", "[]")
    groups = ("--validation.groups", 4, "--validation.group_size", 2)
    validate = ("validate", "--config", path, *where, *few, "--validation.experiment")
    report = answer(capsys, *validate, "remove_groups", *groups)
    assert report["n"] == 4
    assert report["pearson_r"] > 0.95
    assert report["ceiling"] is None
    removed = pd.read_parquet(where[1] / "validation" / "remove_groups.parquet")
    assert removed.influence.is_monotonic_decreasing  # from the most helpful rows to the most harmful ones
    report = answer(capsys, *validate, "datamodelling_score", "--validation.subsets", 5)
    assert report["settings"]["removed"] == 3
    assert report["spearman_r"] > 0.5
    report = answer(capsys, *validate, "remove_top", "--validation.top_fraction", 0.05, "--validation.draws", 4)
    assert report["settings"]["removed"] == 3
    assert report["difference"] > 0
    assert report["above"] == 1
    assert len(pd.read_parquet(where[1] / "validation" / "remove_top.parquet")) == 1 + 4  # summed over the tests


@pytest.mark.slow
def test_from_scratch_trains_each_stage_as_its_settings_say(tmp_path, capsys):
    path = project(tmp_path / "texts")
    changes = ("--stages.finetuning.polish", "{tol: 1e-3}", "--stages.finetuning.weight_decay", 0.01)
    assert msif("train", "--config", path, *changes) == 0
    run = Run(config.load(path, [(k[2:], v) for k, v in zip(changes[::2], changes[1::2], strict=True)]), False)
    retrain = retraining(run, run.chain(), run.tests(), "from_scratch")
    assert retrain.polished == [False, True]
    assert [a is None for a in retrain.arguments] == [False, False]
    losses = [retrain(frozenset(), seed).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(InputError, match=r"stages.pretraining.polish is missing"):
        retraining(run, run.chain(), run.tests(), "warm_start")


@pytest.mark.slow
def test_cleansing_writes_the_rest_and_measures_what_it_does(copied, capsys):
    path, *where = copied
    arguments = ("cleanse", "--config", path, *where, "--cleanse.fraction", 0.1)
    report = answer(capsys, *arguments)
    assert report["removed"] == 6
    remaining = pd.read_parquet(where[1] / "cleanse" / "kept.parquet")
    run = Run(config.load(path, [("run_dir", str(where[1]))]), progress=False)
    tests = run.tests()
    influence = run.chain().query(tests, "mean").score(run.rows("pretraining")).influence()
    ids = np.array([row["example_id"] for row in run.rows("pretraining")])
    assert set(ids) - set(remaining.example_id) == set(ids[np.argsort(-influence)[:6]])
    assert len(pd.read_parquet(where[1] / "cleanse" / "random.parquet")) == 54

    report = answer(capsys, *arguments, "--cleanse.retrain", "warm_start", "--cleanse.seeds", 2)
    assert report["repetitions"] == 2
    assert len(report["table"]) == 2
    assert [row["seed"] for row in report["table"]] == [0, 1]
    assert (where[1] / "cleanse" / "seed-1" / "pretraining").is_dir()
    gain = report["loss_gain_over_random"]
    each = [row["loss, random"] - row["loss, harmful"] for row in report["table"]]
    assert gain["mean"] == pytest.approx(np.mean(each))
    assert gain["interval"][0] < gain["mean"] < gain["interval"][1]
    assert set(report["table"][0]) > {"accuracy, all", "accuracy, harmful"}
    assert report["held_out"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("validate", "--validation.baselines", "[identiy]"), "validation.baselines names 'identiy'"),
        (("validate", "--validation.experiment", "loo"), "expected one of leave_one_out, remove_groups"),
        (("validate", "--validation.experiment", "remove_groups", "--validation.groups", 50), "do not overlap"),
        (("cleanse", "--cleanse.seeds", 3), "cleanse.retrain"),
        (("cleanse", "--cleanse.fraction", 0.001), "is 0 rows"),
        (("plan", "--stages.finetuning.objective.labels", "[0, 1]"), "holds ['2', '3']"),
        (("plan", "--stages.finetuning.polish", "{steps: 3}"), "stages.finetuning.polish.steps"),
        (("plan", "--stages.finetuning.data.test_split", "test"), "has test_split and test_fraction"),
        (("plan", "--stages.finetuning.task", "sequence-classification"), "tokenizer is missing"),
        (("query", "--test.wrong", "true", "--test.number", 40), "classifies wrongly"),
    ],
)
def test_a_bad_setting_is_one_sentence(copied, capsys, arguments, message):
    path, *where = copied
    command, *rest = arguments
    before = sorted(where[1].rglob("*"))
    assert msif(command, "--config", path, *where, *rest) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"msif {command}: error: ")
    assert message in error
    assert sorted(where[1].rglob("*")) == before


@pytest.mark.parametrize("how", ["warm_start", "from_scratch"])
def test_a_stage_taken_as_it_is_is_not_trained_again(copied, tmp_path, capsys, how):
    path, flag, folder = copied
    finished = shutil.move(folder / "pretraining", tmp_path / "finished")
    shutil.rmtree(folder / "query")
    taken = {"model": f"{{path: {finished}}}", "training": "{}", "polish": "null"}
    settings = [word for key, value in taken.items() for word in (f"--stages.pretraining.{key}", value)]
    command = ("validate", "--config", path, flag, folder, *settings, "--validation.retrain", how)
    assert msif(*command) == 2
    assert "stages.pretraining is taken as it is" in capsys.readouterr().err


def test_only_wrong_predictions_are_asked_about(copied):
    path, *where = copied
    run = Run(config.load(path, [("run_dir", str(where[1])), ("test.wrong", True), ("test.number", 1)]), False)
    [row] = run.tests()
    model, objective = run.model("finetuning"), run.objectives["finetuning"]
    batch = objective.collate([row])
    assert int(model(pixel_values=batch["pixel_values"]).logits.argmax()) != int(batch["labels"])


def test_the_mean_of_runs_is_a_run_folder_of_its_own(copied, tmp_path, capsys):
    _, _, run = copied
    scores = Scores.from_parquet(run / "scores.parquet")
    expected = 2 * scores.influence()
    scores.frame["influence"] *= 3
    (tmp_path / "other").mkdir()
    scores.to_parquet(tmp_path / "other" / "scores.parquet")
    report = answer(capsys, "mean", "--runs", run, tmp_path / "other", "--run_dir", tmp_path / "mean")
    np.testing.assert_allclose(Scores.from_parquet(report["scores"]).influence(), expected)
    shown = answer(capsys, "top", "--run", tmp_path / "mean")
    assert shown["noise"].startswith("mean of 2 rankings")
    assert msif("mean", "--runs", run, tmp_path / "other", "--run_dir", tmp_path / "mean") == 0  # made anew
    before = (run / "scores.parquet").read_bytes()
    assert msif("mean", "--runs", run, tmp_path / "other", "--run_dir", run) == 2
    assert "msif mean did not write it" in capsys.readouterr().err
    assert (run / "scores.parquet").read_bytes() == before
    assert msif("mean", "--runs", run, "--run_dir", tmp_path / "one") == 2
    assert not (tmp_path / "one").exists()


def test_two_runs_are_compared(copied, tmp_path, capsys):
    _, _, run = copied
    scores = Scores.from_parquet(run / "scores.parquet")
    scores.frame["influence"] *= 3
    (tmp_path / "other").mkdir()
    scores.to_parquet(tmp_path / "other" / "scores.parquet")
    report = answer(capsys, "compare", "--runs", tmp_path / "other", run, "--output", tmp_path / "both.png", "-k", 5)
    assert report["ratio"] == pytest.approx(3)
    assert report["ratio_interval"] == pytest.approx([3, 3])  # the same rows are drawn on both sides
    assert report["spearman_r"] == pytest.approx(1)
    assert report["top_k_shared"] == 1
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert msif("compare", "--runs", run, run, "--output", tmp_path / "both.PDF", "--json") == 0
    assert (tmp_path / "both.PDF").read_bytes().startswith(b"%PDF")
    for name in ("both.xyz", "both", "both.part"):
        assert msif("compare", "--runs", run, tmp_path / "nowhere", "--output", tmp_path / name) == 2
        message = capsys.readouterr().err
        assert f"--output is '{tmp_path / name}'; expected a name with one of the endings" in message
        assert "pdf, " in message
        assert not (tmp_path / name).exists()
    assert msif("compare", "--runs", run, tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Pretraining taken for a minimum, the domain's unlabelled tweets through their run, a head: queried once."""
    path = project(tmp_path_factory.mktemp("three"))
    settings = json.loads(path.read_text())
    first, last = settings["stages"].values()
    training = {"num_train_epochs": 2, "learning_rate": 1e-3, "warmup_steps": 2, "per_device_train_batch_size": 8}
    domain = {"task": "masked-lm", "link": "unrolled", "training": {**training, "adam_epsilon": 1e-3}}
    domain["data"] = {key: last["data"][key] for key in ("path", "data_files", "id_column", "test_fraction")}
    path.write_text(json.dumps({**settings, "stages": {"pretraining": first, "domain": domain, "finetuning": last}}))
    for command in ("plan", "train", "query"):
        assert msif(command, "--config", path) == 0
    return path


@pytest.mark.slow
def test_a_chain_of_three_ranks_every_stage_side_by_side(three, capsys):
    run, scores = three.parent / "run", {}
    for stage, file in (("finetuning", "-finetuning"), ("pretraining", ""), ("domain", "-domain")):
        report = answer(capsys, "score", "--config", three, "--corpus.stage", stage)
        assert report["scores"] == str(run / f"scores{file}.parquet")
        assert (run / f"table1{file}.md").is_file()
        assert len(answer(capsys, "top", "--run", run, "--stage", stage, "-k", 2)["tests"][0]["top"]) == 2
        scores[stage] = Scores.from_parquet(report["scores"])
        assert scores[stage].metadata["stage"] == stage
        assert all(np.abs(scores[stage].influence(q)).max() > 0 for q in range(2))
    links = {name: facts["link"] for name, facts in scores["domain"].metadata["certificate"]["stages"].items()}
    assert links == {"pretraining": "implicit", "domain": "unrolled", "finetuning": "implicit"}
    assert len(scores["domain"]) > len(scores["finetuning"])  # neutral tweets teach words, too
    assert answer(capsys, "top", "--run", run)["stage"] == "pretraining"
    comparison = answer(capsys, "compare", "--runs", run, run, "--stages", "domain", "finetuning")
    assert comparison["shared"] == len(scores["finetuning"])
    assert -1 <= comparison["signed_r"] <= 1
    assert msif("top", "--run", run, "--stage", "domian") == 2
    assert "holds scores of the stages ['domain', 'finetuning', 'pretraining']" in capsys.readouterr().err


@pytest.mark.slow
def test_the_domain_stage_starts_from_the_head_before_it_and_says_what_it_gained(three):
    run = Run(config.load(three), progress=False)
    chain = run.chain()
    start = chain.stage("domain").differentiation.recording.state(0)["parameters"]
    head = "cls.predictions.transform.dense.weight"
    assert (start[head] == chain.stage("pretraining").model.parameters[head].cpu()).all()
    assert head in chain.stage("domain").split.inherited
    report = json.loads((three.parent / "run" / "domain.json").read_text())
    assert report["test_before"]["examples"] == report["test"]["examples"]
    assert report["test_before"]["loss"] > report["test"]["loss"]
    assert "test_before" not in json.loads((three.parent / "run" / "pretraining.json").read_text())
    assert "test_before" not in json.loads((three.parent / "run" / "finetuning.json").read_text())


@pytest.mark.slow
def test_removed_tweets_of_the_domain_repeat_its_run_and_leave_pretraining_alone(three, tmp_path, capsys):
    double = [word for name in config.load(three).stages for word in (f"--stages.{name}.model.dtype", "float64")]
    polished = ("--stages.finetuning.polish", "{}", "--stages.finetuning.weight_decay", 0.01)
    exact = ("--stages.finetuning.curvature", "hessian", "--stages.finetuning.solver", "{name: dense, damping: 0}")
    # Adam divides by a gradient's own size: a word that one tweet alone has moves by as much at half its weight.
    gentle = ("--stages.domain.training.optim", "sgd", "--stages.domain.training.learning_rate", 0.03)
    where = ("--config", three, "--run_dir", tmp_path, *double, *polished, *exact, *gentle)
    assert msif("train", *where) == 0
    few = ("--validation.groups", 5, "--validation.group_size", 1, "--validation.baselines", "[]")
    report = answer(
        capsys, "validate", *where, *few, "--validation.experiment", "remove_groups", "--corpus.stage", "domain"
    )
    assert report["pearson_r"] > 0.99
    assert report["slope"] == pytest.approx(1, abs=0.1)
    assert report["ceiling"]["pearson_r"] > 0.99
    assert report["validation"].endswith("remove_groups-domain.json")
    assert msif("validate", *where, *few) == 2
    assert "stages.pretraining.polish is missing" in capsys.readouterr().err
