"""Models with a function that has no forward-mode derivative: derivatives by backward passes alone, in float64."""

import copy
import logging

import pytest
import torch
import transformers as T
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature.derivatives import (
    Evaluation,
    NotTwiceDifferentiableError,
    directional_derivatives,
    example_gradients,
    hessian_product,
)
from hf_msif.curvature.gauss_newton import gauss_newton_product


class Plain:
    apply = staticmethod(torch.square)


class Backward(torch.autograd.Function):
    """x² without a jvp, and a backward pass that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Once(Backward):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Hiding(Backward):
    """The backward pass hides from autograd what it does."""

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g.detach()


class Network(torch.nn.Module):
    """Two paths, one of them through the function."""

    def __init__(self, square):
        super().__init__()
        torch.manual_seed(0)
        self.square, self.first, self.second = square, torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        hidden = self.first(x)
        return {"logits": self.second(self.square.apply(hidden) + hidden)}


class Quartic:
    def losses(self, call, batch):
        sums = (call(x=batch["x"])["logits"] ** 4).sum(1)
        return sums, torch.ones_like(sums)


def evaluation(square):
    batch = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    return Evaluation(FunctionalModel(Network(square)), Quartic(), batch)


@pytest.mark.parametrize("square", [Backward, Once, Hiding])
def test_directional_derivatives(square):
    """Twice: the first batch finds out which backward passes serve."""
    of, plain = evaluation(square), evaluation(Plain)
    v = vectors.column(tiny.block(of.model.parameters, 1, seed=1), 0)
    slopes, sums, _ = directional_derivatives(plain, v)
    gradients = example_gradients(plain, v)
    by_hand = sum((gradients[name] * v[name]).flatten(1).sum(1) for name in v)
    torch.testing.assert_close(slopes, by_hand, rtol=1e-12, atol=0)
    for _ in range(2):
        found = directional_derivatives(of, v)
        torch.testing.assert_close(found[0], slopes, rtol=1e-12, atol=0)
        torch.testing.assert_close(found[1], sums, rtol=1e-12, atol=0)
    assert not of.model.forward_mode
    assert plain.model.forward_mode
    assert of.model.linear_backward is (square is Backward)


def test_along_parameters_that_the_loss_does_not_read():
    of = evaluation(Backward)
    of.model.forward_mode = False
    of.model.parameters["unread"] = torch.zeros(2, dtype=torch.float64)
    slopes, _, _ = directional_derivatives(of, {"unread": torch.ones(2, dtype=torch.float64)})
    assert slopes.tolist() == [0.0] * 5


@pytest.mark.parametrize("columns", [1, 3])
def test_gauss_newton_product(columns):
    of, plain = evaluation(Backward), evaluation(Plain)
    v = tiny.block(of.model.parameters, columns, seed=2)
    v = {name: torch.cat([torch.zeros_like(t[:1]), t]) for name, t in v.items()}  # a first column of zeros
    expected = gauss_newton_product(plain, v)
    for _ in range(2):
        tiny.close(gauss_newton_product(of, v), expected, 1e-12)


@pytest.mark.parametrize("square", [Once, Hiding])
def test_without_any_derivative_of_the_backward_pass_there_is_no_product(square):
    of = evaluation(square)
    with pytest.raises(InputError, match=r"Network has no forward-mode derivative, and its backward pass cannot"):
        gauss_newton_product(of, tiny.block(of.model.parameters, 2, seed=2))


def test_a_hessian_product_lacks_nothing_without_a_word():
    """Autograd itself says nothing of the path through the function, and would return the rest."""
    of, plain = evaluation(Once), evaluation(Plain)
    v = tiny.block(of.model.parameters, 1, seed=2)
    with pytest.raises(NotTwiceDifferentiableError, match="a function of Network is marked as once_differentiable"):
        hessian_product(of, v, tuple(v))
    tiny.close(hessian_product(evaluation(Backward), v, tuple(v)), hessian_product(plain, v, tuple(v)), 1e-12)


def test_it_is_said_once(caplog):
    of = evaluation(Backward)
    v = vectors.column(tiny.block(of.model.parameters, 1, seed=1), 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            directional_derivatives(of, v)
    (record,) = caplog.records
    assert "Network has no forward-mode derivative" in record.message
    assert "test_reverse_mode.py:" in record.message


BLOOM = {"vocab_size": len(tiny.WORDS), "hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
GEMMA = {"vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
GEMMA |= {"num_attention_heads": 2, "lru_width": 16, "pad_token_id": 0}
MODELS = {
    "Bloom": lambda: T.BloomForCausalLM(T.BloomConfig(**BLOOM)),
    "RecurrentGemma": lambda: T.RecurrentGemmaForCausalLM(T.RecurrentGemmaConfig(**GEMMA)),
}


SCORED = [("Bloom", "auto"), ("Bloom", "forward"), ("Bloom", "terms"), ("RecurrentGemma", "auto")]


@pytest.mark.parametrize(("name", "score"), SCORED)
def test_scores_are_those_of_plain_backward_passes(name, score):
    """Bloom's GELU is a function of its own, without a jvp; so is a square root in RecurrentGemma, in a module that
    has parameters and no rule."""
    model, rows = tiny.perturbed(MODELS[name]().double(), 0), tiny.rows(6, seed=3)
    plain = copy.deepcopy(model)  # RecurrentGemma keeps a state, which cannot be copied once it has a graph
    objective = objectives.CausalLM(tiny.tokenizer(template=False))
    stage = Stage("only", model, objective, rows, solver=solvers.CG(damping=10.0, tol=1e-6, max_iter=300))
    query = MultiStageInfluence([stage], progress=False).query(rows[:2] if score == "auto" else rows[:1])
    u = query.solutions["only"].tensors()
    expected = []
    for row in rows:
        batch = objective.collate([row])
        gradient = tiny.Plain(plain, "causal", batch).gradient(list(u))
        expected.append(-sum((gradient[n] * t).flatten(1).sum(1) for n, t in u.items()))
    expected = torch.stack(expected)
    if score == "terms":
        table = query.token_scores(rows)
        found = torch.tensor(table.groupby("example_id")["influence"].sum().to_numpy())[:, None]
    else:
        found = torch.tensor(query.score(rows, batch_size=4).influences())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
