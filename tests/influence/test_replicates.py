"""Replicates of a query: independent repetitions whose scatter gives error bars that cover the limit."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny
from transformers import PretrainedConfig, PreTrainedModel

from hf_msif import InputError, MultiStageInfluence, Query, Stage, objectives, solvers
from hf_msif.objectives.tokens import seeded
from hf_msif.scoring.noise import Noise
from hf_msif.scoring.scorable import measure

CORPUS, TWEETS = tiny.rows(40, seed=1), tiny.rows(8, seed=2)
TESTS = tiny.rows(2, seed=3)


@pytest.fixture(scope="module")
def models():
    before = tiny.model("bert", "masked")
    return before, tiny.finetuned(before, "bert")


def chain(models, masks=(), **pretraining):
    settings = {"solver": solvers.CG(damping=20.0, tol=1e-9), **pretraining}
    return MultiStageInfluence(
        [
            Stage("pre", models[0], tiny.objective("masked", **dict(masks)), CORPUS, **settings),
            Stage("fine", models[1], tiny.objective("classification"), TWEETS, "head", solver=settings["solver"]),
        ],
        progress=False,
    )


def folds(number):
    """The masks of influence in one of its rounds: each token once in eight."""
    return tiny.objective("masked", masks="folds", mask_probability=1 / 8, draws=8, first_draw=8 * number)


def test_each_replicate_is_a_query_with_its_own_masks_and_part_of_the_sample(models):
    made = chain(models, curvature_samples=20)
    query = made.query(TESTS, replicates=2)
    scores = query.score(CORPUS)
    sample, solver = made.stage("pre").subset(20), made.stage("pre").stage.solver
    expected = []
    for r in range(2):
        alone = MultiStageInfluence(
            [
                Stage("pre", models[0], folds(r), sample[r::2], solver=solver),
                made.stage("fine").stage,
            ],
            progress=False,
        )
        expected.append(alone.query(TESTS).score(CORPUS).influences())
    np.testing.assert_allclose(scores.influences(), np.mean(expected, 0), rtol=1e-6, atol=1e-9)
    errors = query.noise().standard_errors(np.stack(expected, 1))
    np.testing.assert_allclose(np.stack([scores.standard_error(q) for q in range(2)], 1), errors, rtol=1e-6)
    assert query.noise().reliability == pytest.approx(Noise.measured(np.stack(expected, 1)).reliability, abs=1e-6)
    assert set(query.certificates["pre"].converged) == {True}
    assert len(query.certificates["pre"].converged) == 4


@pytest.mark.parametrize(("samples", "number"), [(None, 1), (20, 2), (40, 1)])
def test_by_default_a_sampled_curvature_has_two(models, samples, number):
    query = chain(models, curvature_samples=samples).query(TESTS[:1])
    noise = query.noise()
    assert (1 if noise is None else noise.replicates) == number
    assert query.noise_text().startswith("no error bars" if number == 1 else ("reliability", "THIS RANKING"))
    # Nothing is drawn in the last stage, and nothing above it.
    assert query.noise("fine") is None
    assert query.noise_text("fine").startswith("no sampling noise")


def test_where_nothing_is_drawn_there_is_one_replicate(models):
    static = chain(models, {"static": True})
    one, two = (static.query(TESTS, replicates=r) for r in (1, 2))
    np.testing.assert_array_equal(one.score(CORPUS).influences(), two.score(CORPUS).influences())
    assert two.noise() is None
    assert "no sampling noise" in two.score(CORPUS).metadata["noise_text"]


def test_a_curvature_on_all_rows_stays_on_all_rows(models):
    made = chain(models)
    replicate = made.stage("pre").differentiation.replicate(1, 2)
    assert replicate.curvature_rows == made.stage("pre").rows
    assert (replicate.objective.masks, replicate.objective.first_draw) == ("folds", 8)
    assert made.query(TESTS, replicates=2).noise().replicates == 2


@pytest.mark.parametrize("method", ["forward", "layerwise"])
def test_the_halves_of_a_sample_without_masks_are_scored_in_one_pass(models, method):
    """The objective of the halves is the same, so that their columns share the passes over the rows."""
    made = chain(models, {"static": True}, curvature_samples=20)
    query = made.query(TESTS)
    found = query.score(CORPUS, method=method)
    each = [solution.by(method) for solution in query.solutions["pre"].each]
    bound = made.stage("pre")
    with bound.model.evaluating():
        batch = bound.collate(CORPUS)
        expected = torch.stack([solution.influence(batch, CORPUS).influence for solution in each])
    np.testing.assert_allclose(found.influences(), expected.mean(0).cpu(), rtol=1e-9, atol=1e-12)
    assert found.noise.replicates == 2


def test_the_terms_of_a_row_sum_to_its_mean_influence(models):
    for masks in ({}, {"static": True}):
        query = chain(models, masks, curvature_samples=20).query(TESTS)
        terms, scores = query.token_scores(CORPUS[:5]), query.score(CORPUS[:5])
        for q in range(2):
            sums = terms.groupby("example_id")[f"influence_{q}"].sum()
            np.testing.assert_allclose(sums, scores.influence(q), rtol=1e-9)


@pytest.mark.parametrize("solver", [solvers.CG(damping=0.5), solvers.Identity()])
def test_a_saved_query_has_its_replicates(models, solver, tmp_path):
    made = chain(models, curvature_samples=20, solver=solver)
    query = made.query(TESTS)
    query.save_pretrained(tmp_path)
    loaded = Query.from_pretrained(tmp_path, chain(models, curvature_samples=20, solver=solver))
    assert loaded.noise() == query.noise()
    assert loaded.certificates == query.certificates
    assert json.loads((tmp_path / "query.json").read_text())["stages"]["pre"]["noise"] == query.noise().to_dict()
    found, expected = (each.score(CORPUS).frame for each in (loaded, query))
    assert found.equals(expected)


def test_a_query_need_not_compare_what_its_scores_do(models):
    corpus = tiny.rows(100, seed=4)
    settings = {"solver": solvers.CG(damping=20.0, tol=1e-9), "curvature_samples": 20}
    made = MultiStageInfluence([Stage("pre", models[0], tiny.objective("masked"), corpus, **settings)], progress=False)
    tests = tiny.rows(1, seed=5)
    query, compared = made.query(tests, compare=False), made.query(tests)
    assert "noise" not in query.facts["pre"]
    assert "ranking of stage 'pre': replicates that are not compared yet" in str(query)
    found = query.score(corpus)
    assert "noise" not in query.facts["pre"]
    # The stage's rows are the corpus, so that both compare the same rows; in other batches, which round otherwise.
    assert found.noise.reliability == pytest.approx(compared.noise().reliability, abs=1e-3)
    assert (found.noise.rows, query.score(corpus[:30]).noise) == (100, query.noise())
    assert query.noise() == compared.noise()


def test_an_interrupted_query_goes_on(models, tmp_path, monkeypatch):
    made = chain(models, curvature_samples=20)
    expected = made.query(TESTS).score(CORPUS).frame
    implicit, calls = type(made.stage("pre").differentiation), []
    pull_back = implicit.pull_back

    def interrupted(self, adjoint, checkpoint=None):
        calls.append(self.bound.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pull_back(self, adjoint, checkpoint)

    monkeypatch.setattr(implicit, "pull_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.query(TESTS, checkpoints=tmp_path / "checkpoints")
    assert calls == ["fine", "pre", "pre"]
    np.testing.assert_allclose(
        made.query(TESTS, checkpoints=tmp_path / "checkpoints").score(CORPUS).frame.influence_se_0,
        expected.influence_se_0,
        rtol=1e-9,
    )
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("replicates", [0, True, 1.5, "two", 21])
def test_numbers_that_mean_nothing_are_refused(models, replicates):
    with pytest.raises(InputError, match="replicates"):
        chain(models, curvature_samples=20).query(TESTS, replicates=replicates)


# Coverage ------------------------------------------------------------------------------------------------------------


class Linear(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.w = torch.nn.Parameter(torch.arange(24, dtype=torch.float64).cos())

    def forward(self, x):
        return x @ self.w


class Shaken(objectives.Objective):
    """ℓ = ½(⟨w, m∘x⟩ − y)², where m = 1 + ½ε is drawn by (example id, draw)."""

    def __init__(self, draw=0):
        self.draw = draw

    def of_epoch(self, epoch):
        return Shaken(self.draw + epoch) if epoch else self

    def collate(self, rows):
        masks = np.stack([1 + seeded(0, row["example_id"], self.draw).normal(size=24) / 2 for row in rows])
        x, y = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("x", "y"))
        return {"x": x * torch.tensor(masks), "y": y}

    def losses(self, call, batch):
        sums = (call(x=batch["x"]) - batch["y"]) ** 2 / 2
        return sums, torch.ones_like(sums)


def test_intervals_of_90_percent_cover_the_limit_of_1000_draws():
    """500 queries of two replicates, each replicate with its own draws and curvature rows; the limit is the mean of
    all 1,000 replicates. Rows differ tenfold in size."""
    generator = np.random.default_rng(0)
    x = np.exp(0.7 * generator.normal(size=(12_001, 1))) * generator.normal(size=(12_001, 24))
    rows = [{"example_id": i, "x": values, "y": float(i % 3)} for i, values in enumerate(x.tolist())]
    sample = {"curvature_samples": 12_000, "skip_checks": ["determinism", "padding", "symmetry"]}
    stage = Stage("only", Linear(), Shaken(), rows, curvature="hessian", solver=solvers.Dense(damping=1.0), **sample)
    msif = MultiStageInfluence([stage], progress=False)
    bound = msif.stage("only")
    query = msif.query(rows[:2], replicates=1000)
    with bound.model.evaluating():
        scorable = query._scorable(bound, query._solution(bound, "forward"))
        each = measure(scorable, rows[:60], 64, None).replicates
    assert each.shape == (60, 1000, 2)
    limit, covered = each.mean(1), []
    for pair in np.split(each, 500, axis=1):
        errors = Noise.measured(pair).standard_errors(pair)
        covered.append(abs(pair.mean(1) - limit) <= 1.645 * errors)
    assert np.mean(covered, axis=(0, 1)) == pytest.approx([0.9, 0.9], abs=0.05)
