"""Shortlists: exact scores of what a pass in reduced precision puts first, and its recall, also where it is poor."""

import warnings

import datasets
import numpy as np
import pytest
import torch
from helpers import distributed, tiny
from helpers.scorables import scorable

from hf_msif import InputError, Scores
from hf_msif.reports.tables import table_one
from hf_msif.scoring.scorable import RowInfluence
from hf_msif.scoring.scorer import score
from hf_msif.scoring.shortlist import SAMPLE_ROWS, WIDTH, shortlist

ROWS = 700


def corpus(rows=ROWS):
    x = np.random.default_rng(0).standard_t(3, rows)
    return [{"example_id": f"id{i}", "text": f"row {i}", "x": float(value)} for i, value in enumerate(x)]


def reduced(x, error):
    """What x becomes in the reduced precision: a noise that belongs to x."""
    return x + error * torch.sin(1e4 * x)


def noisy(error, asked=None, **changes):
    """I(x) = (x, −x³), exact unless autocast is on."""

    def influence(batch, rows):
        x = batch["x"].double()
        low = torch.is_autocast_enabled("cpu")
        if asked is not None:
            asked.extend((row["example_id"], low) for row in rows)
        x = reduced(x, error) if low else x
        return RowInfluence(torch.stack([x, -(x**3)], 1), x, torch.ones_like(x))

    return scorable(influence=influence, identity=lambda: {"the toy": error}, batch_size=64, **changes)


def test_the_rows_that_are_kept_have_their_exact_scores():
    exact, found = score(noisy(0.01), corpus()), shortlist(noisy(0.01), corpus(), 10, "bfloat16")
    for query in (0, 1):
        for by in ("harmful", "helpful", "absolute"):
            columns = ["example_id", "influence", "removal_effect", "loss", "terms", "text"]
            assert found.top(10, by, query)[columns].equals(exact.top(10, by, query)[columns])
    assert len(found) <= 40
    with pytest.raises(InputError, match="kept the 10 most extreme rows"):
        found.top(11)
    with pytest.raises(InputError, match="a shortlist in bfloat16, which does not seek the rows of least absolute"):
        found.bottom(1)
    assert found.bottom(10, "helpful").example_id.tolist() == found.top(10, "harmful").example_id.tolist()
    assert list(table_one(Scores(found.frame, {**found.metadata, "tests": [{"text": "a"}, {"text": "b"}]}))) == [
        "test sentence",
        "strongest influence",
        "most influential sentence",
    ]
    assert found.metadata["kept"]["all"][0]["count"] == ROWS
    facts = found.metadata["shortlist"]
    assert (facts["recall"], facts["length"], facts["dtype"]) == (1.0, 40, "bfloat16")
    assert facts["deepest"] < 15


