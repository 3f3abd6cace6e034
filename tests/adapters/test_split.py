"""Splits over one list of architectures, the model as a pure function, and the user's model left as it came."""

import copy
import functools

import pytest
import torch
import transformers as T
from helpers import tiny
from helpers.state import photograph
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, vectors
from hf_msif.adapters import split
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.adapters.split import Split
from hf_msif.curvature import derivatives, gauss_newton
from hf_msif.curvature.derivatives import Evaluation

ARCHITECTURES = list(tiny.CONFIGS)


def task(name):
    return "causal" if name in tiny.CAUSAL else "masked"


@functools.cache
def pair(name):
    before = tiny.model(name, task(name), layers=1)
    return before, tiny.finetuned(before, name)


def scalars(model):
    return sum(p.numel() for p in model.parameters())


# Splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("trainable", ["head", "all"])
def test_every_parameter_has_one_role(name, trainable):
    before, after = pair(name)
    found = split("finetuning", after, before, trainable)
    roles = [*found.frozen, *found.proximal, *found.head, *found.left_out]
    assert sorted(roles) == sorted(n for n, _ in after.named_parameters())
    assert len(set(roles)) == len(roles)
    assert not found.left_out
    assert [row["role"] for row in found.table()] == [found.role(n) for n, _ in after.named_parameters()]
    # W is the base model without its pooler; what else there is, is the head.
    encoder = {id(p) for n, p in after.base_model.named_parameters() if "pooler" not in n}
    expected = [n for n, p in after.named_parameters() if id(p) in encoder]
    assert list(found.proximal if trainable == "all" else found.frozen) == expected
    assert found.head
    assert sum(found.count(names) for names in (found.frozen, found.proximal, found.head)) == scalars(after)
    assert found.trained == tuple(found.shapes) if trainable == "all" else found.trained == found.head


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inherited_names_lead_to_the_same_tensor(name):
    before, after = pair(name)
    inherited = split("finetuning", after, before).inherited
    for own, source in inherited.items():
        torch.testing.assert_close(after.get_parameter(own), before.get_parameter(source), rtol=0, atol=0)
    assert len(set(inherited.values())) == len(inherited)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_first_stage_inherits_nothing_and_counts_ties_once(name):
    before, _ = pair(name)
    found = split("pretraining", before)
    assert not found.inherited
    assert found.count(found.head) == scalars(before)
    tied = before.get_input_embeddings().weight is before.get_output_embeddings().weight
    assert tied == (name != "llama")
    size = (len(tiny.WORDS), before.get_input_embeddings().weight.shape[1])
    assert list(found.shapes.values()).count(torch.Size(size)) == (1 if tied else 2)


def test_the_pooler_belongs_to_the_head():
    found = split("finetuning", *reversed(pair("bert")), trainable="head")
    assert set(found.head) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_patterns():
    before, after = pair("bert")
    found = split("finetuning", after, before, ["bert.encoder.layer.0.output.*", "classifier.*"])
    assert {n.split(".output.")[0] for n in found.proximal} == {"bert.encoder.layer.0"}
    assert found.head == ("classifier.weight", "classifier.bias")
    assert set(found.left_out) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert "bert.embeddings.word_embeddings.weight" in found.frozen


def test_summary():
    before, after = pair("bert")
    text = str(split("finetuning", after, before, "head"))
    head = 16 * 16 + 16 + 2 * 16 + 2
    assert f"stage 'finetuning': {scalars(after):,} parameters in {len(list(after.parameters()))} tensors" in text
    rows = {line.partition(":")[0]: line.split()[-2:] for line in text.splitlines()[2:]}
    assert rows["encoder W, frozen"] == [f"{scalars(after) - head:,}", str(len(list(after.parameters())) - 4)]
    assert rows["head U or Θ"] == [str(head), "4"]
    assert "left out" not in text.lower()
    patterns = str(split("finetuning", after, before, ["classifier.*"]))
    assert "Left out, 2 tensors (first 'bert.pooler.dense.weight'): matched by no pattern in trainable" in patterns


