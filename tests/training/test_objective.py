"""F of a stage: value, gradient and ridge of its terms against formulas written out here, autograd and differences."""

import pytest
import torch
from helpers import tiny
from helpers.toy import ToyObjective, example_losses, flat, toy, toy_rows, unflat

from hf_msif import InputError
from hf_msif.adapters import decayed_names
from hf_msif.adapters.split import Split, split
from hf_msif.engine.accelerated import Engine
from hf_msif.training.objective import QuadraticTerms, StageObjective, data_term, example_weights

DECAY, ALPHA = 0.07, 0.4
OLD_ROWS, ROWS, WIDTH = 3, 5, 4
# Names on which weight decay acts, by the rule of `Trainer`: no biases, no normalisation layers.
DECAYED = ["words.weight", "temperature", "head.weight"]
TIED = ["words.weight", "norm.weight", "temperature"]


class Small(torch.nn.Module):
    """An embedding, which may be resized, a layer norm, a scalar and a head."""

    def __init__(self, rows, seed):
        super().__init__()
        self.words = torch.nn.Embedding(rows, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.temperature = torch.nn.Parameter(torch.tensor(0.0))
        self.frozen = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 2)
        generator = torch.Generator().manual_seed(seed)
        self.double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=[ROWS, OLD_ROWS], ids=["resized", "not resized"])
def case(request):
    before, after = Small(OLD_ROWS, 0), Small(request.param, 1)
    trained = ("words.weight", "norm.weight", "norm.bias", "temperature", "head.weight", "head.bias")
    inherited = {n: n for n in (*TIED, "frozen.weight", "frozen.bias")}
    resized = {"words.weight": OLD_ROWS} if request.param > OLD_ROWS else {}
    roles = Split("stage", {n: p.shape for n, p in after.named_parameters()}, inherited, trained, resized)
    parameters = {n: after.get_parameter(n).detach() for n in trained}
    return before, after, roles, parameters


def written_out(before, alpha, decay=DECAY):
    """R in words of its formula."""

    def value(parameters):
        total = decay / 2 * sum((parameters[n] ** 2).sum() for n in DECAYED)
        for n in TIED if alpha else []:
            anchor = before.get_parameter(n).detach()
            inherited = parameters[n][:OLD_ROWS] if n == "words.weight" else parameters[n]
            total = total + alpha * ((inherited - anchor) ** 2).sum()
        return total

    return value


