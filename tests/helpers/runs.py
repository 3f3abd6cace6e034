"""Training runs and minima of the toy model, written out and differentiable, and chains of both."""

import fnmatch
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import TrainingArguments

from helpers.toy import ToyObjective, decayed, example_losses, minimise, toy, toy_rows
from hf_msif import MultiStageInfluence, Stage, solvers, training

ROWS, BATCH, EPOCHS = 11, 4, 3  # batches of 4, 4 and 3
TESTS = toy_rows(9, 2)
DECAY = 0.03

PATTERNS = ["encoder.upper.*", "encoder.shift", "head.*"]  # the rest of the encoder is frozen


def arguments(folder, **settings):
    settings = {"per_device_train_batch_size": BATCH, "num_train_epochs": EPOCHS, "seed": 5, **settings}
    return TrainingArguments(str(folder), report_to=[], use_cpu=True, **settings)


def parameters_of(model, prefix=""):
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(prefix)}


def trained_names(model, patterns):
    names = [n for n, _ in model.named_parameters()]
    patterns = {"all": ["*"], "head": ["head.*"]}.get(str(patterns), patterns)
    return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def pair():
    """A pretrained model and one to finetune on its encoder."""
    before, model = toy(0), toy(1)
    model.encoder.load_state_dict(before.encoder.state_dict())
    return before, model


def unrolled_chain(run, before, model, folder, trainable="all", **settings):
    exact = {"curvature": "hessian", "solver": solvers.Dense()}
    first = Stage("first", before, ToyObjective(), toy_rows(2, 12), weight_decay=0.1, **exact)
    given = {"trainable": trainable, "weight_decay": run.decay, "link": "unrolled", "run": folder}
    second = Stage("second", model, ToyObjective(), run.rows, **{**given, **settings})
    return MultiStageInfluence([first, second], progress=False)


def rows_of(tests):
    return [{"example_id": i, **row} for i, row in enumerate(tests)]


@dataclass
class Run:
    """A training run of the toy model, every step written out and differentiable in all that it is given."""

    rows: list
    trained: list
    optim: str = "sgd"
    momentum: float = 0.0
    eps: float = 0.1
    inside: bool = False
    rate: float = 0.2
    warmup: int = 0
    clip: float = 0.0
    adam_decay: float = 0.0
    decay: float = DECAY
    alpha: float | None = None
    batch: int = BATCH
    epochs: int = EPOCHS
    seed: int = 5
    anchors: dict = field(default_factory=dict)

    def arguments(self, folder):
        own = {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": self.eps}
        own["optim_args"] = "eps_inside_root=true" if self.inside else None
        if self.optim == "sgd":
            own = {"optim": "sgd", "optim_args": f"momentum={self.momentum}" if self.momentum else None}
        return arguments(
            folder,
            **own,
            learning_rate=self.rate,
            warmup_steps=self.warmup,
            max_grad_norm=self.clip,
            weight_decay=self.adam_decay,
            per_device_train_batch_size=self.batch,
            num_train_epochs=self.epochs,
            seed=self.seed,
        )

    def record(self, model, folder, previous=None, trainable="all", **more):
        given = {"previous": previous, "trainable": trainable, "weight_decay": self.decay, "alpha": self.alpha}
        return training.record(
            model, ToyObjective(), self.rows, self.arguments(folder), folder, progress=False, **given, **more
        )

    def schedule(self):
        size, rows = len(self.rows), []
        for epoch in range(self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(size).tolist()
            rows += [order[i : i + self.batch] for i in range(0, size, self.batch)]
        last, warm = len(rows), self.warmup
        rates = [self.rate * min(t / warm if warm else 1.0, (last - t) / (last - warm)) for t in range(last)]
        return list(zip(rows, rates, strict=True))

    def end(self, model, start, weights=None, graph=False):
        """Final parameters from `start`."""
        p, weights = dict(start), torch.ones(len(self.rows), dtype=torch.float64) if weights is None else weights
        m, v = ({n: torch.zeros_like(p[n]) for n in self.trained} for _ in range(2))
        for t, (rows, rate) in enumerate(self.schedule(), start=1):
            here = {n: x if graph else x.detach() for n, x in p.items()}
            leaves = {n: x if x.requires_grad else x.requires_grad_() for n, x in here.items() if n in self.trained}
            here |= leaves
            sums, counts = example_losses(model, here, [self.rows[i] for i in rows])
            value = (weights[rows] * sums).sum() / counts.sum()
            value = value + self.decay / 2 * sum((x**2).sum() for n, x in leaves.items() if decayed(n))
            for n, anchor in self.anchors.items():
                value = value + self.alpha * ((here[n] - anchor) ** 2).sum()
            g = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), create_graph=graph), strict=True))
            if self.clip:
                norm = sum((x**2).sum() for x in g.values()).sqrt()
                g = {n: x * torch.clamp(self.clip / (norm + 1e-6), max=1.0) for n, x in g.items()}
            for n, x in leaves.items():
                own = self.adam_decay if decayed(n) else 0.0
                if self.optim == "sgd":
                    m[n] = self.momentum * m[n] + g[n] + own * x
                    p[n] = x - rate * m[n]
                    continue
                m[n], v[n] = 0.8 * m[n] + 0.2 * g[n], 0.9 * v[n] + 0.1 * g[n] ** 2
                first, second = m[n] / (1 - 0.8**t), v[n] / (1 - 0.9**t)
                size = (second + self.eps**2).sqrt() if self.inside else second.sqrt() + self.eps
                p[n] = x * (1 - rate * own) - rate * first / size
        return p if graph else {n: x.detach() for n, x in p.items()}


