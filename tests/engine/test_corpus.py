"""Streams and files as corpora: the same rows at every reading, stable ids, nothing held."""

import gzip
import json

import datasets
import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.project import msif, project

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers
from hf_msif.engine.corpus import Table, as_corpus, as_rows, first_rows
from hf_msif.engine.hashing import objective_fingerprint
from hf_msif.engine.stream import Stream
from hf_msif.project.data import load_rows, stream_rows
from hf_msif.project.schema import Data

TEXTS = [row["text"] for row in tiny.rows(7, seed=3)]


def text(path):
    path.write_text("\n".join(TEXTS) + "\n")


def gz(path):
    with gzip.open(path, "wt") as file:
        file.write("\n".join(TEXTS) + "\n")


def jsonl(path):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))


def parquet(path):
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path)


def csv(path):
    datasets.Dataset.from_dict({"text": TEXTS}).to_csv(path)


FILES = {"a.txt": text, "a.txt.gz": gz, "a.jsonl": jsonl, "a.jsonl.gz": None, "a.parquet": parquet, "a.csv": csv}


@pytest.mark.parametrize("name", FILES)
def test_files_of_all_kinds_give_the_same_rows(tmp_path, name):
    if FILES[name] is None:
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    else:
        FILES[name](tmp_path / name)
    stream = as_corpus(tmp_path / name, "the corpus")
    expected = [{"example_id": f"{name}:{i}", "text": t} for i, t in enumerate(TEXTS)]
    for _ in range(2):  # it can be read again
        assert list(stream) == expected


def test_files_follow_one_another(tmp_path):
    for name in ("b.txt", "a.txt"):
        text(tmp_path / name)
    rows = list(as_corpus([tmp_path / "b.txt", tmp_path / "a.txt"], "the corpus"))
    assert [row["example_id"] for row in rows] == [f"{n}.txt:{i}" for n in "ba" for i in range(7)]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_streamed_dataset_numbers_its_rows(shards):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    rows = list(as_corpus(table.to_iterable_dataset(num_shards=shards), "the corpus"))
    assert [row["text"] for row in rows] == TEXTS
    assert [row["example_id"] for row in rows] == list(range(7))  # as those of the table
    some = list(as_corpus(table.to_iterable_dataset(num_shards=shards).take(5), "the corpus"))
    assert [row["text"] for row in some] == TEXTS[:5]
    own = table.add_column("example_id", [f"id{i}" for i in range(7)]).to_iterable_dataset()
    assert [row["example_id"] for row in as_corpus(own, "the corpus")] == [f"id{i}" for i in range(7)]


def test_a_dataset_stays_on_disk():
    table = as_corpus(datasets.Dataset.from_dict({"text": TEXTS}), "the corpus")
    assert isinstance(table, Table)
    assert len(table) == 7
    assert table[2] == {"example_id": 2, "text": TEXTS[2]}
    assert table[-1]["example_id"] == 6
    assert table[3:5] == [{"example_id": i, "text": TEXTS[i]} for i in (3, 4)]
    assert list(table) == table[:] == [{"example_id": i, "text": t} for i, t in enumerate(TEXTS)]
    assert first_rows(table, 2) == table[:2]
    with pytest.raises(IndexError):
        table[7]
    repeated = datasets.Dataset.from_dict({"text": ["a", "b"], "example_id": [1, 1]})
    with pytest.raises(InputError, match=r"repeats an example_id \(1\)"):
        as_corpus(repeated, "the corpus")


def test_a_sample_is_uniform_and_the_same_for_the_same_seed():
    stream = Stream(lambda: iter([{"example_id": i} for i in range(20)]))
    counts = np.zeros(20)
    for seed in range(2000):
        sample = stream.sample(5, seed)
        assert len({row["example_id"] for row in sample}) == 5
        counts[[row["example_id"] for row in sample]] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)
    assert stream.sample(5, 1) == stream.sample(5, 1) != stream.sample(5, 2)
    assert stream.sample(50, 0) == list(stream)


