"""Stages and their links: settings, stationarity, partial freezing, facts measured once, nothing left behind."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.state import photograph
from helpers.toy import ToyObjective, example_losses, minimise, toy, toy_rows
from transformers import Trainer

from hf_msif import InputError, MultiStageInfluence, Query, Stage, objectives, solvers, training, vectors
from hf_msif.adapters import decayed_names
from hf_msif.adapters.fingerprint import model_identity
from hf_msif.models import FeedForwardClassifier
from hf_msif.validation.retraining import perturb

CORPUS, TWEETS, TESTS = tiny.rows(6, seed=1), tiny.rows(5, seed=2), tiny.rows(2, seed=8)


def stage(name="one", **settings):
    return Stage(name, **{"model": toy(0), "objective": ToyObjective(), "data": toy_rows(1, 8), **settings})


# Settings -----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "curvature": (
        {"curvature": "fisher"},
        r"curvature is 'fisher'; expected one of \['auto', 'ekfac', 'gauss_newton', 'hessian'\]",
    ),
    "link": ({"link": "unroled"}, r"link is 'unroled'; expected one of \['implicit', 'segments', 'unrolled'\]"),
    "no run": ({"link": "unrolled"}, "run is None; expected the folder of a recorded run"),
    "no link": ({"run": "runs/x"}, "link is 'implicit' and run is 'runs/x'"),
    "decay": ({"weight_decay": -0.1}, r"weight_decay=-0\.1, .*a decay of at least 0"),
    "decay, no number": ({"weight_decay": float("nan")}, "weight_decay=nan"),
    "batch": ({"batch_size": 0}, "batch_size=0.*numbers of at least 1"),
    "rounds of masks": ({"mask_rounds": 0}, "mask_rounds=0; expected .* numbers of at least 1"),
    "samples": ({"curvature_samples": 0}, "curvature_samples=0"),
    "alpha, zero": ({"alpha": 0.0}, r"alpha is 0\.0; expected a positive number, as in eq\. \(12\)"),
    "alpha, infinite": ({"alpha": float("inf")}, "alpha is inf"),
    "alpha, word": ({"alpha": "large"}, "alpha is 'large'"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=f"stage 'one': .*{message}|stage 'one': {message}"):
        stage(**settings)


def test_chains_that_are_none():
    with pytest.raises(InputError, match="a chain needs at least one stage"):
        MultiStageInfluence([])
    with pytest.raises(InputError, match=r"stage names must differ; got \['one', 'one'\]"):
        MultiStageInfluence([stage(), stage()])
    msif = MultiStageInfluence([stage()], progress=False)
    assert msif.stage() is msif.stage("one")
    with pytest.raises(InputError, match=r"there is no stage 'two'; the stages are \['one'\]"):
        msif.stage("two")


def test_a_loss_of_nothing_trained():
    class Constant(ToyObjective):
        def losses(self, call, batch):
            sums, counts = super().losses(call, batch)
            return sums.detach(), counts

    with pytest.raises(InputError, match="stage 'one': the loss depends on none of the trained parameters"):
        MultiStageInfluence([stage(objective=Constant())], progress=False)


def test_a_test_whose_loss_is_no_number():
    msif = MultiStageInfluence([stage()], progress=False)
    broken = {"example_id": 99, "x": [float("nan")] * 3, "label": 0}
    with pytest.raises(InputError, match=r"the loss of the test examples with example_id \[99\] is not finite"):
        msif.query([*toy_rows(5, 2), broken])


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_decay_follows_the_rule_of_trainer(name):
    model = tiny.model(name, "causal" if name in tiny.CAUSAL else "masked")
    found = decayed_names(model)
    assert found == set(Trainer.get_decay_parameter_names(None, model))
    undecayed = [n for n, _ in model.named_parameters() if n not in found]
    assert undecayed
    assert all("bias" in n or "norm" in n.lower() or ".ln_" in n for n in undecayed)


# How far from a minimum ---------------------------------------------------------------------------------------------


def two(alpha=0.3, **settings):
    before, after = toy(0), toy(1)
    first = stage("one", model=before, weight_decay=0.05)
    return MultiStageInfluence(
        [first, stage("two", model=after, trainable="all", weight_decay=0.02, alpha=alpha, **settings)], progress=False
    )


def objective(model, parameters, anchors, rows):
    sums, counts = ToyObjective().losses(
        lambda **kw: torch.func.functional_call(model, parameters, kwargs=kw), ToyObjective().collate(rows)
    )
    total = sums.sum() / counts.sum() + 0.01 * sum((p**2).sum() for n, p in parameters.items() if "bias" not in n)
    return total + 0.3 * sum(((parameters[n] - p) ** 2).sum() for n, p in anchors.items())


@pytest.mark.parametrize("samples", [None, 5])
def test_the_gradient_norm_is_that_of_the_objective(samples):
    """Decay and proximal term included, by plain autograd."""
    bound = two(curvature_samples=samples).stage("two")
    model, anchors = toy(1), {n: p.detach() for n, p in toy(0).named_parameters() if n.startswith("encoder.")}
    value = objective(model, dict(model.named_parameters()), anchors, bound.differentiation.curvature_rows)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    expected = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert bound.differentiation.gradient_norm == pytest.approx(expected, rel=1e-12)


def test_the_certificate_tells_a_minimum_from_none():
    model, rows = toy(1), toy_rows(1, 8)
    anchors = {n: p.detach() for n, p in toy(0).named_parameters() if n.startswith("encoder.")}
    start = {n: p.detach() for n, p in model.named_parameters()}
    model.load_state_dict(minimise(lambda p: objective(model, p, anchors, rows), start, list(start)), strict=False)
    solver = solvers.CG(damping=1.0)
    stages = [stage("one", solver=solver), stage("two", model=model, weight_decay=0.02, alpha=0.3, solver=solver)]
    query = MultiStageInfluence(stages, progress=False).query(toy_rows(3, 1))
    found = query.certificate()["stages"]
    assert found["two"]["gradient_norm"] < 1e-9
    assert found["one"]["gradient_norm"] > 0.1
    for name in ("one", "two"):
        said = f"norm of the objective's gradient {found[name]['gradient_norm']:.1e} on 8 examples"
        assert said in found[name]["text"]
        assert str(query.certificates[name]) in found[name]["text"]


# Partial freezing ---------------------------------------------------------------------------------------------------


def test_partial_freezing():
    """Embeddings and layer 0 frozen, layer 1 proximal, pooler and classifier new: each block by its own formula."""
    before = tiny.model("bert", "masked", layers=2)
    after = tiny.finetuned(before, "bert", layers=2)
    patterns = ["bert.encoder.layer.1.*", "bert.pooler.*", "classifier.*"]
    msif = tiny.chain(before, after, 1e-11, (CORPUS, TWEETS), trainable=patterns, alpha=0.2, weight_decay=0.03)
    bound = msif.stage("fine")
    assert {n.split(".")[3] for n in bound.split.proximal} == {"1"}
    assert not bound.split.left_out

    adjoint, losses = msif.measurement(TESTS)
    solution, inherited = bound.differentiation.pull_back(adjoint)
    u = solution.tensors()
    plain = tiny.Plain(after, "classification", tiny.objective("classification").collate(TWEETS))
    tests = tiny.Plain(after, "classification", tiny.objective("classification").collate(TESTS))
    np.testing.assert_allclose(losses, tests.sums().tolist(), rtol=1e-12)
    assert set(inherited) == {*bound.split.frozen, *bound.split.proximal}
    for q in range(2):
        direct = tests.gradient(list(bound.split.frozen), of=tests.sums()[q])
        mixed = plain.along(vectors.column(u, q), lambda: plain.gradient(list(bound.split.frozen)))
        expected = {n: direct[n] - mixed[n] / len(TWEETS) for n in direct}
        tiny.close({n: inherited[n][q] for n in expected}, expected, 1e-7)
        tiny.close(
            {n: inherited[n][q] for n in bound.split.proximal}, {n: 0.4 * u[n][q] for n in bound.split.proximal}, 0
        )

    carried = bound.carry(inherited)
    head = {n for n in carried if n.startswith("cls.")}
    assert head
    assert all(carried[n].any() == (n not in head) for n in carried)
    final = msif.query(TESTS).solutions["pre"].tensors()
    damped = vectors.add(msif.stage("pre").differentiation.operator.matvec(final), final, 0.5)
    tiny.close(damped, carried, 1e-8)


def test_what_is_neither_trained_nor_inherited_is_held_and_named():
    before = tiny.model("bert", "masked")
    after = tiny.finetuned(before, "bert")
    msif = tiny.chain(before, after, data=(CORPUS, TWEETS), trainable=["classifier.*"])
    assert set(msif.stage("fine").split.left_out) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    query = msif.query(TESTS)
    assert set(query.solutions["fine"].tensors()) == {"classifier.weight", "classifier.bias"}
    assert query.score(CORPUS).influence(0).any()


# Measured once ------------------------------------------------------------------------------------------------------


def test_a_query_measures_its_facts_once(tmp_path, monkeypatch):
    """A loaded one not at all: scoring needs neither curvature nor another hash of the weights."""
    before = tiny.model("bert", "masked")
    models = before, tiny.finetuned(before, "bert")
    hashed, original = [], model_identity
    monkeypatch.setattr("hf_msif.influence.chain.model_identity", lambda m: hashed.append(m) or original(m))
    msif = tiny.chain(*models, data=(CORPUS, TWEETS))
    query = msif.query(TESTS)
    query.save_pretrained(tmp_path)
    expected = query.score(CORPUS)
    msif.query(TESTS[:1])
    assert len(hashed) == 2

    chain = tiny.chain(*models, data=(CORPUS, TWEETS))
    loaded = Query.from_pretrained(tmp_path, chain)
    for _ in range(2):
        scores = loaded.score(CORPUS)
    assert scores.metadata == expected.metadata
    assert scores.frame.equals(expected.frame)
    assert len(hashed) == 4
    assert not any("operator" in vars(bound) for bound in chain.stages)


def test_a_query_of_other_data_is_refused(tmp_path):
    before = tiny.model("bert", "masked")
    models = before, tiny.finetuned(before, "bert")
    tiny.chain(*models, data=(CORPUS, TWEETS)).query(TESTS).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"stage 'fine' is not as it was .*number of rows was 5 and is 4; the data differ"
    ):
        Query.from_pretrained(tmp_path, tiny.chain(*models, data=(CORPUS, TWEETS[:4])))


# Nothing left behind ------------------------------------------------------------------------------------------------


def randomness():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_random_numbers_of_the_user_are_not_used():
    """Probes, subsets and masks have generators of their own."""
    before = tiny.model("bert", "masked")
    after = tiny.finetuned(before, "bert")
    state = randomness()
    solver = solvers.CG(damping="auto", tol=0.1)
    msif = tiny.chain(before, after, 1e-3, (CORPUS, TWEETS), {"solver": solver, "curvature_samples": 4}, solver=solver)
    msif.query(TESTS).score(CORPUS)
    assert randomness() == state


class Failing(objectives.Objective):
    """Fails when it has been evaluated so often."""

    def __init__(self, inner, after):
        self.inner, self.left = inner, after

    def collate(self, rows):
        return self.inner.collate(rows)

    def losses(self, call, batch):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("interrupted")
        return self.inner.losses(call, batch)


@pytest.mark.parametrize("after", [1, 2, 4, 7, None])
def test_models_with_kernels_of_their_own_leave_as_they_came(after):
    """A classifier and the encoder in it, each with its own attention and modes; also when something fails midway."""
    before = tiny.model("bert", "masked", attention="sdpa")
    model = tiny.perturbed(FeedForwardClassifier.from_encoder(before, 4), seed=3)
    model.encoder.load_state_dict(before.bert.state_dict())
    model.encoder.set_attn_implementation("flex_attention")
    model.train()
    model.encoder.embeddings.eval()
    pictures = [photograph(before), photograph(model)]
    kernels = model.config._attn_implementation, model.encoder.config._attn_implementation
    assert kernels[1] == "flex_attention"
    state, failed = randomness(), False
    try:
        msif = tiny.chain(before, model, data=(CORPUS, TWEETS))
        pre = msif.stage("pre")
        if after:
            pre.objective = Failing(copy.copy(pre.objective), after)
        assert len(msif.query(TESTS).score(CORPUS)) == len(CORPUS)
    except RuntimeError:
        failed = True
    assert failed == bool(after)
    assert [photograph(before), photograph(model)] == pictures
    assert (model.config._attn_implementation, model.encoder.config._attn_implementation) == kernels
    assert randomness() == state


def test_a_chain_that_does_not_fit_leaves_the_models_as_they_came():
    before, after = tiny.model("bert", "masked"), tiny.finetuned(tiny.model("bert", "masked", seed=7), "bert")
    pictures = [photograph(before), photograph(after)]
    with pytest.raises(InputError, match="counts as frozen"):
        tiny.chain(before, after, data=(CORPUS, TWEETS))
    assert [photograph(before), photograph(after)] == pictures


# α from the checkpoints ---------------------------------------------------------------------------------------------


def tied_optimum(alpha, rows, decay=0.02):
    """A model at the minimum of F + α ‖W − W_before‖², W_before being `toy(0)`'s encoder."""
    model, before = toy(1), toy(0)
    anchors = {n: p.detach() for n, p in before.named_parameters() if n.startswith("encoder.")}

    def value(p):
        sums, counts = example_losses(model, p, rows)
        total = sums.sum() / counts.sum() + decay / 2 * sum((x**2).sum() for n, x in p.items() if "bias" not in n)
        return total + alpha * sum(((p[n] - a) ** 2).sum() for n, a in anchors.items())

    start = {n: p.detach() for n, p in model.named_parameters()}
    model.load_state_dict(minimise(value, start, list(start)))
    return before, model


