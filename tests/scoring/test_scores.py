"""Orders, columns, duplicates and Parquet of a result that is written out by hand."""

import hashlib
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_msif import InputError, Scores

INFLUENCE = np.array([[0.5, 1.0], [-2.0, 0.0], [1.5, -3.0], [-0.1, 2.0], [0.0, 2.0]])
TEXTS = ["vote", "tax", "vote", "", "Übermaß “quoted” 🗳"]
ROWS = [{"example_id": f"id{i}", "text": text, "label": 0} for i, text in enumerate(TEXTS)]
METADATA = {"stage": "pretraining", "N": 40.0, "tests": [{"text": "é", "label": 1}], "certificate": {"a": [None, 1.5]}}


def build(columns=2, **settings):
    values = {"loss": [1.0, 2.0, 3.0, 0.0, 5.0], "terms": [1.0, 2.0, 3.0, 0.0, 4.0]}
    return Scores.build(ROWS, INFLUENCE[:, :columns], 40.0, values, METADATA, **settings)


def test_one_column_has_plain_names_and_several_are_numbered():
    fixed = ["example_id", "text", "text_sha256", "duplicates", "loss", "terms"]
    assert list(build(1).frame) == [*fixed, "influence", "removal_effect"]
    pairs = [f"{name}_{q}" for q in range(2) for name in ("influence", "removal_effect")]
    assert list(build().frame) == [*fixed, *pairs]
    assert (build(1).columns, build().columns, len(build())) == (1, 2, 5)


def test_values_keep_corpus_order():
    scores = build()
    for q in range(2):
        np.testing.assert_array_equal(scores.influence(q), INFLUENCE[:, q])
        np.testing.assert_allclose(scores.frame[f"removal_effect_{q}"], [-x / 40 for x in INFLUENCE[:, q]])
    assert scores.frame.example_id.tolist() == [f"id{i}" for i in range(5)]
    assert scores.frame.text.tolist() == TEXTS
    assert scores.frame.loss.tolist() == [1.0, 2.0, 3.0, 0.0, 5.0]


def test_duplicates_are_kept_and_counted():
    frame = build().frame
    assert frame.duplicates.tolist() == [2, 1, 2, 1, 1]
    assert frame.text_sha256[0] == frame.text_sha256[2] == hashlib.sha256(b"vote").hexdigest()
    assert frame.text_sha256[4] == hashlib.sha256(TEXTS[4].encode()).hexdigest()


def test_the_text_is_where_the_objective_reads_it():
    rows = [{"example_id": i, "tweet": text, "text": "same"} for i, text in enumerate(["a", "b", "a"])]
    frame = Scores.build(rows, INFLUENCE[:3, :1], 1.0, {"loss": [0.0] * 3, "terms": [1.0] * 3}, {}, "tweet").frame
    assert frame.text.tolist() == ["a", "b", "a"]
    assert frame.duplicates.tolist() == [2, 1, 2]


ORDERS = {
    # by, query column, rows from top to bottom; ties in corpus order
    "absolute": ("absolute", 0, [1, 2, 0, 3, 4]),
    "harmful": ("harmful", 0, [2, 0, 4, 3, 1]),
    "helpful": ("helpful", 0, [1, 3, 4, 0, 2]),
    "absolute, second": ("absolute", 1, [2, 3, 4, 0, 1]),
    "harmful, second": ("harmful", 1, [3, 4, 0, 1, 2]),
}


@pytest.mark.parametrize(("by", "query", "order"), ORDERS.values(), ids=ORDERS)
def test_orders(by, query, order):
    scores = build()
    top = scores.top(3, by=by, query=query)
    assert top.example_id.tolist() == [f"id{i}" for i in order[:3]]
    assert top.influence.tolist() == INFLUENCE[order[:3], query].tolist()
    np.testing.assert_allclose(top.removal_effect, -INFLUENCE[order[:3], query] / 40)
    assert top.index.tolist() == [0, 1, 2]
    assert scores.bottom(2, by=by, query=query).example_id.tolist() == [f"id{i}" for i in order[::-1][:2]]
    assert len(scores.top(100, by=by, query=query)) == 5


def test_top_of_a_single_column_has_the_same_names():
    assert list(build(1).top()) == list(build(2).top(query=1))


def test_all_tests_at_once_have_the_test_beside_each_row():
    scores = build()
    top, bottom = scores.top(2, "harmful", query=None), scores.bottom(1, query=None)
    assert top.test.tolist() == [0, 0, 1, 1]
    assert top.example_id.tolist() == [f"id{i}" for i in (2, 0, 3, 4)]
    assert top[top.test == 1].reset_index(drop=True).equals(scores.top(2, "harmful", query=1))
    assert bottom.example_id.tolist() == ["id4", "id1"]


