"""Products and time that each solver takes for the same linear systems: a trained BERT's Gauss-Newton matrix.

    python benchmarks/solvers.py --threads 1 --data sentences.txt    # a text file, one sentence per line, or .gz
    python benchmarks/solvers.py --threads 1 --hidden 64 --layers 2 --steps 100          # a generated corpus, minutes
    python benchmarks/solvers.py --check                             # exit code 1 if a bar is missed

A masked language model is trained for a few hundred steps. The systems are (G + λ)u = b, G its Gauss-Newton matrix on
some of its rows, λ a thousandth of the largest eigenvalue, and one b for each of some sentences that it has not seen:
the gradient of their loss. A product is counted per column; a pass is a product with all columns that still run. The
paper's solver, eq. (16), solves (G² + λ²)u = Gb for the first sentence alone and is stopped at some multiple of the
products of CG. Time is CPU time of this process.

Bars, with 8 queries: CG with the preconditioner takes at most half of the products without, set-up included; block CG
takes at most half of the passes of CG; the paper's takes at least 10 times the products of CG with the preconditioner,
its share of the set-up included; all queries by block CG take at most 4 times as long as one by CG.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, vectors
from hf_msif.solvers import Operator, Solver
from hf_msif.vectors import Block

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST = 32


class Counting:
    """An operator that counts columns and passes."""

    def __init__(self, operator: Operator):
        self.operator, self.parameters = operator, operator.parameters
        self.columns = self.passes = 0

    def matvec(self, v: Block) -> Block:
        self.columns += vectors.columns(v)
        self.passes += 1
        return self.operator.matvec(v)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    operator, b, loss = system(settings)
    queries, first = vectors.columns(b), vectors.take(b, torch.tensor([0]))
    reports: dict[str, dict[str, Any]] = {}

    def run(name: str, solver: Solver, b: Block = b, state: Any = None) -> dict[str, Any]:
        counting, started = Counting(operator), time.process_time()
        state = solver.init(counting) if state is None else state
        setup, ready = counting.columns, time.process_time()
        certificate = solvers.solve(counting, b, solver, state).certificate
        reports[name] = report = {
            "queries": vectors.columns(b),
            "setup": setup,
            "products": counting.columns - setup,
            "passes": max(certificate.matvecs),
            "seconds": time.process_time() - ready,
            "setup_seconds": ready - started,
            "residual": max(certificate.residual),
            "converged": all(certificate.converged),
        }
        print(f"{name}: {json.dumps(report)}", file=sys.stderr, flush=True)
        return report | {"state": state, "certificate": certificate}

    plain = solvers.CG(tol=settings.tol)
    alone = run("CG, 1 query", plain, first)
    state = alone["state"]
    damping, largest = state.damping
    together = run("CG", plain, state=state)
    given = {"damping": damping, "tol": settings.tol}
    run("BlockCG", solvers.BlockCG(**given))
    nystrom = run("CG + Nyström", solvers.CG(**given, preconditioner="nystrom"))
    run("BlockCG + Nyström", solvers.BlockCG(**given, preconditioner="nystrom"), state=nystrom["state"])
    if settings.others:
        run("MinRes, 1 query", solvers.MinRes(**given), first)
        most = settings.multiple * alone["products"]
        squared = solvers.SquaredCG(damping=damping**2, tol=settings.tol, max_iter=most // 2)
        run("SquaredCG, 1 query", squared, first)
    ratios = bars(reports)
    forecast = solvers.forecast(operator, first, plain, state)
    met = all(ratio["met"] for ratio in ratios.values())
    facts = vars(settings) | {
        "parameters": sum(p.numel() for p in operator.parameters.values()),
        "loss": loss,
        "damping": damping,
        "largest_eigenvalue": largest,
        "muted": together["certificate"].muted,
        "iteration_bound": together["certificate"].iteration_bound,
        "forecast": {"usual": forecast.usual[0], "worst": forecast.worst, "spent": alone["certificate"].matvecs[0]},
        "torch": torch.__version__,
    }
    if settings.json:
        print(json.dumps({"solvers": reports, "bars": ratios, "met": met, "settings": facts}, default=str))
    else:
        columns = ("queries", "setup", "products", "passes", "seconds", "residual")
        rows = [[name, *(report[column] for column in columns)] for name, report in reports.items()]
        print(tabulate(rows, headers=["", *columns], tablefmt="github", floatfmt=".3g"))
        print(tabulate([[name, r["value"], r["bar"], r["met"]] for name, r in ratios.items()], tablefmt="github"))
        print(
            f"{facts['parameters']:,} parameters, masked-LM loss {loss:.2f}, {queries} queries, {settings.rows} rows; "
            f"largest eigenvalue {largest:.3g}, λ {damping:.3g}, which mutes {max(facts['muted']):.0%} of b; bound "
            f"{facts['iteration_bound']} iterations; forecast {forecast.usual[0]} products, spent "
            f"{facts['forecast']['spent']}; {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        )
    return 0 if met or not settings.check else 1


def bars(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The ratios that have a bar."""
    cg, one, block, nystrom = (reports[n] for n in ("CG", "CG, 1 query", "BlockCG", "CG + Nyström"))
    both = reports["BlockCG + Nyström"]

    def at_most(value: float, bar: float) -> dict[str, Any]:
        return {"value": round(value, 3), "bar": f"at most {bar}", "met": value <= bar}

    ratios = {
        "CG + Nyström / CG, products": at_most((nystrom["setup"] + nystrom["products"]) / cg["products"], 0.5),
        "BlockCG + Nyström / CG, products": at_most((nystrom["setup"] + both["products"]) / cg["products"], 0.5),
        "BlockCG / CG, passes": at_most(block["passes"] / cg["passes"], 0.5),
        "BlockCG, all queries / CG, 1 query, time": at_most(block["seconds"] / one["seconds"], 4.0),
    }
    if "SquaredCG, 1 query" in reports:
        squared = reports["SquaredCG, 1 query"]["products"]
        value = squared / (nystrom["setup"] + nystrom["products"]) * nystrom["queries"]
        bar = {"value": round(value, 3), "bar": "at least 10", "met": value >= 10}
        ratios["SquaredCG / (CG + Nyström), products"] = bar
        ratios["SquaredCG / CG, products"] = {"value": round(squared / one["products"], 3), "bar": "", "met": True}
    return ratios


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of_training(__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--multiple", type=int, default=20, help="of CG's products, at which SquaredCG is stopped")
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True, help="MinRes and SquaredCG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    return parser.parse_args(argv)


def parser_of_training(description: str) -> argparse.ArgumentParser:
    """A parser with the options that `trained` reads, and the number of rows of the curvature."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="a text file of sentences; defaults to generated ones")
    parser.add_argument("--threads", type=int, help="threads of the CPU; defaults to PyTorch's choice")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=8000, help="sentences of the training")
    parser.add_argument("--steps", type=int, default=200, help="steps of the training, of 32 sentences each")
    parser.add_argument("--rows", type=int, default=32, help="rows of the Gauss-Newton matrix")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def system(settings: argparse.Namespace) -> tuple[Operator, Block, float]:
    """The Gauss-Newton matrix, the gradients of the queries' losses, and the last loss of the training."""
    model, objective, rows, loss = trained(settings)
    stage = Stage("pretraining", model, objective, rows[settings.queries :], curvature_samples=settings.rows)
    chain = MultiStageInfluence([stage], progress=False)
    bound = chain.stage()
    adjoint, _ = chain.measurement(rows[: settings.queries])
    return bound.differentiation.operator, vectors.select(adjoint, bound.split.trained), loss


def trained(settings: argparse.Namespace) -> tuple[BertForMaskedLM, objectives.MaskedLM, list[dict], float]:
    """The model, its objective, all rows (those of the queries, which it is not trained on, first), its last loss."""
    texts = sentences(settings)
    rows = [{"example_id": i, "text": text} for i, text in enumerate(texts)]
    counts = Counter(word for text in texts[settings.queries :] for word in text.split())
    words = [*SPECIAL, *(word for word, _ in counts.most_common(settings.vocabulary - len(SPECIAL)))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=LONGEST)
    objective = objectives.MaskedLM(tokenizer, seed=settings.seed)
    torch.manual_seed(settings.seed)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(words),
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            intermediate_size=4 * settings.hidden,
            max_position_embeddings=LONGEST,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return model, objective, rows, train(model, objective, rows[settings.queries :], settings)


def train(model: BertForMaskedLM, objective: objectives.MaskedLM, rows: list[dict], settings) -> float:
    """Trains the model with fresh masks in each step; returns the mean loss of the last twenty steps."""
    rate = 1e-3 * min(1.0, (128 / settings.hidden))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=settings.steps)
    chosen, losses = random.Random(settings.seed), []
    for step in range(settings.steps):
        batch = objective.of_epoch(step).collate(chosen.choices(rows, k=32))
        hidden = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        logits = model.cls(hidden[batch["rows"], batch["columns"]])
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


