"""What holds for every objective, model, curvature, solver and differentiation of `cases.py`, in float64."""

import errno
import functools
import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cases import CASES, CHAINS, CURVATURES, DIFFERENTIATIONS, SIZE, SOLVERS, implicit
from helpers import tiny
from helpers.runs import TESTS, Mixed, rows_of

from hf_msif import InputError, MultiStageInfluence, Query, Stage, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature import derivatives, gauss_newton
from hf_msif.curvature.derivatives import Evaluation
from hf_msif.engine import Engine
from hf_msif.engine.batching import row_shape
from hf_msif.registry import CHECKS


def near(found, expected, tolerance=1e-10):
    found, expected = (torch.as_tensor(t).detach().cpu() for t in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# Derivatives of a batch ---------------------------------------------------------------------------------------------


class Batch:
    """The losses of a few rows of a case, and a measure of how they change along a direction."""

    def __init__(self, case):
        self.case, self.objective, self.rows = case, case.objective(), case.rows(4, seed=4)
        self.model = FunctionalModel(case.model())
        self.evaluation = Evaluation(self.model, self.objective, self.objective.collate(self.rows))
        self.names = derivatives.parameters_in_use(self.model, self.objective, self.rows, self.model.parameters)

    def direction(self, seed, columns=1):
        return tiny.block({n: self.model.parameters[n] for n in self.names}, columns, seed)

    def losses(self, rows=None):
        batch = self.evaluation.batch if rows is None else self.objective.collate(rows)
        with self.model.evaluating(), torch.no_grad():
            return Evaluation(self.model, self.objective, batch).losses({})[0]

    def along(self, direction, measure, step=1e-5):
        """Central difference of `measure(parameters)` along a direction."""
        sides = []
        for sign in (1, -1):
            moved = {n: (self.model.parameters[n] + sign * step * t).requires_grad_() for n, t in direction.items()}
            with self.model.evaluating():
                sides.append(measure(moved))
        return (sides[0] - sides[1]) / (2 * step)

    def sums(self, parameters):
        return self.evaluation.losses(parameters)[0].detach()

    def flat_gradient(self, parameters):
        total = self.evaluation.losses(parameters)[0].sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(parameters.values()))])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def batch(request):
    return Batch(request.param)


def test_the_gradient_is_that_of_central_differences(batch):
    with batch.model.evaluating():
        gradient = derivatives.gradient(batch.evaluation, batch.names)
    for seed in (1, 2):
        v = vectors.column(batch.direction(seed), 0)
        slope = sum((gradient[n] * v[n]).sum() for n in v)
        near(slope, batch.along(v, batch.sums).sum(), 1e-6)


def test_a_directional_derivative_is_the_gradients_product(batch):
    v = vectors.column(batch.direction(3), 0)
    with batch.model.evaluating():
        slopes, sums, counts = derivatives.directional_derivatives(batch.evaluation, v)
        gradients = derivatives.example_gradients(batch.evaluation, batch.names)
    expected = sum((gradients[n] * v[n]).flatten(1).sum(1) for n in v)
    assert expected.abs().max() > 1e-6
    near(slopes, expected)
    near(sums, batch.losses())
    assert counts.shape == sums.shape
    assert (counts > 0).all()


def test_a_hessian_product_is_the_central_difference_of_the_gradient(batch):
    v = batch.direction(4, columns=2)
    with batch.model.evaluating():
        products = vectors.flatten(derivatives.hessian_product(batch.evaluation, v, batch.names))
    for q in range(2):
        near(products[q], batch.along(vectors.column(v, q), batch.flat_gradient), 1e-6)


def test_a_gauss_newton_product_has_the_columns_that_each_has_alone(batch):
    v = batch.direction(6, columns=3)
    with batch.model.evaluating():
        together = gauss_newton.gauss_newton_product(batch.evaluation, v)
        for q in range(3):
            alone = gauss_newton.gauss_newton_product(batch.evaluation, vectors.take(v, torch.tensor([q])))
            near(vectors.flatten(together)[q], vectors.flatten(alone)[0], 1e-12)
    assert batch.model.linear_backward  # no column was computed like the first one


def test_a_row_alone_has_the_loss_that_it_has_among_others(batch):
    together = batch.losses()
    near(torch.cat([batch.losses([row]) for row in batch.rows]), together)
    near(batch.losses(batch.rows[::-1]), together.flip(0))


