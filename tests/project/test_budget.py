"""What a budget of time is, and what it buys."""

import pytest

from hf_msif.errors import InputError
from hf_msif.project.budget import parse_budget


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