def test_many_tensors_that_are_left_out_are_a_few_lines():
    shapes = {f"layer.{n}": torch.Size([1]) for n in range(300)}
    reasons = {name: f"reason {n % 9}" for n, name in enumerate(shapes)}
    roles = Split("only", shapes, {}, (), left_out=reasons)
    text = str(roles)
    assert len(text.splitlines()) <= 20
    assert "34 tensors (first 'layer.0'): reason 0" in text
    assert repr(roles) == "<stage 'only': 300 parameters in 300 tensors>"


# What was not trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainable", "held"),
    [
        ("all", {"bert.embeddings.word_embeddings.weight", "classifier.bias"}),
        ("head", {"classifier.bias"}),
        (["classifier.*"], {"classifier.bias"}),
    ],
)
def test_a_parameter_that_required_no_gradient_is_held_constant(trainable, held):
    before, after = pair("bert")
    after = copy.deepcopy(after)
    for name in ("bert.embeddings.word_embeddings.weight", "classifier.bias"):
        after.get_parameter(name).requires_grad_(False)
    free, found = split("fine", pair("bert")[1], before, trainable), split("fine", after, before, trainable)
    assert set(found.held) == held == set(free.trained) - set(found.trained)
    assert "bert.embeddings.word_embeddings.weight" in found.frozen
    assert "requires_grad is False" in found.left_out["classifier.bias"]
    notes = {row["tensor"]: row["note"] for row in found.table()}
    assert all("requires_grad is False: held constant" in notes[name] for name in held)
    of = f"{len(held)} tensors (first {found.held[0]!r})" if len(held) > 1 else f"tensor {found.held[0]!r}"
    assert f"Not trained, {of}: requires_grad is False" in str(found)


def test_a_held_encoder_gives_the_scores_of_a_trainable_that_leaves_it_out():
    model, rows = tiny.finetuned(pair("bert")[0], "bert"), tiny.rows(5)
    model.bert.requires_grad_(False)

    def scores(**settings):
        stage = Stage("only", model, tiny.objective("classification"), rows, solver=tiny.solvers.CG(1.0), **settings)
        return MultiStageInfluence([stage], progress=False).query(rows[:1]).score(rows).influence()

    with pytest.warns(UserWarning, match=r"'only': requires_grad is False in \d+ of .* requires_grad_\(True\)"):
        found = scores()
    assert (found == scores(trainable=["classifier.*"])).all()


def test_a_model_that_was_only_loaded_for_inference_is_refused():
    before, after = pair("bert")
    after = copy.deepcopy(after).requires_grad_(False)
    for trainable in ("all", "head", ["classifier.*"]):
        with pytest.raises(InputError, match=r"requires_grad is False in all \d+ .* model\.requires_grad_\(True\)"):
            split("fine", after, before, trainable)


