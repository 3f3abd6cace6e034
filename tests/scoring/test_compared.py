"""Replicates are compared on rows that are scored anyway: no row is scored twice; corpora that are too small ask."""

import random

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from helpers.scorables import scorable

from hf_msif.scoring.compared import FEWEST_ROWS
from hf_msif.scoring.noise import SAMPLE_ROWS, Noise
from hf_msif.scoring.scorable import RowInfluence
from hf_msif.scoring.scorer import score
from hf_msif.scoring.shortlist import shortlist

GENERATOR = np.random.default_rng(0)
ROWS = 700
LIMITS = GENERATOR.normal(size=(ROWS, 1, 2))
EACH = LIMITS + 0.3 * GENERATOR.normal(size=(ROWS, 2, 2))
CORPUS = [{"example_id": f"id{i}", "text": f"row {i}", "x": float(i)} for i in range(ROWS)]
SEED = 3
OF_STAGE = Noise.measured(EACH[::7])  # what the stage's own rows would say


class Asked:
    """A question with two replicates, which counts how often each row is scored, and how often noise is asked for."""

    def __init__(self, fail_after=None):
        self.scored, self.noise, self.fail_after = [], 0, fail_after

    def scorable(self, **changes):
        return scorable(influence=self.influence, noise=self.asked, seed=SEED, batch_size=16, **changes)

    def influence(self, batch, rows):
        places = [int(row["x"]) for row in rows]
        if self.fail_after is not None and len(self.scored) >= self.fail_after:
            raise KeyboardInterrupt
        self.scored += places
        each = torch.tensor(EACH[places])
        return RowInfluence(each.mean(1), batch["x"], torch.ones(len(rows)), each)

    def asked(self):
        self.noise += 1
        return OF_STAGE


def check(scores, noise, rows=ROWS):
    np.testing.assert_allclose(scores.influences(), EACH[:rows].mean(1), rtol=1e-12)
    errors = np.stack([scores.standard_error(q) for q in range(2)], 1)
    np.testing.assert_allclose(errors, noise.standard_errors(EACH[:rows]), rtol=1e-12)
    assert (scores.noise, scores.metadata["noise_text"]) == (noise, str(noise))


@pytest.mark.parametrize("part_rows", [10, 300, 4096])
def test_each_row_of_a_table_is_scored_once(part_rows):
    asked = Asked()
    scores = score(asked.scorable(), CORPUS, part_rows=part_rows)
    assert (sorted(asked.scored), asked.noise) == (list(range(ROWS)), 0)
    check(scores, Noise.measured(EACH[random.Random(SEED).sample(range(ROWS), SAMPLE_ROWS)]))


@pytest.mark.parametrize("rows", [FEWEST_ROWS, 100, SAMPLE_ROWS])
def test_a_corpus_below_the_sample_is_compared_whole(rows):
    asked = Asked()
    scores = score(asked.scorable(), CORPUS[:rows], part_rows=50)
    assert (sorted(asked.scored), asked.noise) == (list(range(rows)), 0)
    check(scores, Noise.measured(EACH[:rows]), rows)


def test_a_corpus_that_is_too_small_asks_for_the_noise_of_the_stage():
    asked = Asked()
    check(score(asked.scorable(), CORPUS[: FEWEST_ROWS - 1]), OF_STAGE, FEWEST_ROWS - 1)
    assert (len(asked.scored), asked.noise) == (FEWEST_ROWS - 1, 1)


@pytest.mark.parametrize("part_rows", [10, 4096])
def test_of_a_stream_the_first_rows_are_compared(part_rows):
    asked = Asked()
    scores = score(asked.scorable(), IterableDataset.from_generator(lambda: iter(CORPUS)), part_rows=part_rows)
    assert sorted(asked.scored) == list(range(ROWS))
    check(scores, Noise.measured(EACH[:SAMPLE_ROWS]))


def test_an_interrupted_scoring_goes_on_with_the_same_noise(tmp_path):
    identity, settings = {"identity": lambda: {"the toy": "digest"}}, {"output_dir": tmp_path, "part_rows": 50}
    with pytest.raises(KeyboardInterrupt):
        score(Asked(fail_after=450).scorable(**identity), CORPUS, **settings)
    asked = Asked()
    scores = score(asked.scorable(**identity), CORPUS, resume=True, **settings)
    assert SAMPLE_ROWS <= len(asked.scored) < ROWS
    check(scores, Noise.measured(EACH[random.Random(SEED).sample(range(ROWS), SAMPLE_ROWS)]))


def test_the_rows_of_a_shortlist_have_the_noise_of_random_rows():
    asked = Asked()
    scores = shortlist(asked.scorable(), CORPUS, keep=5)
    places = np.sort(np.random.default_rng(0).choice(ROWS, 512, replace=False))
    kept = [int(name[2:]) for name in scores.frame["example_id"]]
    noise = Noise.measured(EACH[places])
    assert (scores.noise, scores.metadata["noise_text"], asked.noise) == (noise, str(noise), 0)
    np.testing.assert_allclose(scores.standard_error(0), noise.standard_errors(EACH[kept])[:, 0], rtol=1e-12)
