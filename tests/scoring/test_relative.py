"""Relative influence: norms against autograd, self-influence against dense algebra, orders by brute force."""

import warnings

import numpy as np
import pytest
import torch
from cases import CASES, SIZE, unrolled
from helpers import tiny
from helpers.scorables import scorable
from test_layerwise import ARCHITECTURES, SINGLE, Odd, Sums, odd_rows

from hf_msif import InputError, MultiStageInfluence, Scores, Stage, solvers, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature import EKFAC
from hf_msif.curvature.derivatives import Evaluation, example_gradients, parameters_in_use
from hf_msif.curvature.layers import UnclearRowsError
from hf_msif.curvature.norms import Metric
from hf_msif.engine import Engine
from hf_msif.influence import Direction
from hf_msif.influence.differentiation import DirectCertificate
from hf_msif.scoring import extremes
from hf_msif.scoring.layerwise import Layerwise
from hf_msif.scoring.orders import columns_of
from hf_msif.scoring.scorable import RowInfluence
from hf_msif.scoring.scorer import score
from hf_msif.scoring.shortlist import shortlist

DAMPING = 0.1
RELATIVE = ("relative", "self_relative")


def gap(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


class Sized:
    """The norms of some rows' gradients, layer by layer, and by a backward pass per row."""

    def __init__(self, network, objective, rows, columns=2, fit=False):
        self.model, self.objective, self.rows = FunctionalModel(network), objective, rows
        names = parameters_in_use(self.model, objective, rows, self.model.parameters)
        self.u = tiny.block({name: self.model.parameters[name] for name in names}, columns, 0)
        metric = None
        if fit:
            fit = EKFAC(self.model, objective, rows, names, Engine(progress=False), 3)
            metric = Metric(fit, lambda eigenvalues: 1 / (eigenvalues + DAMPING))
        self.scorer = Layerwise(self.model, objective, self.u, rows, metric)
        batch = objective.collate(rows)
        with self.model.evaluating():
            slopes, _, _, self.norms = self.scorer.slopes(batch, len(rows), norms=True)
            gradients = example_gradients(Evaluation(self.model, objective, batch), names)
        self.true = vectors.norm(gradients)
        # What is asked beside the influence does not change it.
        expected = torch.stack([vectors.dot(gradients, repeated(self.u, q, len(rows))) for q in range(columns)], 1)
        assert gap(slopes, expected) < 1e-4
        self.square = None if metric is None else vectors.dot(gradients, metric.fit.inverse(gradients, DAMPING))

    @property
    def error(self):
        return gap(self.norms[:, 0], self.true)


def repeated(u, q, size):
    return {name: t[q].expand(size, *t.shape[1:]) for name, t in u.items()}


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_norms_are_those_of_every_objectives_gradients(case, columns):
    assert Sized(case.model(), case.objective(), case.rows(7), columns).error < 1e-10


@pytest.mark.parametrize(("name", "task"), ARCHITECTURES)
def test_norms_are_those_of_every_architectures_gradients(name, task):
    sized = Sized(tiny.model(name, task, layers=2), tiny.objective(task), tiny.rows(9))
    assert sized.error < SINGLE.get(name, 1e-10)


def test_a_tied_table_is_one_gradient():
    """The squares of what the table and the output layer make differ from the square of their sum."""
    sized = Sized(tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(7))
    assert "bert.embeddings.word_embeddings.weight" in sized.scorer.norms.shared
    sized.scorer.norms.shared.clear()
    with sized.model.evaluating():
        apart = sized.scorer.slopes(sized.objective.collate(sized.rows), 7, norms=True)[3]
    assert gap(apart[:, 0], sized.true) > 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"draws": 3}, {"reduction": "example"}, {"masks": "folds", "draws": 4, "mask_probability": 0.25}],
    ids=str,
)
def test_ragged_masks_and_an_empty_row(settings):
    rows = [*tiny.rows(8), {"example_id": 8, "text": "", "label": 0}]
    sized = Sized(tiny.model("bert", "masked"), tiny.objective("masked", **settings), rows)
    assert sized.error < 1e-10
    assert sized.norms[8, 0] == 0


def test_rows_in_another_order_and_parameters_without_a_layer():
    torch.manual_seed(0)
    network = Odd()
    model = FunctionalModel(network)
    names = parameters_in_use(model, Sums(), odd_rows(), model.parameters)
    scorer = Layerwise(model, Sums(), tiny.block({n: model.parameters[n] for n in names}, 2, 0), odd_rows())
    batch = Sums().collate(odd_rows())
    with model.evaluating():
        norms = scorer.slopes(batch, 6, norms=True)[3]
        true = vectors.norm(example_gradients(Evaluation(model, Sums(), batch), names))
    assert scorer.rest
    assert scorer.layers.probes
    assert gap(norms[:, 0], true) < 1e-10


