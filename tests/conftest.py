"""Settings of every test."""

import os

import pytest
import torch

# A failed assertion in a helper shows its values, as one in a test does.
pytest.register_assert_rewrite("helpers", "cases")

# Threads cost such small tensors more time than they save: minutes, on a busy machine, where they wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: notebooks, commands, launchers


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")


@pytest.fixture(scope="session")
def trained_project(tmp_path_factory):
    """The configuration's path of `helpers.project.project`, trained: to be copied before anything is changed."""
    from helpers.project import msif, project

    path = project(tmp_path_factory.mktemp("trained"))
    assert msif("train", "--config", path, "--json") == 0
    return path


@pytest.fixture(scope="session")
def scored_project(trained_project, tmp_path_factory):
    """The same after query and score: to be copied before anything is changed."""
    from helpers.project import copied, msif

    path = copied(trained_project, tmp_path_factory.mktemp("scored"))
    for command in ("query", "score"):
        assert msif(command, "--config", path, "--json") == 0
    return path
