"""Metasmoothness of runs against the same runs written out, and on runs that are smooth and that are not."""

import json

import numpy as np
import pytest
import torch
from helpers.runs import MINIMUM, RUN, TESTS, Mixed, Run
from helpers.toy import toy_rows

from hf_msif import InputError
from hf_msif.training.record import rerun
from hf_msif.training.recording import Recording
from hf_msif.validation import WarmStart, metasmoothness

GENTLE = (Run, "all", {"momentum": 0.5, "rate": 0.05})
STEEP = (Run, "all", {"momentum": 0.9, "rate": 12.0, "epochs": 20})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return Mixed([RUN, (Run, "head", {"momentum": 0.5})], tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def gentle(tmp_path_factory):
    return Mixed([GENTLE, GENTLE], tmp_path_factory.mktemp("gentle"))


def retrain(mixed, stage="stage0"):
    return WarmStart([bound.stage for bound in mixed.chain.stages], toy_rows(9, 2), stage=stage)


@pytest.mark.parametrize("stage", [0, 1])
def test_it_is_the_formula_on_runs_written_out(mixed, stage):
    step, rows = 0.1, mixed.kinds[stage].rows
    found = metasmoothness(retrain(mixed, f"stage{stage}"), step=step, seed=3)
    v = np.random.default_rng(3).choice([-1.0, 1.0], size=len(rows))
    y = [mixed.losses(stage, torch.from_numpy(1 + t * step * v)).numpy() for t in range(3)]
    first, second = y[1] - y[0], y[2] - y[1]
    assert found.losses == pytest.approx(
        (np.abs(first) * np.sign(first) * np.sign(second)).sum() / np.abs(first).sum()
    )
    a, b = (3 * first - second) / 2, (second - first) / 2  # y − y(1) = a t + b t² in units of h
    np.testing.assert_allclose([a + b, 2 * a + 4 * b], [first, first + second])
    expected = np.linalg.norm(4 * b) / np.linalg.norm(2 * a)
    assert found.second_order == pytest.approx(expected, rel=1e-5)
    assert found.stage == f"stage{stage}"


def test_a_gentle_run_is_smooth_and_its_prediction_errs_to_second_order(gentle):
    rows = gentle.kinds[0].rows
    effects = gentle.chain.query(toy_rows(9, 2)).score(rows).removal_effects()
    found = metasmoothness(retrain(gentle), effects, range(len(rows)), step=0.02, directions=2)
    assert found.smooth
    assert found.losses > 0.99
    near, far = found.first_order_error
    assert near < far < 0.2
    assert far == pytest.approx(2 * near, rel=0.1)  # the error of a first-order prediction is of second order
    assert far == pytest.approx(found.second_order, rel=0.2)
    wrong = metasmoothness(retrain(gentle), -effects, range(len(rows)), step=0.02).first_order_error
    np.testing.assert_allclose(wrong, 2, rtol=0.1)
    assert json.loads(json.dumps(found.to_dict()))["smooth"] is True
    assert "error of the prediction" in str(found)
    assert "try" not in str(found)


def test_a_steep_run_is_not(tmp_path):
    found = metasmoothness(retrain(Mixed([STEEP], tmp_path)), directions=2)
    assert not found.smooth
    assert min(found.losses, found.parameters) < 0.9
    assert "not smooth enough" in str(found)
    assert "smaller learning rate" in str(found)


def test_only_predicted_rows_are_weighted(gentle):
    rows = gentle.kinds[0].rows
    scores = gentle.chain.query(toy_rows(9, 2), "sum").score(rows[3:9])
    found = metasmoothness(retrain(gentle), scores, step=0.02, aggregate="sum")
    assert found.first_order_error[0] < 0.1


def test_weights_of_one_and_nought_are_an_omission(mixed, tmp_path):
    start = retrain(mixed)
    weights = torch.ones(len(mixed.kinds[0].rows), dtype=torch.float64)
    weights[4] = 0
    assert start.measured(*start.again(weights=weights)).losses == start(frozenset([4])).losses
    assert start.measured(*start.again(weights=torch.ones_like(weights))).losses == start(frozenset()).losses
    kind, recording = mixed.kinds[0], Recording.from_pretrained(mixed.chain.stages[0].stage.run)
    with pytest.raises(InputError, match=r"one per row, \(24,\)"):
        rerun(recording, mixed.models[0], start.stages[0].objective, kind.rows, weights=weights[1:])


WRONG = {
    "a step": ({"step": 0.6}, "step is 0.6"),
    "no direction": ({"directions": 0}, "directions 0"),
    "a row": ({"predicted": np.ones((1, len(TESTS))), "ids": [99]}, "has the example_id 99"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_messages(mixed, settings, message):
    with pytest.raises(InputError, match=message):
        metasmoothness(retrain(mixed), **settings)


def test_a_polished_stage_has_no_run(tmp_path):
    chain = Mixed([MINIMUM, RUN], tmp_path)
    with pytest.raises(InputError, match="is polished, and only a run is repeated"):
        metasmoothness(retrain(chain))
