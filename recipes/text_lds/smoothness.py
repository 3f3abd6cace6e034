"""Does metasmoothness tell which runs can be predicted? Runs of several learning rates, each with its LDS.

    python recipes/text_lds/smoothness.py --rates 0.01 0.03 0.05 0.1

The set-up is that of run.py at a smaller size: 100 sentences, 60 steps. Of each run the metasmoothness is measured by
three repetitions, and the LDS of its own pull-back by 12 retrainings on 95 % of the sentences.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import run
import torch
from tabulate import tabulate

from hf_msif import validation


def main() -> None:
    settings = arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*adjoint")  # the table says more
    lines = [measured(rate, settings) for rate in settings.rates]
    names = ["rate", "losses", "parameters", "second order", "error at h", "at 2h", "LDS"]
    print(tabulate(lines, names, floatfmt=".2f"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", default="data/one_billion_word/news.en.heldout.txt", help="one per line")
    parser.add_argument("--tweets", default="data/gop_debate/Sentiment.csv", help="with columns text and sentiment")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.05, 0.1])
    parser.add_argument("--warmup", type=int, default=30, help="steps of warm-up")
    parser.add_argument("--steps", type=int, default=60, help="of pretraining")
    parser.add_argument("--output", default="runs/text_lds_smoothness")
    parser.set_defaults(number=100, words=200, tests=6, seed=0)
    return parser.parse_args()


def measured(rate: float, settings: argparse.Namespace) -> list:
    """One line of the table."""
    run.ADAM |= {"learning_rate": rate, "warmup_steps": settings.warmup}
    folder = Path(settings.output) / f"rate-{rate:g}-warmup-{settings.warmup}-steps-{settings.steps}"
    tokenizer, corpus, (tests, _, tweets, _) = run.load(settings)
    setup = run.Setup(tokenizer, corpus, tweets, settings, folder)
    scores = setup.chain().query(tests).score(corpus)
    retrain = validation.WarmStart(setup.stages(), tests)
    smoothness = validation.metasmoothness(retrain, scores)
    bank, alone = validation.Bank(retrain, folder / "bank"), validation.OwnTruth(ceiling_seeds=())
    lds = validation.datamodelling_score(bank, scores, subsets=12, truth=alone).correlations["influence"].spearman_r
    errors = smoothness.first_order_error
    return [rate, smoothness.losses, smoothness.parameters, smoothness.second_order, *errors, lds]


if __name__ == "__main__":
    main()
