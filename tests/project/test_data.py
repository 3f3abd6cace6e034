"""Rows of a stage: filters and splits, ids and labels, and what is said of rows left out."""

import gzip
import json
import warnings

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from helpers.project import project

from hf_msif.engine.stream import Stream
from hf_msif.errors import InputError
from hf_msif.project import config
from hf_msif.project.data import load_rows, stream_rows
from hf_msif.project.run import Run
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
    section = {"path": "sklearn:digits", "test_fraction": 0.3}
    parts = {part: load_rows(Data(**section, part=part), "pre", "image") for part in ("train", "test")}
    assert not {r["example_id"] for r in parts["train"]} & {r["example_id"] for r in parts["test"]}
    assert len(parts["train"]) + len(parts["test"]) == 1797


CUTS = [{"max_rows": 4}, {"sample": 4}, {"max_rows": 4, "shuffle": True}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_test_split_is_the_test_side_whole(tmp_path, cut):
    for name, size in (("train", 9), ("test", 5)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(size)))
    files = {name: str(tmp_path / f"{name}.txt") for name in ("train", "test")}
    settings = {"path": "text", "data_files": files, "test_split": "test", **cut}
    sides = {part: load_rows(Data(**settings, part=part), "pre") for part in ("train", "test")}
    assert len(sides["train"]) == 4
    assert all(row["text"] == f"train {row['example_id']}" for row in sides["train"])
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


# --- which rows are taken


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_test_fraction_is_the_test_side_whole(tmp_path, cut):
    text = "text\n" + "".join(f"tweet {i}\n" for i in range(60))
    whole = {part: load(tmp_path, text, test_fraction=0.3, part=part) for part in ("train", "test")}
    sides = {part: load(tmp_path, text, test_fraction=0.3, part=part, **cut) for part in ("train", "test")}
    assert sides["test"] == whole["test"]
    assert len(sides["train"]) == 4
    assert all(row in whole["train"] for row in sides["train"])


def test_a_run_cuts_the_side_that_is_trained_on(tmp_path):
    path = str(project(tmp_path))
    cut = ["--config", path, "--stages.finetuning.data.sample", "5"]
    whole, run = Run(config.parse(["--config", path])), Run(config.parse(cut))
    assert run.rows("finetuning", "test") == whole.rows("finetuning", "test")
    assert len(run.rows("finetuning")) == 5
    seeds = [["--seed", "1"], ["--stages.finetuning.data.seed", "1"]]
    others = [Run(config.parse([*cut, *seed])).rows("finetuning") for seed in seeds]
    assert others[0] == others[1] != run.rows("finetuning")


def test_a_sample_is_uniform_among_the_rows_that_are_used(tmp_path, capsys):
    text = "text,kind\n" + "".join(f"w{i},{'b' if i % 4 else 'a'}\n" for i in range(12))
    counts, draws = np.zeros(12), 60
    for seed in range(draws):
        rows = load(tmp_path, text, keep={"kind": ["b"]}, sample=3, seed=seed)
        assert len({row["example_id"] for row in rows}) == 3
        counts[[row["example_id"] for row in rows]] += 1
    assert set(np.flatnonzero(counts)) == {i for i in range(12) if i % 4}
    p = 3 / 9
    assert abs(counts[counts > 0] - draws * p).max() < 5 * np.sqrt(draws * p * (1 - p))
    rows = load(tmp_path, text, keep={"kind": ["b"]}, sample=100)
    assert len(rows) == 9
    assert capsys.readouterr().out.splitlines()[-1] == "pre: 9 rows of 12, 3 left out (not in keep)"


