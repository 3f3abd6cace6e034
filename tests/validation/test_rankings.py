"""The loss without the first rows of a ranking, and recall of planted rows, against arithmetic by hand."""

import json
import math

import numpy as np
import pytest

from hf_msif import InputError, validation
from hf_msif.validation import Bank, ExpectedTruth, PlantedRecall, loss_difference, planted_recall, remove_top
from hf_msif.validation.experiments import random_omissions

RNG = np.random.default_rng(7)
ROWS, TESTS = 60, 3
C = RNG.standard_normal((ROWS, TESTS))


def bank(c=C, noise=0.0):
    """Losses 3 + Σ_omitted c, with noise of each start."""

    def retrain(omit, seed):
        of_start = noise * np.random.default_rng(seed).standard_normal(c.shape)
        return 3 + seed + (c + of_start)[sorted(omit)].sum(0)

    return Bank(retrain, progress=False)


def test_the_query_loss_difference_by_hand():
    other = RNG.standard_normal(C.shape)
    found = remove_top(bank(), C, range(ROWS), fraction=0.05, draws=8, seed=4, baselines={"other": other})
    random = np.array([C[o].sum(0) for o in random_omissions(range(ROWS), 8, 0.95, 4)])
    for name, effects in (("influence", C), ("other", other)):
        first = [np.argsort(-effects[:, q])[:3] for q in range(TESTS)]
        assert found.first[name] == [list(places) for places in first]
        losses = [C[places, q].sum() for q, places in enumerate(first)]
        each = np.mean(losses) - random.mean(1)
        d = found.differences[name]
        np.testing.assert_allclose([d.difference, d.above], [each.mean(), (each > 0).mean()], rtol=1e-12)
        np.testing.assert_allclose(d.interval, each.mean() + 1.96 * np.array([-1, 1]) * each.std() / 8**0.5, atol=0.15)
        assert d.interval[0] < d.difference < d.interval[1]
    assert found.differences["influence"].difference > found.differences["other"].difference
    assert found.settings["removed"] == 3


def test_methods_share_retrainings_and_draws_can_grow():
    shared = bank()
    remove_top(shared, C, range(ROWS), fraction=0.05, draws=4, baselines={"same": 2 * C})
    assert shared.computed == 1 + 4 + TESTS
    remove_top(shared, C, range(ROWS), fraction=0.05, draws=6)
    assert shared.computed == 1 + 6 + TESTS


def test_one_set_for_all_tests():
    found = remove_top(bank(), C, range(ROWS), fraction=0.05, draws=4, aggregate="sum")
    first = np.argsort(-C.sum(1))[:3]
    assert found.first["influence"] == [list(first)]
    np.testing.assert_allclose(found.measured["influence"], C[first].sum())
    assert found.random.shape == (4, 1)


def test_the_first_rows_in_expectation():
    truth = ExpectedTruth(40)
    found = remove_top(bank(noise=0.2), C, range(ROWS), fraction=0.05, draws=4, truth=truth)
    own = remove_top(bank(), C, range(ROWS), fraction=0.05, draws=4)
    np.testing.assert_allclose(found.measured["influence"], own.measured["influence"], atol=0.25)
    assert found.settings["truth"] == "expected"
    assert "mean of retrainings from 40 other starts" in str(found)


def test_a_result_speaks_json_tables_and_prose(tmp_path):
    found = remove_top(bank(), C, range(ROWS), draws=5, baselines={"random": RNG.standard_normal(C.shape)})
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["difference"] > plain["random"]["difference"]
    assert plain["draws"] == 5
    assert found.table["method"].tolist() == ["influence", "random"]
    assert len(found.removals) == 2 * TESTS + 5
    assert all(words in str(found) for words in ("query loss difference", "5 draws", "without the 1 rows (1.00%)"))
    assert len(found.plot(tmp_path / "top.png").axes) == 1
    assert (tmp_path / "top.png").stat().st_size > 2000


MESSAGES = {
    "fraction": ({"fraction": 5}, "fraction is 5"),
    "draws": ({"draws": 1}, "R ≥ 2 draws"),
    "columns": ({"predicted": C[:, :2]}, "methods have 2 test columns, but the bank measures 3"),
    "a baseline's columns": ({"baselines": {"other": C[:, :2]}}, r"have \[2, 3\] test columns"),
}


