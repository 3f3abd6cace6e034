"""Derivatives against finite differences of, and plain autograd through, an ordinary copy of the model, in float64."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import tiny
from helpers.tiny import dense_gauss_newton

from hf_msif import vectors
from hf_msif.adapters.functional import ConstantPadding, FunctionalModel
from hf_msif.curvature import derivatives, gauss_newton
from hf_msif.curvature.derivatives import Evaluation

CASES = {"masked": "bert", "classification": "bert", "causal": "gpt2", "bidirectional": "elmo", "characters": "elmo"}


class Case:
    def __init__(self, task, size=3):
        name = CASES[task]
        if task in ("classification", "characters"):
            self.before = tiny.model(name, "bidirectional" if name == "elmo" else "masked")
            self.user = tiny.finetuned(self.before, name, num_labels=3)
        else:
            self.before, self.user = None, tiny.model(name, task)
        objective = tiny.objective(task)
        rows = tiny.rows(size, seed=4, classes=3, longest=6, shortest=2)
        self.batch = objective.collate(rows)
        assert self.batch["attention_mask"].min() == 0, "the batch should be padded"
        self.model = FunctionalModel(self.user)
        self.evaluation = Evaluation(self.model, objective, self.batch)
        self.plain = tiny.Plain(self.user, task, self.batch)
        self.names = tuple(self.model.parameters)

    def direction(self, columns=1, seed=0, names=None):
        return tiny.block({n: self.model.parameters[n] for n in names or self.names}, columns, seed)

    def run(self, function, *args, **kwargs):
        with self.model.evaluating():
            return function(kwargs.pop("evaluation", self.evaluation), *args, **kwargs)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def masked():
    return Case("masked")


def test_losses_are_those_of_the_plain_model(case):
    sums, counts = case.run(lambda e: e.losses({}))
    torch.testing.assert_close(sums, case.plain.sums().detach(), rtol=1e-12, atol=1e-12)
    owners = torch.bincount(case.plain.scored()[2], minlength=len(sums))
    torch.testing.assert_close(counts, owners.to(counts))


def test_dropout_is_off_though_configured(case):
    assert case.user.training
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in case.user.modules())
    v = vectors.column(case.direction(), 0)
    first, second = (case.run(derivatives.directional_derivatives, v)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradient(case):
    """Tensor by tensor: the slope along a random direction in that tensor alone."""
    gradient = case.run(derivatives.gradient, case.names)
    v = vectors.column(case.direction(seed=1), 0)
    for name in case.names:
        expected = case.plain.along({name: v[name]}, lambda: case.plain.sums().sum())
        torch.testing.assert_close(
            (gradient[name] * v[name]).sum(), expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_example_gradients_are_those_of_each_example_alone(case):
    gradients = case.run(derivatives.example_gradients, case.names)
    sums = case.plain.sums()
    for i, example_sum in enumerate(sums):
        tiny.close(vectors.column(gradients, i), case.plain.gradient(case.names, of=example_sum), 1e-12)


def test_directional(case):
    v = vectors.column(case.direction(seed=2), 0)
    slopes, sums, counts = case.run(derivatives.directional_derivatives, v)
    torch.testing.assert_close(slopes, case.plain.along(v, case.plain.sums), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(sums, case.plain.sums().detach(), rtol=1e-12, atol=1e-12)
    assert counts.shape == sums.shape


def test_hessian_product(case):
    v = case.direction(columns=2, seed=3)
    product = case.run(derivatives.hessian_product, v, case.names)
    for q in range(2):
        expected = case.plain.along(vectors.column(v, q), lambda: case.plain.gradient(case.names))
        tiny.close(vectors.column(product, q), expected, 1e-7)


def test_hessian_is_symmetric(case):
    """uᵀHv = vᵀHu for every pair of four vectors."""
    v = case.direction(columns=4, seed=4)
    matrix = vectors.flatten(v) @ vectors.flatten(case.run(derivatives.hessian_product, v, case.names)).T
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-10 * float(matrix.abs().max()))


@pytest.mark.parametrize("task", ["masked", "classification", "bidirectional", "characters"])
def test_mixed_product(task):
    """∂/∂encoder ⟨∇_head ℓ, v⟩: v lives on the head, the result on the encoder."""
    case = Case(task)
    encoder = tuple(n for n in case.names if n.startswith(("bert.", "elmo.")) and "pooler" not in n)
    head = tuple(n for n in case.names if n not in encoder)
    v = case.direction(columns=2, seed=5, names=head)
    product = case.run(derivatives.hessian_product, v, encoder)
    for q in range(2):
        expected = case.plain.along(vectors.column(v, q), lambda: case.plain.gradient(encoder))
        tiny.close(vectors.column(product, q), expected, 1e-7)


def test_product_on_parameters_in_which_the_loss_is_linear_is_zero():
    class Linear:
        def losses(self, call, batch):
            logits = call(**batch).logits
            return logits.sum(1), torch.ones(len(logits))

    case = Case("classification")
    inputs = {k: case.batch[k] for k in ("input_ids", "attention_mask")}
    v = case.direction(columns=2, names=("classifier.bias",))
    product = case.run(
        derivatives.hessian_product, v, ("classifier.bias",), evaluation=Evaluation(case.model, Linear(), inputs)
    )
    assert product["classifier.bias"].shape == (2, 3)
    assert not product["classifier.bias"].any()


@pytest.mark.slow
def test_gauss_newton_product(case):
    v = case.direction(columns=3, seed=6)
    product = case.run(gauss_newton.gauss_newton_product, v)
    dense = dense_gauss_newton(case.plain, case.names)
    expected = vectors.unflatten(vectors.flatten(v) @ dense.T, v)
    tiny.close(product, expected, 1e-11)
    # That it is not the Hessian by another name.
    hessian = case.run(derivatives.hessian_product, v, case.names)
    assert max(float((hessian[n] - product[n]).abs().max()) for n in case.names) > 1e-3


def test_gauss_newton_is_symmetric_and_positive_semidefinite(case):
    v = case.direction(columns=6, seed=7)
    matrix = vectors.flatten(v) @ vectors.flatten(case.run(gauss_newton.gauss_newton_product, v)).T
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-10 * float(matrix.abs().max()))
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.abs().max()


PRODUCTS = {
    "hessian": lambda e, v: derivatives.hessian_product(e, v, tuple(v)),
    "gauss_newton": gauss_newton.gauss_newton_product,
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_columns_together_equal_one_at_a_time(masked, product):
    v = masked.direction(columns=3, seed=8)
    together = masked.run(product, v)
    for q in range(3):
        single = masked.run(product, {n: t[q : q + 1] for n, t in v.items()})
        tiny.close(single, {n: t[q : q + 1] for n, t in together.items()}, 1e-12)


@pytest.fixture(scope="module")
def padding_read():
    """A batch that reads the padding token as a word, as BERT's masking may draw it; its row is tied to the output."""
    case = Case("masked")
    embedding = case.user.get_input_embeddings()
    assert embedding.weight is case.user.get_output_embeddings().weight
    case.batch["input_ids"][:, 1] = embedding.padding_idx
    case.plain = tiny.Plain(case.user, "masked", case.batch)
    return case