def test_a_stage_on_a_stream_is_the_stage_on_its_rows():
    rows = [{"example_id": row["example_id"], "text": row["text"]} for row in tiny.rows(12, seed=5)]
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": row["text"]} for row in rows]))
    model, solver = tiny.model("bert", "masked"), solvers.CG(damping=1.0, max_iter=3)
    settings = {"solver": solver, "curvature_samples": 12, "batch_size": 4}

    def scores(data):
        made = MultiStageInfluence([Stage("pre", model, tiny.objective("masked"), data, **settings)], progress=False)
        with pytest.warns(UserWarning, match="not solved to tolerance"):
            query = made.query(rows[:2], replicates=1)
        assert query.facts["pre"]["examples"] == 12
        return query.score(data)

    found, expected = scores(stream), scores(rows)
    np.testing.assert_allclose(found.removal_effects(), expected.removal_effects(), rtol=1e-10)
    assert found.metadata["N"] == expected.metadata["N"]
    with pytest.raises(InputError, match="is a stream, and curvature_samples is None"):
        MultiStageInfluence([Stage("pre", model, tiny.objective("masked"), stream)], progress=False)


def test_a_streamed_section_admits_the_same_rows(tmp_path, capsys):
    path = tmp_path / "tweets.csv"
    table = {"text": [*TEXTS, None, "x"], "kind": ["a"] * 8 + ["b"], "id": list("pqrstuvwx")}
    datasets.Dataset.from_dict(table).to_csv(path)
    section = {"path": "csv", "data_files": str(path), "keep": {"kind": ["a"]}, "max_rows": 5}
    whole = load_rows(Data(**section), "pretraining")
    stream = stream_rows(Data(**section, streaming=True), "pretraining")
    assert [row["text"] for row in stream] == [row["text"] for row in whole] == TEXTS[:5]
    assert [row["example_id"] for row in stream] == [f"tweets.csv:{i}" for i in range(5)]
    named = stream_rows(Data(**section, streaming=True, id_column="id"), "pretraining")
    assert [row["example_id"] for row in named] == list("pqrst")
    section.pop("max_rows")
    capsys.readouterr()
    assert len(list(stream_rows(Data(**section, streaming=True), "pretraining"))) == 7
    assert "pretraining: 7 rows of 9, 1 left out (no text), 1 left out (not in keep)" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"keep.sort: there is no column 'sort' among"):
        stream_rows(Data(**{**section, "keep": {"sort": ["a"]}}, streaming=True), "pretraining")


def test_what_is_no_corpus(tmp_path):
    with pytest.raises(InputError, match=r"the file '.*none.txt' does not exist"):
        as_corpus(tmp_path / "none.txt", "the corpus")
    text(tmp_path / "a.dat")
    with pytest.raises(
        InputError, match=r"'a.dat' has an ending that says nothing of its format; expected one of .txt"
    ):
        as_corpus(tmp_path / "a.dat", "the corpus")
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        text(folder / "a.txt")
    with pytest.raises(InputError, match=r"several files 'a.txt', whose rows would have the same ids"):
        as_corpus([tmp_path / "a.txt", tmp_path / "b" / "a.txt"], "the corpus")
    with pytest.raises(InputError, match="the corpus is empty"):
        list(Stream(lambda: iter([])))
    with pytest.raises(InputError, match=r"is a PosixPath; expected"):
        MultiStageInfluence(
            [Stage("pre", tiny.model("bert", "masked"), tiny.objective("masked"), TEXTS)], progress=False
        ).query(tmp_path / "a.txt")


