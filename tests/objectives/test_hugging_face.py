"""The losses of the other tasks against those that Hugging Face's models compute themselves from `labels=`."""

import re

import numpy as np
import pytest
import torch
from helpers import tiny
from torch.nn.functional import cross_entropy

from hf_msif import InputError, Stage, objectives
from hf_msif.adapters.functional import FunctionalModel

ROWS = tiny.rows_of_all_tasks(6, seed=3)
TOKENIZER = tiny.tokenizer()


def evaluate(model, objective, rows=ROWS):
    functional, batch = FunctionalModel(model), objective.collate(rows)
    with functional.evaluating(), torch.no_grad():
        return (*objective.losses(functional.bind({}), batch), batch)


def own_loss(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


def tokens(texts, pairs=None, **settings):
    if pairs is not None:
        return dict(tiny.pair_tokenizer()(texts, pairs, padding=True, return_tensors="pt"))
    return dict(TOKENIZER(texts, padding=True, return_tensors="pt", **settings))


def column(name):
    return [row[name] for row in ROWS]


def near(found, expected, tolerance=1e-10):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=0)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_sequence_to_sequence_is_the_mean_over_target_tokens(architecture):
    model = tiny.model(architecture, "sequence to sequence")
    sums, counts, _batch = evaluate(model, tiny.objective("sequence to sequence"))
    labels = tokens(column("target"))
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    inputs = {key: value for key, value in tokens(column("text")).items() if key != "token_type_ids"}
    near(sums.sum() / counts.sum(), own_loss(model, **inputs, labels=labels).loss, 1e-6)
    assert counts.tolist() == [len(target.split()) + 2 for target in column("target")]
    one_by_one = [own_loss(model, **{k: v[:1] for k, v in inputs.items()}, labels=labels[:1]).loss * counts[0]]
    near(sums[0], one_by_one[0], 1e-5)


def test_a_target_that_is_too_long_is_cut_and_counted():
    objective = tiny.objective("sequence to sequence", max_target_length=4)
    _, counts, batch = evaluate(tiny.model("bart", "sequence to sequence"), objective)
    long = torch.tensor([len(target.split()) > 2 for target in column("target")])
    assert torch.equal(batch["truncated"], long)
    assert counts.max() == 4


def test_regression_is_the_mean_squared_error():
    model = tiny.model("bert", "regression", problem_type="regression")
    sums, counts, _ = evaluate(model, tiny.objective("regression"))
    labels = torch.tensor(column("number"), dtype=torch.float64)
    near(sums.sum() / counts.sum(), own_loss(model, **tokens(column("text")), labels=labels).loss)


def test_several_labels_are_the_mean_binary_cross_entropy():
    model = tiny.model("bert", "multi-label", problem_type="multi_label_classification")
    sums, counts, _ = evaluate(model, tiny.objective("multi-label"))
    labels = torch.zeros(len(ROWS), 3, dtype=torch.float64)
    for i, classes in enumerate(column("classes")):
        labels[i, classes] = 1.0
    near(sums.sum() / counts.sum(), own_loss(model, **tokens(column("text")), labels=labels).loss)
    floats = [{**row, "classes": line} for row, line in zip(ROWS, labels.tolist(), strict=True)]
    near(evaluate(model, tiny.objective("multi-label"), floats)[0], sums)
    named = objectives.MultiLabel(TOKENIZER, "classes", labels=("a", "b", "c"))
    rows = [{**row, "classes": ["abc"[c] for c in row["classes"]]} for row in ROWS]
    near(evaluate(model, named, rows)[0], sums)


def test_a_pair_is_read_as_one():
    model = tiny.model("bert", "pairs", num_labels=2)
    sums, _, _ = evaluate(model, tiny.objective("pairs"))
    labels = torch.tensor(column("label"))
    near(sums.mean(), own_loss(model, **tokens(column("text"), column("text_pair")), labels=labels).loss)
    assert tiny.objective("pairs").content(ROWS[0]) == f"{ROWS[0]['text']} | {ROWS[0]['text_pair']}"