FUNNEL = {"vocab_size": len(tiny.WORDS), "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 1]}
FUNNEL |= {"num_decoder_layers": 1}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8}
VIT |= {"patch_size": 4, "encoder_stride": 4}
UNEQUAL = {
    "Funnel": (T.FunnelForMaskedLM, T.FunnelForSequenceClassification, T.FunnelConfig(**FUNNEL), "decoder"),
    "ViT": (T.ViTForMaskedImageModeling, T.ViTForImageClassification, T.ViTConfig(**VIT), "mask_token"),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_tensor_that_one_task_alone_uses_belongs_to_its_head(name, tmp_path):
    """Whichever comes first, and also if both are loaded from one checkpoint."""
    pretraining, classification, config, own = UNEQUAL[name]
    before = pretraining(config)
    before.save_pretrained(tmp_path)
    after = classification.from_pretrained(tmp_path)
    found = split("fine", after, before, "head", previous_stage="pre")
    shared = {n for n, _ in after.named_parameters() if not n.startswith("classifier")}
    assert set(found.inherited) == shared
    assert all(torch.equal(after.get_parameter(n), before.get_parameter(m)) for n, m in found.inherited.items())
    assert set(found.head) == set(found.shapes) - shared
    names, others = ({n for n, _ in m.base_model.named_parameters()} for m in (before, after))
    prefix = before.base_model_prefix + "."
    assert set(found.not_passed_on) == {prefix + n for n in names - others}
    assert all(own in n for n in found.not_passed_on)
    assert found.not_passed_on[0] in str(found)
    back = split("pre", before, after, "all", previous_stage="fine")
    assert set(back.encoder_only) == set(found.not_passed_on) <= set(back.head)
    assert "In this encoder alone, and so in the head: " in str(back)
    notes = {row["tensor"]: row["note"] for row in back.table()}
    assert notes[back.encoder_only[0]] == "in this encoder alone: not inherited"


def test_other_sizes_are_no_task_of_the_same_encoder():
    """A ViT without a mask token, but with other heads."""
    before = T.ViTForMaskedImageModeling(T.ViTConfig(**VIT))
    after = T.ViTForImageClassification(T.ViTConfig(**VIT | {"num_attention_heads": 4}))
    with pytest.raises(InputError, match=r"'embeddings\.mask_token' is in 'pre' and not in 'fine'"):
        split("fine", after, before, previous_stage="pre")


class Both(T.PreTrainedModel):
    """A text encoder as a part of a model that reads something else, too."""

    config_class, base_model_prefix, _supports_sdpa = T.BertConfig, "model", True

    def __init__(self, config):
        super().__init__(config)
        self.model = torch.nn.Module()
        self.model.eyes, self.model.language_model = torch.nn.Linear(2, 2), T.BertModel(config)
        self.score = torch.nn.Linear(16, 2)


def test_a_text_encoder_inside_a_larger_one():
    config = tiny.CONFIGS["bert"](1)
    text, both = T.BertForMaskedLM(config), Both(config)
    found = split("fine", both, text, "head", previous_stage="pre")
    expected = {n: n.replace("model.language_model", "bert") for n in found.shapes if "language_model" in n}
    expected = {n: m for n, m in expected.items() if "pooler" not in n}
    assert found.inherited == expected
    assert set(found.encoder_only) == {"model.eyes.weight", "model.eyes.bias"}
    back = split("fine", text, both, "all", previous_stage="pre")
    assert back.inherited == {m: n for n, m in expected.items()}
    assert set(back.not_passed_on) == set(found.encoder_only)


# Errors ------------------------------------------------------------------------------------------------------------

MISMATCHES = {
    # What the finetuned model is, and what its error must say.
    "depth, more": ({"layers": 2}, ["'encoder.layer.1.attention.self.query.weight'", "is in 'fine' and not in 'pre'"]),
    "width": ({"hidden_size": 20}, ["'embeddings.word_embeddings.weight'", "(25, 20)", "(25, 16)"]),
    "feed-forward": (
        {"intermediate_size": 32},
        ["'encoder.layer.0.intermediate.dense.weight'", "(32, 16)", "(24, 16)"],
    ),
    "vocabulary, smaller": ({"vocab_size": 20}, ["'embeddings.word_embeddings.weight'", "(20, 16)", "(25, 16)"]),
    "vocabulary, larger": ({"vocab_size": 27}, ["'embeddings.word_embeddings.weight'", "2 tokens", "resized=True"]),
}


@pytest.mark.parametrize(("config", "parts"), MISMATCHES.values(), ids=MISMATCHES)
def test_models_that_do_not_match(config, parts):
    before, after = pair("bert")[0], tiny.model("bert", "classification", **config)
    with pytest.raises(InputError) as error:
        split("fine", after, before, previous_stage="pre")
    message = str(error.value)
    assert all(part in message for part in [*parts, "BertForSequenceClassification", "BertForMaskedLM"]), message
    assert ("resized" in message) == ("resized=True" in parts)


def test_missing_layers_are_named():
    before, after = tiny.model("bert", "masked", layers=2), pair("bert")[1]
    with pytest.raises(InputError, match=r"'encoder\.layer\.1\.[\w.]+' is in 'pre' and not in 'fine'"):
        split("fine", after, before, previous_stage="pre")


@pytest.mark.parametrize(("own", "other"), [("distilbert", "bert"), ("gpt2", "bert"), ("llama", "gpt2")])
def test_other_architecture(own, other):
    with pytest.raises(
        InputError, match=r"(do not match: tensor '[\w.]+'|share no tensor: the first of the one is '[\w.]+')"
    ):
        split("fine", pair(own)[1], pair(other)[0], previous_stage="pre")


def test_resizing_is_for_embeddings_only():
    before, after = pair("bert")[0], tiny.model("bert", "classification", intermediate_size=32)
    with pytest.raises(InputError, match=r"intermediate\.dense\.weight"):
        split("fine", after, before, resized=True)


@pytest.mark.parametrize("patterns", [["classifier.*", "clasifier.*"], ["*.lora_A"]])
def test_pattern_without_match(patterns):
    with pytest.raises(InputError, match=r"pattern '(clasifier|\*\.lora_A)[.*]*' matches no parameter"):
        split("fine", *reversed(pair("bert")), trainable=patterns)


def test_unknown_word_for_trainable():
    with pytest.raises(InputError, match="trainable is 'heads'; expected 'head', 'all' or a list"):
        split("fine", *reversed(pair("bert")), trainable="heads")


def test_model_without_head():
    before, bare = pair("bert")[0], tiny.model("bert", "base", add_pooling_layer=None)
    bare.pooler = None
    with pytest.raises(InputError, match=r"no parameter besides the inherited encoder; .*AutoModelFor"):
        split("fine", bare, before, trainable="head")


@pytest.mark.parametrize("task", ["masked", "causal", "classification"])
def test_model_without_head_gives_no_logits(task):
    bare = tiny.model("bert", "base")
    with pytest.raises(InputError, match=r"needs a model with its head, .*without logits: .*AutoModelFor"):
        MultiStageInfluence([Stage("pre", bare, tiny.objective(task), tiny.rows(4))], progress=False)


def test_frozen_encoder_that_differs():
    before, after = (copy.deepcopy(m) for m in pair("bert"))
    with torch.no_grad():
        after.bert.encoder.layer[0].output.dense.bias[3] += 1e-3
    with pytest.raises(
        InputError, match=r"stage 'fine': 'bert\.encoder\.layer\.0\.output\.dense\.bias' counts as frozen"
    ):
        tiny.chain(before, after)
    tiny.chain(before, after, trainable="all", alpha=0.1)


def test_proximal_needs_alpha():
    with pytest.raises(InputError, match=r"stage 'fine' trains \d+ inherited tensors .*give alpha"):
        tiny.chain(*pair("bert"), trainable="all")


def test_weights_that_are_not_numbers():
    before, after = (copy.deepcopy(m) for m in pair("bert"))
    with torch.no_grad():
        before.cls.predictions.transform.dense.weight[1, 1] = torch.nan
    with pytest.raises(InputError, match=r"stage 'pre': .*'cls\.predictions\.transform\.dense\.weight'.*NaN"):
        tiny.chain(before, after)


def test_a_tensor_that_the_loss_never_reads_is_left_out():
    """With untied embeddings the decoder has a bias of its own, and BERT's `cls.predictions.bias` is dead."""
    before = tiny.model("bert", "masked", tie_word_embeddings=False)
    names = [n for n, _ in before.named_parameters() if n.startswith("cls.predictions.") and n.endswith("bias")]
    bound = MultiStageInfluence([Stage("pre", before, tiny.objective("masked"), tiny.rows(4))], progress=False).stage()
    batch = bound.collate(bound.rows)
    plain = tiny.Plain(before, "masked", batch)
    gradient = plain.gradient(list(plain.parameters))
    dead = {n for n, g in gradient.items() if not g.any()}
    assert set(bound.split.left_out) == dead & set(names)
    assert not set(bound.split.left_out) & set(bound.split.trained)
    assert f"{next(iter(bound.split.left_out))!r}: the loss does not depend on it" in str(bound.split)


# New tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["head", "all"])
def test_added_tokens_change_nothing_before_they_are_used(trainable):
    """The chain with two unused rows more gives every score that the chain without them gives."""
    before, after = pair("bert")
    grown = tiny.model("bert", "classification", vocab_size=len(tiny.WORDS) + 2)
    state = after.state_dict()
    word = "bert.embeddings.word_embeddings.weight"
    state[word] = torch.cat([state[word], grown.get_parameter(word).detach()[-2:]])
    grown.load_state_dict(state)

    # Decay would reach the new rows; damping does not, since nothing drives them.
    settings = {"trainable": trainable, "alpha": 0.2 if trainable == "all" else None}
    expected = tiny.chain(before, after, tol=1e-11, **settings)
    found = tiny.chain(before, grown, tol=1e-11, resized=True, **settings)
    assert found.stage("fine").split.resized == {word: len(tiny.WORDS)}
    tests = tiny.rows(2, seed=8)
    queries = [c.query(tests) for c in (expected, found)]
    for stage in ("pre", "fine"):
        wanted, got = (torch.tensor(q.score(tiny.rows(7, seed=3), stage).influence(1)) for q in queries)
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10 * float(wanted.abs().max()))


