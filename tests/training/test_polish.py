"""Polishing against scikit-learn, against Newton's method with a dense Hessian, and against the Stage's own
gradient."""

import copy
import warnings

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.toy import ToyObjective, example_losses, minimise, toy, toy_rows
from sklearn.linear_model import LogisticRegression

from hf_msif import InputError, MultiStageInfluence, Stage, training
from hf_msif.models import ConvNetConfig, ConvNetForImageClassification
from hf_msif.objectives import ImageClassification
from hf_msif.training.objective import StageObjective

ROWS, MORE = toy_rows(1, 40), toy_rows(2, 30)
DECAY, ALPHA = 0.05, 0.3
PATTERNS = ["encoder.upper.*", "encoder.gain", "head.*"]


def stage_gradient(models, rows, trainable, alpha):
    """‖∇F‖ of the last stage as `Stage` has it."""
    first = Stage("first", models[0], ToyObjective(), ROWS)
    last = Stage("last", models[1], ToyObjective(), rows, trainable, DECAY, alpha, curvature="hessian")
    return MultiStageInfluence([first, last], progress=False).stage("last").differentiation.gradient_norm


def pair():
    before, after = toy(0), toy(1)
    after.encoder.load_state_dict(before.encoder.state_dict())
    return before, after


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_linear_head_is_scikit_learns_logistic_regression():
    before, after = pair()
    report = training.polish(after, ToyObjective(), MORE, previous=before, trainable="head", weight_decay=DECAY)
    assert report.reached
    assert report.gradient_norm < 1e-8
    batch = ToyObjective().collate(MORE)
    features = before.encoder(batch["x"]).detach().numpy()
    weights = batch["terms"].numpy()
    # F = (1/N) Σ terms ℓ + (λ/2)‖w‖² is scikit-learn's C Σ terms ℓ + ½‖w‖² with C = 1/(N λ); biases free in both.
    expected = LogisticRegression(C=1 / (weights.sum() * DECAY), tol=1e-12, max_iter=10_000)
    expected.fit(features, batch["labels"].numpy(), sample_weight=weights)
    np.testing.assert_allclose(after.head.weight.detach(), expected.coef_, atol=1e-6)
    shift = after.head.bias.detach().numpy() - expected.intercept_  # the softmax sees no common shift
    np.testing.assert_allclose(shift, shift.mean(), atol=1e-6)
    assert values(after)["encoder.lower.weight"].equal(values(before)["encoder.lower.weight"])


CASES = {"all": ("all", ALPHA), "head": ("head", None), "patterns": (PATTERNS, ALPHA)}


@pytest.mark.parametrize(("trainable", "alpha"), CASES.values(), ids=CASES)
def test_what_is_minimised_is_the_f_of_the_stage(trainable, alpha):
    models = pair()
    frozen = values(models[1])
    settings = {"previous": models[0], "trainable": trainable, "weight_decay": DECAY, "alpha": alpha}
    first = training.polish(models[1], ToyObjective(), MORE, **settings)
    assert first.gradient_norm_before > 1e-3
    assert first.gradient_norm < 1e-9
    assert stage_gradient(models, MORE, trainable, alpha) < 1.1e-9
    again = training.polish(models[1], ToyObjective(), MORE, **settings)
    assert again.newton_iterations == again.lbfgs_iterations == again.products == 0
    np.testing.assert_allclose(again.objective, first.objective, rtol=1e-12)
    if trainable != "all":
        held = [n for n in frozen if n not in ("encoder.gain",) and not n.startswith(("encoder.upper", "head"))]
        assert held
        assert all(frozen[n].equal(values(models[1])[n]) for n in held)


@pytest.mark.slow
def test_a_tanh_network_goes_where_dense_newton_goes():
    """From a point in the basin, so that both find the same minimum."""
    model = toy(0)

    def objective(parameters, rows=ROWS):
        sums, counts = example_losses(model, parameters, rows)
        decayed = [p for n, p in parameters.items() if "bias" not in n]
        return sums.sum() / counts.sum() + DECAY / 2 * sum((p**2).sum() for p in decayed)

    training.polish(model, ToyObjective(), ROWS, weight_decay=DECAY)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype)
    start = values(model)
    expected = minimise(objective, start, list(start))
    report = training.polish(model, ToyObjective(), ROWS, weight_decay=DECAY)
    assert report.gradient_norm < 1e-9
    np.testing.assert_allclose(report.objective, float(objective(expected)), rtol=1e-12)
    for name, p in values(model).items():
        if name != "head.bias":
            torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)


