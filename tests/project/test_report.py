"""`msif report`: the file that it writes of a run folder, its shares, and what it does not replace."""

import re

import pytest
from helpers.project import answer, copied, image_project, msif, snapshot
from helpers.report import Report

from hf_msif.engine import folders
from hf_msif.project.lock import in_use
from hf_msif.scoring.scores import Scores


@pytest.fixture
def run(scored_project, tmp_path):
    return copied(scored_project, tmp_path).parent / "run"


def refused(capsys, *arguments):
    capsys.readouterr()
    assert msif(*arguments) == 2
    return capsys.readouterr().err


def parts_sum(report):
    assert report.lines
    for line in report.lines:
        influence = float(line.cells["Influence"])
        for parts in (line.tokens, line.layers):
            size = max(abs(value) for _, value in parts)
            assert sum(value for _, value in parts) == pytest.approx(influence, rel=1e-4, abs=1e-5 * size)


def test_a_run_is_shown_with_the_shares_that_msif_score_left(run, capsys):
    told = answer(capsys, "report", "--run", run, "-k", 3)
    assert told["shares"] is True
    assert told["report"] == str(run / "report.html")
    report = Report(run / "report.html")
    scores = Scores.from_parquet(run / "scores.parquet")
    for test in range(scores.columns):
        shown = [float(line.cells["Influence"]) for line in report.of("harmful", test)]
        assert shown == scores.top(3, "harmful", test, distinct=True)["influence"].clip(lower=0).tolist()
        assert scores.tests[test]["prediction"] in report.text
    parts_sum(report)
    assert f"msif report --run {run} -k 3" in report.text
    assert "report.html" in folders.read_marker(run).facts["files"]
    assert answer(capsys, "report", "--run", run)["report"] == told["report"]  # its own file is replaced


def test_without_shares_of_these_scores_nothing_is_shaded(run, capsys):
    (run / "shares.parquet").unlink()
    assert msif("report", "--run", run) == 0
    assert "tokens are not shaded, since msif score left no shares of these scores" in capsys.readouterr().out
    assert "Tokens are not shaded: their shares are not known" in Report(run / "report.html").text


@pytest.mark.slow
def test_shares_follow_the_scores(scored_project, tmp_path, capsys):
    path = copied(scored_project, tmp_path)
    run = path.parent / "run"
    assert msif("score", "--config", path, "--corpus.mask_rounds", 2) == 0
    assert msif("report", "--run", run) == 0
    parts_sum(Report(run / "report.html"))
    assert msif("score", "--config", path, "--keep", "top=2", "--corpus.dtype", "bfloat16") == 0
    assert msif("report", "--run", run) == 0
    report = Report(run / "report.html")
    assert not report.of("least")  # a shortlist does not seek them
    parts_sum(report)
    assert msif("score", "--config", path, "--corpus.stage", "finetuning") == 0
    told = answer(capsys, "report", "--run", run, "--stage", "finetuning")
    assert told["report"] == str(run / "report-finetuning.html")
    report = Report(told["report"])
    assert re.search("Tokens are not shaded: the terms of .* predict no tokens", report.text)
    assert report.lines[0].layers
    assert any(chip.startswith("label ") for chip in report.lines[0].chips)


@pytest.mark.slow
def test_images_have_layers_and_no_tokens(tmp_path):
    path = image_project(tmp_path)
    for command in ("train", "query", "score"):
        assert msif(command, "--config", path) == 0
    assert msif("report", "--run", tmp_path / "run") == 0
    report = Report(tmp_path / "run" / "report.html")
    assert report.lines[0].text.startswith("example ")
    assert report.lines[0].layers
    assert "10 test examples together" in report.text


def test_a_file_of_the_users_is_not_replaced(run, tmp_path, capsys):
    for path, sentence in (
        (run / "report.html", "report.html exists, and msif did not write it"),
        (tmp_path / "mine.html", "mine.html exists, and msif report did not write it"),
    ):
        path.write_text("mine")
        assert sentence in refused(capsys, "report", "--run", run, "--output", path)
        assert path.read_text() == "mine"
        path.unlink()
    assert msif("report", "--run", run, "--output", tmp_path / "other" / "new.html") == 0
    assert msif("report", "--run", run, "--output", tmp_path / "other" / "new.html") == 0
    assert Report(tmp_path / "other" / "new.html").lines


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-k", "0"], "-k is 0; expected at least 1"),
        (["--output", "report.txt"], "--output is 'report.txt'; expected the path of an HTML file"),
        (["--stage", "nothing"], "none of 'nothing'"),
    ],
)
def test_bad_input(run, capsys, arguments, sentence):
    before = snapshot(run)
    assert sentence in refused(capsys, "report", "--run", run, *arguments)
    assert snapshot(run) == before


def test_damaged_shares_are_told(run, capsys):
    (run / "shares.parquet").write_bytes((run / "shares.parquet").read_bytes()[:-50])
    assert "shares.parquet holds no shares" in refused(capsys, "report", "--run", run)


def test_a_run_folder_in_use_is_told_and_another_place_is_free(run, tmp_path, capsys):
    with in_use(run, "msif train"):
        assert f"--run '{run}' is in use by msif train" in refused(capsys, "report", "--run", run)
        assert msif("report", "--run", run, "--output", tmp_path / "report.html") == 0
