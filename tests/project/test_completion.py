"""What a shell completes: commands, flags, and keys and values of the configuration."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def completed(tmp_path):
    """The words that may stand at the end of a line; the shell is argcomplete's protocol."""

    def words(line):
        answer = tmp_path / "answer"
        answer.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "COMP_TYPE": "9",
        }
        command = [sys.executable, "-m", "hf_msif"]
        subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, check=True, timeout=60)
        return {word.strip() for word in answer.read_text().split("\n")} - {""}

    return words


def test_commands_and_their_flags_are_completed(completed):
    assert completed("msif co") == {"compare"}
    assert completed("msif top --r") == {"--run"}
    assert {"--config", "--json", "--budget", "--run_dir", "--test.number"} <= completed("msif plan --")


def test_keys_and_values_of_the_configuration_are_completed(completed, tmp_path):
    (tmp_path / "config.yaml").write_text("stages: {before: {}, after: {}}")
    begun = "msif train --config config.yaml --stages.after."
    solver = completed(f"{begun}solver.")
    assert {"--stages.after.solver.tol", "--stages.after.solver.name"} <= solver
    assert all(word.startswith("--stages.after.solver.") for word in solver)
    assert completed(f"{begun}link un") == {"unrolled"}
    assert completed(f"{begun}resized ") == {"true", "false"}
    assert completed("msif train --config conf") == {"config.yaml"}
    assert completed("msif train --config nowhere.yaml --stages.") == set()


def test_without_argcomplete_the_command_line_works(monkeypatch, capsys):
    from hf_msif.project.cli import main

    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out
