"""The diagnostics of `msif diagnose`: each says what is off where it is, and nothing where it is not."""

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.toy import ToyObjective, toy, toy_rows

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, training
from hf_msif.influence import diagnostics
from hf_msif.influence.findings import diagnosed
from hf_msif.registry import CHECKS, DIAGNOSTICS

ROWS = tiny.rows(12, seed=4, shortest=3)


def bound(model, objective, rows=ROWS, **settings):
    stage = Stage("only", model, objective, rows, **settings)
    return MultiStageInfluence([stage], progress=False).stage("only")


def masked(dtype=torch.float64, **settings):
    return bound(tiny.model("bert", "masked", dtype=dtype), objectives.MaskedLM(tiny.tokenizer()), **settings)


def test_all_are_told_after_the_checks():
    assert [finding.check for finding in diagnosed(masked())] == [*CHECKS, *DIAGNOSTICS]


def test_a_refused_stage_is_not_diagnosed():
    model = tiny.model("bert", "masked")
    stage = Stage("only", model, objectives.CausalLM(tiny.tokenizer()), ROWS, skip_checks=list(CHECKS))
    found = MultiStageInfluence([stage], progress=False).stage("only")
    found.stage.skip_checks = []
    assert [finding.check for finding in diagnosed(found)] == list(CHECKS)


def test_pad_ids():
    model = tiny.model("bert", "masked")
    assert diagnostics.pad_ids(bound(model, objectives.MaskedLM(tiny.tokenizer()))).text == "model and tokenizer agree"
    model.config.pad_token_id = 7
    text = diagnostics.pad_ids(bound(model, objectives.MaskedLM(tiny.tokenizer()))).text
    assert "set model.config.pad_token_id = 0" in text


def test_precision_is_that_of_the_dtype():
    assert diagnostics.precision(masked()).text == "parameters are float64"
    finding = diagnostics.precision(masked(torch.float32))
    assert 1e-9 < finding.value < 1e-4
    assert "is that of float64" in finding.text


def test_attention_by_another_kernel():
    finding = diagnostics.attention(masked())
    assert finding.value is None or finding.value < 1e-6


def test_stationarity_tells_a_minimum_from_another_place():
    rows, objective, model = toy_rows(1, 60, classes=2), ToyObjective(), toy(0)
    model.head.bias.data[2] += 6.0  # a class that no row has
    away = diagnostics.stationarity(bound(model, objective, rows, weight_decay=0.01))
    assert "training ended before a minimum" in away.text
    training.polish(model, objective, rows, weight_decay=0.01)
    there = diagnostics.stationarity(bound(model, objective, rows, weight_decay=0.01))
    assert "within chance of zero" in there.text


def test_curvature_sign_by_the_dense_hessian():
    rows = toy_rows(1, 16)
    model = toy(0)
    found = bound(model, ToyObjective(), rows, curvature="hessian", solver=solvers.MinRes())
    text = diagnostics.curvature_sign(found).text
    operator = found.differentiation.curvature(rows)
    size = sum(p.numel() for p in operator.parameters.values())
    columns = torch.eye(size, dtype=torch.float64)
    names, shapes = list(operator.parameters), [p.shape for p in operator.parameters.values()]
    parts = columns.split([p.numel() for p in operator.parameters.values()], dim=1)
    block = {name: part.reshape(size, *shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
    product = torch.cat([t.reshape(size, -1) for t in operator.matvec(block).values()], dim=1)
    values = np.linalg.eigvalsh(((product + product.T) / 2).numpy())
    assert values[0] < -1e-3 * values[-1]  # away from a minimum it is indefinite
    assert "the stage is at no minimum" in text
    least = float(text.split("are from ")[1].split(" to ")[0])
    assert least == pytest.approx(values[0], rel=0.2)


def test_gauss_newton_has_no_negative_directions():
    assert "by construction" in diagnostics.curvature_sign(masked()).text


def test_ties():
    assert "word_embeddings" in diagnostics.ties(masked()).text
    assert diagnostics.ties(bound(toy(0), ToyObjective(), toy_rows(1, 8))).text == "every parameter has one name"


def test_mask_coverage_counts_masks_and_cut_rows():
    text = diagnostics.mask_coverage(masked()).text
    assert "each word is masked 1 times;" in text
    assert "of 12 rows 0 are cut at max_length, and 0 have no term" in text
    model, tokenizer = tiny.model("bert", "masked"), tiny.tokenizer()
    random = bound(model, objectives.MaskedLM(tokenizer, draws=2, max_length=6), mask_rounds=None)
    text = diagnostics.mask_coverage(random).text
    cut = sum(len(row["text"].split()) > 4 for row in ROWS)
    assert "each word is masked 0.3 times on average" in text
    assert f"of 12 rows {cut} are cut" in text


def test_damping_beside_the_largest_eigenvalue():
    small = masked(solver=solvers.CG(damping="auto", damping_fraction=1e-3))
    assert "0.001 of the largest eigenvalue" in diagnostics.damping(small).text
    large = masked(solver=solvers.CG(damping=1e6))
    assert "it outweighs all curvature" in diagnostics.damping(large).text
    assert "Identity has none" in diagnostics.damping(masked(solver=solvers.Identity())).text
