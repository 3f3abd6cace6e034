"""EK-FAC against dense matrices in float64: exactly where it is exact, by its identities elsewhere."""

import functools
from functools import partial

import numpy as np
import pytest
import torch
from cases import CASES
from helpers import tiny
from helpers.toy import ToyObjective, dense_gauss_newton, toy, toy_rows
from scipy.stats import spearmanr
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_msif import InputError, MultiStageInfluence, Stage, solvers, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature import EKFAC, EKFACPreconditioner, GaussNewton, Hessian, derivatives, fisher
from hf_msif.curvature.derivatives import Evaluation
from hf_msif.curvature.fisher import Empirical, Outputs, Sampled
from hf_msif.engine import Engine
from hf_msif.objectives import Objective, with_losses


class Enumerated:
    """Every label of every term, weighted by its probability: the mean of `Sampled` without its noise.

    Args:
        terms: most terms of an example.
        classes: number of labels.
    """

    def __init__(self, terms, classes):
        self.pairs = [(term, label) for term in range(terms) for label in range(classes)]

    def objectives(self, objective, ids):
        return [with_losses(objective, partial(self.losses, objective, *pair)) for pair in self.pairs]

    def losses(self, objective, term, label, call, batch):
        outputs = Outputs(call)
        sums, counts = objective.losses(outputs.first, batch)
        (terms,) = fisher.cross_entropies(outputs, partial(objective.losses, batch=batch), sums)
        used = torch.arange(len(terms.examples)) if terms.used is None else terms.used
        examples = terms.examples[used].tolist()
        number = torch.tensor([examples[:k].count(i) for k, i in enumerate(examples)])  # of the term in its example
        assert number.max() <= self.pairs[-1][0]
        found = terms.cotangent(torch.full((len(used), 1), label))
        scale = torch.zeros(len(terms.examples)).double()
        scale[used] = torch.where(number == term, terms.probabilities[:, label].sqrt(), 0.0)
        values = found.values.flatten(0, -2) * scale.unsqueeze(1)
        product = fisher._Product.apply(found.outputs, values.view_as(found.outputs), found.examples, len(sums))
        return product, counts


def make(model, objective, rows, names=None, kind=EKFAC, batch_size=4, ridge=None, **settings):
    engine = Engine(progress=False)
    functional = FunctionalModel(model, engine.device)
    names = names or derivatives.parameters_in_use(functional, objective, rows, functional.parameters)
    return kind(functional, objective, rows, tuple(names), engine, batch_size, ridge, **settings)


def matrix(operator):
    like = vectors.stack([operator.parameters])
    return vectors.flatten(operator.matvec(vectors.unflatten(torch.eye(vectors.numel(like)).double(), like))).cpu()


def near(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=tolerance * float(expected.abs().max()))


# Where it is exact --------------------------------------------------------------------------------------------------


class Labels(Objective):
    """Cross-entropy of one label per row, given inputs `x`."""

    def collate(self, rows):
        x = torch.tensor([row["x"] for row in rows])
        return {"x": x.double() if x.dim() > 1 else x, "y": torch.tensor([row["label"] for row in rows])}

    def losses(self, call, batch):
        sums = torch.nn.functional.cross_entropy(call(x=batch["x"]).logits, batch["y"], reduction="none")
        return sums, torch.ones_like(sums)


class Head(torch.nn.Module):
    """A first layer of zeros, so that the gradients in its outputs have the same distribution for all inputs."""

    base_model = property(lambda self: self)

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = first, torch.nn.Linear(4, 3)
        torch.nn.init.zeros_(first.weight)
        self.double()

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.last(self.first(x)))


