"""`hf_msif.explain`: what it finds by itself, what it chooses, and that its configuration repeats its answer."""

import argparse
import csv
import inspect
import json

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers import tiny
from helpers.project import msif

from hf_msif import InputError, MultiStageInfluence, Scores, Stage, explain, objectives
from hf_msif.project import config, detection, draft, explained
from hf_msif.project.run import Run

LABELS = ("Negative", "Positive")
TEXT = "we vote no"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair of checkpoints with frozen encoder, as anyone may have saved them, a corpus and tweets."""
    folder = tmp_path_factory.mktemp("pair")
    texts = list(dict.fromkeys(row["text"] for row in tiny.rows(40, seed=1, shortest=3)))
    (folder / "corpus.txt").write_text("\n".join(texts) + "\n")
    with open(folder / "tweets.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["tweet", "sentiment"])
        writer.writerows([row["text"], LABELS[row["label"]]] for row in tiny.rows(30, seed=2, shortest=3))
    pretrained = tiny.model("bert", "masked").float()
    finetuned = transformers.BertForSequenceClassification(pretrained.config)
    finetuned.bert.load_state_dict(pretrained.bert.state_dict(), strict=False)
    finetuned.config.id2label = dict(enumerate(LABELS))
    finetuned.config.label2id = {name: i for i, name in enumerate(LABELS)}
    pretrained.save_pretrained(folder / "pretrained")
    finetuned.save_pretrained(folder / "finetuned")
    tiny.tokenizer().save_pretrained(folder / "finetuned")
    return folder


def asked(folder, **changes):
    """The arguments of `explain` about the pair."""
    paths = {"pretrained": "pretrained", "finetuned": "finetuned", "corpus": "corpus.txt"}
    paths |= {"finetuning_data": "tweets.tsv"}
    return {name: str(folder / path) for name, path in paths.items()} | {"text": TEXT, "progress": False} | changes


def found(folder, **changes):
    """The configuration that the pair tells."""
    defaults = {name: p.default for name, p in inspect.signature(explain).parameters.items()}
    return draft.found(argparse.Namespace(**defaults | asked(folder, **changes))).values


@pytest.fixture(scope="module")
def answer(folder):
    settings = {"run_dir": str(folder / "run"), "save_config": str(folder / "saved.yaml")}
    return explain(**asked(folder, **settings))


def test_the_answer_is_that_of_the_chain_with_all_defaults(folder, answer):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "finetuned")
    pretrained = transformers.AutoModelForMaskedLM.from_pretrained(folder / "pretrained")
    finetuned = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "finetuned")
    corpus = [{"example_id": i, "text": t} for i, t in enumerate((folder / "corpus.txt").read_text().splitlines())]
    with open(folder / "tweets.tsv", newline="") as file:
        tweets = [{"text": r["tweet"], "label": r["sentiment"]} for r in csv.DictReader(file, delimiter="\t")]
    objective = objectives.SequenceClassification(tokenizer, labels=LABELS)
    stages = [
        Stage("pretraining", pretrained, objectives.MaskedLM(tokenizer), corpus),
        Stage("finetuning", finetuned, objective, tweets, trainable="head"),
    ]
    with torch.no_grad():
        logits = finetuned.eval()(**tokenizer(TEXT, return_tensors="pt")).logits[0]
    label = LABELS[int(logits.argmax())]
    query = MultiStageInfluence(stages, progress=False).query([{"text": TEXT, "label": label}], replicates=2)
    expected = query.score(corpus)
    assert answer.frame["text"].tolist() == expected.frame["text"].tolist()
    np.testing.assert_allclose(answer.influence(), expected.influence(), rtol=1e-4, atol=1e-9)
    [test] = answer.tests
    assert (test["text"], test["label"], test["prediction"]) == (TEXT, label, label)
    assert test["probability"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
    assert test["loss"] == pytest.approx(-float(logits.log_softmax(0).max()), rel=1e-5)


def test_the_saved_configuration_repeats_the_answer(folder, answer, tmp_path):
    again = ("--config", folder / "saved.yaml", "--run_dir", tmp_path / "again")
    assert msif("query", *again) == msif("score", *again) == 0
    scores = Scores.from_parquet(tmp_path / "again" / "scores.parquet")
    np.testing.assert_allclose(scores.influence(), answer.influence(), rtol=1e-5, atol=1e-12)
    values = yaml.safe_load((folder / "saved.yaml").read_text())
    assert values["stages"]["pretraining"]["task"] == "masked-lm"
    assert values["stages"]["finetuning"]["trainable"] == "head"
    assert values["stages"]["finetuning"]["data"]["text_column"] == "tweet"
    assert values["stages"]["finetuning"]["objective"] == {"labels": list(LABELS)}


def test_the_command_prints_what_was_chosen_and_both_lists(folder, tmp_path, capsys):
    flags = [f"--{name.replace('_', '-')}={asked(folder)[name]}" for name in ("pretrained", "finetuned", "corpus")]
    flags += [
        f"--finetuning-data={folder / 'tweets.tsv'}",
        "--text",
        TEXT,
        "--text",
        "jobs",
        "--label=Positive",
        "-k2",
    ]
    assert msif("explain", *flags, "--run_dir", tmp_path / "run", "--set", "corpus.norms=gradient") == 0
    printed = capsys.readouterr().out
    assert "every weight of the encoder is equal in both checkpoints" in printed
    assert printed.count("label Positive, predicted") == 2
    assert printed.count("most helpful sentences") == printed.count("most harmful sentences") == 2
    assert "gradient_norm" in Scores.from_parquet(tmp_path / "run" / "scores.parquet").frame


def test_a_question_has_a_folder_of_its_own(folder):
    first, second, third = (found(folder, text=text)["run_dir"] for text in ("a", "b", "a"))
    assert first == third != second


def test_what_is_found_is_taken_as_it_is(folder, tmp_path):
    """A column may be called like a value of YAML."""
    (tmp_path / "tweets.csv").write_text("null,true\nwe vote,Positive\nno vote,Negative\n")
    named = {"finetuning_data": str(tmp_path / "tweets.csv"), "text_column": "null", "label_column": "true"}
    data = config.from_values(found(folder, **named)).stages["finetuning"].data
    assert (data.text_column, data.label_column) == ("null", "true")


def test_a_small_budget_approximates_and_takes_fewer_rows(folder, tmp_path, monkeypatch):
    settings = {"run_dir": str(tmp_path / "run"), "save_config": str(tmp_path / "saved.yaml"), "budget": "0.02s"}
    for name in ("draft.FEWEST_RANKED", "budget.FEWEST_SAMPLES"):
        monkeypatch.setattr(f"hf_msif.project.{name}", 9)
    scores = explain(**asked(folder, **settings))
    values = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert len(scores) == values["corpus"]["sample"] == 9
    stage = values["stages"]["pretraining"]
    assert (stage["curvature"], stage["curvature_samples"]) == ("ekfac", 9)


def test_an_interrupted_answer_goes_on_with_what_was_chosen(folder, tmp_path, monkeypatch, capsys):
    """Although the machine is faster by now, so that a budget would buy more rows."""
    run = tmp_path / "run"
    settings = {"run_dir": str(run), "save_config": str(tmp_path / "saved.yaml"), "budget": "0.02s", "progress": True}
    for name in ("draft.FEWEST_RANKED", "budget.FEWEST_SAMPLES"):
        monkeypatch.setattr(f"hf_msif.project.{name}", 9)

    def killed(*_):
        raise KeyboardInterrupt

    for interrupted in ("influence.query.Query.save_pretrained", "scoring.sinks.WriteBehind.finish"):
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_msif.{interrupted}", killed)
            with pytest.raises(KeyboardInterrupt):
                explain(**asked(folder, **settings))
        for name in ("draft.FEWEST_RANKED", "budget.FEWEST_SAMPLES"):
            monkeypatch.setattr(f"hf_msif.project.{name}", 8)
    assert (run / "scores.parts").exists()
    capsys.readouterr()
    scores = explain(**asked(folder, **settings))
    assert "goes on where it was interrupted" in capsys.readouterr().out
    values = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert values["stages"]["pretraining"]["curvature_samples"] == 9
    assert len(scores) == values["corpus"]["sample"] == 8  # chosen when the query was done
    assert not (run / draft.CHOICES).exists()
    assert {path.name for path in run.iterdir()} >= {"query", "scores.parquet"}


# --- what is found


def finetuned_otherwise(folder, to, change):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "finetuned")
    with torch.no_grad():
        change(model)
    model.save_pretrained(to)
    tiny.tokenizer().save_pretrained(to)
    return model


def moved(names):
    def change(model):
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter += 0.01

    return change


@pytest.mark.parametrize(
    ("names", "trainable"),
    [
        ([], "head"),
        (["classifier"], "head"),
        (["bert."], "all"),
        (["layer.0.attention"], ["bert.encoder.layer.0.attention.*", "bert.pooler.*", "classifier.*"]),
    ],
)
def test_what_was_trained_is_seen_from_the_weights(folder, tmp_path, names, trainable):
    finetuned = finetuned_otherwise(folder, tmp_path / "finetuned", moved(names))
    pretrained = transformers.AutoModelForMaskedLM.from_pretrained(folder / "pretrained")
    assert detection.changed(finetuned, pretrained) == trainable


def test_an_updated_encoder_is_tied_by_alpha(folder, tmp_path):
    finetuned_otherwise(folder, tmp_path / "finetuned", moved(["bert."]))
    settings = {"run_dir": str(tmp_path / "run"), "save_config": str(tmp_path / "saved.yaml")}
    scores = explain(**asked(folder, finetuned=str(tmp_path / "finetuned"), **settings))
    stage = yaml.safe_load((tmp_path / "saved.yaml").read_text())["stages"]["finetuning"]
    assert stage["trainable"] == "all"
    assert stage["alpha"] > 0  # no α explains a random step: the one of the gradient's size is taken
    assert np.isfinite(scores.influence()).all()
    assert np.abs(scores.influence()).max() > 0


def test_an_adapter_that_peft_saved(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "pretrained", num_labels=2)
    settings = {"target_modules": ["query", "value"], "modules_to_save": ["pooler", "classifier"]}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    chosen = {"finetuned": str(tmp_path / "adapter"), "labels": LABELS, "run_dir": str(tmp_path / "run")}
    scores = explain(**asked(folder, save_config=str(tmp_path / "saved.yaml"), **chosen))
    with torch.no_grad():
        inputs = tiny.tokenizer()(TEXT, return_tensors="pt")
        probabilities = model.eval()(**inputs).logits[0].softmax(0)
    assert scores.tests[0]["prediction"] == LABELS[int(probabilities.argmax())]
    assert scores.tests[0]["probability"] == pytest.approx(float(probabilities.max()), rel=1e-5)
    stage = yaml.safe_load((tmp_path / "saved.yaml").read_text())["stages"]["finetuning"]
    assert stage["trainable"] == ["*.lora_*", "*.modules_to_save.*"]


def test_an_adapter_without_the_pooler_is_refused(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "pretrained", num_labels=2)
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"has no weights for 'bert\.pooler.*modules_to_save=\['bert\.pooler"):
        explain(**asked(folder, finetuned=str(tmp_path / "adapter"), labels=LABELS, run_dir=str(tmp_path / "run")))


def test_a_trainers_output_folder_counts_as_its_last_checkpoint(folder, tmp_path):
    for step in (9, 10):
        finetuned_otherwise(folder, tmp_path / f"checkpoint-{step}", moved([]))
    found = detection.checkpoint(str(tmp_path), "--finetuned")
    assert found.source == str(tmp_path / "checkpoint-10")
    assert detection.task(found, "--finetuned", labelled=True) == "sequence-classification"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_checkpoints_of_a_trainers_run(folder, tmp_path):
    model, tokenizer = tiny.model("bert", "masked").float(), tiny.tokenizer()
    texts = (folder / "corpus.txt").read_text().splitlines()
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=6, save_steps=2, use_cpu=True, report_to=[], learning_rate=1e-3
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer)
    data = datasets.Dataset.from_list([dict(tokenizer(text)) for text in texts])
    trainer = transformers.Trainer(model, arguments, collator, data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    finetuned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=2)
    finetuned.save_pretrained(tmp_path / "finetuned")
    tokenizer.save_pretrained(tmp_path / "finetuned")
    paths = {"pretrained": str(tmp_path / "run"), "finetuned": str(tmp_path / "finetuned"), "labels": LABELS}
    paths |= {"pretraining_run": str(tmp_path / "run"), "run_dir": str(tmp_path / "answer")}
    scores = explain(**asked(folder, **paths))
    certificate = scores.metadata["certificate"]["stages"]["pretraining"]
    assert certificate["link"] == "segments"
    assert np.abs(scores.influence()).max() > 0


@pytest.mark.parametrize(
    ("family", "kind", "task"), [("bert", "masked", "masked-lm"), ("llama", "causal", "causal-lm")]
)
def test_tasks_of_language_models(tmp_path, family, kind, task):
    tiny.model(family, kind).save_pretrained(tmp_path)
    assert detection.task(detection.checkpoint(str(tmp_path), "--pretrained"), "--pretrained", labelled=False) == task


@pytest.mark.parametrize(
    ("settings", "task"),
    [
        ({"num_labels": 1}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi-label-classification"),
        ({"num_labels": 4}, "sequence-classification"),
    ],
)
def test_tasks_of_classifiers(settings, task):
    described = transformers.BertConfig(architectures=["BertForSequenceClassification"], **settings)
    assert detection.task(detection.Checkpoint("x", described), "--finetuned", labelled=True) == task


# --- what is refused


def no_head(folder, tmp_path):
    tiny.model("bert", "masked").bert.save_pretrained(tmp_path / "headless")
    return {"pretrained": str(tmp_path / "headless")}


def other_labels(folder, tmp_path):
    (tmp_path / "tweets.csv").write_text("text,label\nwe vote,good\nno tax,bad\n")
    return {"finetuning_data": str(tmp_path / "tweets.csv")}


def no_label(folder, tmp_path):
    (tmp_path / "tweets.csv").write_text("text,mood\nwe vote,good\nno tax,bad\n")
    return {"finetuning_data": str(tmp_path / "tweets.csv")}


def two_texts(folder, tmp_path):
    (tmp_path / "corpus.csv").write_text("title,body\nwe vote,good\nno tax,bad\n")
    return {"corpus": str(tmp_path / "corpus.csv")}


REFUSED = {
    "no head": (no_head, ["--pretrained", "BertModel", "BertForMaskedLM"]),
    "no such folder": (lambda *_: {"finetuned": "nowhere/at/all"}, ["--finetuned", "nowhere/at/all"]),
    "an empty folder": (lambda _, path: {"finetuned": str(path)}, ["--finetuned", "without config.json"]),
    "labels of other names": (other_labels, ["--finetuning-data", "'bad'", "Negative", "--labels"]),
    "no label column": (no_label, ["--finetuning-data", "mood", "--label-column"]),
    "which column is the text": (two_texts, ["--corpus", "title", "--corpus-column"]),
    "no such corpus": (lambda *_: {"corpus": "none.txt"}, ["--corpus", "none.txt", "does not exist"]),
    "no text": (lambda *_: {"text": None}, ["--text", "--file"]),
    "no class": (lambda *_: {"label": "Neutral"}, ["Neutral", "Negative"]),
    "no time": (lambda *_: {"budget": "soon"}, ["budget", "soon", "10m"]),
    "no run": (lambda *_: {"pretraining_run": "nowhere"}, ["--pretraining-run", "nowhere"]),
    "a value out of range": (
        lambda *_: {"overrides": [("stages.pretraining.data.max_rows", -1)]},
        ["stages.pretraining.data.max_rows is -1", "at least 1"],
    ),
    "an unknown key": (lambda *_: {"overrides": [("corpus.norm", "x")]}, ["corpus.norm", "corpus.norms"]),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_one_sentence_says_what_to_give(folder, tmp_path, change, words):
    settings = asked(folder, run_dir=str(tmp_path / "run")) | change(folder, tmp_path)
    with pytest.raises(InputError) as error:
        explain(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


# --- texts of one's own in a configuration


@pytest.fixture(scope="module")
def base(folder, answer):
    values = yaml.safe_load((folder / "saved.yaml").read_text())
    del values["test"]
    return values


def rows(base, **test):
    run = Run(config.from_values({**json.loads(json.dumps(base)), "test": test}), progress=False)
    return explained.rows(run)


def test_texts_get_the_label_that_is_given(base):
    assert rows(base, text=["we won", "we lost"], label="Positive") == [
        {"example_id": "text-0", "text": "we won", "label": "Positive"},
        {"example_id": "text-1", "text": "we lost", "label": "Positive"},
    ]


def test_a_file_of_lines(base, tmp_path):
    (tmp_path / "tests.txt").write_text("we won\nwe lost\n")
    found = rows(base, file=str(tmp_path / "tests.txt"), label="Negative")
    assert [(row["text"], row["label"]) for row in found] == [("we won", "Negative"), ("we lost", "Negative")]


def test_a_table_has_labels_of_its_own(base, tmp_path):
    (tmp_path / "tests.csv").write_text("tweet,sentiment\nwe won,Positive\nwe lost,Negative\n")
    found = rows(base, file=str(tmp_path / "tests.csv"))
    assert [(row["text"], row["label"]) for row in found] == [("we won", "Positive"), ("we lost", "Negative")]


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ({"text": "we won", "file": "x.txt"}, "test.text and test.file"),
        ({"text": "we won", "ids": [1]}, "test.text and test.ids"),
        ({"text": "we won", "wrong": True}, "test.text and test.wrong"),
        ({"label": "Positive"}, "test.label is 'Positive'"),
        ({"file": "nowhere.txt"}, "test.file: the file 'nowhere.txt' does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(base, test, words):
    with pytest.raises(InputError, match=words):
        rows(base, **test)
