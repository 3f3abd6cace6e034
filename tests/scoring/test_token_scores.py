"""Influences of terms: against plain autograd and central differences, and their sums against the scores of rows."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import CASES, DIFFERENTIATIONS, implicit
from helpers import tiny
from helpers.toy import ToyObjective

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.influence import direction as module
from hf_msif.objectives import Terms

IDENTITY = solvers.Identity()


def query_of(model, objective, rows, tests):
    stage = Stage("only", model, objective, rows, solver=IDENTITY)
    return MultiStageInfluence([stage], progress=False).query(tests)


def influences(frame, columns):
    names = ["influence"] if columns == 1 else [f"influence_{q}" for q in range(columns)]
    return frame[names].to_numpy()


def direction(query):
    """u on the CPU, wherever the library computes."""
    return {name: t.cpu() for name, t in query.solutions["only"].tensors().items()}


class Scored:
    """A chain of one stage and its query of three tests."""

    def __init__(self, case, folder):
        self.case, self.rows = case, case.rows(5, seed=6)
        self.query = implicit(case, folder, solver=IDENTITY).query(case.rows(3, seed=9))
        self.frame = self.query.token_scores(self.rows, method="forward")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def scored(request, tmp_path_factory):
    return Scored(request.param, tmp_path_factory.mktemp("stage"))


def test_the_terms_of_a_row_sum_to_its_influence(scored):
    scores = scored.query.score(scored.rows).frame
    sums = scored.frame.groupby("example_id", sort=False).sum(numeric_only=True)
    assert sums.index.tolist() == [row["example_id"] for row in scored.rows]
    expected = influences(scores, 3)
    np.testing.assert_allclose(influences(sums, 3), expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(sums["loss"], scores["loss"], rtol=1e-12)


def test_a_term_is_the_central_difference_of_its_loss(scored):
    bound = scored.query.chain.stages[0]
    u, model, step = direction(scored.query), FunctionalModel(scored.case.model()), 1e-6
    batch = bound.objective.collate(scored.rows)
    for q in range(2):
        sides = []
        for sign in (1, -1):
            moved = {n: model.parameters[n] + sign * step * t[q] for n, t in u.items()}
            with model.evaluating(), torch.no_grad():
                terms = bound.objective.terms(model.bind(moved), batch)
            sides.append(terms.losses)
        expected = -(sides[0] - sides[1]) / (2 * step)
        expected = expected[terms.owners.argsort(stable=True)].numpy()  # the table is sorted by row
        found = influences(scored.frame, 3)[:, q]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_layer_by_layer_and_by_forward_mode_they_are_the_same(scored):
    layerwise = scored.query.token_scores(scored.rows, method="layerwise")
    found, expected = influences(layerwise, 3), influences(scored.frame, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    plain = ["example_id", "term", "position", "token"]
    assert layerwise[plain].equals(scored.frame[plain])


TASKS = [
    ("masked", "bert", {}),
    ("masked", "bert", {"draws": 2, "static": True}),
    ("causal", "gpt2", {}),
    ("bidirectional", "elmo", {}),
    ("classification", "bert", {}),
]


@pytest.mark.parametrize(("task", "architecture", "settings"), TASKS, ids=str)
def test_a_term_is_minus_u_times_its_gradient(task, architecture, settings):
    """By plain autograd, with the token that is predicted and its place."""
    model, objective, row = (
        tiny.model(architecture, task),
        tiny.objective(task, **settings).for_influence(),
        tiny.rows(1, seed=5, shortest=4)[0],
    )
    query = query_of(model, objective, tiny.rows(4), tiny.rows(2, seed=3))
    frame = query.token_scores([row])
    u, draws = direction(query), objective.inputs_per_row
    plain = tiny.Plain(model, task, objective.collate([row]))
    logits, targets, _ = plain.scored()
    losses = (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]) / draws
    assert len(frame) == len(losses)
    for t, loss in enumerate(losses):
        gradient = plain.gradient(list(u), of=loss)
        expected = [-sum(float((u[n][q] * g).sum()) for n, g in gradient.items()) for q in range(2)]
        np.testing.assert_allclose(influences(frame, 2)[t], expected, rtol=1e-9, atol=1e-12)
        assert frame["loss"][t] == pytest.approx(loss.item(), rel=1e-12)
    words = row["text"].split()
    if task == "classification":
        assert frame["position"].isna().all()
        assert frame["token"].isna().all()
    else:
        before = 0 if task == "causal" else 1  # tokens before the first word
        ends = {-1: "<S>", len(words): "</S>"}
        for position, token in zip(frame["position"] - before, frame["token"], strict=True):
            word = words[position] if 0 <= position < len(words) else ends[position]
            assert token in (word, "<UNK>")  # the vocabulary of the tiny ELMo lacks some words


def test_rows_without_a_term_have_no_line():
    objective = tiny.objective("masked")
    query = query_of(tiny.model("bert", "masked"), objective, tiny.rows(4), tiny.rows(1, seed=3))
    rows = [{"example_id": "none", "text": ""}, *tiny.rows(2, seed=4)]
    assert set(query.token_scores(rows)["example_id"]) == {0, 1}
    assert query.token_scores(rows[:1]).empty


def test_the_first_rows_of_scores():
    query = query_of(tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(4), tiny.rows(1, seed=3))
    top = query.score(tiny.rows(9, seed=4)).top(3)
    terms = query.token_scores(top.to_dict("records"))
    sums = terms.groupby("example_id", sort=False)["influence"].sum()
    np.testing.assert_allclose(sums, top["influence"], rtol=1e-10)


def test_auto_takes_the_fewer_passes(monkeypatch):
    """Two columns and rows of one term: one pass layer by layer, two by forward mode."""

    def query(case, tests):
        stage = Stage("only", case.model(), case.objective(), case.rows(5), solver=IDENTITY)
        return MultiStageInfluence([stage], progress=False).query(case.rows(tests, seed=9))

    by_name = {case.name: case for case in CASES}
    one_term, many_terms = by_name["classification, bert"], by_name["causal, gpt2"]
    calls, derivatives = [], module.term_derivatives
    monkeypatch.setattr(module, "term_derivatives", lambda *given: calls.append(1) or derivatives(*given))
    for case, tests, passes in ((one_term, 2, 0), (one_term, 1, 1), (many_terms, 2, 2)):
        calls.clear()
        query(case, tests).token_scores(case.rows(1))
        assert len(calls) == passes, case.name


def test_an_unrolled_stage_is_refused(tmp_path):
    case = CASES[-1]
    query = DIFFERENTIATIONS["unrolled"](case, tmp_path).query(case.rows(1, seed=9))
    with pytest.raises(
        InputError, match=r"link='unrolled', whose rows are not scored by derivatives .*implicit stage"
    ):
        query.token_scores(case.rows(2))


@dataclass(frozen=True)
class OffByAThousandth(ToyObjective):
    def terms(self, call, batch):
        terms = super().terms(call, batch)
        return terms._replace(losses=1.001 * terms.losses)


@dataclass(frozen=True)
class Detached(ToyObjective):
    def terms(self, call, batch):
        terms = super().terms(call, batch)
        return terms._replace(losses=terms.losses.detach())


@dataclass(frozen=True)
class Silent(ToyObjective):
    terms = None


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Silent(), "the objective Silent does not say its terms; expected a method terms"),
        (OffByAThousandth(), r"the losses of the terms that OffByAThousandth says for the row 0 sum to"),
        (Detached(), r"the influences of the terms that Detached says for the row 0 sum to -?0, but that of the row"),
    ],
)
def test_terms_that_are_missing_or_wrong_are_refused(objective, message):
    case = CASES[-1]
    query = query_of(case.model(), objective, case.rows(5), case.rows(1, seed=9))
    with pytest.raises(InputError, match=message):
        query.token_scores(case.rows(2))


def test_numbers_count_the_terms_of_each_row():
    owners = torch.tensor([2, 0, 2, 2, 0])
    assert Terms(torch.zeros(5), owners).numbers.tolist() == [0, 0, 1, 2, 1]
    assert Terms(torch.zeros(0), owners[:0]).numbers.tolist() == []


def test_without_a_tokenizer_a_token_is_its_id():
    assert objectives.ImageClassification().token_texts([3, 4]) == ["3", "4"]
