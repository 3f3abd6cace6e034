"""Scoring on several processes: sentences per second, memory by corpus length, and estimated hours on a cluster.

    python benchmarks/scaling.py               # two processes of one thread against one, in turn; needs two idle cores
    python benchmarks/scaling.py --memory      # peak memory on 20,000 and on 200,000 streamed sentences
    python benchmarks/scaling.py --throughput  # BERT-base on this machine's GPU, by precision
    python benchmarks/scaling.py --simulate    # 30 million sentences with BERT-base on 1 to 512 GPUs, estimated
    python benchmarks/scaling.py --check       # exit code 1 if a bar is missed (also with --memory)

Speed: `torchrun` starts one or two processes, which score the same text file by `Query.score` with parts on disk. The
time is measured from the first round to the finished file, without the start of Python. The model is the BERT of
benchmarks/scoring.py with random weights; sentences are random words. Memory: the same with a tiny model; the largest
resident set of the main process is compared. Bars: two processes score at least 1.8 times as many sentences per
second; a corpus ten times as long takes at most 1.1 times the memory. Nothing is downloaded.

Throughput: one process scores a list of sentences with parts on disk, for each precision and batch size; the error is
relative to float32. The product is one with the Gauss-Newton matrix on 2,048 sentences.

The simulation measures on this machine what a sentence costs outside the model (reading and broadcasting, on the main
process; tokenising, on each process; writing, on the main process), counts the floating point operations of BERT-base,
and assumes the rest: --tflops, --bandwidth and --latency, which are printed with the table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from transformers import BertTokenizer

    from hf_msif import Query

BARS = {"speed": 1.8, "memory": 1.1}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MODELS = {
    "small": {"vocab_size": 30522, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"intermediate_size": 1024},
    "tiny": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    | {"intermediate_size": 8},
    "base": {"vocab_size": 30522},
}
SENTENCES, CORPUS, SEED = 1000, 30_000_000, 0


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.worker:
        return work(settings)
    if settings.simulate or settings.throughput:
        (simulate if settings.simulate else throughput)(settings)
        return 0
    return memory(settings) if settings.memory else speed(settings)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("--memory", action="store_true")
    reader.add_argument("--throughput", action="store_true")
    reader.add_argument("--simulate", action="store_true")
    reader.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    reader.add_argument(
        "--sentences", type=int, default=SENTENCES, help="number of sentences, for speed and --throughput"
    )
    reader.add_argument("--batch-size", type=int, nargs="+", default=[256, 1024], help="for --throughput")
    reader.add_argument("--model", default="base", choices=[*MODELS], help="for --throughput")
    reader.add_argument("--repeats", type=int, default=3)
    reader.add_argument(
        "--tflops", type=float, default=59.0, help="sustained TFLOP/s per GPU; an H100: 59, with TF32 128"
    )
    reader.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of the network per GPU")
    reader.add_argument("--latency", type=float, default=30.0, help="µs per step of a collective operation")
    reader.add_argument("--queries", type=int, default=1)
    reader.add_argument("--worker", help=argparse.SUPPRESS)
    return reader.parse_args(argv)


# --- measurements


def speed(settings: argparse.Namespace) -> int:
    """Compares two processes with one; returns the exit code.

    Launches take turns, so that a drift of the machine's speed affects all alike. Two independent jobs at the same
    time show the most that the machine can reach.
    """
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        path = sentences(Path(folder), settings.sentences)
        for repeat in range(settings.repeats):
            one, two = (launch(path, processes, "small") for processes in (1, 2))
            with ThreadPoolExecutor(2) as pool:
                apart = sum(report["rate"] for report in pool.map(lambda _: launch(path, 1, "small"), range(2)))
            ratios.append(two["rate"] / one["rate"])
            print(
                f"{repeat}: one process {one['rate']:.1f} sentences/s, two {two['rate']:.1f}: {ratios[-1]:.2f} times; "
                f"two apart, a job each, {apart:.1f}: {apart / one['rate']:.2f} times",
                flush=True,
            )
    middle = statistics.median(ratios)
    print(f"median {middle:.2f} times, bar {BARS['speed']}")
    return int(settings.check and middle < BARS["speed"])


def memory(settings: argparse.Namespace) -> int:
    """Compares the peak memory on a short and on a long corpus; returns the exit code."""
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (20_000, 200_000):
            reports[count] = launch(sentences(Path(folder), count, longest=12), 1, "tiny")
            report = reports[count]
            print(f"{count:,} sentences: peak {report['peak']:.1f} MiB, {report['rate']:.0f} sentences/s", flush=True)
    ratio = reports[200_000]["peak"] / reports[20_000]["peak"]
    print(f"{ratio:.3f} times, bar {BARS['memory']}")
    return int(settings.check and ratio > BARS["memory"])


def sentences(folder: Path, count: int, longest: int = 128) -> Path:
    """Writes a text file of `count` sentences of random words with log-normal lengths; returns its path."""
    import numpy as np

    generator, path = np.random.default_rng(SEED), folder / f"{count}.txt"
    with path.open("w") as file:
        for length in np.exp(generator.normal(np.log(24.7), 0.5, count)).clip(3, longest - 2).astype(int):
            file.write(" ".join(f"w{i}" for i in generator.integers(0, 190, length)) + "\n")
    return path


def launch(path: Path, processes: int, model: str) -> dict:
    """Scores the file with `processes` processes of one thread under `torchrun`; returns the main process's report."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--worker", str(path), "--model", model],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    if report["processes"] != processes:
        sys.exit(f"{report['processes']} processes ran, not {processes}")
    return report


