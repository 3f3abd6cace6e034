"""Progress: bars in a terminal, and in a log a line every ten seconds."""

import io
import sys

import pytest

from hf_msif.engine import progress


class Stderr(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    def make(terminal):
        monkeypatch.setattr(sys, "stderr", Stderr(terminal))
        return sys.stderr

    return make


@pytest.fixture
def clock(monkeypatch):
    """The time of bars, which moves by hand."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_log_has_a_line_every_ten_seconds(stderr, clock):
    log = stderr(terminal=False)
    with progress.bar(total=24_000, desc="scoring", unit=" rows") as bar:
        for _ in range(24):
            clock(3)
            bar.update(1000)
            bar.set_postfix(loss=2.5)
    assert "\r" not in log.getvalue()
    lines = log.getvalue().splitlines()
    # every fourth update is twelve seconds after the one before
    assert [line.partition(":")[2].partition(" of")[0] for line in lines] == [
        f" {n:,}" for n in range(4000, 25_000, 4000)
    ]
    assert lines[0] == "scoring: 4,000 of 24,000 rows, 60 s left, loss=2.5"
    assert lines[1] == "scoring: 8,000 of 24,000 rows, 48 s left, loss=2.5"


def test_a_log_says_nothing_of_what_is_short(stderr, clock):
    log = stderr(terminal=False)
    for _ in progress.bar(range(100), desc="scoring"):
        clock(0.09)
    assert log.getvalue() == ""


def test_what_was_done_before_does_not_shorten_what_is_left(stderr, clock):
    log = stderr(terminal=False)
    with progress.bar(total=100, initial=80, desc="training", unit=" steps") as bar:
        clock(20)
        bar.update(10)
    assert log.getvalue() == "training: 90 of 100 steps, 20 s left\n"


def test_without_a_total_a_line_says_how_long_it_has_taken(stderr, clock):
    log = stderr(terminal=False)
    for _ in progress.bar(iter(range(3)), desc="polishing", unit=" steps"):
        clock(100)
    assert log.getvalue() == "polishing: 1 steps in 100 s\npolishing: 2 steps in 3 min\npolishing: 3 steps in 5 min\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_printed_where_nothing_is_to_be_shown(stderr, clock, terminal):
    written = stderr(terminal)
    for _ in progress.bar(range(10), shown=False):
        clock(11)
    assert written.getvalue() == ""


def test_a_terminal_has_a_bar_that_vanishes(stderr):
    written = stderr(terminal=True)
    for _ in progress.bar(range(3), desc="scoring"):
        pass
    assert "scoring" in written.getvalue()
    assert written.getvalue().split("\r")[-1] == ""
    assert not written.getvalue().rstrip("\r").split("\r")[-1].strip()
