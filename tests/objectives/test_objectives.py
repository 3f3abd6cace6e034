"""Per-example losses against Hugging Face's own `labels=` losses; masks as a pure function of (seed, id, draw)."""

import copy
import re
from functools import partial

import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, training
from hf_msif.adapters.functional import FunctionalModel

ROWS = tiny.rows(6, seed=3, classes=3)


def evaluate(model, objective, rows):
    functional, batch = FunctionalModel(model), objective.collate(rows)
    with functional.evaluating(), torch.no_grad():
        return (*objective.losses(functional.bind({}), batch), batch)


@pytest.fixture(scope="module")
def bert():
    return tiny.model("bert", "masked", dtype=torch.float32)


@pytest.fixture(scope="module")
def gpt2():
    return tiny.model("gpt2", "causal", dtype=torch.float32)


@pytest.fixture(scope="module")
def classifier():
    return tiny.model("bert", "classification", dtype=torch.float32, num_labels=3)


def masks(objective, rows):
    """example id → per draw (masked positions, what stands there, what belongs there)."""
    batch = objective.collate(rows)
    found = {row["example_id"]: [] for row in rows}
    for i, row in enumerate(rows):
        for d in range(objective.draws):
            line = batch["rows"] == i * objective.draws + d
            where = batch["columns"][line]
            shown = batch["input_ids"][i * objective.draws + d, where]
            found[row["example_id"]].append((where.tolist(), shown.tolist(), batch["labels"][line].tolist()))
    return found


# Masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
def test_a_mask_depends_on_seed_id_and_draw_alone(draws):
    objective = tiny.objective("masked", draws=draws, seed=7)
    together = masks(objective, ROWS)
    assert masks(tiny.objective("masked", draws=draws, seed=7), ROWS[::-1]) == together
    padded = masks(objective, [*ROWS, {"example_id": "long", "text": "vote " * 15}])
    assert {key: value for key, value in padded.items() if key != "long"} == together
    for row in ROWS:
        assert masks(objective, [row])[row["example_id"]] == together[row["example_id"]]


def test_masks_differ_between_seeds_ids_and_draws():
    text = "the vote of the great debate and the sad wall of jobs"
    same = [{"example_id": i, "text": text} for i in range(8)]
    first, second = (masks(tiny.objective("masked", draws=4, seed=seed), same) for seed in (0, 1))
    assert len({str(found) for i in range(8) for found in first[i]}) > 25  # 32 draws of 12 choose 5
    assert all(first[i] != second[i] for i in range(8))
    assert masks(tiny.objective("masked", draws=4, seed=0), [{"example_id": "3", "text": text}])["3"] == first[3]


def test_draws_continue_from_the_first():
    four = masks(tiny.objective("masked", draws=4), ROWS)
    late = masks(tiny.objective("masked", draws=2, first_draw=2), ROWS)
    assert late == {key: value[2:] for key, value in four.items()}


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.4, 1.0])
def test_how_many_and_which_tokens_are_masked(probability):
    rows = tiny.rows(30, seed=1, longest=18)
    tokenizer = tiny.tokenizer()
    for row in rows:
        ((where, _, labels),) = masks(tiny.objective("masked", mask_probability=probability), [row])[row["example_id"]]
        words = tokenizer(row["text"])["input_ids"]
        ordinary = len(words) - 2
        assert len(where) == max(1, round(probability * ordinary))
        assert len(set(where)) == len(where)
        assert min(where) >= 1
        assert max(where) <= ordinary
        assert labels == [words[i] for i in where]


def test_special_tokens_are_never_masked_and_unknown_words_are():
    rows = [{"example_id": i, "text": "vote [SEP] zebra [MASK] tax [PAD]"} for i in range(20)]
    ids = tiny.tokenizer()(rows[0]["text"])["input_ids"]
    assert ids == [2, tiny.WORDS.index("vote"), 3, 1, 4, tiny.WORDS.index("tax"), 0, 3]
    for ((where, _, labels),) in masks(tiny.objective("masked", mask_probability=1.0), rows).values():
        assert where == [1, 3, 5]
        assert labels == [ids[i] for i in where]


