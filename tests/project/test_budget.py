"""What a budget of time is, and what it buys."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_msif.errors import InputError
from hf_msif.project.budget import FEWEST_SAMPLES, Solve, parse_budget, within
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


SOLVES = st.builds(Solve, seconds=TIMES, samples=st.none() | st.integers(1, 10**5), fixed_seconds=st.floats(0, 1e3))


@given(
    budget=TIMES,
    per_row=st.floats(1e-6, 10),
    rows=st.integers(1, 10**6),
    rounds=st.none() | st.integers(1, MOST_ROUNDS),
    solves=st.dictionaries(st.sampled_from("abc"), SOLVES),
    fewest=st.none() | st.integers(1, 1000),
)
def test_what_is_bought_is_within_the_budget_and_no_more_would_be(budget, per_row, rows, rounds, solves, fewest):
    sampled = {name: solve for name, solve in solves.items() if solve.samples is not None}
    fixed = sum(solve.fixed_seconds for solve in solves.values())
    fixed += sum(solve.seconds for name, solve in solves.items() if name not in sampled)

    def solving(samples):
        return fixed + sum(solve.seconds * samples[name] / solve.samples for name, solve in sampled.items())

    least = {name: min(solve.samples, FEWEST_SAMPLES) for name, solve in sampled.items()}
    whole = {name: solve.samples for name, solve in sampled.items()}
    try:
        bought = within(budget, per_row, rows, solves, mask_rounds=rounds, fewest_rows=fewest)
    except InputError:
        assert fewest is None
        assert solving(least) + per_row > budget * (1 - 1e-9) or solving(whole) - fixed > (budget - fixed) / 2
        return
    assert bought.solve_seconds == pytest.approx(solving(bought.curvature_samples))
    share = (bought.mask_rounds or 1) / (rounds or 1)
    assert bought.seconds == pytest.approx(bought.solve_seconds + bought.rows * share * per_row)
    assert 1 <= bought.rows <= rows
    at_least = min(rows, fewest or 1)
    assert bought.seconds <= budget * (1 + 1e-9) or bought.rows == at_least
    assert (bought.mask_rounds is None) == (rounds is None)
    if rounds is not None and bought.mask_rounds > rounds:
        assert bought.rows == rows
        assert bought.mask_rounds <= MOST_ROUNDS
    if at_least < bought.rows < rows:
        assert bought.seconds + per_row > budget * (1 - 1e-9)
    for name, samples in bought.curvature_samples.items():
        assert least[name] <= samples <= whole[name]
    if bought.rows < rows and bought.curvature_samples != least and bought.curvature_samples != whole:
        slack = sum(solve.seconds * FEWEST_SAMPLES / solve.samples for solve in sampled.values())
        assert bought.solve_seconds - fixed <= (budget - fixed) / 2 + slack


def test_more_time_buys_more():
    solves = {"a": Solve(120.0, 2048), "b": Solve(40.0, 512, 1.0), "c": Solve(0.1)}
    bought = [within(t, 0.01, 9000, solves, mask_rounds=1) for t in range(16, 2000)]
    series = [[each.rows for each in bought], [each.mask_rounds for each in bought]]
    series += [[each.curvature_samples[name] for each in bought] for name in "ab"]
    for numbers in series:
        assert numbers == sorted(numbers)
        assert numbers[0] < numbers[-1]
    assert bought[-1].mask_rounds == MOST_ROUNDS
    assert bought[-1].curvature_samples == {"a": 2048, "b": 512}


def test_what_buys_nothing_is_refused_with_what_would_do():
    with pytest.raises(InputError, match=r"a budget of 30 s is too short to score one row; expected at least 52 s"):
        within(30.0, 2.0, 100, {"a": Solve(50.0)})


def test_as_many_rows_as_are_asked_for_are_scored_whatever_it_takes():
    bought = within(30.0, 2.0, 1000, {"a": Solve(50.0)}, fewest_rows=100)
    assert (bought.rows, bought.seconds) == (100, 250.0)


def test_a_budget_is_read_without_torch():
    code = "import sys; from hf_msif.project.budget import parse_budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
