"""Short finetuning runs of several lengths, each pulled back through the run itself and as a proximal minimum.

    python recipes/digits/unrolled.py
    python recipes/digits/unrolled.py --config recipes/cifar10/unrolled.yaml --steps 20 100 400

The pretraining of the configuration is trained once. For each number of steps finetuning runs from it, and the
pretraining images of the largest influence through the run are left out one by one: pretraining comes to its new
minimum, finetuning repeats its steps. The table has the Pearson correlation of the measured change of the summed test
loss with what the run foresees, and with what a proximal term foresees, α estimated or the best of five (best for this
very truth, which a user could not know).
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
from hf_msif.project import commands, config
from hf_msif.project.run import Run

ALPHAS = (0.001, 0.01, 0.1, 1.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="recipes/digits/unrolled.yaml")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100, 400])
    given, overrides = parser.parse_known_args()
    lines = [row(given, overrides, steps) for steps in given.steps]
    print(tabulate(lines, headers="keys", disable_numparse=True))


def row(given: argparse.Namespace, overrides: list[str], steps: int) -> dict[str, str]:
    length = f"--stages.finetuning.training.max_steps={steps}"
    settings = config.parse([f"--config={given.config}", *overrides, length])
    base = Path(settings.run_dir)
    run = Run(settings.model_copy(update={"run_dir": f"{base}/{steps}"}))
    first = base / str(given.steps[0]) / "pretraining"
    if steps != given.steps[0] and not run.is_trained("pretraining"):
        shutil.copytree(first, run.folder / "pretraining")
    for name in run.names:
        if not run.is_trained(name):
            run.train(name)
    chain, tests, corpus = run.chain(), run.tests(), run.corpus()
    scores = chain.query(tests, "sum").score(corpus)
    bank = validation.Bank(commands.retraining(run, chain, tests, "warm_start"), run.folder / "bank")
    predicted = {str(alpha): proximal(chain, tests, corpus, alpha) for alpha in ("auto", *ALPHAS)}
    found = validation.leave_one_out(
        bank, scores, examples=settings.validation.examples, baselines=predicted, aggregate="sum"
    )
    ceiling, found = found.ceiling, found.correlations
    best = max(ALPHAS, key=lambda alpha: found[str(alpha)].pearson_r)
    return {
        "steps": str(steps),
        "proximal, best of five α": f"{found[str(best)].pearson_r:.2f} (α = {best:g})",
        "proximal, α̂": f"{found['auto'].pearson_r:.2f}",
        "unrolled": interval(found["influence"]),
        "ceiling": f"{ceiling.pearson_r:.3f}",
    }


def interval(correlation: validation.Correlation) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(correlation.pearson_r, *correlation.pearson_interval)


def proximal(chain: MultiStageInfluence, tests: list[dict], corpus: list[dict], alpha: float | str) -> np.ndarray:
    """Removal effects with every unrolled link taken for a minimum."""
    stages = [
        replace(link.stage, link="implicit", run=None, alpha=alpha if link.split.proximal else None)
        for link in chain.stages
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