def automatic(before, model, rows, **settings):
    stages = [stage("one", model=before), stage("two", model=model, data=rows, weight_decay=0.02, alpha="auto")]
    stages[1] = dataclasses.replace(stages[1], **settings)
    return MultiStageInfluence(stages, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.7])
def test_alpha_is_found_at_a_proximal_optimum(alpha):
    rows = toy_rows(1, 8)
    before, model = tied_optimum(alpha, rows)
    bound = automatic(before, model, rows, curvature_samples=3).stage("two")  # the estimate is of all rows
    assert bound.differentiation.alpha == pytest.approx(alpha, rel=1e-9)
    assert bound.differentiation.estimate.remaining < 1e-8
    given = automatic(before, model, rows, alpha=alpha).stage("two")
    assert given.differentiation.gradient_norm < 1e-8
    for n, t in given.differentiation.ridge.items():
        assert bound.differentiation.ridge[n] == pytest.approx(t, rel=1e-9)


def test_the_estimate_is_its_formula_elsewhere(tmp_path):
    rows = toy_rows(1, 8)
    before, model = tied_optimum(0.3, rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    chain = automatic(before, model, rows, solver=solvers.CG(damping=1.0, tol=1e-6))
    bound = chain.stage("two")
    names = [n for n, _ in model.named_parameters() if n.startswith("encoder.")]
    parameters = dict(model.named_parameters())
    sums, counts = example_losses(model, parameters, rows)
    value = sums.sum() / counts.sum() + 0.01 * sum((p**2).sum() for n, p in parameters.items() if "bias" not in n)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(value, [parameters[n] for n in names])])
    shift = torch.cat([(parameters[n] - before.get_parameter(n)).detach().flatten() for n in names])
    expected = float(-(slope @ shift) / (2 * shift @ shift))
    assert bound.differentiation.estimate.alpha == pytest.approx(expected, rel=1e-12)
    assert bound.differentiation.estimate.distance == pytest.approx(float(shift.norm()), rel=1e-12)
    assert bound.differentiation.estimate.gradient_norm == pytest.approx(float(slope.norm()), rel=1e-12)
    remaining = float((slope + 2 * expected * shift).norm() / slope.norm())
    assert bound.differentiation.estimate.remaining == pytest.approx(remaining, rel=1e-12)
    assert remaining > 0.01
    for nearby in (0.99 * expected, 1.01 * expected):
        assert (slope + 2 * nearby * shift).norm() > (slope + 2 * expected * shift).norm()

    query = chain.query(toy_rows(3, 2))
    found = query.certificate()["stages"]["two"]
    assert found["alpha"] == bound.differentiation.alpha
    assert found["alpha_estimate"] == dataclasses.asdict(bound.differentiation.estimate)
    assert f"alpha = {expected:.4g} estimated from the checkpoints" in found["text"]
    assert f"it leaves {remaining:.0%} of the gradient" in found["text"]
    assert query.certificate()["stages"]["one"]["alpha_estimate"] is None
    query.save_pretrained(tmp_path)
    loaded = Query.from_pretrained(tmp_path, automatic(before, model, rows, solver=solvers.CG(damping=1.0, tol=1e-6)))
    assert loaded.certificate() == query.certificate()
    by_hand = automatic(before, model, rows, alpha=expected, solver=solvers.CG(damping=1.0, tol=1e-6))
    for q in range(2):
        np.testing.assert_allclose(
            by_hand.query(toy_rows(3, 2)).score(rows).influence(q), query.score(rows).influence(q), rtol=1e-6
        )


