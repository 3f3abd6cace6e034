"""Terminals, readers, launchers and signals: no finished run is lost to them, and none of them ends in a traceback."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.faults import Fault, assert_refused
from helpers.project import msif

from hf_msif.engine import repository
from hf_msif.project import hub, launch
from hf_msif.reports.tables import shows


class Terminal(io.TextIOWrapper):
    """A terminal of an encoding, or what a program writes to in its place."""

    def __init__(self, encoding, raw=None):
        self.written = raw or io.BytesIO()
        super().__init__(self.written, encoding=encoding, write_through=True)

    def text(self):
        return self.written.getvalue().decode(self.encoding)


class Gone(io.BytesIO):
    """A pipe whose reader has gone, or a disk that is full."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.after = error, after

    def write(self, content):
        self.after -= 1
        if self.after < 0:
            raise self.error
        return super().write(content)


@pytest.fixture
def terminal(monkeypatch):
    def make(stdout, stderr=None):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr or Terminal("utf-8"))

    return make


ENCODINGS = ("ascii", "cp1252", "latin-1", "cp437", "gbk", "utf-8", "utf-16")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_terminal_can_show_a_ranking(scored, terminal, encoding):
    scores = "--run", scored / "run", "-k", 2
    terminal(stdout := Terminal(encoding))
    assert msif("top", *scores) == 0
    text = stdout.text()
    assert ("┌" in text) == shows("┌") == encoding.startswith(("utf", "gbk", "cp437"))
    terminal(stdout := Terminal(encoding))
    assert msif("top", *scores, "--json") == 0
    assert len(json.loads(stdout.text())["tests"]) == 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_terminal_can_show_help_and_errors(untrained, terminal, encoding):
    terminal(stdout := Terminal(encoding))
    assert msif("plan", "--help") == 0
    assert "--stages.NAME.solver.damping" in stdout.text()
    terminal(Terminal(encoding), stderr := Terminal(encoding))
    assert msif("plan", "--config", untrained / "config.yaml", "--üsed", 1) == 2
    assert stderr.text().startswith("msif plan: error: unknown key '")


@pytest.mark.parametrize(("flags", "after"), [([], 0), ([], 1), ([], 3), (["--json"], 0)])
def test_a_reader_that_stops_ends_it_silently(scored, terminal, flags, after):
    terminal(Terminal("utf-8", Gone(BrokenPipeError(32, "Broken pipe"), after)), stderr := Terminal("utf-8"))
    assert msif("top", "--run", scored / "run", *flags) == 141
    assert "error: " not in stderr.text()


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "JSON"])
def test_an_output_that_is_full_is_said(scored, terminal, flags):
    terminal(Terminal("utf-8", Gone(OSError(28, "No space left on device"))), stderr := Terminal("utf-8"))
    assert msif("top", "--run", scored / "run", *flags) == 2
    assert "No space left on device" in stderr.text().splitlines()[-1]


def test_pipes_and_full_devices_of_the_system(scored):
    top = [sys.executable, "-u", "-m", "hf_msif", "top", "--run", str(scored / "run")]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.run(top, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        process = subprocess.run(top, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("msif top: error: ")
    assert process.stderr.count("\n") == 1


def test_an_interruption_of_the_imports_is_quiet(untrained):
    command = [sys.executable, "-m", "hf_msif", "plan", "--config", str(untrained / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)  # until PyTorch is being imported, which takes a second
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert out == ""


LAUNCHES = {"WORLD_SIZE": ("x", "0", "-1", "1.5", "٣", "1e3"), "RANK": ("x", "-1", "0x1", " ", "²")}
CASES = [
    (name, value, command) for name, values in LAUNCHES.items() for value in values for command in ("plan", "top")
]


@pytest.mark.parametrize(("name", "value", "command"), CASES)
def test_what_no_launcher_sets_is_named(untrained, capfd, monkeypatch, name, value, command):
    monkeypatch.setenv(name, value)
    line = command if command == "plan" else "top --run FOLDER"
    assert_refused(Fault(line, (f"the environment variable {name} is {value!r}", f"unset {name}")), untrained, capfd)


def test_launchers_are_told_to_what_they_are_for(untrained, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert msif("train", "--config", untrained / "config.yaml") == 2
    assert "it was started as 3 processes" in capfd.readouterr().err


def test_what_nobody_expected_is_one_sentence_with_its_place(scored, capfd, monkeypatch):
    from hf_msif.project.commands import top

    def fail(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(top, "run", fail)
    assert msif("top", "--run", scored / "run") == 2
    said = capfd.readouterr().err
    assert "ZeroDivisionError: division by zero (raised in test_bad_environment.py, line" in said
    assert "report it with the traceback that --debug prints" in said
    assert said.count("\n") == 1
    assert msif("top", "--run", scored / "run", "--debug") == 2
    said = capfd.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert said.endswith("\nZeroDivisionError: division by zero\n")
    assert "msif top: error" not in said


@pytest.fixture
def asked(monkeypatch):
    """The addresses to which connections are tried, all in vain, after nothing was tried before."""
    from datasets import config
    from huggingface_hub import constants

    for module in (constants, config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    addresses = []

    def connect(address, timeout):
        addresses.append(address)
        time.sleep(0.01)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr(repository, "getproxies", dict)
    repository.is_reachable.cache_clear()
    yield addresses
    repository.is_reachable.cache_clear()


def test_the_hub_is_asked_once_and_not_for_long(asked, tmp_path):
    from datasets import config
    from huggingface_hub import constants

    assert hub.prepare(str(tmp_path)) == str(tmp_path)
    assert not asked
    for _ in range(2):
        assert hub.prepare("user/model") == "user/model"
    assert len(asked) == 1
    assert constants.HF_HUB_OFFLINE
    assert config.HF_HUB_OFFLINE
    assert "cannot be reached" in hub.reason(ValueError("not found"))


@pytest.mark.parametrize(
    ("proxies", "target"),
    [
        ({"https": "http://10.9.9.9:8080"}, ("10.9.9.9", 8080)),
        ({"all": "10.9.9.9:8080"}, ("10.9.9.9", 8080)),
        ({"https": "http://proxy.example"}, ("proxy.example", 80)),
        ({"ftp": "http://10.9.9.9:8080"}, ("huggingface.co", 443)),
    ],
)
def test_a_proxy_that_is_away_is_no_way_to_the_hub(asked, monkeypatch, proxies, target):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(repository, "getproxies", lambda: proxies)
    monkeypatch.setattr(repository, "proxy_bypass", lambda host: False)
    assert not repository.is_reachable()
    assert asked == [target]


def test_silence_keeps_a_closed_pipe_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    stream.write("x")
    launch.silence(stream)
    stream.close()  # writes to nobody
