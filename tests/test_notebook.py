"""The notebooks run, and show what their sentences say."""

import html
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from hf_msif import Scores
from hf_msif.project.demo.run import pair

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the notebooks run: the demo's pair is there, after hardly any training."""
    folder = tmp_path_factory.mktemp("notebooks")
    pair(folder / "runs" / "demo", steps=(30, 20))
    return folder


@pytest.fixture(scope="module")
def explored(folder):
    """The outputs of the notebook that explores a run, and the scores that it shows."""
    by_hand = [f"explore({q}, {end!r}, 'debate')" for q in (0, 2) for end in ("most helpful", "most harmful")]
    outputs = execute("02_explore_top_sentences.ipynb", folder, by_hand)
    return outputs, Scores.from_pretrained(folder / "runs" / "quickstart")


def execute(name, folder, more=()):
    """The outputs of a notebook in this folder, with more cells at its end."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = outputs_of(notebook)
    assert_reads_well(outputs)
    return outputs


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def assert_reads_well(outputs):
    # A figure that fails to draw is an error output that raises nothing.
    assert [o.evalue for o in outputs if o.output_type == "error"] == []
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []


def tables(outputs):
    return html.unescape(" ".join(o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})))


def lines(outputs, column):
    """First cell → the other cells, of the table that has this column."""
    for page in (o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})):
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", page, re.S)]
        if column in rows[0]:
            return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}
    raise AssertionError(f"no table has a column {column}")


def printed(outputs):
    return "".join(o.text for o in outputs if o.get("name") == "stdout")


def figures(outputs):
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.slow
def test_quickstart(folder):
    outputs = execute("01_quickstart.ipynb", folder)
    scores, shown = Scores.from_pretrained(folder / "runs" / "quickstart"), tables(outputs)
    for by in ("helpful", "harmful"):
        assert all(text in shown for text in scores.top(8, by, distinct=True)["text"])
    assert all(text in shown for text in scores.top(3, "relative", query=None, distinct=True)["text"])
    assert {test["prediction"] for test in scores.tests} <= {"blame", "praise"}
    assert "trainable: head" in printed(outputs)
    report = (folder / "runs" / "quickstart.html").read_text()
    for test in scores.tests:
        assert f"{test['probability']:.6f}" in shown
        assert test["text"] in report
    assert figures(outputs) == 1


@pytest.mark.slow
def test_explore(explored):
    outputs, scores = explored
    shown = tables(outputs)
    assert scores.columns == 3
    assert all(test["text"] in shown for test in scores.tests)
    for by in ("helpful", "harmful"):
        assert all(text in shown for text in scores.top(10, by, distinct=True)["text"])
    expected = pd.DataFrame(scores.influences()).corr("spearman").to_numpy()
    assert all(f"{value:.2f}" in shown for value in expected[np.triu_indices(3, 1)])
    most = scores.top(1, distinct=True)["text"].item()
    unshaded = re.sub(r"</?(span|p)[^>]*>", "\n", shown)
    assert all(word in unshaded for word in most.split())
    assert "color-mix" in shown
    assert figures(outputs) == 1


@pytest.mark.slow
def test_explore_by_hand(explored):
    outputs, scores = explored
    assert any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs)
    found = [
        html.unescape(o.data["text/html"]) for o in outputs if "T_explored" in o.get("data", {}).get("text/html", "")
    ]
    asked = [(q, by) for q in (0, 2) for by in ("helpful", "harmful")]
    for page, (q, by) in zip(found[-len(asked) :], asked, strict=True):
        rows = scores.top(len(scores), by, query=q, distinct=True)
        expected = rows[rows["text"].str.contains("debate", regex=False)]["text"].head(10)
        last_cells = re.findall(r"<td[^>]*>([^<]*)</td>\s*</tr>", page)
        assert last_cells == expected.tolist()


@pytest.mark.slow
def test_explore_scores_alone(folder, explored, tmp_path, monkeypatch):
    """A group of tests has one column of scores, but many tests; there are no shares of tokens, no models."""
    _, scores = explored
    columns = [f"{name}_{q}" for name in ("influence", "influence_se", "removal_effect") for q in (1, 2)]
    frame = scores.frame.drop(columns=columns).rename(columns=lambda name: name.removesuffix("_0"))
    frame.loc[0, ["text", "influence"]] = ["a $5 <b>bold</b> claim & $6", -1e6]
    Scores(frame, {**scores.metadata, "columns": 1}).to_parquet(tmp_path / "scores.parquet")
    monkeypatch.setenv("MSIF_RUN", str(tmp_path))
    outputs = execute("02_explore_top_sentences.ipynb", folder)
    assert "a $5 <b>bold</b> claim & $6" in tables(outputs)
    assert "no shares" in printed(outputs)
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.parquet"]


@pytest.mark.slow
def test_a_run_that_does_not_exist_is_an_error(folder, tmp_path, monkeypatch):
    """A misspelt folder must not be answered with the demo's sentences."""
    monkeypatch.setenv("MSIF_RUN", str(tmp_path / "misspelt"))
    with pytest.raises(CellExecutionError, match="misspelt"):
        execute("02_explore_top_sentences.ipynb", folder)


