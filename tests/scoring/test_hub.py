"""Scores that go to the Hub and come back, through a stand-in of its HTTP interface."""

import numpy as np
import pytest
import yaml
from helpers import hub

from hf_msif import InputError, Scores
from hf_msif.engine import repository

ROWS = [{"example_id": i, "text": text} for i, text in enumerate(["vote | tax", "<b>wall</b> ![x](http://y)", "jobs"])]
METADATA = {
    "stage": "pretraining",
    "N": 40.0,
    "tests": [{"text": "a *tweet*"}, {"text": "another"}],
    "noise_text": "reliability 0.88",
    "certificate": {
        "values": [0.5, 0.25],
        "stages": {
            "pretraining": {
                "link": "implicit",
                "examples": 3,
                "N": 40.0,
                "objective": {"class": "MaskedLM", "draws": 8},
                "text": "cg, column 0: converged\n```",
            }
        },
    },
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub.running(monkeypatch) as running:
        yield running


@pytest.fixture
def scores():
    return Scores.build(ROWS, np.array([[0.5, 1.0], [-2.0, 0.0], [1.5, -3.0]]), 40.0, {}, METADATA)


def test_scores_come_back_as_they_went(server, scores):
    url = scores.push_to_hub("me/scores", token="hf_secret")
    assert url == f"{server.address}/datasets/me/scores"
    sent = server.repositories["datasets/me/scores"]
    assert sent["private"] is True
    assert sorted(sent["files"]) == ["README.md", "scores.parquet"]
    assert server.tokens - {None} == {"Bearer hf_secret"}
    back = Scores.from_pretrained("me/scores", token="hf_secret")
    assert back.frame.equals(scores.frame)
    assert back.metadata == scores.metadata


def test_the_card_says_what_is_in_the_file(server, scores):
    scores.push_to_hub("me/scores", private=False, token="hf_secret")
    sent = server.repositories["datasets/me/scores"]
    assert sent["private"] is False
    _, header, body = sent["files"]["README.md"].decode().split("---\n", 2)
    plain = body.replace("\\", "")
    facts = yaml.safe_load(header)
    assert facts["configs"] == [{"config_name": "default", "data_files": "scores.parquet"}]
    for column in scores.frame:
        assert column.removesuffix("_0").removesuffix("_1") in plain
    for words in ("positive is harmful", "N = 40", "reliability 0.88", "MaskedLM(draws=8)", "metadata of its schema"):
        assert words in plain, words
    assert 'load_dataset("me/scores", split="train")' in body
    assert 'Scores.from_pretrained("me/scores")' in body
    # A text of the corpus is no picture, no HTML and no cell of its own; a certificate does not end its block.
    assert "<b>" not in body
    assert "![x]" not in body
    assert r"vote \| tax" in body
    assert "\n    ```" in body


def test_a_public_repository_gets_nothing_that_is_to_be_private(server, scores):
    server.repositories["datasets/me/scores"] = {"private": False, "files": {}}
    with pytest.raises(InputError, match="me/scores is there already and public, and private=True"):
        scores.push_to_hub("me/scores", token="hf_secret")
    assert server.repositories["datasets/me/scores"]["files"] == {}
    scores.push_to_hub("me/scores", private=False, token="hf_secret")
    assert server.repositories["datasets/me/scores"]["files"]


def test_what_cannot_be_sent_or_fetched_is_one_sentence(server, scores):
    with pytest.raises(InputError, match="repo_id is 'scores'; expected the owner and name of a repository"):
        scores.push_to_hub("scores")
    with pytest.raises(InputError, match=r"me/none is no folder here, and its scores\.parquet cannot be fetched"):
        Scores.from_pretrained("me/none")
    server.repositories["datasets/me/other"] = {"private": False, "files": {"a.txt": b""}}
    with pytest.raises(InputError, match=r"its scores\.parquet cannot be fetched from the Hub as a dataset"):
        Scores.from_pretrained("me/other")
    with pytest.raises(InputError, match=r"me/scores cannot be written on the Hub .*403.* run hf auth login"):
        scores.push_to_hub("me/scores", token="hf_unknown")
    assert "datasets/me/scores" not in server.repositories


def test_a_folder_of_this_machine_is_not_looked_for_on_the_hub(server, scores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores.to_parquet("me/scores/scores.parquet")
    assert Scores.from_pretrained("me/scores").frame.equals(scores.frame)
    for source in ("runs/gop/none", "../none", tmp_path / "none"):
        with pytest.raises(InputError, match="does not exist; expected the Parquet file"):
            Scores.from_pretrained(source)
    assert server.requests == []


@pytest.mark.parametrize("name", ["me/a.b-c_d", "Me2/x"])
def test_names_of_repositories(name):
    assert repository.is_repo_id(name)
