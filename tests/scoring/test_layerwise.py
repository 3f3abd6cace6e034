"""Layer-wise scores against forward mode: every objective, eleven architectures, and layers of odd shapes."""

import pytest
import torch
from cases import CASES
from helpers import tiny
from torch import nn

from hf_msif import InputError, objectives, vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature.derivatives import Evaluation, directional_derivatives, parameters_in_use
from hf_msif.curvature.layers import LayerMap
from hf_msif.influence import Direction
from hf_msif.influence.differentiation import DirectCertificate
from hf_msif.scoring import layerwise as module
from hf_msif.scoring.layerwise import Layerwise

ARCHITECTURES = [(name, "masked") for name in tiny.MASKED] + [(name, "causal") for name in tiny.CAUSAL]
# They compute some of their layers in float32, whatever their parameters are.
SINGLE = {"modernbert": 1e-5, "llama": 1e-5}


def queries(model, names, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = vectors.select(model.parameters, names)
    return {n: torch.randn(columns, *p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}


class Both:
    """The derivatives of the losses of some rows along some columns, layer by layer and by forward mode."""

    def __init__(self, network, objective, rows, columns=3, names=None, sample=None):
        model = FunctionalModel(network)
        names = parameters_in_use(model, objective, rows, names or model.parameters)
        u = queries(model, names, columns)
        self.scorer = Layerwise(model, objective, u, sample or rows)
        batch = objective.collate(rows)
        with model.evaluating():
            self.slopes, self.losses, self.counts, _ = self.scorer.slopes(batch, len(rows))
            evaluation = Evaluation(model, objective, batch)
            each = [directional_derivatives(evaluation, vectors.column(u, q)) for q in range(columns)]
        self.forward, (_, losses, counts) = torch.stack([slope for slope, _, _ in each], dim=1), each[0]
        torch.testing.assert_close((self.losses, self.counts), (losses, counts), rtol=1e-6, atol=0)
        self.rest = self.scorer.layers.rest

    @property
    def error(self):
        return float((self.slopes - self.forward).abs().max() / self.forward.square().mean().sqrt())


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_equals_forward_mode_on_every_objective(case, columns):
    assert Both(case.model(), case.objective(), case.rows(7), columns).error < 1e-10


@pytest.mark.parametrize(("name", "task"), ARCHITECTURES)
def test_equals_forward_mode_on_every_architecture(name, task):
    both = Both(tiny.model(name, task, layers=2), tiny.objective(task), tiny.rows(9))
    assert both.error < SINGLE.get(name, 1e-10)
    # DeBERTa has tables of relative positions, whose rows all examples share.
    assert bool(both.rest) == (name == "deberta-v2")


@pytest.mark.parametrize("settings", [{"draws": 3}, {"reduction": "example"}, {"mask_probability": 0.05}], ids=str)
def test_masks(settings):
    rows = [*tiny.rows(8), {"example_id": 8, "text": "", "label": 0}]  # the last one has no masked token
    both = Both(tiny.model("bert", "masked"), tiny.objective("masked", **settings), rows)
    assert both.error < 1e-10
    assert not both.rest


def test_sentences_with_the_padding_token_as_a_word():
    rows = [{**row, "text": f"[PAD] {row['text']} [PAD]"} for row in tiny.rows(7)]
    both = Both(tiny.model("bert", "masked"), tiny.objective("masked"), rows)
    assert both.error < 1e-10
    assert not both.rest


@pytest.mark.parametrize("size", [1, 2, 6, 11])
def test_batches_of_other_sizes_than_the_sample(size):
    """A batch with as many rows as tokens, or as positions, is no different."""
    rows = tiny.rows(11, longest=4, shortest=4)  # six tokens each
    both = Both(tiny.model("gpt2", "causal"), tiny.objective("causal"), rows[:size], sample=rows[:5])
    assert both.error < 1e-10
    assert not both.rest


def test_blocks_do_not_change_a_score(monkeypatch):
    both = Both(tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(9), columns=40)
    monkeypatch.setattr(module, "BLOCK_EXAMPLES", 2)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)
    again = Both(tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(9), columns=40)
    torch.testing.assert_close(again.slopes, both.slopes, rtol=1e-12, atol=1e-12)


def test_the_bytes_that_are_held_beside_the_queries():
    model = FunctionalModel(tiny.model("bert", "masked"))
    u = queries(model, tuple(model.parameters), 4)
    scorer = Layerwise(model, tiny.objective("masked"), u, tiny.rows(9))
    own = {t.untyped_storage().data_ptr() for t in u.values()}
    held = [t for of_layer in scorer.queries.values() for t in of_layer.u.values()]
    assert scorer.copied_bytes == sum(t.nbytes for t in held if t.untyped_storage().data_ptr() not in own) > 0


def test_single_precision():
    """Within 1e-5 of the root mean square of the scores in float64."""
    double = tiny.model("bert", "masked", layers=2)
    model = FunctionalModel(double)
    u = queries(model, tuple(model.parameters), 4)
    rows, objective = tiny.rows(9), tiny.objective("masked")

    def scored(network, dtype):
        columns = {name: t.to(dtype) for name, t in u.items()}
        model = FunctionalModel(network)
        with model.evaluating():
            return Layerwise(model, objective, columns, rows).slopes(objective.collate(rows), len(rows))[0].double()

    exact = scored(double, torch.float64)
    single = scored(tiny.model("bert", "masked", layers=2).float(), torch.float32)
    # The weights themselves are rounded, too: forward mode is as far away.
    assert float((single - exact).abs().max()) < 1e-5 * float(exact.square().mean().sqrt())


def test_a_head_alone_is_scored_without_a_pass_through_the_encoder():
    names = ["cls.predictions.bias", "cls.predictions.transform.dense.weight"]
    both = Both(tiny.model("bert", "masked"), tiny.objective("masked"), tiny.rows(7), names=names)
    assert both.error < 1e-10
    assert set(both.scorer.layers.covered) == set(names)


class Odd(nn.Module):
    """Rows in another order than the examples', a scale that no layer owns, a layer that mixes examples."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.sorted = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.mixing = nn.Linear(6, 5, bias=False)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, ids):
        x = self.table(ids)
        order = ids.flatten().argsort(stable=True)  # by token, as a dispatcher of experts has it
        back = order.argsort()
        rows = self.sorted(x.flatten(0, 1)[order])[back].view(*ids.shape, 5)
        shared = self.mixing(self.table.weight.new_ones(6))  # the same output for all examples
        return (self.scale * torch.tanh(rows) + shared).square().sum((1, 2))


class Sums(objectives.Objective):
    def collate(self, rows):
        return {"ids": torch.tensor([row["ids"] for row in rows])}

    def losses(self, call, batch):
        sums = call(ids=batch["ids"])
        return sums, torch.ones_like(sums)


def odd_rows(size=6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (size, 4), generator=generator).tolist()
    return [{"example_id": i, "ids": row} for i, row in enumerate(ids)]


def test_odd_layers():
    torch.manual_seed(0)
    both = Both(Odd(), Sums(), odd_rows())
    assert both.error < 1e-10
    assert set(both.rest) == {"mixing.weight"}
    assert both.scorer.layers.probes


def test_forward_mode_takes_the_rest_and_auto_avoids_it():
    torch.manual_seed(0)
    model, rows = FunctionalModel(Odd()), odd_rows()
    names = parameters_in_use(model, Sums(), rows, model.parameters)
    direction = Direction(model, Sums(), queries(model, names, 3), DirectCertificate("given", 3), lambda: rows)
    assert direction.how == "forward mode"
    assert "by forward mode for 1 tensors (first 'mixing.weight')" in direction.by("layerwise").how
    batch = Sums().collate(rows)
    with model.evaluating():
        forward, layerwise = (direction.by(method).influence(batch, rows) for method in ("forward", "layerwise"))
    torch.testing.assert_close(layerwise.influence, forward.influence, rtol=1e-10, atol=1e-12)


def test_rows_that_cannot_be_told_apart_are_refused():
    """The sample's batch has its rows in the order of the inputs, later ones have not."""
    torch.manual_seed(0)
    model, rows = FunctionalModel(Odd()), odd_rows()
    layers = LayerMap(model, Sums(), ("sorted.weight", "sorted.bias"), rows)
    for layer in layers.layers:
        layer.kind = "positions"
    evaluation = Evaluation(model, Sums(), Sums().collate(rows))
    with pytest.raises(InputError, match=r"'sorted\.weight' cannot be told apart by example in a batch of 6 rows"):
        layers.run(evaluation, len(rows), lambda layer, call: None)


@pytest.mark.parametrize("seed", range(4))
def test_examples_with_different_numbers_of_inputs(seed):
    """Skip-gram passes pairs of words to the model, some per example."""
    case = next(case for case in CASES if case.name == "skip-gram")
    network, objective, rows = case.model(), case.objective(), tiny.rows(7, seed=seed, shortest=2)
    assert Both(network, objective, rows).error < 1e-10


def test_as_many_inputs_as_in_the_sample_and_other_ones_per_example():
    """Nothing in this batch's shapes says that its rows differ from those of the sample."""
    case = next(case for case in CASES if case.name == "skip-gram")
    network, objective = case.model(), case.objective()
    words = tiny.rows(1, longest=12, shortest=12)[0]["text"].split()
    sample = [{"example_id": i, "text": " ".join(words[i : i + 4])} for i in range(5)]
    rows = [{"example_id": i, "text": " ".join(words[:n])} for i, n in enumerate((3, 5))]
    pairs = [len(objective.collate([row])["input_ids"]) for row in (*rows, *sample[:2])]
    assert pairs[0] != pairs[1]
    assert sum(pairs[:2]) == sum(pairs[2:])
    assert Both(network, objective, rows, sample=sample).error < 1e-10


def test_an_objective_with_several_inputs_per_row_that_does_not_say_so():
    """The order of its rows is then taken for unknown."""

    class Silent(objectives.MaskedLM):
        inputs_per_row = 1

    both = Both(tiny.model("bert", "masked"), Silent(tiny.tokenizer(), draws=2), tiny.rows(7))
    assert both.error < 1e-10
    assert both.scorer.layers.probes


class ChannelNorm(nn.Module):
    """A norm by its name, whose weights belong to the second axis."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * self.weight.view(1, -1, 1)


class Channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.convolution = nn.Conv1d(6, 8, 3, padding=1)
        self.batch_norm, self.group_norm, self.own = nn.BatchNorm1d(8), nn.GroupNorm(2, 8), ChannelNorm(8)
        self.double()

    def forward(self, ids):
        x = self.convolution(self.table(ids).transpose(1, 2))
        return torch.tanh(self.own(self.group_norm(self.batch_norm(x)))).square().sum((1, 2))


def test_norms_of_channels():
    torch.manual_seed(0)
    both = Both(tiny.perturbed(Channels(), 0), Sums(), odd_rows())
    assert both.error < 1e-10
    assert set(both.rest) <= {"own.weight"}


def test_methods_of_a_query():
    before = tiny.model("bert", "masked")
    chain = tiny.chain(before, tiny.finetuned(before, "bert"), data=(tiny.rows(9, seed=1), tiny.rows(6, seed=2)))
    query, corpus = chain.query(tiny.rows(3, seed=3)), tiny.rows(9, seed=4)
    frames = [query.score(corpus, method=method).to_pandas() for method in ("auto", "forward", "layerwise")]
    columns = [column for column in frames[0] if column.startswith("influence")]
    assert len(columns) == 3
    for frame in frames[1:]:
        scale = frames[0][columns].abs().max().max()
        assert (frame[columns] - frames[0][columns]).abs().max().max() < 1e-10 * scale
    assert query.solutions["pre"].how == "the gradients of examples, layer by layer"
    with pytest.raises(InputError, match="method is 'reverse'; expected one of"):
        query.score(corpus, method="reverse")


def test_reduced_precision():
    before = tiny.model("bert", "masked", dtype=torch.float32)
    after = tiny.finetuned(before, "bert", dtype=torch.float32)
    chain = tiny.chain(before, after, data=(tiny.rows(9, seed=1), tiny.rows(6, seed=2)))
    query, corpus = chain.query(tiny.rows(3, seed=3)), tiny.rows(32, seed=4)
    for method in ("forward", "layerwise"):
        error = query.score(corpus, method=method, dtype="bfloat16").metadata["dtype_error"]
        assert 1e-5 < error["relative"] < 0.1


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_checkpoint_in_bfloat16_is_computed_in_float32(name):
    task = "causal" if name == "llama" else "masked"
    both = Both(tiny.model(name, task, dtype=torch.bfloat16), tiny.objective(task), tiny.rows(7))
    assert both.slopes.dtype == torch.float32
    assert both.error < 1e-4
    assert not both.rest
