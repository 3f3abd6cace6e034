"""What a query explains beside the loss: values, gradients and scores against dense algebra and finite differences."""

import copy

import numpy as np
import pytest
import torch
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Query, Stage, objectives, solvers
from hf_msif.influence.measurements import (
    Function,
    LogitMargin,
    LogProbability,
    SpanLogProbability,
    as_measurement,
)
from hf_msif.influence.sweep import damping_sweep

ROWS, TESTS = tiny.rows(6, seed=1, classes=3), tiny.rows(3, seed=2, classes=3, shortest=3)
DAMPING = 0.5


def classifier():
    return tiny.model("bert", "classification", num_labels=3)


def brightness(call, batch):
    """A function of a user's own."""
    output = call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits.square().sum(1)


def chain(model, objective):
    solver = solvers.Dense(damping=DAMPING)
    stage = Stage("only", model, objective, ROWS, solver=solver, trainable=["classifier.*"])
    return MultiStageInfluence([stage], progress=False)


def logits_of(model, objective, row):
    batch = objective.collate([row])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model.eval()(**inputs).logits[0], int(batch["labels"][0])


def margin(z, label):
    return z[label] - torch.cat([z[:label], z[label + 1 :]]).max()


# name → the number, of the logits and the label of a row
CLASS_MEASUREMENTS = {
    "loss": lambda z, label: -z.log_softmax(0)[label],
    "log_probability": lambda z, label: z.log_softmax(0)[label],
    "logit_margin": margin,
    LogProbability("predicted"): lambda z, label: z.log_softmax(0).max(),
    LogitMargin("predicted"): lambda z, label: z.sort().values[-1] - z.sort().values[-2],
    LogProbability(2): lambda z, label: z.log_softmax(0)[2],
    brightness: lambda z, label: z.square().sum(),
}


@pytest.mark.parametrize("measurement", CLASS_MEASUREMENTS, ids=lambda m: str(as_measurement(m)))
def test_scores_are_minus_the_product_of_gradient_inverse_and_gradient(measurement):
    """I(x) = −∇fᵀ (A + λ)⁻¹ ∇ℓ_x with ∇f by central differences of an ordinary copy of the model."""
    model, objective, of_logits = classifier(), tiny.objective("classification"), CLASS_MEASUREMENTS[measurement]
    msif = chain(model, objective)
    query = msif.query(TESTS, measurement=measurement)
    found = query.score(ROWS)
    plain = tiny.Plain(model, "classification", objective.collate(ROWS))
    names = msif.stages[0].split.trained
    leaves = [plain.parameters[name] for name in names]
    curvature = tiny.dense_gauss_newton(plain, names) / len(ROWS)
    inverse = torch.linalg.inv(curvature + DAMPING * torch.eye(len(curvature), dtype=torch.float64))
    gradients = []
    for z, label in zip(plain.scored()[0], plain.batch["labels"], strict=True):
        slopes = torch.autograd.grad(-z.log_softmax(0)[label], leaves, retain_graph=True)
        gradients.append(torch.cat([g.flatten() for g in slopes]))
    for q, test in enumerate(TESTS):

        def value(test=test):
            with torch.no_grad():
                return of_logits(*logits_of(plain.model, objective, test))

        slope = []
        for name in names:
            for i in range(plain.parameters[name].numel()):
                unit = torch.zeros_like(plain.parameters[name])
                unit.view(-1)[i] = 1.0
                slope.append(float(plain.along({name: unit}, value, step=1e-5)))
        expected = -torch.stack(gradients) @ inverse @ torch.tensor(slope, dtype=torch.float64)
        np.testing.assert_allclose(query.values[q], float(value()), rtol=1e-12)
        np.testing.assert_allclose(found.influence(q), expected.detach().numpy(), atol=1e-7 * expected.abs().max())


def test_a_log_probability_has_minus_the_influences_of_the_loss():
    msif = chain(classifier(), tiny.objective("classification"))
    loss, log_probability = (msif.query(TESTS, measurement=name).score(ROWS) for name in ("loss", "log_probability"))
    np.testing.assert_allclose(log_probability.influences(), -loss.influences(), rtol=1e-10)
    assert (loss.metadata["measurement"], log_probability.metadata["measurement"]) == (
        "loss",
        "log-probability of the row's label",
    )


def test_retrainings_measure_losses():
    from hf_msif.validation.experiments import _effects

    scores = chain(classifier(), tiny.objective("classification")).query(TESTS, measurement="logit_margin").score(ROWS)
    with pytest.raises(
        InputError, match="explain the logit margin of the row's label, but retrainings measure losses"
    ):
        _effects("influence", scores, None)


def test_an_aggregated_measurement_is_the_sum():
    msif = chain(classifier(), tiny.objective("classification"))
    each = msif.query(TESTS, measurement="logit_margin").score(ROWS).influences().sum(1)
    np.testing.assert_allclose(msif.query(TESTS, "sum", measurement="logit_margin").score(ROWS).influence(), each)


def test_a_class_by_its_name():
    labelled = objectives.SequenceClassification(tiny.tokenizer(), labels=("bad", "so", "good"))
    msif = chain(classifier(), labelled)
    by_name, by_number = (msif.query(TESTS, measurement=LogitMargin(label)).values for label in ("good", 2))
    assert by_name == by_number
    with pytest.raises(InputError, match=r"logit margin of 'fine', which is no class; .*'good'"):
        msif.query(TESTS, measurement=LogitMargin("fine"))
    with pytest.raises(InputError, match="expected one of the model's 3 classes"):
        chain(classifier(), tiny.objective("classification")).query(TESTS, measurement=LogProbability(7))


