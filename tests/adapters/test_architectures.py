"""Kinds of architectures that need a mechanism of their own: a part of `make coverage-suite`, and single cases."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from helpers import tiny
from helpers.scripts import imported_from

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.models import FeedForwardClassifier

FOLDER = Path(__file__).parents[2] / "benchmarks" / "coverage"
SMALL = {"vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
KINDS = {
    "qwen2_moe/causal": "experts",
    "bloom/causal": "no forward mode",
    "perceiver/masked": "states that are not those of tokens, and a decoder of its own in each base model",
    "fnet/masked": "padding reaches the loss",
    "qwen3_5/causal": "a text encoder within a larger one",
    "longformer/masked": "float32 alone",
    "t5/seq2seq": "an encoder-decoder",
}


@pytest.fixture
def suite():
    with imported_from(FOLDER) as import_module:
        yield import_module


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_kinds(suite, name):
    pair = {pair.name: pair for pair in suite("tiny_models").pairs()}[name]
    result = suite("examination").examine(pair)
    assert not result.error
    assert result.scores is not None
    assert result.dtype == ("float32" if KINDS[name] == "float32 alone" else "float64")


def test_the_suite_has_every_architecture_with_both_heads(suite):
    tiny_models = suite("tiny_models")
    first, every = tiny_models.pairs(), tiny_models.pairs("all")
    assert len({pair.architecture for pair in first}) == len(first) > 100
    assert set(first) < set(every)
    assert len({pair.name for pair in every}) == len(every)


def test_a_wrong_score_fails_the_examination(suite, monkeypatch):
    examination = suite("examination")
    pair = {pair.name: pair for pair in suite("tiny_models").pairs()}["bert/masked"]
    plain = examination.plain_scores
    monkeypatch.setattr(examination, "plain_scores", lambda *args: 1.0001 * plain(*args))
    assert examination.examine(pair).error.startswith("scores: relative difference 1.0e-04")


CRASH = """
import json, os, sys
for name in sys.argv[1:]:
    print(json.dumps({"started": name}), flush=True)
    if name == "bart/masked":
        os._exit(9)
    print(json.dumps({"name": name, "classes": ["A", "B"], "scores": 1e-9}), flush=True)