def test_independent_inputs_and_gradients_of_a_linear_layer():
    rows = [{"example_id": i, "x": row["x"], "label": row["label"]} for i, row in enumerate(toy_rows(1, 11))]
    settings = {"rows": rows, "names": ["first.weight"]}
    model = Head(torch.nn.Linear(3, 4, bias=False))
    exact = matrix(make(model, Labels(), kind=GaussNewton, **settings))
    found = make(model, Labels(), fisher=Enumerated(1, 3), **settings)
    assert exact.abs().max() > 1e-3
    near(matrix(found), exact)
    v = tiny.block(found.parameters, 2, seed=1)
    solved = torch.linalg.solve(exact + 0.1 * torch.eye(len(exact), dtype=torch.float64), vectors.flatten(v).cpu().T).T
    near(vectors.flatten(found.inverse(v, 0.1)), solved)


def test_an_embedding_of_one_token():
    rows = [{"example_id": i, "x": i % 4, "label": i % 3} for i in range(9)]
    settings = {"rows": rows, "names": ["first.weight"]}
    model = Head(torch.nn.Embedding(6, 4))
    exact = matrix(make(model, Labels(), kind=GaussNewton, **settings))
    found = make(model, Labels(), fisher=Enumerated(1, 3), **settings)
    near(matrix(found), exact)
    assert found.blocks["first.weight"].left is None
    assert not found.blocks["first.weight"].eigenvalues[4:].any()  # tokens that do not occur


@pytest.mark.parametrize(("architecture", "layers"), [("bert", 1), ("albert", 2)])
def test_a_vectors_block_and_the_traces_are_those_of_gauss_newton(architecture, layers):
    """Several masked tokens per sentence, padding, tied embeddings, and in ALBERT a module that runs twice."""
    model = tiny.model(architecture, "masked", layers=layers, hidden_size=8, intermediate_size=12)
    objective, rows = tiny.objective("masked"), tiny.rows(3, seed=1, longest=5)
    wanted = ("word_embeddings", "0.output.LayerNorm.weight", "full_layer_layer_norm.weight", "ffn_output.bias")
    names = tuple(n for n, _ in model.named_parameters() if any(end in n for end in wanted))
    engine, functional = Engine(progress=False), FunctionalModel(model)
    most = max(objective.collate([row])["labels"].numel() for row in rows)
    found = make(model, objective, rows, names, fisher=Enumerated(most, len(tiny.WORDS)))
    exact = GaussNewton(functional, objective, rows, names, engine, 4)
    apart, whole, start = matrix(found), matrix(exact), 0
    diagonal = torch.diag(whole)
    for name in names:
        size = functional.parameters[name].numel()
        part = slice(start, start + size)
        start += size
        assert float(diagonal[part].sum()) > 1e-6
        torch.testing.assert_close(torch.diag(apart)[part].sum(), diagonal[part].sum(), rtol=1e-9, atol=0)
        if functional.parameters[name].dim() == 1:
            near(apart[part, part], whole[part, part])
    assert len(names) == 2 + (architecture == "albert")


# What holds of every fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_trace_is_that_of_all_gradients(case):
    """Σ λ = Σ_i ‖∇ℓ_i‖² / N: no rotation changes it, and no parameter is left out."""
    model, objective, rows = case.model(), case.objective(), case.rows(7, seed=1)
    found = make(model, objective, rows, fisher=Empirical(), batch_size=3)
    evaluation = Evaluation(found.model, objective, found.engine.to_device(objective.collate(rows)))
    with found.model.evaluating():
        gradients = derivatives.example_gradients(evaluation, tuple(found.parameters))
    for name, g in gradients.items():
        expected = float(g.square().sum()) / found.count
        assert float(found.blocks[name].eigenvalues.sum()) == pytest.approx(expected, rel=1e-9), name
    assert found.trace() == pytest.approx(float(vectors.dot(gradients, gradients).sum()) / found.count, rel=1e-9)
    lines = "\n".join(found.approximations())
    numbers = [int(line.split(": ")[1].split()[0].replace(",", "")) for line in lines.splitlines()]
    assert sum(numbers) == sum(p.numel() for p in found.parameters.values())


@functools.cache
def toy_fit():
    ridge = {"encoder.upper.weight": 0.3, "head.bias": 0.1}
    return make(toy(0), ToyObjective(), toy_rows(1, 11), ridge=ridge)


