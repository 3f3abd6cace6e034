"""scikit-learn's solvers for linear heads: against our Newton-CG, and against the dense gradient of F."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.project import image_project, msif
from helpers.toy import ToyObjective, example_losses, toy, toy_rows

from hf_msif import InputError, training
from hf_msif.models import ConvNetConfig, ConvNetForImageClassification, FeedForwardClassifier
from hf_msif.objectives import ImageClassification
from hf_msif.project import build, config

ROWS, DECAY = toy_rows(2, 30), 0.05


def pair(classes=3):
    before, after = toy(0), toy(1, classes=classes)
    after.encoder.load_state_dict(before.encoder.state_dict())
    return before, after


def gradient_norm(model, rows, omit, decay):
    """‖∇F‖ in the head by plain autograd: losses that the test files know, N of all rows."""
    parameters = {n: p.detach().requires_grad_(n.startswith("head.")) for n, p in model.named_parameters()}
    present = [row for row in rows if row["example_id"] not in omit]
    counts = example_losses(model, parameters, rows)[1].sum()
    total = example_losses(model, parameters, present)[0].sum() / counts
    total = total + decay / 2 * (parameters["head.weight"] ** 2).sum()
    head = [p for p in parameters.values() if p.requires_grad]
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(total, head)]).norm())


CASES = {
    "three classes": (3, {}, DECAY, "newton-cholesky"),
    "two classes": (2, {}, DECAY, "newton-cholesky"),
    "rows left out": (3, {"omit": [3, 8]}, DECAY, "newton-cholesky"),
    "two classes, rows left out": (2, {"omit": [3, 8]}, 0.01, "newton-cholesky"),
    "no decay": (2, {}, 0.0, "newton-cholesky"),
    "no decay, three classes": (3, {}, 0.0, "newton-cholesky"),
    "large": (3, {"dense_limit": 0}, DECAY, "newton-cg"),
    "batches": (3, {"batch_size": 7}, DECAY, "newton-cholesky"),
}


@pytest.mark.parametrize(("classes", "settings", "decay", "solver"), CASES.values(), ids=CASES)
def test_it_finds_the_minimum_of_newton_cg_and_reports_the_true_gradient(classes, settings, decay, solver):
    before, after = pair(classes)
    rows = toy_rows(2, 30, classes)
    settings = {"previous": before, "trainable": "head", "weight_decay": decay, **settings}
    newton, start = copy.deepcopy(after), copy.deepcopy(after)
    expected = training.polish(newton, ToyObjective(), rows, **settings)
    report = training.polish(after, ToyObjective(), rows, method="sklearn", **settings)
    assert expected.solver is None
    assert report.solver == solver
    assert report.reached
    true = gradient_norm(after, rows, settings.get("omit", ()), decay)
    assert abs(true - report.gradient_norm) < 1e-15
    assert true < 1e-9
    assert gradient_norm(start, rows, settings.get("omit", ()), decay) == pytest.approx(report.gradient_norm_before)
    np.testing.assert_allclose(report.objective, expected.objective, rtol=1e-12)
    for name, p in newton.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), p, rtol=0, atol=1e-6, msg=name)


def test_a_term_a_token():
    """A causal LM with an output layer of its own, without bias: 20 classes, some without a token, omitted rows."""
    torch.manual_seed(0)
    model = tiny.model("gpt2", "causal", tie_word_embeddings=False)
    rows = tiny.rows(12)
    settings = {"trainable": ["lm_head.weight"], "weight_decay": 0.01, "omit": [2, 5]}
    newton = copy.deepcopy(model)
    training.polish(newton, tiny.objective("causal"), rows, **settings)
    report = training.polish(model, tiny.objective("causal"), rows, method="sklearn", **settings)
    assert report.reached
    assert "scikit-learn's newton-cholesky" in str(report)
    torch.testing.assert_close(model.lm_head.weight, newton.lm_head.weight, rtol=0, atol=1e-6)


def test_a_class_without_a_row():
    before, after = pair()
    rows = [row for row in ROWS if row["label"] != 1]
    settings = {"previous": before, "trainable": ["head.weight", "head.bias"], "weight_decay": DECAY}
    newton = copy.deepcopy(after)
    report = training.polish(after, ToyObjective(), rows, method="sklearn", tol=1e-6, **settings)
    training.polish(newton, ToyObjective(), rows, tol=1e-6, **settings)
    # Its bias goes on to −∞; everything else is determined.
    assert report.reached
    assert after.head.bias[1] < after.head.bias[0] - 8
    torch.testing.assert_close(after.head.weight, newton.head.weight, rtol=0, atol=1e-3)


def test_single_precision_is_written_back_as_such():
    before, after = (model.float() for model in pair())

    class Single(ToyObjective):
        def collate(self, rows):
            return {k: v.float() if v.is_floating_point() else v for k, v in super().collate(rows).items()}

    settings = {"previous": before, "trainable": "head", "weight_decay": DECAY, "method": "sklearn"}
    report = training.polish(after, Single(), ROWS, **settings)
    assert report.reached
    assert report.gradient_norm < 1e-6
    assert after.head.weight.dtype == torch.float32


def test_a_preconditioner_for_retrainings_nearby_comes_with_it():
    before, after = pair()
    settings = {"previous": before, "trainable": "head", "weight_decay": DECAY}
    report = training.polish(after, ToyObjective(), ROWS, method="sklearn", factorise=True, **settings)
    near = training.polish(after, ToyObjective(), ROWS, omit=[4], preconditioner=report.preconditioner, **settings)
    assert near.reached
    assert near.products == 0


# What is refused ----------------------------------------------------------------------------------------------------


class Smoothed(ToyObjective):
    def losses(self, call, batch):
        logits = call(x=batch["x"]).logits
        smooth = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=0.1)
        return smooth * batch["terms"], batch["terms"]


class Squared(ToyObjective):
    """Looks like a cross-entropy at zero logits alone."""

    def losses(self, call, batch):
        sums, counts = super().losses(call, batch)
        return sums + 0.1 * (call(x=batch["x"]).logits ** 2).sum(1), counts


def refused(model, objective=None, rows=ROWS, **settings):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError) as error:
        training.polish(model, objective or ToyObjective(), rows, method="sklearn", **settings)
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))
    return str(error.value)


def test_a_head_that_is_not_linear():
    config = ConvNetConfig(image_size=2, channels=[1], kernel_size=1, dense=[2], num_labels=2)
    images = [{"example_id": i, "image": [[0, i], [0, 0]], "label": i % 2} for i in range(8)]
    network = ConvNetForImageClassification(config).double()
    objective = ImageClassification(dtype="float64")
    assert "trains 6 tensors (first 'encoder.layers" in refused(network, objective, images)
    text = FeedForwardClassifier.from_encoder(tiny.model("bert", "masked"), 4)
    wanted = {"previous": tiny.model("bert", "masked"), "trainable": "head"}
    assert "'hidden.weight'), which are not one linear" in refused(
        text, tiny.objective("classification"), tiny.rows(6), **wanted
    )
    # The first of two layers is linear, and its outputs are not the logits.
    message = refused(text, tiny.objective("classification"), tiny.rows(6), trainable=["hidden.*"])
    assert "are not softmax cross-entropies of the outputs of 'hidden'" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": Smoothed()}, r"losses of stage 'stage' \(Smoothed\) are not softmax"),
        ({"objective": Squared()}, r"losses of stage 'stage' \(Squared\) are not softmax|runs 2 times"),
        ({"trainable": "all"}, "which are not one linear layer"),
        ({"trainable": ["head.weight"]}, "trains 1 tensors"),
        ({"trainable": ["encoder.upper.*"], "previous": toy(0), "alpha": 0.3}, "ties 'encoder.upper.weight'"),
    ],
)
def test_what_scikit_learn_cannot_express(settings, message):
    settings = {"trainable": ["head.*"], **settings}
    with pytest.raises(InputError, match=message):
        training.polish(toy(1), settings.pop("objective", ToyObjective()), ROWS, method="sklearn", **settings)


def test_an_unknown_method():
    with pytest.raises(InputError, match="method is 'lbfgs'; expected 'newton' or 'sklearn'"):
        training.polish(toy(1), ToyObjective(), ROWS, method="lbfgs")


def test_by_configuration(tmp_path, capsys):
    path = image_project(tmp_path)
    options = ("--config", path, "--stages.finetuning.polish", "{method: sklearn, max_iter: 30}")
    assert msif("train", *options) == 0
    report = json.loads((tmp_path / "run" / "finetuning.json").read_text())["polish"]
    assert report["solver"] == "newton-cholesky"
    assert report["reached"]
    assert report["gradient_norm"] < 1e-9
    assert "scikit-learn's newton-cholesky" in capsys.readouterr().out
    # A retraining takes the method for any stage.
    assert msif("validate", *options, "--validation.examples", 3, "--validation.baselines", "[]", "--json") == 0
    assert json.loads(capsys.readouterr().out)["n"] == 3
    assert msif("train", *options, "--stages.finetuning.polish.method", "cholesky") == 2
    assert "stages.finetuning.polish.method is cholesky; expected one of newton, sklearn" in capsys.readouterr().err
    assert build.polish_settings(config.load(path), "finetuning") == {"max_iter": 30}
