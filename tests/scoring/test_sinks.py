"""Sinks of every kind and `WriteBehind`, and `score` on a `Scorable` that no query made."""

import threading
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.scorables import scorable

from hf_msif import InputError, Scores
from hf_msif.scoring import scorer
from hf_msif.scoring.extremes import ExtremesInMemory, ExtremesOnDisk
from hf_msif.scoring.frames import frame_of
from hf_msif.scoring.in_memory import InMemory
from hf_msif.scoring.on_disk import PartsOnDisk
from hf_msif.scoring.scorable import RowInfluence
from hf_msif.scoring.scorer import score
from hf_msif.scoring.sinks import NullSink, Sink, WriteBehind
from hf_msif.scoring.summary import Extremes

CORPUS = [{"example_id": f"id{i}", "text": "a" * (i % 4 + 1), "x": float(i - 3)} for i in range(11)]


def check(scores):
    x = np.array([row["x"] for row in CORPUS])
    assert scores.frame.example_id.tolist() == [row["example_id"] for row in CORPUS]
    np.testing.assert_array_equal(scores.influence(0), x)
    np.testing.assert_array_equal(scores.influence(1), x**2)
    np.testing.assert_array_equal(scores.removal_effects(), np.stack([-x / 4, -(x**2) / 4], 1))
    np.testing.assert_array_equal(scores.frame.loss, 2 * x)
    assert scores.frame.terms.tolist() == [1.0] * len(CORPUS)
    assert scores.frame.duplicates.tolist() == [3, 3, 3, 2] * 2 + [3, 3, 3]
    assert scores.metadata == {"stage": "toy", "columns": 2, "truncated": 1}


@pytest.mark.parametrize("settings", [{}, {"batch_size": 3}, {"batch_size": 1, "part_rows": 4}])
def test_a_scorable_needs_no_query(settings, tmp_path):
    check(score(scorable(), CORPUS, **settings))
    asked = []
    durable = scorable(identity=lambda: asked.append(1) or {"the toy": "digest"})
    check(score(durable, CORPUS, output_dir=tmp_path, **settings))
    assert asked == [1]
    check(Scores.from_parquet(tmp_path / "scores-toy.parquet"))


def test_rows_that_are_not_finite_are_named():
    def influence(batch, rows):
        x = batch["x"].double()
        return RowInfluence(torch.stack([x, 1 / x], 1), x, x)

    with pytest.raises(InputError, match=r"rows with example_id \['id3'\] is not finite"):
        score(scorable(influence=influence), CORPUS)


class Recorder:
    """A sink of the user's own, which has the second part already."""

    def __init__(self):
        self.calls = []

    def missing(self, number, rows):
        self.calls.append(("missing", number, len(rows)))
        return number != 1

    def add(self, number, rows, frame, truncated):
        assert frame.example_id.tolist() == [row["example_id"] for row in rows]
        assert frame.influence_0.tolist() == [row["x"] for row in rows]
        self.calls.append(("add", number, truncated))

    def finish(self, parts, metadata):
        self.calls.append(("finish", parts, metadata))
        return "what the sink makes of it"


def test_a_sink_of_the_users_own(monkeypatch):
    sink, inside, measured = Recorder(), scorable().influence, []

    def influence(batch, rows):
        measured.extend(row["example_id"] for row in rows)
        return inside(batch, rows)

    assert isinstance(sink, Sink)
    monkeypatch.setattr(scorer, "InMemory", lambda: sink)
    assert score(scorable(influence=influence), CORPUS, part_rows=4) == "what the sink makes of it"
    assert sorted(sink.calls[:-1]) == [
        ("add", 0, 0), ("add", 2, 1), ("missing", 0, 4), ("missing", 1, 4), ("missing", 2, 3)]  # fmt: skip
    assert sink.calls[-1] == ("finish", 3, {"stage": "toy", "columns": 2})
    assert sorted(measured) == sorted(row["example_id"] for row in [*CORPUS[:4], *CORPUS[8:]])


