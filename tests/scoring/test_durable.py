"""Scorings that are interrupted, damaged or of something else; extremes that are kept; solves that are resumed."""

import errno
import json
import threading
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import distributed, tiny

from hf_msif import InputError, Query, Scores, solvers
from hf_msif.engine import checkpoints
from hf_msif.influence import direction  # which calls `directional_derivatives`
from hf_msif.scoring import extremes, folder, on_disk
from hf_msif.scoring.frames import METADATA_KEY
from hf_msif.scoring.summary import EDGES

CORPUS = [*tiny.rows(21, seed=7, longest=18), {"example_id": 30, "text": "we said no"}]
CORPUS += [{"example_id": i, "text": CORPUS[3]["text"]} for i in (40, 41)]


@pytest.fixture(scope="module")
def query():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return distributed.chain(torch.float64).query(distributed.TESTS)


@pytest.fixture(scope="module")
def expected(query):
    return query.score(CORPUS)


def same(scores, expected):
    plain = ["example_id", "text", "text_sha256", "duplicates", "terms"]
    assert scores.frame[plain].equals(expected.frame[plain])
    for q in range(3):
        np.testing.assert_allclose(scores.influence(q), expected.influence(q), rtol=1e-12)
        np.testing.assert_allclose(scores.removal_effects()[:, q], expected.removal_effects()[:, q], rtol=1e-12)
    np.testing.assert_allclose(scores.frame.loss, expected.frame.loss, rtol=1e-12)
    assert scores.metadata.keys() == expected.metadata.keys()
    assert scores.metadata["truncated"] == expected.metadata["truncated"]


class Killed(BaseException):
    """Like a signal, no `except Exception` catches it."""