def test_a_saved_query_knows_what_it_explains(tmp_path):
    msif = chain(classifier(), tiny.objective("classification"))
    query = msif.query(TESTS, measurement=LogProbability("predicted"), checkpoints=tmp_path / "checkpoints")
    query.save_pretrained(tmp_path / "query")
    loaded = Query.from_pretrained(tmp_path / "query", msif)
    assert (loaded.measurement, loaded.values) == ("log-probability of the predicted class", query.values)
    assert loaded.losses == query.losses
    np.testing.assert_allclose(loaded.losses, msif.query(TESTS).losses, rtol=1e-12)
    assert query.certificate()["measurement"] == loaded.measurement


def test_a_sweep_of_another_measurement():
    msif = chain(classifier(), tiny.objective("classification"))
    tables = [damping_sweep(msif, TESTS, ROWS, [0.1, 1.0], measurement=m) for m in ("loss", "log_probability")]
    np.testing.assert_allclose(*(table.spread for table in tables))  # minus the same influences


# Spans --------------------------------------------------------------------------------------------------------------


def language_model(task, architecture):
    """A model, its objective, a row whose span is two words, and the plain log-probability of these words."""
    model, objective = tiny.model(architecture, task), tiny.objective(task)
    row = {"example_id": 0, "text": "we won the great debate", "target": "they won the great wall"}
    return model, objective, row


def plain_span(model, task, objective, row, first, last):
    """Σ log p of the tokens first, …, last − 1, by an ordinary copy of the model."""
    plain = copy.deepcopy(model).eval()
    tokenizer = objective.tokenizer
    ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
    if task == "sequence to sequence":
        labels = torch.tensor([tokenizer(row["target"])["input_ids"]])
        logits = plain(input_ids=ids, labels=labels).logits[0]
        return sum(logits[t].log_softmax(0)[labels[0, t]] for t in range(first, last)), plain
    if task == "masked":
        masked = ids.clone()
        masked[0, first:last] = tokenizer.mask_token_id
        logits = plain(input_ids=masked).logits[0]
        return sum(logits[t].log_softmax(0)[ids[0, t]] for t in range(first, last)), plain
    logits = plain(input_ids=ids).logits[0]
    return sum(logits[t - 1].log_softmax(0)[ids[0, t]] for t in range(first, last)), plain


@pytest.mark.parametrize(
    ("task", "architecture", "first"),
    [("causal", "gpt2", 2), ("masked", "bert", 3), ("sequence to sequence", "bart", 3)],
)
def test_the_log_probability_of_a_span_and_its_gradient(task, architecture, first):
    model, objective, row = language_model(task, architecture)
    stage = Stage("only", model, objective, tiny.rows_of_all_tasks(4, seed=3), solver=solvers.CG(damping=1.0))
    msif = MultiStageInfluence([stage], progress=False)
    expected, plain = plain_span(model, task, objective, row, first, first + 2)
    gradient, (value,) = msif.measurement([row], measurement=SpanLogProbability("the great"))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    names = list(gradient)
    slopes = torch.autograd.grad(expected, [dict(plain.named_parameters())[n] for n in names], allow_unused=True)
    for name, slope in zip(names, slopes, strict=True):
        slope = torch.zeros_like(gradient[name][0]) if slope is None else slope
        torch.testing.assert_close(gradient[name][0], slope, rtol=1e-8, atol=1e-10)
    by_number = {**row, "span": [first, first + 2]}
    assert msif.measurement([by_number], measurement="span_log_probability")[1] == [value]


def test_a_span_is_found_or_refused():
    model, objective, row = language_model("causal", "gpt2")
    msif = MultiStageInfluence([Stage("only", model, objective, [row])], progress=False)
    for span, message in (
        ("taxes", "does not hold the span 'taxes'"),
        (None, "has the span None"),
        ((7, 9), "have no term to predict, so their log-probability of the span"),
    ):
        with pytest.raises(InputError, match=message):
            msif.query([row], measurement=SpanLogProbability(span))


# What is refused ----------------------------------------------------------------------------------------------------


def wrong_shape(call, batch):
    return call(input_ids=batch["input_ids"]).logits


@pytest.mark.parametrize(
    ("measurement", "message"),
    [
        ("margin", r"measurement is 'margin'; expected one of \['loss', 'log_probability'"),
        (3, "measurement is 3; expected one of"),
        (SpanLogProbability("vote"), "terms of SequenceClassification are no tokens of a text"),
        (wrong_shape, r"wrong_shape returned shape \(1, 3\); expected a tensor of one number per row"),
    ],
)
def test_what_is_no_measurement_is_refused(measurement, message):
    with pytest.raises(InputError, match=message):
        chain(classifier(), tiny.objective("classification")).query(
            [{"text": "we vote", "label": 0}], measurement=measurement
        )


def test_a_language_model_has_no_classes():
    model, objective, row = language_model("causal", "gpt2")
    msif = MultiStageInfluence([Stage("only", model, objective, [row])], progress=False)
    with pytest.raises(
        InputError, match="log-probability of the predicted class, but CausalLM has no classes of rows"
    ):
        msif.query([row], measurement=LogProbability("predicted"))


def test_functions_are_told_apart_by_what_they_do():
    one, other = (Function(f) for f in (lambda call, batch: 1.0, lambda call, batch: call(1)))
    assert one.identity != other.identity
    assert str(Function(brightness)).endswith(":brightness")