@dataclass
class Minimum:
    """A stage at its minimum; α ties the trained encoder to the stage before."""

    rows: list
    trained: list
    decay: float = 0.05
    alpha: float | None = None
    trainable: object = "all"

    def end(self, model, start, before, weights=None):
        weights = torch.ones(len(self.rows), dtype=torch.float64) if weights is None else weights
        tied = {n: p for n, p in (before or {}).items() if n.startswith("encoder.") and n in self.trained}

        def objective(p):
            sums, counts = example_losses(model, p, self.rows)
            total = (weights * sums).sum() / counts.sum()
            total = total + self.decay / 2 * sum((p[n] ** 2).sum() for n in self.trained if decayed(n))
            return total + sum(self.alpha * ((p[n] - anchor) ** 2).sum() for n, anchor in tied.items())

        return minimise(objective, start, self.trained)


class Mixed:
    """Toy stages, each a `Run` or a `Minimum`, and their re-solving with weights on the examples of one of them."""

    def __init__(self, kinds, folder):
        self.models, self.kinds = [toy(k) for k in range(len(kinds))], []
        self.starts, self.ends, stages = [], [], []
        for k, (make, trainable, settings) in enumerate(kinds):
            model, previous = self.models[k], self.models[k - 1] if k else None
            kind = make(toy_rows(1 + k, (24, 18, 16)[k]), trained_names(model, trainable), **settings)
            own = {
                "trainable": trainable,
                "weight_decay": kind.decay,
                "curvature": "hessian",
                "solver": solvers.Dense(),
            }
            if k:
                model.load_state_dict(parameters_of(previous, "encoder."), strict=False)
            start = parameters_of(model)
            if make is Run:
                kind.record(model, folder / str(k), previous, trainable)
                own |= {"link": "unrolled", "run": folder / str(k)}
            else:
                start = kind.end(model, start, self.ends[-1] if k else None)
                model.load_state_dict(start)
                own["alpha"] = kind.alpha
            stages.append(Stage(f"stage{k}", model, ToyObjective(), kind.rows, **own))
            self.kinds.append(kind)
            self.starts.append(start)  # a minimum is followed from where it is
            self.ends.append(parameters_of(model))
        self.chain = MultiStageInfluence(stages, progress=False)

    def losses(self, stage, weights):
        """Test losses after all stages with weights on the rows of `stage`."""
        before = None
        for k, kind in enumerate(self.kinds):
            start, own = dict(self.starts[k]), weights if k == stage else None
            if before is not None:
                handed = {n: p for n, p in before.items() if n.startswith("encoder.")}
                start |= {n: p for n, p in handed.items() if isinstance(kind, Run) or n not in kind.trained}
            if isinstance(kind, Run):
                if kind.alpha:
                    kind.anchors = {n: before[n] for n in handed if n in kind.trained}
                before = kind.end(self.models[k], start, own)
            else:
                before = kind.end(self.models[k], start, before, own)
        return example_losses(self.models[-1], before, TESTS)[0].detach()


RUN, MINIMUM = (Run, "all", {"momentum": 0.5}), (Minimum, "all", {"alpha": 0.3})
