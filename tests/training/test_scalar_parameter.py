"""An inherited parameter without axes (a temperature, CLIP's `logit_scale`) that the next stage trains with α."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.toy import ToyBase, ToyModel, ToyObjective, example_losses, toy, toy_rows
from transformers import TrainingArguments

from hf_msif import MultiStageInfluence, Stage, solvers, training, validation

pytestmark = pytest.mark.slow  # polishes and retrains

DECAY, ALPHA = 0.02, 0.3


def learnable(rows):
    """Rows whose label is the place of their largest input: noise alone would leave a minimum at zero weights."""
    return [{**row, "label": max(range(3), key=row["x"].__getitem__)} for row in rows]


ROWS, MORE, TESTS = learnable(toy_rows(1, 400)), learnable(toy_rows(2, 12)), learnable(toy_rows(3, 2))


class ScaledBase(ToyBase):
    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        return super().forward(x) * self.temperature.exp()


class ScaledModel(ToyModel):
    encoder_class = ScaledBase


@pytest.fixture
def pair():
    before, after = toy(0, ScaledModel), toy(1, ScaledModel)
    training.polish(before, ToyObjective(), ROWS, weight_decay=DECAY)
    after.encoder.load_state_dict(before.encoder.state_dict())
    return before, after


def arguments(folder, **settings):
    settings = {"learning_rate": 0.02, "per_device_train_batch_size": 4, "seed": 1, **settings}
    return TrainingArguments(str(folder), report_to=[], save_strategy="no", **settings)


def objective_f(after, before, rows):
    """F of the finetuning stage, written out: mean loss, weight decay on all but biases and `shift`, α on the encoder.

    (By the rule of `Trainer` the names decide what decays: a temperature does.)
    """
    decayed = [n for n, _ in after.named_parameters() if "bias" not in n]

    def f(parameters):
        sums, counts = example_losses(after, parameters, rows)
        value = sums.sum() / counts.sum() + DECAY / 2 * sum((parameters[n] ** 2).sum() for n in decayed)
        anchors = before.state_dict()
        return value + ALPHA * sum(((p - anchors[n]) ** 2).sum() for n, p in parameters.items() if "encoder" in n)

    return f


def test_polish_ends_where_the_written_out_f_is_stationary(pair):
    before, after = pair
    report = training.polish(after, ToyObjective(), MORE, previous=before, weight_decay=DECAY, alpha=ALPHA)
    assert report.reached
    value = objective_f(after, before, MORE)(dict(after.named_parameters()))
    assert abs(float(value.detach()) - report.objective) < 1e-12
    slopes = torch.autograd.grad(value, list(after.parameters()))
    assert max(float(g.norm()) for g in slopes) < 1e-8


def test_training_takes_the_step_of_the_written_out_f(pair, tmp_path):
    before, after = pair
    value = objective_f(after, before, MORE)(dict(after.named_parameters()))
    expected = dict(
        zip(dict(after.named_parameters()), torch.autograd.grad(value, list(after.parameters())), strict=True)
    )
    start = {n: p.detach().clone() for n, p in after.named_parameters()}
    settings = {"previous": before, "weight_decay": DECAY, "alpha": ALPHA, "progress": False}
    one_step = {"max_steps": 1, "optim": "sgd", "per_device_train_batch_size": len(MORE), "max_grad_norm": 0.0}
    training.train(after, ToyObjective(), MORE, arguments(tmp_path, **one_step), **settings)
    for name, p in after.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] - 0.02 * expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_removal_is_predicted_through_minimum_and_run(pair, tmp_path):
    """The implicit and the unrolled pull-back against retraining both stages with a row weighted up and down."""
    before, after = pair
    unrolled = copy.deepcopy(after)
    settings = {"previous": before, "weight_decay": DECAY, "alpha": ALPHA}
    training.polish(after, ToyObjective(), MORE, **settings)
    run = arguments(tmp_path, max_steps=10, max_grad_norm=0.0)
    training.record(unrolled, ToyObjective(), MORE, run, tmp_path / "run", progress=False, **settings)
    first = Stage("first", before, ToyObjective(), ROWS, weight_decay=DECAY)
    first = replace(first, curvature="hessian", solver=solvers.Dense())
    last = Stage("last", after, ToyObjective(), MORE, weight_decay=DECAY, alpha=ALPHA)
    last = replace(last, curvature="hessian", solver=solvers.Dense())
    through_run = {"model": unrolled, "link": "unrolled", "run": tmp_path / "run"}
    through_run = replace(last, **through_run)
    for stages in ([first, last], [first, through_run]):
        influence = MultiStageInfluence(stages, progress=False).query(TESTS).score(ROWS).removal_effects()
        retrain = validation.WarmStart(stages, TESTS)
        bank = validation.Bank(retrain, progress=False)
        measured = bank.effects([[row["example_id"]] for row in ROWS[:12]])
        # The median: the removal of single rows moves far along soft directions, beyond first order.
        error = np.abs(influence[:12] / measured - 1)
        assert np.median(error) < 0.05