def test_a_batch_of_equal_lengths_has_no_padding(batch):
    rows, objective, seen = batch.case.rows(9, seed=5), batch.objective.unpadded(), []
    for indices, _ in Engine(progress=False).batches(rows, objective, 4):
        assert len({row_shape(rows[i], objective) for i in indices}) == 1
        assert row_shape(rows[indices[0]], objective) == shape(objective.collate([rows[i] for i in indices]))
        seen += indices
    assert sorted(seen) == list(range(9))


def shape(made):
    return tuple((key, tuple(t.shape[1:])) for key, t in sorted(made.items()) if getattr(t, "ndim", 0) > 1)


def test_the_checks_of_a_stage_pass(batch):
    stage = Stage("only", batch.case.model(), batch.case.objective(), batch.case.rows(9, seed=5))
    (bound,) = MultiStageInfluence([stage], progress=False).stages
    assert bound.objective.pads
    assert [finding.check for finding in bound.findings] == list(CHECKS)
    assert all(finding.value is None or finding.value < 1e-6 for finding in bound.findings)


# Curvatures ---------------------------------------------------------------------------------------------------------


class Operator:
    """A curvature of a case, and three columns to multiply."""

    def __init__(self, case, curvature):
        self.case, self.curvature, self.model = case, curvature, FunctionalModel(case.model())
        self.objective, self.rows = case.objective(), case.rows(SIZE, seed=1)
        self.names = derivatives.parameters_in_use(self.model, self.objective, self.rows, self.model.parameters)
        self.operator = self.make()
        self.x, self.y = (tiny.block(self.operator.parameters, 3, seed) for seed in (1, 2))
        self.product = self.operator.matvec(self.x)

    def make(self, batch_size=3, engine=None, rows=None, ridge=None):
        engine = engine or Engine(progress=False)
        return self.curvature.operator(
            self.model, self.objective, rows or self.rows, self.names, engine, batch_size, ridge
        )


def named(pair):
    return ", ".join(each.name for each in pair)


OPERATORS = list(itertools.product(CASES, CURVATURES))


@pytest.fixture(scope="module", params=OPERATORS, ids=named)
def curved(request):
    return Operator(*request.param)


def test_a_curvature_is_symmetric(curved):
    """⟨x, A y⟩ = ⟨A x, y⟩ for every pair of columns."""
    other = vectors.flatten(curved.operator.matvec(curved.y))
    near(vectors.flatten(curved.x) @ other.T, vectors.flatten(curved.product) @ vectors.flatten(curved.y).T)


def test_a_curvature_is_linear(curved):
    scale = torch.tensor([3.0, -0.5, 1e3], dtype=torch.float64)
    together = curved.operator.matvec(vectors.add(curved.x, curved.y, scale))
    apart = vectors.add(curved.product, curved.operator.matvec(curved.y), scale)
    near(vectors.flatten(together), vectors.flatten(apart))


SEMIDEFINITE = [(case, curvature) for case, curvature in OPERATORS if curvature.semidefinite]


@pytest.mark.parametrize("curved", SEMIDEFINITE, ids=named, indirect=True)
def test_a_curvature_is_positive_semidefinite(curved):
    form = vectors.flatten(curved.product) @ vectors.flatten(curved.x).T
    eigenvalues = torch.linalg.eigvalsh((form + form.T) / 2)
    assert eigenvalues.min() > -1e-10 * eigenvalues.max()
    assert eigenvalues.max() > 0


@pytest.mark.slow
def test_a_curvature_does_not_depend_on_batches_or_order(curved):
    for other in (curved.make(batch_size=1), curved.make(batch_size=100), curved.make(rows=curved.rows[::-1])):
        assert other.count == pytest.approx(curved.operator.count)
        near(vectors.flatten(other.matvec(curved.x)), vectors.flatten(curved.product))


def test_a_ridge_is_added_to_the_diagonal(curved):
    name = curved.names[0]
    product = curved.make(ridge={name: 0.7}).matvec(curved.x)
    expected = {n: t + 0.7 * curved.x[n] if n == name else t for n, t in curved.product.items()}
    near(vectors.flatten(product), vectors.flatten(expected))


SUMS = [(case, curvature) for case, curvature in OPERATORS if curvature.is_sum]


