"""Tables that people read: Table 1 picks the right rows, and texts come through whole."""

import io
import re
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len

from hf_msif.engine import files
from hf_msif.reports import tables
from hf_msif.scoring.scores import Scores


def scores(influence, tests):
    rows = [{"example_id": i, "text": f"sentence {i}"} for i in range(len(influence))]
    columns = {"loss": [0.0] * len(rows), "terms": [1.0] * len(rows)}
    return Scores.build(rows, np.array(influence), 2.0, columns, {"tests": tests})


def test_table_one_shows_the_ends_of_the_order():
    two_tests = scores([[1.0, 0.5], [-3.0, 0.1], [0.2, -0.2]], [{"text": "a tweet"}, {"text": "another"}])
    table = tables.table_one(two_tests)
    assert table["test sentence"].tolist() == ["a tweet", "another"]
    assert table["most influential sentence"].tolist() == ["sentence 1", "sentence 0"]
    assert table["strongest influence"].tolist() == [-3.0, 0.5]
    assert table["least influential sentence"].tolist() == ["sentence 2", "sentence 1"]
    assert table["weakest influence"].tolist() == [0.2, 0.1]
    assert len(tables.table_one(two_tests, k=9)) == 2 * 3


def test_a_group_of_tests_has_no_sentence_of_its_own():
    tests = [{"text": "a"}, {"text": "b"}]
    assert tables.test_sentence(scores([[1.0]], tests), 0) == "2 test examples together"
    assert tables.test_sentence(scores([[1.0]], [{"example_id": 7}]), 0) == "example 7"


TABLE = pd.DataFrame({"text": ["007", "a|b\n c", "1e5"], "value": [1.23456789, float("nan"), 1e-9]})


def test_markdown_escapes_bars_and_keeps_words_that_look_like_numbers():
    lines = tables.markdown(TABLE).splitlines()
    assert len(lines) == 2 + len(TABLE)
    cells = [[cell.strip() for cell in line.replace(r"\|", "¦").split("|")[1:-1]] for line in lines[2:]]
    assert cells == [["007", "1.235"], ["a¦b c", "nan"], ["1e5", "1e-09"]]


def test_plain_wraps_texts_and_no_numbers():
    table = pd.DataFrame({"text": ["007", "many words " * 10], "value": [1.23456789, 2.0]})
    shown = tables.plain(table, width=20)
    assert max(map(len, shown.splitlines())) < 45
    assert "007" in shown
    assert "1.23" in shown
    assert "1.234" not in shown
    assert shown.count("many") == 10


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def stdout(monkeypatch):
    """Makes stdout a terminal of some columns."""

    def make(columns, encoding="utf-8"):
        monkeypatch.setattr(Terminal, "encoding", encoding)
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")

    return make


RANKING = pd.DataFrame(
    {
        "influence": np.array([-0.01234567, 123456.0, float("nan")], dtype="float32"),
        "example_id": [7, 123456789, 0],
        "text": ["many words " * 10, "[red]no[/red] [/] :smile: \\[x] \x1b[31mred\x07 \u202eback\n\tnext", "007"],
    }
)


def test_a_table_in_a_pipe_is_plain():
    assert tables.terminal(RANKING, width=20) == tables.plain(RANKING, width=20)


@pytest.mark.parametrize("columns", [50, 80, 160])
def test_a_table_is_as_wide_as_the_terminal(stdout, columns):
    stdout(columns)
    lines = tables.terminal(RANKING).splitlines()
    assert max(map(cell_len, map(uncoloured, lines))) <= columns
    assert columns < 150 or max(map(cell_len, map(uncoloured, lines))) > 110
    assert sum(line.count("many") for line in lines) == 10
    (number,) = [line for line in lines if "123456789" in line]
    cells = uncoloured(number).split("│")[1:3]
    assert [cell.strip() for cell in cells] == ["1.23e+05", "123456789"]
    assert all(cell.endswith(" ") and not cell.endswith("  ") for cell in cells)  # to the right


@pytest.mark.parametrize("shown", [partial(tables.plain, width=99), tables.terminal])
def test_texts_are_no_markup_and_give_a_terminal_no_orders(stdout, shown):
    stdout(160)
    text = uncoloured(shown(RANKING))
    assert "[red]no[/red] [/] :smile: \\[x] \\x1b[31mred\\x07 \\u202eback" in text
    assert "\\tnext" in text
    assert not set(text) & set("\x1b\x07\t\u202e")


def test_a_terminal_that_is_too_narrow_cuts_no_number(stdout):
    stdout(30)
    lists = tables.terminal(RANKING).split("\n\n")
    assert [each.splitlines()[:2] for each in lists] == [
        ["influence: -0.0123", "example_id: 7"],
        ["influence: 1.23e+05", "example_id: 123456789"],
        ["influence: nan", "example_id: 0"],
    ]


def test_a_terminal_of_ascii_has_a_table_of_ascii(stdout):
    stdout(80, "ascii")
    assert tables.terminal(RANKING.drop(columns="text")).isascii()


def uncoloured(text):
    return re.sub("\x1b\\[[0-9;]*m", "", text)


def test_tables_are_written_whole_or_not_at_all(tmp_path):
    tables.write_table(TABLE, tmp_path / "new" / "table")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["table.md", "table.parquet"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "new" / "table.parquet"), TABLE)
    assert (tmp_path / "new" / "table.md").read_text() == tables.markdown(TABLE) + "\n"


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fails(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_training_line_says_what_was_reached():
    report = {"stage": "finetuning", "seconds": 1.5, "train": {"loss": 0.5, "examples": 1200}}
    assert tables.training_line(report) == "finetuning: trained in 1.5 s; train loss 0.500 (1,200 rows)"
    report["test"] = {"loss": 0.25, "accuracy": 0.75, "examples": 10}
    assert tables.training_line(report).endswith("; test loss 0.250, accuracy 0.750 (10 rows)")