def test_carry_drops_the_new_rows():
    before, grown = pair("bert")[0], tiny.model("bert", "classification", vocab_size=len(tiny.WORDS) + 2)
    bound = tiny.chain(before, grown, resized=True, trainable="all", alpha=0.2).stage("fine")
    adjoint = tiny.block({n: bound.model.parameters[n] for n in bound.split.inherited}, columns=2, seed=0)
    carried = bound.carry(adjoint)
    word = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(carried[word], adjoint[word][:, : len(tiny.WORDS)], rtol=0, atol=0)
    assert set(carried) == {n for n, _ in before.named_parameters()}
    for name, t in carried.items():
        assert t.any() == (name in bound.split.inherited.values())
    tie = bound.differentiation.quadratic.tie[word]
    assert tie[: len(tiny.WORDS)].unique().tolist() == [0.4]
    assert not tie[len(tiny.WORDS) :].any()


@pytest.mark.parametrize(("trainable", "fate"), [("all", "trained"), ("head", "held constant")])
def test_the_table_says_what_becomes_of_new_rows(trainable, fate):
    before, grown = pair("bert")[0], tiny.model("bert", "classification", vocab_size=len(tiny.WORDS) + 2)
    (row,) = [r for r in split("f", grown, before, trainable, resized=True).table() if r["note"]]
    assert row["tensor"] == "bert.embeddings.word_embeddings.weight"
    assert row["note"] == f"first 25 of 27 rows inherited, the others {fate}"


