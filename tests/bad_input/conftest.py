"""Projects to be spoilt: each test gets a copy of its own."""

import json

import pytest
from helpers.project import copied, msif, project


@pytest.fixture(scope="session")
def scored_project(trained_project, tmp_path_factory):
    """A project that went through train, query and score, made once; its models are trained on its own files."""
    path = copied(trained_project, tmp_path_factory.mktemp("scored"))
    for command in ("query", "score"):
        assert msif(command, "--config", path, "--test.replicates", 1, "--json") == 0
    settings = json.loads(path.read_text())
    settings["test"]["replicates"] = 1
    path.write_text(json.dumps(settings, indent=1))
    return path


@pytest.fixture
def scored(scored_project, tmp_path):
    """The folder of a copy of a scored project."""
    return copied(scored_project, tmp_path / "project").parent


@pytest.fixture
def untrained(tmp_path):
    """The folder of a project without a run."""
    return project(tmp_path / "project").parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """An absent Hub id is looked up: no test waits for a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
