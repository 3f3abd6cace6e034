"""How near solvers bring a linear head to its minimum: three solvers of scikit-learn, and `training.polish`.

python benchmarks/linear_heads.py

The table shows ‖∇F‖ in float64 for scikit-learn's digits (64 pixel brightnesses as features) with weight decay λ; for
every solver the library's own operator computes it. In brackets: the time in units of `polish` in the same run.
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


def problem(classes: int) -> tuple[ConvNetForImageClassification, list[dict], ImageClassification]:
    """A model whose frozen encoder returns the brightnesses unchanged, the digits below `classes`, an objective."""
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


def gradient_norm(
    model: ConvNetForImageClassification, objective: ImageClassification, rows: list[dict], decay: float
) -> float:
    """‖∇F‖ with respect to the head, at the model as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"trainable": ["head.*"], "weight_decay": decay, "lbfgs_iter": 0, "max_iter": 0}
        return training.polish(model, objective, rows, **settings).gradient_norm


def fit_by_scikit_learn(
    model: ConvNetForImageClassification, objective: ImageClassification, rows: list[dict], decay: float, solver: str
) -> None:
    """Trains the head by scikit-learn, with a tolerance that no solver reaches, and copies it into the model."""
    batch = objective.collate([{"example_id": i, **row} for i, row in enumerate(rows)])
    with torch.no_grad():
        features = model.encoder(batch["pixel_values"]).last_hidden_state.numpy()
    binary = model.config.num_labels == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regression = LogisticRegression(
            C=(2 if binary else 1) / (len(rows) * decay), tol=1e-15, max_iter=100_000, solver=solver
        ).fit(features, batch["labels"].numpy())
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    with torch.no_grad():
        model.head[0].weight.copy_(torch.cat([-weight, weight]) / 2 if binary else weight)
        model.head[0].bias.copy_(torch.cat([-bias, bias]) / 2 if binary else bias)


def main() -> None:
    torch.set_num_threads(1)
    table = []
    for classes in (2, 10):
        model, rows, objective = problem(classes)
        for decay in (1e-2, 1e-4, 1e-6):
            polished, started = copy.deepcopy(model), time.perf_counter()
            settings = {"trainable": ["head.*"], "weight_decay": decay, "tol": 1e-13, "cg_iter": 5000}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = training.polish(polished, objective, rows, **settings)
            unit = time.perf_counter() - started
            row = [classes, decay, f"{report.gradient_norm:.1e}"]
            for solver in SOLVERS:
                head, started = copy.deepcopy(model), time.perf_counter()
                fit_by_scikit_learn(head, objective, rows, decay, solver)
                ratio = (time.perf_counter() - started) / unit
                row.append(f"{gradient_norm(head, objective, rows, decay):.1e} ({ratio:.2f})")
            table.append(row)
    print(tabulate(table, ["classes", "λ", "polish", *SOLVERS], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
