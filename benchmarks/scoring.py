"""The cost of derivatives in units of the plain forward pass (F), measured side by side in one run.

    python benchmarks/scoring.py --threads 1                      # the table; about five minutes on one laptop core
    python benchmarks/scoring.py --check                          # exit code 1 if a bar is missed
    python benchmarks/scoring.py --device cuda --sentences 4096 --json

F is one pass of the user's model as it was loaded (with its own attention kernels), under `no_grad`, with the
objective's losses. In both cases the head runs on the masked positions only. All tasks are measured in turn on every
batch, so that a drift of the machine's speed affects all of them alike. A ratio is the time of a whole pass divided by
the time of F over the same batches; the table shows its median over the repeats, its smallest and its largest value.
Time is CPU time with one thread, which other work on the machine disturbs less, and wall time otherwise.
The model is the BERT of recipes/bert_gop_debate with random weights, or with another vocabulary. Sentences are random
words with log-normal lengths, by default 28 tokens on average, batched by length as in the library. Nothing is
downloaded.

Bars: scoring one query costs at most 3.4 F, a product with the Hessian at most 7.5 F, a product of eight columns with
the Gauss-Newton matrix at most 32 F.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from tabulate import tabulate
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from hf_msif import objectives
from hf_msif.adapters import split
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.adapters.positions import forward
from hf_msif.curvature.derivatives import Evaluation, directional_derivatives, gradient, hessian_product
from hf_msif.curvature.gauss_newton import gauss_newton_product
from hf_msif.models import FeedForwardClassifier
from hf_msif.vectors import Block, column

BARS = {"scoring, 1 query": 3.4, "Hessian product": 7.5, "Gauss-Newton product, 8 queries at once": 32.0}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY, LONGEST, MEAN_LENGTH, SPREAD = 30522, 128, 28, 0.5


@dataclass
class Task:
    """A computation to measure, batch by batch.

    Attributes:
        name: for the table.
        unit: name of the task whose time is the unit of the ratio.
        batches: the batches to run on.
        run: computes one batch.
    """

    name: str
    unit: str
    batches: list[dict]
    run: Callable[[dict], object]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    tasks, reports = tasks_of(settings), {}
    seconds = measure(tasks, settings)
    for task in tasks:
        unit = seconds[task.unit]
        ratios = [numerator / denominator for numerator, denominator in zip(seconds[task.name], unit, strict=True)]
        reports[task.name] = report = {
            "unit": task.unit,
            "ratio": statistics.median(ratios),
            "smallest": min(ratios),
            "largest": max(ratios),
            "seconds_per_sentence": statistics.median(seconds[task.name]) / settings.sentences,
        }
        if task.name in BARS:
            report |= {"bar": BARS[task.name], "met": report["ratio"] <= BARS[task.name]}
    met = all(report.get("met", True) for report in reports.values())
    facts = vars(settings) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    facts["device_name"] = torch.cuda.get_device_name() if settings.device.startswith("cuda") else "CPU"
    tokens = [int(batch["attention_mask"].sum()) for batch in tasks[0].batches]
    facts |= {"batches": len(tokens), "tokens_per_sentence": sum(tokens) / settings.sentences}
    if settings.json:
        print(json.dumps({"tasks": reports, "met": met, "settings": facts}))
    else:
        print(table(reports))
        print(
            f"{settings.sentences} sentences of {facts['tokens_per_sentence']:.1f} tokens in batches of "
            f"{settings.batch_size}, {settings.repeats} repeats; {settings.dtype} on {facts['device_name']}, "
            f"{facts['threads']} thread(s), torch {torch.__version__}"
        )
    return 0 if met or not settings.check else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--threads", type=int, help="threads of the CPU; defaults to PyTorch's choice")
    parser.add_argument("--batch-size", type=int, default=64, help="defaults to that of Stage")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="words of the model")
    parser.add_argument("--mean-length", type=int, default=MEAN_LENGTH, help="tokens per sentence")
    parser.add_argument(
        "--spread", type=float, default=SPREAD, help="of the logarithm of the lengths; 0: equal lengths"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    return parser.parse_args(argv)


def tasks_of(settings: argparse.Namespace) -> list[Task]:
    """All tasks; a task that is a unit stands before the tasks measured in it."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), settings.vocabulary))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=LONGEST)
    lengths = settings.mean_length, settings.spread
    rows = sentences(words[len(SPECIAL) :], settings.sentences, settings.seed, *lengths)
    masked, labelled = objectives.MaskedLM(tokenizer), objectives.SequenceClassification(tokenizer)
    masked_batches, labelled_batches = (batches(rows, objective, settings) for objective in (masked, labelled))

    encoder, classifier = models(settings, settings.vocabulary)
    pretraining, finetuning = FunctionalModel(encoder, settings.device), FunctionalModel(classifier, settings.device)
    all_names = split("pretraining", encoder).trained
    roles = split("finetuning", classifier, encoder, "head")
    v, head = (
        direction(pretraining, all_names, 8, settings.seed),
        direction(finetuning, roles.trained, 1, settings.seed),
    )
    first, three = ({name: t[:number] for name, t in v.items()} for number in (1, 3))

    def derivative(
        model: FunctionalModel, objective: Any, function: Callable[[Evaluation], object]
    ) -> Callable[[dict], object]:
        def run(batch: dict) -> object:
            with model.evaluating():
                return function(Evaluation(model, objective, batch))

        return run

    unit = "forward pass (F)"
    tasks = [Task(unit, unit, masked_batches, lambda batch: plain(encoder, masked, batch))]
    for name, function in (
        ("scoring, 1 query", lambda e: directional_derivatives(e, column(v, 0))),
        ("scoring, 3 queries", lambda e: [directional_derivatives(e, column(v, q)) for q in range(3)]),
        ("gradient", lambda e: gradient(e, all_names)),
        ("Gauss-Newton product", lambda e: gauss_newton_product(e, first)),
        ("Gauss-Newton product, 8 queries at once", lambda e: gauss_newton_product(e, v)),
        ("Hessian product", lambda e: hessian_product(e, first, all_names)),
        ("Hessian product, 3 queries at once", lambda e: hessian_product(e, three, all_names)),
        ("Hessian product, forward over reverse", lambda e: forward_over_reverse(e, first)),
    ):
        tasks.append(Task(name, unit, masked_batches, derivative(pretraining, masked, function)))
    unit = "forward pass of a classifier"
    tasks.append(Task(unit, unit, labelled_batches, lambda batch: plain(classifier, labelled, batch)))
    mixed = derivative(finetuning, labelled, lambda e: hessian_product(e, head, roles.frozen))
    return [*tasks, Task("its mixed product, head to encoder", unit, labelled_batches, mixed)]