"""


def test_a_crash_of_one_pair_does_not_end_the_suite(suite, monkeypatch, tmp_path, capsys):
    run = suite("run")
    (tmp_path / "examination.py").write_text(CRASH)
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text('{"started": "bert/masked"}\n{"na')  # of a run that was interrupted
    only = ["--tasks", "first", "--only", "albert", "bart", "bert", "--results", str(results), "--page", str(page)]
    assert run.main(only) == 1
    assert "bart/masked: its process ended with exit code 9\npassed 2 of 3" in capsys.readouterr().out
    assert "**2 of 3 architectures pass** (67%)" in page.read_text()
    (tmp_path / "examination.py").unlink()
    assert run.main(only) == 1  # all results are there


def stage(model, objective, rows, **settings):
    return Stage("only", model, objective, rows, **{"solver": solvers.Identity(), **settings})


def bound(*args, **settings):
    return MultiStageInfluence([stage(*args, **settings)], progress=False)


@pytest.mark.parametrize("kind", ["grouped_mm", "batched_mm", "eager"])
def test_experts_are_put_back(kind):
    model = T.MixtralForCausalLM(T.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3))
    model.set_experts_implementation(kind)
    call, batch = FunctionalModel(model), tiny.objective("causal").collate(tiny.rows(3))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with call.evaluating():
        assert model.config._experts_implementation == ("batched_mm" if kind == "batched_mm" else "eager")
        call.bind({})(**inputs)
    with pytest.raises(ValueError, match="exactly one"), call.evaluating():
        call.bind({})(words=inputs)
    assert model.get_experts_implementation() == {"": kind}


@pytest.mark.parametrize("latents", [6, 40], ids=["fewer than tokens", "more"])
def test_states_that_are_not_those_of_tokens(latents):
    config = T.PerceiverConfig(
        vocab_size=len(tiny.WORDS), num_latents=latents, d_latents=16, d_model=16, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=64, qk_channels=16,
        v_channels=16,
    )  # fmt: skip
    model = tiny.perturbed(T.PerceiverForMaskedLM(config).double(), 0).train()
    functional, objective = FunctionalModel(model), tiny.objective("masked")
    batch = objective.collate(tiny.rows(4))
    with functional.evaluating(dropout=True):  # found out without dropout, in training too
        assert functional.needs_whole_head((batch["rows"], batch["columns"]), {"input_ids": batch["input_ids"]})
    with functional.evaluating(), torch.no_grad():
        sums, _ = objective.losses(functional.bind({}), batch)
    torch.testing.assert_close(sums, tiny.Plain(model, "masked", batch).sums().detach(), rtol=1e-12, atol=1e-12)


def test_a_head_on_single_states_is_known_as_such():
    functional, objective = FunctionalModel(tiny.model("bert", "masked")), tiny.objective("masked")
    batch = objective.collate(tiny.rows(4))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with functional.evaluating():
        assert not functional.needs_whole_head((batch["rows"], batch["columns"]), inputs)
    assert list(functional.whole_heads.values()) == [False]


def test_a_classifier_on_a_recurrent_encoder():
    """RWKV's state is written in place where it is kept for generation."""
    config = T.RwkvConfig(
        vocab_size=len(tiny.WORDS), hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=24
    )
    encoder = tiny.perturbed(T.RwkvForCausalLM(config).double(), 0)
    model, objective = FeedForwardClassifier.from_encoder(encoder, num_labels=2), tiny.objective("classification")
    rows = tiny.rows(3, longest=4)
    query = bound(model, objective, rows).query(rows[:1])
    u = {name: t[0] for name, t in query.solutions["only"].tensors().items()}
    expected = []
    for row in rows:
        plain = tiny.Plain(model, "classification", objective.collate([row]))
        expected.append(-sum(float((u[n] * g).sum()) for n, g in plain.gradient(list(u)).items()))
    np.testing.assert_allclose(
        query.score(rows, batch_size=4).influence(), expected, atol=1e-6 * max(map(abs, expected))
    )


class Reading(T.BertForMaskedLM):
    """Takes nothing but tokens."""

    def forward(self, input_ids=None):
        return super().forward(input_ids=input_ids)


def test_a_tokenizer_without_attention_masks_and_a_model_that_takes_none():
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    model = tiny.perturbed(Reading(T.BertConfig(**SMALL)).double(), 0)
    with pytest.warns(UserWarning, match="padding reaches the loss"):
        chain = bound(model, objectives.MaskedLM(tokenizer), tiny.rows(6))
    scores = [chain.query(tiny.rows(6)[:1]).score(tiny.rows(6), batch_size=size).influence() for size in (1, 6)]
    np.testing.assert_allclose(*scores, atol=1e-12 * np.abs(scores[0]).max())


def test_a_model_without_a_gradient_in_evaluation_mode_is_refused():
    settings = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings", "pad_token_id")}
    config = T.ReformerConfig(
        **settings, num_attention_heads=2, attention_head_size=8, feed_forward_size=24, is_decoder=False,
        attn_layers=["local"], axial_pos_embds=False, local_attn_chunk_length=4,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"stage 'only': ReformerForMaskedLM has no gradient in evaluation mode"):
        bound(T.ReformerForMaskedLM(config), tiny.objective("masked"), tiny.rows(4))


def test_float32_is_named_where_float64_fails():
    model = T.MraForMaskedLM(T.MraConfig(**SMALL)).double()
    with pytest.raises(InputError, match=r"MraForMaskedLM fails in float64 .* try float32: model\.float\(\)"):
        bound(model, tiny.objective("masked"), tiny.rows(4))
    bound(model.float(), tiny.objective("masked"), tiny.rows(4))


def test_a_gradient_that_is_not_finite_is_refused():
    class Rooted(T.BertForMaskedLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits + (0.0 * self.cls.predictions.bias).sqrt()
            return output

    with pytest.raises(InputError, match=r"'only': the gradient of Rooted in '[\w.]+' is not finite at the row 0"):
        bound(Rooted(T.BertConfig(**SMALL)).double(), tiny.objective("masked"), tiny.rows(4))
