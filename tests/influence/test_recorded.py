"""λ = 1/τ of a recorded run: against gradient descent that is run again, and against dense algebra."""

import numpy as np
import pytest
import torch
from helpers.runs import arguments
from helpers.toy import ToyObjective, dense_gauss_newton, example_losses, toy, toy_rows

from hf_msif import InputError, MultiStageInfluence, Query, Stage, solvers, training, vectors
from hf_msif.solvers import solve
from hf_msif.training.optimisers import SGD, AdamW
from hf_msif.training.recording import Recording
from hf_msif.training.trajectory import Trajectory, of_models

SLOW = 1.2985  # max over x of (1 − e^{−x})(1 + 1/x)


# The approximation itself ------------------------------------------------------------------------------------------


def descended(a, start, rates, slope=0.0):
    """Gradient descent on ½φᵀAφ + slopeᵀφ from `start`."""
    for rate in rates:
        start = start - rate * (a @ start + slope)
    return start


@pytest.mark.parametrize(("step", "bound"), [(0.01, SLOW), (1.0, 2.0)], ids=["small rates", "ησ up to 1"])
@pytest.mark.parametrize("steps", [30, 1000])
def test_one_over_tau_is_near_what_training_again_does(step, bound, steps):
    """A loss that is added with weight ε: φ_T moves by −ε f(A) times its slope."""
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.standard_normal((12, 12)))
    curvatures = np.logspace(-6, 0, 12)
    a = basis * curvatures @ basis.T
    rates = step * generator.uniform(0.2, 1.0, steps)
    slope, start, tau = basis @ np.ones(12), generator.standard_normal(12), rates.sum()
    moved = basis.T @ (descended(a, start, rates, 0.5 * slope) - descended(a, start, rates, -0.5 * slope))
    ratio = -moved * (curvatures + 1 / tau)  # over that of damping, along each eigenvector
    assert ratio.min() > 1 - 1e-9
    assert ratio.max() < bound + 0.01
    if tau > 1:
        assert ratio.max() > 1.2  # the bound is not idle
    if step < 0.1:  # gradient flow: (1 − e^{−τA}) A⁻¹
        np.testing.assert_allclose(-moved, (1 - np.exp(-tau * curvatures)) / curvatures, rtol=step)


RATES = [0.1, 0.3, 0.2, 0.05]


@pytest.mark.parametrize(
    ("optimiser", "expected"),
    [
        (SGD(), sum(RATES)),
        (SGD(momentum=0.5), sum(rate * (1 - 0.5 ** (t + 1)) / 0.5 for t, rate in enumerate(RATES))),
        (
            SGD(momentum=0.5, nesterov=True),
            sum(rate * (1 + 0.5 * (1 - 0.5 ** (t + 1)) / 0.5) for t, rate in enumerate(RATES)),
        ),
        (SGD(weight_decay=0.7), sum(RATES)),
        (AdamW(beta1=0.0, eps=0.25), sum(RATES)),
        (AdamW(beta1=0.8), sum(0.2 / (1 - 0.8**t) * RATES[t - 1] * (1 - 0.8**t) / 0.2 for t in range(1, 5))),
    ],
    ids=str,
)
def test_the_training_time(optimiser, expected):
    run = Trajectory(optimiser, RATES, (), lambda i: None, frozenset(), "here")
    assert run.time() == pytest.approx(expected, rel=1e-12)


# A stage with its run ----------------------------------------------------------------------------------------------

ROWS, TESTS = toy_rows(3, 14), toy_rows(9, 2)


class Trained:
    """The toy model after 40 steps of gradient descent on all rows."""

    def __init__(self, folder, **settings):
        self.model, self.folder = toy(2), folder / "run"
        settings = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", **settings}
        settings = {"num_train_epochs": 40, "per_device_train_batch_size": len(ROWS), "max_grad_norm": 0.0, **settings}
        run = arguments(folder / "trainer", **settings)
        self.run = training.record(self.model, ToyObjective(), ROWS, run, self.folder, progress=False)

    def stage(self, solver, rows=ROWS, **settings):
        settings = {"run": self.folder, "solver": solver, **settings}
        return MultiStageInfluence([Stage("only", self.model, ToyObjective(), rows, **settings)], progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("trained"))


def flat(query):
    """u, (Q, P), on the CPU."""
    return vectors.flatten(query.solutions["only"].tensors()).cpu()


