"""Influences by layer: against plain autograd, and their sums against the scores of rows."""

import numpy as np
import pytest
import torch
from cases import CASES, DIFFERENTIATIONS, implicit
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Stage, solvers
from hf_msif.influence.direction import Directions
from hf_msif.scoring.layer_scores import layers_of
from hf_msif.training import trajectory
from hf_msif.training.optimisers import SGD

IDENTITY = solvers.Identity()


def influences(frame, columns):
    names = ["influence"] if columns == 1 else [f"influence_{q}" for q in range(columns)]
    return frame[names].to_numpy()


def assert_shares_sum(shares, scores, columns):
    sums = shares.groupby("example_id", sort=False).sum(numeric_only=True)
    assert sums.index.tolist() == scores["example_id"].tolist()
    expected = influences(scores, columns)
    np.testing.assert_allclose(influences(sums, columns), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_layers_of_a_row_sum_to_its_influence(case, tmp_path):
    query, rows = implicit(case, tmp_path, solver=IDENTITY).query(case.rows(3, seed=9)), case.rows(5, seed=6)
    shares, scores = query.layer_scores(rows), query.score(rows).frame
    assert_shares_sum(shares, scores, 3)
    one = query.layer_scores(rows, query=1)
    np.testing.assert_allclose(one["influence"], shares["influence_1"], rtol=1e-9, atol=1e-12)


def test_a_layer_is_minus_u_times_the_gradient_in_its_parameters():
    """By plain autograd."""
    model, objective = tiny.model("bert", "masked", layers=2), tiny.objective("masked").for_influence()
    stage = Stage("only", model, objective, tiny.rows(4), solver=IDENTITY)
    query = MultiStageInfluence([stage], progress=False).query(tiny.rows(2, seed=3))
    (row,) = tiny.rows(1, seed=5, shortest=4)
    shares = query.layer_scores([row])
    u = {name: t.cpu() for name, t in query.solutions["only"].tensors().items()}
    plain = tiny.Plain(model, "masked", objective.collate([row]))
    logits, targets, _ = plain.scored()
    losses = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    gradient = plain.gradient(list(u), of=losses.sum() / objective.inputs_per_row)
    expected = {}
    for name, g in gradient.items():
        layer = next(key for key in ("encoder.layer.0", "encoder.layer.1", "embeddings", "cls") if f"{key}." in name)
        products = np.array([-float((u[name][q] * g).sum()) for q in range(2)])
        expected[layer] = expected.get(layer, 0) + products
    assert set(shares["layer"]) == set(expected)
    np.testing.assert_allclose(influences(shares, 2), [expected[layer] for layer in shares["layer"]], rtol=1e-9)


def assert_shares_sum_for_each_column(query, rows):
    scores = query.score(rows)
    assert_shares_sum(query.layer_scores(rows), scores.frame, 2)
    terms = query.token_scores(rows, query=1).groupby("example_id", sort=False)["influence"].sum()
    np.testing.assert_allclose(terms, scores.influence(1), rtol=1e-8)


def test_of_replicates_they_sum_to_the_mean():
    stage = Stage("only", tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(8), solver=IDENTITY)
    query = MultiStageInfluence([stage], progress=False).query(tiny.rows(2, seed=3), replicates=2)
    assert_shares_sum_for_each_column(query, tiny.rows(4, seed=5, shortest=3))


def test_of_segments_they_sum_over_the_segments():
    case = CASES[-1]
    models = [case.model(), case.model()]
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter *= 0.9
    given = trajectory.of_models(models, [2, 6], [0.1] * 8, SGD())
    stage = Stage(
        "only", models[1], case.objective(), case.rows(7), link="segments", checkpoints=given, solver=solvers.Auto()
    )
    query = MultiStageInfluence([stage], progress=False).query(case.rows(2, seed=9))
    assert isinstance(query.solutions["only"], Directions)
    assert_shares_sum_for_each_column(query, case.rows(4, seed=6))


def test_with_more_rounds_of_masks_they_are_shares_of_those_scores():
    stage = Stage("only", tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(4), solver=IDENTITY)
    query = MultiStageInfluence([stage], progress=False).query(tiny.rows(1, seed=3))
    rows = tiny.rows(5, seed=4, longest=17, shortest=12)  # folds of several tokens
    scores = query.score(rows, mask_rounds=2)
    assert scores.metadata["mask_rounds"] == 2
    assert np.abs(scores.influence() - query.score(rows).influence()).max() > 1e-6
    assert_shares_sum(query.layer_scores(rows, mask_rounds=2), scores.frame, 1)
    terms = query.token_scores(rows, mask_rounds=2).groupby("example_id", sort=False)["influence"].sum()
    np.testing.assert_allclose(terms, scores.influence(), rtol=1e-9)


def test_refusals(tmp_path):
    case = CASES[-1]
    query = DIFFERENTIATIONS["implicit"](case, tmp_path / "implicit").query(case.rows(2, seed=9))
    with pytest.raises(InputError, match="query column 2 does not exist; this query has 2"):
        query.layer_scores(case.rows(1), query=2)
    unrolled = DIFFERENTIATIONS["unrolled"](case, tmp_path / "unrolled").query(case.rows(1, seed=9))
    with pytest.raises(InputError, match=r"link='unrolled', whose rows are not scored by derivatives"):
        unrolled.layer_scores(case.rows(2))


@pytest.mark.parametrize(
    ("name", "prefix", "layer"),
    [
        ("bert.encoder.layer.11.output.dense.weight", "bert", "encoder.layer.11"),
        ("cls.predictions.bias", "bert", "cls"),
        ("transformer.h.0.mlp.c_fc.weight", "transformer", "h.0"),
        ("lm_head.weight", "transformer", "lm_head"),
        ("base_model.model.bert.encoder.layer.1.query.lora_A.default.weight", "bert", "encoder.layer.1"),
        ("model.encoder.layers.2.fc1.weight", "model", "encoder.layers.2"),
        ("layer1.weight", "", "layer1"),
        ("features.0", "", "features.0"),
    ],
)
def test_names_of_layers(name, prefix, layer):
    assert layers_of([name], prefix) == {layer: (name,)}
