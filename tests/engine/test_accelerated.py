"""Exact shards by simulated ranks, sums in float64, and tables of any sensible kind as rows."""

import itertools
import threading
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny

from hf_msif import InputError
from hf_msif.engine import Engine
from hf_msif.engine.corpus import as_rows


@pytest.fixture
def engine(monkeypatch):
    def make(rank=0, world=1, **more):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        return Engine(tiny.alone(rank, world, **more), progress=False)

    return make


def collating(collate):
    """An objective of which an engine needs no more."""
    return SimpleNamespace(collate=collate, text_column="text", max_length=None, tokenizer=None, pads=True)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("size", [1, 12, 13])
def test_every_row_is_in_one_batch_of_one_rank(engine, world, size):
    rows, seen = tiny.rows(size, seed=1), []
    for rank in range(world):
        for indices, batch in engine(rank, world).batches(rows, collating(lambda rows: {"rows": rows}), batch_size=4):
            assert 1 <= len(indices) <= 4
            assert batch["rows"] == [rows[i] for i in indices]
            seen += indices
    assert sorted(seen) == list(range(size))


def test_batches_hold_rows_of_like_length(engine):
    rows = tiny.rows(40, seed=2, longest=18)
    lengths = [
        [len(rows[i]["text"]) for i in indices] for indices, _ in engine().batches(rows, collating(lambda r: {}), 8)
    ]
    spans = sorted((min(some), max(some)) for some in lengths)
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))


def test_on_an_accelerator_the_next_batch_is_made_while_one_is_used(engine):
    made, begun, begins = engine(), [], threading.Semaphore(0)
    made.device = torch.device("meta")

    def collate(rows):
        begun.append(len(rows))
        begins.release()
        if len(begun) == 4:
            raise InputError("the fourth is bad")
        return {}

    found = made.batches([{"text": "a"}] * 10, collating(collate), 2)
    for number in (1, 2, 3):
        next(found)
        while len(begun) <= number:
            assert begins.acquire(timeout=60)
        assert len(begun) == number + 1
    with pytest.raises(InputError, match="the fourth"):
        next(found)


def test_tensors_move_and_other_things_pass(engine):
    made = engine()
    made.device = torch.device("meta")
    ((_, batch),) = made.batches([{"text": "a"}], collating(lambda rows: {"x": torch.ones(1), "names": ["a"]}), 2)
    assert batch["x"].device.type == "meta"
    assert batch["names"] == ["a"]


def test_sums_accumulate_in_float64(engine):
    like = {"w": torch.zeros(1, 1)}
    terms = [1e8, *[1.0] * 100, -1e8]
    naive = torch.zeros(1)
    for term in terms:
        naive += torch.tensor(term)
    assert naive != 100
    found = engine().sum(like, ({"w": torch.full((1, 1), term)} for term in terms))
    assert found["w"].dtype == torch.float32
    assert found["w"].item() == 100


@pytest.mark.parametrize(("launched", "running"), [(2, 1), (4, 2), (1, 2)])
def test_a_launch_that_runs_something_else_is_refused(monkeypatch, launched, running):
    monkeypatch.setenv("WORLD_SIZE", str(launched))
    with pytest.raises(
        InputError, match=f"started {launched} processes, but Accelerate runs {running}.*ACCELERATE_USE_CPU"
    ):
        Engine(tiny.alone(world=running))


def test_an_accelerator_is_made_when_none_is_given():
    made = Engine()
    assert made.accelerator.num_processes == 1
    assert made.gather([1, 2]) == [1, 2]


TABLES = {
    "strings": ["a", "b"],
    "tuple": ("a", "b"),
    "dicts": [{"text": "a"}, {"text": "b"}],
    "dataset": datasets.Dataset.from_dict({"text": ["a", "b"]}),
    "numpy strings": np.array(["a", "b"]),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_become_rows(table):
    assert as_rows(table, "the corpus") == [{"text": "a", "example_id": 0}, {"text": "b", "example_id": 1}]


def test_ids_are_kept_and_the_users_rows_left_alone():
    mine = [{"example_id": "x", "text": "a"}, {"example_id": "y", "text": "a"}]
    found = as_rows(mine, "the corpus")
    assert found == mine
    found[0]["text"] = "changed"
    unnumbered = [{"text": "a"}]
    as_rows(unnumbered, "the corpus")
    assert mine[0]["text"] == "a"
    assert unnumbered == [{"text": "a"}]


STREAM = datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()
BAD = {
    "one string": ("a sentence", "is a str; expected a datasets.Dataset or a list"),
    "stream": (STREAM, "is a IterableDataset; expected a datasets.Dataset or a list"),
    "generator": ((x for x in "ab"), "is a generator; expected"),
    "nothing": (None, "is a NoneType; expected"),
    "number": (3, "is a int; expected"),
    "empty": ([], "is empty; expected at least one row"),
    "splits": (datasets.DatasetDict(train=TABLES["dataset"]), r"is a DatasetDict; .*\['train'\]"),
    "one row": ({"text": "a", "label": 1}, "is a dict; expected a datasets.Dataset or a list"),
    "frame": (pd.DataFrame({"text": ["a"]}), "is a DataFrame; .*Dataset.from_pandas"),
    "numbers": ([1, 2], "row 0 is a int; expected a dict or a string"),
    "nothing in between": (["a", None], "row 1 is a NoneType; expected a dict or a string"),
    "repeated id": ([{"example_id": 1, "text": "a"}, {"example_id": 1, "text": "b"}], "repeats an example_id"),
}


@pytest.mark.parametrize(("table", "message"), BAD.values(), ids=BAD)
def test_what_is_no_table_is_named(table, message):
    with pytest.raises(InputError, match=f"^the corpus.* {message}"):
        as_rows(table, "the corpus")
