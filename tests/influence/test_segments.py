"""The segments link: against the unrolled link, against autograd through written-out runs, and from files."""

import pytest
import torch
from helpers.runs import PATTERNS, ROWS, TESTS, Run, pair, trained_names, unrolled_chain
from helpers.toy import toy_rows
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_msif import MultiStageInfluence, Stage, objectives, solvers
from hf_msif.training import trajectory
from hf_msif.training.optimisers import SGD, AdamW
from hf_msif.training.recording import Recording

EXACT = {"link": "segments", "curvature": "hessian", "solver": solvers.Auto(tol=1e-12)}


def states(msif):
    """Every state of the unrolled last stage."""
    link = msif.stages[-1].differentiation
    slots = [link.recording.state(0)]
    for t in range(link.recording.steps):
        slots.append(link.replay.forward(slots[-1], t))
    return slots


def at(model, slots):
    """Copies of the model with the parameters of each state."""
    from copy import deepcopy

    models = []
    for state in slots:
        models.append(deepcopy(model))
        for name, value in state["parameters"].items():
            models[-1].get_parameter(name).data.copy_(value)
    return models


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize(("trainable", "alpha"), [("all", None), ("all", 0.3), ("head", None), (PATTERNS, None)])
def test_one_step_per_segment_is_the_unrolled_link(tmp_path, trainable, alpha, momentum):
    before, model = pair()
    rows = toy_rows(3, ROWS)
    run = Run(rows, trained_names(model, trainable), momentum=momentum, warmup=2, alpha=alpha, batch=ROWS, epochs=6)
    run.record(model, tmp_path, before, trainable)
    unrolled = unrolled_chain(run, before, model, tmp_path, trainable)
    reference = unrolled.query(TESTS)
    recording, every = Recording.from_pretrained(tmp_path), states(unrolled)
    steps = recording.steps
    given = trajectory.of_models(at(model, every[:steps]), range(steps), recording.schedule.rates, recording.optimiser)
    msif = unrolled_chain(run, before, model, None, trainable, **EXACT, checkpoints=given, alpha=alpha)
    query = msif.query(TESTS)
    for stage, data in (("first", toy_rows(2, 12)), ("second", rows)):
        expected = reference.score(data, stage=stage).influences()
        found = query.score(data, stage=stage).influences()
        assert abs(found - expected).max() < 1e-8 * abs(expected).max()


# A quadratic objective --------------------------------------------------------------------------------------------


class Lines(PreTrainedModel):
    """x·w + z·v + q·c, of which w and v are the encoder."""

    config_class = PretrainedConfig
    base_model_prefix = "encoder"

    def __init__(self, config=None):
        super().__init__(config or PretrainedConfig())
        self.encoder = torch.nn.Module()
        self.encoder.w = torch.nn.Parameter(torch.zeros(4))
        self.encoder.v = torch.nn.Parameter(torch.zeros(3))
        self.c = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return ModelOutput(logits=x @ torch.cat([self.encoder.w, self.encoder.v, self.c]))


class Squares(objectives.Objective):
    """½ (prediction − y)²; the prediction itself where y is NaN, whose gradient is the same everywhere."""

    def collate(self, rows):
        return {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in ("x", "y")}

    def losses(self, call, batch):
        prediction, linear = call(x=batch["x"]).logits, batch["y"].isnan()
        error = prediction - batch["y"].nan_to_num()
        return torch.where(linear, prediction, error**2 / 2), torch.ones_like(error)


def lines(seed):
    generator = torch.Generator().manual_seed(seed)
    model = Lines().double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def quadratic_rows(size=12):
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (9, 1))
    return [{"example_id": i, "x": a.tolist(), "y": float(b)} for i, (a, b) in enumerate(zip(x, y, strict=True))]


FIXED = {"encoder.w": 0.5, "encoder.v": 2.0, "c": 3.0}  # P
RATES = [0.02 * (t + 1) if t < 5 else 0.1 * (1 - t / 30) for t in range(24)]
NAMES = ["encoder.w", "c"]  # v is frozen
FORCE = torch.linspace(-1, 2, 9, dtype=torch.float64)


