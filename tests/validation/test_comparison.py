"""Two sets of scores side by side: means, their ratio, its interval, and the agreement of rankings."""

import numpy as np
import pytest

from hf_msif.errors import InputError
from hf_msif.scoring.scores import Scores
from hf_msif.validation.comparison import compare


def scores(influence, prefix="row"):
    influence = np.asarray(influence, dtype=float)
    influence = influence.reshape(len(influence), -1)
    rows = [{"example_id": i, "text": f"{prefix} {i}"} for i in range(len(influence))]
    plain = {"loss": [1.0] * len(rows), "terms": [1.0] * len(rows)}
    return Scores.build(rows, influence, len(rows), plain, {"tests": []})


def test_means_are_over_rows_and_columns_and_signs_do_not_count():
    comparison = compare(scores([[1, -2], [-3, 4]]), scores([[2, 2], [-1, -1]], "other"), resamples=50)
    assert comparison.mean_absolute == (2.5, 1.5)
    assert comparison.ratio == pytest.approx(5 / 3)
    assert comparison.shared == 0
    assert np.isnan(comparison.signed_r)
    assert np.isnan(comparison.spearman_r)


def test_the_interval_covers_the_true_ratio():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        # Columns differ in size, so that rows alone would give far too narrow an interval.
        first, second = (generator.exponential(1, (200, 12)) * generator.exponential(s, 12) for s in (2.0, 1.0))
        comparison = compare(scores(first), scores(second, "other"), resamples=200)
        covered += comparison.ratio_interval[0] < 2.0 < comparison.ratio_interval[1]
    assert covered >= 48  # 95 % are meant; a bootstrap of twelve columns gives somewhat less


def test_agreement_is_over_the_rows_that_both_have():
    first, second = scores([5, 4, 3, 2, 1]), scores([50, 40, 30, 20, 10, 60])
    comparison = compare(first, second, k=2, resamples=20)
    assert (comparison.shared, comparison.spearman_r, comparison.top_k_shared) == (5, pytest.approx(1), 1)
    comparison = compare(first, scores([1, 2, 3, 4, 5]), k=2, resamples=20)
    assert (comparison.spearman_r, comparison.top_k_shared) == (pytest.approx(-1), 0)


def test_signed_influences_are_related_test_by_test():
    first, second = scores([[1, 4], [-2, 5], [3, 6]]), scores([[10, -4], [-20, -5], [30, -6]])
    assert compare(first, second, resamples=20).signed_r == pytest.approx((1 - 1) / 2)
    assert compare(first, first, resamples=20).signed_r == pytest.approx(1)
    second.metadata["tests"] = [{"text": "another"}, {"text": "and one more"}]
    assert np.isnan(compare(first, second, resamples=20).signed_r)


def test_influences_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="not finite"):
        compare(scores([1, np.nan]), scores([1, 2]))


def test_kept_extremes_are_no_corpus():
    whole, extremes = scores(np.ones((4, 1))), scores(np.ones((4, 1)))
    extremes.metadata["kept"] = {"keep": 1}
    with pytest.raises(InputError, match="of which only the extremes were kept"):
        compare(whole, extremes)
