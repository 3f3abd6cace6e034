"""The notebook runs on the demo's data, and on the barest run folder."""

import html
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from hf_msif import Scores
from hf_msif.project.demo.run import demo
from hf_msif.reports.tables import write_table

pytestmark = pytest.mark.slow
NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "explore_top_sentences.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's folder after hardly any training; the tables that take long to make are made up."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_msif.project.demo.run.CURVATURE_SAMPLES", 32)
        report = demo(folder, quiet=True, steps=(30, 20), check=False)
    report["removal"] = [{"left out": "made up", "loss": 0.5, "change": 0.25, "predicted change": 0.125}]
    (folder / "demo.json").write_text(json.dumps(report))
    sweep = {"damping": [0.1, 1.0], "iterations": [9, 4], "residual": [1e-3, 1e-3], "spread": [2.0, 1.0]}
    write_table(pd.DataFrame({**sweep, "top_k_kept": [None, 0.5], "rank_correlation": [None, 0.9]}), folder / "sweep")
    return folder


def execute(run, monkeypatch):
    monkeypatch.setenv("MSIF_RUN", str(run))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def tables(outputs):
    return html.unescape(" ".join(o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})))


def assert_reads_well(outputs, least_figures):
    # A figure that fails to draw is an error output that raises nothing.
    assert [o.evalue for o in outputs if o.output_type == "error"] == []
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= least_figures


def test_runs_on_the_demo(run, monkeypatch):
    outputs = execute(run, monkeypatch)
    assert_reads_well(outputs, least_figures=3)
    scores, shown = Scores.from_parquet(run / "scores.parquet"), tables(outputs)
    for found in (scores.top(by="helpful"), scores.top(by="harmful"), scores.bottom()):
        assert all(text in shown for text in found.text)
    assert all(test["text"] in shown for test in scores.metadata["tests"])
    assert all(stage in shown for stage in scores.metadata["certificate"]["stages"])
    assert "rank correlation" in shown
    assert "made up" in shown


def test_runs_on_scores_alone(run, tmp_path, monkeypatch):
    """A group of test examples has one column of scores, but many tests; there is no sweep and no demo.json."""
    scores = Scores.from_parquet(run / "scores.parquet")
    kept = scores.frame.drop(columns=[f"{name}_{q}" for name in ("influence", "removal_effect") for q in (1, 2)])
    kept = kept.rename(columns={"influence_0": "influence", "removal_effect_0": "removal_effect"})
    kept.loc[0, ["text", "influence"]] = ["a $5 <b>bold</b> claim & $6", -1e6]
    Scores(kept, {**scores.metadata, "columns": 1}).to_parquet(tmp_path / "scores.parquet")
    outputs = execute(tmp_path, monkeypatch)
    assert_reads_well(outputs, least_figures=2)
    assert "a $5 <b>bold</b> claim & $6" in tables(outputs)
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.parquet"]


def test_a_run_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    """Only without MSIF_RUN is the demo run: a misspelt folder must not be answered with the demo's sentences."""
    with pytest.raises(CellExecutionError, match="does not exist"):
        execute(tmp_path / "misspelt", monkeypatch)


def test_committed_outputs_are_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert_reads_well(outputs, least_figures=3)
    text = json.dumps([{**o.get("data", {}), "image/png": ""} | {"text": o.get("text")} for o in outputs])
    assert "runs/" not in text
    assert " at 0x" not in text
    assert all(not cell.metadata for cell in notebook.cells)
