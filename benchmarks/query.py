"""The cost of a query with one column per test row, in units of the plain gradients of the tests.

    python benchmarks/query.py --threads 1
    python benchmarks/query.py --threads 1 --tests 64 --rows 256

The unit is one pass over the tests, one loss and one backward pass of the user's classifier for each, nothing kept.
"gradients as a block" keeps them as the block of Q columns that a query needs, which is memory that is written for the
first time. A query with the solver `Identity` solves nothing: what it takes beside the gradients of the tests is
the mixed derivative on the rows of a stage whose encoder is frozen ("mixed derivative": its products alone), or a
second block (2α u) where all is trained. All are measured in turn, in CPU time with one thread; the table shows
medians. The models are those of benchmarks/scoring.py. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from scoring import LONGEST, SPECIAL, models, sentences
from tabulate import tabulate
from transformers import BertTokenizer

from hf_msif import MultiStageInfluence, Stage, objectives, solvers
from hf_msif.curvature.derivatives import hessian_product
from hf_msif.vectors import select


def main() -> None:
    settings = arguments()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    for trainable in ("head", "all"):
        tasks = tasks_of(settings, trainable)
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for repeat in range(-1, settings.repeats):  # the first round measures what later queries find ready
            for name, run in tasks.items():
                started = clock()
                run()
                if repeat >= 0:
                    seconds[name].append(clock() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        unit = next(iter(medians.values()))
        table = [[name, f"{value / unit:.2f}", f"{value:.2f}"] for name, value in medians.items()]
        print(tabulate(table, headers=[f"trainable={trainable!r}", "ratio", "s"], tablefmt="simple"), end="\n\n")
    sizes = f"{settings.tests} tests, {settings.rows} rows per stage, {settings.repeats} repeats"
    print(f"{sizes}, torch {torch.__version__}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of the CPU; defaults to PyTorch's choice")
    parser.add_argument("--tests", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="rows of each stage")
    parser.add_argument("--vocabulary", type=int, default=8000, help="words of the model")
    parser.add_argument("--mean-length", type=int, default=32, help="tokens per sentence")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    settings.seed, settings.dtype, settings.device = 0, "float32", "cpu"
    return settings


def tasks_of(settings: argparse.Namespace, trainable: str) -> dict[str, Callable[[], object]]:
    """Name → what to measure; the first is the unit."""
    warnings.simplefilter("ignore")  # the models are not trained
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), settings.vocabulary))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=LONGEST)
    corpus, tweets, tests = (
        sentences(words[len(SPECIAL) :], number, seed, settings.mean_length)
        for seed, number in enumerate((settings.rows, settings.rows, settings.tests))
    )
    encoder, classifier = models(settings, settings.vocabulary)
    if trainable == "all":
        with torch.no_grad():
            for p in classifier.parameters():
                p += 1e-3 * torch.randn_like(p)
    labelled = objectives.SequenceClassification(tokenizer)
    alpha = 0.1 if trainable == "all" else None
    stages = [
        Stage("pretraining", encoder, objectives.MaskedLM(tokenizer), corpus, solver=solvers.Identity()),
        Stage("finetuning", classifier, labelled, tweets, trainable=trainable, alpha=alpha, solver=solvers.Identity()),
    ]
    msif, parameters = MultiStageInfluence(stages, progress=False), list(classifier.parameters())

    def gradients(keep: bool) -> list[torch.Tensor]:
        rows = []
        for test in tests:
            batch = labelled.collate([test])
            loss = labelled.losses(lambda **inputs: classifier(**inputs), batch)[0].sum()
            gradient = torch.autograd.grad(loss, parameters)
            if keep:
                rows.append(gradient)
        return [torch.stack(columns) for columns in zip(*rows, strict=True)]

    tasks: dict[str, Callable[[], object]] = {
        "plain gradients": lambda: gradients(keep=False),
        "gradients as a block": lambda: gradients(keep=True),
        "msif.measurement": lambda: msif.measurement(tests),
        "msif.query": lambda: msif.query(tests),
    }
    if trainable == "head":
        last = msif.stages[-1]
        u = select(msif.measurement(tests)[0], last.split.trained)

        def mixed() -> None:
            with last.model.evaluating():
                for evaluation in last.differentiation.operator.evaluations:
                    hessian_product(evaluation, u, last.split.frozen)

        tasks["mixed derivative"] = mixed
    return tasks


if __name__ == "__main__":
    main()
