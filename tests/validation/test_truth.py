"""The two truths: closed forms of signal and noise, retrainings that both share, other starts of real trainings."""

import itertools
import json

import numpy as np
import pytest
from helpers.runs import MINIMUM, RUN, Mixed, Run
from helpers.toy import example_losses, toy, toy_rows

from hf_msif import InputError, validation
from hf_msif.validation import Bank, ExpectedTruth, FromScratch, OwnTruth, WarmStart, correlation
from hf_msif.validation.measures import spearman_brown, split_half

RNG = np.random.default_rng(3)


class Starts:
    """What examples do in expectation, c, and as much again under each start: losses = 3 + Σ_omitted (c + noise)."""

    settings = {"truth": "starts"}  # noqa: RUF012

    def __init__(self, c, noise=1.0, dies_after=None):
        self.c, self.noise, self.dies_after, self.calls = c, noise, dies_after, []

    def of(self, seed):
        return self.c + self.noise * np.random.default_rng(seed).standard_normal(self.c.shape)

    def __call__(self, omit, seed):
        if len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        self.calls.append((omit, seed))
        return 3 + seed + self.of(seed)[sorted(omit)].sum(0)


# Halves -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 4, 5, 8])
def test_split_half_is_the_mean_over_all_ways_to_halve(number):
    effects, size = RNG.standard_normal((number, 30, 2)) + RNG.standard_normal((30, 2)), number // 2
    ways = {
        frozenset([first, second])
        for first in itertools.combinations(range(number), size)
        for second in itertools.combinations(range(number), size)
        if not set(first) & set(second)
    }
    agreements = [correlation(*(effects[list(half)].mean(0) for half in way), resamples=2) for way in ways]
    found = split_half(effects, resamples=2)
    for name in ("pearson_r", "spearman_r"):
        assert getattr(found, name) == pytest.approx(np.mean([getattr(a, name) for a in agreements]), rel=1e-12)
    assert (found.n, found.columns) == (30, 2)


