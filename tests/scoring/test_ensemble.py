"""The mean of several rankings: its numbers, its error bars, and what cannot be put together."""

import numpy as np
import pytest

from hf_msif import InputError, Scores, scoring
from hf_msif.scoring.noise import Noise

ROWS = [{"example_id": i, "text": f"sentence {i % 30}"} for i in range(60)]
TESTS = [{"example_id": 0, "text": "vote"}, {"example_id": 1, "text": "tax"}]


def ranking(seed, rows=ROWS, count=8.0, noise=1.0, stage="pretraining", tests=TESTS, **columns):
    truth = np.random.default_rng(0).normal(size=(len(rows), len(tests)))
    influence = truth + noise * np.random.default_rng(seed).normal(size=truth.shape)
    solve = {"solver": "cg", "residual": [seed * 1e-3] * len(tests)}
    certificate = {"aggregate": None, "losses": [float(seed), 1.0][: len(tests)], "stages": {stage: {"solve": solve}}}
    facts = {"stage": stage, "N": count, "tests": tests, "certificate": certificate, "noise_text": f"own {seed}"}
    columns = {"loss": np.full(len(rows), float(seed)), "terms": np.ones(len(rows)), **columns}
    return Scores.build(rows, influence, count, columns, facts, errors=np.ones_like(influence))


def test_every_number_is_the_mean_and_the_scatter_gives_the_error_bars():
    each = [ranking(seed) for seed in (1, 2, 4)]
    found = scoring.mean(each)
    influences = np.stack([scores.influences() for scores in each], 1)
    np.testing.assert_allclose(found.influences(), influences.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.removal_effects(), -influences.mean(1) / 8, rtol=1e-12)
    errors = np.stack([found.standard_error(q) for q in range(2)], 1)
    np.testing.assert_allclose(errors, Noise.measured(influences).standard_errors(influences), rtol=1e-12)
    assert found.noise.replicates == 3
    assert found.metadata["noise_text"].startswith("mean of 3 rankings")
    assert set(found.frame["loss"]) == {7 / 3}
    assert set(found.frame["duplicates"]) == {2}
    assert list(found.frame) == list(each[0].frame)
    assert found.metadata["certificate"]["losses"] == [7 / 3, 1.0]
    stages = found.metadata["certificate"]["stages"]
    assert {name: stage["solve"]["residual"][0] for name, stage in stages.items()} == {
        f"pretraining of ranking {number}": seed * 1e-3 for number, seed in enumerate((1, 2, 4))
    }
    assert "top_probability" in found.top(5, query=1)
    # The rankings that went in are as they were.
    assert each[0].metadata["noise_text"] == "own 1"
    assert set(each[0].frame["influence_se_0"]) == {1.0}


def test_the_mean_of_many_is_nearer_to_what_they_share():
    truth = np.random.default_rng(0).normal(size=(60, 2))
    mean = scoring.mean([ranking(seed) for seed in range(1, 9)])
    one = ranking(1)
    error, alone = (np.sqrt(((scores.influences() - truth) ** 2).mean()) for scores in (mean, one))
    assert error < alone / 2
    # ± 1.645 se covers what they share in nine cases of ten.
    misses = np.abs(mean.influences() - truth) > 1.645 * np.stack([mean.standard_error(q) for q in range(2)], 1)
    assert 0.03 < misses.mean() < 0.2


def test_norms_are_kept_where_all_rankings_have_them():
    norms = np.arange(1.0, 61.0)
    both = scoring.mean([ranking(1, gradient_norm=norms), ranking(2, gradient_norm=3 * norms)])
    np.testing.assert_allclose(both.relative(0), both.influence(0) / (2 * norms))
    one = scoring.mean([ranking(1, gradient_norm=norms), ranking(2)])
    with pytest.raises(InputError, match="no column gradient_norm"):
        one.relative(0)


def test_a_mean_is_written_and_read(tmp_path):
    found = scoring.mean([ranking(1), ranking(2)])
    found.to_parquet(tmp_path / "scores.parquet")
    read = Scores.from_parquet(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(read.influences(), found.influences())
    assert read.noise == found.noise
    # A mean read from a file goes into another mean: its tests are equal although JSON has been between.
    assert len(scoring.mean([read, ranking(3)])) == 60


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: ranking(2, rows=ROWS[::-1]), "rows of ranking 1 are not those"),
        (lambda: ranking(2, rows=ROWS[:-1]), "rows of ranking 1 are not those"),
        (lambda: ranking(2, stage="finetuning"), "'finetuning'"),
        (lambda: ranking(2, tests=TESTS[::-1]), "'tax', 'vote'"),
        (lambda: ranking(2, count=9.0), "N is 9"),
        (lambda: ranking(1), "ranking 1 has the influences of ranking 0"),
    ],
)
def test_what_cannot_be_put_together_is_refused(other, message):
    with pytest.raises(InputError, match=message):
        scoring.mean([ranking(1), other()])


def test_sums_and_means_over_tests_are_not_put_together():
    each = [ranking(seed) for seed in (1, 2)]
    each[1].metadata["certificate"]["aggregate"] = "sum"
    with pytest.raises(InputError, match="with aggregate='sum', ranking 0"):
        scoring.mean(each)


def test_one_ranking_or_extreme_rows_are_refused():
    with pytest.raises(InputError, match="at least two"):
        scoring.mean([ranking(1)])
    kept = ranking(2)
    kept.metadata["kept"] = {"keep": 3}
    with pytest.raises(InputError, match="without keep"):
        scoring.mean([ranking(1), kept])