def test_shuffled_rows_keep_their_ids(tmp_path, capsys):
    text = "".join(f"line {i}\n" for i in range(40))
    ordered = load(tmp_path, text, "rows.txt", "text")
    shuffled = load(tmp_path, text, "rows.txt", "text", shuffle=True)
    assert shuffled != ordered
    assert sorted(shuffled, key=lambda row: row["example_id"]) == ordered
    assert shuffled == load(tmp_path, text, "rows.txt", "text", shuffle=True)
    capsys.readouterr()
    assert load(tmp_path, text, "rows.txt", "text", shuffle=True, max_rows=7) == shuffled[:7]
    assert load(tmp_path, text, "rows.txt", "text", sample=7) == shuffled[:7]
    assert capsys.readouterr().out.splitlines() == [
        "pre: 7 rows of 40, 33 left out (beyond max_rows)",
        "pre: 7 rows of 40, 33 left out (not in the sample)",
    ]


SORTED = "text,label,kind\n" + "".join(f"{c}{i},{c},{i % 2}\n" for c in "xyz" for i in range(10))


def rows_and_warnings(tmp_path, kind, **settings):
    path = tmp_path / "rows.csv"
    path.write_text(SORTED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = load_rows(Data(path=str(path), label_column="label", **settings), "pre", label_kind=kind)
    return rows, [str(warning.message) for warning in caught]


def test_classes_that_max_rows_loses_are_told(tmp_path):
    rows, said = rows_and_warnings(tmp_path, "class", max_rows=15)
    assert {row["label"] for row in rows} == {"x", "y"}
    assert said == [
        "stages.pre.data: the 15 rows that are taken have 2 of the 3 classes (without 'z'); stages.pre.data.sample: "
        "15 takes random rows."
    ]
    (few,) = rows_and_warnings(tmp_path, "class", sample=2)[1]
    assert "take more rows" in few
    for kind, settings in (
        ("class", {"max_rows": 21}),
        ("class", {"max_rows": 15, "keep": {"label": ["x", "y"]}}),
        ("class", {"max_rows": 15, "shuffle": True}),
        ("class", {"sample": 15}),
        ("class", {}),
        ("number", {"max_rows": 15}),
        (None, {"max_rows": 15}),
    ):
        assert rows_and_warnings(tmp_path, kind, **settings)[1] == [], (kind, settings)


def test_a_sample_of_a_stream_is_drawn_in_one_reading(tmp_path, capsys):
    path = project(tmp_path)
    flags = ["--stages.pretraining.data.streaming", "true", "--stages.pretraining.curvature_samples", "5"]
    flags += ["--stages.pretraining.data.sample", "6"]
    runs = [Run(config.parse(["--config", str(path), *flags, "--seed", str(seed)])) for seed in (0, 0, 1)]
    samples = [run.rows("pretraining") for run in runs]
    assert samples[0] == samples[1] != samples[2]
    lines = (tmp_path / "corpus.txt").read_text().split("\n")
    for row in samples[0]:
        name, number = row["example_id"].split(":")
        assert (name, lines[int(number)]) == ("corpus.txt", row["text"])
    assert len({row["example_id"] for row in samples[0]}) == 6
    assert "left out (not in the sample)" in capsys.readouterr().out
    assert runs[0].rows_digest("pretraining") != runs[2].rows_digest("pretraining")


# --- files as people have them

ROWS = [("we won, at last", 1), ("they lost", 0)]
LINES = {separator: [f"{text}{separator}{label}" for text, label in ROWS] for separator in ("\t", ";", "|")}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "separator", "settings"),
    [
        ("tweets.tsv", "\t", {}),
        ("tweets.TSV", "\t", {"column_names": ["text", "label"]}),
        ("tweets.csv", ";", {"separator": ";"}),
        ("tweets.txt", "|", {"path": "csv", "separator": "|", "column_names": ["text", "label"]}),
        ("tweets.csv", "\t", {"separator": "\\t"}),  # as a shell passes it on
    ],
)
def test_any_separator_with_and_without_a_header(tmp_path, name, separator, settings, packed, streaming):
    lines = LINES[separator] if "column_names" in settings else [f"text{separator}label", *LINES[separator]]
    path, content = tmp_path / name, "\n".join(lines).encode()
    if packed:
        path, content = tmp_path / f"{name}.gz", gzip.compress(content)
    path.write_bytes(content)
    settings = {"path": str(path), "label_column": "label", **settings}
    if settings["path"] == "csv":
        settings["data_files"] = str(path)
    rows = list((stream_rows if streaming else load_rows)(Data(**settings, streaming=streaming), "pre"))
    assert [(row["text"], row["label"]) for row in rows] == ROWS