def query_of(model: str, curvature_rows: list[dict], batch_size: int = 64) -> Query:
    """A query of one stage whose curvature is the identity, so that solving takes no time."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from hf_msif import MultiStageInfluence, Stage, objectives, solvers

    torch.manual_seed(SEED)
    bert = BertForMaskedLM(BertConfig(max_position_embeddings=130, **MODELS[model]))
    objective = objectives.MaskedLM(tokenizer(), max_length=128)
    stage = Stage("pretraining", bert, objective, curvature_rows, solver=solvers.Identity(), batch_size=batch_size)
    return MultiStageInfluence([stage], progress=False).query(curvature_rows[:1])


def tokenizer() -> BertTokenizer:
    """A tokenizer of 190 words and the special tokens."""
    from transformers import BertTokenizer

    words = [*SPECIAL, *(f"w{i}" for i in range(190))]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def work(settings: argparse.Namespace) -> int:
    """One process of a launch: scores the file; the main process prints a report of speed and memory."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(settings.worker)
    rows = [{"example_id": i, "text": "w1 w2 w3 w4 w5"} for i in range(4)]
    query = query_of(settings.model, rows)
    engine = query.chain.engine
    with tempfile.TemporaryDirectory() as folder:  # a warm-up: the first call imports modules
        query.score(sentences(Path(folder), 8), output_dir=engine.broadcast_object(folder))
        engine.gather([0])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # The main process writes, and all processes read the same folder afterwards.
        scores = query.score(path, output_dir=engine.broadcast_object(folder))
        engine.gather([0])
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if engine.is_main:
        report = {"rate": len(scores) / seconds, "peak": peak, "processes": engine.processes, "rows": len(scores)}
        print(json.dumps(report))
    return 0


def throughput(settings: argparse.Namespace) -> None:
    """Prints a table of sentences per second by precision and batch size, and the time of a product."""
    import numpy as np
    import torch
    from tabulate import tabulate

    from hf_msif import vectors
    from hf_msif.engine.corpus_files import from_files

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(from_files([sentences(Path(folder), settings.sentences)]))
    query = query_of(settings.model, rows[:2048], settings.batch_size[0])
    (bound,) = query.chain.stages
    cuda = bound.engine.device.type == "cuda"
    finish = torch.cuda.synchronize if cuda else lambda: None
    started = time.perf_counter()
    for start in range(0, len(rows), 64):
        bound.stage.objective.collate(rows[start : start + 64])
    collate = (time.perf_counter() - started) / len(rows)

    def influences(rows: list[dict], **options: Any) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            return query.score(rows, output_dir=folder, **options).influence()

    table, exact = [], None
    for size in settings.batch_size:
        for dtype in ("float32", "tf32", "bfloat16"):
            influences(rows[: 2 * size], dtype=dtype, batch_size=size)  # a warm-up
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            influence = influences(rows, dtype=dtype, batch_size=size)
            seconds = time.perf_counter() - started
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else ""
            exact = influence if exact is None else exact
            error = np.sqrt(((influence - exact) ** 2).mean() / (exact**2).mean())
            table.append([size, dtype, f"{len(rows) / seconds:,.0f}", f"{error:.1e}", peak])
            print(" ".join(map(str, table[-1])), flush=True)
    print(tabulate(table, ["batch", "precision", "sentences/s", "error", "peak memory"], tablefmt="github"))
    times, v = [], vectors.rademacher(bound.model.parameters, 1, seed=SEED)
    operator = bound.differentiation.curvature(rows[:2048])
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        for _ in range(2):
            finish()
            started = time.perf_counter()
            operator.matvec(v)
            finish()
        times.append(time.perf_counter() - started)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"a Gauss-Newton product on 2,048 sentences in batches of {settings.batch_size[0]}: {times[0]:.2f} s in "
        f"float32, {times[1]:.2f} s with TF32 products; tokenising {collate * 1e6:.0f} µs per sentence, on a GPU "
        "in a thread\n"
        f"{where}, torch {torch.__version__}: {settings.model} model, {len(rows):,} sentences"
    )