def test_a_file_that_cannot_be_read_says_where(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(InputError, match=r"the corpus: a.jsonl cannot be read after row [01]: "):
        list(as_corpus(tmp_path / "a.jsonl", "the corpus"))


def test_memory_that_is_not_there_is_refused(monkeypatch):
    from hf_msif.influence.cost import activation_bytes
    from hf_msif.project import memory

    objective, rows = tiny.objective("masked"), tiny.rows(9, seed=1)
    stage = Stage("pre", tiny.model("bert", "masked"), objective, rows, solver=solvers.CG())
    chain = MultiStageInfluence([stage], progress=False)
    bound = chain.stage("pre")
    size = sum(p.numel() for p in bound.differentiation.operator.parameters.values()) * 8
    assert bound.differentiation.solver_bytes(2, 1) == (5 + 4) * 2 * size
    chain.engine.sharded = True
    assert bound.differentiation.solver_bytes(2, 4) == -(-5 * 2 * size // 4) + 4 * 2 * size
    active = activation_bytes(bound.differentiation.operator, 2)
    few = activation_bytes(bound.differentiation.curvature(tiny.rows(1, seed=1)), 2)
    assert 0 < few < active
    assert memory.available_bytes(torch.device("cpu")) > 2**20
    memory.check(chain, 2)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 12 * size)
    with pytest.raises(InputError, match=r"stage 'pre' needs about .* but .* are free: expected a smaller batch_size"):
        memory.check(chain, 2)


def test_an_objective_is_known_by_its_tokenizer():
    """A changed vocabulary or length is another objective; what a tokenizer was last asked for is not."""
    objective = tiny.objective("masked")
    known = objective_fingerprint(objective)
    objective.tokenizer(["vote " * 40], truncation=True, max_length=5, padding=True)
    assert objective_fingerprint(objective) == known == objective_fingerprint(tiny.objective("masked"))
    assert objective_fingerprint(tiny.objective("masked", mask_probability=0.5)) != known
    words = [*tiny.WORDS[:-2], tiny.WORDS[-1], tiny.WORDS[-2]]
    assert objective_fingerprint(objectives.MaskedLM(tiny.tokenizer(words=words), mask_probability=0.4)) != known
    assert objective_fingerprint(objectives.MaskedLM(tiny.tokenizer(template=False), mask_probability=0.4)) != known
    shorter = tiny.tokenizer()
    shorter.model_max_length = 9
    assert objective_fingerprint(objectives.MaskedLM(shorter, mask_probability=0.4)) != known


@pytest.mark.parametrize("command", ["validate", "cleanse", "train"])
def test_commands_that_train_want_the_rows_at_hand(tmp_path, capsys, command):
    path = project(tmp_path / "project")
    flags = ["--config", path, "--stages.pretraining.data.streaming", "true"]
    assert msif(command, *flags, "--stages.pretraining.curvature_samples", "5") == 2
    assert "stages.pretraining.data.streaming is" in capsys.readouterr().err
    assert msif(command, *flags) == 2
    assert "streaming is for a first stage with curvature_samples" in capsys.readouterr().err


def test_a_plan_of_a_stream_reads_its_beginning(tmp_path, capsys):
    path = project(tmp_path / "project")
    flags = ["--config", path, "--stages.pretraining.data.streaming", "true"]
    assert msif("plan", *flags, "--stages.pretraining.curvature_samples", "5") == 0
    assert "scoring 1,000 rows of the stream for 2 column(s)" in capsys.readouterr().out


def _ids(batch):
    """What a tokenizer makes of a batch: other columns than those below it."""
    return {"input_ids": [[len(word) for word in text.split()] for text in batch["text"]]}


@pytest.mark.parametrize("read", [as_rows, as_corpus])
def test_a_format_or_a_transform_of_a_dataset(read):
    """Plain values under any format; a transform's columns with the ids of the rows below it."""
    rows = [{"example_id": f"id{i}", "text": "w " * (i + 1), "label": i} for i in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    for formatted in (dataset.with_format("torch"), dataset.with_format("numpy", columns=["label"])):
        assert list(read(formatted, "the rows")) == rows
    transformed = dataset.with_transform(_ids)
    expected = [{"example_id": f"id{i}", "input_ids": [1] * (i + 1)} for i in range(5)]
    assert list(read(transformed, "the rows")) == expected
    assert read(transformed, "the rows")[1:3] == expected[1:3]
    assert read(transformed, "the rows")[-1] == expected[-1]
    numbered = dataset.remove_columns("example_id").with_transform(_ids)
    assert [row["example_id"] for row in read(numbered, "the rows")] == list(range(5))