def test_functions_of_the_matrix_are_those_of_the_dense_matrix():
    found = toy_fit()
    dense, v = matrix(found), tiny.block(found.parameters, 2, seed=1)
    values, basis = torch.linalg.eigh(dense)
    assert float(values.min()) > -1e-12
    assert found.largest_eigenvalue() == pytest.approx(float(values[-1]))
    assert found.smallest_eigenvalue() == pytest.approx(float(values[0]), abs=1e-12)
    assert found.trace() == pytest.approx(float(values.sum()))
    expected = vectors.flatten(v).cpu() @ basis @ torch.diag(torch.exp(-2 * values)) @ basis.T
    near(vectors.flatten(found.function(v, lambda t: torch.exp(-2 * t))), expected)


def test_damping_does_not_accumulate():
    found = toy_fit()
    v = tiny.block(found.parameters, 2, seed=1)
    first = found.inverse(v, 0.2)
    found.inverse(v, 7.0)
    again = found.inverse(v, 0.2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    near(vectors.flatten(vectors.add(found.matvec(first), first, 0.2)), vectors.flatten(v))
    with pytest.raises(InputError, match=r"the smallest eigenvalue of EK-FAC is .* give a damping above 0"):
        found.inverse(v, 0.0)


def test_a_ridge_within_a_basis_has_no_closed_form():
    """Per row of an embedding it has: the vocabulary keeps its axes."""
    rows = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    device = Engine(progress=False).device
    found = make(toy(0), ToyObjective(), toy_rows(1, 11), ridge={"encoder.upper.weight": rows.to(device)})
    v = tiny.block(found.parameters, 1, seed=1)
    without = make(toy(0), ToyObjective(), toy_rows(1, 11)).matvec(v)
    difference = found.matvec(v)["encoder.upper.weight"] - without["encoder.upper.weight"]
    near(difference, rows.to(device) * v["encoder.upper.weight"])
    with pytest.raises(InputError, match=r"the quadratic terms of 'encoder.upper.weight' differ .* solve with CG"):
        found.inverse(v, 0.1)
    words = torch.arange(6.0, dtype=torch.float64).unsqueeze(1).to(device)
    data = [{"example_id": i, "x": i % 4, "label": i % 3} for i in range(9)]
    model = Head(torch.nn.Embedding(6, 4))
    table = make(model, Labels(), data, ["first.weight"], ridge={"first.weight": words})
    v = tiny.block(table.parameters, 2, seed=1)
    u = table.inverse(v, 0.1)
    near(vectors.flatten(vectors.add(table.matvec(u), u, 0.1)), vectors.flatten(v))


def test_a_fit_does_not_depend_on_batches_order_or_padding():
    """More rows than the bases take, so that the rows of the bases are a choice, too."""
    model, objective, rows = tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(50, seed=1)
    fits = [
        make(model, objective, rows, batch_size=size, basis_share=0.5) for rows, size in ((rows, 50), (rows[::-1], 7))
    ]
    fits.append(make(model, objective.unpadded(), rows, batch_size=9, basis_share=0.5))
    assert len(fits[0]._basis_rows()) == 32
    v = tiny.block(fits[0].parameters, 2, seed=1)
    first, *others = (vectors.flatten(fit.matvec(v)) for fit in fits)
    for other in others:
        near(other, first, 1e-7)
    seeded = make(model, objective, rows, batch_size=50, fisher=Sampled(seed=1)).matvec(v)
    assert (vectors.flatten(seeded) - first).norm() > 0.01 * first.norm()


# Sampled labels -----------------------------------------------------------------------------------------------------


def test_more_draws_come_closer_to_gauss_newton():
    model, rows = toy(0), toy_rows(1, 11)
    names = [n for n, _ in model.named_parameters()]
    dense = dense_gauss_newton(model, names, rows)
    trace = float(torch.trace(dense))
    gaps = {}
    for draws in (1, 60):
        found = make(model, ToyObjective(), rows, fisher=Sampled(draws))
        gaps[draws] = abs(found.trace() - trace) / trace
    assert gaps[60] < 0.1
    assert gaps[60] < gaps[1]


class Squares(Objective):
    """½ (outputs − 1)² M (outputs − 1), one example of two rows of outputs."""

    M = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)

    def collate(self, rows):
        return {"x": torch.tensor([[row["x"], row["x"][::-1]] for row in rows]).double()}

    def losses(self, call, batch):
        shifted = call(x=batch["x"]).logits - 1
        sums = 0.5 * torch.einsum("btk,kl,btl->b", shifted, self.M.to(shifted), shifted)
        return sums, torch.full_like(sums, 2.0)