def convolutional(weight=None, dense=(4,)):
    """A small network, 40 images whose label is the brightest of three bands, and the objective."""
    torch.manual_seed(0)
    config = ConvNetConfig(image_size=6, channels=[3], dense=dense, num_labels=3)
    model = ConvNetForImageClassification(config).double()
    if weight:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(weight * torch.randn(p.shape, dtype=p.dtype))
    images = np.random.default_rng(0).random((40, 6, 6))
    rows = [{"image": image, "label": int(image.reshape(3, -1).mean(1).argmax())} for image in images]
    return model, rows, ImageClassification(scale=1.0, dtype="float64")


@pytest.mark.slow
@pytest.mark.parametrize("dense_limit", [0, 2048])
def test_a_convolutional_network_from_scratch(dense_limit):
    model, rows, objective = convolutional()
    settings = {"weight_decay": 3e-3, "cg_iter": 2000}
    report = training.polish(model, objective, rows, dense_limit=dense_limit, **settings)
    assert report.reached
    assert report.gradient_norm < 1e-8
    assert report.objective < report.objective_before
    assert (report.preconditioner is not None) == bool(dense_limit)
    assert not report.negative_curvature
    if dense_limit:
        warm = training.polish(model, objective, rows, omit=[7], preconditioner=report.preconditioner, **settings)
        assert warm.reached
        assert warm.products < report.products / 4


def test_a_retraining_nearby_needs_no_product_and_ends_where_newton_ends():
    model, rows, objective = convolutional(dense=())
    settings = {"weight_decay": 0.1}
    base = training.polish(model, objective, rows, factorise=True, **settings)
    quick, slow = copy.deepcopy(model), copy.deepcopy(model)
    settings |= {"omit": [7], "preconditioner": base.preconditioner}
    report = training.polish(quick, objective, rows, **settings)
    newton = training.polish(slow, objective, rows, lbfgs_iter=0, **settings)
    assert report.reached
    assert newton.reached
    assert (report.newton_iterations, report.products, newton.lbfgs_iterations) == (0, 0, 0)
    assert report.evaluations < newton.evaluations + newton.products
    for name, p in values(quick).items():
        if name != "head.0.bias":  # the softmax's common shift is free
            torch.testing.assert_close(p, values(slow)[name], rtol=0, atol=1e-6)


def test_a_retraining_far_away_is_left_to_newton():
    model, rows, objective = convolutional(dense=())
    base = training.polish(model, objective, rows, weight_decay=0.1, factorise=True)
    settings = {"weight_decay": 1e-3, "preconditioner": base.preconditioner}
    report = training.polish(model, objective, rows, **settings)
    assert report.reached
    assert report.newton_iterations > 0
    assert report.objective <= report.objective_before


def test_omission_keeps_n():
    """F without example 5, the losses of the others weighted as before: ε = −1/N of eq. (4)."""
    model, start = toy(0), values(toy(0))
    training.polish(model, ToyObjective(), ROWS, weight_decay=DECAY, omit=[5])
    counts = float(example_losses(model, start, ROWS)[1].sum())
    present = [row for row in ROWS if row["example_id"] != 5]
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    decayed = [p for n, p in parameters.items() if "bias" not in n]
    total = example_losses(model, parameters, present)[0].sum() / counts
    total = total + DECAY / 2 * sum((p**2).sum() for p in decayed)
    gradients = torch.autograd.grad(total, list(parameters.values()))
    assert float(torch.cat([g.flatten() for g in gradients]).norm()) < 1.1e-9


def test_a_saddle_is_left_by_its_negative_curvature():
    """At zero weights and the biases of the class frequencies ∇F vanishes; beside it Newton's plain step leads back
    there."""
    model, rows, objective = convolutional(weight=1e-3, dense=[])
    frequency = torch.bincount(torch.tensor([row["label"] for row in rows]), minlength=3) / len(rows)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name:
                p.zero_()
        model.head[-1].bias.copy_(frequency.log())
    report = training.polish(model, objective, rows, weight_decay=1e-3, lbfgs_iter=0, max_iter=200)
    assert report.gradient_norm_before < 1e-3
    assert report.reached
    assert report.objective < report.objective_before - 0.05
    assert not report.negative_curvature


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("seed", [0, 2, 5, 7])
def test_single_precision(seed, batch_size):
    """Near the end F is rounded more coarsely than a step changes it; the gradients at its ends still tell."""
    model = toy(seed).float()
    report = training.polish(model, _SinglePrecision(), ROWS, weight_decay=DECAY, batch_size=batch_size)
    assert report.tol == 1e-4
    assert report.reached
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 64])
def test_what_single_precision_cannot_reach_is_not_tried_for_long(batch_size):
    """At the floor of rounding any step may seem to help: it ends there, at the least gradient."""
    states, model, at = [], toy(0).float(), StageObjective.at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageObjective, "at", lambda self, point=None: states.append(at(self, point)) or states[-1])
        with pytest.warns(UserWarning, match="not a stationary point"):
            report = training.polish(
                model, _SinglePrecision(), ROWS, weight_decay=DECAY, tol=1e-9, batch_size=batch_size
            )
    assert report.newton_iterations < 30
    assert report.gradient_norm < 1e-5
    assert report.gradient_norm < 2 * min(state.norm for state in states)


