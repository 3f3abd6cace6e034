"""The state of a model, to compare it before and after."""

import torch


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(found, expected):
    assert set(found) == set(expected)
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


def photograph(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": {n: [list(vars(m)[h].values()) for h in hooks] for n, m in model.named_modules()},
        "forward": {n: vars(m).get("forward") for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.dtype, p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.dtype) for n, b in model.named_buffers()},
        "attention": model.config._attn_implementation,
        "values": {n: hash(t.double().numpy().tobytes()) for n, t in model.state_dict().items()},
    }