def test_a_lookup_at_padding_idx_is_a_constant_in_all_derivatives(padding_read):
    """PyTorch gives it no gradient, and forward mode no tangent."""
    case = padding_read
    v = case.direction(columns=3, seed=10)
    slopes = case.run(derivatives.directional_derivatives, vectors.column(v, 0))[0]
    for i, example_sum in enumerate(case.plain.sums()):
        gradient = case.plain.gradient(case.names, of=example_sum)
        expected = sum((gradient[n] * v[n][0]).sum() for n in case.names)
        torch.testing.assert_close(slopes[i], expected.detach(), rtol=1e-12, atol=1e-12)
    dense = dense_gauss_newton(case.plain, case.names)
    expected = vectors.unflatten(vectors.flatten(v) @ dense.T, v)
    for q in range(3):  # the first column of a product and the others are computed differently
        alone = case.run(gauss_newton.gauss_newton_product, {n: t[q:] for n, t in v.items()})
        tiny.close(alone, {n: t[q:] for n, t in expected.items()}, 1e-11)
    matrix = vectors.flatten(v) @ vectors.flatten(case.run(derivatives.hessian_product, v, case.names)).T
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-10 * float(matrix.abs().max()))


@pytest.mark.parametrize("lookup", [torch.embedding, lambda w, i, p: torch.nn.functional.embedding(i, w, p - len(w))])
def test_other_lookups_at_padding_idx(lookup):
    """Without a module, and with a row that is counted from the end."""
    table, tokens = torch.randn(5, 3), torch.tensor([[1, 0, 4]])
    with forward_ad.dual_level(), ConstantPadding():
        dual = forward_ad.make_dual(table, torch.ones_like(table))
        tangent = forward_ad.unpack_dual(lookup(dual, tokens, 0)).tangent
        every = forward_ad.unpack_dual(torch.embedding(dual, tokens)).tangent
    assert tangent.sum(2).tolist() == [[3, 0, 3]]
    assert every.sum(2).tolist() == [[3, 3, 3]]


class Calls:
    """Counts the runs of a module."""

    def __init__(self, module):
        self.number = 0
        module.register_forward_hook(self)

    def __call__(self, *_):
        self.number += 1


def test_all_columns_of_a_gauss_newton_product_share_one_run_of_the_model(masked):
    run = Calls(masked.user)
    masked.run(gauss_newton.gauss_newton_product, masked.direction(columns=4, seed=8))
    assert run.number == 1