def test_an_estimate_that_is_not_positive_is_warned_about():
    """The encoder moved up the slope of its loss."""
    before, rows = toy(0), toy_rows(1, 8)
    model = toy(1)
    model.encoder.load_state_dict(before.encoder.state_dict())
    parameters = dict(model.named_parameters())
    sums, _ = example_losses(model, parameters, rows)
    names = [n for n in parameters if n.startswith("encoder.")]
    slopes = torch.autograd.grad(sums.sum(), [parameters[n] for n in names])
    with torch.no_grad():
        for n, slope in zip(names, slopes, strict=True):
            parameters[n] += 0.05 * slope
    bound = automatic(before, model, rows).stage("two")
    with pytest.warns(UserWarning, match=r"stage 'two': alpha = -.* It is not positive: no proximal term explains"):
        assert bound.differentiation.alpha < 0


def test_an_estimate_that_explains_almost_nothing_is_warned_about():
    """The encoder moved across the slope of its loss."""
    before, rows = toy(0), toy_rows(1, 8)
    model = toy(1)
    model.encoder.load_state_dict(before.encoder.state_dict())
    perturb(model, [n for n, _ in model.named_parameters() if n.startswith("encoder.")], 0.05, seed=1)
    implicit = automatic(before, model, rows).stage("two").differentiation
    assert implicit.estimate.remaining > 0.9
    with pytest.warns(UserWarning, match=r"'two': alpha = .*link='unrolled'.*trainable='head'.*alpha as a number"):
        assert implicit.alpha == implicit.estimate.alpha


