"""The last layer on masked positions alone: losses and derivatives are the same, or it is not done."""

import contextlib
import copy

import pytest
import torch
import transformers
from helpers import tiny
from torch import nn

from hf_msif import vectors
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature import derivatives, gauss_newton
from hf_msif.curvature.derivatives import Evaluation
from hf_msif.curvature.layers import LayerMap

OBJECTIVE = tiny.objective("masked")
DERIVATIVES = {
    "losses": lambda e, v, names: e.losses({})[0],
    "slopes": lambda e, v, names: derivatives.directional_derivatives(e, vectors.column(v, 0))[0],
    "gradient": lambda e, v, names: derivatives.gradient(e, names),
    "gauss_newton": lambda e, v, names: gauss_newton.gauss_newton_product(e, v),
    "hessian": lambda e, v, names: derivatives.hessian_product(e, v, names),
}


def evaluated(model, rows, quantity, columns=2, memo=None, names=None, objective=OBJECTIVE):
    names = names or tuple(model.parameters)
    v = tiny.block(vectors.select(model.parameters, names), columns, 0)
    evaluation = Evaluation(model, objective, objective.collate(rows), memo)
    with model.evaluating():
        return DERIVATIVES[quantity](evaluation, v, names)


def plain(network):
    """A model that gathers after the encoder."""
    model = FunctionalModel(network)
    model.gather_point = lambda positions, inputs: None
    return model


def point_of(model):
    """Where the model gathers."""
    (point,) = model.gather_points.values()
    return point


def same(found, expected, tolerance=1e-12):
    as_block = (lambda x: x) if isinstance(expected, dict) else (lambda x: {"": x})
    tiny.close(as_block(found), as_block(expected), tolerance)


@contextlib.contextmanager
def tokens_seen(module):
    """How many tokens each call of the module has."""
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    yield seen
    handle.remove()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", tiny.MASKED)
def test_every_architecture(name, layers):
    """On other batches than the one with which the point was found, too."""
    network = tiny.model(name, "masked", layers=layers)
    model, reference = FunctionalModel(network), plain(network)
    for size, seed in ((5, 1), (1, 2), (6, 3)):
        rows = tiny.rows(size, seed=seed)
        for quantity in ("losses", "slopes", "hessian") if size > 5 else ("losses", "gauss_newton"):
            same(evaluated(model, rows, quantity), evaluated(reference, rows, quantity))
    (narrow,) = (m for m in last_feed_forward(network) if m.in_features == 24)
    with tokens_seen(narrow) as seen:
        evaluated(model, rows, "losses")
    batch = OBJECTIVE.collate(rows)
    every, masked = batch["input_ids"].numel(), len(batch["rows"])
    assert seen == ([every] * (layers - 1) if name == "albert" else []) + [masked]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def last_feed_forward(network):
    layer = [entries[-1] for entries in network.base_model.modules() if isinstance(entries, nn.ModuleList)][-1]
    return [m for m in layer.modules() if isinstance(m, nn.Linear)]


def test_a_batch_without_a_masked_token():
    model, empty = FunctionalModel(tiny.model("bert", "masked")), [{"example_id": 0, "text": ""}]
    evaluated(model, empty, "losses")  # shows nothing: the next batch is looked at
    assert not model.gather_points
    evaluated(model, tiny.rows(4), "losses")
    assert point_of(model) is not None
    assert not any(t.any() for t in evaluated(model, empty, "gradient").values())


def ibert():
    """The inputs of its point have both the attention's output and the layer's input."""
    torch.manual_seed(0)
    return tiny.perturbed(
        transformers.IBertForMaskedLM(transformers.IBertConfig(num_hidden_layers=1, **tiny._NARROW)), 0
    )


@pytest.mark.parametrize("network", [lambda: tiny.model("modernbert", "masked"), ibert], ids=["modernbert", "ibert"])
def test_positions_in_any_order(network):
    network = network().double()
    model = FunctionalModel(network)
    evaluated(model, tiny.rows(4), "losses")
    assert point_of(model).at_start
    batch = OBJECTIVE.collate(tiny.rows(1, shortest=9))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    call = model.bind({})
    with model.evaluating(), torch.no_grad():
        for columns in (torch.tensor([3, 1, 2, *range(10, 3, -1), 0]), torch.tensor([2, -1, 0])):
            expected = network(**inputs).logits[0, columns]
            found = call(positions=(torch.zeros_like(columns), columns), **inputs).logits
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with pytest.raises(IndexError):
            call(positions=(torch.tensor([0]), torch.tensor([11])), **inputs)


# Models that cannot gather in the last layer ------------------------------------------------------------------------


