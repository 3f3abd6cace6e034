"""Long documents in windows: each token counts once, and the scores of chunks add up to those of their document."""

import numpy as np
import pytest
import torch
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.engine.batching import row_cost

DOCUMENTS = tiny.rows(5, seed=4, longest=40, shortest=1)
SETTINGS = [("masked", "bert", {"chunk": 7, "stride": 2}), ("causal", "gpt2", {"chunk": 6, "stride": 2})]
SETTINGS += [("masked", "bert", {"chunk": 9}), ("causal", "gpt2", {"chunk": 5, "stride": 1, "reduction": "example"})]


def evaluate(model, objective, rows):
    functional, batch = FunctionalModel(model), objective.collate(rows)
    with functional.evaluating(), torch.no_grad():
        return objective.losses(functional.bind({}), batch)


@pytest.mark.parametrize(("task", "architecture", "settings"), SETTINGS[:2])
def test_the_scores_of_chunks_add_up_to_those_of_the_document(task, architecture, settings):
    """To 1e-10, as do the losses and the numbers of terms; with several draws and one by one."""
    objective = tiny.objective(task, **settings)
    rows = objectives.chunk_rows(objective, DOCUMENTS)
    assert len(rows) > len(DOCUMENTS)
    stage = Stage("only", tiny.model(architecture, task), objective, DOCUMENTS, solver=solvers.CG(damping=1.0))
    query = MultiStageInfluence([stage], progress=False).query([DOCUMENTS[1], {**DOCUMENTS[3], "example_id": "x"}])
    whole, parts = query.score(DOCUMENTS).frame, query.score(rows, batch_size=2).frame
    owners = [row["document"] for row in rows]
    for name in ("influence_0", "influence_1", "loss", "terms"):
        sums = parts.groupby(owners)[name].sum().to_numpy()
        np.testing.assert_allclose(sums, whole[name], rtol=0, atol=1e-10 * np.abs(whole[name]).max())


@pytest.mark.parametrize(("task", "architecture", "settings"), SETTINGS)
def test_a_document_of_one_window_is_a_plain_row(task, architecture, settings):
    short, plain = tiny.rows(6, seed=1, longest=3), {k: v for k, v in settings.items() if k == "reduction"}
    model, objective = tiny.model(architecture, task), tiny.objective(task, **settings)
    assert len(objectives.chunk_rows(objective, short)) == len(short)
    for found, expected in zip(
        evaluate(model, objective, short), evaluate(model, tiny.objective(task, **plain), short), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_windows_overlap_by_the_stride_and_count_each_token_once():
    objective = tiny.objective("causal", chunk=5, stride=2)
    (row,) = tiny.rows(1, seed=2, longest=14, shortest=14)
    ids = torch.tensor(objective.tokenizer(row["text"])["input_ids"])
    batch = objective.collate([row])
    starts = batch["starts"].tolist()
    assert starts == [0, 3, 6, 9]
    for line, start in enumerate(starts):
        real = batch["attention_mask"][line].bool()
        assert torch.equal(batch["input_ids"][line][real], ids[start : start + 5])
    lines, columns = batch["counted"].nonzero(as_tuple=True)
    assert sorted((batch["starts"][lines] + columns).tolist()) == list(range(14))
    model = FunctionalModel(tiny.model("gpt2", "causal"))
    with model.evaluating(), torch.no_grad():
        terms = objective.terms(model.bind({}), batch)
    assert sorted(terms.positions.tolist()) == list(range(1, 14))
    assert torch.equal(terms.targets, ids[terms.positions])


def test_a_causal_chunk_predicts_from_its_own_window():
    """−log p of each token, given those before it in the window that counts it."""
    objective, model = tiny.objective("causal", chunk=5, stride=2), tiny.model("gpt2", "causal")
    (row,) = tiny.rows(1, seed=2, longest=14, shortest=14)
    ids = torch.tensor(objective.tokenizer(row["text"])["input_ids"])
    expected = 0.0
    for start in (0, 3, 6, 9):
        window = ids[start : start + 5]
        logs = model.eval()(input_ids=window[None]).logits[0].log_softmax(1)
        for place in range(1 if start == 0 else 2, len(window)):
            expected = expected - logs[place - 1, window[place]]
    found, count = evaluate(model, objective, [row])
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-12, atol=0)
    assert count.tolist() == [13]


def test_special_words_in_a_text_shift_no_window():
    rows = [{"example_id": 0, "text": "[SEP] we vote [SEP] they won the debate [CLS] and lost it all"}]
    objective = tiny.objective("masked", chunk=6, stride=2, mask_probability=1.0)
    batch = objective.collate(rows)
    places = batch["columns"] + batch["starts"][batch["rows"]]
    ids = torch.tensor(objective.tokenizer(rows[0]["text"])["input_ids"])
    ordinary = [k for k, token in enumerate(ids.tolist()) if token not in (2, 3)]
    assert sorted(places.tolist()) == ordinary
    assert torch.equal(batch["labels"], ids[places])


@pytest.mark.parametrize(("task", "architecture", "settings"), SETTINGS[1:2])
def test_tokenised_documents_have_the_windows_of_their_texts(task, architecture, settings):
    objective, model = tiny.objective(task, **settings), tiny.model(architecture, task)
    rows = [{"example_id": row["example_id"], **dict(objective.tokenizer(row["text"]))} for row in DOCUMENTS]
    for found, expected in zip(evaluate(model, objective, rows), evaluate(model, objective, DOCUMENTS), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_batch_has_as_many_inputs_as_it_may():
    objective = tiny.objective("causal", chunk=5, stride=1)
    stage = Stage("only", tiny.model("gpt2", "causal"), objective, DOCUMENTS, batch_size=20)
    (bound,) = MultiStageInfluence([stage], progress=False).stages
    most = max(objective.inputs_of(row) for row in DOCUMENTS)
    assert bound.batch_size == max(1, 20 // most) < 20
    assert row_cost(DOCUMENTS[0], objective) == len(DOCUMENTS[0]["text"])


def test_a_chunk_shows_its_own_words():
    objective = tiny.objective("masked", chunk=7, stride=2)
    rows = objectives.chunk_rows(objective, DOCUMENTS[:1])
    shown = [objective.content(row) for row in rows]
    words = DOCUMENTS[0]["text"].split()
    assert shown == [" ".join(words[start : start + 5]) for start in range(0, 3 * len(rows), 3)]
    assert [row["example_id"] for row in rows] == [f"0#{c}" for c in range(len(rows))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.objective("masked", chunk=7, max_length=9), "expected one of chunk and max_length"),
        (lambda: tiny.objective("masked", chunk=7, stride=5), "expected a stride from 0 to below chunk − 2"),
        (lambda: tiny.objective("causal", chunk=7, stride=0), "expected a stride from 1 to below chunk − 0"),
        (lambda: tiny.objective("masked", chunk=2), "expected at least 3 tokens"),
        (lambda: tiny.objective("next sentence", chunk=7), "a pair is read in one window"),
        (lambda: objectives.chunk_rows(tiny.objective("masked"), DOCUMENTS), "MaskedLM has no chunk"),
        (
            lambda: tiny.objective("masked", chunk=7).collate([{**DOCUMENTS[0], "chunk": 99}]),
            r"row 0 is chunk 99 of its document, which has \d+ chunks",
        ),
        (
            lambda: Stage("s", tiny.model("bert", "masked"), tiny.objective("masked", chunk=30), DOCUMENTS),
            "chunk is 30; expected at most 24",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(InputError, match=message):
        make()