def test_quotation_marks_may_be_characters_of_the_text(tmp_path):
    text = 'text\tlabel\n"we won\t1\nthey lost\t0\n"a" b\t1\n'
    path = tmp_path / "tweets.tsv"
    path.write_text(text)
    rows = load_rows(Data(path=str(path), quotes=False), "pre")
    assert [row["text"] for row in rows] == ['"we won', "they lost", '"a" b']
    with pytest.warns(UserWarning, match=r"1 texts hold tabs and line breaks .* stages.pre.data.quotes: false"):
        assert len(load_rows(Data(path=str(path)), "pre")) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", "we won\nthey lost\n"),
        ("rows.csv", "text\nwe won\nthey lost\n"),
        ("rows.jsonl", '{"text": "we won"}\n{"text": "they lost"}\n'),
        ("rows.json", '[{"text": "we won"}, {"text": "they lost"}]'),
        ("rows.parquet", None),
    ],
)
def test_the_ending_of_a_file_says_its_format(tmp_path, monkeypatch, name, content):
    path = tmp_path / name
    if content is None:
        Dataset.from_dict({"text": ["we won", "they lost"]}).to_parquet(path)
    else:
        path.write_text(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (str(path), str(tmp_path / f"r*{path.suffix}"), f"~/{name}"):
        assert [row["text"] for row in load_rows(Data(path=place), "pre")] == ["we won", "they lost"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "settings", "words"),
    [
        ("a.tsv", "x\t1\ny\t0\n", {"column_names": ["text"]}, ["column_names has 1 names", "2 columns", r"'\t'"]),
        ("a.tsv", "x\t1\n", {"column_names": ["text", "label", "id"]}, ["has 3 names", "a.tsv has 2 columns"]),
        ("a.csv", "x\t1\n", {"column_names": ["text", "label"]}, ["has 2 names", "1 columns by the separator ','"]),
        ("a.csv", "text,label\nx,1,2\ny,0,3\n", {}, ["more columns than there are names"]),
        ("none.tsv", None, {}, ["data.path", "none.tsv' does not exist"]),
    ],
)
def test_files_that_do_not_fit_their_columns_are_refused(tmp_path, name, content, settings, words, streaming):
    if content is not None:
        (tmp_path / name).write_text(content)
    data, read = (
        Data(path=str(tmp_path / name), streaming=streaming, **settings),
        stream_rows if streaming else load_rows,
    )
    with pytest.raises(InputError) as error:
        list(read(data, "pre"))
    assert all(word in str(error.value) for word in ["stages.pre.data", *words]), error.value


def test_files_of_two_kinds_need_a_separator(tmp_path):
    for name in ("a.tsv", "b.csv"):
        (tmp_path / name).write_text("text;label\nwe won;1\n")
    files = [str(tmp_path / name) for name in ("a.tsv", "b.csv")]
    with pytest.raises(InputError, match=r"data_files names .tsv files.* beside others; expected .*data.separator"):
        load_rows(Data(path="csv", data_files=files), "pre")
    assert len(load_rows(Data(path="csv", data_files=files, separator=";"), "pre")) == 2


@pytest.mark.parametrize(("builder", "header"), [("text", ""), ("csv", "text,stars\n")])
def test_files_of_one_class_each(tmp_path, builder, header):
    for name, texts in {"pos/a": ["we won", "yes"], "pos/b": ["great"], "neg/a": ["they lost"]}.items():
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(header + "".join(f"{text},5\n" if header else f"{text}\n" for text in texts))
    files = {"very Positive": str(tmp_path / "pos/*.txt"), "Negative": str(tmp_path / "neg/*.txt")}
    rows = load_rows(Data(path=builder, data_files=files, label_from="files"), "pre")
    assert [(row["example_id"], row["text"], row["label"]) for row in rows] == [
        (0, "we won", "very Positive"),
        (1, "yes", "very Positive"),
        (2, "great", "very Positive"),
        (3, "they lost", "Negative"),
    ]
    files["Negative"] = str(tmp_path / "*/a.txt")
    with pytest.raises(
        InputError, match=r"data_files: .*pos/a.txt' is among the files of 'very Positive' and of 'Neg"
    ):
        load_rows(Data(path=builder, data_files=files, label_from="files"), "pre")