class Shifted(nn.Module):
    """Adds to each token a share of the one before it."""

    def __init__(self, inner, share):
        super().__init__()
        self.inner, self.share = inner, nn.Parameter(torch.tensor(share, dtype=torch.float64))

    def forward(self, *args):
        x = self.inner(*args)
        return x + self.share * x.roll(1, dims=1)


class Reshaping(nn.Module):
    """Fails on no tokens at all."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        x = self.inner(*args)
        return x.view(*x.shape[:2], 2, -1).flatten(2)


def with_output(change):
    """BERT with another module at the end of its last layer."""
    network = tiny.model("bert", "masked")
    network.bert.encoder.layer[-1].output = change(network.bert.encoder.layer[-1].output)
    return network


class Pooled(nn.Module):
    """A head that adds what the pooler made of the first token."""

    def __init__(self):
        super().__init__()
        network = tiny.model("bert", "masked")
        self.bert, self.cls, self.config = network.bert, network.cls, network.config
        self.bert.pooler = transformers.models.bert.modeling_bert.BertPooler(network.config).double()

    base_model = property(lambda self: self.bert)

    def forward(self, **inputs):
        output = self.bert(**inputs)
        logits = self.cls(output[0]) + output.pooler_output[:, :1].sum()
        return transformers.modeling_outputs.MaskedLMOutput(logits=logits)


class NotMixing(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None


def without_attention():
    """What its last layer does to a token, no token beside it changes: the rows show nothing."""
    network = tiny.model("bert", "masked", layers=2)
    network.bert.encoder.layer[-1].attention.self = NotMixing()
    return network


def longformer(window):
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        num_hidden_layers=1, attention_window=window, sep_token_id=3, **{**tiny._NARROW, "max_position_embeddings": 64}
    )
    return tiny.perturbed(transformers.LongformerForMaskedLM(config), 0).double()


UNSAFE = {
    "tokens mixed by a share of zero, which has a gradient": lambda: with_output(lambda inner: Shifted(inner, 0.0)),
    "a head on the pooler": Pooled,
    "all hidden states": lambda: tiny.model("bert", "masked", output_hidden_states=True),
    "no attention in the last layer": without_attention,
    "padded to a window": lambda: longformer(4),
}


@pytest.mark.parametrize("network", UNSAFE.values(), ids=UNSAFE)
def test_models_that_gather_after_the_encoder(network):
    network, rows = network(), tiny.rows(5, longest=9, shortest=9)  # eleven tokens with their ends
    model, reference = FunctionalModel(network), plain(network)
    for quantity in ("losses", "gradient"):
        same(evaluated(model, rows, quantity), evaluated(reference, rows, quantity))
    assert point_of(model) is None


@pytest.mark.parametrize("change", [lambda inner: Shifted(inner, 0.3), Reshaping], ids=["mixes", "reshapes"])
def test_a_module_after_the_attention_that_needs_all_tokens(change):
    """They are gathered after it, though it is too late to save anything."""
    network = with_output(change)
    model, reference = FunctionalModel(network), plain(network)
    for rows in (tiny.rows(5), tiny.rows(1)):
        for quantity in ("losses", "gradient"):
            same(evaluated(model, rows, quantity), evaluated(reference, rows, quantity))
    point = point_of(model)
    assert (point.module, point.at_start) == (network.bert.encoder.layer[-1].output, False)


LATER = {
    # Longformer pads eleven tokens to twelve, and cuts the last one off what the last layer returns.
    "padded to a window": lambda: longformer(4),
    "chunks of five tokens": lambda: tiny.model("bert", "masked", layers=2, chunk_size_feed_forward=5),
    "chunks of two tokens": lambda: tiny.model("bert", "masked", layers=2, chunk_size_feed_forward=2),
}
LENGTHS = {"padded to a window": (8, 11, 8), "chunks of five tokens": (5, 10, 5), "chunks of two tokens": (10, 8, 4)}


@pytest.mark.parametrize(("name", "lengths"), LENGTHS.items(), ids=LENGTHS)
def test_batches_of_which_a_later_one_is_cut_otherwise(name, lengths):
    network = LATER[name]()
    model, reference = FunctionalModel(network), plain(network)
    for length in lengths:
        rows = tiny.rows(5, longest=length - 2, shortest=length - 2)
        for quantity in ("losses", "gradient"):
            same(evaluated(model, rows, quantity), evaluated(reference, rows, quantity))


def test_training_mode_and_outputs_that_are_asked_for():
    network = tiny.model("bert", "masked")
    model = FunctionalModel(network)
    batch = OBJECTIVE.collate(tiny.rows(5))
    positions, inputs = (batch["rows"], batch["columns"]), {k: batch[k] for k in ("input_ids", "attention_mask")}
    with model.evaluating(dropout=True):
        assert model.gather_point(positions, inputs) is None
    assert not model.gather_points
    with model.evaluating(), torch.no_grad():
        assert model.gather_point(positions, inputs) is not None
        assert model.gather_point(None, inputs) is None
        asked = {**inputs, "output_hidden_states": True}
        assert model.gather_point(positions, asked) is None
        states = model.bind({})(positions=positions, **asked).hidden_states
        assert [t.shape[:2] for t in states] == [batch["input_ids"].shape] * 2


class Moody(nn.Module):
    """A layer that may go another way later."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.way = inner, ""

    def forward(self, states, *args, **kwargs):
        if self.way == "without attention":
            return self.inner.output(self.inner.intermediate(states), states)
        if self.way == "without modules":
            return 2 * states
        if self.way == "for several rows" and len(states) == 1:
            raise ValueError("expected several rows")
        return self.inner(states, *args, **kwargs)


