"""The scripts of `examples/` run as they are, and the classes in them also run from a configuration."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.project import msif, project

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 40


def run(name):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def test_own_objective(capsys):
    """Rows with the label of the test row lower its loss, the others raise it."""
    run("own_objective")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    influences = {" ".join(words[1:-1]): float(words[-1]) for words in lines}
    assert set(influences) == {"great debate", "great vote", "sad vote", "sad"}
    assert all((value < 0) == text.startswith("great") for text, value in influences.items())


def test_own_curvature(capsys):
    run("own_curvature")
    assert capsys.readouterr().out == "[-2.  2.]\n"


@pytest.fixture
def influences(tmp_path, monkeypatch):
    """Influences of a tiny project in which one stage has other settings; modules are found in `examples/`."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def score(stage, **values):
        path = project(tmp_path / str(len(list(tmp_path.iterdir()))))
        settings = json.loads(path.read_text())
        settings["stages"]["finetuning"]["data"] |= {"label_column": "stars", "keep": {}}
        settings["stages"]["finetuning"]["objective"] = {}
        settings["stages"][stage] |= values
        path.write_text(json.dumps(settings))
        for command in ("train", "query", "score"):
            assert msif(command, "--config", path, "--json") == 0
        query = (path.parent / "run" / "query" / "query.json").read_text()
        assert all(value.partition(":")[2] in query for value in values.values() if isinstance(value, str))
        return pd.read_parquet(path.parent / "run" / "scores.parquet")["influence_0"].to_numpy()

    return score


@pytest.mark.slow
def test_own_objective_in_a_configuration(influences):
    task = "own_objective:SmoothedClassification"
    unsmoothed = influences("finetuning", objective={"smoothing": 0.0}, task=task)
    np.testing.assert_allclose(unsmoothed, influences("finetuning"), rtol=1e-4, atol=1e-6)
    assert np.abs(influences("finetuning", task=task) - unsmoothed).max() > 1e-4


@pytest.mark.slow
def test_own_curvature_in_a_configuration(influences):
    found = influences("pretraining", curvature="own_curvature:EmpiricalFisher")
    assert np.abs(found - influences("pretraining")).max() > 1e-4