@pytest.mark.slow
def test_your_own_model(folder):
    outputs = execute("03_your_own_model.ipynb", folder)
    runs = [Scores.from_pretrained(folder / "runs" / "own" / name) for name in ("head", "lora_explained")]
    shown = tables(outputs)
    for scores in runs:
        assert all(text in shown for text in scores.top(5, "helpful", distinct=True)["text"])
    expected = pd.DataFrame({i: scores.influence() for i, scores in enumerate(runs)}).corr("spearman").round(2)
    assert all(str(value) in shown for value in expected.to_numpy()[np.triu_indices(2, 1)])
    assert "trainable: head" in printed(outputs)


@pytest.mark.slow
def test_trust(folder):
    outputs = execute("04_trust_the_scores.ipynb", folder)
    text = printed(outputs)
    assert "rank correlation" in text
    pearson = {
        name: float(re.search(rf"^{name} +(-?\d\.\d+)", text, re.M)[1]) for name in ("influence", "by curvature")
    }
    # Removals are predicted to first order through the recorded runs; without them less.
    assert pearson["influence"] > 0.8
    assert pearson["influence"] > pearson["by curvature"]
    assert figures(outputs) == 3


@pytest.mark.slow
def test_poison(folder):
    outputs = execute("05_poison.ipynb", folder)
    corpus = pd.read_csv(folder / "runs" / "demo" / "corpus.csv", keep_default_na=False)
    scores, shares = Scores.from_pretrained(folder / "runs" / "quickstart"), []
    for q, test in enumerate(scores.tests):
        planted = (corpus["kind"] == "planted") & corpus["topic"].isin(test["text"].split())
        first = np.argsort(-abs(scores.influence(q)), kind="stable")[:10]
        shares.append(planted[first].sum() / planted.sum())
    shown = float(lines(outputs, "100")["influence"]["10"])
    assert shown == pytest.approx(np.mean(shares), abs=0.006)
    assert figures(outputs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_clean(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    outputs = outputs_of(notebook)
    assert_reads_well(outputs)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert all(not cell.metadata for cell in notebook.cells)
    text = json.dumps([{**o.get("data", {}), "image/png": ""} | {"text": o.get("text")} for o in outputs])
    assert not re.search(r"[\s'\"(=](/\w+){2,}/| at 0x|C:\\\\|Traceback", text)
    assert "widget-view" not in text


def test_committed_outputs_of_poison_find_the_planted():
    """After the demo's whole training, which the other tests cut short."""
    notebook = nbformat.read(ROOT / "notebooks" / "05_poison.ipynb", as_version=4)
    recall = {name: float(row["10"]) for name, row in lines(outputs_of(notebook), "100").items() if row.get("10")}
    # A third is the most that ten of thirty can be.
    assert min(recall["influence"], recall["relative influence"]) > 0.2 > 2 * max(recall["BM25"], recall["TF-IDF"])


def test_the_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text()
    assert NAMES
    assert all(f"(notebooks/{name})" in readme for name in NAMES)