@pytest.mark.parametrize("kind", ["memory", "extremes in memory", "parts", "extremes on disk"])
@pytest.mark.parametrize("behind", [False, True])
def test_sinks_keep_what_they_are_given(kind, behind, tmp_path):
    path, extremes = tmp_path / "scores.parquet", Extremes(2, ["influence"])
    sink = {
        "memory": InMemory,
        "extremes in memory": lambda: ExtremesInMemory(extremes),
        "parts": lambda: PartsOnDisk(path, {}, False),
        "extremes on disk": lambda: ExtremesOnDisk(path, {}, False, extremes),
    }[kind]()
    assert isinstance(sink, Sink)
    influence = np.array([[row["x"]] for row in CORPUS])
    frame = frame_of(CORPUS, influence, 4.0, {})
    with WriteBehind(sink) if behind else nullcontext(sink) as sink:
        for number, start in enumerate((0, 5, 10)):
            part = slice(start, start + 5)
            assert sink.missing(number, CORPUS[part])
            sink.add(number, CORPUS[part], frame[part].reset_index(drop=True), number)
        scores = sink.finish(3, {"columns": 1})
    assert scores.metadata["truncated"] == 3
    if "extremes" in kind:
        assert scores.influence().tolist() == [-3.0, -2.0, -1.0, 0.0, 6.0, 7.0]  # of −1 and 1 the earlier
    else:
        assert scores.influence().tolist() == [row["x"] for row in CORPUS]


def test_other_processes_read_the_main_ones_file(tmp_path):
    scores = score(scorable(identity=dict), CORPUS, output_dir=tmp_path)
    sink = NullSink(tmp_path / "scores-toy.parquet")
    assert isinstance(sink, Sink)
    assert not sink.missing(0, CORPUS)
    sink.add(0, CORPUS, lambda: pytest.fail("made a frame that nobody writes"), 0)
    assert sink.finish(1, {}).frame.equals(scores.frame)


# WriteBehind ---------------------------------------------------------------------------------------------------------


class Slow:
    """Adds a part when it is told to, and fails at one of them."""

    def __init__(self, fails_at=None):
        self.added, self.threads, self.told, self.fails_at = [], set(), threading.Semaphore(0), fails_at

    def missing(self, number, rows):
        return True

    def add(self, number, rows, frame, truncated):
        self.threads.add(threading.current_thread())
        assert self.told.acquire(timeout=60)
        if number == self.fails_at:
            raise InputError(f"no room for part {number}")
        self.added.append((number, frame))

    def finish(self, parts, metadata):
        return self.added


def fill(writer, numbers):
    for number in numbers:
        writer.add(number, [], pd.DataFrame, 0)


def test_parts_are_added_by_one_thread_and_in_order():
    sink, made = Slow(), []
    with WriteBehind(sink, ahead=3) as writer:
        for number in range(3):  # none of them waits
            writer.add(number, [], lambda: made.append(threading.current_thread()) or "frame", 0)
        assert sink.added == []
        fourth = threading.Thread(target=fill, args=(writer, [3]))
        fourth.start()
        fourth.join(timeout=0.2)
        assert fourth.is_alive()  # as many parts wait as may
        sink.told.release(4)
        fourth.join(timeout=60)
        added = writer.finish(4, {})
    assert [number for number, _ in added] == [0, 1, 2, 3]
    assert added[0][1] == "frame"
    assert set(made) == sink.threads
    assert threading.current_thread() not in made


def written(sink, calls, ahead=5):
    """Runs `calls` on a `WriteBehind` around a sink that does not wait to be told."""
    sink.told.release(9)
    with WriteBehind(sink, ahead=ahead) as writer:
        calls(writer)


CALLS = {
    "missing": lambda writer: writer.missing(2, []),
    "add": lambda writer: fill(writer, [2]),
    "finish": lambda writer: writer.finish(2, {}),
    "leaving the block": lambda writer: None,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_failure_is_raised_by_the_next_call_and_nothing_is_added_after_it(call):
    def calls(writer):
        fill(writer, [0, 1])
        writer._pool.submit(lambda: None).result(timeout=60)  # the thread is past part 1
        call(writer)

    sink = Slow(fails_at=1)
    with pytest.raises(InputError, match="no room for part 1") as raised:
        written(sink, calls)
    assert [number for number, _ in sink.added] == [0]
    assert not hasattr(raised.value, "__notes__")


def test_parts_that_wait_behind_a_failure_are_not_added():
    sink = Slow(fails_at=0)
    with pytest.raises(InputError, match="no room for part 0"):
        written(sink, lambda writer: fill(writer, [0, 1, 2, 3]), ahead=3)
    assert sink.added == []


def test_a_failure_beside_another_one_is_a_note():
    def calls(writer):
        fill(writer, [0])
        raise MemoryError("of the device")

    with pytest.raises(MemoryError, match="of the device") as raised:
        written(Slow(fails_at=0), calls)
    assert raised.value.__notes__ == ["Writing the scores of earlier rows failed as well: no room for part 0"]
