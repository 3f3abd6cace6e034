"""Rounds of masks: scores are their means, their noise is what is measured, and a shortlist of few has its recall."""

import re
import warnings

import numpy as np
import pytest
import torch
from cases import CASES, DIFFERENTIATIONS
from helpers import tiny
from helpers.scorables import scorable

from hf_msif import InputError, MultiStageInfluence, Scores, Stage, objectives, solvers
from hf_msif.scoring.mask_noise import MOST_ROUNDS, TARGET, MaskNoise
from hf_msif.scoring.scorable import RowInfluence

CORPUS = tiny.rows(24, seed=1, longest=9)
TESTS = tiny.rows(2, seed=3)
IDENTITY = solvers.Identity()


def query(task="masked", architecture="bert", settings=(), **stage):
    model, objective = tiny.model(architecture, task), tiny.objective(task, **dict(settings))
    made = Stage("only", model, objective, CORPUS, solver=IDENTITY, batch_size=256, **stage)
    return MultiStageInfluence([made], progress=False).query(TESTS)


@pytest.fixture(scope="module")
def masked():
    return query()


def test_scores_are_means_over_rounds(masked):
    """Of the same N: each round counts each word as often."""
    bound = masked.chain.stages[0]
    two = masked.score(CORPUS, mask_rounds=2)
    assert two.metadata["N"] == bound.count == sum(len(row["text"].split()) for row in CORPUS) / 8
    assert two.metadata["objective"]["draws"] == 16
    u, rounds = masked.solutions["only"].tensors(), []
    for epoch in range(2):
        objective = bound.stage.objective.for_influence().of_epoch(epoch)
        each = []
        for row in CORPUS[:3]:
            plain = tiny.Plain(bound.stage.model, "masked", objective.collate([row]), 8)
            gradient = plain.gradient(list(u))
            each.append([-sum(float((u[n][q] * g).sum()) for n, g in gradient.items()) for q in range(2)])
        rounds.append(each)
    np.testing.assert_allclose(two.influences()[:3], np.mean(rounds, 0), rtol=1e-9, atol=1e-12)
    assert masked.score(CORPUS, mask_rounds=1).frame.equals(masked.score(CORPUS).frame)


def test_masks_of_training_are_kept_where_they_were_minimised():
    static, training, causal = query(settings={"static": True}), query(mask_rounds=None), query("causal", "gpt2")
    for asked in (static, training, causal):
        bound = asked.chain.stages[0]
        assert bound.objective is bound.stage.objective
        with pytest.raises(InputError, match=r"mask_rounds is 2, but the rows of stage 'only' are scored without"):
            asked.score(CORPUS, mask_rounds=2)
    assert static.score(CORPUS).frame.equals(training.score(CORPUS).frame)


@pytest.mark.parametrize("rounds", [0, -1, True, 1.5, "many"])
def test_a_number_of_rounds_that_is_none_is_refused(masked, rounds):
    with pytest.raises(InputError, match=re.escape(f"mask_rounds is {rounds!r}; expected at least 1")):
        masked.score(CORPUS, mask_rounds=rounds)


