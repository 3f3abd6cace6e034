"""Real launches of 1, 2, 3 and 4 processes on gloo find what one process finds; the checks are in `distributed.py`."""

import os
import subprocess
import sys
from pathlib import Path

import distributed
import pytest

from hf_msif import vectors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of this process, for the launches to compare theirs with."""
    path = tmp_path_factory.mktemp("distributed")
    for name, settings in distributed.CASES.items():
        vectors.save(distributed.results(**settings), path / f"{name}.safetensors")
    distributed.record_run(path)
    vectors.save(distributed.unrolled(path), path / "unrolled.safetensors")
    return path


def launch(processes, *arguments, timeout=600, check=True, **variables):
    """`torchrun` on the CPU."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
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


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_finds_the_same(folder, processes):
    done = launch(processes, Path(distributed.__file__), folder, processes)
    for check in distributed.CHECKS:
        assert f"{check.__name__}: passed in a world of {processes}" in done.stdout