# The model as a function --------------------------------------------------------------------------------------------


def inputs(name, size=3):
    objective = tiny.objective(task(name))
    return objective, objective.collate(tiny.rows(size, seed=4, longest=6, shortest=2))


@pytest.mark.parametrize("name", tiny.MASKED)
def test_the_head_at_some_positions_gives_the_whole_head_there(name):
    user, (_, batch) = pair(name)[0], inputs(name)
    model = FunctionalModel(user)
    plain = tiny.Plain(user, "masked", batch)
    keep = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with model.evaluating(), torch.no_grad():
        found = model.bind({})(positions=(batch["rows"], batch["columns"]), **keep).logits
    expected = plain.model(**keep).logits.detach()[batch["rows"], batch["columns"]]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def all_float64(monkeypatch):
    """Differences would drown in the steps that Transformers computes in float32 whatever the model's dtype."""

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(x * cos + modeling_modernbert.rotate_half(x) * sin for x in (q, k))

    def normalise(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", rotate)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", normalise)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_derivatives(name, all_float64):
    """Of every architecture's pretraining loss, against finite differences."""
    user, (objective, batch) = pair(name)[0], inputs(name)
    model = FunctionalModel(user)
    evaluation, plain = Evaluation(model, objective, batch), tiny.Plain(user, task(name), batch)
    names = tuple(model.parameters)
    v = tiny.block(model.parameters, columns=1, seed=5)
    direction = vectors.column(v, 0)
    with model.evaluating():
        slopes, sums, _ = derivatives.directional_derivatives(evaluation, direction)
        product = derivatives.hessian_product(evaluation, v, names)
        dense = gauss_newton.gauss_newton_product(evaluation, v)
    torch.testing.assert_close(sums, plain.sums().detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slopes, plain.along(direction, plain.sums), rtol=1e-6, atol=1e-7)
    expected = plain.along(direction, lambda: plain.gradient(names))
    tiny.close(vectors.column(product, 0), expected, 1e-6)
    assert float(vectors.dot(v, dense)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_whole_chain_runs(name):
    before, after = pair(name)
    scores = tiny.chain(before, after).query(tiny.rows(1, seed=8)).score(tiny.rows(4, seed=3, shortest=2))
    assert torch.tensor(scores.influence()).isfinite().all()
    assert torch.tensor(scores.influence()).abs().min() > 0


# The user's model ---------------------------------------------------------------------------------------------------


def odd(dtype=torch.float32, attention=None):
    """A chain's models in no uniform state: some modules in evaluation mode, some tensors that want no gradient."""
    before = tiny.model("bert", "masked", dtype=dtype, attention=attention)
    after = tiny.finetuned(before, "bert", dtype=dtype, attention=attention)
    for model in (before, after):
        model.bert.encoder.layer[0].attention.eval()
        model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
        model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_leave_as_they_came(dtype, attention):
    models = odd(dtype, attention)
    before = [photograph(model) for model in models]
    msif = tiny.chain(*models)
    scores = msif.query(tiny.rows(2, seed=8)).score(tiny.rows(3))
    assert len(scores) == 3
    for bound in msif.stages:
        assert {p.dtype for p in bound.model.parameters.values()} == {torch.float32}
    assert [photograph(model) for model in models] == before


@pytest.mark.slow
def test_attention_kernels_agree():
    """What is swapped for its lack of derivatives is swapped for the same function."""
    found = [
        tiny.chain(*odd(torch.float64, attention), tol=1e-11)
        .query(tiny.rows(1, seed=8))
        .score(tiny.rows(3))
        .influence()
        for attention in ("sdpa", "eager", "flex_attention")
    ]
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=1e-8, atol=1e-9)