@pytest.mark.parametrize("error", [0.5, 3.0])
def test_the_recall_of_a_poor_pass_is_that_of_the_sample(error, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = shortlist(noisy(error), corpus(), 10, "bfloat16").metadata["shortlist"]
    places = np.sort(np.random.default_rng(0).choice(ROWS, SAMPLE_ROWS, replace=False))
    x = torch.tensor([corpus()[i]["x"] for i in places], dtype=torch.float32).double()
    shares = []
    for low, true in ((reduced(x, error), x), (-(reduced(x, error) ** 3), -(x**3))):
        for sign in (1, -1):
            first = set((sign * low).topk(40).indices.tolist())
            shares.append(np.mean([i in first for i in (sign * true).topk(10).indices.tolist()]))
    assert facts["recall"] == pytest.approx(np.mean(shares))
    assert facts["lowest_recall"] == min(shares)
    assert f", with a recall of {facts['recall']:.3f} (the lowest" in capsys.readouterr().out
    if error == 3.0:
        assert facts["recall"] < 0.9
        assert ["others may have been missed" in str(w.message) for w in caught].count(True) == 1


def test_a_pass_that_was_finished_is_not_made_again(tmp_path, monkeypatch):
    def made(error=0.01, **settings):
        asked = []
        scores = shortlist(noisy(error, asked), corpus(), 5, "bfloat16", output_dir=tmp_path, **settings)
        return scores, sum(low for _, low in asked)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_msif.scoring.shortlist._recall", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made()
    assert [path.name for path in tmp_path.iterdir()] == ["scores-toy.shortlist.parquet"]
    kept = tmp_path / "scores-toy.shortlist.parquet"
    before = kept.read_bytes()
    again, passes = made(resume=True)
    assert passes == SAMPLE_ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["scores-toy.parquet"]
    saved = Scores.from_parquet(tmp_path / "scores-toy.parquet")
    assert saved.frame.equals(again.frame)
    assert saved.metadata == again.metadata
    assert "depends_on" not in saved.metadata
    kept.write_bytes(before)
    assert made(error=0.02, resume=True)[1] > ROWS  # of another model


def test_a_corpus_that_changed_since_the_pass_is_refused(tmp_path, monkeypatch):
    table = corpus()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_msif.scoring.shortlist._recall", interrupt)
        with pytest.raises(KeyboardInterrupt):
            shortlist(noisy(0.01), table, 5, "bfloat16", output_dir=tmp_path)
    changed = [{**row, "x": row["x"] + 1000 * (100 <= i < 120)} for i, row in enumerate(table)]
    with pytest.raises(InputError, match=r"the corpus gave 700 rows .* and 700 other ones in the pass before"):
        shortlist(noisy(0.01), changed, 5, "bfloat16", output_dir=tmp_path, resume=True)
    (tmp_path / "scores-toy.shortlist.parquet").write_bytes(b"damaged")  # then the pass is made again
    found = shortlist(noisy(0.01), changed, 5, "bfloat16", output_dir=tmp_path, resume=True)
    assert found.top(5).influence.min() > 900


def test_a_stream_is_read_twice_and_must_be_the_same():
    table = corpus()
    stream = datasets.IterableDataset.from_generator(lambda: iter(table))
    expected, found = (shortlist(noisy(0.01), rows, 5, "bfloat16", part_rows=64) for rows in (table, stream))
    assert found.frame.equals(expected.frame)
    reads = []

    def another():
        reads.append(1)
        return ({"text": "row", "x": len(reads) * row["x"]} for row in table)

    with pytest.raises(InputError, match="and 700 other ones in the pass before"):
        shortlist(noisy(0.01), datasets.IterableDataset.from_generator(another), 5, "bfloat16")
    top = max(table, key=lambda row: row["x"])
    repeated = [{**top, "example_id": "twice"}, *table, {**top, "example_id": "twice", "x": 0.0}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(repeated))
    with pytest.raises(InputError, match="the corpus repeats an example_id"):
        shortlist(noisy(0.01), stream, 5, "bfloat16")


def test_too_few_rows_have_no_recall(capsys):
    facts = shortlist(noisy(0.01), corpus(4 * WIDTH - 1), 3, "bfloat16").metadata["shortlist"]
    assert facts["recall"] is None
    assert "15 rows are too few to measure a recall" in capsys.readouterr().out


def test_settings_are_checked():
    with pytest.raises(InputError, match="keep is True; expected at least 1"):
        shortlist(noisy(0.01), corpus(), True, "bfloat16")


def test_a_query_that_keeps_rows_in_a_reduced_precision_makes_one():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        query = distributed.chain(torch.float32).query(distributed.TESTS)
    rows = tiny.rows(150, seed=7, longest=18)
    exact, found = query.score(rows), query.score(rows, keep=3, dtype="bfloat16")
    assert found.metadata["shortlist"]["candidates"] <= 3 * 2 * 12
    for q in range(3):
        expected, top = exact.top(3, query=q), found.top(3, query=q)
        assert top.example_id.tolist() == expected.example_id.tolist()
        np.testing.assert_allclose(top.influence, expected.influence, rtol=1e-4)
    assert "shortlist" not in query.score(rows, keep=3, dtype="float32").metadata
