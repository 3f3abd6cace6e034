"""What a cheap pass over a corpus costs, and whether it finds the rows of largest influence, in one run.

    python benchmarks/shortlist.py --threads 1 --data sentences.txt    # a text file, one sentence per line, or .gz
    python benchmarks/shortlist.py --threads 1 --hidden 64 --layers 2 --vocabulary 1000    # generated, minutes

A masked language model is trained for a few hundred steps, and asked about sentences that it has not seen: u by CG,
damping="auto". Recall is the share of the ten rows of largest and of the ten of smallest influence that are among the
first 40 of each end by the cheap pass, mean of the queries. The cost of bfloat16 is its CPU seconds relative to exact
scores of the same rows, the median of five turns; at the end `score` makes its own shortlist. The ways are

- bfloat16: the pass by which `score(keep=, dtype="bfloat16")` makes its shortlist;
- query of rank r: u of each matrix cut to its r largest singular values. A row of 32 tokens costs as much with r = 8
  as with the whole matrix of a layer 256 wide, so that it saves nothing here;
- gradients of rank r: each row's gradient cut in the same way. It could be stored, to serve later queries;
- sketch of k: each row's gradient added up, with random signs, in k random bins (count sketch). It could be stored;
- without layer 0: its parameters and the embeddings of tokens count nothing, and need no backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from solvers import parser_of_training, trained
from tabulate import tabulate
from torch import Tensor

from hf_msif import MultiStageInfluence, Stage, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature.derivatives import Evaluation, example_gradients
from hf_msif.influence import Direction
from hf_msif.influence.differentiation import DirectCertificate
from hf_msif.vectors import Block

FIRST, AT = 40, 10
BATCH, TURNS = 32, 5
SKETCH, QUERY_RANKS, GRADIENT_RANKS = (1024, 16384), (4, 8), (1, 2, 4)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, objective, rows, _ = trained(settings)
    tests, data = rows[: settings.queries], rows[settings.queries :]
    stage = Stage("pretraining", model, objective, data, curvature_samples=settings.rows, batch_size=BATCH)
    query = MultiStageInfluence([stage], progress=False).query(tests)
    u = query.solutions["pretraining"].tensors()
    corpus = data[-settings.corpus :]
    batches = [(objective.collate(corpus[i : i + BATCH]), corpus[i : i + BATCH]) for i in range(0, len(corpus), BATCH)]
    functional = FunctionalModel(model)

    def scores(u: Block, some=batches, reduced: bool = False, method: str = "layerwise") -> np.ndarray:
        certificate = DirectCertificate("none", vectors.columns(u))
        direction = Direction(functional, objective, u, certificate, lambda: corpus[:5], method)
        direction.prepare()
        with functional.evaluating(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):
            return np.concatenate([direction.influence(batch, rows)[0].numpy() for batch, rows in some])

    exact = scores(u)
    table = [{"": "bfloat16", "recall": recall(exact, scores(u, reduced=True))}]
    table += [
        {"": f"query of rank {rank}", "recall": recall(exact, scores(low_rank(u, rank)))} for rank in QUERY_RANKS
    ]
    upper = {n: t for n, t in u.items() if "layer.0." not in n and "embeddings." not in n}
    table.append({"": "without layer 0", "recall": recall(exact, scores(upper))})
    table += [
        {"": name, "recall": recall(exact, found)}
        for name, found in by_gradients(functional, objective, batches, u).items()
    ]
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".3f"))
    costs, some = [], batches[: 256 // BATCH]
    for columns, method in ((1, "forward"), (settings.queries, "layerwise")):
        few = {name: t[:columns] for name, t in u.items()}
        ratios = [
            seconds(scores, few, some, True, method) / seconds(scores, few, some, False, method) for _ in range(TURNS)
        ]
        costs.append({"queries": columns, "bfloat16 / exact": statistics.median(ratios)})
    print(tabulate(costs, headers="keys", tablefmt="github", floatfmt=".2f"))
    query.score(corpus, keep=AT, dtype="bfloat16")
    print(f"{len(corpus):,} rows, {sum(t[0].numel() for t in u.values()):,} parameters, torch {torch.__version__}")


def recall(exact: np.ndarray, found: np.ndarray) -> float:
    """Mean over columns and both ends of the share of the first `AT` that are among the first `FIRST` of `found`."""
    shares = [
        np.isin(np.argsort(sign * one)[:AT], np.argsort(sign * other)[:FIRST]).mean()
        for one, other in zip(exact.T, found.T, strict=True)
        for sign in (1, -1)
    ]
    return float(np.mean(shares))


def cut(t: Tensor, rank: int) -> Tensor:
    """The largest singular values of matrices (B, m, n), by a randomised decomposition; vectors stay."""
    if t.dim() < 3:
        return t
    left, values, right = torch.svd_lowrank(t, q=min(rank + 6, *t.shape[1:]), niter=2)
    return (left[:, :, :rank] * values[:, None, :rank]) @ right[:, :, :rank].transpose(1, 2)


def low_rank(u: Block, rank: int) -> Block:
    return {name: cut(t, rank) for name, t in u.items()}


def by_gradients(functional: FunctionalModel, objective, batches, u: Block) -> dict[str, np.ndarray]:
    """The scores by the ways that shorten each row's gradient."""
    found: dict[str, list[Tensor]] = {}
    generator, whole = torch.Generator().manual_seed(0), sum(t[0].numel() for t in u.values())
    bins = {k: torch.randint(k, (whole,), generator=generator) for k in SKETCH}
    signs = torch.randint(2, (whole,), generator=generator) * 2.0 - 1

    def sketched(x: Block, k: int) -> Tensor:
        flat = vectors.flatten(x) * signs
        return flat.new_zeros(len(flat), k).index_add_(1, bins[k], flat)

    queries = {k: sketched(u, k) for k in SKETCH}
    with functional.evaluating():
        for gradients in each(functional, objective, batches, tuple(u)):
            for rank in GRADIENT_RANKS:
                product = sum(cut(g, rank).flatten(1) @ u[n].flatten(1).T for n, g in gradients.items())
                found.setdefault(f"gradients of rank {rank}", []).append(-torch.as_tensor(product))
            for k in SKETCH:
                found.setdefault(f"sketch of {k:,}", []).append(-sketched(gradients, k) @ queries[k].T)
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def each(functional: FunctionalModel, objective, batches, names) -> Iterator[Block]:
    for _, rows in batches:
        for i in range(0, len(rows), 8):
            yield example_gradients(Evaluation(functional, objective, objective.collate(rows[i : i + 8])), names)


def seconds(work: Callable, *arguments: object) -> float:
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of_training(__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--corpus", type=int, default=1000, help="rows that are scored")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