def test_a_batch_whose_rows_are_not_told_apart_takes_backward_passes(monkeypatch):
    sized = Sized(tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(7), fit=True)
    direction = Direction(
        sized.model,
        sized.objective,
        sized.u,
        DirectCertificate("given", 2),
        lambda: sized.rows,
        norms=True,
        metric=Metric(sized.scorer.norms.metric.fit, lambda eigenvalues: 1 / (eigenvalues + DAMPING)),
    )

    def unclear(*args):
        raise UnclearRowsError("not told apart")

    batch = sized.objective.collate(sized.rows)
    with sized.model.evaluating():
        expected = direction.influence(batch, sized.rows)
        monkeypatch.setattr(Layerwise, "slopes", unclear)
        found = direction.influence(batch, sized.rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# Self-influence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_self_influence_is_the_gradients_product_with_the_inverse(case):
    sized = Sized(case.model(), case.objective(), case.rows(7), fit=True)
    assert sized.error < 1e-10
    assert gap(sized.norms[:, 1], sized.square) < 1e-10
    assert sized.square.max() > 0


@pytest.fixture(scope="module")
def chain():
    before = tiny.model("bert", "masked")
    after = tiny.finetuned(before, "bert")
    return tiny.chain(before, after, 1e-10, (tiny.rows(9, seed=1), tiny.rows(6, seed=2)), {"curvature": "ekfac"})


@pytest.fixture(scope="module")
def query(chain):
    return chain.query(tiny.rows(3, seed=3))


@pytest.fixture(scope="module")
def full(query):
    return query.score(ROWS, norms="self")


ROWS = tiny.rows(23, seed=4)


def test_exact_self_influence_is_that_of_dense_algebra(chain):
    """The classifier's head: its Gauss-Newton matrix by plain autograd, factorised."""
    bound, rows = chain.stage("fine"), tiny.rows(5, seed=6)
    names = list(bound.split.trained)
    collate, model = tiny.objective("classification").collate, bound.stage.model
    data = tiny.rows(6, seed=2)
    dense = tiny.dense_gauss_newton(tiny.Plain(model, "classification", collate(data)), names) / len(data)
    expected = []
    for row in rows:
        gradient = tiny.Plain(model, "classification", collate([row])).gradient(names)
        g = torch.cat([gradient[name].flatten() for name in names])
        expected.append(float(g @ torch.linalg.solve(dense + 0.5 * torch.eye(len(g)), g)))
    found = chain.self_influence(rows, "fine", columns=2)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_column_is_exact_where_the_curvature_is_ekfac(chain, full):
    np.testing.assert_allclose(full.frame.self_influence, chain.self_influence(ROWS), rtol=1e-9)


def test_self_influence_in_one_pass(chain, full):
    """As the column, without a query; of the later stage, too."""
    np.testing.assert_allclose(chain.self_influence(ROWS, approximate=True), full.frame.self_influence, rtol=1e-9)
    rows = tiny.rows(6, seed=2)
    found = chain.self_influence(rows, "fine", approximate=True)
    expected = chain.query(tiny.rows(1, seed=3)).score(rows, "fine", norms="self").frame.self_influence
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("solver", "inverse"),
    [
        (solvers.CG(damping=0.3), lambda a: 1 / (a + 0.3)),
        (solvers.SquaredCG(damping=0.3), lambda a: a / (a**2 + 0.3)),
        (solvers.Identity(), torch.ones_like),
    ],
    ids=["cg", "squared", "identity"],
)
def test_the_inverse_is_that_of_the_stages_system(solver, inverse):
    case = CASES[-1]
    stage = Stage("only", case.model(), case.objective(), case.rows(SIZE, seed=1), solver=solver)
    chain, rows = MultiStageInfluence([stage], progress=False), case.rows(5, seed=2)
    found = chain.query(case.rows(1, seed=9)).score(rows, norms="self").frame
    bound = chain.stage("only")
    fit = EKFAC.of(bound.differentiation.operator)
    with bound.model.evaluating():
        evaluation = Evaluation(bound.model, bound.objective, bound.objective.collate(rows))
        gradients = example_gradients(evaluation, bound.split.trained)
    expected = vectors.dot(gradients, fit.function(gradients, inverse))
    np.testing.assert_allclose(found.self_influence, expected, rtol=1e-9)


