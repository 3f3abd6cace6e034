"""Training, loading and choosing rows as a configuration says: what is kept, resumed, refused and left behind."""

import json
import shutil

import pytest
import torch
import transformers
from helpers.project import SIZES, snapshot, visible

from hf_msif import training
from hf_msif.errors import InputError
from hf_msif.project import config
from hf_msif.project.run import Run

CHECKPOINTS = [("stages.pretraining.training.save_strategy", "steps"), ("stages.pretraining.training.save_steps", 2)]


@pytest.fixture
def run(trained_project, tmp_path):
    """Makes the run of a copy, with overrides."""
    shutil.copytree(trained_project.parent / "run", tmp_path / "run")

    def make(*overrides):
        return Run(config.load(trained_project, [("run_dir", str(tmp_path / "run")), *overrides]), progress=False)

    return make


def weights(run):
    return transformers.AutoModelForMaskedLM.from_pretrained(run.folder / "pretraining").state_dict()


def interrupted(run, monkeypatch, step):
    """Trains pretraining until it is stopped after so many steps, as by Ctrl-C."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Watch, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            run.train("pretraining")


def test_a_finished_training_leaves_no_checkpoints_and_starts_anew(run, capsys):
    same = run(*CHECKPOINTS)
    before = weights(same)
    report = same.train("pretraining")
    assert report["train"]["loss"] > 0
    assert sorted(p.name for p in same.folder.iterdir()) == [
        "finetuning",
        "finetuning.json",
        "pretraining",
        "pretraining.json",
    ]
    assert json.loads((same.folder / "pretraining.json").read_text()) == report
    after = weights(same)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "interrupted" not in capsys.readouterr().out


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(run, monkeypatch, capsys):
    steps = ("stages.pretraining.training.max_steps", 11)
    whole = run(*CHECKPOINTS, steps)
    whole.train("pretraining")
    expected = weights(whole)
    shutil.rmtree(whole.folder / "pretraining")

    interrupted(run(*CHECKPOINTS, steps), monkeypatch, 7)
    assert not (whole.folder / "pretraining").exists()

    # Other settings would make a model that no configuration describes.
    with pytest.raises(InputError, match=r"differs in .*max_steps, seed: delete"):
        run(*CHECKPOINTS, ("seed", 1)).train("pretraining")

    capsys.readouterr()
    resumed = run(*CHECKPOINTS, steps)
    resumed.train("pretraining")
    assert "an interrupted training left" in capsys.readouterr().out
    found = weights(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(resumed.folder.glob("*.checkpoints"))


def test_what_is_not_trained_may_change_between_interruption_and_resumption(run, monkeypatch, capsys):
    interrupted(run(*CHECKPOINTS), monkeypatch, 3)
    run(*CHECKPOINTS, ("stages.pretraining.solver.damping", 5), ("test.number", 1)).train("pretraining")
    assert "checkpoint-2" in capsys.readouterr().out


def test_an_interruption_before_the_first_checkpoint_leaves_nothing(run, monkeypatch):
    one = run()
    before = snapshot(one.folder)
    interrupted(one, monkeypatch, 1)
    assert snapshot(one.folder) == before
    assert not list(one.folder.glob("*.checkpoints"))


def test_a_training_that_diverges_leaves_the_older_model_and_no_checkpoint(run):
    one = run(*CHECKPOINTS, ("stages.pretraining.training.learning_rate", 1e30))
    before = snapshot(one.folder)
    with pytest.raises(InputError, match="learning rate"):
        one.train("pretraining")
    assert snapshot(one.folder) == before
    assert not list(one.folder.glob("*.checkpoints"))


def test_a_failed_save_leaves_the_older_model(run, monkeypatch):
    one = run()
    before = snapshot(one.folder)

    def fails(folder):
        raise OSError("disk full")

    monkeypatch.setattr(one.tokenizer, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        one.train("finetuning")
    assert {k: v for k, v in snapshot(one.folder).items() if "checkpoints" not in str(k)} == before
    assert not list(one.folder.glob("*.part"))


def test_the_head_is_new_and_the_encoder_is_the_one_before(run):
    one = run(("stages.finetuning.model.head", "auto"))
    before, model = one.model("pretraining"), one.new_model("finetuning")
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert model.config.num_labels == 2
    own = model.base_model.state_dict()
    assert all(torch.equal(own[name], t) for name, t in before.base_model.state_dict().items())
    again = run(("stages.finetuning.model.head", "auto")).new_model("finetuning")
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight.zero_()
    assert before.base_model.embeddings.word_embeddings.weight.abs().sum() > 0


def test_a_second_stage_of_the_same_task_keeps_the_head(run, trained_project):
    stages = json.loads(trained_project.read_text())["stages"]
    stages["pretraining_2"] = {**stages.pop("finetuning"), "task": "masked-lm"} | {
        "model": {},
        "objective": {},
        "trainable": "all",
        "alpha": 0.1,
    }
    one = run(("stages", stages))
    model, before = one.new_model("pretraining_2"), one.model("pretraining")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.state_dict().items())


def test_integer_labels_say_how_many_classes_there_are(run):
    data = [("stages.finetuning.data.label_column", "stars"), ("stages.finetuning.data.keep", {})]
    one = run(*data, ("stages.finetuning.objective", {}), ("stages.finetuning.model.head", "auto"))
    for row in one.rows("finetuning"):
        row["label"] += 3
    assert one.new_model("finetuning").config.num_labels == 5


def test_sentences_are_cut_at_what_the_model_takes(run, tmp_path):
    one = run()
    model = one.model("pretraining")
    assert one.tokenizer.model_max_length > 16
    assert one.objective("pretraining", model).max_length == 16
    assert run(("stages.pretraining.objective.max_length", 8)).objective("pretraining", model).max_length == 8
    with pytest.raises(InputError, match="max_length is 17; expected at most 16"):
        run(("stages.pretraining.objective.max_length", 17)).objective("pretraining", model)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run):
    one = run(("stages.pretraining.model.config.vocab_size", 20))
    with pytest.raises(InputError, match=r"25 tokens, the model of stage 'pretraining' 20.*vocab_size"):
        one.train("pretraining")


def test_a_checkpoint_without_the_head_is_no_trained_model(run):
    one = run()
    one.model("pretraining").base_model.save_pretrained(one.folder / "pretraining")
    with pytest.raises(InputError, match=r"no weights for 'cls\.predictions.*run msif train --stage pretraining"):
        run().model("pretraining")


def test_a_model_given_by_path_is_not_trained_but_may_be_trained_on(run, trained_project, capsys):
    path = ("stages.pretraining.model.path", str(trained_project.parent / "run" / "pretraining"))
    given = run(path, ("stages.pretraining.training", {}))
    shutil.rmtree(given.folder / "pretraining")
    assert given.to_train() == ["finetuning"]
    assert "is taken as it is" in capsys.readouterr().out
    assert given.model("pretraining").config.hidden_size == SIZES["hidden_size"]
    further = run(path)
    assert further.to_train() == ["pretraining", "finetuning"]
    start = further.new_model("pretraining").state_dict()
    assert all(torch.equal(start[name], t) for name, t in given.model("pretraining").state_dict().items())


def test_an_inherited_encoder_is_not_trained_without_alpha(run):
    one = run(("stages.finetuning.trainable", ["encoder.embeddings.*", "hidden*", "classifier*"]))
    with pytest.raises(InputError, match=r"stages\.finetuning\.alpha is missing, .*'encoder\.embeddings"):
        one.train("finetuning")


def test_test_rows_are_of_the_test_side_and_distinct(run):
    one = run(("test.number", 5))
    train = {row["text"] for row in one.rows("finetuning")}
    found = one.tests()
    assert len({row["text"] for row in found}) == 5
    assert not train & {row["text"] for row in found}
    assert run(("test.number", 5)).tests() == found
    assert run(("test.number", 5), ("test.seed", 1)).tests() != found
    ids = [row["example_id"] for row in found[:2]]
    assert run(("test.ids", [str(ids[1]), ids[0]])).tests() == [found[1], found[0]]


def test_the_corpus_is_a_sample_of_the_ranked_stage(run):
    one = run(("corpus.sample", 7))
    assert len(one.corpus()) == 7
    assert all(row in one.rows("pretraining") for row in one.corpus())
    assert run(("corpus.sample", 7), ("corpus.seed", 1)).corpus() != one.corpus()
    assert run(("corpus.sample", 10**6)).corpus() == one.rows("pretraining")
    assert run(("corpus.stage", "finetuning")).corpus() == one.rows("finetuning")


def test_rows_are_loaded_and_announced_once(run, capsys):
    one = run()
    assert one.rows("pretraining") is one.rows("pretraining")
    assert len(visible(capsys.readouterr().out)) == 1
