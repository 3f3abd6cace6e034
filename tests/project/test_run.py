"""Training, loading and choosing rows as a configuration says: what is kept, resumed, refused and left behind."""

import json
import shutil

import pytest
import torch
import transformers
from helpers.project import SIZES, listing, snapshot, visible

from hf_msif.errors import FileError, InputError
from hf_msif.project import config, explained
from hf_msif.project.plan import plan
from hf_msif.project.run import Run
from hf_msif.project.train import stages_to_train, train
from hf_msif.training import trainer

CHECKPOINTS = [("stages.pretraining.training.save_strategy", "steps"), ("stages.pretraining.training.save_steps", 2)]


@pytest.fixture
def make_run(trained_project, tmp_path):
    """Makes the run of a copy, with overrides."""
    shutil.copytree(trained_project.parent / "run", tmp_path / "run")

    def make(*overrides):
        return Run(config.load(trained_project, [("run_dir", str(tmp_path / "run")), *overrides]), progress=False)

    return make


def weights(run):
    return transformers.AutoModelForMaskedLM.from_pretrained(run.folder / "pretraining").state_dict()


def interrupted(run, monkeypatch, step):
    """Trains pretraining until it is stopped after the step `step`, as by Ctrl-C."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Watch, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            train(run, "pretraining")


def test_a_finished_training_leaves_no_checkpoints_and_starts_anew(make_run, capsys):
    same = make_run(*CHECKPOINTS)
    before = weights(same)
    report = train(same, "pretraining")
    assert report["train"]["loss"] > 0
    assert listing(same.folder) == {"finetuning", "finetuning.json", "pretraining", "pretraining.json"}
    assert json.loads((same.folder / "pretraining.json").read_text()) == report
    after = weights(same)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "interrupted" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(make_run, monkeypatch, capsys):
    steps = ("stages.pretraining.training.max_steps", 11)
    whole = make_run(*CHECKPOINTS, steps)
    train(whole, "pretraining")
    expected = weights(whole)
    shutil.rmtree(whole.folder / "pretraining")

    interrupted(make_run(*CHECKPOINTS, steps), monkeypatch, 7)
    assert not (whole.folder / "pretraining").exists()

    # Other settings would make a model that no configuration describes.
    with pytest.raises(InputError, match=r"differs in .*max_steps, seed: delete"):
        train(make_run(*CHECKPOINTS, ("seed", 1)), "pretraining")

    capsys.readouterr()
    resumed = make_run(*CHECKPOINTS, steps)
    train(resumed, "pretraining")
    assert "an interrupted training left" in capsys.readouterr().out
    after = weights(resumed)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert not list(resumed.folder.glob("*.checkpoints"))


def test_what_is_not_trained_may_change_between_interruption_and_resumption(make_run, monkeypatch, capsys):
    interrupted(make_run(*CHECKPOINTS), monkeypatch, 3)
    train(make_run(*CHECKPOINTS, ("stages.pretraining.solver.damping", 5), ("test.number", 1)), "pretraining")
    assert "checkpoint-2" in capsys.readouterr().out


def test_an_interruption_before_the_first_checkpoint_leaves_nothing(make_run, monkeypatch):
    run = make_run()
    before = snapshot(run.folder)
    interrupted(run, monkeypatch, 1)
    assert snapshot(run.folder) == before
    assert not list(run.folder.glob("*.checkpoints"))


def test_a_training_that_diverges_leaves_the_older_model_and_no_checkpoint(make_run):
    run = make_run(*CHECKPOINTS, ("stages.pretraining.training.learning_rate", 1e30))
    before = snapshot(run.folder)
    with pytest.raises(InputError, match="learning rate"):
        train(run, "pretraining")
    assert snapshot(run.folder) == before
    assert not list(run.folder.glob("*.checkpoints"))


def test_a_failed_save_leaves_the_older_model(make_run, monkeypatch):
    run = make_run()
    before = snapshot(run.folder)

    def fails(folder):
        raise OSError("disk full")

    monkeypatch.setattr(run.tokenizer, "save_pretrained", fails)
    with pytest.raises(FileError, match=r"finetuning cannot be written \(disk full\)"):
        train(run, "finetuning")
    assert {k: v for k, v in snapshot(run.folder).items() if "checkpoints" not in str(k)} == before
    assert not list(run.folder.glob("*.part"))


def test_the_head_is_new_and_the_encoder_is_the_one_before(make_run):
    run = make_run(("stages.finetuning.model.head", "auto"))
    before, model = run.model("pretraining"), run.new_model("finetuning")
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert model.config.num_labels == 2
    encoder = model.base_model.state_dict()
    assert all(torch.equal(encoder[name], t) for name, t in before.base_model.state_dict().items())
    again = make_run(("stages.finetuning.model.head", "auto")).new_model("finetuning")
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight.zero_()
    assert before.base_model.embeddings.word_embeddings.weight.abs().sum() > 0


def test_a_second_stage_of_the_same_task_keeps_the_head(make_run, trained_project):
    stages = json.loads(trained_project.read_text())["stages"]
    stages["pretraining_2"] = {**stages.pop("finetuning"), "task": "masked-lm"} | {
        "model": {},
        "objective": {},
        "trainable": "all",
        "alpha": 0.1,
    }
    run = make_run(("stages", stages))
    model, before = run.new_model("pretraining_2"), run.model("pretraining")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.state_dict().items())


def test_integer_labels_say_how_many_classes_there_are(make_run):
    data = [("stages.finetuning.data.label_column", "stars"), ("stages.finetuning.data.keep", {})]
    run = make_run(*data, ("stages.finetuning.objective", {}), ("stages.finetuning.model.head", "auto"))
    for row in run.rows("finetuning"):
        row["label"] += 1
    assert run.new_model("finetuning").config.num_labels == 3
    for row in run.rows("finetuning"):  # {0, 4}, as Sentiment140 has them
        row["label"] = 4 * (row["label"] - 1)
    with pytest.raises(
        InputError, match=r"holds \[0, 4\], so its head would have 5 classes.*finetuning.objective.lab"
    ):
        run.new_model("finetuning")


FRACTION = ("stages.finetuning.data.test_fraction", 0)
PART = "stages.finetuning.data.part"
ASIDE = {
    # Overrides, and what the refusal says; a set: the parts that the test rows are of.
    "a fraction": ([], {"test"}),
    "a fraction, said": ([("test.split", "test")], {"test"}),
    "training rows, said": ([FRACTION, ("test.split", "train")], {"train"}),
    "training rows beside a fraction": ([("test.split", "train")], {"train"}),
    "nothing set aside": ([FRACTION], "data sets no rows aside, so the test rows would be .* test.split: train"),
    "nothing set aside, said": ([FRACTION, ("test.split", "test")], "data sets no rows aside"),
    "trained on all": ([(PART, "all")], "finetuning.data.part is 'all', so the test rows would be rows that stage"),
    "a test split that is the split": (
        [FRACTION, ("stages.finetuning.data.test_split", "train")],
        "finetuning.data.test_split names the rows of stages.finetuning.data.split, so the test rows would be rows",
    ),
    "trained on the test side": ([(PART, "test")], "part is 'test', so the test rows would be .* part: train"),
}


@pytest.mark.parametrize(("overrides", "expected"), ASIDE.values(), ids=ASIDE)
def test_test_rows_are_no_training_rows_unless_that_is_meant(make_run, overrides, expected):
    run = make_run(*overrides)
    if isinstance(expected, str):
        for command in (run.tests, lambda: explained.side(run), lambda: plan(run)):
            with pytest.raises(InputError, match=expected):
                command()
    else:
        training = {row["example_id"] for row in run.rows("finetuning")}
        assert {"train" if row["example_id"] in training else "test" for row in explained.side(run)} == expected


@pytest.mark.parametrize("head", ["auto", "feed_forward"])
def test_a_saved_classifier_names_its_classes(make_run, tmp_path, head):
    run = make_run(("stages.finetuning.model.head", head), ("stages.finetuning.training", {"max_steps": 1}))
    train(run, "finetuning")
    assert run.model("finetuning").config.id2label == {0: "Negative", 1: "Positive"}
    swapped = ("stages.finetuning.objective.labels", ["Positive", "Negative"])
    further = make_run(swapped, ("stages.finetuning.model", {"path": str(run.folder / "finetuning")}))
    with pytest.raises(InputError, match=r"\['Positive', 'Negative'\].*\['Negative', 'Positive'\]"):
        further.objective("finetuning", further.new_model("finetuning"))


def test_sentences_are_cut_at_what_the_model_takes(make_run, tmp_path):
    run = make_run()
    model = run.model("pretraining")
    assert run.tokenizer.model_max_length > 16
    assert run.objective("pretraining", model).max_length == 16
    assert make_run(("stages.pretraining.objective.max_length", 8)).objective("pretraining", model).max_length == 8
    with pytest.raises(InputError, match="max_length is 17; expected at most 16"):
        make_run(("stages.pretraining.objective.max_length", 17)).objective("pretraining", model)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(make_run):
    run = make_run(("stages.pretraining.model.config.vocab_size", 20))
    with pytest.raises(InputError, match=r"25 tokens, the model of stage 'pretraining' 20.*vocab_size"):
        train(run, "pretraining")


def test_a_checkpoint_without_the_head_is_no_trained_model(make_run):
    run = make_run()
    run.model("pretraining").base_model.save_pretrained(run.folder / "pretraining")
    with pytest.raises(InputError, match=r"no weights for 'cls\.predictions.*run msif train --stage pretraining"):
        make_run().model("pretraining")


def test_a_model_given_by_path_is_not_trained_but_may_be_trained_on(make_run, trained_project, capsys):
    path = ("stages.pretraining.model.path", str(trained_project.parent / "run" / "pretraining"))
    taken = make_run(path, ("stages.pretraining.training", {}))
    shutil.rmtree(taken.folder / "pretraining")
    assert stages_to_train(taken) == ["finetuning"]
    assert "is taken as it is" in capsys.readouterr().out
    assert taken.model("pretraining").config.hidden_size == SIZES["hidden_size"]
    further = make_run(path)
    assert stages_to_train(further) == ["pretraining", "finetuning"]
    start = further.new_model("pretraining").state_dict()
    assert all(torch.equal(start[name], t) for name, t in taken.model("pretraining").state_dict().items())


def test_an_inherited_encoder_is_not_trained_without_alpha(make_run):
    run = make_run(("stages.finetuning.trainable", ["encoder.embeddings.*", "hidden*", "classifier*"]))
    with pytest.raises(InputError, match=r"stages\.finetuning\.alpha is missing, .*'encoder\.embeddings"):
        train(run, "finetuning")


def test_test_rows_are_of_the_test_side_and_distinct(make_run):
    run = make_run(("test.number", 5))
    training_texts = {row["text"] for row in run.rows("finetuning")}
    tests = run.tests()
    assert len({row["text"] for row in tests}) == 5
    assert not training_texts & {row["text"] for row in tests}
    assert make_run(("test.number", 5)).tests() == tests
    assert make_run(("test.number", 5), ("test.seed", 1)).tests() != tests
    ids = [row["example_id"] for row in tests[:2]]
    assert make_run(("test.ids", [str(ids[1]), ids[0]])).tests() == [tests[1], tests[0]]


def test_the_corpus_is_a_sample_of_the_ranked_stage(make_run):
    run = make_run(("corpus.sample", 7))
    assert len(run.corpus()) == 7
    assert all(row in run.rows("pretraining") for row in run.corpus())
    assert make_run(("corpus.sample", 7), ("corpus.seed", 1)).corpus() != run.corpus()
    assert make_run(("corpus.sample", 10**6)).corpus() == run.rows("pretraining")
    assert make_run(("corpus.stage", "finetuning")).corpus() == run.rows("finetuning")


def test_rows_are_loaded_and_announced_once(make_run, capsys):
    run = make_run()
    assert run.rows("pretraining") is run.rows("pretraining")
    assert len(visible(capsys.readouterr().out)) == 1


def test_a_polished_stage_keeps_the_masks_that_were_minimised(make_run):
    for polish, masks in (("null", "folds"), ("{}", "random")):
        run = make_run(("stages.pretraining.polish", polish))
        stage = run._stage("pretraining", run.new_model("pretraining"))
        assert (stage.objective.masks, stage.influence_objective.masks) == ("random", masks)