def test_the_square_root_of_another_loss():
    rows, objective = toy_rows(1, 5), Squares()
    outputs = Outputs(FunctionalModel(toy(0)).bind(dict(toy(0).named_parameters())))
    batch = objective.collate(rows)
    sums, _ = objective.losses(outputs.first, batch)
    losses = partial(objective.losses, batch=batch)
    assert fisher.cross_entropies(outputs, losses, sums) is None
    roots = fisher.square_roots(outputs, losses, 5)
    near(roots.roots @ roots.roots, Squares.M.expand(10, 3, 3))
    assert roots.examples.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_padding_and_ignored_labels_have_no_term():
    model, objective, rows = tiny.model("gpt2", "causal"), tiny.objective("causal"), tiny.rows(5, seed=3, shortest=2)
    functional, batch = FunctionalModel(model), objective.collate(rows)
    outputs = Outputs(functional.bind({n: p.requires_grad_() for n, p in functional.parameters.items()}))
    sums, counts = objective.losses(outputs.first, batch)
    (terms,) = fisher.cross_entropies(outputs, partial(objective.losses, batch=batch), sums)
    assert len(terms.used) == counts.sum() < terms.outputs[..., 0].numel()
    assert torch.bincount(terms.examples[terms.used]).tolist() == counts.tolist()
    near(terms.weights, torch.ones(len(terms.used)).double())
    found = terms.sampled(lambda examples: torch.full((len(examples),), 0.5))
    unused = torch.ones(len(terms.examples), dtype=torch.bool)
    unused[terms.used] = False
    assert not found.values.flatten(0, -2)[unused].any()


class Odd(ToyObjective):
    """The square of a batch's examples' cross-entropy: no cross-entropy, and too many outputs to write out."""

    def losses(self, call, batch):
        sums, counts = super().losses(call, batch)
        return sums.exp(), counts


def test_any_other_loss_takes_its_own_gradients_and_says_so(monkeypatch):
    monkeypatch.setattr(fisher, "DENSE_OUTPUTS", 2)
    found = make(toy(0), Odd(), toy_rows(1, 11))
    with pytest.warns(UserWarning, match="the losses of Odd are neither cross-entropies nor"):
        trace = found.trace()
    assert trace == pytest.approx(make(toy(0), Odd(), toy_rows(1, 11), fisher=Empirical()).trace())


# Saving -------------------------------------------------------------------------------------------------------------


def test_a_fit_is_saved_and_found_again(tmp_path, monkeypatch):
    rows = toy_rows(1, 11)
    first = make(toy(0), ToyObjective(), rows, folder=tmp_path)
    v = tiny.block(first.parameters, 2, seed=1)
    expected = first.matvec(v)
    first.save(tmp_path / "fit.safetensors")
    monkeypatch.setattr(EKFAC, "_pass", lambda *_: pytest.fail("fitted again"))
    for found in (
        make(toy(0), ToyObjective(), rows, batch_size=3, folder=tmp_path),
        make(toy(0), ToyObjective(), rows).load(tmp_path / "fit.safetensors"),
    ):
        assert all(torch.equal(found.matvec(v)[name], expected[name]) for name in v)
    for other in (make(toy(1), ToyObjective(), rows), make(toy(0), ToyObjective(), rows[1:])):
        with pytest.raises(InputError, match="holds no fit of this curvature"):
            other.load(tmp_path / "fit.safetensors")