def test_the_classes_of_files_are_those_of_the_head(tmp_path):
    path = project(tmp_path)
    for name in ("Positive", "Negative"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(5)))
    settings = json.loads(path.read_text())
    stage = settings["stages"]["finetuning"]
    stage |= {"objective": {}}
    files = {name: str(tmp_path / f"{name}.txt") for name in ("Positive", "Negative")}
    stage["data"] = {"path": "text", "label_from": "files", "data_files": files}
    path.write_text(json.dumps(settings))
    run = Run(config.load(path))
    assert run.classes("finetuning") == ["Positive", "Negative"]
    assert {row["label"] for row in run.rows("finetuning")} == {"Positive", "Negative"}


# --- datasets that were saved


@pytest.fixture
def saved(tmp_path):
    """Two saved datasets: one split, and two of them."""
    tables = {
        name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(size)], "label": [i % 2 for i in range(size)]})
        for name, size in (("train", 10), ("test", 4))
    }
    tables["train"].with_format("torch").save_to_disk(tmp_path / "one")
    DatasetDict(tables).save_to_disk(tmp_path / "two")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("one", {}, [f"train {i}" for i in range(10)]),
        ("one", {"split": "train[80%:]"}, ["train 8", "train 9"]),
        ("two", {}, [f"train {i}" for i in range(10)]),
        ("two", {"split": "test"}, [f"test {i}" for i in range(4)]),
        ("two", {"split": "test+train[:1]"}, [*(f"test {i}" for i in range(4)), "train 0"]),
        ("two", {"test_split": "test", "part": "test"}, [f"test {i}" for i in range(4)]),
    ],
)
def test_a_saved_dataset_is_a_path(saved, name, settings, expected):
    rows = load_rows(Data(path=str(saved / name), label_column="label", **settings), "pre")
    assert [row["text"] for row in rows] == expected
    assert all(type(row["label"]) is int for row in rows)
    if "part" not in settings:
        stream = stream_rows(Data(path=str(saved / name), streaming=True, **settings), "pre")
        assert [row["text"] for row in stream] == expected


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("two", {"split": "dev"}, ["has no split 'dev'", "['train', 'test']", "train[:80%]"]),
        ("one", {"split": "train[:8"}, ["has no split 'train[:8'"]),
        ("one", {"data_files": "a.txt"}, ["data_files is given", "saved dataset"]),
        ("one", {"name": "a"}, ["data.name is given"]),
        ("one", {"text_column": "tex"}, ["did you mean 'text'"]),
    ],
)
def test_what_a_saved_dataset_does_not_have(saved, name, settings, words):
    with pytest.raises(InputError) as error:
        load_rows(Data(path=str(saved / name), **settings), "pre")
    assert all(word in str(error.value) for word in ["stages.pre.data", *words]), error.value


def test_a_damaged_saved_dataset_is_refused(saved):
    (saved / "one" / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"stages.pre.data.path: the saved dataset .*one' cannot be read .*save it"):
        load_rows(Data(path=str(saved / "one")), "pre")


def test_a_streamed_saved_dataset_is_known_by_its_files(saved, tmp_path):
    def streamed():
        return stream_rows(Data(path=str(saved / "one"), streaming=True), "pre")

    before = streamed()
    assert isinstance(before, Stream)
    assert [path.suffix for path in before.files] == [".arrow"]
    fingerprint = before.fingerprint()
    assert streamed().fingerprint() == fingerprint
    Dataset.from_dict({"text": ["others"] * 10, "label": [0] * 10}).save_to_disk(saved / "one")
    assert streamed().fingerprint() != fingerprint
