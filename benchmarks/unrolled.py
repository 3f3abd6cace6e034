"""The cost of a pull-back through a training run in units of the run, and its memory compared with the plan.

    python benchmarks/unrolled.py --threads 1            # about ten minutes on one laptop core
    python benchmarks/unrolled.py --check                # exit code 1 if a bar is missed
    python benchmarks/unrolled.py --device cuda --steps 400 --batch-size 64

The run is `training.record`: AdamW with warm-up, cosine decay, clipping and dropout on the whole BERT of
recipes/bert_gop_debate (random weights and words) with a classifier, float32. Each repeat trains the same run by
`training.record` without writing it and by Hugging Face's `Trainer`, and pulls one query and three queries back
through it. Ratios are taken within a repeat; the table shows their median, smallest and largest value.

Bar: with one query the pull-back takes at most 6 times as long as the run.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import logging
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scoring import LONGEST, SPECIAL, VOCABULARY, models, sentences
from tabulate import tabulate
from transformers import BertTokenizer, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_msif import MultiStageInfluence, Stage, objectives, training, vectors
from hf_msif.influence import backward

BAR = 6.0
UNIT = "the run, training.record"


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(settings, Path(folder))
    report["settings"] = vars(settings) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(report) if settings.json else text(report))
    return 0 if report["met"] or not settings.check else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--threads", type=int, help="threads of the CPU; defaults to PyTorch's choice")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the bar is missed")
    return parser.parse_args(argv)


def measure(settings: argparse.Namespace, folder: Path) -> dict:
    """The report: ratios and seconds of every task, whether the bar is met, and memory in bytes."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=LONGEST)
    rows = sentences(words[len(SPECIAL) :], settings.sentences, settings.seed)
    objective, (pretrained, classifier) = objectives.SequenceClassification(tokenizer), models(settings)
    training_arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=1e-4,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
        remove_unused_columns=False,
        seed=settings.seed,
    )
    finetuned = copy.deepcopy(classifier)
    training.record(
        finetuned, objective, rows, training_arguments, folder / "run", previous=pretrained, progress=False
    )
    stages = [
        Stage("pretraining", pretrained, objectives.MaskedLM(tokenizer), rows[:8]),
        Stage("finetuning", finetuned, objective, rows, link="unrolled", run=folder / "run"),
    ]
    bound = MultiStageInfluence(stages, progress=False).stages[1]
    adjoints = vectors.rademacher({n: bound.model.parameters[n] for n in bound.split.trained}, 3, settings.seed)
    adjoint, bound.engine.progress = vectors.take(adjoints, torch.tensor([0])), False

    def trainer() -> None:
        def collate(batch_rows: list[dict]) -> dict:
            batch = objective.collate(batch_rows)
            batch.pop("truncated")
            return batch

        Trainer(_WithLoss(copy.deepcopy(classifier)), training_arguments, collate, rows).train()

    state = bound.differentiation.recording.bytes_of(bound.model.parameters)
    held = bound.differentiation.recording.interval + 2
    memory = {
        "state": state,
        "states_held": held,
        "planned": backward.held_bytes(bound.differentiation.recording, bound.model.parameters, 1),
    }
    # One step also holds its state, its adjoint and gradients, of 3/3, 3/3 and 4/3 of the size of a state.
    memory["graphs"] = _peak(lambda: _one_step(bound, adjoint), settings.device) - 4 * state
    memory["measured"] = _peak(lambda: bound.differentiation.pull_back(adjoint), settings.device)
    tasks: dict[str, Callable[[], object]] = {
        UNIT: lambda: training.record(
            copy.deepcopy(classifier), objective, rows, training_arguments, None, previous=pretrained, progress=False
        ),
        "the run, Hugging Face's Trainer": trainer,
        "pull-back, 1 query": lambda: bound.differentiation.pull_back(adjoint),
        "pull-back, 3 queries": lambda: bound.differentiation.pull_back(adjoints),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(settings.repeats):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if settings.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    reports = {name: _ratios(task_seconds, seconds[UNIT]) for name, task_seconds in seconds.items()}
    met = reports["pull-back, 1 query"]["ratio"] <= BAR
    return {"tasks": reports, "met": met, "memory": memory, "parameters": vectors.numel(adjoint)}


class _WithLoss(torch.nn.Module):
    """A classifier that returns its loss, as `Trainer` requires."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, labels: torch.Tensor | None = None, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.cross_entropy(self.model(**inputs).logits, labels)}


def _one_step(bound: Any, adjoint: vectors.Block) -> None:
    """The pull-back through the first step of the run."""
    slots = bound.differentiation.recording.state(0, bound.engine.device)
    bound.differentiation.replay.backward(slots, 0, bound.differentiation.replay.adjoint(adjoint))


def _ratios(seconds: list[float], unit: list[float]) -> dict:
    """Median, smallest and largest ratio of two lists of times, one per repeat."""
    ratios = [x / y for x, y in zip(seconds, unit, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
        "seconds": statistics.median(seconds),
    }


def _peak(task: Callable[[], object], device: str) -> int:
    """Peak memory of a task in bytes, beyond what was held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else free memory that the allocator still holds would count as held before
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    task()
    done.set()
    thread.join()
    return peak[0] - before


def _resident() -> int:
    """Bytes of this process's resident set."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def text(report: dict) -> str:
    """The report as a table and two lines about the run and its memory."""
    lines = [
        [
            name,
            f"{task['ratio']:.2f}",
            f"{task['smallest']:.2f}–{task['largest']:.2f}",
            f"{task['seconds']:.1f}",
            f"≤ {BAR:g}" if name == "pull-back, 1 query" else "",
        ]
        for name, task in report["tasks"].items()
    ]
    settings, memory = report["settings"], {k: v / 2**20 for k, v in report["memory"].items()}
    return "\n".join(
        [
            tabulate(lines, ["", "ratio", "min–max", "seconds", "bar"], disable_numparse=True),
            f"{report['parameters']:,} parameters, {settings['steps']} steps of {settings['batch_size']} rows, "
            f"{settings['repeats']} repeats; {settings['dtype']} on {settings['device']}, {settings['threads']} "
            "thread(s)",
            f"memory, 1 query: {report['memory']['states_held']} states of {memory['state']:.0f} MiB held; planned, "
            f"with adjoints, {memory['planned']:.0f} MiB; measured {memory['measured']:.0f} MiB, a "
            f"step's graphs alone about {memory['graphs']:.0f} MiB",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