def test_words_are_labelled_at_their_first_token():
    """Two of the words have two tokens each, one of the words does not count."""
    backend = tiny.tokenizer(words=[*tiny.WORDS, "##s"])
    words = [["votes", "we", "walls"], ["they", "jobs"]]
    from tokenizers import models

    vocabulary = {word: i for i, word in enumerate([*tiny.WORDS, "##s"])}
    backend.backend_tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    objective = objectives.TokenClassification(backend, "tags", labels=("O", "B"))
    rows = [
        {"example_id": 0, "tokens": words[0], "tags": ["B", "O", "B"]},
        {"example_id": 1, "tokens": words[1], "tags": ["O", -100]},
    ]
    batch = objective.collate(rows)
    found = [
        line[mask.bool()].tolist() for line, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    at = vocabulary
    expected = [
        [2, at["vote"], at["##s"], at["we"], at["wall"], at["##s"], 3],
        [2, at["they"], at["jobs"], 3],
    ]
    assert found == expected
    assert list(zip(batch["rows"].tolist(), batch["columns"].tolist(), batch["labels"].tolist(), strict=True)) == [
        (0, 1, 1),
        (0, 3, 0),
        (0, 4, 1),
        (1, 1, 0),
    ]


def test_token_classification_is_the_mean_over_words():
    model = tiny.model("bert", "words")
    sums, counts, _batch = evaluate(model, tiny.objective("words"))
    inputs = tokens(column("tokens"), is_split_into_words=True)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, tags in enumerate(column("tags")):
        labels[i, 1 : 1 + len(tags)] = torch.tensor(tags)
    near(sums.sum() / counts.sum(), own_loss(model, **inputs, labels=labels).loss)
    assert tiny.objective("words").content(ROWS[0]) == " ".join(ROWS[0]["tokens"])
    cut = tiny.objective("words", max_length=4)
    assert cut.collate(ROWS)["truncated"].tolist() == [len(words) > 2 for words in column("tokens")]


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize(
    ("architecture", "label"), [("bert", "next_sentence_label"), ("albert", "sentence_order_label")]
)
def test_next_sentences_are_the_two_means_of_pretraining(architecture, label, reduction):
    """Of rows with as many masks each, F is the sum of the mean over masked tokens and the mean over pairs."""
    text = "the vote of the great debate"
    rows = [{**row, "text": text, "text_pair": "the wall and the jobs"} for row in ROWS]
    model = tiny.model(architecture, "next sentence")
    sums, counts, batch = evaluate(model, tiny.objective("next sentence", reduction=reduction), rows)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["rows"], batch["columns"]] = batch["labels"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    assert batch["token_type_ids"].sum() == len(rows) * 6
    expected = own_loss(model, **inputs, labels=labels, **{label: batch["next_sentence_labels"]}).loss
    near(sums.sum() / counts.sum(), expected)
    assert counts.tolist() == [len(batch["labels"]) / len(rows) if reduction == "token" else 1.0] * len(rows)


def test_the_masks_of_pairs_are_those_of_masked_lm():
    pairs = tiny.objective("next sentence").collate(ROWS)
    both = [{**row, "text": f"{row['text']} [SEP] {row['text_pair']}"} for row in ROWS]
    plain = tiny.objective("masked").collate(both)
    assert torch.equal(pairs["attention_mask"], plain["attention_mask"])
    assert torch.equal(pairs["input_ids"], plain["input_ids"])


def test_replaced_tokens_are_electras_loss():
    model = tiny.model("electra", "replaced tokens")
    sums, counts, batch = evaluate(model, tiny.objective("replaced tokens"))
    expected = own_loss(
        model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    near(sums.sum() / counts.sum(), expected.loss.double(), 1e-6)  # their labels are in float32
    assert 0 < batch["labels"].sum() < batch["attention_mask"].sum()


def test_replacements_are_those_of_seed_id_and_draw_and_a_round_has_each_token_once():
    objective = tiny.objective("replaced tokens").for_influence()
    assert objective.draws == 8
    original = tiny.tokenizer()([row["text"] for row in ROWS])["input_ids"]
    batch = objective.collate(ROWS)
    alone = torch.cat([objective.collate([row])["input_ids"][:, :4] for row in ROWS])
    assert torch.equal(batch["input_ids"][:, :4], alone)
    special = set(TOKENIZER.all_special_ids) - {TOKENIZER.unk_token_id}
    for i, ids in enumerate(original):
        shown = batch["input_ids"][i * 8 : i * 8 + 8, : len(ids)].numpy()
        changed = (shown != np.array(ids)).sum(0)
        assert changed.max() <= 1  # a substitute may be the token itself
        assert changed[[0, -1]].sum() == 0
        assert not np.isin(shown[:, 1:-1], list(special)).any()


# Rows that are tokenised already ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        ("masked", "bert"),
        ("causal", "gpt2"),
        ("classification", "bert"),
        ("regression", "bert"),
        ("multi-label", "bert"),
        ("replaced tokens", "electra"),
        ("sequence to sequence", "bart"),
    ],
)
def test_tokenised_rows_have_the_losses_of_their_texts(task, architecture):
    model, objective = tiny.model(architecture, task), tiny.objective(task)
    tokenizer = objective.tokenizer
    rows = [{**{k: v for k, v in row.items() if k != "text"}, **dict(tokenizer(row["text"]))} for row in ROWS]
    near(evaluate(model, objective, rows)[0], evaluate(model, objective)[0])
    padded = tokenizer(column("text"), padding="max_length")
    rows = [{**row, **{k: torch.tensor(padded[k][i]) for k in padded}} for i, row in enumerate(rows)]
    near(evaluate(model, objective, rows)[0], evaluate(model, objective)[0])
    if task == "classification":
        assert objective.content(rows[0]) == ROWS[0]["text"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 99, 3], r"row 7 has the token id 99 in 'input_ids'; expected ids from 0 to 24"),
        ([-1], "token id -1"),
        ("2 3", "expected a list of whole numbers"),
        ([[2, 3]], "expected a list of whole numbers"),
        ([0.5], "expected a list of whole numbers"),
    ],
)
def test_ids_that_are_none(ids, message):
    with pytest.raises(InputError, match=message):
        tiny.objective("causal").collate([{"example_id": 7, "input_ids": ids}])