def test_the_next_query_finds_the_fit(tmp_path, monkeypatch):
    """In the folder of a query's checkpoints, whatever its test rows are."""
    settings = {"curvature": "ekfac", "solver": solvers.ClosedForm(), "objective": ToyObjective()}

    def query(seed):
        stage = Stage("only", toy(0), data=toy_rows(1, 11), **settings)
        chain = MultiStageInfluence([stage], progress=False)
        return chain.query(toy_rows(seed, 2), checkpoints=tmp_path / "new")

    expected = query(5).solutions["only"].u
    assert [path.name.split("-")[0] for path in (tmp_path / "new").iterdir()] == ["ekfac"]
    monkeypatch.setattr(EKFAC, "_pass", lambda *_: pytest.fail("fitted again"))
    assert all(torch.equal(query(5).solutions["only"].u[name], t) for name, t in expected.items())
    query(6)


# In a chain ---------------------------------------------------------------------------------------------------------


@functools.cache
def two_stages():
    """A BERT that has learned something of its corpus, a classifier on its encoder, and the rows of both."""
    torch.manual_seed(0)
    before = tiny.CLASSES["masked"].from_config(tiny.CONFIGS["bert"](1, initializer_range=0.1)).double().eval()
    corpus, objective = tiny.rows(40, seed=1), tiny.objective("masked")
    optimizer = torch.optim.Adam(before.parameters(), lr=5e-3)
    for epoch in range(60):
        batch = objective.of_epoch(epoch).collate(corpus)
        call = FunctionalModel(before).bind(dict(before.named_parameters()))
        sums, counts = objective.losses(call, batch)
        optimizer.zero_grad()
        (sums.sum() / counts.sum()).backward()
        optimizer.step()
    return before, tiny.finetuned(before, "bert"), corpus, tiny.rows(20, seed=2)


def scores(**pretraining):
    before, after, corpus, tweets = two_stages()
    chain = tiny.chain(before, after, data=(corpus, tweets), pretraining=pretraining)
    made = chain.query(tiny.rows(4, seed=9)).score(corpus)
    return np.stack([made.influence(q) for q in range(4)]), chain


def agreement(one, other):
    return float(np.mean([spearmanr(a, b)[0] for a, b in zip(one, other, strict=True)]))


@functools.cache
def exact_scores():
    """By the exact Gauss-Newton matrix, with λ = 0.3 times its largest eigenvalue; and λ."""
    _, chain = scores(solver=solvers.Identity())
    operator = chain.stages[0].differentiation.operator
    v = vectors.rademacher(operator.parameters, 1, seed=0)
    for _ in range(20):
        v = operator.matvec(vectors.scale(v, 1 / vectors.norm(v)))
    damping = 0.3 * float(vectors.norm(v))
    return scores(solver=solvers.CG(damping=damping, tol=1e-6))[0], damping


def test_scores_are_nearly_those_of_gauss_newton():
    """Better than those without curvature; what is left is the curvature between parameters."""
    exact, damping = exact_scores()
    found, chain = scores(curvature="ekfac", solver=solvers.ClosedForm(damping=damping))
    identity, _ = scores(solver=solvers.Identity())
    assert agreement(found, exact) >= 0.85
    assert agreement(found, exact) > agreement(identity, exact)
    certificate = chain.query(tiny.rows(4, seed=9)).solutions["pre"].certificate
    assert certificate.solver == "closed_form"
    assert max(certificate.residual) < 1e-12
    by_cg, _ = scores(curvature="ekfac", solver=solvers.CG(damping=damping, tol=1e-10))
    np.testing.assert_allclose(by_cg, found, rtol=0, atol=1e-7 * np.abs(found).max())


@functools.cache
def closely_solved_scores():
    return scores(solver=solvers.CG(tol=1e-8, max_iter=2000))[0]