@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_value_gradient_and_ridge_are_those_of_the_formula(case, alpha):
    before, after, roles, parameters = case
    terms = QuadraticTerms.of(after, roles, parameters, DECAY, alpha, before)
    value = written_out(before, alpha)
    torch.testing.assert_close(terms.value(parameters), value(parameters), rtol=1e-14, atol=0)
    leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    options = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(value(leaves), list(leaves.values()), **options)
    differentiated = torch.autograd.grad(terms.value(leaves), list(leaves.values()), **options)
    gradient = terms.gradient(parameters)
    names = list(parameters)
    hessian = torch.autograd.functional.hessian(lambda x: value(unflat(x, parameters, names)), flat(parameters, names))
    diagonal = unflat(hessian.diagonal(), parameters, names)
    assert hessian.equal(torch.diag(hessian.diagonal()))
    for (n, p), by_formula, by_autograd in zip(parameters.items(), expected, differentiated, strict=True):
        torch.testing.assert_close(gradient.get(n, torch.zeros_like(p)), by_formula, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(by_autograd, by_formula, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(terms.ridge.get(n, 0.0) * torch.ones_like(p), diagonal[n], rtol=1e-14, atol=0)
    assert set(gradient) == set(terms.ridge) == {*DECAYED, *(TIED if alpha else [])}


def test_gradient_is_the_central_difference_of_the_value(case):
    before, after, roles, parameters = case
    terms = QuadraticTerms.of(after, roles, parameters, DECAY, ALPHA, before)
    gradient, step = terms.gradient(parameters), 1e-3
    for n, g in gradient.items():
        for i in range(g.numel()):
            change = torch.zeros(g.numel(), dtype=torch.float64)
            change[i] = step
            ends = [parameters | {n: parameters[n] + s * change.view_as(g)} for s in (1, -1)]
            slope = (terms.value(ends[0]) - terms.value(ends[1])) / (2 * step)
            torch.testing.assert_close(slope, g.flatten()[i], rtol=1e-9, atol=1e-10)


def test_the_gradient_is_added_to_that_of_the_data(case):
    before, after, roles, parameters = case
    terms = QuadraticTerms.of(after, roles, parameters, DECAY, ALPHA, before)
    gradient = terms.gradient(parameters)
    for columns in ((), (1,)):  # plain tensors, and blocks of one column
        data = {n: torch.randn((*columns, *p.shape), dtype=torch.float64) for n, p in parameters.items()}
        copies = {n: g.clone() for n, g in data.items()}
        total = terms.gradient(parameters, data)
        assert list(total) == list(parameters)
        for n, g in total.items():
            torch.testing.assert_close(g, data[n] + gradient.get(n, 0.0), rtol=1e-14, atol=1e-15)
            assert g.shape == data[n].shape
            assert data[n].equal(copies[n])


def test_rows_that_a_resize_added_are_free():
    before, after = Small(OLD_ROWS, 0), Small(ROWS, 1)
    roles = Split("stage", {}, {"words.weight": "words.weight"}, ("words.weight",), {"words.weight": OLD_ROWS})
    parameters = {"words.weight": after.words.weight.detach()}
    terms = QuadraticTerms.of(after, roles, parameters, alpha=ALPHA, previous=before)
    assert terms.anchors["words.weight"].equal(before.words.weight)
    shift = terms.shift(parameters)["words.weight"]
    assert shift[:OLD_ROWS].equal(after.words.weight[:OLD_ROWS] - before.words.weight)
    assert shift.shape == (ROWS, WIDTH)
    for t in (shift, terms.gradient(parameters)["words.weight"], terms.ridge["words.weight"]):
        assert not t[OLD_ROWS:].any()
    assert terms.ridge["words.weight"].flatten().tolist() == [2 * ALPHA] * OLD_ROWS + [0.0] * (ROWS - OLD_ROWS)


def test_no_terms(case):
    _, after, roles, parameters = case
    terms = QuadraticTerms.of(after, roles, parameters)
    assert terms.value(parameters) == 0
    assert (terms.gradient(parameters), terms.ridge, terms.shift(parameters)) == ({}, {}, {})


def test_terms_act_on_trained_names_alone(case):
    """Frozen weights are inherited and would decay by their name; names that the caller gives replace the rule."""
    before, after, roles, parameters = case
    assert {"frozen.weight", *DECAYED} == decayed_names(after)
    terms = QuadraticTerms.of(after, roles, parameters, DECAY, ALPHA, before)
    assert (sorted(terms.decay), sorted(terms.tie)) == (sorted(DECAYED), sorted(TIED))
    reached = {n: parameters[n] for n in ("temperature", "head.weight")}
    terms = QuadraticTerms.of(after, roles, reached, DECAY, ALPHA, before)
    assert (list(terms.decay), list(terms.tie)) == (["temperature", "head.weight"], ["temperature"])
    terms = QuadraticTerms.of(after, roles, parameters, DECAY, decayed={"norm.bias"})
    assert terms.decay == {"norm.bias": DECAY}


def test_anchors_come_from_a_module_or_by_name_in_the_dtype_of_the_parameters(case):
    before, after, roles, parameters = case
    by_name = dict(before.named_parameters())
    for previous in (before, by_name):
        anchors = QuadraticTerms.of(after, roles, parameters, alpha=ALPHA, previous=previous).anchors
        assert all(anchors[n].data_ptr() == by_name[n].data_ptr() for n in TIED)
        assert not any(anchor.requires_grad for anchor in anchors.values())
    single = {n: p.float() for n, p in parameters.items()}
    terms = QuadraticTerms.of(after, roles, single, DECAY, ALPHA, before)
    tensors = [*terms.anchors.values(), *terms.shift(single).values(), *terms.gradient(single).values()]
    assert {t.dtype for t in [*tensors, terms.value(single)]} == {torch.float32}


def test_the_data_term_of_omitted_rows_keeps_n():
    rows, sums = [{"example_id": i} for i in "abc"], torch.tensor([1.0, 2.0, 4.0])
    assert float(data_term(example_weights(rows, ()), sums, 4)) == 1.75
    assert float(data_term(example_weights(rows, {"b"}), sums, 4)) == 1.25
    assert float(data_term(example_weights(rows, {"a", "c"}), sums, torch.tensor(4.0))) == 0.5


@pytest.mark.parametrize("count", [0, 0.0, torch.tensor(0.0)])
def test_a_data_term_without_counted_terms_is_zero(count):
    sums = torch.zeros(2, requires_grad=True)
    value = data_term(torch.ones(2), sums, count)
    assert float(value.detach()) == 0
    assert torch.autograd.grad(value, sums)[0].isfinite().all()


# All of F -----------------------------------------------------------------------------------------------------------


DATA, OMIT = toy_rows(2, 9), {1, 4}


def toy_case(omit=(), trainable="all", batch_size=4):
    before, after = toy(0), toy(1)
    roles = split("stage", after, before, trainable)
    engine = Engine(progress=False)
    target = StageObjective(after, ToyObjective(), DATA, roles, engine, before, DECAY, ALPHA, omit, batch_size)

    def f(parameters):
        parameters = dict(after.named_parameters()) | parameters
        sums, counts = example_losses(after, parameters, DATA)
        weights = example_weights(DATA, omit)
        value = (weights * sums).sum() / counts.sum()
        value = value + DECAY / 2 * sum((parameters[n] ** 2).sum() for n in roles.trained if "bias" not in n)
        return value + ALPHA * sum(((parameters[n] - before.get_parameter(n)) ** 2).sum() for n in roles.proximal)

    return target, f, {n: after.get_parameter(n).detach().clone() for n in roles.trained}


@pytest.mark.parametrize("omit", [(), OMIT], ids=["all rows", "rows omitted"])
@pytest.mark.parametrize("trainable", ["all", "head", ["encoder.upper.*", "encoder.gain", "head.*"]])
def test_f_its_gradient_and_its_hessian_are_those_of_the_formula(omit, trainable):
    target, f, parameters = toy_case(omit, trainable)
    names = list(parameters)
    x = flat(parameters, names)
    state = target.at()
    assert target.count == sum(1 + row["example_id"] % 2 for row in DATA)
    assert state.value == pytest.approx(float(f(parameters).detach()), rel=1e-13)
    gradient = torch.autograd.functional.jacobian(lambda y: f(unflat(y, parameters, names)), x)
    hessian = torch.autograd.functional.hessian(lambda y: f(unflat(y, parameters, names)), x)
    torch.testing.assert_close(flat(state.gradient, names), gradient, rtol=1e-11, atol=1e-13)
    v = torch.randn(2, len(x), dtype=torch.float64)
    block = {n: torch.stack([unflat(column, parameters, names)[n] for column in v]) for n in names}
    products = target.matvec(block)
    for q in range(2):
        product = flat({n: t[q] for n, t in products.items()}, names)
        torch.testing.assert_close(product, hessian @ v[q], rtol=1e-9, atol=1e-11)
    assert (target.evaluations, target.products) == (1, 2)


def test_f_is_taken_at_the_point_that_is_asked_for_and_the_model_stays():
    target, f, parameters = toy_case()
    moved = {n: p + 0.1 for n, p in parameters.items()}
    state = target.at({n: p.unsqueeze(0) for n, p in moved.items()})
    assert state.value == pytest.approx(float(f(moved).detach()), rel=1e-13)
    assert target.at().value == state.value
    assert all(target.model.model.get_parameter(n).equal(p) for n, p in parameters.items())


def test_f_of_a_resized_model_has_its_gradient():
    """Along a random direction in all parameters, new rows of the embedding included, by central differences."""
    before = tiny.model("bert", "masked")
    after = tiny.model("bert", "classification", 1, vocab_size=len(tiny.WORDS) + 2)
    rows, objective = tiny.rows(5, seed=2), tiny.objective("classification")
    roles = split("stage", after, before, resized=True)
    target = StageObjective(after, objective, rows, roles, Engine(progress=False), before, DECAY, ALPHA)
    with target.model.evaluating():
        start, step = target.at(), 1e-5
        generator = torch.Generator().manual_seed(0)
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in start.point.items()}
        ends = [target.at({n: p + s * step * direction[n] for n, p in start.point.items()}) for s in (1, -1)]
    slope = sum(float((g * direction[n]).sum()) for n, g in start.gradient.items())
    assert (ends[0].value - ends[1].value) / (2 * step) == pytest.approx(slope, rel=1e-7)


def test_inherited_parameters_need_alpha_as_a_number():
    before, after = toy(0), toy(1)
    roles = split("stage", after, before)
    for alpha, message in ((None, "give alpha"), ("auto", "needs the number itself")):
        with pytest.raises(InputError, match=message):
            StageObjective(after, ToyObjective(), DATA, roles, Engine(progress=False), before, DECAY, alpha)
