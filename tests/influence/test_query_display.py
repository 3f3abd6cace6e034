"""What a query and its certificates show of themselves, and a query that goes to the Hub and comes back."""

import numpy as np
import pytest
import yaml
from helpers import hub, tiny

from hf_msif import InputError, Query
from hf_msif.display import LINES
from hf_msif.influence import DirectCertificate
from hf_msif.influence.backward import RunCertificate
from hf_msif.influence.replicates import ReplicatesCertificate
from hf_msif.influence.segment_sweep import SegmentReport, SegmentsCertificate
from hf_msif.solvers.certificate import Certificate

TESTS = [{"example_id": i, "text": f"<i>vote</i> {i} " + "wall " * 15, "label": i % 2} for i in range(6)]
CORPUS = tiny.rows(6, seed=1)


@pytest.fixture(scope="module")
def msif():
    before = tiny.model("bert", "masked")
    return tiny.chain(before, tiny.finetuned(before, "bert"), tol=1e-6, data=(CORPUS, tiny.rows(5, seed=2)))


@pytest.fixture(scope="module")
def query(msif):
    return msif.query(TESTS)


def certificate(columns, failed=()):
    residual = [1e-4 * (1 + q % 7) for q in range(columns)]
    for q in failed:
        residual[q] = 0.5
    each = {"negative_curvature": [False] * columns, "smallest_ritz": [None] * columns}
    return Certificate(
        "cg",
        0.5,
        1e-3,
        iterations=[1 + q for q in range(columns)],
        matvecs=[2 + q for q in range(columns)],
        residual=residual,
        converged=[r <= 1e-3 for r in residual],
        status=["converged" if r <= 1e-3 else "max_iter" for r in residual],
        largest_ritz=[None] * columns,
        **each,
    )


def segments(count):
    report = {"step": 1, "time": 1.0, "iterations": [3], "error": [1e-4], "smallest_ritz": 0.1, "largest_ritz": 2.0}
    report |= {"reach": 0.1, "amplified": 1.0, "unstable": False, "growth": []}
    return SegmentsCertificate(1e-3, 50, [SegmentReport(begin=n, end=n + 1, **report) for n in range(count)])


def run(columns):
    return RunCertificate(9, [1.5] * columns, 1e4, 0.0, [[9, [1.0] * columns], [0, [0.5] * columns]])


CERTIFICATES = {
    "one column": certificate(1),
    "forty columns": certificate(40, failed=(17,)),
    "replicates": ReplicatesCertificate([certificate(40, failed=(3,)), certificate(40)]),
    "many replicates": ReplicatesCertificate([certificate(9)] * 30),
    "segments": segments(2),
    "many segments": segments(90),
    "a run": run(2),
    "a run of many columns": run(70),
    "direct": DirectCertificate("given", 3),
}


@pytest.mark.parametrize("shown", CERTIFICATES.values(), ids=CERTIFICATES)
def test_a_certificate_is_a_few_lines_and_a_small_table(shown):
    assert 1 <= len(str(shown).splitlines()) <= LINES
    assert len(repr(shown).splitlines()) == 1
    assert shown._repr_html_().count("<tr>") <= LINES + 1


def test_of_many_columns_the_worst_are_told():
    text = str(certificate(40, failed=(17,)))
    assert text.startswith("cg: 39 of 40 columns converged, 1 to 40 iterations, residual at most 5.0e-01 (tol 1e-03)")
    assert "cg, column 17: stopped at 18 iterations, not converged" in text
    assert "… and 32 columns of smaller residual" in text
    assert "column 17" not in str(certificate(40)).replace("column 170", "")
    assert repr(certificate(40)).startswith("<cg: 40 of 40 columns converged")


def test_one_is_singular():
    text = str(certificate(1))
    assert "converged in 1 iteration;" in text
    assert "2 products" in text


def test_a_query_says_what_is_asked_and_how_it_was_solved(query):
    text = str(query)
    assert len(text.splitlines()) <= LINES
    assert repr(query) == "<Query: 6 tests through 2 stages, pre, fine>"
    assert text.startswith("Query: 6 tests through 2 stages, pre, fine\n")
    for q in range(3):
        assert f"{query.losses[q]:.4g}" in text
    assert "… 3 more" in text
    assert max(len(line) for line in text.splitlines() if "vote" in line) < 80
    for words in ("one column for each test", query.noise_text("pre"), "6 of 6 columns converged", "query.score("):
        assert words in text, words
    assert "implicit  5 " in text


def test_a_group_says_how_its_tests_are_put_together(msif):
    assert "one column for the mean over all tests" in str(msif.query(TESTS[:2], aggregate="mean"))


def test_html_escapes_the_texts(query):
    shown = query._repr_html_()
    assert "&lt;i&gt;vote&lt;/i&gt;" in shown
    assert "<i>" not in shown


def test_a_query_comes_back_from_the_hub_as_it_went(query, msif, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub.running(monkeypatch) as server:
        assert query.push_to_hub("me/query", token="hf_secret") == f"{server.address}/me/query"
        sent = server.repositories["models/me/query"]
        assert sent["private"] is True
        assert sorted(sent["files"]) == ["README.md", "query.json", "query.safetensors"]
        back = Query.from_pretrained("me/query", msif, token="hf_secret")
        with pytest.raises(InputError, match=r"me/none is no folder here, and its query\.safetensors and query\.json"):
            Query.from_pretrained("me/none", msif)
    np.testing.assert_array_equal(back.score(CORPUS).influences(), query.score(CORPUS).influences())
    _, header, body = sent["files"]["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "hf_msif"
    assert 'Query.from_pretrained("me/query", msif)' in body
    assert "<i>" not in body
    for stage in ("pre", "fine"):
        assert f"stage '{stage}': link='implicit'" in body
