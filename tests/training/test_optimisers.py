"""Optimisers: their steps against `torch.optim`, their hand-written vector-Jacobian products against autograd."""

import pytest
import torch

from hf_msif.training.optimisers import SGD, AdamW, clipped, clipped_vjp

RATE, COLUMNS = 0.1, 3
SHAPES = {"vector": (5,), "matrix": (4, 3), "scalar": ()}
KINDS = {
    "sgd": SGD(),
    "sgd, decay": SGD(weight_decay=0.1),
    "momentum": SGD(momentum=0.9),
    "momentum, decay": SGD(momentum=0.9, weight_decay=0.1),
    "nesterov": SGD(momentum=0.9, nesterov=True),
    "nesterov, decay": SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": AdamW(eps=1e-3),
    "adamw, decay": AdamW(0.8, 0.95, 1e-8, weight_decay=0.1),
    "adamw, eps inside the root": AdamW(0.8, 0.95, 1e-2, eps_inside_root=True, weight_decay=0.1),
}
EVERY_KIND = pytest.mark.parametrize("optimiser", KINDS.values(), ids=KINDS)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autograd_vjp(function, inputs, cotangents):
    """Jᵀλ of every input, one column at a time."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(leaves)
    columns = [
        torch.autograd.grad(
            outputs, leaves, [c[q] for c in cotangents], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for q in range(COLUMNS)
    ]
    return [torch.stack(column) for column in zip(*columns, strict=True)]


def buffers_of(optimiser, shape):
    """As some earlier steps may have left them; second moments are not negative."""
    buffers = [drawn(3 + i, *shape) for i, _ in enumerate(optimiser.buffers)]
    return [*buffers[:1], *(b**2 for b in buffers[1:])]


def compare(optimiser, p, g, buffers, step):
    cotangents = [drawn(10 + i, COLUMNS, *p.shape) for i in range(1 + len(buffers))]
    before = [c.clone() for c in cotangents]

    def update(leaves):
        return optimiser.update(leaves[0], leaves[1], tuple(leaves[2:]), RATE, step, optimiser.weight_decay)

    expected = autograd_vjp(update, [p, g, *buffers], cotangents)
    values = optimiser.vjp(p, g, tuple(buffers), RATE, step, optimiser.weight_decay, tuple(cotangents))
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-13)
    for cotangent, original in zip(cotangents, before, strict=True):
        assert cotangent.equal(original)


@EVERY_KIND
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("step", [1, 2, 40])
def test_vjp_is_that_of_autograd(optimiser, shape, step):
    buffers = buffers_of(optimiser, shape)
    buffers = [torch.zeros_like(b) for b in buffers] if step == 1 else buffers
    compare(optimiser, drawn(1, *shape), drawn(2, *shape), buffers, step)


SMOOTH_AT_ZERO = {k: o for k, o in KINDS.items() if not k.startswith("adamw") or o.eps_inside_root}


@pytest.mark.parametrize("optimiser", SMOOTH_AT_ZERO.values(), ids=SMOOTH_AT_ZERO)
@pytest.mark.parametrize("step", [1, 3])
def test_vjp_at_zero_gradients(optimiser, step):
    zero = torch.zeros(5, dtype=torch.float64)
    compare(optimiser, drawn(1, 5), zero, [zero] * len(optimiser.buffers), step)


@pytest.mark.parametrize("eps", [1e-3, 1e-8])
def test_adam_where_no_gradient_came_yet(eps):
    """v = 0: √v has an infinite slope, but m = 0 takes it away; m itself has the slope rate/eps."""
    optimiser, zero = AdamW(0.8, 0.95, eps, weight_decay=0.1), torch.zeros(2, dtype=torch.float64)
    cotangents = tuple(drawn(10 + i, COLUMNS, 2) for i in range(3))
    step = 1 - 0.8**4
    on_p, on_g, on_m, on_v = optimiser.vjp(drawn(1, 2), zero, (zero, zero), RATE, 4, 0.1, cotangents)
    on_moment = cotangents[1] - RATE / step / eps * cotangents[0]
    torch.testing.assert_close(on_p, (1 - RATE * 0.1) * cotangents[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(on_g, 0.2 * on_moment, rtol=1e-12, atol=0)
    torch.testing.assert_close(on_m, 0.8 * on_moment, rtol=1e-12, atol=0)
    torch.testing.assert_close(on_v, 0.95 * cotangents[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimiser", [o for k, o in KINDS.items() if "inside" not in k])  # torch has no such Adam
def test_steps_are_those_of_torch(optimiser):
    p = torch.nn.Parameter(drawn(1, 4, 3))
    if isinstance(optimiser, SGD):
        settings = {"momentum": optimiser.momentum, "nesterov": optimiser.nesterov}
        reference = torch.optim.SGD([p], RATE, weight_decay=optimiser.weight_decay, **settings)
    else:
        betas = (optimiser.beta1, optimiser.beta2)
        reference = torch.optim.AdamW([p], RATE, betas, optimiser.eps, optimiser.weight_decay)
    value, buffers = p.detach().clone(), [torch.zeros(4, 3).double() for _ in optimiser.buffers]
    for t in range(5):
        p.grad = drawn(20 + t, 4, 3)
        value, *buffers = optimiser.update(value, p.grad, tuple(buffers), RATE, t + 1, optimiser.weight_decay)
        reference.step()
        torch.testing.assert_close(value, p.detach(), rtol=1e-12, atol=1e-14)


# Clipping -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [None, 0.0, 0.5, 100.0], ids=["none", "zero", "active", "inactive"])
def test_clipping_vjp_is_that_of_autograd(largest):
    gradients = {name: drawn(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    cotangents = {name: drawn(10 + i, COLUMNS, *shape) for i, (name, shape) in enumerate(SHAPES.items())}

    def function(leaves):
        return list(clipped(dict(zip(SHAPES, leaves, strict=True)), largest).values())

    expected = autograd_vjp(function, list(gradients.values()), list(cotangents.values()))
    values = clipped_vjp(gradients, largest, {name: c.clone() for name, c in cotangents.items()})
    for (name, value), wanted in zip(values.items(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)
        assert (largest == 0.5) != value.equal(cotangents[name])


@pytest.mark.parametrize("largest", [1e-8, 1.0])
def test_clipping_at_zero_gradients_is_a_scaling(largest):
    """‖g‖ has no derivative at g = 0; there the slope of the scale counts as 0, as in autograd."""
    cotangents = {"w": drawn(1, COLUMNS, 4)}
    zero = {"w": torch.zeros(4, dtype=torch.float64)}
    value = clipped_vjp(zero, largest, {"w": cotangents["w"].clone()})["w"]
    torch.testing.assert_close(value, min(1.0, largest / 1e-6) * cotangents["w"], rtol=1e-12, atol=0)
    (expected,) = autograd_vjp(lambda x: [clipped({"w": x[0]}, largest)["w"]], [zero["w"]], [cotangents["w"]])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
