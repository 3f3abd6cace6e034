"""Scoring of one batch of sentences on Q queries, in units of the plain forward pass (F), measured in one run.

    python benchmarks/many_queries.py --threads 1                     # the table; about five minutes on one core
    python benchmarks/many_queries.py --threads 1 --check             # exit code 1 if a bar is missed
    python benchmarks/many_queries.py --threads 1 --norms             # relative influence: norms, self-influences

F is one pass of the model itself under `no_grad` with the losses of 256 sentences of 32 tokens, the head on masked
positions: BERT of 4 layers, 256 wide, 8,000 words, random weights, 5.4 million parameters, all of which count. F and
the scorings are measured in turn, in CPU seconds; a ratio is that of one turn, and the table shows the median over the
turns. "Chosen" is what `method="auto"` takes. With `--norms`, the layer-wise scoring is also measured with the norms
of all gradients, and with their self-influences in a fit of EK-FAC, which was made before. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from tabulate import tabulate
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hf_msif import objectives
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.adapters.positions import forward
from hf_msif.curvature import EKFAC
from hf_msif.curvature.norms import Metric
from hf_msif.engine import Engine
from hf_msif.influence import Direction
from hf_msif.influence.differentiation import DirectCertificate

BARS = {1: 3.2, 2: 5.0, 4: 5.5, 8: 5.8, 32: 6.5}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    seconds = measure(settings)
    plain = seconds.pop("F")
    ratios = {
        name: statistics.median(x / f for x, f in zip(taken, plain, strict=True)) for name, taken in seconds.items()
    }
    table, missed = [], []
    for columns in settings.columns:
        forward, layerwise = (ratios.get(f"{method} {columns}") for method in ("forward", "layerwise"))
        chosen, bar = forward if columns == 1 else layerwise, BARS.get(columns)
        assert chosen is not None
        if bar is not None and chosen > bar:
            missed.append(columns)
        sized = [ratios[f"{norms} {columns}"] for norms in ("gradient", "self") if settings.norms]
        table.append([columns, forward, layerwise, chosen, bar, *sized])
    headers = ["queries", "forward mode", "layer by layer", "chosen", "bar"]
    headers += ["with norms", "and self-influences"] if settings.norms else []
    print(json.dumps(ratios) if settings.json else tabulate(table, headers, tablefmt="github", floatfmt=".2f"))
    return 1 if settings.check and missed else 0


def measure(settings: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of each task, turn by turn."""
    objective, rows = problem(settings)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        intermediate_size=4 * settings.width,
    )
    model = FunctionalModel(BertForMaskedLM(config).eval())
    size = settings.batch_size
    batches = [(objective.collate(rows[i : i + size]), rows[i : i + size]) for i in range(0, len(rows), size)]
    generator = torch.Generator().manual_seed(0)
    u = {
        name: torch.randn(max(settings.columns), *p.shape, generator=generator) for name, p in model.parameters.items()
    }

    def call(positions=None, **inputs):
        return forward(model.model, lambda kwargs: model.model(**kwargs), positions, inputs)

    def plain() -> None:
        with torch.no_grad():
            for batch, _ in batches:
                objective.losses(call, batch)

    def scoring(direction: Direction) -> Callable[[], None]:
        def score() -> None:
            with model.evaluating():
                for batch, batch_rows in batches:
                    direction.influence(batch, batch_rows)

        return score

    tasks, metric = {"F": plain}, None
    if settings.norms:
        fit = EKFAC(model, objective, rows, tuple(u), Engine(progress=False), size)
        metric = Metric(fit, lambda eigenvalues: 1 / (eigenvalues + 0.01))
    for columns in settings.columns:
        first = {name: t[:columns].clone() for name, t in u.items()}
        direction = Direction(model, objective, first, DirectCertificate("random", columns), lambda: rows[:8])
        for method in ("forward", "layerwise"):
            if method == "layerwise" or columns <= settings.forward_up_to:
                tasks[f"{method} {columns}"] = scoring(direction.by(method))
        if settings.norms:
            tasks[f"gradient {columns}"] = scoring(direction.by("layerwise", norms=True))
            tasks[f"self {columns}"] = scoring(direction.by("layerwise", norms=True, metric=metric))
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(settings.repeats + 1):
        for name, task in tasks.items():
            started = time.process_time()
            task()
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - started)
    return seconds


def problem(settings: argparse.Namespace) -> tuple[objectives.MaskedLM, list[dict]]:
    """Masked language modelling of random words."""
    words = [*SPECIAL, *(f"w{i}" for i in range(settings.vocabulary - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)
    generator = np.random.default_rng(0)
    drawn = generator.choice(words[len(SPECIAL) :], (settings.sentences, settings.tokens))
    rows = [{"example_id": i, "text": " ".join(sentence)} for i, sentence in enumerate(drawn)]
    return objectives.MaskedLM(tokenizer, seed=0), rows


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2, 4, 8, 32], help="numbers of queries")
    parser.add_argument("--forward-up-to", type=int, default=2, help="most queries for which forward mode is measured")
    parser.add_argument("--norms", action="store_true", help="measure norms of gradients and self-influences, too")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
