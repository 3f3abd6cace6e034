"""Rows of a stage: filters and splits, ids and labels, and what is said of rows left out."""

import json

import numpy as np
import pytest

from hf_msif.errors import InputError
from hf_msif.project.data import load_rows
from hf_msif.project.schema import Data


def load(tmp_path, text, name="rows.csv", builder="csv", **settings):
    path = tmp_path / name
    path.write_text(text)
    return load_rows(Data(path=builder, data_files=str(path), **settings), "pre")


def test_rows_left_out_are_counted_and_printed(tmp_path, capsys):
    text = "text,label\na b,x\n,x\n  ,x\nc,\nd,z\ne,y\nf,y\n"
    found = load(tmp_path, text, label_column="label", keep={"label": ["x", "y", None]}, max_rows=2)
    assert found == [{"example_id": 0, "text": "a b", "label": "x"}, {"example_id": 5, "text": "e", "label": "y"}]
    said = capsys.readouterr()
    assert said.out == (
        "pre: 2 rows of 7, 2 left out (no text), 1 left out (no label), 1 left out (not in keep), 1 left out (beyond "
        "max_rows)\n"
    )
    assert said.err == ""


def test_a_text_file_is_a_sentence_a_line(tmp_path, capsys):
    found = load(tmp_path, "a\n\nb\n", "rows.txt", "text")
    assert found == [{"example_id": 0, "text": "a"}, {"example_id": 2, "text": "b"}]
    assert "1 left out (no text)" in capsys.readouterr().out


def test_equal_texts_fall_on_the_same_side_of_the_split(tmp_path):
    text = "text\n" + "".join(f"tweet {i % 40}\n" for i in range(120))
    sides = {part: load(tmp_path, text, test_fraction=0.3, part=part) for part in ("train", "test", "all")}
    texts = {part: {row["text"] for row in rows} for part, rows in sides.items()}
    assert not texts["train"] & texts["test"]
    assert len(texts["train"] | texts["test"]) == 40
    assert len(sides["train"]) + len(sides["test"]) == len(sides["all"]) == 120
    assert 4 <= len(texts["test"]) <= 20
    ids = {row["example_id"]: row["text"] for row in sides["all"]}
    assert all(ids[row["example_id"]] == row["text"] for part in sides for row in sides[part])
    # Without a fraction there is nothing to set aside.
    assert len(load(tmp_path, text)) == 120


def test_ids_and_labels_stay_whole_numbers_where_a_gap_made_them_floats(tmp_path, capsys):
    text = "text,id,label\na,7,1\nb,,0\nc,9,\nd,8,0\n"
    found = load(tmp_path, text, id_column="id", label_column="label", keep={"label": [0, 1, None]})
    assert [(row["example_id"], row["label"]) for row in found] == [(7, 1), (8, 0)]
    assert all(type(row["label"]) is int for row in found)
    assert "1 left out (no id), 1 left out (no label)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "kept"),
    [(["1"], 2), ([1], 2), ([1.0], 2), ([True], 0), (["x y"], 0)],
)
def test_keep_compares_as_words(tmp_path, values, kept):
    text = "text,n\na,1\nb,2\nc,1\n"
    if kept:
        assert len(load(tmp_path, text, keep={"n": values})) == kept
    else:
        with pytest.raises(InputError, match=r"stages.pre.data.keep.n admits .* which no row has; .*\['1', '2'\]"):
            load(tmp_path, text, keep={"n": values})


def test_keep_of_booleans_and_of_two_columns(tmp_path):
    rows = [
        {"text": "a", "yes": True, "n": 1},
        {"text": "b", "yes": False, "n": 1},
        {"text": "c", "yes": True, "n": 2},
    ]
    text = "\n".join(map(json.dumps, rows))
    found = load(tmp_path, text, "rows.json", "json", keep={"yes": [True], "n": [1]})
    assert [row["text"] for row in found] == ["a"]