def interrupted(query, folder, monkeypatch, after, kind=on_disk.PartsOnDisk, corpus=CORPUS, **settings):
    """Scores until `after` parts are written."""
    done, add = [], kind.add

    def failing(self, *args):
        if len(done) == after:
            raise Killed
        done.append(1)
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "add", failing)
        with pytest.raises(Killed):
            query.score(corpus, output_dir=folder, **{"part_rows": 5, "batch_size": 1, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_scoring_is_resumed(query, expected, tmp_path, monkeypatch, after):
    interrupted(query, tmp_path, monkeypatch, after)
    assert not (tmp_path / "scores.parquet").exists()
    assert len(list((tmp_path / "scores.parts").glob("part-*.parquet"))) == after
    passed, real = [], direction.directional_derivatives
    monkeypatch.setattr(direction, "directional_derivatives", lambda *args: passed.append(1) or real(*args))
    same(query.score(CORPUS, output_dir=tmp_path, resume=True, part_rows=5, batch_size=4, method="forward"), expected)
    assert len(passed) == 3 * -(-(24 - 5 * after) // 4)  # the rows of finished parts are not scored again
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "no footer"])
def test_a_damaged_part_is_scored_again(query, expected, tmp_path, monkeypatch, capsys, damage):
    interrupted(query, tmp_path, monkeypatch, 4)
    victim = tmp_path / "scores.parts" / "part-00000002.parquet"
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "a bit":
        content[len(content) // 8] ^= 4
    else:
        content[-40:] = b"x" * 40
    victim.write_bytes(content)
    (tmp_path / "scores.parts" / "part-00000004.parquet.123.part").write_bytes(b"half")
    same(query.score(CORPUS, output_dir=tmp_path, resume=True, part_rows=5), expected)
    assert f"{victim} is damaged: its rows are scored again" in capsys.readouterr().out


def test_a_full_disk_loses_nothing(query, expected, tmp_path, monkeypatch):
    write, written = pq.write_table, []

    def full(table, path, **settings):
        if len(written) == 2:
            path.write_bytes(b"PAR1 half a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(table, path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(
            InputError, match=r"No space left on device\).*; the parts that were finished are whole.*resume"
        ):
            query.score(CORPUS, output_dir=tmp_path, part_rows=5, batch_size=1)
    assert sorted(p.name for p in (tmp_path / "scores.parts").glob("[!.]*")) == [
        "manifest.json", "part-00000000.parquet", "part-00000001.parquet"]  # fmt: skip
    same(query.score(CORPUS, output_dir=tmp_path, resume=True, part_rows=5), expected)


def test_killed_while_the_parts_are_put_together(query, expected, tmp_path, monkeypatch):
    def killed(*args, **settings):
        if (tmp_path / "scores.parquet").exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(folder.folders, "remove", killed)
        with pytest.raises(Killed):
            query.score(CORPUS, output_dir=tmp_path, part_rows=5)
    assert (tmp_path / "scores.parquet").exists()
    same(query.score(CORPUS, output_dir=tmp_path, resume=True, part_rows=5), expected)


def test_an_interrupted_scoring_is_not_thrown_away(query, tmp_path, monkeypatch):
    interrupted(query, tmp_path, monkeypatch, 2)
    with pytest.raises(
        InputError, match=r"scores.parts holds a scoring that was interrupted: continue it with --resume"
    ):
        query.score(CORPUS, output_dir=tmp_path, part_rows=5)
    assert len(list((tmp_path / "scores.parts").glob("part-*"))) == 2


def test_what_changed_is_named(query, tmp_path, monkeypatch):
    interrupted(query, tmp_path, monkeypatch, 3)

    def refused(match, asked=query, corpus=CORPUS, **settings):
        with pytest.raises(InputError, match=match):
            asked.score(corpus, output_dir=tmp_path, resume=True, **{"part_rows": 5, **settings})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused("the query changed since", query.chain.query(tiny.rows(3, seed=99)))
    refused("keep changed since", keep=3)
    refused("dtype changed since", dtype="bfloat16")
    refused("part_rows changed since", part_rows=6)
    changed = [{**row, "text": "sad"} if i == 7 else row for i, row in enumerate(CORPUS)]
    refused(r"the corpus changed since .* the 5 rows from 5 on \(part 1\) are not those", corpus=changed)
    refused("the corpus changed since .* it ends before part 1", corpus=CORPUS[:5])
    state = json.loads((tmp_path / "scores.parts" / "manifest.json").read_text())
    state["the model of stage 'pre'"] = "another fingerprint"
    (tmp_path / "scores.parts" / "manifest.json").write_text(json.dumps(state))
    refused("the model of stage 'pre' changed since")


def test_without_anything_to_resume_scoring_starts_from_the_beginning(query, expected, tmp_path):
    same(query.score(CORPUS, output_dir=tmp_path, resume=True, part_rows=7), expected)
    same(query.score(CORPUS, output_dir=tmp_path), expected)  # a finished file is replaced
    with pytest.raises(InputError, match="resume needs output_dir"):
        query.score(CORPUS, resume=True)


def test_texts_are_counted_a_class_at_a_time(query, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "COUNTED_AT_ONCE", 3)
    assert expected.frame.duplicates.max() == 3
    same(query.score(CORPUS, output_dir=tmp_path, part_rows=5), expected)


# Kept extremes -------------------------------------------------------------------------------------------------------


def check_kept(scores, expected, keep):
    for q in range(3):
        for by in ("absolute", "harmful", "helpful"):
            for end in ("top", "bottom"):
                from_kept, from_all = (getattr(s, end)(keep, by, q) for s in (scores, expected))
                assert from_kept.example_id.tolist() == from_all.example_id.tolist(), (by, end)
        values, facts = expected.influence(q), scores.metadata["kept"]["all"][q]
        assert facts["count"] == len(values)
        assert facts["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert facts["standard_deviation"] == pytest.approx(values.std(), rel=1e-12)
        assert (facts["smallest"], facts["largest"]) == pytest.approx((values.min(), values.max()))
        counts = np.histogram(values, np.concatenate([[-np.inf], EDGES, [np.inf]]))[0]
        assert sum(n for *_, n in facts["histogram"]) == counts.sum()
        for low, high, n in facts["histogram"]:
            assert n == ((values > low) & (values <= high)).sum()
    assert "duplicates" not in scores.frame


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3, 100])
def test_the_extremes_of_all_orders_are_kept(query, expected, tmp_path, keep):
    for settings in ({}, {"output_dir": tmp_path, "part_rows": 5}):
        scores = query.score(CORPUS, keep=keep, batch_size=1, **settings)
        check_kept(scores, expected, keep)
        assert len(scores) <= min(9 * keep, len(CORPUS))
    if keep == 1:
        with pytest.raises(InputError, match="kept the 1 most extreme rows of each order, not 2"):
            scores.top(2)


@pytest.mark.parametrize("after", [1, 4])
def test_kept_extremes_are_resumed(query, expected, tmp_path, monkeypatch, after):
    monkeypatch.setattr(extremes.ExtremesOnDisk, "SAVE_EVERY", 0.0)
    interrupted(query, tmp_path, monkeypatch, after, extremes.ExtremesOnDisk, keep=2)
    with pytest.raises(InputError, match="the corpus changed since"):
        query.score(CORPUS[1:], output_dir=tmp_path, resume=True, part_rows=5, keep=2)
    scores = query.score(CORPUS, output_dir=tmp_path, resume=True, part_rows=5, keep=2)
    check_kept(scores, expected, 2)


def test_the_next_round_is_scored_while_one_is_written(query, tmp_path, monkeypatch):
    """Writing the first round waits until derivatives of the second are computed."""
    under_way, inside, add = threading.Event(), direction.directional_derivatives, on_disk.PartsOnDisk.add
    rounds = []

    def directional(*args):
        if rounds:
            under_way.set()
        return inside(*args)

    def slow(self, *args):
        rounds.append(1)
        assert len(rounds) > 1 or under_way.wait(timeout=60)
        return add(self, *args)

    monkeypatch.setattr(direction, "directional_derivatives", directional)
    monkeypatch.setattr(on_disk.PartsOnDisk, "add", slow)
    query.score(CORPUS, output_dir=tmp_path, part_rows=16, batch_size=1, method="forward")
    assert len(rounds) == 2


def test_a_write_that_failed_is_reported_whatever_else_fails(query, tmp_path, monkeypatch):
    calls, inside, second, failed = [], direction.directional_derivatives, threading.Event(), threading.Event()

    def full(self, *args):
        second.wait(timeout=60)
        failed.set()
        raise InputError("no room")

    def directional(*args):
        calls.append(1)
        if len(calls) > 3 * 16:  # of the second round
            second.set()
            assert failed.wait(timeout=60)
            raise MemoryError("of the device")
        return inside(*args)

    monkeypatch.setattr(on_disk.PartsOnDisk, "add", full)
    monkeypatch.setattr(direction, "directional_derivatives", directional)
    with pytest.raises(MemoryError, match="of the device") as raised:
        query.score(CORPUS, output_dir=tmp_path, part_rows=16, batch_size=1, method="forward")
    assert raised.value.__notes__ == ["Writing the scores of earlier rows failed as well: no room"]


# bfloat16 ------------------------------------------------------------------------------------------------------------


def test_the_error_of_bfloat16_is_measured(expected, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = distributed.chain(torch.float32).query(distributed.TESTS)
    exact, low = asked.score(CORPUS), asked.score(CORPUS, dtype="bfloat16")
    error = low.metadata["dtype_error"]
    gaps = [
        np.sqrt(((low.influence(q) - exact.influence(q)) ** 2).mean() / (exact.influence(q) ** 2).mean())
        for q in range(3)
    ]
    assert 1e-4 < error["relative"] < 0.1
    assert error["relative"] == pytest.approx(max(gaps), rel=1e-3)  # all rows are compared, since they are few
    assert error["rank_correlation"] > 0.95
    assert f"on 24 rows: relative error {error['relative']:.1e}" in capsys.readouterr().out
    assert "dtype_error" not in exact.metadata


def test_tf32_is_asked_for_while_scoring_alone(query, monkeypatch):
    products, inside = torch.backends.cuda.matmul, direction.directional_derivatives
    precisions, before = [], products.fp32_precision
    monkeypatch.setattr(
        direction, "directional_derivatives", lambda *args: precisions.append(products.fp32_precision) or inside(*args)
    )
    scores = query.score(CORPUS, dtype="tf32", method="forward")
    assert set(precisions) == {"tf32", before}  # the rows that are compared are scored in both
    assert products.fp32_precision == before != "tf32"
    assert scores.metadata["dtype_error"]["dtype"] == "tf32"


# Files that are read when they are asked for ------------------------------------------------------------------------


def test_only_what_is_asked_for_is_read_from_a_file(query, expected, tmp_path, monkeypatch):
    query.score(CORPUS, output_dir=tmp_path, part_rows=5)
    scores = Scores.from_parquet(tmp_path / "scores.parquet")
    monkeypatch.setattr(type(scores._source), "whole", lambda self: pytest.fail("the whole file was read"))
    assert len(scores) == len(CORPUS)
    assert (
        scores.top(4, query=1)
        .drop(columns=["influence", "removal_effect", "loss"])
        .equals(expected.top(4, query=1).drop(columns=["influence", "removal_effect", "loss"]))
    )
    assert scores.bottom(4, "helpful").example_id.tolist() == expected.bottom(4, "helpful").example_id.tolist()
    assert len(scores.top(0)) == 0
    (tmp_path / "scores.parquet").unlink()
    assert len(scores.top(2)) == 2  # the file is still open: one that replaces it does not mix with it


def test_metadata_is_in_the_file(query, expected, tmp_path):
    query.score(CORPUS, output_dir=tmp_path)
    packed = pq.read_schema(tmp_path / "scores.parquet").metadata[METADATA_KEY]
    assert json.loads(packed).keys() == expected.metadata.keys()


# Solves that are resumed ---------------------------------------------------------------------------------------------

SOLVERS = {
    "cg": solvers.CG(damping=0.5, tol=1e-10, max_iter=12),
    "minres": solvers.MinRes(damping=3.0, tol=1e-10, max_iter=12),
    "squared": solvers.SquaredCG(damping=2.0, tol=1e-10, max_iter=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_an_interrupted_solve_is_resumed(name, sharded, tmp_path, monkeypatch):
    curvature = "gauss_newton" if name == "cg" else "hessian"
    asked, saves, stops, save = [], [], [2, 7, 8], checkpoints.Checkpoint.save

    def query(**settings):
        solver = SOLVERS[name]
        made = distributed.chain(torch.float64, sharded=sharded, solver=solver, curvature=curvature, corpus=5)
        return made.query(distributed.TESTS[:2], **settings)

    def failing(self, *args):
        saves.append(1)
        save(self, *args)
        if stops and len(saves) == stops[0]:  # in the finetuning stage, and in the pretraining stage
            stops.pop(0)
            raise Killed

    monkeypatch.setattr(checkpoints.Checkpoint, "due", lambda self: asked.append(1) or True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = query(checkpoints=tmp_path)
        iterations = len(asked)
        monkeypatch.setattr(checkpoints.Checkpoint, "save", failing)
        while stops:
            with pytest.raises(Killed):
                query(checkpoints=tmp_path)
        resumed = query(checkpoints=tmp_path)
    assert len(asked) == 2 * iterations  # no iteration was repeated
    for stage, solution in expected.solutions.items():
        assert resumed.certificates[stage].matvecs == expected.certificates[stage].matvecs
        assert resumed.certificates[stage].residual == pytest.approx(expected.certificates[stage].residual, rel=1e-6)
        tiny.close(resumed.solutions[stage].tensors(), solution.tensors(), 1e-9)
    assert not list(tmp_path.iterdir())


def stopped(made, tests, folder, monkeypatch):
    """Queries until the first checkpoint is written."""
    save = checkpoints.Checkpoint.save

    def failing(self, *args):
        save(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoint, "save", failing)
        with pytest.raises(Killed):
            made.query(tests, checkpoints=folder)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, slice(0, 100), slice(0, -9), slice(500, None)])
def test_a_checkpoint_of_another_query_or_a_damaged_one_is_ignored(query, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(checkpoints.Checkpoint, "due", lambda self: True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stopped(query.chain, tiny.rows(2, seed=50) if damage is None else distributed.TESTS, tmp_path, monkeypatch)
        path = tmp_path / "fine.safetensors"
        if damage is not None:
            path.write_bytes(path.read_bytes()[damage])
        resumed = query.chain.query(distributed.TESTS, checkpoints=tmp_path)
    tiny.close(resumed.solutions["pre"].tensors(), query.solutions["pre"].tensors(), 1e-12)


def test_a_saved_query_knows_its_count(query, tmp_path, monkeypatch):
    """N is in the query: a corpus is not counted again to be scored."""
    query.save_pretrained(tmp_path)
    again = distributed.chain(torch.float64)
    loaded = Query.from_pretrained(tmp_path, again)
    monkeypatch.setattr(type(again.stage("pre")), "count", property(lambda self: pytest.fail("counted again")))
    assert loaded.score(CORPUS[:2]).metadata["N"] == query.facts["pre"]["N"]