class OnceDifferentiable(torch.autograd.Function):
    """x², with a forward-mode derivative and a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):
        return 2 * ctx.saved_tensors[0] * t


class Hiding(OnceDifferentiable):
    """The same with a backward pass that autograd takes for a constant."""

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g.detach()


class PlainSquare:
    apply = staticmethod(torch.square)


@pytest.mark.parametrize("hidden", [OnceDifferentiable, Hiding])
@pytest.mark.parametrize("position", ["everywhere", "beside another path", "last"])
def test_a_backward_pass_that_cannot_be_differentiated_costs_time_alone(hidden, position):
    """No column is wrong, also after a first one that is zero, and the third product does not try again."""

    class Model(torch.nn.Module):
        def __init__(self, square):
            super().__init__()
            self.square, self.first, self.second = square, torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            if position == "last":
                return {"logits": self.square.apply(self.second(torch.tanh(self.first(x))))}
            hidden = self.first(x)
            squared = self.square.apply(hidden)
            return {"logits": self.second(squared if position == "everywhere" else squared + hidden)}

    class Squares:
        def losses(self, call, batch):
            sums = (call(x=batch["x"])["logits"] ** 4).sum(1)
            return sums, torch.ones_like(sums)

    batch = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    products, runs = [], []
    for square in (PlainSquare, hidden):
        torch.manual_seed(0)
        model = Model(square).double()
        functional, run = FunctionalModel(model), Calls(model)
        evaluation = Evaluation(functional, Squares(), batch)
        v = tiny.block(functional.parameters, 3, seed=1)
        after_zero = {name: torch.cat([torch.zeros_like(t[:1]), t[1:]]) for name, t in v.items()}
        for block in (after_zero, v, v):
            with functional.evaluating():
                products.append(gauss_newton.gauss_newton_product(evaluation, block))
            runs.append(run.number)
        assert functional.linear_backward is (square is PlainSquare)
    assert runs == [4, 5, 6, 4, 8, 11]  # a first column that is zero says nothing
    for number in (2, 4, 5):
        tiny.close(products[number], products[1], 1e-12)
    for product in (products[0], products[3]):
        assert not any(t[0].any() for t in product.values())
        tiny.close({n: t[1:] for n, t in product.items()}, {n: t[1:] for n, t in products[1].items()}, 1e-12)


def test_a_loss_that_is_linear_in_the_outputs_has_no_gauss_newton_matrix():
    class Linear:
        def losses(self, call, batch):
            logits = call(**batch).logits
            return logits.sum(1), torch.ones(len(logits))

    case = Case("classification")
    inputs = {k: case.batch[k] for k in ("input_ids", "attention_mask")}
    v = case.direction(columns=2)
    product = case.run(gauss_newton.gauss_newton_product, v, evaluation=Evaluation(case.model, Linear(), inputs))
    assert {n: t.shape for n, t in product.items()} == {n: t.shape for n, t in v.items()}
    assert not any(t.any() for t in product.values())


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_an_empty_sentence_adds_nothing(masked, product):
    """Its row has no masked token, and in a batch with others is nearly all padding."""
    objective = tiny.objective("masked")
    full = tiny.rows(2, seed=4)
    v = masked.direction(columns=1, seed=9)
    with_it, without = (
        Evaluation(masked.model, objective, objective.collate(rows))
        for rows in ([*full, {"example_id": 9, "text": ""}], full)
    )
    tiny.close(masked.run(product, v, evaluation=with_it), masked.run(product, v, evaluation=without), 1e-11)


# task, what is trained, what must run once, what must run again.
FROZEN = {
    "whole encoder, masked": ("masked", ("cls.",), "bert.encoder.layer.0.output", "cls.predictions.transform"),
    "whole encoder, classification": ("classification", ("classifier.",), "bert.encoder.layer.0.output", "classifier"),
    "embeddings alone": (
        "masked",
        ("cls.", "bert.encoder."),
        "bert.embeddings.LayerNorm",
        "bert.encoder.layer.0.output",
    ),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize(("task", "trained", "once", "again"), FROZEN.values(), ids=FROZEN)
def test_a_frozen_part_runs_once(task, trained, once, again, product):
    case = Case(task)
    v = case.direction(columns=2, seed=10, names=[n for n in case.names if n.startswith(trained)])
    expected = case.run(product, v)
    once, again = (Calls(case.user.get_submodule(path)) for path in (once, again))
    remembering = Evaluation(case.model, case.evaluation.objective, case.batch, memo={})
    for number in (1, 2, 3):
        tiny.close(case.run(product, v, evaluation=remembering), expected, 1e-13)
        assert once.number == 1
        assert again.number >= number
    assert not any("forward" in vars(m) for m in case.user.modules())


def test_a_memo_is_not_used_for_what_varies(masked):
    """One evaluation serves the curvature of the head (encoder constant) and the mixed derivative (it varies)."""
    encoder = tuple(n for n in masked.names if n.startswith("bert."))
    head = tuple(n for n in masked.names if n not in encoder)
    v = masked.direction(columns=1, seed=11, names=head)
    expected = masked.run(derivatives.hessian_product, v, encoder)
    remembering = Evaluation(masked.model, masked.evaluation.objective, masked.batch, memo={})
    masked.run(gauss_newton.gauss_newton_product, v, evaluation=remembering)
    assert remembering.memo
    tiny.close(masked.run(derivatives.hessian_product, v, encoder, evaluation=remembering), expected, 1e-13)
