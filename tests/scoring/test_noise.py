"""Standard errors, reliability and probabilities of the top, on replicates whose noise is known."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.scorables import scorable
from scipy.stats import spearmanr

from hf_msif import Scores
from hf_msif.scoring.compared import FEWEST_ROWS
from hf_msif.scoring.noise import Noise, top_probabilities
from hf_msif.scoring.scorable import RowInfluence
from hf_msif.scoring.scorer import score

CORPUS = [{"example_id": f"id{i}", "text": "vote" if i % 3 else "tax", "x": float(i % 7 + 1)} for i in range(23)]
Z90 = 1.645


def replicates(rows=4000, of=2, columns=1, noise=1.0, seed=0):
    """Limits, (rows, Q), and replicates of them, (rows, R, Q): row i has the size s_i in its limit and in its noise,
    and its noise varies beside by a factor that nothing tells."""
    generator = np.random.default_rng(seed)
    size = np.exp(generator.normal(size=(rows, 1)))
    limits = size * generator.normal(size=(rows, columns)) * 10.0 ** np.arange(columns)
    spread = noise * size * np.exp(0.3 * generator.normal(size=(rows, 1))) * 10.0 ** np.arange(columns)
    return limits, limits[:, None] + spread[:, None] * generator.normal(size=(rows, of, columns)), spread


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("of", "columns"), [(2, 1), (2, 4), (3, 1), (8, 2)])
def test_intervals_of_90_percent_cover_90_percent(of, columns, noise):
    limits, influences, spread = replicates(of=of, columns=columns, noise=noise)
    errors = Noise.measured(influences[:1000]).standard_errors(influences[1000:])
    covered = abs(influences.mean(1) - limits)[1000:] <= Z90 * errors
    assert covered.mean(0) == pytest.approx(np.full(columns, 0.9), abs=0.05)
    # Large and small rows alike, of which a common standard error would cover too few and too many.
    if columns == 4:
        third = np.argsort(spread[1000:, 0]).reshape(3, -1)
        assert covered[third].mean((1, 2)) == pytest.approx(np.full(3, 0.9), abs=0.08)


def test_the_fewest_rows_that_are_compared_are_enough():
    """Over 60 draws of them; a draw of half as many covers 88 ± 5 %, sometimes 75 %."""
    covered = []
    for seed in range(60):
        limits, influences, _ = replicates(rows=FEWEST_ROWS + 2000, seed=seed)
        others = influences[FEWEST_ROWS:]
        errors = Noise.measured(influences[:FEWEST_ROWS]).standard_errors(others)
        covered.append((abs(others.mean(1) - limits[FEWEST_ROWS:]) <= Z90 * errors).mean())
    assert np.mean(covered) == pytest.approx(0.9, abs=0.015)
    assert np.std(covered) < 0.04
    assert min(covered) > 0.78


def test_a_common_scale_is_found_without_a_trend():
    generator = np.random.default_rng(1)
    influences = generator.normal(size=(3000, 2, 1))
    noise = Noise.measured(influences)
    assert noise.slope == [pytest.approx(0, abs=0.1)]
    assert noise.freedom > 10
    assert noise.standard_errors(influences).mean() == pytest.approx(0.5**0.5, rel=0.05)


def test_equal_replicates_have_no_error():
    influences = np.repeat(np.random.default_rng(0).normal(size=(40, 1, 2)), 2, axis=1)
    noise = Noise.measured(influences)
    np.testing.assert_array_equal(noise.standard_errors(influences), 0)
    assert noise.reliability == pytest.approx([1, 1])
    assert Noise.from_dict(json.loads(json.dumps(noise.to_dict()))) == noise


@pytest.mark.parametrize("of", [2, 3, 5])
def test_reliability_is_the_mean_rank_correlation_of_pairs(of):
    _, influences, _ = replicates(rows=50, of=of, columns=2)
    pairs = [(r, s) for r in range(of) for s in range(r)]
    for q, found in enumerate(Noise.measured(influences).reliability):
        expected = [spearmanr(influences[:, r, q], influences[:, s, q]).statistic for r, s in pairs]
        assert found == pytest.approx(np.mean(expected), rel=1e-12)


def test_the_reliability_of_a_mean_is_that_of_a_longer_test():
    generator = np.random.default_rng(2)
    truth = generator.normal(size=(20000, 1, 1))
    influences = truth + generator.normal(size=(20000, 8, 1))
    halves = influences.reshape(20000, 2, 4, 1).mean(2)
    one, four = Noise.measured(influences), Noise.measured(halves)
    of_four = Noise(**{**one.to_dict(), "replicates": 4}).reliability_of_mean(one.reliability[0])
    assert of_four == pytest.approx(four.reliability[0], abs=0.02)


@pytest.mark.parametrize("reliability", [-1.0, -0.45, 0.0])
def test_replicates_that_contradict_one_another_have_no_reliability(reliability):
    noise = Noise.measured(np.array([[[1.0], [3.0]], [[2.0], [2.0]], [[3.0], [1.0]]]))
    assert noise.reliability[0] == pytest.approx(-1)
    assert noise.reliability_of_mean(reliability) == 0
    assert str(noise).endswith(
        "-1.00: rank correlation of two replicates over 3 rows; 0.00 for their mean, which is ranked"
    )


def test_what_a_few_rows_say():
    noise = Noise.measured(np.array([[[1.0], [2.0]], [[3.0], [5.0]]]))
    assert "reliability unknown" in str(noise)
    assert (noise.standard_errors(np.array([[[1.0], [2.0]]])) > 0).all()


@pytest.mark.parametrize(("share", "first"), [(0.3, "THIS RANKING IS MOSTLY NOISE"), (3.0, "reliability 0.8")])
def test_an_unreliable_ranking_says_so_first(share, first):
    generator = np.random.default_rng(3)
    influences = share * generator.normal(size=(500, 1, 2)) + generator.normal(size=(500, 2, 2))
    text = str(Noise.measured(influences))
    assert text.startswith(first)
    assert "for the worst query column: rank correlation of two replicates over 500 rows" in text


# The probability of the top ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", [1, 10])
def test_top_probabilities_are_those_of_a_monte_carlo(absolute, k):
    generator = np.random.default_rng(4)
    values, errors = generator.normal(size=300), 0.05 + 0.3 * generator.random(300)
    draws = values + errors * generator.normal(size=(4000, 300))
    first = np.argsort(-(abs(draws) if absolute else draws), axis=1)[:, :k]
    expected = np.bincount(first.ravel(), minlength=300) / 4000
    found = top_probabilities(values, errors, k, absolute)
    assert found.sum() == pytest.approx(k, rel=1e-6)
    assert abs(found - expected).max() < (0.16 if k == 1 else 0.08)  # the threshold of the first varies most
    assert np.corrcoef(found, expected)[0, 1] > 0.97


def test_top_probabilities_at_the_edges():
    values = np.array([3.0, -5.0, 1.0])
    np.testing.assert_array_equal(top_probabilities(values, np.ones(3), 3), 1)
    np.testing.assert_allclose(top_probabilities(values, np.zeros(3), 1), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(top_probabilities(values, np.zeros(3), 1, absolute=True), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(top_probabilities(np.zeros(4), np.zeros(4), 1), 0.25)


# In the scores -------------------------------------------------------------------------------------------------------


X = np.array([row["x"] for row in CORPUS])
EACH = np.stack([np.stack([X, X**2], 1) + sign * np.array([0.1, 1.0]) for sign in (-1, 1)], 1)


def noisy(**changes):
    """I(x) = (x ± 0.1, x² ± 1) in two replicates."""
    by_id = {row["example_id"]: each for row, each in zip(CORPUS, EACH, strict=True)}

    def influence(batch, rows):
        each = torch.tensor(np.stack([by_id[row["example_id"]] for row in rows]))
        return RowInfluence(each.mean(1), batch["x"], torch.ones(len(rows)), each)

    noise = Noise.measured(EACH)
    return scorable(influence=influence, noise=lambda: noise, **changes)


@pytest.mark.parametrize("keep", [None, 23])
@pytest.mark.parametrize("on_disk", [False, True])
def test_every_sink_carries_the_standard_errors(on_disk, keep, tmp_path):
    settings = {"output_dir": tmp_path, "part_rows": 4} if on_disk else {}
    scores = score(noisy(identity=lambda: {"the toy": "digest"}), CORPUS, keep=keep, **settings)
    for q, shift in enumerate([0.1, 1.0]):
        expected = scores.noise.standard_errors(EACH)[:, q]
        np.testing.assert_allclose(scores.standard_error(q), expected, rtol=1e-12)
        assert (expected > shift / 2).all()
        top = scores.top(5, "harmful", q)
        assert list(top)[:6] == [
            "test",
            "example_id",
            "influence",
            "influence_se",
            "top_probability",
            "removal_effect",
        ]
        assert top.top_probability.between(0, 1).all()
        np.testing.assert_allclose(
            top.influence_se, scores.frame.set_index("example_id")[f"influence_se_{q}"][top.example_id]
        )
        helpful = scores.top(5, "helpful", q)
        assert helpful.top_probability.iloc[0] >= helpful.top_probability.iloc[-1]
    assert scores.noise.replicates == 2
    names = ["influence_0", "influence_se_0", "removal_effect_0", "influence_1", "influence_se_1", "removal_effect_1"]
    assert list(scores.frame)[-6:] == names
    scores.to_parquet(tmp_path / "again.parquet")
    again = Scores.from_parquet(tmp_path / "again.parquet")
    pd.testing.assert_frame_equal(again.top(3, query=1), scores.top(3, query=1))


def test_without_replicates_there_are_no_errors():
    scores = score(scorable(), CORPUS)
    assert scores.noise is None
    assert scores.standard_error(1) is None
    assert not {"influence_se", "top_probability"} & set(scores.top(3))


def test_a_top_of_noise_is_anyones():
    """Without signal, what is first is so by chance, and each row belongs there as likely as any other."""
    influences = np.random.default_rng(5).normal(size=(400, 2, 1))
    noise = Noise.measured(influences)
    rows = [{"example_id": i, "text": ""} for i in range(400)]
    metadata = {"noise": {**noise.to_dict(), "reliability": [0.0]}}
    mean, errors = influences.mean(1), noise.standard_errors(influences)
    scores = Scores.build(rows, mean, 1.0, {}, metadata, errors=errors)
    assert scores.top(10).top_probability.max() == pytest.approx(10 / 400, rel=1e-6)
