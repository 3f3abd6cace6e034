"""Curvature operators against dense matrices that plain autograd writes out, in float64."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from helpers import tiny
from helpers.toy import ToyObjective, dense_gauss_newton, dense_hessian, example_losses, toy, toy_rows

from hf_msif import MultiStageInfluence, Stage, solvers, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature import GaussNewton, Hessian
from hf_msif.curvature import base as module
from hf_msif.curvature.derivatives import Evaluation
from hf_msif.engine import Engine
from hf_msif.objectives import Objective

ROWS = toy_rows(1, 11)
KINDS = {"hessian": Hessian, "gauss_newton": GaussNewton}
NAMES = {"all": None, "some": ("encoder.gain", "encoder.upper.weight", "head.bias")}


def parameters(model):
    return {n: p.detach() for n, p in model.named_parameters()}


DENSE = {"hessian": dense_hessian, "gauss_newton": dense_gauss_newton}


def operator(kind, names=None, batch_size=4, ridge=None, objective=None, model=None):
    model = model or toy(0)
    names = tuple(names or dict(model.named_parameters()))
    engine = Engine(progress=False)
    functional = FunctionalModel(model, engine.device)
    return KINDS[kind](functional, objective or ToyObjective(), ROWS, names, engine, batch_size, ridge)


def matrix(curvature):
    """The operator written out, a column at a time by unit vectors."""
    like = vectors.stack([curvature.parameters])
    return vectors.flatten(curvature.matvec(vectors.unflatten(torch.eye(vectors.numel(like)).double(), like))).cpu()


def near(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_products_are_those_of_the_dense_matrix(kind, names, batch_size):
    """Rows that count once and twice: N is the number of terms, not of rows or batches."""
    curvature, model = operator(kind, names, batch_size), toy(0)
    assert curvature.count == sum(1 + row["example_id"] % 2 for row in ROWS)
    assert curvature.examples == len(ROWS)
    near(matrix(curvature), DENSE[kind](model, list(curvature.parameters), ROWS))


def test_the_two_curvatures_differ():
    model = toy(0)
    names = list(parameters(model))
    hessian, gauss_newton = dense_hessian(model, names, ROWS), dense_gauss_newton(model, names, ROWS)
    assert (hessian - gauss_newton).abs().max() > 0.01
    assert torch.linalg.eigvalsh(gauss_newton).min() > -1e-12
    assert torch.linalg.eigvalsh(hessian).min() < -1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_linear_and_symmetric(kind):
    curvature = operator(kind)
    x, y = (tiny.block(curvature.parameters, 2, seed) for seed in (1, 2))
    scale = torch.tensor([3.0, -0.5], dtype=torch.float64)
    together = curvature.matvec(vectors.add(x, y, scale))
    apart = vectors.add(curvature.matvec(x), curvature.matvec(y), scale)
    near(vectors.flatten(together), vectors.flatten(apart))
    torch.testing.assert_close(
        vectors.dot(x, curvature.matvec(y)), vectors.dot(curvature.matvec(x), y), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ridge_is_added_to_the_diagonal(kind):
    """Numbers, and tensors that broadcast: over rows, as where a resize added some."""
    rows = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    ridge = {"head.bias": 0.3, "encoder.upper.weight": rows.to(Engine(progress=False).device)}
    names = ("encoder.upper.weight", "head.weight", "head.bias")
    difference = matrix(operator(kind, names, ridge=ridge)) - matrix(operator(kind, names))
    expected = torch.cat(
        [rows.expand(3, 3).flatten(), torch.zeros(9).double(), torch.full((3,), 0.3, dtype=torch.float64)]
    )
    torch.testing.assert_close(difference, torch.diag(expected), rtol=0, atol=1e-15)


def test_a_stage_puts_the_quadratic_terms_on_their_names():
    """Weight decay on what is trained and is no bias; 2α on what is trained and inherited; nothing elsewhere."""
    before, after = toy(0), toy(1)
    after.encoder.load_state_dict(before.encoder.state_dict())
    shared = {"objective": ToyObjective(), "data": ROWS, "solver": solvers.Dense(), "curvature": "hessian"}
    trainable = ["encoder.upper.*", "encoder.gain", "head.*"]
    stages = [
        Stage("one", before, weight_decay=0.05, **shared),
        Stage("two", after, trainable=trainable, weight_decay=0.02, alpha=0.3, **shared),
    ]
    one, two = MultiStageInfluence(stages, progress=False).stages
    decayed = {"encoder.lower.weight", "encoder.gain", "encoder.shift", "encoder.upper.weight", "head.weight"}
    assert one.differentiation.ridge == dict.fromkeys([n for n in one.split.trained if n in decayed], 0.05)
    expected = {"encoder.gain": 0.62, "encoder.upper.weight": 0.62, "encoder.upper.bias": 0.6, "head.weight": 0.02}
    assert two.differentiation.ridge == pytest.approx(expected)
    operator = two.differentiation.operator
    names = list(operator.parameters)
    ridge = torch.cat([0 * p.flatten().cpu() + expected.get(n, 0.0) for n, p in operator.parameters.items()])
    near(matrix(operator), dense_hessian(after, names, ROWS) + torch.diag(ridge))


def test_mixed_and_gradient():
    model = toy(0)
    trained, frozen = ("encoder.upper.weight", "head.weight", "head.bias"), ("encoder.lower.weight", "encoder.shift")
    curvature = operator("gauss_newton", trained, ridge={"head.weight": 9.0}, model=model)
    dense = dense_hessian(model, [*trained, *frozen], ROWS)
    size = sum(p.numel() for p in curvature.parameters.values())
    v = tiny.block(curvature.parameters, 3, seed=4)
    near(vectors.flatten(curvature.mixed(v, frozen)), vectors.flatten(v).cpu() @ dense[:size, size:])

    sums, counts = example_losses(model, dict(model.named_parameters()), ROWS)
    gradients = torch.autograd.grad(sums.sum() / counts.sum(), [model.get_parameter(n) for n in trained])
    near(vectors.flatten(curvature.gradient())[0], torch.cat([g.flatten() for g in gradients]))


# The same numbers in every product ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting(ToyObjective):
    collated: list = dataclasses.field(default_factory=list)

    def collate(self, rows):
        self.collated.append([row["example_id"] for row in rows])
        return super().collate(rows)


def subset(seed, size=5, data=ROWS):
    objective = Counting()
    stage = Stage("one", toy(0), objective, data, curvature_samples=size, seed=seed, batch_size=2)
    bound = MultiStageInfluence([stage], progress=False).stage()
    objective.collated.clear()
    return bound, objective.collated


def test_the_subset_is_drawn_once():
    bound, collated = subset(seed=3)
    v = tiny.block(bound.differentiation.operator.parameters, 1, seed=0)
    first = bound.differentiation.operator.matvec(v)
    batches = [list(batch) for batch in collated]
    assert sorted(map(len, batches)) == [1, 2, 2]
    for _ in range(2):
        torch.testing.assert_close(
            vectors.flatten(bound.differentiation.operator.matvec(v)), vectors.flatten(first), rtol=0, atol=0
        )
    assert collated == batches  # nothing was collated again
    ids = {i for batch in batches for i in batch}
    assert ids == {row["example_id"] for row in bound.differentiation.curvature_rows}
    assert {row["example_id"] for row in subset(seed=3)[0].differentiation.curvature_rows} == ids
    assert {row["example_id"] for row in subset(seed=4)[0].differentiation.curvature_rows} != ids
    near(matrix(bound.differentiation.operator), dense_gauss_newton(toy(0), list(v), [ROWS[i] for i in sorted(ids)]))


@pytest.mark.parametrize("size", [None, 11, 1000])
def test_a_subset_of_all_is_the_data(size):
    bound, _ = subset(seed=3, size=size)
    assert bound.differentiation.curvature_rows == ROWS
    assert bound.differentiation.operator.examples == 11


def test_masks_are_the_same_in_every_product():
    rows, model = tiny.rows(6, seed=1), tiny.model("bert", "masked")
    stage = Stage("one", model, tiny.objective("masked"), rows, batch_size=4, trainable=["cls.*"])
    links = [MultiStageInfluence([stage], progress=False).stage() for _ in range(2)]
    v = tiny.block(links[0].differentiation.operator.parameters, 1, seed=0)
    first = links[0].differentiation.operator.matvec(v)
    for bound in (links[0], links[0], links[1]):
        tiny.close(bound.differentiation.operator.matvec(v), first, 1e-14)


# What is remembered between passes ----------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["counts", "no counts"])
def frozen(request):
    """A masked LM whose head alone is trained; its objective may not know how to count without a pass."""

    class Uncounted(Objective):
        def __init__(self, inner):
            self.inner = inner

        def collate(self, rows):
            return self.inner.collate(rows)

        def losses(self, call, batch):
            return self.inner.losses(call, batch)

    objective = tiny.objective("masked")
    model, rows = tiny.model("bert", "masked"), tiny.rows(6, seed=1)
    names = tuple(n for n, _ in model.named_parameters() if n.startswith("cls."))

    def make():
        inner = Uncounted(objective) if request.param else objective
        engine = Engine(progress=False)
        return GaussNewton(FunctionalModel(model, engine.device), inner, rows, names, engine, 2)

    return make


def test_memory_on_and_off_give_the_same(frozen, monkeypatch):
    remembering = frozen()
    v = tiny.block(remembering.parameters, 2, seed=1)
    products = [remembering.matvec(v), remembering.matvec(v)]
    assert all(e.memo for e in remembering.evaluations)

    forgetting = frozen()
    forgetting.evaluations = [dataclasses.replace(e, memo=None) for e in forgetting.evaluations]
    expected = forgetting.matvec(v)
    for product in products:
        tiny.close(product, expected, 1e-13)
    tiny.close(remembering.gradient(), forgetting.gradient(), 1e-13)
    assert remembering.count == forgetting.count


@pytest.mark.parametrize("first", ["matvec", "gradient", "count"])
def test_memory_is_bounded(frozen, monkeypatch, first):
    """Whichever pass comes first; what does not fit is computed anew."""
    monkeypatch.setattr(module, "MEMO_BYTES", 1)
    curvature = frozen()
    v = tiny.block(curvature.parameters, 1, seed=1)
    {"matvec": lambda: curvature.matvec(v), "gradient": curvature.gradient, "count": lambda: curvature.count}[first]()
    unasked = first == "count" and hasattr(curvature.evaluations[0].objective, "counts")
    assert all(e.memo is None or unasked for e in curvature.evaluations)
    monkeypatch.undo()
    tiny.close(curvature.matvec(v), frozen().matvec(v), 1e-13)


def test_token_types_reach_a_remembered_encoder():
    """An encoder whose call is replayed must not lose arguments that its signature announces."""
    from hf_msif.models import FeedForwardClassifier

    model = tiny.perturbed(FeedForwardClassifier.from_encoder(tiny.model("bert", "masked"), 4), seed=3)

    @dataclass(frozen=True)
    class Paired(type(tiny.objective("classification"))):
        def collate(self, rows):
            batch = super().collate(rows)
            return batch | {
                "token_type_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) % 2
            }

    plain = tiny.objective("classification")
    objective = Paired(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
    batch, functional = objective.collate(tiny.rows(3)), FunctionalModel(model)
    with functional.evaluating(), torch.no_grad():
        losses = [Evaluation(functional, objective, batch, memo).losses({})[0] for memo in (None, {})]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    tokens = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert not torch.equal(model(**tokens).logits, model(**tokens, token_type_ids=batch["token_type_ids"]).logits)