class _SinglePrecision(ToyObjective):
    def collate(self, rows):
        return {k: v.float() if v.is_floating_point() else v for k, v in super().collate(rows).items()}


def test_batches_do_not_matter():
    ends = []
    for size in (7, 64):
        before, after = pair()
        settings = {"previous": before, "trainable": PATTERNS, "weight_decay": DECAY, "alpha": ALPHA}
        training.polish(after, ToyObjective(), MORE, batch_size=size, **settings)
        ends.append(values(after))
    for name, p in ends[0].items():
        if name != "head.bias":
            torch.testing.assert_close(p, ends[1][name], rtol=0, atol=1e-7)


def test_what_the_loss_ignores_is_held_constant():
    class Idle(type(toy(0))):
        def __init__(self, config):
            super().__init__(config)
            self.idle = torch.nn.Linear(2, 2)

    model = Idle(toy(0).config).double()
    before = values(model)
    training.polish(model, ToyObjective(), ROWS, weight_decay=DECAY)
    assert values(model)["idle.weight"].equal(before["idle.weight"])


def test_a_missed_tolerance_is_warned_about_and_reported():
    model = toy(0)
    with pytest.warns(UserWarning, match="not a stationary point"):
        report = training.polish(model, ToyObjective(), ROWS, weight_decay=DECAY, lbfgs_iter=2, max_iter=1)
    assert not report.reached
    assert "NOT reached" in str(report)
    assert report.objective < report.objective_before
    assert report.to_dict()["newton_iterations"] == 1


@pytest.mark.slow
def test_rounding_ends_it():
    """A tolerance below rounding is warned about, not pursued for ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = training.polish(toy(0), ToyObjective(), ROWS, weight_decay=DECAY, tol=1e-30)
    assert not report.reached
    assert report.gradient_norm < 1e-13


def test_nothing_changes_on_an_error():
    model = toy(0)
    before = values(model)
    rows = copy.deepcopy(ROWS)
    rows[3]["x"] = [float("nan")] * 3
    with pytest.raises(InputError, match="F is nan"):
        training.polish(model, ToyObjective(), rows)
    assert all(p.equal(before[name]) for name, p in values(model).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"omit": [99]}, "which are no example_id"),
        ({"omit": range(40)}, "every row"),
        ({"previous": toy(0)}, "give alpha"),
    ],
)
def test_messages(settings, message):
    with pytest.raises(InputError, match=message):
        training.polish(toy(1), ToyObjective(), ROWS, **settings)


def test_every_retraining_nearby_arrives():
    """The biases of a softmax have a common shift without curvature, which a preconditioner blows up: its rounding
    must not pass for negative curvature."""
    before, after = pair()
    settings = {"previous": before, "trainable": "head", "weight_decay": 1e-4}
    base = training.polish(after, ToyObjective(), MORE, factorise=True, **settings)
    assert base.preconditioner is not None
    assert abs(base.smallest_ritz) < 1e-12
    for omitted in range(30):
        model = copy.deepcopy(after)
        settings |= {"omit": [omitted], "tol": 1e-12, "preconditioner": base.preconditioner}
        report = training.polish(model, ToyObjective(), MORE, **settings)
        assert report.reached
        assert not report.negative_curvature


def test_a_hessian_that_has_vanished_with_the_losses_is_written_out():
    """Separable classes and no decay: what is left of the Hessian is rounding, and need not be symmetric."""
    model, tweets = tiny.model("bert", "classification"), tiny.rows(6, seed=2)
    report = training.polish(
        model, tiny.objective("classification"), tweets, trainable=["bert.pooler.*", "classifier.*"], factorise=True
    )
    assert report.objective < 1e-6
    assert report.smallest_ritz is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_iter": -1}, "stage 'stage': max_iter is -1; expected at least 0"),
        ({"lbfgs_iter": -1}, "lbfgs_iter is -1"),
        ({"cg_iter": -1}, "cg_iter is -1"),
        ({"dense_limit": -1}, "dense_limit is -1"),
        ({"tol": 0.0}, "tol is 0.0; expected a positive number"),
        ({"max_iter": 0, "lbfgs_iter": 0}, "max_iter is 0 and .*lbfgs_iter is 0; expected at least 1 for one of them"),
    ],
)
def test_limits_under_which_nothing_is_polished(settings, message):
    with pytest.raises(InputError, match=message):
        training.polish(toy(0), ToyObjective(), ROWS, **settings)