def sentences(settings: argparse.Namespace) -> list[str]:
    """Sentences of 5 to 28 words in random order, `settings.queries` more than the training needs."""
    number, generator = settings.sentences + settings.queries, random.Random(settings.seed)
    if settings.data is None:
        return list(itertools.islice(generated(settings.vocabulary, generator), number))
    path = Path(settings.data)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        texts = [line.strip().lower() for line in file]
    texts = sorted({text for text in texts if 5 <= len(text.split()) <= LONGEST - 4})
    return generator.sample(texts, min(number, len(texts)))


def generated(vocabulary: int, generator: random.Random):
    """Sentences in which every word has a few usual followers, with words of a frequency near 1/rank."""
    words = [f"w{i}" for i in range(vocabulary)]
    weights = list(itertools.accumulate(1 / (i + 1) for i in range(vocabulary)))
    followers = [generator.choices(words, cum_weights=weights, k=4) for _ in words]
    while True:
        word, text = generator.choices(words, cum_weights=weights)[0], []
        for _ in range(generator.randint(5, LONGEST - 4)):
            text.append(word)
            usual = generator.random() < 0.7
            word = generator.choice(followers[int(word[1:])] if usual else words[:200])
        yield " ".join(text)


if __name__ == "__main__":
    sys.exit(main())
