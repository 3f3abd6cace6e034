"""`Stochastic`: mini-batches that add up to the curvature, and solutions nearer to it than those on a fixed sample."""

import dataclasses

import pytest
import torch
from helpers import toy

from hf_msif import InputError, MultiStageInfluence, Stage, vectors
from hf_msif.curvature import EKFAC
from hf_msif.engine import Engine
from hf_msif.solvers import CG, Dense, Nystrom, Stochastic, solve

ROWS = 2000
DAMPING = 0.3  # half of the largest eigenvalue
SETTINGS = Stochastic(DAMPING, tol=1e-4, max_passes=60, preconditioner=Nystrom(rank=16), rows=100, sample=200)


def stage(size=ROWS, solver=SETTINGS, **settings):
    model, rows = toy.toy(0), toy.toy_rows(1, size)
    made = Stage("only", model, toy.ToyObjective(), rows, solver=solver, batch_size=500, weight_decay=0.01, **settings)
    return MultiStageInfluence([made], progress=False)


@pytest.fixture(scope="module")
def system():
    chain = stage()
    bound = chain.stage()
    adjoint, _ = chain.measurement(toy.toy_rows(9, 3))
    return bound.differentiation.operator, vectors.select(adjoint, bound.split.trained)


def distance(u, v):
    """‖u − v‖ / ‖v‖, the mean of the columns."""
    return float((vectors.norm(vectors.add(u, v, -1.0)) / vectors.norm(v)).mean())


