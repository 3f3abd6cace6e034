"""Real launches of 1, 2, 3 and 4 processes find what one process finds; the checks are in `helpers/distributed.py`.

On gloo and the CPU; on a machine with GPUs on those, by NCCL where there are enough of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from helpers import distributed, tiny
from helpers.project import msif, project

from hf_msif import InputError, Scores
from hf_msif.engine.files import save_tensors
from hf_msif.project.commands import query


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of this process, for the launches to compare theirs with."""
    path = tmp_path_factory.mktemp("distributed")
    for name, settings in distributed.CASES.items():
        save_tensors(distributed.results(**settings), path / f"{name}.safetensors")
    distributed.record_run(path)
    save_tensors(distributed.unrolled(path), path / "unrolled.safetensors")
    return path


def launch(processes, *arguments, timeout=600, check=True, **variables):
    """`torchrun` on the CPU."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_finds_the_same(folder, processes):
    cpu = str(not torch.cuda.is_available()).lower()
    done = launch(processes, "-m", "helpers.distributed", folder, processes, ACCELERATE_USE_CPU=cpu)
    for check in distributed.CHECKS:
        assert f"{check.__name__}: passed in a world of {processes}" in done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained project in float64, its query and scores by one process."""
    path = project(tmp_path_factory.mktemp("launched"))
    flags = ["--config", path, *("--stages.pretraining.model.dtype", "float64")]
    flags += ["--stages.finetuning.model.dtype", "float64"]
    for command in ("train", "query", "score"):
        assert msif(command, *flags) == 0
    return path.parent, flags


def moved(trained, name):
    """The flags for a run of its own on the trained models."""
    folder, flags = trained
    flags = [*flags, "--run_dir", folder / name]
    for stage in ("pretraining", "finetuning"):
        flags += [f"--stages.{stage}.model.path", folder / "run" / stage, f"--stages.{stage}.training", "{}"]
    return [*flags, "--stages.pretraining.model.config", "null", "--stages.finetuning.model.head", "auto"]


@pytest.mark.launch
def test_the_command_line_under_a_launcher(trained):
    folder, _ = trained
    flags = moved(trained, "two")
    done = launch(2, "-m", "hf_msif", "query", *flags)
    assert done.stdout.count("query written to") == 1  # the main process speaks
    assert done.stdout.count("residual") == 6  # of finetuning and two replicates of pretraining, one per column
    assert not (folder / "two" / "query.checkpoints").exists()
    done = launch(2, "-m", "hf_msif", "score", *flags, "--corpus.part_rows", "8")
    assert done.stdout.count("29 rows scored in") == 1
    found, expected = (Scores.from_parquet(folder / run / "scores.parquet") for run in ("two", "run"))
    for q in range(2):
        np.testing.assert_allclose(found.influence(q), expected.influence(q), rtol=1e-6)
    streamed = [*flags, "--stages.pretraining.data.streaming", "true", "--stages.pretraining.curvature_samples", "29"]
    launch(2, "-m", "hf_msif", "query", *streamed)
    done = launch(2, "-m", "hf_msif", "score", *streamed, "--keep", "top=2")
    assert "29 rows scored (" in done.stdout
    kept = Scores.from_parquet(folder / "two" / "scores.parquet")
    assert kept.top(1).example_id[0].startswith("corpus.txt:")
    # Each process reports the failure once, and names it; the launch as a whole fails.
    done = launch(2, "-m", "hf_msif", "score", *flags, "--corpus.stage", "nowhere", check=False)
    assert done.returncode
    assert "corpus.stage is 'nowhere'" in done.stderr
    done = launch(2, "-m", "hf_msif", "train", *flags, check=False)
    assert done.returncode
    assert "started as 2 processes, but only diagnose, query, score, sweep share their work" in done.stderr


@pytest.mark.launch
def test_a_launcher_that_the_accelerator_does_not_join_is_refused(trained):
    done = launch(2, "-m", "hf_msif", "query", *moved(trained, "alone"), check=False, ACCELERATE_USE_CPU="false")
    assert done.returncode
    assert "the launcher started 2 processes, but Accelerate runs 1" in done.stderr


@pytest.mark.parametrize("name", ["cpu", "multi_gpu", "multi_node"])
def test_launch_files_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parents[2] / "recipes" / "accelerate_configs" / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert found.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert found.num_processes % found.num_machines == 0


class Kept(GeneralTracker):
    name, requires_logging_directory, main_process_only = "kept", False, False

    def __init__(self):
        super().__init__()
        self.logged = []

    tracker = None

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **more):
        self.logged.append((step, values))


def test_trackers_see_residuals_and_rates():
    tracker = Kept()
    accelerator = Accelerator(log_with=tracker)
    accelerator.init_trackers("test")
    made = distributed.chain(torch.float64)
    made.engine.accelerator = accelerator
    with pytest.warns(UserWarning, match="not solved to tolerance"):
        query = made.query(tiny.rows(1, seed=3))
    residuals = [(step, values["pre/residual"]) for step, values in tracker.logged if "pre/residual" in values]
    assert [step for step, _ in residuals] == [1, 2, 3]
    query.score(distributed.CORPUS, part_rows=5, batch_size=1)
    rates = [(step, values["sentences_a_second"]) for step, values in tracker.logged if "scored" in values]
    assert [step for step, _ in rates] == [20, 23]  # a round is sixteen batches or more
    assert all(rate > 0 for _, rate in rates)


@pytest.mark.slow
def test_commands_end_what_they_began(trained, monkeypatch):
    """Trackers may hold values back until their end; process groups part in order."""
    ends, inside = [], Accelerator.end_training
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ends.append(1) or inside(self))
    assert msif("query", *moved(trained, "ended")) == 0
    assert ends == [1]


def test_a_command_that_fails_ends_its_trackers_and_tells_all(trained, monkeypatch, capsys):
    class Broken(Kept):
        def finish(self):
            raise RuntimeError("offline")

    def failing(arguments, project):
        project.accelerator.trackers = [Broken(), kept]
        error = InputError("row 7 is not finite")
        error.add_note("Writing failed as well.")
        raise error

    kept, ends = Kept(), []
    monkeypatch.setattr(Kept, "finish", lambda self: ends.append(1))
    monkeypatch.setattr(query, "run", failing)
    assert msif("query", *moved(trained, "failed")) == 2
    assert ends == [1]
    said = capsys.readouterr().err
    assert "row 7 is not finite Writing failed as well. The tracker kept could not finish: offline." in said