def test_a_bfloat16_checkpoint_is_computed_in_float32():
    low, (objective, batch) = tiny.model("bert", "masked", dtype=torch.bfloat16), inputs("bert")
    model = FunctionalModel(low)
    with model.evaluating(), torch.no_grad():
        sums, _ = objective.losses(model.bind({}), batch)
    expected = tiny.Plain(copy.deepcopy(low).float(), "masked", batch).sums().detach()
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


class Failing(objectives.Objective):
    """An objective that fails at its n-th evaluation: before the model runs, inside of it, or after."""

    def __init__(self, objective, at, where):
        self.objective, self.left, self.where = objective, at, where

    def collate(self, rows):
        return self.objective.collate(rows)

    def losses(self, call, batch):
        self.left -= 1
        if self.left == 0 and self.where == "inside":
            batch = {**batch, "input_ids": batch["input_ids"].double()}  # an index must be an integer
        result = self.objective.losses(call, batch)
        if self.left == 0:
            raise RuntimeError("interrupted")
        return result


@pytest.mark.parametrize("where", ["inside", "after"])
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_the_models_leave_as_they_came_when_something_fails(where, stage, at):
    models = odd(attention="flex_attention")
    before = [photograph(model) for model in models]

    def run():
        msif = tiny.chain(*models)
        bound = msif.stages[stage]
        bound.objective = Failing(bound.objective, at, where)
        if stage == 0:
            msif.query(tiny.rows(1, seed=8)).score(tiny.rows(3))
        else:
            msif.query(tiny.rows(1, seed=8)).score(tiny.rows(3), stage="fine")

    with pytest.raises(RuntimeError, match=r"interrupted|indices"):
        run()
    assert [photograph(model) for model in models] == before


def test_a_forward_that_the_user_patched_is_put_back():
    """Accelerate's device hooks live in such an instance attribute."""
    before, after = odd()
    calls = []
    original = after.bert.encoder.forward

    def patched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    after.bert.encoder.forward = patched
    tiny.chain(before, after).query(tiny.rows(1, seed=8))
    assert calls
    assert vars(after.bert.encoder)["forward"] is patched