def written_out(optimiser, start, frozen, force, rows):
    """The end of a run of which every step is differentiable; AdamW has the fixed preconditioner `FIXED`."""
    p, batch = dict(start), Squares().collate(rows)
    m = {n: torch.zeros_like(t) for n, t in p.items()}
    for t, rate in enumerate(RATES, 1):
        error = batch["x"] @ torch.cat([p["encoder.w"], frozen, p["c"]]) - batch["y"]
        slopes = error @ batch["x"] / len(rows) + force * FORCE
        g = {"encoder.w": slopes[:4], "c": slopes[7:]}
        for n in p:
            if isinstance(optimiser, AdamW):
                m[n] = optimiser.beta1 * m[n] + (1 - optimiser.beta1) * g[n]
                p[n] = p[n] * (1 - rate * optimiser.weight_decay) - rate * FIXED[n] * m[n] / (1 - optimiser.beta1**t)
            else:
                g[n] = g[n] + optimiser.weight_decay * p[n]
                m[n] = optimiser.momentum * m[n] + g[n]
                p[n] = p[n] - rate * (g[n] + optimiser.momentum * m[n] if optimiser.nesterov else m[n])
    return p


OPTIMISERS = [
    SGD(),
    SGD(momentum=0.7),
    SGD(momentum=0.7, nesterov=True, weight_decay=0.2),
    AdamW(beta1=0.0, weight_decay=0.3),
    AdamW(beta1=0.8),
]


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=str)
def test_exact_on_a_quadratic_for_any_number_of_segments(optimiser, segments):
    rows, before, model = quadratic_rows(), lines(1), lines(2)
    model.encoder.load_state_dict(before.encoder.state_dict())
    start = {n: model.get_parameter(n).detach().clone().requires_grad_() for n in NAMES}
    frozen = model.encoder.v.detach().clone().requires_grad_()
    force = torch.zeros((), dtype=torch.float64, requires_grad=True)
    end = written_out(optimiser, start, frozen, force, rows)
    test = {"x": rows[3]["x"], "y": 2.0}
    final = torch.cat([end["encoder.w"], frozen, end["c"]])
    loss = (final @ torch.tensor(test["x"], dtype=torch.float64) - test["y"]) ** 2 / 2
    on_force, on_w, on_v = torch.autograd.grad(loss, [force, start["encoder.w"], frozen])
    for n, value in end.items():
        model.get_parameter(n).data.copy_(value.detach())
    moments = None
    if isinstance(optimiser, AdamW):
        v = {n: (torch.full_like(p, 1 / FIXED[n]) - optimiser.eps) ** 2 for n, p in model.named_parameters()}
        moments = [v] * segments
    steps = [round((i + 0.5) * len(RATES) / segments) for i in range(segments)]
    given = trajectory.of_models([model] * segments, steps, RATES, optimiser, NAMES, moments)
    first = Stage("first", before, Squares(), rows, weight_decay=0.1, curvature="hessian", solver=solvers.Dense())
    second = Stage("second", model, Squares(), rows, trainable=NAMES, checkpoints=given, **EXACT)
    msif = MultiStageInfluence([first, second], progress=False)
    adjoint, _ = msif.measurement([{"example_id": 0, **test}])
    solution, inherited = msif.stages[1].differentiation.pull_back(adjoint)
    assert (inherited["encoder.w"][0] - on_w).abs().max() < 1e-8 * on_w.abs().max()
    assert (inherited["encoder.v"][0] - on_v).abs().max() < 1e-8 * on_v.abs().max()
    linear = [{"example_id": 0, "x": FORCE.tolist(), "y": float("nan")}]
    influence = solution.influence(Squares().collate(linear), linear).influence
    assert abs(float(influence) - float(on_force)) < 1e-8 * abs(float(on_force))