def test_eighty_ten_ten():
    rows = tiny.rows(1500, seed=5, longest=18, shortest=10)
    triples = [
        (shown, label)
        for ((_, shown, labels),) in masks(tiny.objective("masked", mask_probability=0.5), rows).values()
        for shown, label in zip(shown, labels, strict=True)
    ]
    number, vocabulary, mask = len(triples), len(tiny.WORDS), tiny.WORDS.index("[MASK]")
    found = {
        "mask": sum(shown == mask for shown, _ in triples),
        "same": sum(shown == label for shown, label in triples),
    }
    found["other"] = number - sum(found.values())
    # A random token is [MASK] or the old one once in V times.
    chance = {"mask": 0.8 + 0.1 / vocabulary, "same": 0.1 + 0.1 / vocabulary, "other": 0.1 * (1 - 2 / vocabulary)}
    for kind, p in chance.items():
        spread = (number * p * (1 - p)) ** 0.5
        assert abs(found[kind] - number * p) < 4 * spread, kind
    substitutes = {shown for shown, label in triples if shown not in (mask, label)}
    assert len(substitutes) >= vocabulary - 1


@pytest.mark.parametrize(("folds", "rounds", "first_round"), [(4, 1, 0), (8, 1, 0), (8, 3, 0), (5, 2, 3), (1, 1, 0)])
def test_every_round_of_folds_masks_each_token_once(folds, rounds, first_round):
    rows = tiny.rows(30, seed=5, longest=18)
    settings = {"masks": "folds", "mask_probability": 1 / folds, "first_draw": folds * first_round}
    for drawn in masks(tiny.objective("masked", draws=folds * rounds, **settings), rows).values():
        number = max(place for where, _, _ in drawn for place in where)
        for start in range(0, folds * rounds, folds):
            assert sorted(place for where, _, _ in drawn[start : start + folds] for place in where) == [
                *range(1, number + 1)
            ]
        for where, shown, labels in drawn:
            assert abs(len(where) - number / folds) < 1
            assert set(shown) <= {tiny.WORDS.index("[MASK]")}
            assert all(label > 0 for label in labels)


def test_rounds_of_folds_are_independent():
    """Two words of a sentence share a fold of another round as often as chance has it, whether they shared one or
    not."""
    words = tiny.WORDS[5:]
    rows = [{"example_id": i, "text": " ".join(words[j % len(words)] for j in range(8))} for i in range(1500)]
    drawn = masks(tiny.objective("masked", masks="folds", mask_probability=0.25, draws=8), rows).values()
    together = np.array(
        [[any({1, 2} <= set(where) for where, _, _ in rounds) for rounds in (d[:4], d[4:])] for d in drawn]
    )
    chance = 1 / 7  # the other word of the fold is any of seven
    for sample in (together[:, 1], together[together[:, 0], 1], together[~together[:, 0], 1]):
        assert abs(sample.mean() - chance) < 4 * (chance * (1 - chance) / len(sample)) ** 0.5


def test_folds_continue_from_draw_to_draw():
    rows = tiny.rows(20, seed=5, longest=18)
    settings = {"masks": "folds", "mask_probability": 1 / 6}
    together = masks(tiny.objective("masked", draws=13, **settings), rows)
    for first in range(13):
        one = masks(tiny.objective("masked", first_draw=first, **settings), rows)
        assert all(one[name] == [folds[first]] for name, folds in together.items())


def test_losses_of_folds_vary_less_than_those_of_as_many_random_masks(bert):
    """Over twenty seeds, for each of some sentences: their order alone differs, and never which tokens count."""

    def spread(kind):
        losses = [
            evaluate(bert, tiny.objective("masked", masks=kind, draws=4, mask_probability=0.25, seed=seed), ROWS)[0]
            for seed in range(20)
        ]
        return torch.stack(losses).std(0)

    assert (spread("folds") < 0.5 * spread("random")).all()


# Losses --------------------------------------------------------------------------------------------------------------


def hugging_face_labels(batch):
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["rows"], batch["columns"]] = batch["labels"]
    return labels


def test_masked_lm_is_hugging_faces_loss(bert):
    sums, counts, batch = evaluate(bert, tiny.objective("masked"), ROWS)
    keep = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = bert.eval()(**keep, labels=hugging_face_labels(batch)).loss
    torch.testing.assert_close(sums.sum() / counts.sum(), expected)
    assert counts.tolist() == [max(1.0, round(0.4 * len(row["text"].split()))) for row in ROWS]


