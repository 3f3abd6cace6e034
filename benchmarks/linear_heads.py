"""Which solver brings a linear head nearest to its minimum: scikit-learn's three, and ours.

python benchmarks/linear_heads.py

‖∇F‖ in float64, recomputed by our own operator, for scikit-learn's digits (64 brightnesses as features) with weight
decay λ; in brackets the time in units of `polish`'s own method in the same run.
"""

import copy
import time
import warnings

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from tabulate import tabulate

from hf_msif import training
from hf_msif.models import ConvNetConfig, ConvNetForImageClassification
from hf_msif.objectives import ImageClassification

SOLVERS = ("lbfgs", "newton-cg", "newton-cholesky")


def problem(classes: int):
    """Digits below `classes`, and a model whose frozen encoder hands the brightnesses on unchanged."""
    data = load_digits()
    rows = [
        {"image": image, "label": int(label)}
        for image, label in zip(data.images, data.target, strict=True)
        if label < classes
    ]
    settings = {"image_size": 8, "channels": [1], "kernel_size": 1, "pool_size": 1, "activation": "relu", "dense": []}
    model = ConvNetForImageClassification(ConvNetConfig(**settings, num_labels=classes)).double()
    convolution = model.encoder.layers[0]
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        convolution.bias.zero_()
    return model, rows, ImageClassification(scale=1 / 16, dtype="float64")


def gradient_norm(model, objective, rows, decay) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"trainable": ["head.*"], "weight_decay": decay, "lbfgs_iter": 0, "max_iter": 0}
        return training.polish(model, objective, rows, **settings).gradient_norm


def by_scikit_learn(model, objective, rows, decay, solver: str) -> None:
    """scikit-learn as it is, with a tolerance that no solver reaches."""
    batch = objective.collate([{"example_id": i, **row} for i, row in enumerate(rows)])
    with torch.no_grad():
        features = model.encoder(batch["pixel_values"]).last_hidden_state.numpy()
    binary = model.config.num_labels == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = LogisticRegression(
            C=(2 if binary else 1) / (len(rows) * decay), tol=1e-15, max_iter=100_000, solver=solver
        ).fit(features, batch["labels"].numpy())
    weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    with torch.no_grad():
        model.head[0].weight.copy_(torch.cat([-weight, weight]) / 2 if binary else weight)
        model.head[0].bias.copy_(torch.cat([-bias, bias]) / 2 if binary else bias)


def main() -> None:
    torch.set_num_threads(1)
    table = []
    for classes in (2, 10):
        model, rows, objective = problem(classes)
        for decay in (1e-2, 1e-4, 1e-6):
            ours, started = copy.deepcopy(model), time.perf_counter()
            settings = {"trainable": ["head.*"], "weight_decay": decay, "tol": 1e-13, "cg_iter": 5000}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = training.polish(ours, objective, rows, **settings)
            unit = time.perf_counter() - started
            row = [classes, decay, f"{report.gradient_norm:.1e}"]
            for solver in SOLVERS:
                head, started = copy.deepcopy(model), time.perf_counter()
                by_scikit_learn(head, objective, rows, decay, solver)
                spent = (time.perf_counter() - started) / unit
                row.append(f"{gradient_norm(head, objective, rows, decay):.1e} ({spent:.2f})")
            table.append(row)
    print(tabulate(table, ["classes", "λ", "polish", *SOLVERS], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