def noisy(noise, seed):
    """I(x) = (x, x²) and a noise of each row and round."""

    def influence(batch, rows):
        x = batch["x"].double()
        wrong = noise * np.random.default_rng(seed).standard_normal((len(rows), 2))
        return RowInfluence(torch.stack([x, x**2], 1) + torch.from_numpy(wrong), x, torch.ones_like(x))

    return scorable(influence=influence, batch_size=4096)


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_the_noise_is_its_share_of_the_variance(noise):
    x = np.random.default_rng(0).standard_normal(4000)
    rows = [{"example_id": i, "x": float(value)} for i, value in enumerate(x)]
    found = MaskNoise.measured([noisy(noise, 1), noisy(noise, 2)], rows)
    assert found.rows == 128
    kept = x[:: 4000 // 128][:128]
    expected = noise**2 / (noise**2 + min(kept.var(), (kept**2).var()))
    assert found.one_round == pytest.approx(expected, rel=0.35)
    for rounds in (1, 2, 8):
        assert found.share(rounds) == pytest.approx(expected / (expected + rounds * (1 - expected)), rel=0.5)


def test_rounds_are_doubled_to_the_target(capsys):
    assert [MaskNoise(128, share).rounds() for share in (0.0, 0.05, 0.09, 0.17, 0.29)] == [1, 1, 2, 4, 8]
    for share in (0.0, 0.09, 1.0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            facts = MaskNoise(128, share).tell(8)
        assert (facts["share"] <= TARGET) == (share < 1) == (not caught)
        assert facts["mask_rounds"] <= MOST_ROUNDS
    assert "one round of 8 masks per row makes 9.0% of the variance" in capsys.readouterr().out


def test_rounds_by_their_noise_are_those_of_the_number(masked, capsys):
    """The toy's words differ little, so that masks decide more than rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        automatic = masked.score(CORPUS, mask_rounds="auto")
    facts = automatic.metadata["mask_noise"]
    assert facts["rows"] == len(CORPUS)
    assert automatic.frame.equals(masked.score(CORPUS, mask_rounds=facts["mask_rounds"]).frame)
    assert capsys.readouterr().out.startswith("masks: one round of 8 masks per row makes ")


def test_a_shortlist_of_one_round_is_scored_with_more(masked, tmp_path, capsys):
    rows = tiny.rows(120, seed=7, longest=9)
    exact = masked.score(rows, mask_rounds=4)
    found = masked.score(rows, mask_rounds=4, keep=2, output_dir=tmp_path)
    facts = found.metadata["shortlist"]
    assert (facts["dtype"], facts["first_pass"]) == (None, "with 8 masks per row")
    assert facts["candidates"] < len(rows)
    assert 0 < facts["recall"] <= 1
    assert found.metadata["objective"]["draws"] == 32
    by_id = exact.frame.set_index("example_id")["influence_0"]
    np.testing.assert_allclose(found.frame["influence_0"], by_id[found.frame["example_id"]], rtol=1e-9)
    assert "120 rows with 8 masks per row, at" in capsys.readouterr().out
    assert Scores.from_parquet(tmp_path / "scores.parquet").metadata["shortlist"] == facts
    assert "shortlist" not in masked.score(rows, keep=2, mask_rounds=1).metadata


def test_an_interrupted_scoring_with_other_rounds_is_refused(masked, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_msif.scoring.on_disk.PartsOnDisk.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            masked.score(CORPUS, output_dir=tmp_path)
    with pytest.raises(InputError, match="the rounds of masks"):
        masked.score(CORPUS, output_dir=tmp_path, resume=True, mask_rounds=2)


def test_a_round_has_less_noise_than_as_many_random_masks():
    """At equal cost; of the scores of some rows, over rounds."""
    model, spreads = tiny.model("bert", "masked"), {}
    for masks in ("folds", "random"):
        objective = objectives.MaskedLM(tiny.tokenizer(), masks=masks, mask_probability=1 / 8, draws=8, static=True)
        scores = []
        for seed in range(6):
            stage = Stage(
                "only", model, objectives.MaskedLM(**{**vars(objective), "seed": seed}), CORPUS, solver=IDENTITY
            )
            made = MultiStageInfluence([stage], progress=False).query(TESTS[:1])
            scores.append(made.score(CORPUS[:8]).influence())
        spreads[masks] = np.std(scores, 0).mean()
    assert spreads["folds"] < 0.8 * spreads["random"]


def test_the_effect_of_a_removal_has_the_scale_that_masks_of_training_give_it():
    """Of masks that hide twice as much, N is twice as large, and so is I: −I/N is about the same, and that of folds
    is, too."""
    before = tiny.model("bert", "masked")
    after = tiny.finetuned(before, "bert")
    rows, effects, sizes = tiny.rows(16, seed=4, longest=16, shortest=8), {}, {}
    for share in (0.125, 0.25, "folds"):
        settings = {} if share == "folds" else {"mask_probability": share, "draws": 32, "static": True}
        stages = [
            Stage("pre", before, tiny.objective("masked", **settings), rows, solver=IDENTITY, batch_size=512),
            Stage("fine", after, tiny.objective("classification"), tiny.rows(6, seed=2), "head", solver=IDENTITY),
        ]
        scores = MultiStageInfluence(stages, progress=False).query(TESTS[:1]).score(rows)
        effects[share], sizes[share] = scores.frame["removal_effect"].to_numpy(), scores.metadata["N"]
    assert sizes[0.25] / sizes[0.125] == pytest.approx(2, rel=0.1)
    assert sizes["folds"] / sizes[0.125] == pytest.approx(1, rel=0.1)  # random masks have a whole number of words
    for share in (0.125, 0.25):
        slope = (effects["folds"] @ effects[share]) / (effects[share] @ effects[share])
        assert slope == pytest.approx(1, abs=0.25)


def test_through_a_recorded_run_the_masks_of_the_run_are_taken(tmp_path):
    case = next(case for case in CASES if case.name == "masked, bert")
    asked = DIFFERENTIATIONS["unrolled"](case, tmp_path).query(case.rows(1, seed=3))
    bound = asked.chain.stages[0]
    assert bound.objective is bound.stage.objective
    with pytest.raises(InputError, match="are scored without rounds of masks"):
        asked.score(bound.rows, mask_rounds=2)