def forward_over_reverse(evaluation: Evaluation, v: Block) -> Block:
    """The Hessian product as the tangent of the gradient: an exact alternative, measured for comparison."""
    leaves = evaluation.leaves(v)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(leaf, v[name][0]) for name, leaf in leaves.items()}
        sums, _ = evaluation.losses(duals)
        gradients = torch.autograd.grad(sums.sum(), list(duals.values()))
        return {n: forward_ad.unpack_dual(g).tangent for n, g in zip(duals, gradients, strict=True)}


def sentences(
    words: list[str], number: int, seed: int, mean_length: int = MEAN_LENGTH, spread: float = SPREAD
) -> list[dict]:
    """`number` rows of random words whose frequency is proportional to 1/rank."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(np.log(mean_length - 2) - spread**2 / 2, spread, number)
    lengths = lengths.round().clip(1, LONGEST - 2).astype(int)
    weights = 1 / np.arange(1, len(words) + 1)
    drawn = generator.choice(words, size=lengths.sum(), p=weights / weights.sum())
    pieces = np.split(drawn, np.cumsum(lengths)[:-1])
    return [{"example_id": i, "text": " ".join(piece), "label": i % 2} for i, piece in enumerate(pieces)]


def batches(rows: list[dict], objective: Any, settings: argparse.Namespace) -> list[dict]:
    """Batches on the device, much like those of `Engine.batches`: rows of similar length together, longest first."""
    rows, size = sorted(rows, key=lambda row: len(row["text"]), reverse=True), settings.batch_size
    cpu_batches = [objective.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{key: value.to(settings.device) for key, value in batch.items()} for batch in cpu_batches]


def models(
    settings: argparse.Namespace, vocabulary: int = VOCABULARY
) -> tuple[BertForMaskedLM, FeedForwardClassifier]:
    """A masked language model with random weights, and a classifier on a copy of its encoder."""
    torch.manual_seed(settings.seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=LONGEST,
    )
    pretrained = BertForMaskedLM(config)
    classifier = FeedForwardClassifier.from_encoder(pretrained, 64, num_labels=2)
    dtype = getattr(torch, settings.dtype)
    return pretrained.eval().to(settings.device, dtype), classifier.eval().to(settings.device, dtype)


def direction(model: FunctionalModel, names: tuple[str, ...], columns: int, seed: int) -> Block:
    """Random columns in the space of the parameters `names`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (columns, *model.parameters[name].shape) for name in names}
    return {n: torch.randn(shape, generator=generator).to(model.parameters[n]) for n, shape in shapes.items()}


def plain(model: torch.nn.Module, objective: Any, batch: dict) -> object:
    """The forward pass that a user would run: the module itself, with all kernels allowed."""

    def call(positions=None, **inputs):
        return forward(model, lambda kwargs: model(**kwargs), positions, inputs)

    with torch.no_grad():
        return objective.losses(call, batch)


def measure(tasks: list[Task], settings: argparse.Namespace) -> dict[str, list[float]]:
    """Task → seconds of a whole pass, one number per repeat."""
    cuda = settings.device.startswith("cuda")
    clock = time.process_time if settings.threads == 1 and not cuda else time.perf_counter
    seconds = {task.name: [0.0] * settings.repeats for task in tasks}
    for repeat in range(-1, settings.repeats):  # the first round is a warm-up and is not counted
        for i in range(len(tasks[0].batches) if repeat >= 0 else 1):
            for task in tasks:
                if cuda:
                    torch.cuda.synchronize()
                started = clock()
                task.run(task.batches[i])
                if cuda:
                    torch.cuda.synchronize()
                if repeat >= 0:
                    seconds[task.name][repeat] += clock() - started
    return seconds


def table(tasks: dict[str, dict]) -> str:
    rows = [
        {
            "": name,
            "ratio": f"{report['ratio']:.2f}",
            "min–max": f"{report['smallest']:.2f}–{report['largest']:.2f}",
            "ms per sentence": f"{1e3 * report['seconds_per_sentence']:.2f}",
            "bar": f"≤ {report['bar']}" if "bar" in report else "",
            "met": {True: "yes", False: "NO"}.get(report.get("met"), ""),
        }
        for name, report in tasks.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