@pytest.mark.slow
@pytest.mark.parametrize("preconditioner", ["nystrom", "ekfac"])
def test_scores_of_preconditioned_cg_are_those_of_gauss_newton(preconditioner):
    """At the default damping and tolerance, against a solution to 1e-8 without preconditioner."""
    found, _ = scores(solver=solvers.CG(preconditioner=preconditioner))
    assert min(spearmanr(a, b)[0] for a, b in zip(found, closely_solved_scores(), strict=True)) >= 0.99


def test_it_preconditions_the_exact_curvature():
    _, damping = exact_scores()
    _, chain = scores(solver=solvers.Identity())
    operator = chain.stages[0].differentiation.operator
    b = tiny.block(operator.parameters, 2, seed=1)
    preconditioner = EKFACPreconditioner()
    state = preconditioner.init(operator, damping)
    x, r = vectors.zeros_like(b), vectors.clone(b)
    z = preconditioner.apply(state, r)
    p, rz = vectors.clone(z), vectors.dot(r, z)
    for _ in range(60):
        product = vectors.add(operator.matvec(p), p, damping)
        step = rz / vectors.dot(p, product)
        vectors.add_(x, p, step)
        vectors.add_(r, product, -step)
        if (vectors.norm(r) <= 1e-6 * vectors.norm(b)).all():
            break
        z = preconditioner.apply(state, r)
        rz, before = vectors.dot(r, z), rz
        p = vectors.add(z, p, rz / before)
    plain = solvers.solve(operator, b, solvers.CG(damping=damping, tol=1e-10)).value
    near(vectors.flatten(x), vectors.flatten(plain), 1e-4)
    with pytest.raises(InputError, match="EKFACPreconditioner got a dict; expected a curvature"):
        preconditioner.init({}, 1.0)


def test_a_stage_names_its_settings_and_others_have_no_closed_form():
    before, _, corpus, _ = two_stages()
    settings = partial(EKFAC, fisher=Sampled(draws=2), basis_share=1.0)
    stage = Stage("pre", before, tiny.objective("masked"), corpus[:6], curvature=settings, solver=solvers.ClosedForm())
    assert stage.curvature_name == "ekfac(basis_share=1.0, fisher=Sampled(draws=2, seed=0))"
    (bound,) = MultiStageInfluence([stage], progress=False).stages
    operator = bound.differentiation.operator
    assert operator.fisher == Sampled(draws=2)
    certificate = MultiStageInfluence([stage], progress=False).query(corpus[:1]).solutions["pre"].certificate
    assert certificate.damping == pytest.approx(1e-3 * operator.largest_eigenvalue())
    for kind in (GaussNewton, Hessian):
        with pytest.raises(InputError, match=f"ClosedForm needs a curvature .* but {kind.__name__} does not"):
            solvers.ClosedForm().init(make(toy(0), ToyObjective(), toy_rows(1, 3), kind=kind))
    with pytest.raises(InputError, match=r"basis_share is 0; expected a share"):
        make(toy(0), ToyObjective(), toy_rows(1, 3), basis_share=0)


def test_the_plan_says_what_is_approximated_and_what_it_costs():
    """A product reads no row: a pull-back costs the fit, and little more per column."""
    before, _, corpus, _ = two_stages()
    settings = {"curvature": "ekfac", "solver": solvers.ClosedForm(), "batch_size": 8}
    stage = Stage("pre", before, tiny.objective("masked"), corpus, **settings)
    (bound,) = MultiStageInfluence([stage], progress=False).stages
    cost = bound.differentiation.cost(2)
    lines = [line for line in cost.text if line.startswith("curvature: ")]
    assert lines == [f"curvature: {line}" for line in bound.differentiation.operator.approximations()]
    assert len(lines) == 3
    assert cost.details["product_seconds"] < cost.details["first_product_seconds"]
    operator = bound.differentiation.operator
    parts = bound.differentiation.memory(2, 2**40, 1)
    assert parts["the curvature's bases"] == operator.held_bytes()
    assert parts["a batch's activations"] > 0
    assert operator.held_bytes() == sum(vectors.nbytes(block.parts()) for block in operator.blocks.values())