def test_long_is_the_frame_with_one_row_per_row_and_test():
    long, frame = build().long(), build().frame
    assert next(iter(long)) == "test"
    assert set(list(long)[1:]) == set(build(1).frame)
    for q in range(2):
        rows = long[long.test == q].reset_index(drop=True)
        assert rows.influence.tolist() == INFLUENCE[:, q].tolist()
        assert rows.removal_effect.tolist() == frame[f"removal_effect_{q}"].tolist()
        assert rows[["example_id", "text_sha256"]].equals(frame[["example_id", "text_sha256"]])
    assert build(1).long().drop(columns="test").equals(build(1).frame)


SUMMARIES = {
    "two tests": ({}, 2, ["Scores: 5 rows of stage 'pretraining', 1 test together", "positive is harmful", "N = 40"]),
    "one test": (
        {"tests": [{"text": "é"}]},
        1,
        ["5 rows of stage 'pretraining', 1 test\n", "+1.5", "-0.0375", "vote"],
    ),
    "many tests": ({"tests": [{"text": "é"}] * 2, "noise_text": "x" * 200}, 2, ["for test 0", "scores.long()", "xxx"]),
    "an image": ({"tests": [{"example_id": 7}]}, 1, ["example 7", "example id3"]),
    "another measurement": ({"measurement": "margin"}, 1, ["where f is the margin", "positive raises f"]),
    "extremes": ({"kept": {"keep": 1, "all": [{"count": 900}]}}, 1, ["only the most extreme of 900 rows are here"]),
}


@pytest.mark.parametrize(("facts", "columns", "words"), SUMMARIES.values(), ids=SUMMARIES)
def test_print_says_what_the_scores_are(facts, columns, words):
    scores = build(columns)
    scores.metadata |= facts
    text = str(scores)
    assert len(text.splitlines()) <= 20
    assert repr(scores) == f"<{text.splitlines()[0]}>"
    for word in words:
        assert word in text, word


def test_print_needs_no_metadata_of_a_query():
    text = str(Scores.build(ROWS[:1], INFLUENCE[:1, :1], 40.0, {}, {}))
    assert "Scores: 1 row, 1 test" in text
    assert "helpful  " not in text  # the only row is harmful


def test_html_and_print_of_a_text_that_is_no_text():
    rows = [{"example_id": 0, "text": "<script>alert(1)</script>\x1b[2J" + "long " * 30}]
    scores = Scores.build(rows, np.array([[1.0]]), 1.0, {}, {"tests": [{"text": "<b>"}]})
    shown = scores._repr_html_()
    assert "<script" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown
    assert "\x1b" not in str(scores)
    assert "…" in str(scores)


@pytest.mark.parametrize("query", [2, -1])
def test_a_column_that_does_not_exist(query):
    for ask in (build().influence, lambda q: build().top(query=q)):
        with pytest.raises(InputError, match=f"query column {query} does not exist; these scores have 2"):
            ask(query)


def test_an_order_that_does_not_exist():
    with pytest.raises(
        InputError, match=r"by is 'worst'; expected one of \['absolute', 'harmful', 'helpful', 'relative'"
    ):
        build().top(by="worst")


def test_parquet_round_trip(tmp_path):
    scores, path = build(), tmp_path / "new" / "scores.parquet"
    scores.to_parquet(path)
    loaded = Scores.from_parquet(path)
    assert loaded.frame.equals(scores.frame)
    assert loaded.metadata == {**METADATA, "columns": 2}
    assert loaded.top(2, by="harmful", query=1).equals(scores.top(2, by="harmful", query=1))
    assert [p.name for p in path.parent.iterdir()] == ["scores.parquet"]


def test_a_write_that_fails_spoils_nothing(tmp_path, monkeypatch):
    path = tmp_path / "scores.parquet"
    build().to_parquet(path)
    before = path.read_bytes()

    def half(table, where, **settings):
        where.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="disk full"):
        build(1).to_parquet(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_to_dataset_and_pandas():
    scores = build()
    data = scores.to_dataset()
    assert data.column_names == list(scores.frame)
    assert data["influence_1"] == INFLUENCE[:, 1].tolist()
    copy = scores.to_pandas()
    copy["influence_0"] = 0.0
    np.testing.assert_array_equal(scores.influence(0), INFLUENCE[:, 0])


def test_files_that_hold_no_scores(tmp_path):
    with pytest.raises(InputError, match="does not exist; expected the Parquet file"):
        Scores.from_parquet(tmp_path / "none.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="without scores' metadata; expected one that"):
        Scores.from_parquet(tmp_path / "other.parquet")


def test_hundreds_of_columns_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = Scores.build(ROWS, np.tile(INFLUENCE, 100), 40.0, {}, METADATA)
    assert scores.columns == 200
    np.testing.assert_array_equal(scores.influence(199), INFLUENCE[:, 1])