@pytest.mark.parametrize("way", ["without attention", "without modules", "for several rows"])
def test_a_layer_that_goes_another_way_later(way):
    network, rows = tiny.model("bert", "masked", layers=2), tiny.rows(5)
    network.bert.encoder.layer[-1] = layer = Moody(network.bert.encoder.layer[-1])
    model, reference = FunctionalModel(network), plain(network)
    evaluated(model, rows, "losses")
    assert point_of(model) is not None
    layer.way = way
    for quantity in ("losses", "gradient"):
        same(evaluated(model, rows, quantity), evaluated(reference, rows, quantity))
    assert point_of(model) is None


def test_an_encoder_that_calls_its_layer_again_later():
    network, rows = tiny.model("albert", "masked", layers=2), tiny.rows(5)
    model, reference = FunctionalModel(network), plain(network)
    evaluated(model, rows, "losses")
    for layers, found in ((1, True), (2, True), (3, False)):  # never reached; as before; called with gathered states
        network.config.num_hidden_layers = layers
        same(evaluated(model, rows, "losses"), evaluated(reference, rows, "losses"))
        assert (point_of(model) is not None) == found


def test_a_layer_that_exchanges_its_modules_later():
    """As BigBird does, whose short sentences get another attention with the same weights."""
    network, rows = tiny.model("bert", "masked", layers=2), tiny.rows(5)
    model, reference = FunctionalModel(network), plain(network)
    evaluated(model, rows, "losses")
    network.bert.encoder.layer[-1].attention.self = copy.deepcopy(network.bert.encoder.layer[-1].attention.self)
    same(evaluated(model, rows, "losses"), evaluated(reference, rows, "losses"))


# Together with other parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("trained", ["cls.", "bert.encoder.layer.1.output", "bert.encoder.layer.1.attention.self.key"])
def test_a_memo_of_what_is_frozen(trained, quantity):
    network = tiny.model("bert", "masked", layers=2)
    model, rows, memo = FunctionalModel(network), tiny.rows(6), {}
    names = tuple(name for name in model.parameters if name.startswith(trained))
    expected = evaluated(plain(network), rows, quantity, names=names)
    for _ in range(2):
        same(evaluated(model, rows, quantity, memo=memo, names=names), expected)
    assert memo
    # The same memo then serves other parameters.
    every = evaluated(plain(network), rows, quantity)
    same(evaluated(model, rows, quantity, memo=memo), every)
    same(evaluated(model, rows, quantity, memo=memo, names=names), expected)


def test_layers_know_the_examples_of_their_tokens():
    """ALBERT's one layer runs on all tokens first and on the masked ones last: no second backward pass is needed."""
    kinds = {}
    for name in ("bert", "albert", "modernbert"):
        model = FunctionalModel(tiny.model(name, "masked", layers=2))
        layers = LayerMap(model, OBJECTIVE, tuple(model.parameters), tiny.rows(9))
        assert not layers.probes
        assert not layers.rest
        kinds[name] = {local: layer.kind for layer in layers.layers for local in layer.names.values()}
    assert kinds["bert"]["bert.encoder.layer.0.output.dense.weight"] == "rows"
    assert kinds["bert"]["bert.encoder.layer.1.output.dense.weight"] == "positions"
    assert kinds["bert"]["bert.encoder.layer.1.attention.self.query.weight"] == "rows"
    assert kinds["modernbert"]["model.layers.1.attn.Wo.weight"] == "positions"
    assert kinds["albert"]["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"] == "either"
