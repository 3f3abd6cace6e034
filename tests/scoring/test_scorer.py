"""Scores of a two-stage BERT: against plain autograd, and unchanged by batch, order, company and number of columns."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers

CORPUS = tiny.rows(9, seed=1, longest=9)
TWEETS = tiny.rows(6, seed=2)
TESTS = [{**row, "example_id": f"test{row['example_id']}"} for row in tiny.rows(2, seed=3)]
# Scores are linear in u, so that the error of u does not matter here; float32 cannot reach a smaller one.
TOL = {torch.float64: 1e-10, torch.float32: 1e-4}


class Case:
    def __init__(self, dtype):
        self.before = tiny.model("bert", "masked", dtype=dtype)
        self.after = tiny.finetuned(self.before, "bert", dtype=dtype)
        self.chain = tiny.chain(self.before, self.after, tol=TOL[dtype], data=(CORPUS, TWEETS))
        self.query = self.chain.query(TESTS)
        self.tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]

    def equal(self, values, expected):
        size = np.abs(expected).max()
        np.testing.assert_allclose(values, expected, rtol=0, atol=self.tolerance * size)


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def exact():
    return Case(torch.float64)


def matrix(scores):
    return np.stack([scores.influence(q) for q in range(scores.columns)], 1)


@pytest.mark.parametrize(("stage", "task", "rows"), [("pre", "masked", CORPUS), ("fine", "classification", TWEETS)])
def test_influence_is_minus_u_times_the_gradient(exact, stage, task, rows):
    bound = exact.chain.stage(stage)
    u = exact.query.solutions[stage].tensors()
    scores = exact.query.score(rows, stage)
    for i, row in enumerate(rows):
        plain = tiny.Plain(bound.stage.model, task, bound.objective.collate([row]), bound.objective.inputs_per_row)
        gradient = plain.gradient(list(u))
        for q in range(2):
            expected = -sum(float((u[n][q] * g).sum()) for n, g in gradient.items())
            np.testing.assert_allclose(scores.influence(q)[i], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(scores.frame.loss[i], plain.sums().item(), rtol=1e-12)
    assert scores.metadata["stage"] == stage


@pytest.mark.slow
def test_u_solves_its_system(exact):
    """The pull-back by plain autograd: dense Gauss-Newton of the head, and the mixed derivative by differences."""
    from helpers.tiny import dense_gauss_newton

    head = list(exact.query.solutions["fine"].tensors())
    assert all(not n.startswith("bert.") or "pooler" in n for n in head)
    tests = tiny.Plain(exact.after, "classification", tiny.objective("classification").collate(TESTS))
    encoder = [n for n in tests.parameters if n not in head]
    tweets = tiny.Plain(exact.after, "classification", tiny.objective("classification").collate(TWEETS))
    dense = dense_gauss_newton(tweets, head) / len(TWEETS)
    for q in range(2):
        a = tests.gradient([*head, *encoder], of=tests.sums()[q])
        flat = torch.cat([a[n].flatten() for n in head])
        u = torch.linalg.solve(dense + 0.5 * torch.eye(len(flat)), flat)
        solution = torch.cat([exact.query.solutions["fine"].tensors()[n][q].flatten() for n in head])
        torch.testing.assert_close(solution, u, rtol=0, atol=1e-9 * float(u.abs().max()))

        pieces = u.split([a[n].numel() for n in head])
        direction = {n: piece.view_as(a[n]) for n, piece in zip(head, pieces, strict=True)}
        mixed = tweets.along(direction, lambda: tweets.gradient(encoder))
        adjoint = {n: a[n] - mixed[n] / len(TWEETS) for n in encoder}
        corpus = tiny.Plain(exact.before, "masked", exact.chain.stages[0].collate(CORPUS))
        names = list(exact.query.solutions["pre"].tensors())
        wanted = torch.cat([adjoint.get(n, torch.zeros_like(corpus.parameters[n])).flatten() for n in names])
        terms = len(corpus.batch["labels"])  # of eight masks per row, whose mean counts
        dense_pre = dense_gauss_newton(corpus, names) / terms
        solution = torch.cat([exact.query.solutions["pre"].tensors()[n][q].flatten() for n in names])
        residual = dense_pre @ solution + 0.5 * solution - wanted
        assert residual.norm() < 1e-7 * wanted.norm()
        assert exact.chain.stage("pre").count == terms / 8


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_batch_size_does_not_matter(case, size):
    case.equal(matrix(case.query.score(CORPUS, batch_size=size)), matrix(case.query.score(CORPUS)))


def test_order_does_not_matter(case):
    order = np.random.default_rng(0).permutation(len(CORPUS))
    shuffled = case.query.score([CORPUS[i] for i in order], batch_size=2)
    case.equal(matrix(shuffled), matrix(case.query.score(CORPUS, batch_size=4))[order])
    assert shuffled.frame.example_id.tolist() == order.tolist()


def test_padding_partners_do_not_matter(case):
    longest = {"example_id": "long", "text": "debate " * (tiny.LENGTH - 2), "label": 0}
    for row in CORPUS[:4]:
        alone = case.query.score([row])
        case.equal(matrix(case.query.score([row, longest]))[:1], matrix(alone))


@pytest.mark.slow
def test_the_batch_size_of_curvature_does_not_matter(exact):
    other = tiny.chain(exact.before, exact.after, 1e-10, (CORPUS, TWEETS), {"batch_size": 2}, batch_size=4)
    values, expected = matrix(other.query(TESTS).score(CORPUS)), matrix(exact.query.score(CORPUS))
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_a_column_of_several_is_the_query_of_one(exact):
    several = exact.query.score(CORPUS)
    assert several.columns == 2
    for q in range(2):
        single = exact.chain.query([TESTS[q]]).score(CORPUS)
        assert single.columns == 1
        np.testing.assert_allclose(
            single.influence(), several.influence(q), rtol=0, atol=1e-8 * np.abs(several.influence(q)).max()
        )
        assert single.frame.influence.tolist() == single.influence().tolist()


def test_removal_effect_divides_by_the_counted_terms(exact):
    objective = tiny.objective("masked").for_influence()
    masked = sum(len(row["text"].split()) for row in CORPUS) / 8  # each word once, by eight masks
    for stage, rows, count in (("pre", CORPUS, masked), ("fine", TWEETS, len(TWEETS))):
        # N is that of the stage's data, whatever rows are scored.
        scores = exact.query.score(rows[:3], stage)
        assert scores.metadata["N"] == count
        for q in range(2):
            np.testing.assert_allclose(scores.frame[f"removal_effect_{q}"], -scores.influence(q) / count, rtol=1e-12)
    assert objective.counts(objective.collate(CORPUS)).sum() == masked


@pytest.mark.parametrize("size", [1, 4, 8, 9])
def test_n_counts_all_data_also_when_curvature_is_estimated_on_some(exact, size):
    chain = tiny.chain(exact.before, exact.after, 1e-3, (CORPUS, TWEETS), {"curvature_samples": size})
    bound = chain.stage("pre")
    assert bound.differentiation.operator.examples == size
    assert bound.count == exact.chain.stage("pre").count
    with pytest.raises(InputError, match="numbers of at least 1"):
        tiny.chain(exact.before, exact.after, 1e-3, (CORPUS, TWEETS), {"curvature_samples": 0})


def test_duplicates_are_scored_each(exact):
    """The same text under another id has another mask, and so another score; neither is dropped."""
    twice = [*CORPUS, {**CORPUS[0], "example_id": "again"}]
    scores = exact.query.score(twice)
    assert len(scores) == len(CORPUS) + 1
    assert scores.frame.duplicates.tolist() == [2, *[1] * (len(CORPUS) - 1), 2]
    again = exact.query.score([{**CORPUS[0], "example_id": "again"}])
    np.testing.assert_allclose(matrix(scores)[-1:], matrix(again), rtol=1e-9)


def test_an_empty_sentence_scores_zero(exact):
    scores = exact.query.score([*CORPUS[:2], {"example_id": "none", "text": ""}])
    assert matrix(scores)[2].tolist() == [0.0, 0.0]
    assert scores.frame.terms[2] == 0


def test_truncated_rows_are_counted(exact):
    long = {"example_id": "long", "text": "debate " * 30}
    assert exact.query.score([*CORPUS, long]).metadata["truncated"] == 1
    assert exact.query.score(CORPUS).metadata["truncated"] == 0


def test_text_from_another_column(exact):
    renamed = [{"example_id": r["example_id"], "tweet": r["text"], "label": r["label"]} for r in TWEETS]
    objective = tiny.objective("classification", text_column="tweet")
    stage = Stage("only", exact.after, objective, renamed, trainable=["classifier.*"], solver=solvers.CG(damping=0.5))
    scores = MultiStageInfluence([stage], progress=False).query(renamed[:1]).score(renamed)
    assert scores.frame.text.tolist() == [r["text"] for r in TWEETS]
    assert scores.frame.duplicates.tolist() == [1] * len(TWEETS)


# What is refused -----------------------------------------------------------------------------------------------------

BAD = {
    "empty": ([], "the corpus is empty; expected at least one row"),
    "a string": ("vote", "the corpus is a str; expected"),
    "a generator": ((row for row in CORPUS), "the corpus is a generator; expected"),
    "all splits": (
        datasets.DatasetDict(train=datasets.Dataset.from_list(CORPUS)),
        "the corpus is a DatasetDict; expected",
    ),
}


@pytest.mark.parametrize(("corpus", "message"), BAD.values(), ids=BAD)
def test_what_is_no_corpus(exact, corpus, message):
    with pytest.raises(InputError, match=message):
        exact.query.score(corpus)


def test_a_stage_that_does_not_exist(exact):
    with pytest.raises(InputError, match=r"no stage 'pretraining'; the stages are \['pre', 'fine'\]"):
        exact.query.score(CORPUS, "pretraining")


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_without_rows(exact, size):
    with pytest.raises(InputError, match=f"batch_size is {size}; expected at least 1"):
        exact.query.score(CORPUS, batch_size=size)


@pytest.mark.parametrize("slope", [False, True], ids=["loss", "derivative"])
def test_rows_that_are_not_finite_are_named(exact, monkeypatch, slope):
    bound = exact.chain.stage("pre")

    class Broken(objectives.Objective):
        def __init__(self, objective):
            self.inner = objective

        def collate(self, rows):
            return self.inner.collate(rows)

        def losses(self, call, batch):
            sums, counts = self.inner.losses(call, batch)
            bad = counts == counts.max()
            # √ at 0 is finite, its slope is not.
            broken = torch.sqrt(sums - sums.detach()) if slope else torch.full_like(sums, torch.inf)
            return torch.where(bad, broken, sums), counts

    broken = replace(exact.query.solutions["pre"], objective=Broken(bound.objective))
    monkeypatch.setitem(exact.query.solutions, "pre", broken)
    counts = [max(1, round(0.4 * len(row["text"].split()))) for row in CORPUS]
    ids = [row["example_id"] for row, n in zip(CORPUS, counts, strict=True) if n == max(counts)]
    with pytest.raises(InputError) as error:
        exact.query.score(CORPUS, batch_size=100)
    assert "is not finite" in str(error.value)
    named = error.value.args[0].split("[")[1].split("]")[0]
    assert sorted(int(i) for i in named.split(",")) == ids
