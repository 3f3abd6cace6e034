"""Rows are dealt out whole, in batches that are padded little, with as much work for every process."""

import itertools

import numpy as np
import pytest
from helpers import tiny

from hf_msif import objectives
from hf_msif.engine.batching import deal_batches, deal_equal, row_cost


def lengths(count, seed=0):
    """Of sentences, in characters."""
    return np.exp(np.random.default_rng(seed).normal(np.log(130), 0.5, count)).round() + 1


def load(costs, share):
    """What a process has to do: all rows of a batch are padded to its longest."""
    return sum(len(batch) * costs[batch].max() for batch in share)


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000])
def test_every_row_is_in_one_batch_of_one_process(count, processes):
    shares = deal_batches(lengths(count), 64, processes)
    assert len(shares) == processes
    batches = [batch for share in shares for batch in share]
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(count))
    assert all(1 <= len(batch) <= 64 for batch in batches)


@pytest.mark.parametrize("costs", [[0] * 130, [7] * 130], ids=["images", "alike"])
def test_rows_that_cost_alike_are_dealt_by_number(costs):
    shares = deal_batches(costs, 64, 2)
    first, second = (sum(map(len, share)) for share in shares)
    assert first + second == 130
    assert abs(first - second) <= 2


@pytest.mark.parametrize(
    ("count", "processes"), [(128, 2), (512, 8), (1000, 2), (1000, 3), (2048, 8), (2048, 64), (4096, 8)]
)
def test_no_process_has_much_more_to_do_than_its_share_without_padding(count, processes):
    costs = lengths(count)
    loads = [load(costs, share) for share in deal_batches(costs, 64, processes)]
    assert max(loads) < 1.3 * costs.sum() / processes
    # Dealing rows instead, each process padding its own, leaves up to four times that.
    order = np.argsort(-costs)
    rows = [order[rank::processes] for rank in range(processes)]
    cut = [[mine[start : start + 64] for start in range(0, len(mine), 64)] for mine in rows]
    assert max(loads) < 0.95 * max(load(costs, share) for share in cut)


def test_several_processes_pad_no_more_than_one():
    costs = lengths(5000)
    alone = load(costs, deal_batches(costs, 64, 1)[0])
    assert sum(load(costs, share) for share in deal_batches(costs, 64, 4)) < 1.01 * alone


def test_a_process_meets_its_costliest_batch_first():
    """So what does not fit into memory fails at once, and `plan` looks at the first batch."""
    costs = lengths(1000)
    for share in deal_batches(costs, 64, 3):
        each = [len(batch) * costs[batch].max() for batch in share]
        assert each == sorted(each, reverse=True)


def test_full_batches_are_not_halved_for_a_little_balance():
    assert [len(share) for share in deal_batches(lengths(2048), 64, 64)] == [1] * 64


@pytest.mark.parametrize("seed", range(20))
def test_the_costliest_batch_is_as_cheap_as_it_can_be(seed):
    """Against all ways to cut six rows into two intervals of at most four."""
    costs = np.sort(np.random.default_rng(seed).integers(1, 30, 6))[::-1]
    best = min(max(costs[0] * middle, costs[middle] * (6 - middle)) for middle in (2, 3, 4))
    (batches,) = deal_batches(costs, 4, 1)
    assert len(batches) == 2
    assert max(len(batch) * costs[batch].max() for batch in batches) == best


def test_a_row_costs_what_the_objective_reads_of_it():
    """Not its id or its label; of a text that will be cut, the part that is left; nothing where there is no text."""
    row = {"example_id": "x" * 99, "text": "vote " * 7, "url": "y" * 99, "label": "positive"}
    assert row_cost(row, tiny.objective("masked")) == 35
    assert row_cost(row, tiny.objective("masked", max_length=4)) == 24
    assert row_cost(row, objectives.ImageClassification()) == 0
    assert row_cost({"example_id": 1, "text": None}, tiny.objective("masked")) == 0  # `collate` names such a row


@pytest.mark.parametrize(("count", "processes"), [(2048, 8), (2048, 32), (100, 2)])
def test_documents_that_are_cut_are_dealt_by_what_is_left_of_them(count, processes):
    characters = np.exp(np.random.default_rng(0).normal(np.log(2000), 1.0, count)).round()
    rows = [{"text": "x" * int(n)} for n in characters]
    tokens = (characters / 5).clip(max=128)
    shares = deal_batches([row_cost(row, tiny.objective("masked", max_length=128)) for row in rows], 64, processes)
    assert max(load(tokens, share) for share in shares) < 1.15 * tokens.sum() / processes


def test_single_rows_are_not_searched_for(monkeypatch):
    from hf_msif.engine import batching

    cuts, inside = [], batching._intervals
    monkeypatch.setattr(batching, "_intervals", lambda *args: cuts.append(1) or inside(*args))
    assert sorted(map(len, deal_batches(lengths(300), 1, 1)[0])) == [1] * 300
    deal_batches(lengths(64), 64, 64)
    assert len(cuts) < 40


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_rows_of_equal_shape_share_batches_and_no_others(size, processes):
    shapes = np.random.default_rng(size).integers(4, size=37).tolist()
    shares = deal_equal(shapes, [float(shape) for shape in shapes], size, processes)
    batches = [batch for share in shares for batch in share]
    assert sorted(i for batch in batches for i in batch) == list(range(37))
    assert all(len({shapes[i] for i in batch}) == 1 for batch in batches)
    fewest = sum(-(-shapes.count(shape) // size) for shape in set(shapes))
    assert len(batches) == fewest
    assert max(map(len, batches)) <= size
    loads = [sum(len(batch) * max(1, shapes[batch[0]]) for batch in share) for share in shares]
    assert max(loads) - min(loads) <= size * 3  # the costliest batch
