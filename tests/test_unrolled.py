"""The pull-back through a recorded run: against re-running it by torch.optim with perturbed weights, against autograd
through a run written out here, and against the implicit answer where the run has converged."""

import math
from dataclasses import dataclass

import pytest
import torch
from toy import ToyObjective, example_losses, toy, toy_rows
from transformers import TrainingArguments, get_scheduler

from hf_msif import MultiStageInfluence, Stage, solvers, training
from hf_msif.recording import Recording

ROWS, BATCH, EPOCHS = 11, 4, 3  # batches of 4, 4 and 3
TESTS = toy_rows(9, 2)
DECAY = 0.03


@dataclass
class Case:
    """Settings of a run, in Hugging Face's words, and how torch does the same."""

    name: str
    arguments: dict
    optimiser: type
    settings: dict
    trainable: str = "all"
    alpha: float | None = None


SMOOTH = {"learning_rate": 0.05, "adam_beta2": 0.9, "adam_epsilon": 0.1}
CASES = [
    Case("sgd", {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}, torch.optim.SGD, {}),
    Case(
        "momentum, clipped, linear",
        {
            "optim": "sgd",
            "optim_args": "momentum=0.8",
            "learning_rate": 0.3,
            "max_grad_norm": 0.2,
            "weight_decay": 0.1,
            "warmup_steps": 3,
        },
        torch.optim.SGD,
        {"momentum": 0.8},
    ),
    Case(
        "nesterov, frozen",
        {"optim": "sgd", "optim_args": "momentum=0.8,nesterov=true", "learning_rate": 0.3},
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True},
        trainable="head",
    ),
    Case(
        "adamw, cosine, clipped",
        {**SMOOTH, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.3, "weight_decay": 0.2},
        torch.optim.AdamW,
        {"betas": (0.9, 0.9), "eps": 0.1},
    ),
    Case(
        "adamw, frozen, accumulated",
        {**SMOOTH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        torch.optim.AdamW,
        {"betas": (0.9, 0.9), "eps": 0.1},
        trainable="head",
    ),
    Case(
        "adamw, tied",
        {**SMOOTH, "lr_scheduler_type": "constant"},
        torch.optim.AdamW,
        {"betas": (0.9, 0.9), "eps": 0.1},
        alpha=0.4,
    ),
]


def names_of(case, model):
    return [n for n, _ in model.named_parameters() if case.trainable == "all" or n.startswith("head.")]


def decayed(name):
    return "bias" not in name


def arguments(folder, **settings):
    settings = {"per_device_train_batch_size": BATCH, "num_train_epochs": EPOCHS, "seed": 5, **settings}
    return TrainingArguments(str(folder), report_to=[], use_cpu=True, **settings)


@dataclass
class Setting:
    """A finished run, and what it started from."""

    case: Case
    folder: object
    before: object
    model: object
    head: dict
    rows: list
    arguments: object

    def rerun(self, weights=None, encoder=None):
        """Final test losses by torch.optim, with row weights and the pretrained encoder given."""
        model = toy(1)
        start = {n: p for n, p in self.before.named_parameters() if n.startswith("encoder.")}
        model.load_state_dict({**start, **self.head, **(encoder or {})})
        anchors = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("encoder.")}
        names, case, given = names_of(self.case, model), self.case, self.arguments
        weights = torch.ones(len(self.rows), dtype=torch.float64) if weights is None else weights
        wanted = {n: p for n, p in model.named_parameters() if n in names}
        groups = [
            {"params": [p for n, p in wanted.items() if decayed(n)], "weight_decay": given.weight_decay},
            {"params": [p for n, p in wanted.items() if not decayed(n)], "weight_decay": 0.0},
        ]
        optimiser = case.optimiser(groups, lr=given.learning_rate, **case.settings)
        steps = EPOCHS * math.ceil(len(self.rows) / BATCH)
        scheduler = get_scheduler(given.lr_scheduler_type, optimiser, given.get_warmup_steps(steps), steps)
        for rows in Recording.from_pretrained(self.folder).schedule.rows:
            parameters = dict(model.named_parameters())
            sums, counts = example_losses(model, parameters, [self.rows[i] for i in rows])
            loss = (weights[rows] * sums).sum() / counts.sum()
            loss = loss + DECAY / 2 * sum((parameters[n] ** 2).sum() for n in names if decayed(n))
            if case.alpha:
                loss = loss + case.alpha * sum(((parameters[n] - a) ** 2).sum() for n, a in anchors.items())
            optimiser.zero_grad()
            loss.backward()
            if given.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(list(wanted.values()), given.max_grad_norm)
            optimiser.step()
            scheduler.step()
        return model, example_losses(model, dict(model.named_parameters()), TESTS)[0].detach()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def setting(request, tmp_path_factory):
    return finished(request.param, tmp_path_factory.mktemp("run"))


def finished(case, folder):
    before, model, rows = toy(0), toy(1), toy_rows(3, ROWS)
    model.encoder.load_state_dict(before.encoder.state_dict())
    head = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("head.")}
    given = arguments(folder, **case.arguments)
    training.record(
        model,
        ToyObjective(),
        rows,
        given,
        folder / "run",
        previous=before,
        trainable=case.trainable,
        weight_decay=DECAY,
        alpha=case.alpha,
        progress=False,
    )
    return Setting(case, folder / "run", before, model, head, rows, given)


def chain(setting, **finetuning):
    exact = {"curvature": "hessian", "solver": solvers.Dense()}
    own = {"trainable": setting.case.trainable, "link": "unrolled", "run": setting.folder, "weight_decay": DECAY}
    first = Stage("first", setting.before, ToyObjective(), toy_rows(2, 12), weight_decay=0.1, **exact)
    return MultiStageInfluence(
        [first, Stage("second", setting.model, ToyObjective(), setting.rows, **own, **exact, **finetuning)],
        progress=False,
    )


def pulled_back(setting):
    from hf_msif.influence import pull_back

    found = chain(setting)
    return found, *pull_back(found.links[1], found.measurement(found.engine_rows(TESTS))[0])


def test_a_run_ends_where_torch_ends(setting):
    model, _ = setting.rerun()
    for name, p in setting.model.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=0, atol=1e-12)


def test_pull_back_equals_central_differences_of_rerunning(setting):
    from hf_msif.influence import pull_back

    found = chain(setting)
    rows = [{"example_id": i, **row} for i, row in enumerate(TESTS)]
    u, b, certificate = pull_back(found.links[1], found.measurement(rows)[0])
    assert certificate.replay_difference == 0.0
    step = 1e-5
    for i in range(ROWS):
        weights = torch.ones(ROWS, dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            weights[i] = 1 + sign * step
            sides.append(setting.rerun(weights)[1])
        expected = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(u["weights"][:, i], expected, rtol=1e-6, atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    encoder = {n: p.detach() for n, p in setting.before.named_parameters() if n.startswith("encoder.")}
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in encoder.items()}
        sides = [
            setting.rerun(encoder={n: p + sign * step * direction[n] for n, p in encoder.items()})[1]
            for sign in (1, -1)
        ]
        found_slope = sum((b[n] * direction[n]).flatten(1).sum(1) for n in encoder)
        torch.testing.assert_close(found_slope, (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-9)
