"""Rows that nobody can read: files, formats, encodings, columns, labels and ids of every wrong kind."""

import gzip

import pandas as pd
import pytest
from helpers.faults import FINE, PRE, Fault, assert_refused, folder_at, remove, replaced, several, table, write

TEXTS, TWEETS = "stages.pretraining.data", "stages.finetuning.data"
JSONL = f"train {PRE}.data.path json {PRE}.data.data_files FOLDER/c.jsonl"
PARQUET = f"train {PRE}.data.path parquet {PRE}.data.data_files FOLDER/c.parquet"
FILE = f"train {PRE}.data.data_files"
HEADER = "id,text,sentiment,stars\n"
NUMBERED = f"train {FINE}.data.label_column stars {FINE}.objective {{}} {FINE}.data.keep {{}}"


def frame(**columns):
    return lambda folder: pd.DataFrame(columns).to_parquet(folder / "c.parquet")


def tweets(*lines):
    return write("tweets.csv", HEADER + "".join(f"{line}\n" for line in lines))


NESTED = frame(text=["we won", "they lost"], number=[[1], [2]], name=[{"a": 1}, {"a": 2}])
CASES = {
    # what is no file
    "no such file": Fault(f"{FILE} FOLDER/nowhere.txt", (TEXTS, "nowhere.txt' does not exist")),
    "no such folder": Fault(f"{FILE} FOLDER/no/where.txt", (TEXTS, "does not exist")),
    "below a file": Fault(f"{FILE} FOLDER/corpus.txt/x", (TEXTS, "corpus.txt/x' does not exist")),
    "a folder": Fault(f"{FILE} FOLDER/tokenizer", (TEXTS, "tokenizer' is a folder")),
    "a pattern of nothing": Fault(f"{FILE} FOLDER/*.xyz", (TEXTS, "*.xyz' matches no file")),
    "a pattern of folders": Fault(f"{FILE} FOLDER/token*", (TEXTS, "is a folder")),
    "a name too long": Fault(f"{FILE} {'x' * 300}", (TEXTS, "does not exist")),
    "a link to nothing": Fault(
        f"{FILE} FOLDER/link", (TEXTS, "does not exist"), lambda folder: (folder / "link").symlink_to("nowhere")
    ),
    "a link to itself": Fault(
        f"{FILE} FOLDER/link", (TEXTS, "does not exist"), lambda folder: (folder / "link").symlink_to("link")
    ),
    "an empty file": Fault("train", (TEXTS, "corpus.txt' is empty"), write("corpus.txt", "")),
    "a pattern of an empty file": Fault(f"{FILE} FOLDER/e*.txt", (TEXTS, "is empty"), write("e.txt", "")),
    "an empty file of tweets": Fault("train", (TWEETS, "tweets.csv' is empty"), write("tweets.csv", "")),
    "no such builder": Fault(f"train {PRE}.data.path nope {PRE}.data.data_files FOLDER/corpus.txt", (TEXTS, "'nope'")),
    "no such split": Fault(f"train {PRE}.data.split nope", (TEXTS, "nope")),
    # what holds no row
    "blank lines": Fault("train", (TEXTS, "2 left out (no text)"), write("corpus.txt", "\n \n")),
    "NUL bytes": Fault("train", (TEXTS, "no text"), write("corpus.txt", b"\0" * 100)),
    "marks of zero width": Fault("train", (TEXTS, "no text"), write("corpus.txt", "\ufeff\n\u200b\n\u00a0\n")),
    "a header alone": Fault("train", (TWEETS, "tweets.csv' cannot be read as csv", "a header and no row"), tweets()),
    "Parquet without rows": Fault(
        PARQUET, (TEXTS, "c.parquet' cannot", "no row"), frame(text=pd.Series([], dtype=str))
    ),
    "no text in any row": Fault(PARQUET, (TEXTS, "2 left out (no text)"), frame(text=[None, " "])),
    "nothing is kept": Fault(f"train {FINE}.data.keep.sentiment [Angry]", (f"{TWEETS}.keep.sentiment", "'Angry'")),
    # encodings and formats
    "invalid bytes": Fault(
        "train", (TEXTS, "corpus.txt' cannot", "line 2 is no UTF-8"), write("corpus.txt", b"a\n\xff\n")
    ),
    "latin-1": Fault(
        "train", (TEXTS, "line 1 is no UTF-8", "convert it"), write("corpus.txt", "caf\u00e9\n".encode("latin-1"))
    ),
    "UTF-16": Fault("train", (TEXTS, "line 1 is no UTF-8"), write("corpus.txt", "we won\n".encode("utf-16"))),
    "a picture": Fault("train", (TEXTS, "line 1 is no UTF-8"), write("corpus.txt", b"\x89PNG\r\n\x1a\n\0\0")),
    "tweets in latin-1": Fault(
        "train",
        (TWEETS, "tweets.csv' cannot be read as csv", "line 3 is no UTF-8"),
        write("tweets.csv", HEADER.encode() + b"1,a,Negative,0\n2,caf\xe9,Positive,1\n"),
    ),
    "JSON in latin-1": Fault(
        JSONL, (TEXTS, "c.jsonl", "line 1 is no UTF-8"), write("c.jsonl", b'{"text": "caf\xe9"}\n')
    ),
    "JSON that is cut": Fault(JSONL, (TEXTS, "line 2 is no JSON"), write("c.jsonl", '{"text": "a"}\n{"text": "b\n')),
    "JSON of numbers": Fault(JSONL, (TEXTS, "line 1 is no JSON object"), write("c.jsonl", "1\n2\n")),
    "JSON without a value": Fault(JSONL, (TEXTS, "line 1 is no JSON"), write("c.jsonl", '{"text": }\n')),
    "text as JSON": Fault(JSONL, (TEXTS, "line 1 is no JSON"), write("c.jsonl", "we won\n")),
    "text as Parquet": Fault(PARQUET, (TEXTS, "c.parquet' cannot be read as parquet"), write("c.parquet", "we won\n")),
    "Parquet that is cut": Fault(
        PARQUET,
        (TEXTS, "c.parquet' cannot be read as parquet"),
        several(frame(text=["a", "b"]), lambda f: (f / "c.parquet").write_bytes((f / "c.parquet").read_bytes()[:-9])),
    ),
    "gzip that is cut": Fault(
        f"{FILE} FOLDER/c.txt.gz",
        (TEXTS, "c.txt.gz"),
        lambda folder: (folder / "c.txt.gz").write_bytes(gzip.compress(b"we won\n" * 50)[:-12]),
    ),
    "no gzip": Fault(f"{FILE} FOLDER/c.txt.gz", (TEXTS, "c.txt.gz"), write("c.txt.gz", b"\x1f\x8bwe won\n")),
    # separators and names of columns
    "a separator of two characters": Fault(
        f"train {FINE}.data.separator ||", (f"{TWEETS}.separator is '||'", "one ASCII")
    ),
    "no separator": Fault([*f"train {FINE}.data.separator".split(), '""'], (f"{TWEETS}.separator is ''", "one ASCII")),
    "a quotation mark for separator": Fault(
        ["train", f"{FINE}.data.separator", "'\"'"], (f"{TWEETS}.separator", "other than a quotation mark")
    ),
    "a separator of text": Fault(f"train {PRE}.data.separator ;", (f"{TEXTS}.separator is for CSV", "leave it out")),
    "quotes of text": Fault(f"train {PRE}.data.quotes false", (f"{TEXTS}.quotes is for CSV", "'text' reads none")),
    "another separator than the file's": Fault(
        f"train {FINE}.data.separator ;", (TWEETS, "there is no column 'text' among ['id,text,sentiment,stars']")
    ),
    "a name of a column twice": Fault(
        f"train {FINE}.data.column_names [id,text,text,stars]", (f"{TWEETS}.column_names has 'text' twice",)
    ),
    "no names of columns": Fault(f"train {FINE}.data.column_names []", (f"{TWEETS}.column_names is []", "at least 1")),
    "too few names of columns": Fault(
        f"train {FINE}.data.column_names [text,sentiment]", (f"{TWEETS}.column_names has 2 names", "has 4 columns")
    ),
    "more columns than the header": Fault(
        "train",
        (TWEETS, "more columns than there are names"),
        write("tweets.csv", "id,text,sentiment\n1,a,Negative,0\n"),
    ),
    # files that are a path
    "a file and files": Fault(
        f"train {PRE}.data.path FOLDER/corpus.txt", (TEXTS, "data_files beside path", "a file itself", "path alone")
    ),
    "a path to no file": Fault(
        f"train {PRE}.data {{path:FOLDER/nowhere.tsv}}".replace(":", ": ").split(" ", 2),
        (f"{TEXTS}.path", "does not exist"),
    ),
    # which rows
    "the first rows and random ones": Fault(
        f"train {FINE}.data.max_rows 5 {FINE}.data.sample 5", (TWEETS, "max_rows, the first N rows, and sample")
    ),
    "a sample of no row": Fault(f"train {FINE}.data.sample 0", (f"{TWEETS}.sample is 0", "at least 1")),
    "shuffle with streaming": Fault(
        f"train {PRE}.data.shuffle true {PRE}.data.streaming true {PRE}.curvature_samples 5",
        (f"{TEXTS}.shuffle", "in the order of its files", "sample: N"),
    ),
    "a seed of nothing": Fault(f"train {PRE}.data.seed 3", (f"{TEXTS}.seed is 3", "only sample and shuffle")),
    "a sample of the test side": Fault(
        f"train {FINE}.data.part test {FINE}.data.sample 5", (f"{TWEETS}.part is 'test'", "leave sample out")
    ),
    # labels from files
    "labels from one file": Fault(
        f"train {FINE}.data.label_from files {FINE}.data.label_column null",
        (f"{TWEETS}.label_from is files", "{CLASS: files, ...}"),
    ),
    "labels from files for a language model": Fault(
        f"train {PRE}.data.label_from files", (f"{TEXTS}.label_from is files", "no classes of whole rows")
    ),
    "labels from files and from a column": Fault(
        f"train {FINE}.data.label_from files", (f"{TWEETS}.label_from is files beside label_column 'sentiment'",)
    ),
    "labels from files with a split": Fault(
        f"train {FINE}.data.label_from files {FINE}.data.test_split test {FINE}.data.test_fraction 0",
        (f"{TWEETS}.label_from is files, so data_files has no splits", "test_fraction"),
    ),
    # columns
    "no text column": Fault(f"train {PRE}.data.text_column words", (f"{TEXTS}.text_column", "'words'", "['text']")),
    "no label column": Fault(f"train {FINE}.data.label_column sentimen", ("label_column", "did you mean 'sentiment'")),
    "no id column": Fault(f"train {FINE}.data.id_column no", (f"{TWEETS}.id_column", "'no'")),
    "no column to keep by": Fault(f"train {FINE}.data.keep {{mood:[x]}}", (TWEETS, "keep")),
    "texts that are numbers": Fault(PARQUET, (f"{TEXTS}.text_column", "expected text"), frame(text=[1, 2])),
    "texts that are lists": Fault(f"{PARQUET} {PRE}.data.text_column number", (f"{TEXTS}.text_column",), NESTED),
    "texts that are bytes": Fault(PARQUET, (f"{TEXTS}.text_column", "expected text"), frame(text=[b"a", b"b"])),
    "ids that are lists": Fault(f"{PARQUET} {PRE}.data.id_column number", (f"{TEXTS}.id_column", "'number'"), NESTED),
    "ids that are mappings": Fault(f"{PARQUET} {PRE}.data.id_column name", (f"{TEXTS}.id_column", "'name'"), NESTED),
    "ids that repeat": Fault(
        f"train {FINE}.data.id_column stars", (f"{TWEETS}.id_column", "'stars' repeats", "or none")
    ),
    "lists to keep by": Fault(
        [
            "train",
            f"{PRE}.data.path",
            "parquet",
            f"{PRE}.data.data_files",
            "FOLDER/c.parquet",
            f"{PRE}.data.keep",
            "{number: [1]}",
        ],
        (f"{TEXTS}.keep.number", "words or numbers"),
        NESTED,
    ),
    "a column twice": Fault(
        "train", (TWEETS,), table("tweets.csv", [["id", "text", "text", "sentiment"], [1, "a", "b", "Negative"]])
    ),
    "rows of uneven length": Fault("train", (TWEETS,), tweets("1,a,Negative,0", "2,b,Positive,1,2,3,4,5")),
    # labels
    "labels that are lists": Fault(
        f"train {FINE}.data.path parquet {FINE}.data.data_files FOLDER/c.parquet "
        f"{FINE}.data.label_column number {FINE}.data.id_column null {FINE}.data.keep {{}}",
        (f"{TWEETS}.label_column", "one word or number per row"),
        NESTED,
    ),
    "labels that are not listed": Fault(
        f"train {FINE}.data.keep {{}}", ("stages.finetuning.objective.labels", "['Neutral']")
    ),
    "one label": Fault(f"train {FINE}.data.keep.sentiment [Positive]", (TWEETS, "all training rows have the label")),
    "a class of number a million": Fault(
        NUMBERED, ("1,000,001 classes",), replaced("tweets.csv", ",1\n", ",1000000\n")
    ),
    "a class of number 2^31": Fault(NUMBERED, ("labels",), replaced("tweets.csv", ",1\n", ",2147483647\n")),
    "a class of number 10^30": Fault(NUMBERED, (TWEETS, "too large"), replaced("tweets.csv", ",1\n", f",{10**30}\n")),
    "a class below zero": Fault(NUMBERED, ("labels",), replaced("tweets.csv", ",1\n", ",-1\n")),
    "half a class": Fault(NUMBERED, ("labels",), replaced("tweets.csv", ",1\n", ",0.5\n")),
    "no class": Fault(NUMBERED, ("no label",), tweets("1,a,Negative,", "2,b,Positive,")),
    "a folder in the place of tweets": Fault("train", (TWEETS, "tweets.csv' is a folder"), folder_at("tweets.csv")),
    "tweets are gone": Fault("train", (TWEETS, "tweets.csv' does not exist"), remove("tweets.csv")),
}


@pytest.mark.parametrize("fault", CASES.values(), ids=CASES)
def test_data_are_refused_before_anything_is_trained(untrained, capfd, fault):
    assert_refused(fault, untrained, capfd)