# --- estimates


def simulate(settings: argparse.Namespace) -> None:
    """Prints a table of estimated hours, from measured costs outside the model and counted operations inside it."""
    import pickle

    import numpy as np
    import torch
    from tabulate import tabulate
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig, BertForMaskedLM

    from hf_msif import objectives
    from hf_msif.adapters.functional import FunctionalModel
    from hf_msif.curvature.derivatives import Evaluation
    from hf_msif.engine.corpus_files import from_files
    from hf_msif.scoring.on_disk import PartsOnDisk
    from hf_msif.scoring.scores import frame_of

    torch.set_num_threads(1)
    count = 16384
    with tempfile.TemporaryDirectory() as folder:
        path = sentences(Path(folder), count)
        next(iter(from_files([path])))  # a warm-up: the first call imports modules
        started = time.perf_counter()
        rows = list(from_files([path]))
        read = (time.perf_counter() - started) / count
        started = time.perf_counter()
        packed = pickle.dumps(rows)
        pickle.loads(packed)
        broadcast = (time.perf_counter() - started) / count
        sink = PartsOnDisk(Path(folder) / "scores.parquet", {}, False)
        influence = np.random.rand(count, settings.queries)
        started = time.perf_counter()
        for start in range(0, count, 4096):
            part = slice(start, start + 4096)
            columns = {"loss": influence[part, 0], "terms": influence[part, 0]}
            sink.add(start // 4096, rows[part], frame_of(rows[part], influence[part], 1.0, columns), 0)
        sink.finish(count // 4096, {})
        write = (time.perf_counter() - started) / count
    objective = objectives.MaskedLM(tokenizer(), max_length=128)
    objective.collate(rows[:64])
    started = time.perf_counter()
    batches = [objective.collate(rows[start : start + 64]) for start in range(0, 4096, 64)]
    tokenise = (time.perf_counter() - started) / 4096
    config = BertConfig(**MODELS["base"])
    model = FunctionalModel(BertForMaskedLM(config))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.evaluating():
        Evaluation(model, objective, batches[0]).losses({})
    operations = counter.get_total_flops() / 64
    parameters = sum(p.numel() for p in model.parameters.values())
    # benchmarks/scoring.py: scoring takes 3.1 forward passes per query; a product 5.2, and 4.6 per further column
    scoring = 3.1 * settings.queries * operations / (settings.tflops * 1e12)
    product = (5.2 + 4.6 * (settings.queries - 1)) * operations / (settings.tflops * 1e12)
    examples, iterations = 2048, 200
    table = []
    for gpus in (1, 8, 64, 512):
        # Threads read, collate and write while the GPU computes, but those of the main process take turns.
        main_process = read + write + (broadcast if gpus > 1 else 0.0) + tokenise / gpus
        per_sentence = max(scoring / gpus, main_process)
        # A ring all-reduce sends 2 (n − 1)/n of the float64 sum over the slowest link, in 2 (n − 1) steps.
        ring = 2 * (gpus - 1) / gpus * 8 * parameters * settings.queries / (settings.bandwidth * 1e9)
        ring += 2 * (gpus - 1) * settings.latency * 1e-6
        solve = iterations * (examples * product / gpus + (ring if gpus > 1 else 0.0))
        hours, best = per_sentence * CORPUS / 3600, max(scoring, read + write + tokenise) * CORPUS / 3600
        table.append(
            [gpus, f"{hours:.2f} h", f"{1 / per_sentence:,.0f}", f"{best / hours / gpus:.0%}", f"{solve:.0f} s"]
        )
    heads = ["GPUs", f"{CORPUS:,} sentences", "sentences/s", "efficiency", f"{iterations} products"]
    print(tabulate(table, heads, tablefmt="github"))
    tokens = sum(batch["attention_mask"].sum().item() for batch in batches) / 4096
    print(
        f"\nmeasured here, one thread, µs per sentence: reading {read * 1e6:.0f}, broadcasting {broadcast * 1e6:.0f} "
        f"(main process), tokenising {tokenise * 1e6:.0f} (each process), writing {write * 1e6:.0f} (main process)\n"
        f"counted: {operations / 1e9:.1f} GFLOP per forward pass of a sentence (BERT-base, {parameters / 1e6:.0f} "
        f"million parameters, {tokens:.0f} tokens), padding included\n"
        f"assumed: {settings.tflops:g} TFLOP/s sustained per GPU, {settings.bandwidth:g} GB/s and "
        f"{settings.latency:g} µs per step between GPUs, {settings.queries} query column(s), products on "
        f"{examples:,} sentences"
    )


if __name__ == "__main__":
    sys.exit(main())
