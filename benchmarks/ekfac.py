"""What a fit of EK-FAC costs in units of the plain forward pass (F) of the rows that it sees, in one run.

    python benchmarks/ekfac.py --threads 1                        # the table; about two minutes on one laptop core
    python benchmarks/ekfac.py --threads 1 --vocabulary 8000 --check

F is one pass of the model as it was loaded, under `no_grad`, with the head on the masked positions, over all rows. The
model is a BERT of 4 layers × 256 with random weights, the sentences have 32 tokens. Times are CPU seconds of the
process. F and the fit are measured in turn; the table shows the median of the repeats, the smallest and the largest
ratio. The eigendecompositions do not depend on the number of rows, nor does the look at which layers there are: both
have lines of their own. Nothing is downloaded.

Bar: the passes of a fit cost at most 8 F.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from scoring import SPECIAL, plain
from tabulate import tabulate
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from hf_msif import objectives, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature import EKFAC
from hf_msif.curvature.blocks import KroneckerBlock
from hf_msif.engine import Engine

BAR = 8.0
TOKENS = 32


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), settings.vocabulary))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=TOKENS)
    rows, objective = sentences(words[len(SPECIAL) :], settings.sentences), objectives.MaskedLM(tokenizer)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=TOKENS, **sizes)).eval()
    functional, engine, size = FunctionalModel(model), Engine(progress=False), settings.batch_size
    batches = [objective.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    names = ("a fit's passes", "its eigendecompositions", "a look at the layers", "an inverse of one column")
    ratios: dict[str, list[float]] = {name: [] for name in names}

    def forward() -> None:
        for batch in batches:
            plain(model, objective, batch)

    forward()  # a warm-up
    for _ in range(settings.repeats):
        operator = EKFAC(functional, objective, rows, tuple(functional.parameters), engine, size)
        unit = seconds(forward)
        look = seconds(getattr, operator, "layers")
        _ = operator.count
        decomposed = Seconds(KroneckerBlock.decompose)
        KroneckerBlock.decompose = decomposed  # type: ignore[method-assign]
        fit = seconds(getattr, operator, "blocks")
        KroneckerBlock.decompose = decomposed.work  # type: ignore[method-assign]
        v = vectors.rademacher(operator.parameters, 1, seed=0)
        solved = seconds(operator.inverse, v, operator.largest_eigenvalue())
        unit = (unit + seconds(forward)) / 2
        for name, spent in zip(names, (fit - decomposed.total, decomposed.total, look, solved), strict=True):
            ratios[name].append(spent / unit)
    met = statistics.median(ratios[names[0]]) <= BAR
    print(table(ratios))
    print(
        f"{len(rows)} sentences of {TOKENS} tokens in batches of {size}, a vocabulary of {len(words):,}, "
        f"{settings.repeats} repeats; float32, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    return 0 if met or not settings.check else 1


class Seconds:
    """A method that adds up the CPU seconds of its calls."""

    def __init__(self, work: Callable):
        self.work, self.total = work, 0.0

    def __get__(self, owner: KroneckerBlock, _kind: type) -> Callable:
        def timed(*arguments):
            self.total += seconds(self.work, owner, *arguments)

        return timed


def seconds(work: Callable, *arguments: object) -> float:
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def sentences(words: list[str], number: int) -> list[dict]:
    """Rows of random words whose frequency is proportional to 1/rank."""
    generator, weights = np.random.default_rng(0), 1 / np.arange(1, len(words) + 1)
    drawn = generator.choice(words, size=(number, TOKENS - 2), p=weights / weights.sum())
    return [{"example_id": i, "text": " ".join(line)} for i, line in enumerate(drawn)]


def table(ratios: dict[str, list[float]]) -> str:
    rows = [
        {
            "": name,
            "F": f"{statistics.median(values):.2f}",
            "min–max": f"{min(values):.2f}–{max(values):.2f}",
            "bar": f"≤ {BAR:.0f}" if i == 0 else "",
            "met": ("yes" if statistics.median(values) <= BAR else "NO") if i == 0 else "",
        }
        for i, (name, values) in enumerate(ratios.items())
    ]
    return tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of the CPU; defaults to PyTorch's choice")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--sentences", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64, help="defaults to that of Stage")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit code 1 if the bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
