"""Every task from YAML: trained for a step, queried and scored; and what a configuration of them refuses."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers import tiny
from helpers.project import msif

from hf_msif.errors import InputError
from hf_msif.project import config
from hf_msif.project.run import Run

NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"model_type": "bert", "max_position_embeddings": 24, "pad_token_id": 0, **NARROW}
ELECTRA = {**BERT, "model_type": "electra", "embedding_size": 8}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 12}
PAIR = {"columns": {"text_pair": "hypothesis"}}

# name → (task, settings of the model, of the data, of the objective, of the test)
RUNS = {
    "sequence to sequence": ("sequence-to-sequence", T5, {}, {}, {}),
    "a span of the target": (
        "sequence-to-sequence",
        T5,
        {"columns": {"target": "summary"}},
        {},
        {"measurement": "span_log_probability", "of": "vote"},
    ),
    "words": ("token-classification", BERT, {"text_column": "tokens", "label_column": "tags"}, {}, {}),
    "regression": ("regression", BERT, {"label_column": "number"}, {}, {}),
    "multi-label": ("multi-label-classification", BERT, {"label_column": "classes"}, {}, {}),
    "pairs": (
        "sequence-classification",
        BERT,
        {"label_column": "label", **PAIR},
        {},
        {"measurement": "log_probability", "of": "predicted"},
    ),
    "next sentence": ("masked-lm-next-sentence", BERT, {}, {}, {}),
    "replaced tokens": ("replaced-tokens", ELECTRA, {}, {}, {}),
    "tokenised": ("masked-lm", BERT, {"columns": {"input_ids": "ids"}}, {}, {}),
    "documents": ("causal-lm", GPT2, {}, {"chunk": 6, "stride": 2}, {}),
}
EXPLAINED = {"a span of the target": "log-probability of the span 'vote'"}
EXPLAINED |= {"pairs": "log-probability of the predicted class"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer, and rows with the columns of all tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = tiny.tokenizer(model_max_length=10**30)
    tokenizer.save_pretrained(folder / "tokenizer")
    with open(folder / "rows.jsonl", "w") as file:
        for row in tiny.rows_of_all_tasks(16, seed=2, longest=9):
            row |= {"hypothesis": row["text_pair"], "ids": tokenizer(row["text"])["input_ids"]}
            row |= {"summary": f"{row['target']} vote"}
            file.write(json.dumps(row) + "\n")
    return folder


def configured(files, folder, task, model, data, objective, test):
    stage = {
        "task": task,
        "data": {"path": "json", "data_files": str(files / "rows.jsonl"), "test_fraction": 0.3, **data},
        "model": {"config": {"vocab_size": len(tiny.WORDS), **model}},
        "objective": objective,
        "training": {"max_steps": 1, "per_device_train_batch_size": 4},
        "solver": {"name": "cg", "damping": 10.0, "tol": 0.1},
    }
    settings = {"run_dir": str(folder / "run"), "tokenizer": str(files / "tokenizer"), "stages": {"only": stage}}
    settings |= {"test": {"number": 1, **test}, "memory_check": False}
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder / "config.yaml"


@pytest.mark.parametrize("name", RUNS)
def test_a_task_in_yaml(name, files, tmp_path, capsys):
    path = configured(files, tmp_path, *RUNS[name])
    for command in ("train", "query", "score"):
        assert msif(command, "--config", path) == 0, capsys.readouterr().err
    scores = pd.read_parquet(tmp_path / "run/scores.parquet")
    assert np.isfinite(scores.influence).all()
    assert scores.influence.abs().max() > 0
    assert scores.text.str.len().min() > 0
    assert scores.duplicates.max() == 1
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "run/query/query.json").read_text())
    assert saved["measurement"] == EXPLAINED.get(name, "loss")
    if name in EXPLAINED:
        assert f"explained: the {EXPLAINED[name]} of each test row" in printed
        assert EXPLAINED[name] in (tmp_path / "run/table1.md").read_text()
        assert msif("top", "--run", tmp_path / "run", "-k", "2") == 0
        assert f"influence on the {EXPLAINED[name]} of: " in capsys.readouterr().out
        assert msif("validate", "--config", path) == 2
        assert "msif validate trains again and measures losses" in capsys.readouterr().err


def test_a_new_head_has_the_outputs_and_the_problem_of_its_task(files, tmp_path):
    expected = {"regression": (1, "regression"), "multi-label": (3, "multi_label_classification"), "words": (3, None)}
    for name, (outputs, problem) in expected.items():
        model = Run(config.load(configured(files, tmp_path, *RUNS[name]))).new_model("only")
        assert (model.config.num_labels, model.config.problem_type) == (outputs, problem)


REFUSED = {
    "another column": (
        "masked-lm",
        BERT,
        {"columns": {"summary": "x"}},
        {},
        r"data.columns names 'summary', which masked",
    ),
    "no such column": (
        "sequence-to-sequence",
        T5,
        {"columns": {"target": "x"}},
        {},
        r"data.columns.target: there is no",
    ),
    "words of a text": ("token-classification", BERT, {"label_column": "tags"}, {}, "expected a list of words"),
    "a text as number": (
        "regression",
        BERT,
        {"label_column": "hypothesis"},
        {},
        r"label_column: row \d+ has the label",
    ),
    "a column as setting": (
        "masked-lm",
        BERT,
        {},
        {"text_column": "x"},
        "unknown key 'stages.only.objective.text_column'",
    ),
}


@pytest.mark.parametrize(("task", "model", "data", "objective", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(task, model, data, objective, message, files, tmp_path):
    with pytest.raises(InputError, match=message):
        Run(config.load(configured(files, tmp_path, task, model, data, objective, {}))).rows("only")


@pytest.mark.parametrize(
    ("measurement", "of", "message"),
    [
        ("margin", None, "test.measurement is margin; expected one of loss, log_probability, logit_margin"),
        ("loss", "a", "test.of is 'a', which is for log_probability, logit_margin"),
        ("span_log_probability", None, "span_log_probability expects the words"),
    ],
)
def test_measurements_that_do_not_fit(measurement, of, message, files, tmp_path):
    with pytest.raises(InputError, match=message):
        config.load(configured(files, tmp_path, *RUNS["pairs"][:4], {"measurement": measurement, "of": of}))


def test_a_measurement_by_its_name_by_a_flag_and_of_ones_own(files, tmp_path, monkeypatch):
    path = configured(files, tmp_path, *RUNS["pairs"][:4], {"measurement": "logit_margin"})
    assert str(Run(config.load(path)).measurement) == "logit margin of the row's label"
    labelled = config.load(path, [("test.of", 1)])
    assert str(Run(labelled).measurement) == "logit margin of 1"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_measurement.py").write_text("def first(call, batch):\n    return batch['x']\n")
    path = configured(files, tmp_path, *RUNS["pairs"][:4], {"measurement": "own_measurement:first"})
    assert Run(config.load(path)).measurement.__name__ == "first"