def test_causal_lm_is_hugging_faces_loss(gpt2):
    sums, counts, batch = evaluate(gpt2, tiny.objective("causal"), ROWS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = gpt2.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
    torch.testing.assert_close(sums.sum() / counts.sum(), expected)
    assert counts.tolist() == [len(row["text"].split()) - 1.0 for row in ROWS]


def test_classification_is_hugging_faces_loss(classifier):
    sums, counts, batch = evaluate(classifier, tiny.objective("classification"), ROWS)
    keep = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        expected = classifier.eval()(**keep).loss
    torch.testing.assert_close(sums.mean(), expected)
    assert counts.tolist() == [1.0] * len(ROWS)


CASES = {"masked": "bert", "causal": "gpt2", "classification": "classifier"}


@pytest.mark.parametrize("task", CASES)
def test_a_row_alone_has_the_loss_it_has_in_company(task, request):
    model, objective = request.getfixturevalue(CASES[task]), tiny.objective(task)
    sums, counts, _ = evaluate(model, objective, ROWS)
    for i, row in enumerate(ROWS):
        alone = evaluate(model, objective, [row])
        torch.testing.assert_close(alone[0][0], sums[i])
        assert alone[1][0] == counts[i]


@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_counts_without_the_model_are_those_with_it(task, reduction, request):
    settings = {} if task == "classification" else {"reduction": reduction}
    objective = tiny.objective(task, **settings)
    rows = [*ROWS, {"example_id": 99, "text": "", "label": 0}]
    _, counts, batch = evaluate(request.getfixturevalue(CASES[task]), objective, rows)
    torch.testing.assert_close(objective.counts(batch), counts)


@pytest.mark.parametrize("task", ["masked", "causal"])
def test_reduction_by_example_gives_every_example_its_mean(task, request):
    model = request.getfixturevalue(CASES[task])
    sums, counts, _ = evaluate(model, tiny.objective(task), ROWS)
    means, ones, _ = evaluate(model, tiny.objective(task, reduction="example"), ROWS)
    counted = counts > 0
    torch.testing.assert_close(means[counted], sums[counted] / counts[counted])
    assert ones.tolist() == counted.float().tolist()
    assert len(set(counts.tolist())) > 2


def test_draws_average(bert):
    single = [evaluate(bert, tiny.objective("masked", first_draw=d), ROWS) for d in range(3)]
    sums, counts, _ = evaluate(bert, tiny.objective("masked", draws=3), ROWS)
    torch.testing.assert_close(sums, torch.stack([s for s, _, _ in single]).mean(0))
    torch.testing.assert_close(counts, single[0][1])
    assert not torch.allclose(single[0][0], single[1][0])
    means, _, _ = evaluate(bert, tiny.objective("masked", draws=3, reduction="example"), ROWS)
    torch.testing.assert_close(means, sums / counts)


@pytest.mark.parametrize("task", ["masked", "causal"])
@pytest.mark.parametrize("others", [[], ROWS[:2]], ids=["alone", "with others"])
def test_an_empty_sentence_keeps_its_row_with_zero(task, others, request):
    rows = [*others, {"example_id": 99, "text": ""}]
    sums, counts, _ = evaluate(request.getfixturevalue(CASES[task]), tiny.objective(task), rows)
    assert sums.shape == counts.shape == (len(rows),)
    assert sums[-1] == counts[-1] == 0
    assert sums.isfinite().all()
    expected = evaluate(request.getfixturevalue(CASES[task]), tiny.objective(task), others)[0] if others else sums[:0]
    torch.testing.assert_close(sums[:-1], expected)


@pytest.mark.parametrize("task", CASES)
def test_truncation_is_counted(task, request):
    rows = [{"example_id": i, "text": "vote " * n, "label": 0} for i, n in enumerate((3, 40, 18, 21))]
    _, counts, batch = evaluate(request.getfixturevalue(CASES[task]), tiny.objective(task), rows)
    assert batch["truncated"].tolist() == [False, True, False, True]
    assert batch["input_ids"].shape[1] == tiny.LENGTH
    if task == "causal":
        assert counts.tolist() == [2.0, 19.0, 17.0, 19.0]
    shorter = tiny.objective(task, max_length=8).collate(rows)
    assert shorter["input_ids"].shape[1] == 8
    assert shorter["truncated"].tolist() == [False, True, True, True]


@pytest.mark.parametrize("task", CASES)
def test_a_tokenizer_that_pads_left_gives_the_same(task, request):
    model, rows = request.getfixturevalue(CASES[task]), [{**row, "label": 1} for row in ROWS]
    template = task != "causal"
    kind = {"masked": objectives.MaskedLM, "causal": objectives.CausalLM}.get(task, objectives.SequenceClassification)
    left, right = (evaluate(model, kind(tiny.tokenizer(side, template)), rows) for side in ("left", "right"))
    assert left[2]["attention_mask"].min() == 0
    for found, expected in zip(left[:2], right[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_tokenizer_without_padding_token(gpt2):
    """GPT-2's: padding is filled with the end token, and the mask keeps it out of the loss."""
    without = objectives.CausalLM(tiny.tokenizer(template=False, pad_token=None, eos_token="[SEP]"))
    found = evaluate(gpt2, without, ROWS)
    assert (found[2]["input_ids"] == tiny.WORDS.index("[SEP]")).any()
    torch.testing.assert_close(found[0], evaluate(gpt2, tiny.objective("causal"), ROWS)[0])


# Labels and messages ------------------------------------------------------------------------------------------------


def test_labels_by_name(classifier):
    names = ("left", "middle", "right")
    rows = [{**row, "label": names[row["label"]]} for row in ROWS]
    found = evaluate(classifier, tiny.objective("classification", labels=names), rows)
    torch.testing.assert_close(found[0], evaluate(classifier, tiny.objective("classification"), ROWS)[0])
    other = [{"example_id": r["example_id"], "tweet": r["text"], "party": r["label"]} for r in rows]
    columns = tiny.objective("classification", labels=names, text_column="tweet", label_column="party")
    torch.testing.assert_close(evaluate(classifier, columns, other)[0], found[0])


@pytest.mark.parametrize(
    ("labels", "values", "classes"),
    [
        (("1", "0"), [0, 1, "0", np.int64(1)], [1, 0, 1, 0]),
        ((4, 0), [0, 4, "4", 4.0], [1, 0, 0, 0]),
        (("Negative", "Positive"), [0, 1, "Positive"], [0, 1, 1]),
        (None, [0, 3], [0, 3]),
        (("False", "True"), [True, False], [1, 0]),
    ],
)
def test_a_value_is_the_label_that_reads_the_same(labels, values, classes):
    rows = [{"example_id": i, "text": "vote", "label": value} for i, value in enumerate(values)]
    assert tiny.objective("classification", labels=labels).collate(rows)["labels"].tolist() == classes


ROW = {"example_id": 7, "text": "vote", "label": 0}
MESSAGES = {
    # What is done, with which rows, and what the message must say.
    "no text column": (
        "masked",
        {},
        [{"example_id": 7, "tweet": "vote"}],
        "no column 'text'; they have ['example_id', 'tw",
    ),
    "no text": (
        "causal",
        {},
        [ROW, {"example_id": 8, "text": None}],
        "row 8 has None in column 'text'; expected a string",
    ),
    "no label column": (
        "classification",
        {},
        [{"example_id": 7, "text": "vote"}],
        "no label column 'label'; they have",
    ),
    "unknown label": (
        "classification",
        {"labels": ("a", "b")},
        [{**ROW, "label": "c"}],
        "row 7 has the label 'c'; expected",
    ),
    "number beside labels that are numbers": (
        "classification",
        {"labels": ("1", "2")},
        [ROW],
        "row 7 has the label 0; expected",
    ),
    "label of another kind": (
        "classification",
        {},
        [{**ROW, "label": 0.5}],
        "row 7 has the label 0.5; expected an integer",
    ),
    "label without names": ("classification", {}, [{**ROW, "label": "left"}], "pass labels=[...] in the order of"),
    "missing label": ("classification", {}, [{**ROW, "label": None}], "row 7 has the label None"),
    "class too high": (
        "classification",
        {},
        [{**ROW, "label": 3}],
        "labels run from 3 to 3, but the model has 3 classes",
    ),
    "class below zero": (
        "classification",
        {},
        [ROW, {**ROW, "label": -1}],
        "labels run from -1 to 0, but the model has 3",
    ),
}


@pytest.mark.parametrize(("task", "settings", "rows", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages_about_rows(task, settings, rows, message, request):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        evaluate(request.getfixturevalue(CASES[task]), tiny.objective(task, **settings), rows)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert error.value.__cause__ is None


SETTINGS = {
    "reduction, masked": (lambda: tiny.objective("masked", reduction="mean"), "reduction is 'mean'; expected 'token'"),
    "reduction, causal": (lambda: tiny.objective("causal", reduction="sum"), "reduction is 'sum'; expected 'token'"),
    "no mask token": (lambda: objectives.MaskedLM(tiny.tokenizer(mask_token=None)), "tokenizer with a mask token"),
    "probability": (lambda: tiny.objective("masked", mask_probability=0.0), "mask_probability=0.0"),
    "probability above one": (lambda: tiny.objective("masked", mask_probability=15), "mask_probability=15"),
    "draws": (lambda: tiny.objective("masked", draws=0), "at least one draw"),
    "no fold": (
        lambda: tiny.objective("masked", masks="folds", mask_probability=0.15),
        "so that K folds cover a sentence: give 1/7",
    ),
    "masks": (lambda: tiny.objective("masked", masks="fold"), "masks='fold'; expected 'random' or 'folds'"),
}


@pytest.mark.parametrize(("make", "message"), SETTINGS.values(), ids=SETTINGS)
def test_messages_about_settings(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("task", "model"), [("masked", "classifier"), ("causal", "classifier"), ("classification", "bert")]
)
def test_the_head_of_another_task_is_refused(task, model, request):
    with pytest.raises(InputError, match=r"its head is that of another task|without logits"):
        evaluate(request.getfixturevalue(model), tiny.objective(task), [{**row, "label": 0} for row in ROWS])


# The base class -----------------------------------------------------------------------------------------------------


class Lengths(objectives.Objective):
    """The least that an objective can be."""

    def collate(self, rows):
        return {"lengths": torch.tensor([float(len(row["text"])) for row in rows])}

    def losses(self, call, batch):
        return batch["lengths"], torch.ones_like(batch["lengths"])


def test_two_methods_make_an_objective():
    least = Lengths()
    assert least.of_epoch(3) is least
    assert least.fitted(ROWS) is least
    assert least.is_fitted
    assert (least.text_column, least.image_column, least.content_column) == ("text", None, "text")
    unset = ("counts", "predictions", "tokenizer", "processor", "max_length", "inputs", "labels", "auto_class")
    assert all(getattr(least, name) is None for name in (*unset, "label_kind"))
    assert objectives.ImageClassification().content_column == "image"
    assert tiny.objective("masked", text_column="tweet").content_column == "tweet"


def test_an_objective_without_losses_is_not_made():
    class Unfinished(objectives.Objective):
        def collate(self, rows):
            return {}

    with pytest.raises(TypeError, match="losses"):
        Unfinished()


class Loose:
    collate, losses = Lengths.collate, Lengths.losses


@pytest.mark.parametrize(
    ("objective", "what"), [(Loose(), "a Loose"), (Lengths, "the class Lengths"), (None, "a NoneType")]
)
def test_what_is_no_objective_is_refused_where_it_comes_in(tmp_path, bert, objective, what):
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    message = f"the objective of stage 'stage' is {what}; expected an object of hf_msif.objectives, or of your own sub"
    for enter in (
        lambda: Stage("stage", bert, objective, ROWS),
        lambda: training.train(bert, objective, ROWS, arguments),
        lambda: training.record(bert, objective, ROWS, arguments, None, progress=False),
        lambda: training.polish(bert, objective, ROWS),
        lambda: training.RecordCallback(tmp_path / "run", objective, ROWS),
    ):
        with pytest.raises(InputError, match=message):
            enter()
    with pytest.raises(InputError, match=f"the objective of the evaluation is {what}"):
        training.evaluate(bert, objective, ROWS)


# Lengths ------------------------------------------------------------------------------------------------------------

UNIGRAMS = [1.0] * len(tiny.WORDS)
LENGTHS = {
    # What makes the objective, and the least length at which a text has something to predict.
    "masked": (partial(tiny.objective, "masked"), 3),
    "causal": (partial(tiny.objective, "causal"), 2),
    "causal, with ends": (partial(objectives.CausalLM, tiny.tokenizer()), 3),
    "bidirectional": (partial(tiny.objective, "bidirectional"), 3),
    "classification": (partial(tiny.objective, "classification"), 3),
    "classification, characters": (partial(tiny.objective, "characters"), 3),
    "skip-gram": (partial(objectives.SkipGram, tiny.tokenizer(), UNIGRAMS), 4),
}


@pytest.mark.parametrize(("make", "least"), LENGTHS.values(), ids=LENGTHS)
def test_a_length_without_room_for_a_term_is_refused(make, least):
    for length in (-1, 0, 1, least - 1):
        with pytest.raises(InputError, match=rf"max_length is {length}; expected at least {least} .*={least} or more"):
            make(max_length=length)
    objective = make(max_length=least)
    batch = objective.collate([{**ROW, "text": "we vote no"}])
    assert objective.counts(batch).item() > 0
    assert batch["truncated"].item()


def test_a_tokenizer_without_room_for_a_term_is_refused():
    with pytest.raises(
        InputError, match=r"MaskedLM: the tokenizer's model_max_length is 2; expected at least 3 tokens"
    ):
        objectives.MaskedLM(tiny.tokenizer(model_max_length=2))
    assert objectives.MaskedLM(tiny.tokenizer(model_max_length=2), max_length=3).max_length == 3


# Classes of the model and of the objective ---------------------------------------------------------------------------

NAMES = {"id2label": {0: "left", 1: "right"}, "label2id": {"left": 0, "right": 1}}
HEADS = {
    # Labels of the objective, settings of the model, what the message must say; None: they fit.
    "the same": (("left", "right"), NAMES, None),
    "the same, other case": (("LEFT", "Right"), NAMES, None),
    "other names": (("links", "rechts"), NAMES, None),
    "no names": (("right", "left"), {}, None),
    "default names": (("LABEL_1", "LABEL_0"), {}, None),
    "no labels": (None, NAMES, None),
    "single label": (None, {"problem_type": "single_label_classification"}, None),
    "another order": (
        ("Right", "Left"),
        NAMES,
        "['Right', 'Left'], but the model's id2label has them as ['left', 'rig",
    ),
    "numbers in another order": ((4, 0), {"id2label": {0: "0", 1: "4"}}, "['4', '0'], but the model's id2label"),
    "too many": (
        ("left", "middle", "right"),
        NAMES,
        "lists 3 classes, ['left', 'middle', 'right'], but the model has 2",
    ),
    "too few": (("a", "b"), {"num_labels": 3}, "lists 2 classes, ['a', 'b'], but the model has 3"),
    "one class": (None, {"num_labels": 1}, "the model has 1 class, and the softmax over one class is always 1"),
    "regression": (
        None,
        {"num_labels": 1, "problem_type": "regression"},
        "problem_type='regression'; SequenceClassif",
    ),
    "multi-label": (None, {"problem_type": "multi_label_classification"}, "expects 'single_label_classification'"),
}


@pytest.mark.parametrize(("labels", "settings", "message"), HEADS.values(), ids=HEADS)
def test_a_head_that_this_objective_did_not_train_is_refused(labels, settings, message):
    model = tiny.model("bert", "classification", **settings)
    objective = tiny.objective("classification", labels=labels)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    for head in (model, adapted):
        if message is None:
            objective.check_model(head)
        else:
            with pytest.raises(InputError, match=re.escape(message)):
                objective.check_model(head)


def test_the_head_is_checked_wherever_a_model_comes_in(tmp_path):
    model = tiny.model("bert", "classification", problem_type="regression")
    objective, arguments = (
        tiny.objective("classification"),
        transformers.TrainingArguments(str(tmp_path), use_cpu=True),
    )
    for enter in (
        lambda: MultiStageInfluence([Stage("stage", model, objective, ROWS)], progress=False),
        lambda: training.train(model, objective, ROWS, arguments),
        lambda: training.record(model, objective, ROWS, arguments, None, progress=False),
        lambda: training.polish(model, objective, ROWS),
    ):
        with pytest.raises(InputError, match="problem_type='regression'"):
            enter()
    assert not list(tmp_path.iterdir())


def test_the_logits_count_where_the_configuration_is_silent(classifier):
    """A model of one's own may have a head of which its configuration knows nothing."""
    objective = tiny.objective("classification", labels=("left", "right"))
    with pytest.raises(InputError, match=r"lists 2 classes, \['left', 'right'\], but the model has 3"):
        evaluate(classifier, objective, [{**ROW, "label": "left"}])


@pytest.mark.parametrize("make", [partial(tiny.objective, "classification"), objectives.ImageClassification])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "at least 2, in the order"),
        (("left",), "labels=('left',); expected all classes, at least 2"),
        ("ab", "labels='ab'; expected all classes"),
        (("left", "right", "left"), "'left' twice; expected each class once"),
        ([4, 0, 4], "4 twice; expected each class once"),
        ([0, 1, "0"], "'0' twice; expected each class once"),
    ],
)
def test_labels_that_are_no_list_of_classes(make, labels, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make(labels=labels)


@pytest.mark.parametrize("make", [objectives.MaskedLM, objectives.CausalLM, objectives.SequenceClassification])
def test_a_tokenizer_is_required(make):
    with pytest.raises(TypeError, match="tokenizer"):
        make()
