"""The paper's retraining experiment (§4.1) on scikit-learn's digits: nothing to download, minutes on one core.

    python recipes/digits/run.py                   # frozen encoder, eq. (11): Figure A and, as identity, Figure 2(c)
    python recipes/digits/run.py --alpha 0.1       # encoder updated, eqs. (12)–(15): Figure 2(b)
    python recipes/digits/run.py --subsets 50      # and the linear datamodelling score
    python recipes/digits/run.py --mislabelled     # a tenth of the pretraining labels is wrong: are they found?

A small smooth convolutional network is pretrained on all images of 0–3 and finetuned on 700 of 4–9, both to a
stationary point in float64. Influences of the pretraining images on the loss of 377 test images of 4–9, summed, are
compared with leaving out each of the 100 most influential ones and retraining both stages.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, training, validation
from hf_msif.models import ConvNetConfig, ConvNetForImageClassification

OBJECTIVE = objectives.ImageClassification(scale=1 / 16, dtype="float64")
CHANNELS = [6, 12]
HEAD_DECAY = 0.001
FINETUNING = 700
BATCH = 2048


def main() -> None:
    settings = arguments()
    torch.set_num_threads(settings.threads)
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found = mislabelled(settings) if settings.mislabelled else experiment(settings, folder)
    found |= {"settings": vars(settings), "seconds": round(time.perf_counter() - started, 1)}
    name = "mislabelled" if settings.mislabelled else "frozen" if settings.alpha is None else "proximal"
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2))
    print(f"\n{found['seconds']:.0f} s on {settings.threads} thread(s); figures are in {folder / name}.json.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alpha", type=float, help="train the encoder in finetuning too, tied with this α, eq. (12)")
    parser.add_argument("--decay", type=float, default=0.02, help="weight decay of pretraining")
    parser.add_argument("--examples", type=int, default=100, help="left out one by one, the most influential ones")
    parser.add_argument("--subsets", type=int, default=0, help="random subsets for the LDS")
    parser.add_argument("--fraction", type=float, default=0.99, help="of the pretraining images in a subset")
    parser.add_argument("--mislabelled", action="store_true", help="rank wrong pretraining labels instead")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, wrong labels and subsets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="runs/digits")
    return parser.parse_args()


def digits(classes: range, seed: int = 0) -> list[dict]:
    """All images of the classes in a seeded order, labels counted from 0."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(labels, classes)))
    return [
        {"example_id": int(i), "image": images[i].reshape(8, 8), "label": int(labels[i]) - classes[0]} for i in order
    ]


def network(labels: int, seed: int) -> ConvNetForImageClassification:
    torch.manual_seed(seed)
    config = ConvNetConfig(image_size=8, channels=CHANNELS, dense=[], num_labels=labels)
    return ConvNetForImageClassification(config).double().eval()


def stages(pretraining: list[dict], finetuning: list[dict], settings: argparse.Namespace) -> list[Stage]:
    """Both stages at stationary points of their objectives."""
    before, after = network(4, settings.seed), network(6, settings.seed + 1)
    exact = {"curvature": "hessian", "solver": solvers.Dense(), "batch_size": BATCH}
    first = Stage("pretraining", before, OBJECTIVE, pretraining, weight_decay=settings.decay, **exact)
    print(polished(first, None))
    after.encoder.load_state_dict(before.encoder.state_dict())
    trainable = "head" if settings.alpha is None else "all"
    second = Stage("finetuning", after, OBJECTIVE, finetuning, trainable, HEAD_DECAY, settings.alpha, **exact)
    print(polished(second, before))
    return [first, second]


def polished(stage: Stage, previous: torch.nn.Module | None) -> training.PolishReport:
    return training.polish(
        stage.model,
        stage.objective,
        stage.data,
        previous=previous,
        trainable=stage.trainable,
        weight_decay=stage.weight_decay,
        alpha=stage.alpha,
        batch_size=BATCH,
        name=stage.name,
    )


def accuracies(chain: list[Stage], tests: list[dict]) -> dict:
    found = {stage.name: training.evaluate(stage.model, OBJECTIVE, stage.data)["accuracy"] for stage in chain}
    found["test"] = training.evaluate(chain[-1].model, OBJECTIVE, tests)["accuracy"]
    print("accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


def experiment(settings: argparse.Namespace, folder: Path) -> dict:
    pretraining, others = digits(range(4)), digits(range(4, 10))
    finetuning, tests = others[:FINETUNING], others[FINETUNING:]
    both = stages(pretraining, finetuning, settings)
    report = {"accuracy": accuracies(both, tests)}
    chain = MultiStageInfluence(both)
    started = time.perf_counter()
    scores = chain.query(tests, aggregate="sum").score(pretraining)
    print(f"influence of {len(pretraining)} pretraining images: {time.perf_counter() - started:.1f} s")
    baselines = validation.baselines(chain, tests, pretraining)
    bank = validation.Bank(validation.WarmStart(both, tests), folder / "bank")
    result = validation.leave_one_out(bank, scores, examples=settings.examples, baselines=baselines)
    name = "frozen" if settings.alpha is None else "proximal"
    result.plot(folder / f"{name}.png")
    print(f"\n{result}")
    report["leave_one_out"] = result.to_dict()
    if settings.subsets:
        result = validation.datamodelling_score(
            bank,
            chain.query(tests).score(pretraining),
            subsets=settings.subsets,
            fraction=settings.fraction,
            seed=settings.seed,
            baselines=baselines,
        )
        print(f"\n{result}")
        report["datamodelling_score"] = result.to_dict()
    return report


def mislabelled(settings: argparse.Namespace) -> dict:
    """Area under the ROC curve of wrong labels, ranked by harm to the pretraining task and to the finetuned one."""
    images, others = digits(range(4), settings.seed), digits(range(4, 10), settings.seed)
    generator = np.random.default_rng(settings.seed)
    pretraining, held_out = images[:600], images[600:]
    wrong = np.zeros(len(pretraining), dtype=bool)
    wrong[generator.choice(len(wrong), len(wrong) // 10, replace=False)] = True
    for row in (row for row, bad in zip(pretraining, wrong, strict=True) if bad):
        row["label"] = int((row["label"] + generator.integers(1, 4)) % 4)
    both = stages(pretraining, others[:FINETUNING], settings)
    accuracies(both, others[FINETUNING:])
    first = MultiStageInfluence(both[:1]).query(held_out, aggregate="sum").score(pretraining)
    whole = MultiStageInfluence(both).query(others[FINETUNING:], aggregate="sum").score(pretraining).influence()
    measures = {
        "influence on held-out images of 0–3": first.influence(),
        "influence on test images of 4–9": whole,
        "its absolute value": np.abs(whole),
        "the example's own loss": first.frame["loss"].to_numpy(),
    }
    found = {name: float(roc_auc_score(wrong, values)) for name, values in measures.items()}
    print(f"\n{wrong.sum()} of {len(wrong)} pretraining labels are wrong; area under the ROC curve, ranked by")
    for name, value in found.items():
        print(f"  {name:38} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
