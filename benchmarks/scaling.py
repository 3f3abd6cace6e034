"""Scoring on several processes: sentences a second, memory by the length of the corpus, and what a cluster would take.

    python benchmarks/scaling.py               # two processes of one thread against one, in turn; on two idle cores
    python benchmarks/scaling.py --memory      # peak memory on 20,000 and on 200,000 streamed sentences
    python benchmarks/scaling.py --throughput  # BERT-base on this machine's GPU, by precision
    python benchmarks/scaling.py --simulate    # 30 million sentences with BERT-base on 1 to 512 GPUs, estimated
    python benchmarks/scaling.py --check       # exit code 1 if a bar is missed (also with --memory)

Speed: `torchrun` starts so many processes, which score the same text file by `Query.score` with parts on disk; the
clock runs from the first round to the finished file, without the start of Python. The model is the BERT of
benchmarks/scoring.py with random weights, sentences are random words. Memory: the same with a tiny model; what is
compared is the largest resident set of the main process. Bars: at least 1.8 times the sentences a second; at most 1.1
times the memory. Nothing is downloaded.

Throughput: a list of sentences is scored by one process with parts on disk, by precision and batch size; the error is
against float32. A product is one with the Gauss-Newton matrix on 2,048 sentences.

The simulation takes from this machine what a sentence costs outside of the model (reading and broadcasting, on the
main process; tokenising, on each; writing, on the main process), counts the floating point operations of BERT-base,
and assumes the rest: see --tflops, --bandwidth and --latency, which are printed with the table.
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


def main(given: list[str] | None = None) -> int:
    settings = arguments(given)
    if settings.worker:
        return work(settings)
    if settings.simulate or settings.throughput:
        (simulate if settings.simulate else throughput)(settings)
        return 0
    return memory(settings) if settings.memory else speed(settings)


def arguments(given: list[str] | None) -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("--memory", action="store_true")
    reader.add_argument("--throughput", action="store_true")
    reader.add_argument("--simulate", action="store_true")
    reader.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    reader.add_argument("--sentences", type=int, default=SENTENCES, help="of the comparison of speeds, of throughput")
    reader.add_argument("--batch-size", type=int, nargs="+", default=[256, 1024], help="of throughput")
    reader.add_argument("--model", default="base", choices=[*MODELS], help="of throughput")
    reader.add_argument("--repeats", type=int, default=3)
    reader.add_argument("--tflops", type=float, default=59.0, help="sustained TFLOP/s of a GPU; an H100: 59, TF32 128")
    reader.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of the network at a GPU")
    reader.add_argument("--latency", type=float, default=30.0, help="µs of a step of a collective")
    reader.add_argument("--queries", type=int, default=1)
    reader.add_argument("--worker", help=argparse.SUPPRESS)
    return reader.parse_args(given)


# --- what is measured


def speed(settings: argparse.Namespace) -> int:
    """Launches in turn, so that a drift of the machine's speed hits all alike; beside them two processes that know
    nothing of each other, which is what the machine has to give."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        path = sentences(Path(folder), settings.sentences)
        for repeat in range(settings.repeats):
            one, two = (launch(path, processes, "small") for processes in (1, 2))
            with ThreadPoolExecutor(2) as pool:
                apart = sum(found["rate"] for found in pool.map(lambda _: launch(path, 1, "small"), range(2)))
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
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (20_000, 200_000):
            found[count] = launch(sentences(Path(folder), count, longest=12), 1, "tiny")
            report = found[count]
            print(f"{count:,} sentences: peak {report['peak']:.1f} MiB, {report['rate']:.0f} sentences/s", flush=True)
    ratio = found[200_000]["peak"] / found[20_000]["peak"]
    print(f"{ratio:.3f} times, bar {BARS['memory']}")
    return int(settings.check and ratio > BARS["memory"])


def sentences(folder: Path, count: int, longest: int = 128) -> Path:
    """A text file of random words, log-normal lengths."""
    import numpy as np

    generator, path = np.random.default_rng(SEED), folder / f"{count}.txt"
    with path.open("w") as file:
        for length in np.exp(generator.normal(np.log(24.7), 0.5, count)).clip(3, longest - 2).astype(int):
            file.write(" ".join(f"w{i}" for i in generator.integers(0, 190, length)) + "\n")
    return path


def launch(path: Path, processes: int, model: str) -> dict:
    """`torchrun` with so many processes of one thread; what the main one reports."""
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


def query_of(model: str, curvature_rows: list[dict], batch_size: int = 64):
    """A question to one stage, with the identity for its curvature: what is measured is scoring."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from hf_msif import MultiStageInfluence, Stage, objectives, solvers

    torch.manual_seed(SEED)
    made = BertForMaskedLM(BertConfig(max_position_embeddings=130, **MODELS[model]))
    objective = objectives.MaskedLM(tokenizer(), max_length=128)
    stage = Stage("pretraining", made, objective, curvature_rows, solver=solvers.Identity(), batch_size=batch_size)
    return MultiStageInfluence([stage], progress=False).query(curvature_rows[:1])


def tokenizer():
    from transformers import BertTokenizer

    words = [*SPECIAL, *(f"w{i}" for i in range(190))]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def work(settings: argparse.Namespace) -> int:
    """One process of a launch: scores the file, and says how fast and in how much memory."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(settings.worker)
    rows = [{"example_id": i, "text": "w1 w2 w3 w4 w5"} for i in range(4)]
    asked = query_of(settings.model, rows)
    engine = asked.chain.engine
    with tempfile.TemporaryDirectory() as folder:  # the first file pays for imports
        asked.score(sentences(Path(folder), 8), output_dir=engine.broadcast(folder))
        engine.gather([0])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # The main process writes, and all look into the same folder afterwards.
        scores = asked.score(path, output_dir=engine.broadcast(folder))
        engine.gather([0])
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if engine.is_main:
        report = {"rate": len(scores) / seconds, "peak": peak, "processes": engine.processes, "rows": len(scores)}
        print(json.dumps(report))
    return 0


