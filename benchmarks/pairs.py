"""`damping="auto"` and `solver="auto"` on pairs of models that nobody tuned: the residual, and the products foretold.

    python benchmarks/pairs.py --threads 1                       # four pairs; about ten minutes on one core
    python benchmarks/pairs.py --threads 1 --weights FOLDER      # and a checkpoint from the Hub, e.g. MiniLM
    python benchmarks/pairs.py --check                           # exit code 1 if a bar is missed

A pair is a language model that is trained for some hundred steps on generated sentences (or the encoder in FOLDER with
a new masked-LM head, trained for 50), and a classifier of generated tweets on its frozen encoder. For one and for four
test tweets, `plan`'s forecast is taken first; then the query is solved, and both are compared, for the pretraining
stage and with all settings at their defaults but `curvature_samples`. FOLDER is what `AutoModel.from_pretrained` and
`AutoTokenizer.from_pretrained` read.

Bars: every residual is at most 1e-2, and the products are those foretold within 30 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_msif import MultiStageInfluence, Stage, objectives
from hf_msif.models import (
    ElmoConfig,
    ElmoForBidirectionalLM,
    ElmoForSequenceClassification,
    ElmoTokenizer,
)
from hf_msif.objectives import Objective
from hf_msif.project.demo.grammar import World, vocabulary, world

RESIDUAL, SHARE = 1e-2, 0.3


@dataclass
class Pair:
    """Two models and what they are trained by, before any training."""

    name: str
    pretraining: Any
    finetuning: Any
    language: Objective
    classes: Objective
    steps: int


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    data, table = world(seed=3), []
    for pair in pairs(data, settings):
        if settings.only and pair.name not in settings.only:
            continue
        train(pair.pretraining, pair.language, data.corpus, pair.steps)
        pair.finetuning.base_model.load_state_dict(pair.pretraining.base_model.state_dict(), strict=False)
        for parameter in pair.finetuning.base_model.parameters():
            parameter.requires_grad_(False)
        train(pair.finetuning, pair.classes, data.tweets, 150)
        pair.finetuning.requires_grad_(True)
        for columns in (1, 4):
            table.append(measured(pair, data, columns, settings))
            print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    missed = [row for row in table if row["residual"] > RESIDUAL or abs(row["ratio"] - 1) > SHARE]
    print(json.dumps(table) if settings.json else tabulate(table, headers="keys", tablefmt="github", floatfmt=".3g"))
    return 1 if settings.check and missed else 0


def measured(pair: Pair, data: World, columns: int, settings: argparse.Namespace) -> dict[str, Any]:
    """The forecast and the truth for some test tweets."""
    tweets = [{**row, "example_id": f"test {i}"} for i, row in enumerate(data.tests[:columns])]
    chain = MultiStageInfluence(
        [
            Stage("pretraining", pair.pretraining, pair.language, data.corpus, curvature_samples=settings.rows),
            Stage("finetuning", pair.finetuning, pair.classes, data.tweets, "head", weight_decay=0.01),
        ],
        progress=False,
    )
    bound = chain.stages[0]
    adjoint = chain.sketched_adjoints(tweets)["pretraining"]
    foretold = bound.differentiation.cost(columns, adjoint=adjoint).details
    started = time.process_time()
    certificate: Any = chain.query(tweets).certificates["pretraining"]
    solver, _ = bound.differentiation.solver_for(columns)
    parameters = sum(p.numel() for p in bound.differentiation.operator.parameters.values())
    limit: Any = solver
    before = solver.products(parameters, columns) - limit.max_iter - 1  # those of `Solver.init`
    products = max(certificate.matvecs)
    return {
        "pair": pair.name,
        "parameters": parameters,
        "queries": columns,
        "solver": certificate.solver,
        "damping": certificate.damping,
        "muted": max(certificate.muted or [float("nan")]),
        "residual": max(certificate.residual),
        "products": products,
        "foretold": foretold["usual_products"] - before,
        "ratio": products / (foretold["usual_products"] - before),
        "at most": foretold["products"] - before,
        "CPU s": time.process_time() - started,
    }


def train(model: Any, objective: Objective, rows: list[dict], steps: int) -> None:
    """AdamW on the objective's losses, 32 rows per step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, generator = torch.optim.AdamW(trained, lr=1e-3), torch.Generator().manual_seed(0)

    def call(positions: tuple | None = None, **inputs: Any) -> Any:
        output = model(**inputs)
        if positions is not None:
            output.logits = output.logits[positions]
        return output

    for step in range(steps):
        some = [rows[i] for i in torch.randint(len(rows), (32,), generator=generator)]
        sums, counts = objective.of_epoch(step).losses(call, objective.of_epoch(step).collate(some))
        optimiser.zero_grad()
        (sums.sum() / counts.sum()).backward()
        optimiser.step()
    model.eval()


def pairs(data: World, settings: argparse.Namespace) -> Iterator[Pair]:
    """The pairs, one after another."""
    words, steps = vocabulary(data), settings.steps
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    masked, tweets = objectives.MaskedLM(tokenizer), objectives.SequenceClassification(tokenizer)

    def berts(width: int, layers: int) -> tuple[Any, Any]:
        torch.manual_seed(0)
        shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
        config = BertConfig(vocab_size=len(words), num_attention_heads=4, initializer_range=0.05, **shape)
        return BertForMaskedLM(config), BertForSequenceClassification(config)

    yield Pair("the demo's BERT, 2 x 64", *berts(64, 2), masked, tweets, steps)
    yield Pair("the recipe's BERT, 4 x 256", *berts(256, 4), masked, tweets, steps)
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=len(words),
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    causal = objectives.CausalLM(tokenizer)
    yield Pair("Llama, 6 x 288", LlamaForCausalLM(llama), LlamaForSequenceClassification(llama), causal, tweets, steps)
    torch.manual_seed(0)
    elmo_words = ElmoTokenizer.train([row["text"] for row in data.corpus], size=400, model_max_length=64)
    elmo = ElmoConfig(
        filters=[[1, 8], [2, 16], [3, 32]],
        character_size=8,
        cell_size=128,
        projection_size=32,
        vocab_size=len(elmo_words.words),
        classifier_hidden_size=32,
    )
    language, classes = objectives.BidirectionalLM(elmo_words), objectives.SequenceClassification(elmo_words)
    elmos = ElmoForBidirectionalLM(elmo), ElmoForSequenceClassification(elmo)
    yield Pair("ELMo, 2 x 128", *elmos, language, classes, steps)
    if settings.weights:
        tokenizer = AutoTokenizer.from_pretrained(settings.weights)
        torch.manual_seed(0)
        before = AutoModelForMaskedLM.from_pretrained(settings.weights, torch_dtype=torch.float32)
        after = AutoModelForSequenceClassification.from_pretrained(settings.weights, torch_dtype=torch.float32)
        masked, tweets = objectives.MaskedLM(tokenizer), objectives.SequenceClassification(tokenizer)
        yield Pair("the weights in FOLDER", before, after, masked, tweets, 50)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="curvature_samples")
    parser.add_argument("--steps", type=int, default=200, help="of pretraining")
    parser.add_argument("--weights", metavar="FOLDER", help="a checkpoint with its tokenizer")
    parser.add_argument("--only", nargs="+", help="names of pairs")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