SOLVERS = [
    solvers.Dense(damping="training"),
    solvers.CG(damping="training", tol=1e-10),
    solvers.BlockCG(damping="training", tol=1e-10),
    solvers.Auto(damping="training", tol=1e-10),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_query_is_near_what_the_training_time_resolves(trained, solver):
    solution = flat(trained.stage(solver).query(TESTS))
    names = [n for n, _ in trained.model.named_parameters()]
    values, basis = torch.linalg.eigh(dense_gauss_newton(trained.model, names, ROWS).double())
    values, tau = values.clamp(min=0), 40 * 0.05
    time = -torch.expm1(-tau * values) / values.clamp(min=1e-300)
    time[values == 0] = tau
    model = {n: p.detach().requires_grad_() for n, p in trained.model.named_parameters()}
    losses, _ = example_losses(trained.model, model, [{**row, "example_id": i} for i, row in enumerate(TESTS)])
    for q in range(2):
        slopes = torch.autograd.grad(losses[q], [model[n] for n in names], retain_graph=True)
        a = torch.cat([g.flatten() for g in slopes])
        u = solution[q]
        torch.testing.assert_close(u, basis @ ((basis.T @ a) / (values + 1 / tau)), rtol=1e-7, atol=1e-9)
        exact = basis @ (time * (basis.T @ a))
        assert (exact - u).norm() < (SLOW - 1) * u.norm()
    automatic = flat(trained.stage(solvers.Dense(damping="auto"), run=None).query(TESTS))
    assert (
        exact - automatic[1]
    ).norm() > 2 * exact.norm()  # a thousandth of the largest eigenvalue resolves too much here


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_with_adamw_its_denominators_weigh_the_damping(tmp_path, solver):
    """(H + P⁻¹/τ) u = a, P = 1/(√v̂ + ε), with decoupled weight decay on the diagonal of P⁻¹."""
    settings = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "weight_decay": 0.2, "num_train_epochs": 30}
    adam = Trained(tmp_path, **settings)
    solution = flat(adam.stage(solver).query(TESTS))
    run = Recording.from_pretrained(adam.folder)
    names, rates = [n for n, _ in adam.model.named_parameters()], sum(run.schedule.rates)
    moments = run.state(30)["second_moment"]
    inverse = torch.cat([(moments[n] / (1 - 0.999**30)).sqrt().flatten() + 1e-3 for n in names])
    decays = torch.cat([torch.full((adam.model.get_parameter(n).numel(),), 0.2 * (n in run.decayed)) for n in names])
    matrix = dense_gauss_newton(adam.model, names, ROWS).double() + torch.diag(inverse * (1 / rates + decays.double()))
    model = {n: p.detach().requires_grad_() for n, p in adam.model.named_parameters()}
    losses, _ = example_losses(adam.model, model, [{**row, "example_id": i} for i, row in enumerate(TESTS)])
    for q in range(2):
        slopes = torch.autograd.grad(losses[q], [model[n] for n in names], retain_graph=True)
        expected = torch.linalg.solve(matrix, torch.cat([g.flatten() for g in slopes]))
        torch.testing.assert_close(solution[q], expected, rtol=1e-6, atol=1e-9)


def test_it_is_told(trained, tmp_path):
    chain = trained.stage(SOLVERS[1])
    query = chain.query(TESTS)
    (certificate,) = query.certificate()["stages"].values()
    assert query.certificates["only"].damping == pytest.approx(0.5)
    damping = certificate["training_damping"]
    share = damping["value"] / damping["largest_eigenvalue"]
    assert damping["automatic"] == pytest.approx(1e-3 * damping["largest_eigenvalue"])
    text = f"damping 0.5 = 1/τ, for the training time τ = 2 of 40 steps; {share:.3g} × the largest eigenvalue "
    assert text in certificate["text"]
    assert f"{1e3 * share:.3g} × what damping='auto' takes" in certificate["text"]
    plan = "\n".join(chain.stages[0].differentiation.cost(2).text)
    assert "damping='training' is damping 0.5 = 1/τ" in plan
    query.save_pretrained(tmp_path)
    again = Query.from_pretrained(tmp_path, trained.stage(SOLVERS[1]))
    np.testing.assert_array_equal(again.score(ROWS).influence(1), query.score(ROWS).influence(1))
    # A sweep takes the place of τ.
    swept = chain.stages[0].differentiation.damped(0.1)
    assert swept.solver.damping == 0.1
    assert swept.facts()["training_damping"] is None


def test_a_saved_query_depends_on_the_run(trained, tmp_path):
    trained.stage(SOLVERS[0]).query(TESTS).save_pretrained(tmp_path / "query")
    same_end = Trained(tmp_path, seed=6)  # every step takes all rows, in whatever order
    with pytest.raises(InputError, match="the recorded run differs"):
        Query.from_pretrained(tmp_path / "query", same_end.stage(SOLVERS[0]))
    shorter = Trained(tmp_path / "shorter", num_train_epochs=39)
    shorter.model.load_state_dict(trained.model.state_dict())
    with pytest.raises(InputError, match="differs from the end of the run"):
        shorter.stage(SOLVERS[0])


def test_clipping_is_told(tmp_path):
    query = Trained(tmp_path, num_train_epochs=3, max_grad_norm=0.7).stage(SOLVERS[0]).query(TESTS)
    text = query.certificate()["stages"]["only"]["text"]
    assert "of 3 steps (at most: gradients were clipped at 0.7)" in text


def test_what_no_training_time_is_known_of_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match=r"run is None; expected the folder of a recorded run .*damping='training'"):
        trained.stage(SOLVERS[0], run=None)
    with pytest.raises(InputError, match="None for link='implicit' with another damping"):
        trained.stage(solvers.Dense())
    with pytest.raises(InputError, match="trained on other rows"):
        trained.stage(SOLVERS[0], rows=ROWS[1:])
    with pytest.raises(InputError, match="do not agree on"):
        trained.stage(SOLVERS[0], trainable=["head.*"])
    with pytest.raises(InputError, match=r"weight_decay=0\.3 and alpha=.* expected the run's own"):
        trained.stage(SOLVERS[0], weight_decay=0.3)
    still = of_models([trained.model], [2], [0.0, 0.0], SGD())
    with pytest.raises(InputError, match=r"the learning rates of 1 models sum to 0; expected a run that trained"):
        trained.stage(SOLVERS[0], run=None, checkpoints=still)
    with pytest.raises(InputError, match=r"checkpoints is given, but link is 'implicit'; expected link='segments'"):
        trained.stage(solvers.Dense(), run=None, checkpoints=still)
    with pytest.raises(InputError, match="λ is added to squared eigenvalues"):
        solvers.SquaredCG(damping="training")
    with pytest.raises(InputError, match=r"a solver alone does not know; expected Stage\(solver=..., run=FOLDER\)"):
        solve(Diagonal(), {"w": torch.ones(1, 2)}, solvers.CG(damping="training"))


class Diagonal:
    parameters = {"w": torch.zeros(2)}  # noqa: RUF012

    def matvec(self, v):
        return v
