"""Queries: saved and loaded, refused where they would mean nothing, warned about where they are rough."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Query, Stage, solvers

CORPUS = tiny.rows(6, seed=1)
TWEETS = tiny.rows(5, seed=2)
TESTS = [
    {"example_id": "é", "text": "vote for the “wall” 🗳", "label": 1},
    {"example_id": 4, "text": "tax", "label": 0},
]


@pytest.fixture(scope="module")
def models():
    before = tiny.model("bert", "masked")
    return before, tiny.finetuned(before, "bert")


def chain(models, **settings):
    return tiny.chain(*models, tol=1e-6, data=(CORPUS, TWEETS), **settings)


@pytest.fixture(scope="module")
def query(models):
    return chain(models).query(TESTS)


@pytest.fixture
def folder(query, tmp_path):
    query.save_pretrained(tmp_path / "a" / "query")
    return tmp_path / "a" / "query"


def test_a_loaded_query_scores_the_same(query, folder, models):
    loaded = Query.from_pretrained(folder, chain(models))
    for stage in ("pre", "fine"):
        rows = CORPUS if stage == "pre" else TWEETS
        found, expected = loaded.score(rows, stage), query.score(rows, stage)
        for q in range(2):
            np.testing.assert_array_equal(found.influence(q), expected.influence(q))
        assert found.metadata == expected.metadata
    assert loaded.tests == TESTS
    assert loaded.losses == query.losses
    assert loaded.certificates == query.certificates
    assert loaded.columns == 2


def test_only_finished_files_are_left(folder):
    assert sorted(p.name for p in folder.iterdir()) == [".hf_msif.json", "query.json", "query.safetensors"]


def test_a_file_of_the_users_is_not_replaced(query, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    query.save_pretrained(tmp_path)
    query.save_pretrained(tmp_path)
    (tmp_path / ".hf_msif.json").unlink()
    with pytest.raises(InputError, match=r"query\.safetensors exists, and hf_msif did not write it: move it away"):
        query.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_losses_are_those_of_the_tests(query, models):
    plain = tiny.Plain(models[1], "classification", tiny.objective("classification").collate(TESTS))
    np.testing.assert_allclose(query.losses, plain.sums().tolist(), rtol=1e-12)


def test_the_certificate_says_what_was_done(query):
    state = json.loads(json.dumps(query.certificate()))
    pre, fine = state["stages"]["pre"], state["stages"]["fine"]
    assert (pre["examples"], fine["examples"]) == (len(CORPUS), len(TWEETS))
    assert fine["N"] == len(TWEETS)
    assert pre["N"] == sum(max(1, round(0.4 * len(row["text"].split()))) for row in CORPUS)
    assert pre["objective"]["class"] == "MaskedLM"
    assert pre["objective"]["mask_probability"] == 0.4
    assert pre["solve"]["damping"] == 0.5
    assert max(pre["solve"]["residual"]) <= 1e-6


@pytest.mark.parametrize("stage", [0, 1])
def test_a_model_that_changed_is_refused_by_stage(folder, models, stage):
    changed = [copy.deepcopy(m) for m in models]
    name = "cls.predictions.bias" if stage == 0 else "classifier.bias"
    with torch.no_grad():
        changed[stage].get_parameter(name)[0] += 1e-9
    with pytest.raises(InputError, match=f"the model of stage '{['pre', 'fine'][stage]}' is not the one"):
        Query.from_pretrained(folder, chain(changed))


def test_another_chain_is_refused(folder, models):
    stage = Stage("only", models[1], tiny.objective("classification"), TWEETS)
    with pytest.raises(InputError, match=r"stages \['pre', 'fine'\]; this chain has \['only'\]"):
        Query.from_pretrained(folder, MultiStageInfluence([stage], progress=False))


def test_a_folder_without_query(tmp_path, query):
    with pytest.raises(InputError, match=r"holds no query; expected query\.json and query\.safetensors"):
        Query.from_pretrained(tmp_path, query.chain)


def test_a_later_format_is_refused(folder, query):
    state = json.loads((folder / "query.json").read_text())
    (folder / "query.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(InputError, match="written in format 99; this version reads 3"):
        Query.from_pretrained(folder, query.chain)


def test_saving_that_fails_leaves_the_old_query(folder, query, monkeypatch, models):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = chain(models).query(TESTS[:1])
    monkeypatch.setattr(Query, "certificate", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# What a solve may do ------------------------------------------------------------------------------------------------


def only(models, **settings):
    """Pretraining alone, at parameters that are no minimum: its Hessian is indefinite."""
    stage = Stage("pre", models[0], tiny.objective("masked"), CORPUS, **settings)
    return MultiStageInfluence([stage], progress=False)


def test_the_hessian_is_indefinite(models):
    """By plain autograd: two directions of opposite curvature."""
    plain = tiny.Plain(models[0], "masked", tiny.objective("masked").collate(CORPUS))
    names = list(plain.parameters)
    signs = set()
    for seed in range(40):
        v = {n: t[0] for n, t in tiny.block(plain.parameters, 1, seed).items() if seed % 2 or "cls" in n}
        hv = plain.along(v, lambda: plain.gradient(names))
        signs.add(bool(sum(float((v[n] * hv[n]).sum()) for n in v) > 0))
    assert signs == {True, False}


def test_cg_on_an_indefinite_hessian_is_refused_with_the_way_out(models):
    msif = only(models, curvature="hessian", solver=solvers.CG(damping=0.0, max_iter=400))
    with pytest.raises(InputError, match=r"stage 'pre': .*no meaning.*negative curvature") as error:
        msif.query(CORPUS[:2])
    assert "MinRes" in str(error.value)
    assert "gauss_newton" in str(error.value)
    assert "damping" in str(error.value)


@pytest.mark.slow
def test_minres_on_an_indefinite_hessian_is_answered(models):
    solver = solvers.MinRes(damping=0.05, tol=1e-3, max_iter=1000)
    msif = only(models, curvature="hessian", solver=solver, trainable=["cls.predictions.transform.*"])
    (certificate,) = msif.query(CORPUS[:1]).certificates.values()
    assert certificate.converged == [True]
    assert certificate.negative_curvature == [True]


UNFINISHED = {
    "cg": {"solver": solvers.CG(damping=1e-4, max_iter=2, tol=1e-8)},
    # An unfinished MINRES iterate is the best of its Krylov space, also where curvature is negative.
    "minres, indefinite": {"curvature": "hessian", "solver": solvers.MinRes(max_iter=40, tol=1e-8)},
}


@pytest.mark.parametrize("settings", UNFINISHED.values(), ids=UNFINISHED)
def test_an_unfinished_solve_warns(models, settings):
    with pytest.warns(UserWarning, match=r"stage 'pre': not solved to tolerance.*residual \d.*tol 1e-08"):
        (certificate,) = only(models, **settings).query(CORPUS[:1]).certificates.values()
    assert certificate.status == ["max_iter"]
    assert certificate.residual[0] > 1e-8
    if settings.get("curvature") == "hessian":
        assert certificate.negative_curvature == [True]


def test_a_finished_solve_does_not_warn(models, recwarn):
    chain(models).query(TESTS[:1])
    assert not [w for w in recwarn if "solved" in str(w.message)]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(models, stage, value):
    spoilt = [copy.deepcopy(m) for m in models]
    name = ["cls.predictions.transform.dense.bias", "classifier.weight"][stage]
    with torch.no_grad():
        spoilt[stage].get_parameter(name).view(-1)[1] = value
    with pytest.raises(
        InputError, match=f"stage '{['pre', 'fine'][stage]}': the parameter {re.escape(repr(name))} holds NaN"
    ):
        chain(spoilt)


def test_aggregates(models, query):
    msif = query.chain
    single = np.stack([query.score(CORPUS).influence(q) for q in range(2)])
    for aggregate, expected in (("sum", single.sum(0)), ("mean", single.mean(0))):
        found = msif.query(TESTS, aggregate=aggregate).score(CORPUS)
        assert found.columns == 1
        np.testing.assert_allclose(found.influence(), expected, rtol=0, atol=1e-5 * np.abs(single).max())
    with pytest.raises(InputError, match="aggregate is 'median'; expected None, 'sum' or 'mean'"):
        msif.query(TESTS, aggregate="median")


@pytest.mark.parametrize(
    ("tests", "message"), [([], "the test examples is empty"), ("vote", "the test examples is a str")]
)
def test_what_is_no_test(query, tests, message):
    with pytest.raises(InputError, match=message):
        query.chain.query(tests)
