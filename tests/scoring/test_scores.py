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