# Rows without a term -------------------------------------------------------------------------------------------------

SILENT = {
    "a stage of empty texts": (["", " "], ["the wall"], r"stage 'pre': none of its 2 rows has a term.*N = 0"),
    "an empty test": (["the wall"], ["", "a"], r"test examples with example_id \[0\] have no text in 'text'"),
    "a blank test": (["the wall"], ["a", " \n"], r"test examples with example_id \[1\] have no text in 'text'"),
    "a test of special tokens": (["the wall"], ["a", "[SEP]"], r"example_id \[1\] have no term to predict"),
}


@pytest.mark.parametrize("aggregate", [None, "mean"])
@pytest.mark.parametrize(("data", "tests", "message"), SILENT.values(), ids=SILENT)
def test_what_has_no_term_is_refused_before_any_solve(data, tests, message, aggregate):
    stage = Stage("pre", tiny.model("bert", "masked"), tiny.objective("masked"), data, solver=solvers.CG(1.0))
    with pytest.raises(InputError, match=message):
        MultiStageInfluence([stage], progress=False).query(tests, aggregate)


def test_rows_without_a_term_are_not_polished():
    with pytest.raises(InputError, match=r"stage 'stage': none of its 2 rows has a term"):
        training.polish(tiny.model("bert", "masked"), tiny.objective("masked"), ["", " "])


def test_an_encoder_that_did_not_move_has_no_alpha():
    before, model = toy(0), toy(1)
    model.encoder.load_state_dict(before.encoder.state_dict())
    bound = automatic(before, model, toy_rows(1, 8)).stage("two")
    with pytest.raises(InputError, match=r"stage 'two': alpha is 'auto', but the inherited parameters are those of"):
        _ = bound.differentiation.alpha
    frozen = automatic(before, model, toy_rows(1, 8), trainable="head").stage("two")
    assert frozen.differentiation.alpha is None
    assert "encoder.gain" not in frozen.differentiation.ridge


def test_a_tokenizer_that_the_model_has_no_room_for_is_refused():
    """Only some of its rows would fail, and on a GPU without a word about tokens."""
    small = tiny.model("bert", "masked", vocab_size=len(tiny.WORDS) - 1)
    with pytest.raises(InputError, match=r"tokenizer has 25 tokens, the model of stage 'pre' 24.*resize_token_emb"):
        MultiStageInfluence([Stage("pre", small, tiny.objective("masked"), tiny.rows(4))], progress=False)
