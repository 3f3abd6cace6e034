"""A small smooth model and an independent dense oracle for it: chains solved to stationarity by Newton's method in
float64."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_msif.objectives import Objective, Terms

INPUTS = 3


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, width=3, classes=3, **kwargs):
        super().__init__(**kwargs)
        self.width, self.classes = width, classes


class ToyBase(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "encoder"

    def __init__(self, config):
        super().__init__(config)
        self.lower = torch.nn.Linear(INPUTS, config.width)
        # An affine layer norm whose gain is decayed: undecayed it would grow for ever against the decayed `upper`.
        self.gain = torch.nn.Parameter(torch.ones(config.width))
        self.shift = torch.nn.Parameter(torch.zeros(config.width))
        self.upper = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x):
        hidden = torch.nn.functional.layer_norm(torch.tanh(self.lower(x)), (self.config.width,), self.gain, self.shift)
        return torch.tanh(self.upper(hidden))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "encoder"
    encoder_class = ToyBase

    def __init__(self, config):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.head = torch.nn.Linear(config.width, config.classes)
        self.post_init()

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.head(self.encoder(x)))


def toy(seed, model_class=ToyModel, **config):
    torch.manual_seed(seed)
    model = model_class(ToyConfig(**config)).double().eval()
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return model


def toy_rows(seed, size, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (size,), generator=generator)
    return [{"example_id": i, "x": x[i].tolist(), "label": int(y[i])} for i in range(size)]


@dataclass(frozen=True)
class ToyObjective(Objective):
    """Cross-entropy; an example counts as often as its number of terms says, so that sums and means differ."""

    def collate(self, rows):
        return {
            "x": torch.tensor([row["x"] for row in rows], dtype=torch.float64),
            "labels": torch.tensor([row["label"] for row in rows]),
            "terms": torch.tensor([1.0 + row["example_id"] % 2 for row in rows], dtype=torch.float64),
        }

    def losses(self, call, batch):
        logits = call(x=batch["x"]).logits
        sums = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none") * batch["terms"]
        return sums, batch["terms"]

    def terms(self, call, batch):
        sums, counts = self.losses(call, batch)
        owners = torch.arange(len(sums), device=sums.device).repeat_interleave(counts.long())
        return Terms((sums / counts)[owners], owners)


def example_losses(model, parameters, rows):
    batch = ToyObjective().collate(rows)
    return ToyObjective().losses(lambda **kw: torch.func.functional_call(model, parameters, kwargs=kw), batch)


def decayed(name):
    return "bias" not in name


def flat(parameters, names):
    return torch.cat([parameters[n].reshape(-1) for n in names])


def unflat(vector, parameters, names):
    pieces = vector.split([parameters[n].numel() for n in names])
    return {n: piece.view_as(parameters[n]) for n, piece in zip(names, pieces, strict=True)}


def minimise(objective, start, names):
    """Damped Newton to ‖gradient‖ < 1e-12 with the dense double-backward Hessian; returns the parameters."""
    parameters = {n: p.detach().clone() for n, p in start.items()}
    fixed = {n: p for n, p in parameters.items() if n not in names}

    def f(vector):
        return objective({**fixed, **unflat(vector, parameters, names)})

    x = flat(parameters, names)
    for _ in range(200):
        leaf = x.clone().requires_grad_()
        value = f(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        if gradient.norm() < 1e-12:
            break
        hessian = torch.autograd.functional.hessian(f, x)
        values, vectors = torch.linalg.eigh(hessian)
        step = -(vectors @ ((vectors.T @ gradient) / values.abs().clamp(min=1e-8)))
        size = 1.0
        with torch.no_grad():
            while f(x + size * step) > value + 1e-12 * value.abs() and size > 1e-10:
                size /= 2
        x = x + size * step
    assert gradient.norm() < 1e-9, f"Newton stopped at gradient norm {gradient.norm():.1e}"
    return {**fixed, **unflat(x, parameters, names)}


def dense_hessian(model, names, rows):
    values = {n: p.detach() for n, p in model.named_parameters()}

    def objective(vector):
        sums, counts = example_losses(model, {**values, **unflat(vector, values, names)}, rows)
        return sums.sum() / counts.sum()

    return torch.autograd.functional.hessian(objective, flat(values, names))


def dense_gauss_newton(model, names, rows):
    """Rows of J by one backward pass each; H_out = terms · (diag(p) − ppᵀ)."""
    batch, leaves = ToyObjective().collate(rows), [model.get_parameter(n) for n in names]
    logits = model(batch["x"]).logits
    gradients = [torch.autograd.grad(z, leaves, retain_graph=True, allow_unused=True) for z in logits.flatten()]
    jacobian = torch.stack(
        [
            torch.cat([(g if g is not None else 0 * p).flatten() for g, p in zip(row, leaves, strict=True)])
            for row in gradients
        ]
    ).detach()
    p = logits.detach().softmax(1)
    outer = [t * (torch.diag(q) - torch.outer(q, q)) for q, t in zip(p, batch["terms"], strict=True)]
    return jacobian.T @ torch.block_diag(*outer) @ jacobian / batch["terms"].sum()