@pytest.mark.parametrize("curved", SUMS, ids=named, indirect=True)
def test_the_shares_of_processes_add_up(curved, monkeypatch):
    """The sums of the ranks of a world of three are those of one process."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(Engine, "all_reduce", lambda self, values: values)  # no other process is there to add to
    total = vectors.scale(curved.x, 0.0)
    for rank in range(3):
        operator = curved.make(engine=Engine(tiny.alone(rank, 3), progress=False))
        with curved.model.evaluating():
            for part in operator.products(curved.x):
                total = vectors.add(total, part)
    near(vectors.flatten(total) / curved.operator.count, vectors.flatten(curved.product))


# Solvers ------------------------------------------------------------------------------------------------------------

SYSTEMS = [
    (solver, curvature)
    for solver, curvature in itertools.product(SOLVERS, CURVATURES)
    if solver.indefinite or curvature.semidefinite
]


@pytest.mark.parametrize(
    ("solver", "curvature"), SYSTEMS, ids=[f"{type(s.solver).__name__}, {c.name}" for s, c in SYSTEMS]
)
def test_solving_twice_gives_the_same(solver, curvature, tmp_path):
    case = CASES[-1]
    tests, rows = case.rows(2, seed=9), case.rows(SIZE, seed=1)
    first, second = (
        implicit(case, tmp_path, solver=solver.solver, curvature=curvature.name).query(tests) for _ in range(2)
    )
    assert first.certificates == second.certificates
    for q in range(2):
        np.testing.assert_array_equal(first.score(rows).influence(q), second.score(rows).influence(q))


# Queries and scores -------------------------------------------------------------------------------------------------


class Scored:
    """A chain, its query of two test rows, and the scores of one stage's rows."""

    def __init__(self, chain, stage, rows, tests):
        self.chain, self.stage, self.rows, self.tests = chain, stage, rows, tests
        self.query = chain.query(tests)
        self.expected = self.scores(self.rows)
        assert np.abs(self.expected).max() > 0

    def scores(self, rows, query=None, **settings):
        """(rows, columns)"""
        scores = (query or self.query).score(rows, self.stage, **settings)
        return np.stack([scores.influence(q) for q in range(scores.columns)], 1)


# Name → stage of a chain. Chains of the toy model are solved once for both of their stages.
SCORED = {f"{case.name}, {name}": (case, name) for case, name in itertools.product(CASES, DIFFERENTIATIONS)}
SCORED |= {f"{name}, stage {stage}": (name, stage) for name, stage in itertools.product(CHAINS, (0, 1))}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return functools.cache(lambda name: Mixed(CHAINS[name], tmp_path_factory.mktemp("mixed")))


@pytest.fixture(scope="module", params=SCORED.values(), ids=SCORED)
def scored(request, mixed, tmp_path_factory):
    case, stage = request.param
    if case in CHAINS:
        chain = mixed(case)
        return Scored(chain.chain, f"stage{stage}", rows_of(chain.kinds[stage].rows), rows_of(TESTS))
    chain = DIFFERENTIATIONS[stage](case, tmp_path_factory.mktemp("stage"))
    return Scored(chain, "only", case.rows(SIZE, seed=1), case.rows(2, seed=9))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 100])
def test_scores_do_not_depend_on_the_batch_size(scored, size):
    near(scored.scores(scored.rows, batch_size=size), scored.expected)


def test_scores_do_not_depend_on_the_order(scored):
    order = np.random.default_rng(0).permutation(len(scored.rows))
    near(scored.scores([scored.rows[i] for i in order], batch_size=2), scored.expected[order])


def test_scores_do_not_depend_on_padding_partners(scored):
    for i in (0, 3):
        near(scored.scores([scored.rows[i]]), scored.expected[i : i + 1], 1e-9)
        near(scored.scores([scored.rows[i], scored.rows[5]], batch_size=2), scored.expected[[i, 5]], 1e-9)


@pytest.mark.slow
def test_a_column_among_others_is_the_query_of_one(scored):
    for q, test in enumerate(scored.tests):
        single = scored.scores(scored.rows, scored.chain.query([test]))
        near(single[:, 0], scored.expected[:, q], 1e-6)


@pytest.mark.slow
def test_querying_twice_gives_the_same(scored):
    again = scored.chain.query(scored.tests)
    np.testing.assert_array_equal(scored.scores(scored.rows, again), scored.expected)


def test_a_saved_query_scores_the_same(scored, tmp_path):
    scored.query.save_pretrained(tmp_path / "query")
    loaded = Query.from_pretrained(tmp_path / "query", scored.chain)
    np.testing.assert_array_equal(scored.scores(scored.rows, loaded), scored.expected)
    assert loaded.certificates == scored.query.certificates


def test_an_interrupted_scoring_goes_on(scored, tmp_path, monkeypatch):
    """The disk is full after the first part."""
    write, parts = pq.write_table, []

    def full(table, path, **settings):
        if parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        parts.append(path)
        write(table, path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(InputError, match="No space left on device"):
            scored.scores(scored.rows, output_dir=tmp_path, part_rows=3)
    assert parts
    near(scored.scores(scored.rows, output_dir=tmp_path, part_rows=3, resume=True), scored.expected)