def test_many_starts_are_halved_at_random():
    effects = RNG.standard_normal((12, 40, 1)) + RNG.standard_normal((40, 1))
    one, again, other = (split_half(effects, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert one.pearson_r == pytest.approx(other.pearson_r, abs=0.05)
    assert one.pearson_interval[0] < one.pearson_r < one.pearson_interval[1]


def test_spearman_brown_takes_halves_to_the_whole():
    """Signal of variance 1 and errors of variance 2 in each of K = 8: 1/(1 + 2/4) for halves, 1/(1 + 2/8) for all."""
    effects = RNG.standard_normal((4000, 1)) + np.sqrt(2) * RNG.standard_normal((8, 4000, 1))
    halves = split_half(effects, resamples=20)
    whole = spearman_brown(halves, 2)
    assert halves.pearson_r == pytest.approx(1 / 1.5, abs=0.02)
    assert whole.pearson_r == pytest.approx(1 / 1.25, abs=0.02)
    assert whole.slope == pytest.approx(1 / 1.25, abs=0.02)
    assert whole.pearson_interval[0] < whole.pearson_r < whole.pearson_interval[1]
    noise = split_half([[1.0, 2, 3], [3, 2, 1]], resamples=2)
    assert noise.pearson_r == pytest.approx(-1) == spearman_brown(noise, 2).pearson_r


@pytest.mark.parametrize("effects", [np.zeros((1, 5)), np.zeros(5)])
def test_one_repetition_has_no_halves(effects):
    with pytest.raises(InputError, match="K ≥ 2 repetitions"):
        split_half(effects)


# The expected truth -------------------------------------------------------------------------------------------------


def test_the_expected_truth_is_the_mean_over_starts_and_its_ceiling_its_reliability():
    c = RNG.standard_normal((400, 1))
    truth, bank = ExpectedTruth(8), Bank(Starts(c, noise=2.0), progress=False)
    own = c + 2 * RNG.standard_normal(c.shape)
    found = validation.leave_one_out(
        bank, c, range(400), 400, baselines={"own": own}, truth=truth, aggregate=None, resamples=50
    )
    expected = np.mean([bank.retrain.of(seed) for seed in truth.seeds], axis=0)
    order = found.labels
    np.testing.assert_allclose(found.measured, expected[order], atol=1e-9)
    assert found.measurement.by_start.shape == (8, 400, 1)
    reliability = 1 / (1 + 4 / 8)
    assert found.ceiling.pearson_r == pytest.approx(reliability, abs=0.07)
    assert found.measurement.halves.pearson_r == pytest.approx(1 / (1 + 4 / 4), abs=0.09)
    # A prediction of the expectation itself passes the ceiling, up to its square root; what one run does stays below.
    assert found.correlations["influence"].pearson_r == pytest.approx(np.sqrt(reliability), abs=0.05)
    assert found.correlations["own"].pearson_r == pytest.approx(np.sqrt(reliability / 5), abs=0.09)
    error = found.removals["standard_error"]
    assert np.sqrt((error**2).mean()) == pytest.approx(2 / np.sqrt(8), rel=0.1)


def test_the_expected_truth_speaks_json_and_prose():
    c = RNG.standard_normal((12, 2))
    bank = Bank(Starts(c), progress=False)
    found = validation.datamodelling_score(bank, c, range(12), subsets=6, truth=ExpectedTruth(4), resamples=20)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["settings"]["truth"] == "expected"
    assert plain["settings"]["starts"] == [1000, 1001, 1002, 1003]
    assert plain["halves"]["spearman_r"] <= plain["ceiling"]["spearman_r"]
    assert all(words in str(found) for words in ("mean of retrainings from 4 other starts", "(ceiling)", "(halves)"))
    own = validation.datamodelling_score(bank, c, range(12), subsets=6, resamples=20)
    assert own.to_dict()["settings"]["truth"] == "own"
    assert "halves" not in own.to_dict()
    assert "against the run's own retraining" in str(own)


def test_more_starts_go_on_and_truths_share_retrainings(tmp_path):
    c = RNG.standard_normal((5, 1))
    sets = [{i} for i in range(5)]
    killed = Starts(c, dies_after=8)
    with pytest.raises(KeyboardInterrupt):
        ExpectedTruth(3).effects(Bank(killed, tmp_path, progress=False), sets, None)
    again = Starts(c)
    bank = Bank(again, tmp_path, progress=False)
    ExpectedTruth(3).effects(bank, sets, None)
    assert len(again.calls) == 3 * 6 - 8
    grown = ExpectedTruth(5).effects(bank, sets, None)
    assert len(again.calls) == 5 * 6 - 8
    np.testing.assert_allclose(grown, np.mean([again.of(1000 + k) for k in range(5)], axis=0), atol=1e-9)
    OwnTruth((1002,), (1004,)).measure(bank, sets, None, 10)
    assert len(again.calls) == 5 * 6 - 8


@pytest.mark.parametrize("starts", [1, 0, [4], [4, 4, 5]])
def test_two_different_starts_are_the_fewest(starts):
    with pytest.raises(InputError, match="at least two starts"):
        ExpectedTruth(starts)


def test_an_own_truth_has_two_measurements():
    with pytest.raises(InputError, match="overlap"):
        OwnTruth((0, 1), (1, 2))
    with pytest.raises(InputError, match="overlap, or seeds are none"):
        OwnTruth(())


# Other starts of trainings ------------------------------------------------------------------------------------------


def test_a_warm_start_has_no_other_start(tmp_path):
    mixed = Mixed([RUN, MINIMUM], tmp_path)
    bank = Bank(WarmStart([bound.stage for bound in mixed.chain.stages], toy_rows(9, 2)), progress=False)
    with pytest.raises(InputError, match="there is no other start"):
        ExpectedTruth().effects(bank, [{0}], None)
    assert bank.computed == 0


def scratch(mixed, folder, make=lambda seed: [toy(seed), toy(seed + 1)], **settings):
    arguments = [kind.arguments(folder) if isinstance(kind, Run) else None for kind in mixed.kinds]
    for given in arguments:
        if given is not None:
            given.save_strategy = "no"
    stages = [bound.stage for bound in mixed.chain.stages]
    return FromScratch(stages, toy_rows(9, 2), make, arguments, start=5, **settings)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return Mixed([RUN, (Run, "head", {"momentum": 0.5})], tmp_path_factory.mktemp("runs"))


def test_what_a_start_varies(mixed, tmp_path):
    losses = {
        vary: [scratch(mixed, tmp_path, vary=vary)(frozenset(), seed).losses for seed in (5, 6)]
        for vary in (("weights",), ("order",), ("weights", "order"))
    }
    own = {tuple(pair[0]) for pair in losses.values()}
    assert len(own) == 1  # the run's own start is the same
    assert len({tuple(pair[1]) for pair in losses.values()} | own) == 4
    # The own order with other weights, by hand.
    kinds, model = mixed.kinds, toy(6)
    end = kinds[0].end(model, {n: p.detach() for n, p in model.named_parameters()})
    after = toy(7)
    start = {
        n: end.get(n, p.detach()) if n.startswith("encoder.") else p.detach() for n, p in after.named_parameters()
    }
    end = kinds[1].end(after, start)
    expected = example_losses(after, end, toy_rows(9, 2))[0].tolist()
    np.testing.assert_allclose(losses[("weights",)][1], expected, rtol=1e-9)


def test_what_starts_vary_is_a_part_of_the_settings(mixed, tmp_path):
    one, same, other = (
        Bank(scratch(mixed, tmp_path, vary=v)).fingerprint
        for v in (("weights", "order"), ("order", "weights"), ("weights",))
    )
    assert one == same != other


def test_given_weights_have_no_other_start(mixed, tmp_path):
    given = lambda seed: [toy(3), toy(seed)]  # noqa: E731
    bank = Bank(scratch(mixed, tmp_path, given), progress=False)
    with pytest.raises(InputError, match="stage 'stage0' starts from the same weights under every seed"):
        ExpectedTruth(2).effects(bank, [{0}], None)
    assert bank.computed == 0
    later = Bank(scratch(mixed, tmp_path, given, stage="stage1"), progress=False)
    assert np.isfinite(ExpectedTruth(2).effects(later, [{0}], None)).all()  # its head is drawn anew
    reordered = Bank(scratch(mixed, tmp_path, given, vary=("order",)), progress=False)
    by_start = ExpectedTruth(2).by_start(reordered, [{0}, {1}], None)
    assert np.abs(by_start[0] - by_start[1]).max() > 1e-6


@pytest.mark.parametrize("starts", [[5, 6], [-1, 6]])
def test_the_own_start_is_no_other_start(mixed, tmp_path, starts):
    with pytest.raises(InputError, match="the run's own start"):
        ExpectedTruth(starts).effects(Bank(scratch(mixed, tmp_path), progress=False), [{0}], None)


def test_a_start_must_vary_something(mixed, tmp_path):
    for vary in ((), ("masks",)):
        with pytest.raises(InputError, match="expected one or both of weights, order"):
            scratch(mixed, tmp_path, vary=vary)


def test_trainings_that_all_end_alike_are_refused():
    bank = Bank(lambda omit, seed: [float(len(omit))], progress=False)
    with pytest.raises(InputError, match="the same losses under the seeds 1000 and 1001"):
        ExpectedTruth().effects(bank, [{0}], None)
    assert bank.computed == 2