CSV = "id,text,label,number\n1,a,x,1\n2,b,y,2\n"
# file, settings, what the sentence holds
ERRORS = {
    "no such file": (None, {}, ["data_files", "does not exist"]),
    "an empty file": ("", {}, ["data_files", "is empty"]),
    "blank lines only": ("\n\n \n", {"builder": "text"}, ["no row of 3 is left, 3 left out (no text)"]),
    "a header only": ("id,text\n", {}, ["rows.csv' cannot be read as csv", "a header and no row"]),
    "broken": ('id,text\n1,"a\n', {}, ["cannot load 'csv'"]),
    "ragged": ("id,text\n1,a\n1,2,3,4\n", {}, ["Expected 2 fields in line 3, saw 4", "data_files"]),
    "no such split": (CSV, {"split": "tst"}, ["split 'tst'", "train"]),
    "no such text column": (CSV, {"text_column": "txt"}, ["text_column", "'txt'", "did you mean 'text'?"]),
    "no such label column": (CSV, {"label_column": "zzz"}, ["label_column", "'zzz'", "['id', 'text', 'label'"]),
    "no such id column": (CSV, {"id_column": "idd"}, ["id_column", "did you mean 'id'?"]),
    "keep of no column": (CSV, {"keep": {"lable": ["x"]}}, ["keep.lable", "did you mean 'label'?"]),
    "keep of no value": (CSV, {"keep": {"label": ["x", "z"]}}, ["keep.label admits 'z'", "['x', 'y']"]),
    "numbers for text": (CSV, {"text_column": "number"}, ["'number' holds 1 in row 0", "expected text"]),
    "repeated ids": (CSV + "1,c,x,3\n", {"id_column": "id"}, ["id_column", "repeats 1 ids (first 1)"]),
    "an empty side": (CSV, {"part": "test"}, ["no row of 2 is left", "not in the test part"]),
}


@pytest.mark.parametrize(("text", "settings", "parts"), ERRORS.values(), ids=ERRORS)
def test_bad_data_is_one_sentence(tmp_path, text, settings, parts):
    path = tmp_path / "rows.csv"
    if text is not None:
        path.write_text(text)
    settings = {"path": settings.get("builder", "csv"), "data_files": str(path), **settings}
    settings.pop("builder", None)
    with pytest.raises(InputError) as error:
        load_rows(Data(**settings), "pre")
    assert all(part in str(error.value) for part in ["stages.pre.data", *parts]), error.value
    assert "\n" not in str(error.value)


def test_bars_and_logs_of_datasets_come_back(tmp_path, capfd):
    import datasets

    level = datasets.logging.get_verbosity()
    with pytest.raises(InputError):
        load(tmp_path, "{{", "rows.json", "json")
    load(tmp_path, "a\n", "rows.txt", "text")
    assert capfd.readouterr().err == ""
    assert datasets.logging.get_verbosity() == level
    assert not datasets.are_progress_bars_disabled()


def test_embedded_digits_have_images_in_the_place_of_texts(capsys):
    found = load_rows(Data(path="sklearn:digits", label_column="label", keep={"label": [4]}), "pre", "image")
    assert len(found) == 181
    assert set(found[0]) == {"example_id", "image", "label"}
    assert np.shape(found[0]["image"]) == (8, 8)
    parts = {
        part: load_rows(Data(path="sklearn:digits", test_fraction=0.3, part=part, max_rows=300), "pre", "image")
        for part in ("train", "test")
    }
    assert not {r["example_id"] for r in parts["train"]} & {r["example_id"] for r in parts["test"]}
    assert len(parts["train"]) == len(parts["test"]) == 300


def test_a_test_split_is_the_test_side_whole(tmp_path):
    for name, size in (("train", 9), ("test", 5)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(size)))
    files = {name: str(tmp_path / f"{name}.txt") for name in ("train", "test")}
    settings = {"path": "text", "data_files": files, "test_split": "test", "max_rows": 4}
    sides = {part: load_rows(Data(**settings, part=part), "pre") for part in ("train", "test")}
    assert [row["text"] for row in sides["train"]] == [f"train {i}" for i in range(4)]
    assert [row["text"] for row in sides["test"]] == [f"test {i}" for i in range(5)]
    with pytest.raises(InputError, match=r"stages.pre.data.data_files.test: the file .* does not exist"):
        load_rows(Data(**{**settings, "data_files": {**files, "test": "nowhere.txt"}}), "pre")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"test_split": "train"}, True),
        ({"test_split": "test"}, False),
        ({"test_split": "test", "part": "test"}, True),
        ({"test_split": "test", "data_files": {"train": "a.csv", "test": "b.csv"}}, False),
        ({"test_split": "test", "data_files": {"train": "a.csv", "test": ["./a.csv", "b.csv"]}}, True),
        ({"split": "train[:80%]", "test_split": "train[80%:]"}, False),
    ],
)
def test_tests_that_are_training_rows_are_noticed(settings, expected):
    assert Data(path="csv", **settings).trains_on_test_side is expected
