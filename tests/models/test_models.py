"""The feed-forward classifier: any encoder below, padding that does not matter, saved and loaded."""

import copy

import pytest
import torch
from helpers import tiny
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    FNetConfig,
    FNetForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_msif import InputError
from hf_msif.adapters import split
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.models import FeedForwardClassifier

TASKS = {name: "causal" if name in tiny.CAUSAL else "masked" for name in tiny.CONFIGS}


def inputs(name, rows):
    batch = tiny.objective("classification").collate(rows)
    keys = ("input_ids", "attention_mask", "token_type_ids")
    return {k: batch[k] for k in keys if k in batch}


def logits(model, **given):
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_formula_on_every_encoder(name):
    """By hand from the pretrained model's own hidden states; nothing of the two models is shared."""
    before = tiny.model(name, TASKS[name]).eval()
    model = FeedForwardClassifier.from_encoder(before, 5, num_labels=3)
    given = inputs(name, tiny.rows(4, seed=1))
    known = {k: v for k, v in given.items() if k != "token_type_ids"}
    states, mask = before.base_model(**known).last_hidden_state, given["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
    expected = torch.tanh(mean @ model.hidden.weight.T + model.hidden.bias)
    expected = expected @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(logits(model, **given), expected.detach(), rtol=1e-10, atol=1e-12)
    assert model.hidden.out_features == 5
    assert not model.training

    found = split("fine", model, before, "head")
    assert set(found.head) == {"hidden.weight", "hidden.bias", "classifier.weight", "classifier.bias"}
    memory = {p.data_ptr() for p in before.parameters()}
    assert not memory & {p.data_ptr() for p in model.parameters()}
    assert model.encoder.config is not before.config


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_padding_does_not_matter(name):
    model = FeedForwardClassifier.from_encoder(tiny.model(name, "masked"), 5)
    rows = [*tiny.rows(4, seed=1, longest=4), {"example_id": 9, "text": "debate " * 12, "label": 0}]
    together = logits(model, **inputs(name, rows))
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits(model, **inputs(name, [row]))[0], together[i], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_without_a_mask_all_tokens_are_real(name):
    model = FeedForwardClassifier.from_encoder(tiny.model(name, "masked"), 5)
    ids = inputs(name, [{"example_id": 0, "text": "we vote", "label": 0}])["input_ids"]
    expected = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(logits(model, input_ids=ids), expected, rtol=1e-12, atol=0)


def test_a_row_of_padding_alone_is_finite():
    model = FeedForwardClassifier.from_encoder(tiny.model("bert", "masked"), 5)
    assert logits(model, input_ids=torch.zeros(1, 3).long(), attention_mask=torch.zeros(1, 3).long()).isfinite().all()


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded(tmp_path, name, dtype):
    before = tiny.model(name, TASKS[name], dtype=dtype)
    model = FeedForwardClassifier.from_encoder(before, 5, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path)
    given = inputs(name, tiny.rows(3))
    for kind in (FeedForwardClassifier, AutoModelForSequenceClassification):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is FeedForwardClassifier
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        torch.testing.assert_close(logits(loaded, **given), logits(model, **given), rtol=0, atol=0)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_labels, config.id2label[2]) == (5, 3, "c")
    assert config.encoder.model_type == before.config.model_type
    fresh = AutoModelForSequenceClassification.from_config(config)
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_checkpoint_in_another_dtype(tmp_path, dtype):
    """Encoder and head come in one dtype, float32 at least; the values are the checkpoint's."""
    tiny.model("bert", "masked", dtype=torch.float32).save_pretrained(tmp_path)
    before = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    config = copy.deepcopy(before.config.to_dict())
    model = FeedForwardClassifier.from_encoder(before, 5)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.parameters()} == {wanted}
    for name, p in model.encoder.named_parameters():
        torch.testing.assert_close(p, before.bert.get_parameter(name).to(wanted), rtol=0, atol=0)
    assert logits(model, **inputs("bert", tiny.rows(2))).dtype == wanted
    assert before.config.to_dict() == config
    assert {p.dtype for p in before.parameters()} == {dtype}


def test_a_base_model_is_an_encoder_too():
    before = tiny.model("bert", "base").eval()
    assert before.pooler is not None
    model = FeedForwardClassifier.from_encoder(before, 5)
    assert model.encoder.pooler is None
    for name, p in model.encoder.named_parameters():
        assert torch.equal(p, before.get_parameter(name)), name


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_kernels_of_the_encoder_are_swapped_and_put_back(attention):
    """The classifier's configuration names a kernel, the encoder's within it another."""
    before = tiny.model("bert", "masked", attention="eager")
    model = FeedForwardClassifier.from_encoder(before, 5)
    model.encoder.set_attn_implementation(attention)
    functional = FunctionalModel(model)
    with functional.evaluating():
        assert model.encoder.config._attn_implementation in ("eager", "sdpa")
    with pytest.raises(RuntimeError), functional.evaluating():
        raise RuntimeError
    assert (model.config._attn_implementation, model.encoder.config._attn_implementation) == ("sdpa", attention)
    assert before.config._attn_implementation == "eager"


# What is refused ----------------------------------------------------------------------------------------------------

TOKENS = {"vocab_size": 25, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def test_an_encoder_decoder_is_refused():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, **TOKENS)
    with pytest.raises(InputError, match="is an encoder-decoder; FeedForwardClassifier needs an encoder alone"):
        FeedForwardClassifier.from_encoder(T5ForConditionalGeneration(config))


def test_an_encoder_that_sees_padding_is_refused():
    config = FNetConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=8, max_position_embeddings=16, **TOKENS)
    with pytest.raises(InputError, match=r"FNetModel takes no attention_mask: .* depend on the padding"):
        FeedForwardClassifier.from_encoder(FNetForMaskedLM(config))


def test_an_encoder_that_is_not_its_configuration_s():
    before = tiny.model("bert", "masked")
    before.bert.embeddings.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"BertModel is not the encoder .*'embeddings\.extra\.weight' is in one"):
        FeedForwardClassifier.from_encoder(before)
    fewer = tiny.model("bert", "masked")
    fewer.bert.config.num_hidden_layers = 2
    with pytest.raises(InputError, match=r"tensor 'encoder\.layer\.1\.[\w.]+' is in one of them only"):
        FeedForwardClassifier.from_encoder(fewer)
