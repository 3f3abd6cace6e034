"""Finetuning runs of several lengths, each pulled back through the run itself and as if it had reached a minimum.

    python recipes/digits/unrolled.py
    python recipes/digits/unrolled.py --config recipes/cifar10/unrolled.yaml --steps 20 100 400

The pretraining of the configuration is trained once. For each number of steps finetuning runs from it, and the
pretraining images of the largest influence through the run are left out one by one: pretraining comes to its new
minimum, finetuning repeats its steps. The table has the Pearson correlation of the measured change of the summed test
loss with the one that the run predicts, and with the one that a proximal term predicts, with α estimated or the best
of five values (the best for the measured change itself, which a user does not know).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from hf_msif import InputError, MultiStageInfluence, validation
from hf_msif.project import config
from hf_msif.project.retraining import retraining
from hf_msif.project.run import Run
from hf_msif.project.train import train

ALPHAS = (0.001, 0.01, 0.1, 1.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="recipes/digits/unrolled.yaml")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100, 400])
    arguments, overrides = parser.parse_known_args()
    lines = [row(arguments, overrides, steps) for steps in arguments.steps]
    print(tabulate(lines, headers="keys", disable_numparse=True))


def row(arguments: argparse.Namespace, overrides: list[str], steps: int) -> dict[str, str]:
    length = f"--stages.finetuning.training.max_steps={steps}"
    settings = config.parse([f"--config={arguments.config}", *overrides, length])
    base = Path(settings.run_dir)
    run = Run(settings.model_copy(update={"run_dir": f"{base}/{steps}"}))
    first = base / str(arguments.steps[0]) / "pretraining"
    if steps != arguments.steps[0] and not run.is_trained("pretraining"):
        shutil.copytree(first, run.folder / "pretraining")
    for name in run.names:
        if not run.is_trained(name):
            train(run, name)
    chain, tests, corpus = run.chain(), run.tests(), run.corpus()
    scores = chain.query(tests, "sum").score(corpus)
    bank = validation.Bank(retraining(run, chain, tests, "warm_start"), run.folder / "bank")
    predicted = {str(alpha): as_minimum(chain, tests, corpus, alpha) for alpha in ("auto", *ALPHAS)}
    result = validation.leave_one_out(
        bank, scores, examples=settings.validation.examples, baselines=predicted, aggregate="sum"
    )
    correlations = result.correlations
    best = max(ALPHAS, key=lambda alpha: correlations[str(alpha)].pearson_r)
    return {
        "steps": str(steps),
        "implicit, best of five α": f"{correlations[str(best)].pearson_r:.2f} (α = {best:g})",
        "implicit, α̂": f"{correlations['auto'].pearson_r:.2f}",
        "unrolled": interval(correlations["influence"]),
        "ceiling": f"{result.ceiling.pearson_r:.3f}",
    }


def interval(correlation: validation.Correlation) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(correlation.pearson_r, *correlation.pearson_interval)


def as_minimum(chain: MultiStageInfluence, tests: list[dict], corpus: list[dict], alpha: float | str) -> np.ndarray:
    """Removal effects if every unrolled stage is taken for a minimum."""
    stages = [
        replace(bound.stage, link="implicit", run=None, alpha=alpha if bound.split.proximal else None)
        for bound in chain.stages
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an α̂ that is not positive is in the table
        other = MultiStageInfluence(stages, progress=False)
        return other.query(tests, "sum").score(corpus).removal_effects()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
