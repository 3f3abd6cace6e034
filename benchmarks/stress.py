"""Kills a scoring run at random moments, resumes it, and compares the finished scores with an undisturbed run.

    python benchmarks/stress.py                       # 20 kills, about ten minutes on two cores
    python benchmarks/stress.py --kills 5 --seed 3
    python benchmarks/stress.py --work run            # a training that is recorded, for an unrolled stage
    python benchmarks/stress.py --work pair           # two scorings at once in one folder

`torchrun` scores a corpus on 1, 2 or 3 processes (drawn anew at each start) with `resume=True`. At a random moment
after the first new part, either one process or all of them with the launcher get signal 9. About every fourth start
has a full disk instead (a limit on the size of files that is smaller than any part). About every third time a finished
part is damaged before the next start: it is cut short, or one bit is changed. When a run has finished, its file is
compared with that of one undisturbed process (the same ids in the same order, none lost, none repeated, scores to
1e-10), and the next run begins.

A training that is recorded gets signal 9 after a state was written, and goes on; its last state must be, bit by bit,
that of a training that nobody disturbed. Of two scorings in one folder, the one that comes second must be refused
while the first one is at work; the first gets signal 9, and whoever comes next goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROWS, PART_ROWS = 1500, 10


def main(argv: list[str] | None = None) -> int:
    """Runs the stress test; returns the exit code."""
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("--kills", type=int, default=20)
    reader.add_argument("--work", choices=["score", "run", "pair"], default="score")
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--worker", help=argparse.SUPPRESS)
    reader.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    settings = reader.parse_args(argv)
    if settings.worker:
        works = {"score": work, "run": record_run, "pair": score_alone}
        return works[settings.work](Path(settings.worker), settings.limit)
    if settings.work != "score":
        return alone(settings.work, settings.kills, random.Random(settings.seed))
    chance, counts = random.Random(settings.seed), {"one": 0, "all": 0, "full": 0, "damaged": 0, "finished": 0}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        run(base / "undisturbed", 1).wait()
        expected = base / "undisturbed" / "scores.parquet"
        while counts["one"] + counts["all"] < settings.kills:
            disturb(base / "disturbed", expected, chance, counts, settings.kills)
    print(f"{counts['one'] + counts['all']} kills: {json.dumps(counts)}; every finished file is the undisturbed one")
    return 0


def disturb(folder: Path, expected: Path, chance: random.Random, counts: dict, kills: int) -> None:
    """One scoring run, from its first start until it has finished, and the comparison; updates `counts`."""
    shutil.rmtree(folder, ignore_errors=True)
    parts = folder / "scores.parts"
    while True:
        more_kills, processes = counts["one"] + counts["all"] < kills, chance.choice([1, 2, 3])
        full = more_kills and chance.random() < 0.25
        started = run(folder, processes, limit=2048 if full else 0)
        before = len(list(parts.glob("part-*")))
        while started.poll() is None and len(list(parts.glob("part-*"))) <= before:
            time.sleep(0.02)
        if full:
            _, error = started.communicate()
            assert started.returncode, "a part was written beyond the limit"
            assert "the parts that were finished are whole" in error, error
            counts["full"] += 1
            print(f"disk full on {processes} process(es), {before} parts before", flush=True)
            continue
        if more_kills and started.poll() is None:
            time.sleep(chance.uniform(0, 1.5))
            victims = kill(started, chance)
            if victims:
                counts[victims] += 1
                finished = len(list(parts.glob("part-*")))
                print(
                    f"killed {victims} of {processes} process(es) at {finished} of {ROWS // PART_ROWS} parts",
                    flush=True,
                )
        started.communicate()
        if (folder / "scores.parquet").is_file() and not parts.is_dir():
            break
        if parts.is_dir() and chance.random() < 0.33:
            damage(sorted(parts.glob("part-*.parquet")), chance, counts)
    compare(folder / "scores.parquet", expected)
    counts["finished"] += 1
    print("finished: the undisturbed file", flush=True)


def alone(what: str, kills: int, chance: random.Random) -> int:
    """Kills single processes: recorded runs ("run"), or the first of two scorings in one folder ("pair")."""
    pattern = "state-*" if what == "run" else "scores.parts/part-*"
    killed = refused = finished = 0
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        assert run(base / "undisturbed", 1, what=what).wait() == 0
        while killed < kills or not finished:
            folder = base / f"disturbed-{finished}"
            before = len(list(folder.glob(pattern)))
            started = [run(folder, 1, what=what) for _ in range(2 if what == "pair" else 1)]
            while any(process.poll() is None for process in started) and len(list(folder.glob(pattern))) <= before:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.5))
            at_work = [process for process in started if process.poll() is None]
            for process in started:
                if process not in at_work and process.returncode:
                    error = process.communicate()[1]
                    assert "is in use by" in error, error
                    refused += 1
            if killed < kills and at_work:
                at_work[0].kill()
                killed += 1
            for process in at_work:
                error = process.communicate()[1]
                assert process.returncode in (0, -signal.SIGKILL) or "is in use by" in error, error
                refused += "is in use by" in error
            if any(process.returncode == 0 for process in started):
                same(what, folder, base / "undisturbed")
                finished += 1
    print(f"{killed} kills: {finished} finished as if undisturbed, {refused} refused while another was at work")
    return 0


def same(what: str, folder: Path, undisturbed: Path) -> None:
    """Asserts that a folder holds what the undisturbed one holds."""
    if what == "pair":
        compare(folder / "scores.parquet", undisturbed / "scores.parquet")
        return
    import torch

    from hf_msif.engine.files import load_tensors

    names = sorted(path.name for path in undisturbed.glob("*.safetensors"))
    assert names == sorted(path.name for path in folder.glob("*.safetensors"))
    for name in names:
        found, expected = (load_tensors(at / name)[0] for at in (folder, undisturbed))
        assert all(torch.equal(found[key], expected[key]) for key in {**found, **expected}), name


def run(folder: Path, processes: int, limit: int = 0, what: str = "score") -> subprocess.Popen:
    """Starts a scoring run in its own process group; `limit`: most bytes per file, 0 for no limit."""
    command = [sys.executable]  # without a launcher, signal 9 ends all of it
    if what == "score":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, __file__, "--worker", str(folder), "--limit", str(limit), "--work", what],
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(started: subprocess.Popen, chance: random.Random) -> str | None:
    """Sends signal 9 to one worker, after which the launcher ends the others, or to all workers and the launcher.

    Returns "one" or "all"; None if the run had just finished.
    """
    import psutil

    try:
        workers = psutil.Process(started.pid).children(recursive=True)
        if chance.random() < 0.5 and workers:
            chance.choice(workers).send_signal(signal.SIGKILL)
            return "one"
        for process in [*workers, psutil.Process(started.pid)]:
            process.send_signal(signal.SIGKILL)
        return "all"
    except psutil.NoSuchProcess:
        return None


def damage(paths: list[Path], chance: random.Random, counts: dict) -> None:
    """Cuts a random file short, or changes one bit of it."""
    if not paths:
        return
    victim = chance.choice(paths)
    content = bytearray(victim.read_bytes())
    if chance.random() < 0.5:
        content = content[: chance.randrange(len(content))]
    else:
        content[chance.randrange(4, len(content) // 4)] ^= 1 << chance.randrange(8)
    victim.write_bytes(content)
    counts["damaged"] += 1
    print(f"damaged {victim.name}", flush=True)


def compare(path: Path, expected: Path) -> None:
    """Asserts that two files have the same rows and, to 1e-10, the same scores."""
    import numpy as np

    from hf_msif import Scores

    frame, expected_frame = Scores.from_parquet(path).frame, Scores.from_parquet(expected).frame
    exact_columns = ["example_id", "text", "text_sha256", "duplicates", "terms"]
    assert frame[exact_columns].equals(expected_frame[exact_columns]), "rows differ"
    for column in ("influence_0", "influence_1", "loss"):
        np.testing.assert_allclose(frame[column], expected_frame[column], rtol=1e-10, atol=1e-14)


def problem():
    """A model in float64, an objective, and rows."""
    import torch
    from scaling import MODELS, tokenizer
    from transformers import BertConfig, BertForMaskedLM

    from hf_msif import objectives

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(max_position_embeddings=130, **MODELS["tiny"])).double()
    words = random.Random(0)
    rows = [
        {"example_id": f"s{i}", "text": " ".join(f"w{words.randrange(190)}" for _ in range(words.randrange(1, 40)))}
        for i in range(ROWS)
    ]
    rows[77]["text"] = rows[1400]["text"]
    return model, objectives.MaskedLM(tokenizer(), max_length=128), rows


def record_run(folder: Path, limit: int) -> int:
    """A training that is recorded; returns its exit code."""
    from transformers import TrainingArguments

    from hf_msif import training

    model, objective, rows = problem()
    arguments = TrainingArguments(str(folder), max_steps=100, learning_rate=1e-3, report_to=[], use_cpu=True)
    training.record(model, objective, rows[:64], arguments, folder, progress=False)
    return 0


def score_alone(folder: Path, limit: int) -> int:
    """A scoring that keeps others out of its folder, as `msif score` does; returns its exit code."""
    from hf_msif import InputError
    from hf_msif.project.lock import in_use

    try:
        with in_use(folder, "a scoring"):
            return work(folder, limit)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def work(folder: Path, limit: int) -> int:
    """One process of a launch; returns its exit code."""
    from hf_msif import InputError, MultiStageInfluence, Stage, solvers

    model, objective, rows = problem()
    stage = Stage("pretraining", model, objective, rows[:8], solver=solvers.Identity(), batch_size=2)
    chain = MultiStageInfluence([stage], progress=False)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        chain.query(rows[:2]).score(rows, output_dir=folder, resume=True, part_rows=PART_ROWS)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