def throughput(settings: argparse.Namespace) -> None:
    """A table of sentences a second, by precision and batch size."""
    import numpy as np
    import torch
    from tabulate import tabulate

    from hf_msif import vectors
    from hf_msif.engine.corpus import from_files

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(from_files([sentences(Path(folder), settings.sentences)]))
    asked = query_of(settings.model, rows[:2048], settings.batch_size[0])
    (link,) = asked.chain.stages
    cuda = link.engine.device.type == "cuda"
    finish = torch.cuda.synchronize if cuda else lambda: None
    started = time.perf_counter()
    for start in range(0, len(rows), 64):
        link.stage.objective.collate(rows[start : start + 64])
    collate = (time.perf_counter() - started) / len(rows)

    def scored(some: list[dict], **how):
        with tempfile.TemporaryDirectory() as folder:
            return asked.score(some, output_dir=folder, **how).influence()

    table, exact = [], None
    for size in settings.batch_size:
        for dtype in ("float32", "tf32", "bfloat16"):
            scored(rows[: 2 * size], dtype=dtype, batch_size=size)  # what the first pass pays for
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            found = scored(rows, dtype=dtype, batch_size=size)
            seconds = time.perf_counter() - started
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else ""
            exact = found if exact is None else exact
            error = np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean())
            table.append([size, dtype, f"{len(rows) / seconds:,.0f}", f"{error:.1e}", peak])
            print(" ".join(map(str, table[-1])), flush=True)
    print(tabulate(table, ["batch", "precision", "sentences/s", "error", "peak memory"], tablefmt="github"))
    times, v = [], vectors.rademacher(link.model.parameters, 1, seed=SEED)
    operator = link.differentiation.curvature(rows[:2048])
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
        f"float32, {times[1]:.2f} s with TF32 products; tokenising {collate * 1e6:.0f} µs a sentence, in a thread "
        "ahead on a GPU\n"
        f"{where}, torch {torch.__version__}: {settings.model} model, {len(rows):,} sentences"
    )


# --- what is estimated


def simulate(settings: argparse.Namespace) -> None:
    """A table of hours, by the costs of a sentence outside of the model, measured here, and of its operations."""
    import pickle

    import numpy as np
    import torch
    from tabulate import tabulate
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig, BertForMaskedLM

    from hf_msif import objectives
    from hf_msif.adapters.functional import FunctionalModel
    from hf_msif.curvature.derivatives import Evaluation
    from hf_msif.engine.corpus import from_files
    from hf_msif.scoring.parts import PartsOnDisk
    from hf_msif.scoring.scores import frame_of

    torch.set_num_threads(1)
    count = 16384
    with tempfile.TemporaryDirectory() as folder:
        path = sentences(Path(folder), count)
        next(iter(from_files([path])))  # the first one pays for imports
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
            own = slice(start, start + 4096)
            columns = {"loss": influence[own, 0], "terms": influence[own, 0]}
            sink.add(start // 4096, rows[own], frame_of(rows[own], influence[own], 1.0, columns), 0)
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
    # benchmarks/scoring.py: one query costs 3.1 forward passes, a Gauss-Newton product 5.2
    one = 3.1 * settings.queries * operations / (settings.tflops * 1e12)
    product = 5.2 * settings.queries * operations / (settings.tflops * 1e12)
    examples, iterations = 2048, 200
    table = []
    for gpus in (1, 8, 64, 512):
        # Threads read, collate and write meanwhile, but those of the main process take turns.
        main = read + write + (broadcast if gpus > 1 else 0.0) + tokenise / gpus
        each = max(one / gpus, main)
        # a ring: 2 (n − 1)/n of the float64 sum over the slowest link, 2 (n − 1) steps
        ring = 2 * (gpus - 1) / gpus * 8 * parameters * settings.queries / (settings.bandwidth * 1e9)
        ring += 2 * (gpus - 1) * settings.latency * 1e-6
        solve = iterations * (examples * product / gpus + (ring if gpus > 1 else 0.0))
        hours, best = each * CORPUS / 3600, max(one, read + write + tokenise) * CORPUS / 3600
        table.append([gpus, f"{hours:.2f} h", f"{1 / each:,.0f}", f"{best / hours / gpus:.0%}", f"{solve:.0f} s"])
    heads = ["GPUs", f"{CORPUS:,} sentences", "sentences/s", "efficiency", f"{iterations} products"]
    print(tabulate(table, heads, tablefmt="github"))
    tokens = sum(batch["attention_mask"].sum().item() for batch in batches) / 4096
    print(
        f"\nmeasured here, one thread, µs a sentence: reading {read * 1e6:.0f}, broadcasting {broadcast * 1e6:.0f} "
        f"(main process), tokenising {tokenise * 1e6:.0f} (each process), writing {write * 1e6:.0f} (main process)\n"
        f"counted: {operations / 1e9:.1f} GFLOP a forward pass of a sentence (BERT-base, {parameters / 1e6:.0f} "
        f"million parameters, {tokens:.0f} tokens), padding included\n"
        f"assumed: {settings.tflops:g} TFLOP/s sustained a GPU, {settings.bandwidth:g} GB/s and {settings.latency:g} "
        f"µs a step between GPUs, {settings.queries} query column(s), products on {examples:,} sentences"
    )


if __name__ == "__main__":
    sys.exit(main())
