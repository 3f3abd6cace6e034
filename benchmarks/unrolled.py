"""What a pull-back through a training run costs, in units of the run itself, and its memory beside the plan's.

    python benchmarks/unrolled.py --threads 1            # some ten minutes on one laptop core
    python benchmarks/unrolled.py --check                # exit code 1 if a bar is missed
    python benchmarks/unrolled.py --device cuda --steps 400 --batch-size 64

The run is `training.record`: AdamW with warm-up, cosine decay, clipping and dropout on the whole BERT of
recipes/bert_gop_debate (random weights and words) with a classifier, float32. In each repeat the same run is trained
with nothing written, by Hugging Face's `Trainer`, and pulled back with one and with three queries; ratios are taken
within a repeat, and the table shows their median, smallest and largest.

Bar: with one query the pull-back takes at most 6 times the run.
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

import torch
from scoring import LONGEST, SPECIAL, VOCABULARY, models, sentences
from tabulate import tabulate
from transformers import BertTokenizer, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_msif import MultiStageInfluence, Stage, objectives, training, vectors
from hf_msif.influence import unrolled

BAR = 6.0
UNIT = "the run, training.record"


def main(given: list[str] | None = None) -> int:
    settings = arguments(given)
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


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the bar is missed")
    return parser.parse_args(given)


def measure(settings: argparse.Namespace, folder: Path) -> dict:
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=LONGEST)
    rows = sentences(words[len(SPECIAL) :], settings.sentences, settings.seed)
    objective, first = objectives.SequenceClassification(tokenizer), models(settings)
    given = TrainingArguments(
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
    finished = copy.deepcopy(first[1])
    training.record(finished, objective, rows, given, folder / "run", previous=first[0], progress=False)
    stages = [
        Stage("pretraining", first[0], objectives.MaskedLM(tokenizer), rows[:8]),
        Stage("finetuning", finished, objective, rows, link="unrolled", run=folder / "run"),
    ]
    link = MultiStageInfluence(stages, progress=False).stages[1]
    a = vectors.rademacher({n: link.model.parameters[n] for n in link.split.trained}, 3, settings.seed)
    one, link.engine.progress = vectors.take(a, torch.tensor([0])), False

    def trainer() -> None:
        def collate(some: list[dict]) -> dict:
            batch = objective.collate(some)
            batch.pop("truncated")
            return batch

        Trainer(_Labelled(copy.deepcopy(first[1])), given, collate, rows).train()

    state = link.differentiation.recording.bytes_of(link.model.parameters)
    held = link.differentiation.recording.interval + 2
    memory = {
        "state": state,
        "states_held": held,
        "planned": unrolled.held_bytes(link.differentiation.recording, link.model.parameters, 1),
    }
    # Of one step: its state, adjoint and gradients are three thirds, three thirds and four thirds of a state.
    memory["graphs"] = _peak(lambda: _one_step(link, one), settings.device) - 4 * state
    memory["measured"] = _peak(lambda: link.differentiation.pull_back(one), settings.device)
    tasks: dict[str, Callable[[], object]] = {
        UNIT: lambda: training.record(
            copy.deepcopy(first[1]), objective, rows, given, None, previous=first[0], progress=False
        ),
        "the run, Hugging Face's Trainer": trainer,
        "pull-back, 1 query": lambda: link.differentiation.pull_back(one),
        "pull-back, 3 queries": lambda: link.differentiation.pull_back(a),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(settings.repeats):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if settings.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    found = {name: _ratios(mine, seconds[UNIT]) for name, mine in seconds.items()}
    met = found["pull-back, 1 query"]["ratio"] <= BAR
    return {"tasks": found, "met": met, "memory": memory, "parameters": vectors.numel(one)}


class _Labelled(torch.nn.Module):
    """A classifier with the loss that `Trainer` asks a model for."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, labels=None, **inputs):
        return {"loss": torch.nn.functional.cross_entropy(self.model(**inputs).logits, labels)}


def _one_step(link, a) -> None:
    slots = link.differentiation.recording.state(0, link.engine.device)
    link.differentiation.replay.backward(slots, 0, link.differentiation.replay.adjoint(a))


def _ratios(mine: list[float], unit: list[float]) -> dict:
    ratios = [x / y for x, y in zip(mine, unit, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
        "seconds": statistics.median(mine),
    }


def _peak(task: Callable[[], object], device: str) -> int:
    """Bytes that a task holds at its peak beyond what was held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would count as held before
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
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def text(report: dict) -> str:
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
