"""What a terminal shows, by a pseudo-terminal: tables of its width, and texts that give it no orders."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest

from hf_msif.scoring.scores import Scores

COLUMNS = 60
TEXT = "[red]no markup[/red] [/] \x1b]0;title\x07 " + "and many more words " * 8


@pytest.fixture
def ranking(tmp_path):
    """The command that shows a run folder with two rows."""
    rows = [{"example_id": 0, "text": TEXT}, {"example_id": 1, "text": "short"}]
    facts = {"loss": [1.0, 2.0], "terms": [1.0, 1.0]}
    metadata = {"tests": [{"text": TEXT}], "noise_text": ""}
    Scores.build(rows, np.array([[0.5], [-0.25]]), 2.0, facts, metadata).to_parquet(tmp_path / "scores.parquet")
    return [sys.executable, "-m", "hf_msif", "top", "--run", str(tmp_path)]


def shown_in_terminal(command):
    """What a command prints to a terminal of 60 columns, without its colours."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "PYTHONUTF8": "1"}
    process = subprocess.Popen(command, stdin=writer, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    content = b""
    try:
        while part := os.read(reader, 4096):
            content += part
    except OSError:  # so a terminal ends when its last writer has gone
        pass
    os.close(reader)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", content.decode().replace("\r\n", "\n"))


def test_a_table_fits_the_terminal_and_its_texts_give_no_orders(ranking):
    text = shown_in_terminal(ranking)
    grid = [line for line in text.splitlines() if line[:1] in set("┌│├└")]
    assert {len(line) for line in grid} == {COLUMNS}
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"\x1b]0;title\x07" in text
    cells = " ".join(" ".join(line.split("│")[-2].strip() for line in grid if "│" in line).split())
    assert "[red]no markup[/red]" in cells
    assert cells.count("more") == TEXT.count("more")


def test_a_table_in_a_pipe_has_no_colours(ranking):
    process = subprocess.run(ranking, capture_output=True, text=True, check=True)
    assert "\x1b" not in process.stdout
    assert r"\x1b]0;title\x07" in process.stdout
    assert process.stdout.count("more") == 2 * TEXT.count("more")
