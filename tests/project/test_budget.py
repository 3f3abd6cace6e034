"""What a budget of time is, and what it buys."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_msif.errors import InputError
from hf_msif.project.budget import FEWEST_SAMPLES, parse_budget, within
from hf_msif.scoring.mask_noise import MOST_ROUNDS


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1h0m5s", 3605), ("0.5h", 1800), (" 10m ", 600)],
)
def test_a_budget_is_read_in_seconds(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "m", "10 m", "-5m", "0s", "30m1h", "5d", "1e3s", "١٠m", "nanm", "9" * 400 + "h", "10m\n5s"]
)
def test_what_is_no_time_is_refused_by_its_own_words(text):
    with pytest.raises(InputError, match="expected a time such as 90s, 10m, 2h or 1h30m") as refusal:
        parse_budget(text)
    assert len(str(refusal.value)) < 200


TIMES = st.floats(1e-3, 1e5)


@given(
    budget=TIMES,
    per_row=st.floats(1e-6, 10),
    rows=st.integers(1, 10**6),
    rounds=st.none() | st.integers(1, MOST_ROUNDS),
    solve=TIMES,
    samples=st.none() | st.integers(1, 10**5),
    other=st.floats(0, 1e3),
)
def test_what_is_bought_is_within_the_budget_and_no_more_would_be(
    budget, per_row, rows, rounds, solve, samples, other
):
    settings = {"solve_seconds": solve, "curvature_samples": samples, "other_seconds": other}
    try:
        bought = within(budget, per_row, rows, mask_rounds=rounds, **settings)
    except InputError:
        fewest = samples and min(samples, FEWEST_SAMPLES) / samples
        assert other + solve * (fewest or 1) + per_row > budget * (1 - 1e-9) or solve > budget / 2 - other
        return
    solved = solve if samples is None else solve * bought.curvature_samples / samples
    share = (bought.mask_rounds or 1) / (rounds or 1)
    assert bought.seconds == pytest.approx(other + solved + bought.rows * share * per_row)
    assert bought.seconds <= budget * (1 + 1e-9)
    assert 1 <= bought.rows <= rows
    assert (bought.mask_rounds is None) == (rounds is None)
    if rounds is not None and bought.mask_rounds > rounds:
        assert bought.rows == rows
        assert bought.mask_rounds <= MOST_ROUNDS
    if bought.rows < rows:
        assert bought.seconds + per_row > budget * (1 - 1e-9)
        assert (
            samples is None
            or bought.curvature_samples == samples
            or solved <= budget / 2
            or (bought.curvature_samples == FEWEST_SAMPLES)
        )


def test_more_time_buys_more():
    bought = [
        within(t, 0.01, 9000, mask_rounds=1, solve_seconds=120.0, curvature_samples=2048) for t in range(10, 2000)
    ]
    for name in ("rows", "mask_rounds"):
        numbers = [getattr(each, name) for each in bought]
        assert numbers == sorted(numbers)
        assert numbers[0] < numbers[-1]
    assert bought[-1].mask_rounds == MOST_ROUNDS
    assert bought[-1].curvature_samples == 2048


def test_what_buys_nothing_is_refused_with_what_would_do():
    with pytest.raises(InputError, match=r"a budget of 30 s is too short to score one row; expected at least 52 s"):
        within(30.0, 2.0, 100, other_seconds=50.0)


def test_a_budget_is_read_without_torch():
    code = "import sys; from hf_msif.project.budget import parse_budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
