"""The pull-back against re-solving the whole chain with perturbed example weights."""

import pytest
import torch
from helpers.chains import SIZES, Chain
from helpers.toy import ToyObjective, decayed, example_losses, minimise, toy, toy_rows

from hf_msif import MultiStageInfluence, Stage, solvers


@pytest.fixture(scope="module")
def chain():
    return Chain()


@pytest.fixture(scope="module")
def query(chain):
    return MultiStageInfluence(chain.stages(), progress=False).query(chain.tests)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_influence_equals_resolving_the_chain(chain, query, stage):
    scores = query.score(chain.rows[stage], stage=f"stage{stage}")
    step = 1e-4
    for index in (0, 3, 7):
        up, down = (chain.test_losses(chain.solve((stage, index, sign * step))) for sign in (1, -1))
        expected = (up - down) / (2 * step)
        found = torch.tensor([scores.influence(q)[index] for q in range(2)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_roles(chain):
    split = MultiStageInfluence(chain.stages(), progress=False).stage("stage1").split
    assert set(split.frozen) == {"encoder.lower.weight", "encoder.lower.bias", "encoder.shift"}
    assert set(split.proximal) == {"encoder.upper.weight", "encoder.upper.bias", "encoder.gain"}
    assert split.head == ("head.weight", "head.bias")


@pytest.mark.parametrize(
    "solver", [solvers.MinRes(tol=1e-10, max_iter=500), solvers.CG(damping=0.0, tol=1e-10, max_iter=500)]
)
def test_krylov_solvers_give_the_dense_answer(chain, query, solver):
    found = MultiStageInfluence(chain.stages(solver=solver), progress=False).query(chain.tests)
    for stage, u in query.solutions.items():
        for name, t in u.tensors().items():
            torch.testing.assert_close(found.solutions[stage].tensors()[name], t, rtol=1e-6, atol=1e-8)
    assert all(c.converged == [True, True] for c in found.certificates.values())


def test_every_test_costs_one_forward_pass_and_one_backward_pass(chain, monkeypatch):
    """A column is the plain gradient of its row, also where it has another place among the rows."""
    msif = MultiStageInfluence(chain.stages(), progress=False)
    rows, last = toy_rows(10, 5), msif.stages[-1]
    names, model, grad, passes = (*last.split.trained, *last.split.frozen), last.stage.model, torch.autograd.grad, []
    hook = model.register_forward_hook(lambda *_: passes.append("forward"))
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: passes.append("backward") or grad(*args, **kw))
    adjoint, losses = msif.measurement(rows)
    hook.remove()
    monkeypatch.undo()
    assert passes == ["forward", "backward"] * len(rows)
    turned, turned_losses = msif.measurement(rows[::-1])
    assert turned_losses == losses[::-1]
    for name, t in turned.items():
        assert torch.equal(t.flip(0), adjoint[name])
    sums = example_losses(model, {n: model.get_parameter(n) for n in names}, rows)[0]
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), sums.detach(), rtol=1e-13, atol=0)
    for q, loss in enumerate(sums):
        gradients = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], retain_graph=True)
        for name, g in zip(names, gradients, strict=True):
            torch.testing.assert_close(adjoint[name][q], g, rtol=1e-12, atol=1e-14)


def test_a_group_is_the_sum_of_its_members(chain, query):
    msif = MultiStageInfluence(chain.stages(), progress=False)
    single = query.score(chain.rows[0])
    for aggregate, share in (("sum", 1.0), ("mean", 0.5)):
        group = msif.query(chain.tests, aggregate=aggregate).score(chain.rows[0])
        expected = share * (single.influence(0) + single.influence(1))
        torch.testing.assert_close(torch.tensor(group.influence()), torch.tensor(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_removal_effect_predicts_removal(chain, query):
    """First order in 1/N: the sign and most of the size; N stays the full count, as when ε = −1/N."""
    scores = query.score(chain.rows[0])
    count = float(example_losses(chain.models[0], chain.optima[0], chain.rows[0])[1].sum())
    before = chain.test_losses(chain.optima)
    predicted, actual = [], []
    for index in range(0, SIZES[0], 3):
        predicted.append(scores.frame["removal_effect_0"][index])
        actual.append(float((chain.test_losses(chain.solve((0, index, -1 / count))) - before)[0]))
    assert torch.corrcoef(torch.tensor([predicted, actual]))[0, 1] > 0.97


@pytest.mark.slow
def test_sign_a_mislabelled_example_is_harmful():
    """One stage, separable classes, one wrong label: it alone raises the loss of a correctly labelled neighbour."""
    rows = toy_rows(5, 30)
    for row in rows:
        row["label"] = int(row["x"][0] > 0)
    wrong = max(rows, key=lambda row: abs(row["x"][0]))
    test = {**wrong, "example_id": 99}
    wrong["label"] = 1 - wrong["label"]
    model = toy(3, classes=2)

    def objective(parameters):
        sums, counts = example_losses(model, parameters, rows)
        return sums.sum() / counts.sum() + 0.005 * sum((p**2).sum() for n, p in parameters.items() if decayed(n))

    start = {n: p.detach() for n, p in model.named_parameters()}
    model.load_state_dict(minimise(objective, start, list(start)), strict=False)
    stage = Stage("only", model, ToyObjective(), rows, weight_decay=0.01, curvature="hessian", solver=solvers.Dense())
    top = MultiStageInfluence([stage], progress=False).query([test]).score(rows).top(1, by="harmful")
    assert top.example_id[0] == wrong["example_id"]
    assert top.influence[0] > 0
    assert top.removal_effect[0] < 0