def test_a_singular_matrix_without_damping_is_refused():
    case = CASES[-1]
    stage = Stage("only", case.model(), case.objective(), case.rows(SIZE, seed=1), solver=solvers.MinRes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        query = MultiStageInfluence([stage], progress=False).query(case.rows(1, seed=9))
    with pytest.raises(InputError, match=r"the smallest eigenvalue of EK-FAC is .* give a damping above 0"):
        query.score(case.rows(3), norms="self")


# Orders --------------------------------------------------------------------------------------------------------------


def test_orders_are_those_of_brute_force(query, full):
    bound = query.chain.stage("pre")
    u = query.solutions["pre"].tensors()
    values = {by: np.zeros((len(ROWS), 3)) for by in RELATIVE}
    with bound.model.evaluating():
        for i, row in enumerate(ROWS):
            evaluation = Evaluation(bound.model, bound.objective, bound.objective.collate([row]))
            g = example_gradients(evaluation, bound.split.trained)
            size = float(vectors.norm(g))
            own = float(vectors.dot(g, bound.differentiation.operator.inverse(g, 0.5)))
            for q in range(3):
                influence = -float(vectors.dot(vectors.take(u, torch.tensor([q])), g))
                values["relative"][i, q] = influence / size
                values["self_relative"][i, q] = influence / own**0.5
    for by in RELATIVE:
        for q in range(3):
            np.testing.assert_allclose(full.relative(q, by), values[by][:, q], rtol=1e-8)
            order = np.argsort(-abs(values[by][:, q]))
            top = full.top(5, by, q)
            assert top.example_id.tolist() == order[:5].tolist()
            np.testing.assert_allclose(top[f"{by}_influence"], values[by][order[:5], q], rtol=1e-8)
            assert full.bottom(4, by, q).example_id.tolist() == order[::-1][:4].tolist()


def test_one_column_has_the_norms_of_several(chain, full):
    single = chain.query(tiny.rows(1, seed=3)).score(ROWS, norms="gradient", batch_size=4)
    np.testing.assert_allclose(single.frame.gradient_norm, full.frame.gradient_norm, rtol=1e-10)
    assert "self_influence" not in single.frame
    np.testing.assert_allclose(single.influence(), full.influence(0), rtol=1e-7)


def test_scores_without_norms_say_how_to_have_them(query):
    scores = query.score(ROWS)
    assert not {"gradient_norm", "self_influence"} & set(scores.frame)
    with pytest.raises(InputError, match=r"no column gradient_norm; expected scores .* norms='gradient'"):
        scores.top(by="relative")
    with pytest.raises(InputError, match=r"no column self_influence; expected scores .* norms='self'"):
        scores.relative(by="self_relative")
    with pytest.raises(InputError, match="by is 'harmful'; expected one of"):
        scores.relative(by="harmful")


def test_what_has_no_gradients_is_refused(query, tmp_path):
    with pytest.raises(InputError, match=r"norms is 'all'; expected one of \['gradient', 'self'\]"):
        query.score(ROWS, norms="all")
    with pytest.raises(InputError, match="method is 'forward', which makes no gradients"):
        query.score(ROWS, method="forward", norms="gradient")
    case = CASES[-1]
    run = unrolled(case, tmp_path)
    with pytest.raises(InputError, match=r"link='unrolled': its influence is a sum over a run's steps"):
        run.query(case.rows(1, seed=9)).score(case.rows(SIZE, seed=1), norms="gradient")
    with pytest.raises(InputError, match="link='unrolled', without a linear system"):
        run.self_influence(case.rows(2))


def test_a_row_without_gradient_is_last():
    rows = [{"example_id": i, "text": str(i)} for i in range(3)]
    norms = {"gradient_norm": [0.0, 2.0, 4.0], "self_influence": [0.0, 4.0, 64.0]}
    scores = Scores.build(rows, np.array([[0.0], [-3.0], [8.0]]), 1.0, norms, {})
    assert scores.relative().tolist() == [0.0, -1.5, 2.0]
    assert scores.relative(by="self_relative").tolist() == [0.0, -1.5, 1.0]
    assert scores.top(3, "relative").example_id.tolist() == [2, 1, 0]
    assert scores.top(3, "self_relative").self_relative_influence.tolist() == [-1.5, 1.0, 0.0]


# Sinks ---------------------------------------------------------------------------------------------------------------


def check_ends(found, full, keep):
    for q in range(full.columns):
        for by in ("absolute", "harmful", "helpful", *RELATIVE):
            for end in ("top", "bottom"):
                one, other = (getattr(scores, end)(keep, by, q) for scores in (found, full))
                assert one.example_id.tolist() == other.example_id.tolist(), (by, end)
                np.testing.assert_allclose(one.gradient_norm, other.gradient_norm, rtol=1e-10)


@pytest.mark.parametrize("on_disk", [False, True])
def test_extremes_of_the_relative_orders_are_kept(query, full, tmp_path, on_disk):
    settings = {"output_dir": tmp_path, "part_rows": 5} if on_disk else {}
    found = query.score(ROWS, keep=2, norms="self", batch_size=3, **settings)
    check_ends(found, full, 2)
    assert len(found) < len(ROWS)


@pytest.mark.parametrize("keep", [None, 2])
def test_a_scoring_with_norms_is_resumed(query, full, tmp_path, monkeypatch, keep):
    monkeypatch.setattr(extremes.ExtremesOnDisk, "SAVE_EVERY", 0.0)
    calls, solution = [], type(query.solutions["pre"])
    inside = solution.influence

    def interrupt(self, batch, rows):
        calls.append(1)
        if len(calls) > 18:
            raise KeyboardInterrupt
        return inside(self, batch, rows)

    settings = {"output_dir": tmp_path, "part_rows": 5, "keep": keep}
    with monkeypatch.context() as patch:
        patch.setattr(solution, "influence", interrupt)
        with pytest.raises(KeyboardInterrupt):
            query.score(ROWS, norms="self", batch_size=1, **settings)
    with pytest.raises(InputError, match="norms changed since the scoring"):
        query.score(ROWS, norms="gradient", resume=True, **settings)
    found = query.score(ROWS, norms="self", resume=True, **settings)
    if keep is None:
        for column in ("gradient_norm", "self_influence"):
            np.testing.assert_allclose(found.frame[column], full.frame[column], rtol=1e-10)
    check_ends(found, full, 2)


def test_a_shortlist_has_the_first_rows_of_the_relative_orders(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(size=700)
    rows = [{"example_id": i, "text": str(i), "x": float(x)} for i, x in enumerate(sizes * rng.standard_t(3, 700))]

    def influence(batch, rows):
        x = batch["x"].double()
        if torch.is_autocast_enabled("cpu"):
            x = x * (1 + 0.01 * torch.sin(1e4 * x))
        size = torch.tensor([sizes[row["example_id"]] for row in rows])
        return RowInfluence(torch.stack([x, -(x**3)], 1), x, torch.ones_like(x), norms=torch.stack([size, size**3], 1))

    settings = {
        "influence": influence,
        "identity": lambda: {},
        "batch_size": 64,
        "norms": columns_of("self"),
    }
    exact = score(scorable(**settings), rows)
    found = shortlist(scorable(**settings), rows, 5, "bfloat16", output_dir=tmp_path)
    for by in ("absolute", *RELATIVE):
        for q in (0, 1):
            columns = ["example_id", "influence", "gradient_norm", "self_influence"]
            assert found.top(5, by, q)[columns].equals(exact.top(5, by, q)[columns])
    assert found.metadata["shortlist"]["recall"] == 1
    with pytest.raises(InputError, match="does not seek the rows of least absolute"):
        found.bottom(1, "relative")


# Common rows ---------------------------------------------------------------------------------------------------------


def test_rows_that_lead_nearly_all_lists_are_common():
    rows = [{"example_id": f"id{i}", "text": str(i)} for i in range(6)]
    influence = np.zeros((6, 5))
    influence[0] = 9.0  # in all lists
    influence[1] = [8, -8, 8, 8, 0]  # in four of five
    influence[2] = [0, 0, 0, 0, 8]
    norms = {"gradient_norm": [100.0, 1.0, 1.0, 1.0, 1.0, 1.0]}
    scores = Scores.build(rows, influence, 1.0, norms, {})
    assert scores.common(2).to_numpy().tolist() == [["id0", 5, "0"], ["id1", 4, "1"]]
    assert scores.common(2, share=1.0).example_id.tolist() == ["id0"]
    assert scores.common(1, "relative").example_id.tolist() == ["id1"]
    assert scores.common(1, "helpful").columns.tolist() == ["example_id", "columns", "text"]
    with pytest.raises(InputError, match=r"share is 0; expected a share"):
        scores.common(share=0)
    with pytest.raises(InputError, match="these scores have one query column; expected several"):
        Scores.build(rows, influence[:, :1], 1.0, {}, {}).common()