def same(x, y, **tolerance):
    for name, t in y.items():
        torch.testing.assert_close(x[name], t, **tolerance)


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_minibatches_of_an_epoch_add_up_to_the_curvature(system, epoch):
    operator, v = system
    steps = -(-ROWS // 300)  # parts of 285 and 286 rows
    total, seen = vectors.zeros_like(v), []
    for step in range(epoch * steps, (epoch + 1) * steps):
        batch = operator.minibatch(step, 300)
        seen += [row["example_id"] for row in batch.rows]
        assert len(batch.rows) == batch.examples <= 300
        vectors.add_(total, batch.matvec(v), batch.examples / ROWS)
    assert sorted(seen) == list(range(ROWS))
    same(total, operator.matvec(v), rtol=1e-10, atol=1e-12)


def test_a_minibatch_is_a_function_of_seed_and_step(system):
    operator, _ = system

    def drawn(*arguments):
        return [row["example_id"] for row in operator.minibatch(*arguments).rows]

    assert drawn(5, 16, 1) == drawn(5, 16, 1)
    assert len({tuple(drawn(*x)) for x in ((5, 16, 1), (6, 16, 1), (5 + ROWS // 16, 16, 1), (5, 16, 2))}) == 4


def test_no_batch_of_the_whole_corpus_is_held(system):
    operator, v = system
    assert operator.holds_batches is False
    operator.matvec(v)
    assert operator.evaluations == []
    batch = operator.minibatch(0, 16)
    assert sum(len(e.batch["labels"]) for e in batch.evaluations) == 16
    assert batch.count == pytest.approx(operator.count * 16 / ROWS)


class Part(Engine):
    """One process of several, whose sums stay its own."""

    def __init__(self, rank, processes):
        super().__init__(progress=False)
        self.part = rank, processes

    def local_batches(self, rows, objective, size):
        self.rank, self.processes = self.part
        try:
            return super().local_batches(rows, objective, size)
        finally:
            self.rank, self.processes = 0, 1


def test_the_shares_of_processes_add_up(system):
    operator, v = system
    whole, total = operator.minibatch(7, 50), vectors.zeros_like(v)
    for rank in range(3):
        share = operator.minibatch(7, 50)
        share.engine = Part(rank, 3)
        share.ridge = {}
        vectors.add_(total, share.matvec(v))
    for name, strength in whole.ridge.items():
        total[name] += strength * v[name]
    same(total, whole.matvec(v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("preconditioner", [None, Nystrom(rank=16), "ekfac"], ids=["none", "nystrom", "ekfac"])
def test_converges_to_the_dense_solution(system, preconditioner):
    operator, b = system
    solver = dataclasses.replace(SETTINGS, preconditioner=preconditioner)
    solution = solve(operator, b, solver)
    certificate = solution.certificate
    assert certificate.status == ["converged"] * 3
    residual = vectors.add(vectors.add(operator.matvec(solution.value), solution.value, DAMPING), b, -1.0)
    true = vectors.norm(residual) / vectors.norm(b)
    torch.testing.assert_close(torch.tensor(certificate.residual).double(), true, rtol=1e-4, atol=1e-12)
    assert true.max() <= solver.tol
    assert distance(solution.value, solve(operator, b, Dense(DAMPING)).value) < 1e-3
    assert certificate.residual_error is None
    assert certificate.matvecs[0] <= solver.max_passes + 1


def test_solving_twice_gives_the_same(system):
    operator, b = system
    first, second = (solve(operator, b, dataclasses.replace(SETTINGS, max_passes=2, tol=0)) for _ in range(2))
    same(first.value, second.value, rtol=0, atol=0)
    assert first.certificate == second.certificate
    assert set(first.certificate.status) == {"max_iter"}


def test_is_nearer_than_a_fixed_sample_for_the_same_work(system):
    operator, b = system
    exact = solve(operator, b, Dense(DAMPING)).value
    solver = dataclasses.replace(SETTINGS, max_passes=0.96, whole=False, preconditioner=None, rows=16)
    state = solver.init(operator)
    found = solve(operator, b, solver, state)
    work = found.certificate.iterations[0] * solver.rows
    assert work <= 64 * 30
    sampled = [solve(operator.minibatch(0, 64, seed), b, CG(DAMPING, max_iter=30)).value for seed in range(5)]
    assert distance(found.value, exact) < 0.5 * min(distance(u, exact) for u in sampled)


def test_the_estimated_residual_covers_the_true_one(system):
    operator, b = system
    covered = 0
    for seed in range(8):
        solver = dataclasses.replace(SETTINGS, max_passes=0.5, whole=False, preconditioner=None, rows=16, seed=seed)
        solution = solve(operator, b, solver)
        residual = vectors.add(vectors.add(operator.matvec(solution.value), solution.value, DAMPING), b, -1.0)
        true = (vectors.norm(residual) / vectors.norm(b)).tolist()
        stated, error = solution.certificate.residual, solution.certificate.residual_error
        covered += sum(t <= s + e for t, s, e in zip(true, stated, error, strict=True))
        assert all(s > 0 for s in error)
    assert covered >= 0.9 * 8 * 3
    assert "by an estimate on mini-batches" in str(solution.certificate)


def test_float32_stops_at_its_rounding():
    operator = stage(200).stage().differentiation.operator
    operator = operator.minibatch(0, 200)  # all rows
    operator.parameters = {name: p.float() for name, p in operator.parameters.items()}
    matvec = operator.matvec

    class Single:
        parameters, examples = operator.parameters, 200

        def matvec(self, v):
            return {n: t.float() for n, t in matvec({n: t.double() for n, t in v.items()}).items()}

    b = vectors.rademacher(operator.parameters, 2, seed=0)
    certificate = solve(Single(), b, dataclasses.replace(SETTINGS, tol=0, max_passes=2000)).certificate
    assert certificate.status == ["stalled"] * 2
    assert max(certificate.residual) < 1e-5


def test_divergence_is_refused(system):
    operator, b = system
    state = SETTINGS.init(operator)._replace(step_size=1e9)
    with pytest.raises(InputError, match=r"has not reduced the residual in .* steps on 100 rows"):
        solve(operator, b, SETTINGS, state)


def test_a_step_size_too_large_is_halved(system):
    operator, b = system
    state = SETTINGS.init(operator)
    large = state._replace(step_size=20 * state.step_size)
    assert solve(operator, b, SETTINGS, large).certificate.converged == [True] * 3


def test_a_right_hand_side_of_zero_is_solved(system):
    operator, b = system
    b = {name: torch.stack([t[0], torch.zeros_like(t[0])]) for name, t in b.items()}
    solution = solve(operator, b, SETTINGS)
    assert solution.certificate.residual[1] == 0
    assert all(not t[1].any() for t in solution.value.values())
    nothing = solve(operator, vectors.zeros_like(b), SETTINGS)
    assert nothing.certificate.iterations == [0, 0]
    assert nothing.certificate.converged == [True, True]


def test_a_curvature_that_is_no_sum_is_its_own_minibatch(system):
    operator, b = system
    fit = EKFAC.of(operator)
    assert fit.minibatch(3, 16) is fit
    solution = solve(fit, b, dataclasses.replace(SETTINGS, preconditioner=None, tol=1e-9, max_passes=2000))
    same(solution.value, fit.inverse(b, DAMPING), rtol=1e-6, atol=1e-8)


def test_a_stage_is_solved_by_name():
    solver = Stochastic(tol=0.05, max_passes=40, damping_fraction=0.5, rows=40, sample=100)
    query = stage(400, solver).query(toy.toy_rows(9, 1))
    certificate = query.certificates["only"]
    assert certificate.solver == "stochastic"
    assert certificate.converged == [True]
    assert certificate.damping == pytest.approx(0.5 * certificate.largest_eigenvalue)


@pytest.mark.parametrize(
    "settings", [{"rows": 0}, {"sample": 0.5}, {"max_passes": 0}, {"tol": -1}, {"damping": -1.0}], ids=str
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="expected"):
        Stochastic(**settings)
