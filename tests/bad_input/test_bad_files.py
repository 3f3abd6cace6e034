"""Files of a run that were damaged, forged or replaced, and disks that are full: refused, and nothing is lost."""

import json
import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.faults import (
    PRE,
    Fault,
    assert_refused,
    cut,
    edited_json,
    file_at,
    folder_at,
    largest_file,
    link_at,
    query_tensors,
    remove,
    sealed_query,
    write,
)
from helpers.project import msif, snapshot, visible

from hf_msif.engine import folders
from hf_msif.scoring.folder import FILES as FILES_OF_A_SCORING
from hf_msif.training.trainer import last_checkpoint

QUERY, TENSORS = "run/query/query.json", "run/query/query.safetensors"
AGAIN = ("run/query", "query again")
NO_JSON = {
    "nothing": b"",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "binary": b"\xff\xfe",
    "half": b'{"a": ',
}
NO_JSON |= {"deep": b"[" * 100_000, "half a character": b'{"format": 4, "a": "\\ud800"}'}


def without(*path):
    """Removes the entry at a path of keys."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state.pop(path[-1])

    return change


def with_value(value, *path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


STAGE = ("stages", "pretraining")
# What is done to query.json, by somebody who makes the checksum anew and by somebody who does not.
STATES = {
    **{f"no {key}": without(key) for key in ("tests", "losses", "aggregate", "stages", "depends_on", "tensors")},
    **{f"no {key} of a stage": without(*STAGE, key) for key in ("solve", "text", "N", "examples", "objective")},
    "no format": without("format"),
    "no certificate": with_value({}, *STAGE, "solve"),
    "an unknown entry": with_value(1, "new"),
    "an unknown entry of a certificate": with_value(1, *STAGE, "solve", "new"),
    "an unknown noise": with_value({"x": 1}, *STAGE, "noise"),
    "a fingerprint less": without("depends_on", "pretraining"),
    "losses in words": with_value(["a", "b"], "losses"),
    "a loss less": with_value([0.5], "losses"),
    "tests that are numbers": with_value([1, 2], "tests"),
    "a test less": lambda state: state["tests"].pop() and None,
    "N in words": with_value("many", *STAGE, "N"),
    "half an example": with_value(1.5, *STAGE, "examples"),
    "stages in a list": with_value([], "stages"),
    "another sum": with_value("product", "aggregate"),
    "another format": with_value(99, "format"),
    "a format in words": with_value("four", "format"),
}
QUERIES = {
    **{f"query.json: {name}": Fault("score", AGAIN, write(QUERY, content)) for name, content in NO_JSON.items()},
    **{f"changed: {name}": Fault("score", AGAIN, edited_json(QUERY, change)) for name, change in STATES.items()},
    **{f"forged: {name}": Fault("score", AGAIN, sealed_query(change)) for name, change in STATES.items()},
    "query.json is gone": Fault("score", ("no query", "msif query"), remove(QUERY)),
    "query.json is a folder": Fault("score", ("no query", "msif query"), folder_at(QUERY)),
    "query.safetensors is gone": Fault("score", AGAIN, remove(TENSORS)),
    "query.safetensors is a folder": Fault("score", AGAIN, folder_at(TENSORS)),
    "query.safetensors is empty": Fault("score", AGAIN, write(TENSORS, "")),
    "query.safetensors is noise": Fault("score", AGAIN, write(TENSORS, b"\x93" * 500)),
    "query.safetensors is cut": Fault("score", AGAIN, cut(TENSORS, 2000)),
    "query is gone": Fault("score", ("no query", "msif query"), remove("run/query")),
    "query is a file": Fault("query", ("run/query",), file_at("run/query")),
    "query is another's folder": Fault("query", ("run/query holds notes.txt",), folder_at("run/query")),
}


def changed(change):
    """The tensors of the query after `change(name, t)`; None leaves one out."""
    return lambda tensors: {
        name: new.clone().contiguous() for name, t in tensors.items() if (new := change(name, t)) is not None
    }


def first(tensors):
    return next(iter(tensors.values())).clone()


TENSOR_CHANGES = {
    "a number per row": changed(lambda name, t: t[..., :1]),
    "a column less": changed(lambda name, t: t[:1]),
    "a column more": changed(lambda name, t: torch.cat([t, t[:1]])),
    "no column": changed(lambda name, t: t[:0]),
    "whole numbers": changed(lambda name, t: t.long()),
    "NaN": changed(lambda name, t: t * float("nan")),
    "inf": changed(lambda name, t: t + float("inf")),
    "a tensor less": lambda tensors: dict(list(tensors.items())[1:]),
    "a tensor more": lambda tensors: tensors | {"pretraining/y": first(tensors)},
    "a tensor of no stage": lambda tensors: tensors | {"x/y": first(tensors)},
    "a tensor without a stage": lambda tensors: tensors | {"y": first(tensors)},
    "other names": lambda tensors: {f"{name}x": t for name, t in tensors.items()},
    "none": lambda tensors: {},
}
QUERIES |= {f"tensors: {name}": Fault("score", AGAIN, query_tensors(c)) for name, c in TENSOR_CHANGES.items()}
QUERIES |= {f"forged: {name}": Fault("score", AGAIN[1:], query_tensors(c, True)) for name, c in TENSOR_CHANGES.items()}
QUERIES |= {"tensors: doubled": Fault("score", AGAIN, query_tensors(changed(lambda name, t: 2 * t)))}


@pytest.mark.parametrize("fault", QUERIES.values(), ids=QUERIES)
def test_a_query_that_is_not_as_it_was_written_is_refused(scored, capfd, fault):
    assert_refused(fault, scored, capfd)


# --- unfinished scorings, markers, scores


def unfinished(name, content):
    """An interrupted scoring, with a file in it."""

    def change(folder):
        folders.write_marker(folder / "run" / "scores.parts", "unfinished scoring", FILES_OF_A_SCORING)
        write(f"run/scores.parts/{name}", content)(folder)

    return change


def metadata(change):
    """The scores with other metadata."""

    def edit(folder):
        path = folder / "run" / "scores.parquet"
        scores = pq.read_table(path)
        facts = dict(scores.schema.metadata)
        facts[b"hf_msif"] = change(facts[b"hf_msif"])
        pq.write_table(scores.replace_schema_metadata(facts), path)

    return edit


def facts(**changes):
    def change(packed):
        return json.dumps({k: v for k, v in (json.loads(packed) | changes).items() if v is not None}).encode()

    return metadata(change)


def columns(change):
    def edit(folder):
        path = folder / "run" / "scores.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return edit


SCORES, TOP = "run/scores.parquet", "top --run FOLDER/run"
MARKER = ".hf_msif.json"


def at_marker(content, place):
    return write(f"{place}/{MARKER}", content)


def marked(change):
    return edited_json(f"run/{MARKER}", change)


OTHERS = {
    **{
        f"manifest: {name}": Fault("score --resume", ("manifest.json", "delete"), unfinished("manifest.json", content))
        for name, content in NO_JSON.items()
    },
    "manifest: of another": Fault("score --resume", ("changed since",), unfinished("manifest.json", '{"format": 1}')),
    "an interrupted scoring": Fault("score", ("interrupted", "--resume"), unfinished("manifest.json", "{}")),
    **{
        f"marker of {place}: {name}": Fault(
            command, (f"{place}/{MARKER}", "move"), write(f"{place}/{MARKER}", content)
        )
        for place, command in {"run": "score", "run/query": "score", "run/pretraining": "plan"}.items()
        for name, content in NO_JSON.items()
    },
    "marker: another format": Fault("score", ("format 9",), marked(with_value(9, "format"))),
    "marker: no kind": Fault("score", (MARKER, "kind"), marked(without("kind"))),
    "marker: names in words": Fault("score", (MARKER, "names"), marked(with_value("x", "names"))),
    "marker: facts in a list": Fault("score", (MARKER, "facts"), marked(with_value([], "facts"))),
    "marker: an unknown entry": Fault("score", (MARKER, "zz"), marked(with_value(1, "zz"))),
    "marker: files in a list": Fault("score", (MARKER,), marked(with_value([], "facts", "files"))),
    "marker: a seal of two": Fault(
        "score", (MARKER,), marked(with_value({"scores.parquet": [[1, 2]]}, "facts", "files"))
    ),
    "scores: nothing": Fault(TOP, ("scores.parquet",), write(SCORES, "")),
    "scores: words": Fault(TOP, ("scores.parquet", "holds no scores"), write(SCORES, "x")),
    "scores: noise": Fault(TOP, ("scores.parquet",), write(SCORES, b"PAR1" + b"x" * 50 + b"PAR1")),
    "scores: cut": Fault(TOP, ("scores.parquet",), cut(SCORES, 900)),
    "scores: a folder": Fault(TOP, ("scores.parquet",), folder_at(SCORES)),
    "scores: gone": Fault(TOP, ("scores.parquet",), remove(SCORES)),
    "scores: no metadata": Fault(TOP, ("scores.parquet",), columns(lambda t: t.replace_schema_metadata(None))),
    "scores: a bit": Fault(TOP, ("scores.parquet", "damaged"), lambda f: flipped(f / SCORES)),
    **{
        f"scores, metadata: {n}": Fault(TOP, ("scores.parquet",), metadata(lambda m, c=c: c))
        for n, c in NO_JSON.items()
    },
    "scores: no columns": Fault(TOP, ("scores.parquet", "columns"), facts(columns=None)),
    "scores: columns in words": Fault(TOP, ("scores.parquet", "columns"), facts(columns="x")),
    "scores: no column": Fault(TOP, ("scores.parquet", "columns"), facts(columns=0)),
    "scores: more columns": Fault(TOP, ("scores.parquet", "influence_2"), facts(columns=9)),
    "scores: too many columns": Fault(TOP, ("scores.parquet", "columns"), facts(columns=10**12)),
    "scores: no tests": Fault(TOP, ("tests", "score again"), facts(tests=None)),
    "scores: tests in words": Fault(TOP, ("scores.parquet", "tests"), facts(tests=["a", "b"])),
    "scores: a column less": Fault(TOP, ("influence_0",), columns(lambda t: t.drop_columns(["influence_0"]))),
    "scores: no ids": Fault(TOP, ("example_id",), columns(lambda t: t.drop_columns(["example_id"]))),
}


def flipped(path):
    """Changes a bit in the first page."""
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fault", OTHERS.values(), ids=OTHERS)
def test_a_file_of_a_run_that_is_damaged_is_refused(scored, capfd, fault):
    assert_refused(fault, scored, capfd)


def part(number, change=lambda facts: None, name=None):
    """A part of an interrupted scoring."""

    def edit(folder):
        rows = pq.read_table(folder / SCORES).slice(0, 3)
        said = {"number": number, "rows": "0" * 64, "truncated": 0}
        change(said)
        rows = rows.replace_schema_metadata({b"hf_msif": json.dumps(said).encode()})
        pq.write_table(rows, folder / "run" / "scores.parts" / (name or f"part-{number:08d}.parquet"))

    return edit


@pytest.fixture
def interrupted(scored, monkeypatch):
    """A scoring whose first part is there."""
    from hf_msif.scoring import on_disk

    write_frame, written = on_disk.write_frame, []

    def once(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(write_frame(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "write_frame", once)
        assert msif("score", "--config", scored / "config.yaml", "--corpus.part_rows", 5) == 130
    assert (scored / "run" / "scores.parts" / "manifest.json").is_file()
    return scored


PARTS = {
    "another number": part(1, lambda facts: facts.update(number=7)),
    "a number in words": part(1, lambda facts: facts.update(number="x")),
    "no number": part(1, lambda facts: facts.pop("number")),
    "no rows": part(1, lambda facts: facts.pop("rows")),
    "truncated in words": part(1, lambda facts: facts.update(truncated="x")),
    "noise": write("run/scores.parts/part-00000001.parquet", b"PAR1" + b"x" * 50 + b"PAR1"),
    "nothing": write("run/scores.parts/part-00000001.parquet", b""),
}


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_a_part_that_is_damaged_is_scored_again(interrupted, capfd, change):
    expected = pq.read_table(interrupted / SCORES)
    change(interrupted)
    command = ["score", "--config", interrupted / "config.yaml", "--corpus.part_rows", 5, "--resume"]
    assert msif(*command) == 0
    assert "part-00000001.parquet is damaged: its rows are scored again" in capfd.readouterr().out
    found = pq.read_table(interrupted / SCORES)
    for name in ("influence_0", "influence_1"):
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5, atol=1e-9)


# --- what the user has at our places, and disks


PLACES = {
    "run/scores.parquet": "score",
    "run/table1.md": "score",
    "run/table1.parquet": "score",
    "run/scores.parts": "score",
    "run/pretraining": "train",
    "run/pretraining.json": "train",
    "run/pretraining.checkpoints": "train",
    "run/pretraining.part": "train",
    "run/finetuning.old": "train",
    "run/query.checkpoints": "query",
    "run/query/query.json": "query",
    "run/sweep.md": "sweep",
    "run/sweep.parquet": "sweep",
}
KINDS = {"a file": file_at, "a folder": folder_at, "a link": lambda name: link_at(name, "/nowhere/at/all")}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("place", "command"), PLACES.items(), ids=PLACES)
def test_what_the_user_has_at_our_place_stays(scored, capfd, place, command, kind):
    assert_refused(Fault(command, (place, "move"), kind(place)), scored, capfd)


def test_a_users_file_beside_the_model_stays(scored, capfd):
    assert_refused(
        Fault("train", ("pretraining holds notes.txt",), write("run/pretraining/notes.txt", "a")), scored, capfd
    )


@pytest.mark.parametrize("size", [4096, 12_000])
@pytest.mark.parametrize("command", ["train", "query", "score", "sweep"])
def test_a_full_disk_is_said_and_leaves_what_was_there(scored, capfd, command, size):
    before = snapshot(scored)
    with largest_file(size):
        code = msif(command, "--config", scored / "config.yaml")
    said = capfd.readouterr()
    after = snapshot(scored)
    if code == 0:  # the files of this command are smaller
        assert size > 4096
        return
    assert code == 2
    (line,) = [line for line in visible(said.err) if "error: " in line]
    assert "too large" in line or "cannot be written" in line
    assert "Traceback" not in said.err
    assert not [path for path in after if path.name.endswith(".part")]
    models = [path for path in before if "pretraining/" in str(path) or "query/" in str(path)]
    damaged = [path for path in models if after.get(path) != before[path] and path.name != MARKER]
    assert not damaged or command == "query"
    for path in damaged:  # a query is two files: the one that was not written is refused with the other
        assert path.name in ("query.json", "query.safetensors")


def test_a_disk_without_room_for_a_byte_keeps_no_folder(untrained, capfd, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_msif.engine.files._sync", full)
    assert_refused(Fault("train", ("cannot be written (No space left", "free space")), untrained, capfd)
    assert not list((untrained / "run").glob("*.checkpoints"))


def test_figures_where_no_file_can_be(scored, capfd):
    compare = "compare --runs FOLDER/run FOLDER/run --output"
    for output, words in {"FOLDER/run": ("--output",), "FOLDER/x.xyz": ("--output", "xyz")}.items():
        assert_refused(Fault(f"{compare} {output}", words), scored, capfd)
    for output, reason in {
        "FOLDER/corpus.txt/x.png": "a file is in the place of its folder",
        "FOLDER/d.png": "a folder is in its place",
    }.items():
        (scored / "d.png").mkdir(exist_ok=True)
        assert_refused(Fault(f"{compare} {output}", ("cannot be written", reason)), scored, capfd)


# --- checkpoints of an interrupted training


class Malicious:
    """A pickle that leaves a file behind when it is loaded."""

    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.fixture(scope="module")
def stopped(trained_project, tmp_path_factory):
    """A training that was killed after its second checkpoint."""
    from helpers.project import copied

    from hf_msif.training import trainer

    path = copied(trained_project, tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        step = trainer._Watch.on_step_end

        def stop(self, args, state, control, **kwargs):
            step(self, args, state, control, **kwargs)
            if state.global_step == 5:
                raise KeyboardInterrupt

        patch.setattr(trainer._Watch, "on_step_end", stop)
        assert msif("train", "--config", path, *CHECKPOINTED) == 130
    assert last_checkpoint(path.parent / "run" / "pretraining.checkpoints").endswith("checkpoint-4")
    return path


CHECKPOINTED = ("--stage", "pretraining", f"{PRE}.training.save_strategy", "steps", f"{PRE}.training.save_steps", 2)
NAMES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors")
DAMAGE = {
    "noise": lambda path: path.write_bytes(b"\x93" * 200),
    "nothing": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pickle that acts": lambda path: path.write_bytes(pickle.dumps(Malicious())),
    "torch's pickle that acts": lambda path: torch.save(Malicious(), path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_checkpoint_that_is_damaged_is_named_and_never_executed(stopped, tmp_path, capfd, monkeypatch, name, damage):
    shutil.copytree(stopped.parent, tmp_path / "project", dirs_exist_ok=True)
    folder = tmp_path / "project"
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(str(stopped.parent), str(folder)))
    damage(folder / "run" / "pretraining.checkpoints" / "checkpoint-4" / name)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert msif("train", "--config", path, *CHECKPOINTED) == 2
    said = capfd.readouterr()
    (line,) = [line for line in visible(said.err) if "error: " in line]
    assert "pretraining.checkpoints" in line
    assert "delete" in line
    assert "Traceback" not in said.err
    assert not (tmp_path / "executed").exists()