# Messages -----------------------------------------------------------------------------------------------------------

REFUSED_MODELS = {
    "t5 as a causal LM": (
        "t5",
        "sequence to sequence",
        "causal",
        r"T5.* is an encoder-decoder.*take objectives.Seq2SeqLM",
    ),
    "t5 as a masked LM": ("t5", "sequence to sequence", "masked", r"encoder-decoder.*objectives.Seq2SeqLM"),
    "bert as an encoder-decoder": ("bert", "masked", "sequence to sequence", "BertForMaskedLM is no encoder-decoder"),
    "several outputs as regression": (
        "bert",
        "multi-label",
        "regression",
        "the model has 3 outputs; Regression expects",
    ),
    "regression as classification": ("bert", "regression", "classification", "take objectives.Regression"),
}


@pytest.mark.parametrize(("architecture", "of", "task", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_a_model_of_another_task_is_refused_by_the_name_of_its_objective(architecture, of, task, message):
    with pytest.raises(InputError, match=message):
        tiny.objective(task).check_model(tiny.model(architecture, of))


def test_transformers_lists_bart_as_a_masked_lm():
    tiny.objective("masked").check_model(tiny.model("bart", "masked"))
    with pytest.raises(InputError, match="encoder-decoder"):
        tiny.objective("causal").check_model(tiny.model("bart", "masked"))


@pytest.mark.parametrize(
    ("problem", "task", "other"),
    [
        ("regression", "classification", "objectives.Regression"),
        ("multi_label_classification", "classification", "objectives.MultiLabel"),
        ("single_label_classification", "multi-label", "objectives.SequenceClassification"),
        ("multi_label_classification", "regression", "objectives.MultiLabel"),
    ],
)
def test_a_head_of_another_problem_type_is_refused_by_the_name_of_its_objective(problem, task, other):
    model = tiny.model("bert", "classification", num_labels=1 if task == "regression" else 3, problem_type=problem)
    with pytest.raises(InputError, match=f"made for problem_type='{problem}'.*{re.escape(other)}"):
        tiny.objective(task).check_model(model)


MESSAGES = {
    "no target": ("sequence to sequence", {"text": "a"}, "no column 'target'"),
    "no number": (
        "regression",
        {"text": "a", "number": "five"},
        "row 7 has the label 'five'; expected a finite number",
    ),
    "nan": ("regression", {"text": "a", "number": float("nan")}, "expected a finite number"),
    "one class": (
        "multi-label",
        {"text": "a", "classes": 1},
        "row 7 has the labels 1; expected a list of the classes",
    ),
    "a share": ("multi-label", {"text": "a", "classes": [0.5, 0.0]}, "expected floats 0.0 and 1.0"),
    "a sentence": ("words", {"tokens": "we vote", "tags": [0, 1]}, "'we vote' in column 'tokens'; expected a list of"),
    "labels": ("words", {"tokens": ["we", "vote"], "tags": [0]}, "row 7 has 2 words and 1 labels"),
    "an empty word": (
        "words",
        {"tokens": ["we", " "], "tags": [0, 1]},
        "has the word ' ', of which the tokenizer makes",
    ),
    "no pair": ("pairs", {"text": "a", "label": 0}, "no column 'text_pair'"),
    "next": ("next sentence", {"text": "a", "text_pair": "b", "next_sentence_label": 2}, "row 7 has 2 in column"),
}


@pytest.mark.parametrize(("task", "row", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages_about_rows(task, row, message):
    with pytest.raises(InputError, match=message):
        tiny.objective(task).collate([{"example_id": 7, **row}])


@pytest.mark.parametrize("classes", [[3], [0.0, 1.0], [-1]])
def test_classes_beyond_those_of_the_model(classes):
    with pytest.raises(InputError, match="the model has 3 classes"):
        evaluate(tiny.model("bert", "multi-label"), tiny.objective("multi-label"), [{**ROWS[0], "classes": classes}])


def test_a_model_without_both_heads_is_refused():
    with pytest.raises(InputError, match="prediction_logits and seq_relationship_logits or sop_logits"):
        evaluate(tiny.model("bert", "masked"), tiny.objective("next sentence"))
    with pytest.raises(InputError, match="expects logits with 2 dimensions"):
        evaluate(tiny.model("bert", "masked"), tiny.objective("replaced tokens"))


def test_fisher_labels_of_two_outputs_are_told_apart():
    """Both cross-entropies of BERT's pretraining, their weights and their own random numbers."""
    from functools import partial

    from hf_msif.curvature import fisher

    model, objective = FunctionalModel(tiny.model("bert", "next sentence")), tiny.objective("next sentence")
    batch = objective.collate(ROWS)
    outputs = fisher.Outputs(model.bind({n: p.requires_grad_() for n, p in model.parameters.items()}))
    sums, counts = objective.losses(outputs.first, batch)
    words, pairs = fisher.cross_entropies(outputs, partial(objective.losses, batch=batch), sums)
    assert (words.probabilities.shape[1], pairs.probabilities.shape[1]) == (len(tiny.WORDS), 2)
    near(pairs.weights, counts)
    assert pairs.examples.tolist() == list(range(len(ROWS)))
    near(words.weights, torch.ones(len(batch["labels"])).double())
    labels = batch["next_sentence_labels"]
    near(
        sums,
        counts * cross_entropy(pairs.outputs, labels, reduction="none")
        + torch.zeros_like(sums).index_add(
            0, batch["rows"], cross_entropy(words.outputs, batch["labels"], reduction="none")
        ),
    )


def test_a_stage_refuses_t5_under_a_causal_objective():
    from hf_msif import MultiStageInfluence

    stage = Stage("only", tiny.model("t5", "sequence to sequence"), tiny.objective("causal"), ROWS)
    with pytest.raises(InputError, match=r"stage 'only': T5ForConditionalGeneration is an encoder-decoder"):
        MultiStageInfluence([stage], progress=False)


def test_a_dataset_that_is_tokenised_or_formatted_is_a_stage():
    """A transform gives the scores of the texts, torch labels those of plain ones (case: row formats)."""
    import datasets

    from hf_msif import MultiStageInfluence, solvers

    def scores(model, objective, data):
        stage = Stage("only", model, objective, data, solver=solvers.CG(damping=1.0))
        return MultiStageInfluence([stage], progress=False).query(ROWS[:1]).score(data).influence()

    rows = [{key: row[key] for key in ("text", "label")} for row in ROWS]
    dataset = datasets.Dataset.from_list([{**row, "example_id": i} for i, row in enumerate(rows)])
    masked, model = tiny.objective("masked"), tiny.model("bert", "masked")
    transformed = dataset.with_transform(lambda batch: masked.tokenizer(batch["text"]))
    np.testing.assert_allclose(scores(model, masked, transformed), scores(model, masked, rows), rtol=1e-9)
    classified, classifier = tiny.objective("classification"), tiny.model("bert", "classification")
    found = scores(classifier, classified, dataset.with_format("torch"))
    np.testing.assert_allclose(found, scores(classifier, classified, rows), rtol=1e-9)
    labels = [{**row, "label": torch.tensor(row["label"])} for row in rows]
    np.testing.assert_allclose(scores(classifier, classified, labels), found, rtol=1e-9)
