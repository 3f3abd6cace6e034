"""The HTML report: what it says, what it marks, the shares that it shows, and hostile texts, by parsing the HTML."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from helpers import tiny
from helpers.report import HOSTILE, Asked, Report, scores_of

from hf_msif import InputError, MultiStageInfluence, Scores, Stage, objectives, solvers
from hf_msif.engine.stream import Stream
from hf_msif.reports.histogram import histogram
from hf_msif.reports.html import is_report, write_report
from hf_msif.reports.shares import Shares
from hf_msif.reports.visible import visible
from hf_msif.scoring.noise import Noise
from hf_msif.scoring.similarity import BM25, TFIDF

TESTS = [{"example_id": 7, "text": "the tax", "label": "no"}, {"example_id": 8, "text": "we won the vote"}]
TEXTS = ["the tax", "the tax", "a wall of jobs", "we won", "no tax and no vote", "sad debate"]
INFLUENCE = np.array([[3.0, -1.0], [2.0, -9.0], [-5.0, -8.0], [0.1, 0.5], [-0.2, 2.0], [0.0, 1.0]])


def report(scores, folder, **settings):
    write_report(scores, folder / "report.html", **settings)
    return Report(folder / "report.html")


@pytest.fixture(scope="module")
def asked():
    return Asked()


@pytest.fixture(scope="module")
def shaded(asked, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    asked.scores.to_html(path, k=3, query=asked.query, corpus=asked.corpus)
    return Report(path)


def values(lines, label):
    return [float(line.cells[label]) for line in lines]


def test_each_list_has_its_rows_in_its_order(tmp_path):
    made = report(scores_of(INFLUENCE, TEXTS, TESTS), tmp_path, k=2)
    assert values(made.of("helpful"), "Influence") == [-5.0, -0.2]
    assert values(made.of("harmful"), "Influence") == [3.0, 0.1]  # the second row has the text of the first one
    assert values(made.of("least"), "Influence") == [0.0, 0.1]
    assert [line.text for line in made.of("helpful", test=1)] == ["the tax", "a wall of jobs"]
    for line in made.lines:
        assert float(line.cells["Removal"]) == -float(line.cells["Influence"]) / 4.0


def test_copies_are_one_line_and_those_of_the_test_are_marked(tmp_path):
    made = report(scores_of(INFLUENCE, TEXTS, TESTS), tmp_path)
    texts = [line.text for line in made.of("harmful")]
    assert len(texts) == len(set(texts))
    (copies,) = [line for line in made.of("harmful") if line.text == "the tax"]
    assert [chip for chip in copies.chips if chip.startswith("×")] == ["×2"]
    assert "same text as the test" in copies.chips
    (of_the_other,) = [line for line in made.of("helpful", test=1) if line.text == "the tax"]
    assert "same text as the test" not in of_the_other.chips


def test_a_row_that_leads_every_list_is_told(tmp_path):
    made = report(scores_of(INFLUENCE, TEXTS, TESTS), tmp_path, k=2)
    (generic,) = [line for line in made.of("helpful") if line.text == "a wall of jobs"]
    assert "in the lists of 2 of 2 tests" in generic.chips
    assert "Rows that lead nearly all lists" in made.text
    alone = report(scores_of(INFLUENCE[:, :1], TEXTS, TESTS[:1]), tmp_path)
    assert "Rows that lead nearly all lists" not in alone.text


def test_what_is_known_of_a_test_is_told(tmp_path):
    test = {**TESTS[0], "prediction": "Negative", "probability": 0.876, "loss": 1.25}
    made = report(scores_of(INFLUENCE[:, :1], TEXTS, [test]), tmp_path)
    for told in ("label", "no", "Negative (88%)", "1.25"):
        assert told in made.isolated or told in made.text
    certificate = {"losses": [0.5, 2.5], "values": [-3.25, 0.0], "stages": {}, "aggregate": "sum"}
    settings = {"certificate": certificate, "measurement": "margin"}
    made = report(scores_of(INFLUENCE[:, :1], TEXTS, TESTS, **settings), tmp_path)
    assert "mean loss" in made.text
    assert {"1.5", "−1.62"} <= set(made.isolated)
    assert "2 test examples together" in made.text


def test_similarities_are_those_of_the_words(tmp_path):
    made = report(scores_of(INFLUENCE, TEXTS, TESTS), tmp_path)
    for test in (0, 1):
        lines = made.of("least", test=test)
        texts, queries = [line.text for line in lines], [TESTS[test]["text"]]
        np.testing.assert_allclose(values(lines, "BM25"), BM25(TEXTS)(texts, queries)[:, 0])
        np.testing.assert_allclose(values(lines, "TF-IDF cosine"), TFIDF(TEXTS)(texts, queries)[:, 0])


def test_warnings_come_first_and_a_noisy_ranking_is_the_first_of_them(tmp_path):
    rng = np.random.default_rng(0)
    replicates = rng.normal(size=(6, 2, 2))
    noise = dataclasses.replace(Noise.measured(replicates), reliability=[0.9, 0.3])
    stages = {"finetuning": {"solve": {"converged": [True, False]}, "text": "cg: stopped", "link": "implicit"}}
    facts = {"noise": noise.to_dict(), "noise_text": str(noise), "certificate": {"stages": stages}, "truncated": 3}
    scores = scores_of(replicates.mean(1), TEXTS, TESTS, errors=noise.standard_errors(replicates), **facts)
    made = report(scores, tmp_path)
    assert made.warnings[0].startswith("THIS RANKING IS MOSTLY NOISE")
    assert "Stage finetuning: 1 of 2 solutions are not within their tolerance" in made.warnings[1]
    assert made.warnings[2].startswith("3 of 6 rows were cut")
    assert "This ranking is reliable (two replicates have the rank correlation 0.90)" in made.text
    assert "mostly noise: do not read single rows" in made.text
    assert made.text.index("Read this first") < made.text.index("Search all lists")
    top = scores.top(10, by="helpful", distinct=True).head(1)
    line = made.of("helpful")[0]
    assert float(line.cells["± SE"]) == top.influence_se[0]
    assert float(line.cells["In top"]) == top.top_probability[0]
    good = dataclasses.replace(noise, reliability=[0.9, 0.8]).to_dict()
    calm = scores_of(INFLUENCE, TEXTS, TESTS, noise=good, certificate={"stages": {}})
    assert not report(calm, tmp_path).warnings


def test_the_parts_of_tokens_and_layers_sum_to_the_influence_of_their_row(asked, shaded):
    assert len(shaded.lines) == 2 * 3 * 3
    assert "Encoder cosine" in shaded.lines[0].cells
    of_text = {row["text"] for row in asked.corpus}
    for line in shaded.lines:
        influence = float(line.cells["Influence"])
        size = max(abs(value) for _, value in line.tokens + line.layers)
        for parts in (line.tokens, line.layers):
            assert sum(value for _, value in parts) == pytest.approx(influence, rel=1e-5, abs=1e-9 * size)
        assert line.text in of_text
        assert [token for token, _ in line.tokens] == line.text.split()
        assert {layer for layer, _ in line.layers} == {"embeddings", "encoder.layer.0", "encoder.layer.1", "cls"}


def test_a_token_has_the_sum_of_the_terms_that_predict_it(asked, shaded):
    line = shaded.of("harmful", test=1)[0]
    (row,) = [row for row in asked.corpus if row["text"] == line.text][:1]
    terms = asked.query.token_scores([row], query=1)
    expected = terms.groupby("position")["influence"].sum()
    np.testing.assert_allclose([value for _, value in line.tokens], expected, rtol=1e-9)


def test_the_encoders_similarity_is_the_cosine_of_mean_outputs(asked, shaded):
    line = shaded.of("helpful")[0]
    texts, outputs = (line.text, asked.tests[0]["text"]), []
    for text, bound in zip(texts, asked.query.chain.stages, strict=True):
        encoded = tiny.tokenizer()(text, return_tensors="pt")
        outputs.append(
            bound.stage.model.bert.eval()(input_ids=encoded["input_ids"]).last_hidden_state[0].mean(0).detach().numpy()
        )
    one, other = outputs
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert float(line.cells["Encoder cosine"]) == pytest.approx(expected, rel=1e-9)


def test_shares_are_kept_beside_the_scores(asked, tmp_path):
    shares = Shares.of_scores(asked.scores, asked.query, k=1)
    shares.save(tmp_path / "shares.parquet", asked.scores)
    asked.scores.to_parquet(tmp_path / "scores.parquet")
    scores = Scores.from_parquet(tmp_path / "scores.parquet")
    loaded = Shares.load(tmp_path / "shares.parquet", scores)
    pd.testing.assert_frame_equal(loaded.frame, shares.frame)
    direct, again = (report(scores, tmp_path, k=1, **s) for s in ({"query": asked.query}, {"shares": loaded}))
    assert direct.lines == again.lines
    assert direct.lines[0].tokens
    scores.metadata["N"] += 1  # of another query
    assert Shares.load(tmp_path / "shares.parquet", scores) is None
    assert Shares.load(tmp_path / "nothing.parquet", scores) is None


def test_a_stream_is_read_for_the_rows_that_are_shown(asked, tmp_path):
    stream = Stream(lambda: iter(asked.corpus))
    frames = [Shares.of_scores(asked.scores, asked.query, c, k=1).frame for c in (stream, asked.corpus, None)]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    pd.testing.assert_frame_equal(frames[0], frames[2])  # a masked LM reads the text alone


class WholeRows(objectives.SequenceClassification):
    terms = None


@pytest.mark.parametrize(
    ("kind", "why", "layers"),
    [
        (objectives.SequenceClassification, "predict no tokens", True),
        (WholeRows, "does not say its terms", True),
    ],
)
def test_one_sentence_says_why_nothing_is_shaded(kind, why, layers, tmp_path):
    rows = tiny.rows(6)
    model = tiny.model("bert", "classification")
    stage = Stage("only", model, kind(tiny.tokenizer()), rows, solver=solvers.Identity())
    query = MultiStageInfluence([stage], progress=False).query(rows[:1])
    made = report(query.score(rows), tmp_path, query=query, corpus=rows)
    assert "Tokens are not shaded: " in made.text
    assert why in made.text
    assert not made.lines[0].tokens
    assert bool(made.lines[0].layers) is layers
    assert "Tokens are shaded" not in made.text


def test_tokens_whose_places_are_unknown_are_shown_in_their_order(tmp_path):
    words = tiny.objective("bidirectional")
    rows = tiny.rows(6, shortest=2)
    stage = Stage("only", tiny.model("elmo", "bidirectional"), words, rows, solver=solvers.Identity())
    query = MultiStageInfluence([stage], progress=False).query(rows[:1])
    made = report(query.score(rows), tmp_path, query=query)
    terms = query.token_scores(rows).groupby("example_id")
    by_influence = {f"{own['influence'].sum():.9g}": own for _, own in terms}
    for line in made.lines:
        own = by_influence[f"{float(line.cells['Influence']):.9g}"].drop_duplicates("position")
        assert [token for token, _ in line.tokens] == own.sort_values("position")["token"].tolist()
        total = sum(value for _, value in line.tokens)
        assert total == pytest.approx(float(line.cells["Influence"]), rel=1e-5, abs=1e-9)


def test_special_tokens_stand_after_the_text_so_that_nothing_is_missing(tmp_path):
    objective = objectives.CausalLM(tiny.tokenizer())  # which predicts [SEP]
    rows = tiny.rows(6, shortest=2)
    stage = Stage("only", tiny.model("gpt2", "causal"), objective, rows, solver=solvers.Identity())
    query = MultiStageInfluence([stage], progress=False).query(rows[:1])
    made = report(query.score(rows), tmp_path, query=query)
    for line in made.lines:
        words = [token for token, _ in line.tokens]
        assert words[-1] == "[SEP]"
        assert line.text == " ".join(words[:-1]) + "[SEP]"
        total = sum(value for _, value in line.tokens)
        assert total == pytest.approx(float(line.cells["Influence"]), rel=1e-5, abs=1e-9)


def test_scores_of_extremes_show_the_distribution_of_all(asked, tmp_path):
    kept = asked.query.score(asked.corpus, keep=3)
    made = report(kept, tmp_path, k=10)
    assert [len(made.of(name)) <= 3 for name in ("helpful", "harmful", "least")] == [True] * 3
    assert f"All {len(asked.corpus)} influences" in made.text
    for q in (0, 1):
        all_rows, extremes = histogram(asked.scores, q), histogram(kept, q)
        np.testing.assert_allclose(all_rows.edges, extremes.edges)
        assert all_rows.counts.sum() == pytest.approx(extremes.counts.sum()) == len(asked.corpus)
        positive = all_rows.edges[:-1] >= 0
        assert extremes.counts[positive].sum() == pytest.approx((asked.scores.influence(q) > 0).sum())


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1.0, 1.0], [-3.0, -1.0], [1e-300, -1e-300], [1e-320, 0.0], [-1e300, 1e300]]
)
def test_histograms_of_any_values_count_all_rows(values):
    figure = histogram(scores_of(np.array(values)[:, None], ["a", "b"], TESTS[:1]), 0)
    assert figure.counts.sum() == figure.rows == 2
    assert (np.diff(figure.edges) > 0).all()


def test_hostile_texts_are_texts(tmp_path):
    tests = [
        {"example_id": "<script>", "label": "</p><script>", "prediction": text, "text": text} for text in HOSTILE[:3]
    ]
    influence = np.random.default_rng(0).normal(size=(len(HOSTILE), 3))
    stages = {"<b>": {"solve": {"converged": [False]}, "text": "<img src=x>\n<script>", "link": "<u>"}}
    facts = {"stage": "<script>", "noise_text": "<script>", "certificate": {"stages": stages}}
    made = report(scores_of(influence, HOSTILE, tests, **facts), tmp_path, command="msif report --run '<script>'")
    assert not made.tags & {"img", "b "}
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<script") == 1
    assert not [name for name, _ in made.attributes if name.startswith("on") or name == "src"]
    assert {visible(text) for text in HOSTILE[:3]} <= set(made.isolated)
    assert {line.text for line in made.lines} == {visible(text) for text in HOSTILE}


def test_one_file_without_a_network(shaded):
    addresses = [value for name, value in shaded.attributes if name in ("href", "src", "action", "srcset")]
    assert all(value.startswith(("#", "data:")) for value in addresses)
    (policy,) = [value for name, value in shaded.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'")


def test_images_have_their_ids(tmp_path):
    scores = scores_of(INFLUENCE[:, :1], [""] * 6, [{"example_id": 3, "label": 1}])
    assert [line.text for line in report(scores, tmp_path).of("helpful")] == ["example 2"]


def test_a_report_is_known_as_one(tmp_path):
    report(scores_of(INFLUENCE, TEXTS, TESTS), tmp_path)
    assert is_report(tmp_path / "report.html")
    (tmp_path / "mine.html").write_bytes(b"<html>\xff")
    assert not is_report(tmp_path / "mine.html")


def test_refusals(asked, tmp_path):
    scores = scores_of(INFLUENCE, TEXTS, TESTS)
    with pytest.raises(InputError, match="k is 0; expected at least 1"):
        scores.to_html(tmp_path / "report.html", k=0)
    with pytest.raises(InputError, match="is a folder; expected the path of an HTML file"):
        scores.to_html(tmp_path)
    with pytest.raises(InputError, match="do not say which tests they are about"):
        scores_of(INFLUENCE, TEXTS, None).to_html(tmp_path / "report.html")
    with pytest.raises(InputError, match="the scores have 1 query columns and the query 2"):
        scores_of(INFLUENCE[:, :1], TEXTS, TESTS[:1]).to_html(tmp_path / "report.html", query=asked.query)
    with pytest.raises(InputError, match=r"the corpus has no row .*, of which there is a score"):
        asked.scores.to_html(tmp_path / "report.html", query=asked.query, corpus=asked.corpus[:2])
    (tmp_path / "shares.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match="holds no shares"):
        Shares.load(tmp_path / "shares.parquet", scores)
    scores.to_parquet(tmp_path / "shares.parquet")
    with pytest.raises(InputError, match="is damaged"):
        Shares.load(tmp_path / "shares.parquet", scores)
    assert not (tmp_path / "report.html").exists()
