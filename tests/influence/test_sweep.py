"""The damping sweep against dense algebra, ranks counted by hand."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.toy import ToyObjective, dense_gauss_newton, example_losses, toy, toy_rows

from hf_msif import InputError, MultiStageInfluence, Stage, solvers, vectors
from hf_msif.influence.implicit import Implicit
from hf_msif.influence.sweep import damping_sweep, recommendation

CORPUS, TWEETS, TESTS = toy_rows(1, 14), toy_rows(2, 9), toy_rows(3, 2)
DAMPINGS = [0.01, 0.3, 5.0]


def chain(solver=None, **settings):
    before, after = toy(0), toy(1)
    after.encoder.load_state_dict(before.encoder.state_dict())
    solver = solver or solvers.CG(damping=1.0, tol=1e-9, max_iter=500)
    stages = [
        Stage("pre", before, ToyObjective(), CORPUS, solver=solver, **settings),
        Stage("fine", after, ToyObjective(), TWEETS, "head", solver=solvers.CG(damping=0.1, tol=1e-9)),
    ]
    return MultiStageInfluence(stages, progress=False)


def influences(dampings, rows=CORPUS):
    """Of the last stage alone: −gᵀ(G + λ)⁻¹a with the dense Gauss-Newton matrix, (λ, test, row)."""
    model = toy(0)
    leaves = dict(model.named_parameters())

    def gradients(of):
        sums, _ = example_losses(model, leaves, of)
        grads = [torch.autograd.grad(s, list(leaves.values()), retain_graph=True) for s in sums]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])

    dense, a, g = dense_gauss_newton(model, list(leaves), rows), gradients(TESTS), gradients(rows)
    eye = torch.eye(len(dense), dtype=dense.dtype)
    return np.stack([-(a @ torch.linalg.inv(dense + d * eye) @ g.T).numpy() for d in dampings])


def ranks(values):
    return np.array([sum(other < value for other in values) for value in values], dtype=float)


def by_hand(k):
    found = influences(DAMPINGS)
    kept, correlation = [math.nan], [math.nan]
    for before, after in itertools.pairwise(found):
        tops = [
            [sorted(range(len(CORPUS)), key=lambda i, v=v: -abs(v[i]))[:k] for v in (x, y)]
            for x, y in zip(before, after, strict=True)
        ]
        kept.append(np.mean([len(set(x) & set(y)) / k for x, y in tops]))
        correlation.append(
            np.mean([np.corrcoef(ranks(x), ranks(y))[0, 1] for x, y in zip(before, after, strict=True)])
        )
    return found, kept, correlation


@pytest.mark.parametrize("k", [1, 4])
def test_the_table_by_hand(k):
    solver = solvers.CG(damping=1.0, tol=1e-10, max_iter=500)
    only = MultiStageInfluence([Stage("only", toy(0), ToyObjective(), CORPUS, solver=solver)], progress=False)
    table = damping_sweep(only, TESTS, CORPUS, [DAMPINGS[i] for i in (2, 0, 1, 0)], k=k)
    found, kept, correlation = by_hand(k)
    assert table.damping.tolist() == DAMPINGS
    np.testing.assert_allclose(table.spread, found.std(axis=2).mean(1), rtol=1e-6)
    np.testing.assert_allclose(table.top_k_kept, kept, rtol=1e-12)
    np.testing.assert_allclose(table.rank_correlation, correlation, rtol=1e-12)
    assert 0 < min(kept[1:]) <= max(kept[1:]) <= 1
    assert max(correlation[1:]) < 1
    assert (table.residual <= 1e-10).all()
    assert table.iterations.is_monotonic_decreasing


def test_a_top_longer_than_the_corpus_keeps_all():
    table = damping_sweep(chain(), TESTS, CORPUS[:3], [0.1, 1.0], k=10)
    assert table.top_k_kept.tolist()[1:] == [1.0]


def test_each_row_is_the_query_at_that_damping():
    """Through both stages; the later one is solved once for all, and the curvature set up once."""
    msif, solved = chain(), []
    with pytest.MonkeyPatch.context() as patch:
        original = Implicit.pull_back
        patch.setattr(
            Implicit, "pull_back", lambda self, *rest: solved.append(self.bound.name) or original(self, *rest)
        )
        table = damping_sweep(msif, TESTS, CORPUS, DAMPINGS)
    assert solved == ["fine", "pre", "pre", "pre"]
    for damping, spread in zip(table.damping, table.spread, strict=True):
        scores = chain(solvers.CG(damping=damping, tol=1e-9, max_iter=500)).query(TESTS).score(CORPUS)
        expected = np.mean([scores.influence(q).std() for q in range(2)])
        np.testing.assert_allclose(spread, expected, rtol=1e-6)


def test_dampings_by_the_largest_eigenvalue():
    dense = dense_gauss_newton(toy(0), list(dict(toy(0).named_parameters())), CORPUS)
    solver = solvers.CG(damping=1.0, tol=1e-9, max_iter=500)
    only = MultiStageInfluence([Stage("only", toy(0), ToyObjective(), CORPUS, solver=solver)], progress=False)
    swept = damping_sweep(only, TESTS, CORPUS).damping / float(torch.linalg.eigvalsh(dense)[-1])
    np.testing.assert_allclose(swept, [1e-4, 1e-3, 1e-2, 1e-1, 1], rtol=0.02)


def test_another_stage():
    table = damping_sweep(chain(), TESTS, TWEETS, [0.1, 1.0], stage="fine")
    assert len(table) == 2
    assert table.top_k_kept.notna().tolist() == [False, True]


def test_a_damping_too_small_has_no_ranking():
    msif = chain(solvers.CG(damping=1.0, tol=1e-9, max_iter=500), curvature="hessian")
    with pytest.warns(UserWarning, match=r"stage 'pre': no ranking at damping 1e-05: .*negative curvature"):
        table = damping_sweep(msif, TESTS, CORPUS, [1e-5, 6.0, 12.0])
    assert table.rank_correlation.notna().tolist() == [False, False, True]
    assert table.spread.notna().tolist() == [False, True, True]


def test_a_later_stage_that_is_not_solved_is_warned_about():
    msif = chain()
    msif.stage("fine").differentiation.solver = solvers.CG(damping=1e-3, tol=1e-9, max_iter=1)
    with pytest.warns(UserWarning, match="stage 'fine': not solved to tolerance"):
        damping_sweep(msif, TESTS, CORPUS, [1.0])


def table(*rows):
    return pd.DataFrame(rows, columns=["damping", "residual", "top_k_kept"])


RECOMMENDED = {
    "the smallest stable one": ([(0.01, 1e-4, None), (0.1, 1e-4, 0.3), (1, 1e-4, 0.8), (10, 1e-4, 0.9)], 0.1),
    "one that is solved": ([(0.01, 0.5, None), (0.1, 1e-2, 0.9), (1, 1e-4, 0.9), (10, 1e-4, 0.7)], 1),
    "none is stable": ([(0.01, 1e-4, None), (0.1, 1e-4, 0.3), (1, 1e-4, 0.4), (10, 0.1, 0.2)], 1),
    "one without a ranking": ([(0.01, 7.0, None), (0.1, 1e-4, None), (1, 1e-4, 0.9)], 0.1),
    "a single one": ([(0.3, 1e-4, None)], 0.3),
    "none is solved": ([(0.01, 0.1, None), (0.1, 0.01, 0.9)], None),
}


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommendation(name):
    rows, expected = RECOMMENDED[name]
    found = recommendation(table(*rows), tol=1e-3)
    assert found.damping == expected
    assert ("stable" in found.reason) == (name in ("none is stable", "a single one"))


ERRORS = {
    "none": ({"dampings": []}, r"the dampings are \[\]; expected positive"),
    "zero": ({"dampings": [1.0, 0.0]}, r"dampings are \[0\.0, 1\.0\]; expected positive"),
    "no number": ({"dampings": [math.nan]}, "expected positive numbers"),
    "no top": ({"k": 0}, "k is 0; expected at least 1"),
    "stage": ({"stage": "middle"}, r"there is no stage 'middle'; the stages are \['pre', 'fine'\]"),
    "corpus": ({"corpus": []}, "the corpus is empty"),
    "tests": ({"tests": []}, "the test examples is empty"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(change, message):
    settings = {"tests": TESTS, "corpus": CORPUS, "dampings": [1.0], **change}
    with pytest.raises(InputError, match=message):
        damping_sweep(chain(), **settings)


@dataclass(frozen=True)
class Scaled:
    """A solver that derives from nothing: u = b / λ."""

    damping: float = 1.0
    damped = True
    max_iter = 1

    def init(self, operator):
        return None

    def compute(self, operator, b, state, progress, checkpoint):
        u = vectors.scale(b, 1 / self.damping)
        residual = operator.norm(vectors.add(b, operator.matvec(u), -1.0)) / operator.norm(b)
        certificate = solvers.Certificate.from_residual("scaled", self.damping, 1e9, residual, operator.counts)
        return solvers.Solution(u, certificate)


def test_a_damped_solver_that_derives_from_nothing_is_swept():
    table = damping_sweep(chain(Scaled()), TESTS, CORPUS, [0.5, 1.0])
    np.testing.assert_allclose(table.spread[0], 2 * table.spread[1], rtol=1e-9)


def test_a_solution_worse_than_none_is_no_row_of_the_ranking():
    with pytest.warns(UserWarning, match=r"'pre': no ranking at damping 1e-06: the relative residual .* below 1"):
        table = damping_sweep(chain(Scaled()), TESTS, CORPUS, [1e-6, 1.0, 2.0])
    assert table.residual[0] >= 1
    assert np.isnan(table.spread).tolist() == [True, False, False]
    assert np.isnan(table.rank_correlation).tolist() == [True, True, False]


def test_a_solver_without_damping():
    with pytest.raises(InputError, match=r"'pre' is solved by Identity\(\), which has no damping to sweep: use CG"):
        damping_sweep(chain(solvers.Identity()), TESTS, CORPUS, [1.0])