@pytest.mark.parametrize(("settings", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages_of_removing_the_first(settings, message):
    with pytest.raises(InputError, match=message):
        remove_top(bank(), **{"predicted": C, "ids": range(ROWS), **settings})


def test_a_loss_difference_wants_finite_losses():
    with pytest.raises(InputError, match="not finite"):
        loss_difference([math.nan], [[1.0], [2.0]])


# Planted rows -------------------------------------------------------------------------------------------------------


def test_recall_by_hand():
    planted = [{1, 5, 9}, {2, 3}, {0, 10, 20, 30}]
    for by, sign in (("helpful", 1), ("harmful", -1), ("absolute", None)):
        found = planted_recall(C, planted, range(ROWS), k=(5, 20, ROWS), by=by)
        values = np.abs(C) if sign is None else sign * C
        for place, k in enumerate((5, 20, ROWS)):
            shares = [len(set(np.argsort(-values[:, q])[:k]) & planted[q]) / len(planted[q]) for q in range(TESTS)]
            np.testing.assert_allclose(found.units["influence"][:, place], shares, rtol=1e-12)
            assert found.recalls["influence"].recall[place] == pytest.approx(np.mean(shares))
    assert found.recalls["influence"].recall[-1] == 1.0


def test_chance_is_what_random_orders_have():
    orders = RNG.standard_normal((ROWS, 4000))
    found = planted_recall(orders, set(range(7)), range(ROWS), k=(6, 30), resamples=200).recalls["influence"]
    np.testing.assert_allclose(found.recall, found.chance, atol=0.01)
    assert found.chance == (0.1, 0.5)
    for (low, high), chance in zip(found.interval, found.chance, strict=True):
        assert low < chance < high
        assert high - low < 0.02


def test_baselines_are_treated_alike():
    planted = {3, 4, 5}
    best = np.isin(np.arange(ROWS), list(planted)).astype(float)[:, None] * np.ones(TESTS)
    found = planted_recall(C, planted, range(ROWS), k=(3, 6), baselines={"best": best, "worst": -best})
    assert found.recalls["best"].recall == (1.0, 1.0)
    assert found.recalls["worst"].recall == (0.0, 0.0)
    assert found.recalls["best"].interval == ((1.0, 1.0), (1.0, 1.0))
    assert json.loads(json.dumps(found.to_dict()))["best"]["recall"] == [1.0, 1.0]
    assert all(words in str(found) for words in ("3 tests", "first 6", "(chance)", "0.050"))
    assert len(found.table) == 3 * 2


def test_recall_over_seeds():
    results = [planted_recall(RNG.standard_normal((ROWS, 2)), {1, 2, 3}, range(ROWS), k=(10, 30)) for _ in range(5)]
    found = PlantedRecall.over(results)
    means = np.array([r.units["influence"].mean(0) for r in results])
    np.testing.assert_allclose(found.recalls["influence"].recall, means.mean(0))
    assert (found.recalls["influence"].units, found.recalls["influence"].of) == (5, "seeds")
    assert "5 seeds" in str(found)
    with pytest.raises(InputError, match="expected the same methods and k"):
        PlantedRecall.over([results[0], planted_recall(C, {1}, range(ROWS), k=(10,))])


def test_one_test_has_no_interval():
    found = planted_recall(C[:, :1], {1}, range(ROWS), k=(5,)).recalls["influence"]
    assert all(math.isnan(end) for end in found.interval[0])


WRONG = {
    "an id without a row": ({"planted": {99}}, "planted holds 99"),
    "none": ({"planted": set()}, "planted is empty"),
    "another number": ({"planted": [{1}, {2}]}, "2 sets of planted ids"),
    "k": ({"k": (0, 5)}, "from 1 to the number of rows, 60"),
    "by": ({"by": "good"}, "by is 'good'"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_messages_of_recall(settings, message):
    with pytest.raises(InputError, match=message):
        validation.planted_recall(**{"predicted": C, "planted": {1}, "ids": range(ROWS), "k": (5,), **settings})
