"""Kills a scoring run at random moments, resumes it, and compares the finished scores with an undisturbed run.

    python benchmarks/stress.py                       # 20 kills, about ten minutes on two cores
    python benchmarks/stress.py --kills 5 --seed 3

`torchrun` scores a corpus on 1, 2 or 3 processes (drawn anew at each start) with `resume=True`. At a random moment
after the first new part, either one process or all of them with the launcher get signal 9. About every fourth start
has a full disk instead (a limit on the size of files that is smaller than any part). About every third time a finished
part is damaged before the next start: it is cut short, or one bit is changed. When a run has finished, its file is
compared with that of one undisturbed process (the same ids in the same order, none lost, none repeated, scores to
1e-10), and the next run begins.
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
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--worker", help=argparse.SUPPRESS)
    reader.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    settings = reader.parse_args(argv)
    if settings.worker:
        return work(Path(settings.worker), settings.limit)
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


def run(folder: Path, processes: int, limit: int = 0) -> subprocess.Popen:
    """Starts a scoring run in its own process group; `limit`: most bytes per file, 0 for no limit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, __file__, "--worker", str(folder), "--limit", str(limit)],
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


def work(folder: Path, limit: int) -> int:
    """One process of a launch; returns its exit code."""
    import torch
    from scaling import MODELS, tokenizer
    from transformers import BertConfig, BertForMaskedLM

    from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers

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
    objective = objectives.MaskedLM(tokenizer(), max_length=128)
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
