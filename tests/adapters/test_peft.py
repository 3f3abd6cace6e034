"""Stages with LoRA: roles, scores against dense float64 algebra, what is refused, training, files, commands."""

import copy
import json
import shutil
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import tiny
from helpers.descent import arguments
from helpers.project import msif, project
from helpers.state import photograph, same, weights
from peft import LoraConfig

from hf_msif import InputError, MultiStageInfluence, Stage, solvers, training
from hf_msif.adapters import split
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.adapters.peft import load as load_with_adapters
from hf_msif.curvature.derivatives import Evaluation, directional_derivatives
from hf_msif.project.config import load
from hf_msif.project.run import Run
from hf_msif.validation.retraining import WarmStart, hand_on

CORPUS, TWEETS, TESTS = tiny.rows(6, seed=1), tiny.rows(5, seed=2), tiny.rows(2, seed=8)
NARROW = {"hidden_size": 8, "intermediate_size": 6, "attention": "eager"}  # whose second derivatives are at hand
SCALE = 3.0  # lora_alpha / r


def adapted(model, config=None, seed=4, wrapped=True, size=0.3, **settings):
    """Adapters in a copy of the model, none of them zero."""
    default = {"r": 2, "lora_alpha": 2 * SCALE, "lora_dropout": 0.3, "target_modules": ["query", "value"]}
    config = config or LoraConfig(**{**default, **settings})
    make = peft.get_peft_model if wrapped else lambda model, config: peft.inject_adapter_in_model(config, model)
    torch.manual_seed(seed)
    made = make(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=generator).to(p)
    return made.train()


@pytest.fixture(scope="module")
def pair():
    before = tiny.model("bert", "masked", **NARROW)
    return before, tiny.finetuned(before, "bert", **NARROW)


@pytest.fixture(scope="module")
def tuned(pair):
    return adapted(pair[1], task_type="SEQ_CLS")


def ending(names, *ends):
    return {name for name in names if name.endswith(ends)}


# Roles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "injected"])
def test_roles(pair, wrapped):
    before, after = pair
    settings = {"task_type": "SEQ_CLS"} if wrapped else {"modules_to_save": ["classifier"]}
    model, prefix = adapted(after, wrapped=wrapped, **settings), "base_model.model." if wrapped else ""
    found = split("fine", model, before, "head")
    named = dict(model.named_parameters())
    assert sorted([*found.frozen, *found.head, *found.left_out]) == sorted(named)
    expected = {n for n in named if "lora_" in n or "pooler" in n or "modules_to_save" in n}
    assert len([n for n in expected if "lora_" in n]) == 4
    assert set(found.head) == expected
    query = "bert.encoder.layer.0.attention.self.query"
    assert found.inherited[f"{prefix}{query}.base_layer.weight"] == f"{query}.weight"
    for own, source in found.inherited.items():
        assert torch.equal(model.get_parameter(own), before.get_parameter(source))
    assert set(found.inherited.values()) == {n for n, _ in before.named_parameters() if n.startswith("bert.")}
    assert set(found.left_out) == {f"{prefix}classifier.original_module.{n}" for n in ("weight", "bias")}
    assert "original_module.weight'): modules_to_save.default stands in its place" in str(found)

    everything = split("fine", model, before, "all")
    assert not found.held + everything.held  # PEFT sets requires_grad by rules of its own
    assert set(everything.proximal) == set(found.frozen)
    assert set(everything.head) == set(found.head)
    patterns = split("fine", model, before, ["*.lora_*", "*.modules_to_save.*"])
    assert set(patterns.trained) == {n for n in expected if "pooler" not in n}
    assert patterns.left_out[f"{prefix}bert.pooler.dense.bias"].startswith("matched by no pattern")


def test_adapters_that_are_not_active_are_left_out(pair):
    before, after = pair
    model = adapted(after, task_type="SEQ_CLS")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    found = split("fine", model, before, "head")
    others = {n for n, _ in model.named_parameters() if ".other." in n}
    assert len(others) == 4  # lora_A, lora_B and another classifier
    assert others < set(found.left_out)
    assert all(found.left_out[n] == "of the adapter 'other', which is not active" for n in others)
    model.set_adapter("other")
    found = split("fine", model, before, "head")
    assert others < set(found.head)
    assert not any(".default." in n for n in found.trained)
    model.base_model.disable_adapter_layers()
    found = split("fine", model, before, "head")
    assert len(ending(found.head, "classifier.original_module.weight")) == 1
    assert not any("lora_" in n or "modules_to_save" in n for n in found.trained)


def test_tied_weights_keep_one_name(pair):
    """The decoder is the embedding: under an adapter it is inherited still, copied for `modules_to_save` it is new."""
    before = pair[0]
    word = "base_model.model.bert.embeddings.word_embeddings"
    found = split("more", adapted(before, target_modules=["word_embeddings"]), before, "head")
    assert found.inherited[f"{word}.base_layer.weight"] == "bert.embeddings.word_embeddings.weight"
    assert {f"{word}.lora_embedding_{x}.default" for x in "AB"} < set(found.head)
    assert not ending(found.shapes, "decoder.weight")
    found = split("more", adapted(before, modules_to_save=["cls"]), before, "head")
    assert f"{word}.weight" in found.frozen
    assert ending(found.head, "decoder.weight") == ending(found.shapes, "default.predictions.decoder.weight")
    assert {n.split("original_module")[0] for n in found.left_out} == {"base_model.model.cls."}


def test_a_tie_is_in_use_where_a_copy_replaces_only_one_end(pair):
    """The embedding trained as a copy, the decoder its original still: both hang on the one embedding before."""
    before = pair[0]
    model = adapted(before, modules_to_save=["word_embeddings"])
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    found = split("more", model, before, "all")
    word = "base_model.model.bert.embeddings.word_embeddings"
    both = {f"{word}.original_module.weight", f"{word}.modules_to_save.default.weight"}
    assert both < set(found.inherited)
    assert {found.inherited[n] for n in both} == {"bert.embeddings.word_embeddings.weight"}
    assert not found.left_out

    msif = tiny.chain(before, tiny.finetuned(before, "bert", **NARROW))
    stages = [msif.stages[0].stage, Stage("more", model, tiny.objective("masked"), CORPUS, "all", alpha=0.3)]
    bound = MultiStageInfluence(stages, progress=False).stage("more")
    adjoint = tiny.block({n: bound.model.parameters[n] for n in bound.split.inherited}, 1, seed=0)
    carried = bound.carry(adjoint)["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(carried, sum(adjoint[n] for n in both))


def test_a_new_weight_under_an_adapter_is_held(pair):
    before, after = pair
    model = adapted(after, target_modules=["query", "pooler.dense"])
    found = split("fine", model, before, "head")
    assert set(found.left_out.values()) == {"held constant under its adapter"}
    assert set(found.left_out) == ending(
        found.shapes, "pooler.dense.base_layer.weight", "pooler.dense.base_layer.bias"
    )
    assert ending(found.left_out, "bias") < set(split("fine", model, before, "all").head)


def test_a_trained_copy_of_an_encoder_module_is_the_inherited_one(pair):
    before, after = pair
    model = adapted(after, modules_to_save=["intermediate"])
    found = split("fine", model, before, "all")
    (own,) = ending(found.proximal, "intermediate.modules_to_save.default.dense.weight")
    assert found.inherited[own] == "bert.encoder.layer.0.intermediate.dense.weight"
    assert len(found.left_out) == 2
    with pytest.raises(InputError, match=r"intermediate\.modules_to_save.*counts as frozen, but differs"):
        tiny.chain(before, model, trainable="head")


def test_ia3_works_as_well(pair):
    before, after = pair
    config = peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
    model = adapted(after, config)
    found = split("fine", model, before, "head")
    assert len([n for n in found.head if "ia3_l" in n]) == 3
    scores = tiny.chain(before, model, data=(CORPUS, TWEETS)).query(TESTS[:1]).score(CORPUS).influence()
    assert np.abs(scores).min() > 0


def test_adapters_of_the_stage_before_are_inherited(pair):
    before, after = pair
    more = adapted(before, wrapped=False)
    model = adapted(after, wrapped=False)
    found = split("fine", model, more, "head", previous_stage="more")
    assert len([n for n in found.frozen if "lora_" in n]) == 4
    assert not any("lora_" in n for n in found.head)
    with pytest.raises(InputError, match=r"'[\w.]+lora_A\.default\.weight' is in 'more' and not in 'fine'"):
        split("fine", after, more, "head", previous_stage="more")


# Derivatives --------------------------------------------------------------------------------------------------------

PRETRAINED = ["*attention.self.query.*", "*attention.self.value.*", "cls.predictions.transform.*"]
DAMPING, DECAY = 0.4, 0.03


class Oracle:
    """Both stages as functions of W, the heads, A and B on plain models, differentiated entry by entry."""

    def __init__(self, before, tuned):
        self.before, self.after = before, copy.deepcopy(tuned).merge_and_unload().eval()
        own = {n.removeprefix("base_model.model."): p.detach() for n, p in tuned.named_parameters()}
        self.fine = {n: p.clone().requires_grad_() for n, p in own.items() if "original_module" not in n}
        self.inherited = {n: n.replace(".base_layer", "") for n in self.fine if n.startswith("bert.")}
        self.inherited = {
            n: former for n, former in self.inherited.items() if former in dict(before.named_parameters())
        }
        self.trained = [n for n in self.fine if n not in self.inherited]

    def losses(self, rows):
        state = {}
        for name, p in self.fine.items():
            if "lora_" in name:
                continue
            layer, _, end = name.partition(".base_layer.")
            if end == "weight":
                p = (
                    p
                    + SCALE * self.fine[f"{layer}.lora_B.default.weight"] @ self.fine[f"{layer}.lora_A.default.weight"]
                )
            state[name.replace(".base_layer", "").replace(".modules_to_save.default", "")] = p
        assert set(state) == {n for n, _ in self.after.named_parameters()}
        batch = tiny.objective("classification").collate(rows)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        logits = torch.func.functional_call(self.after, state, kwargs=inputs).logits
        return logits.logsumexp(1) - logits.gather(1, batch["labels"][:, None])[:, 0]

    def objective(self):
        penalty = sum((self.fine[n] ** 2).sum() for n in self.trained if n.endswith("weight"))
        return self.losses(TWEETS).mean() + DECAY / 2 * penalty

    @staticmethod
    def flat(tensors):
        return torch.cat([t.flatten() for t in tensors])

    def derivatives(self, scalar, parameters, others=()):
        """Gradient, Hessian in `parameters`, and the mixed block of rows `parameters`, columns `others`."""
        gradient = self.flat(torch.autograd.grad(scalar, parameters, create_graph=True))
        rows = [
            torch.autograd.grad(g, [*parameters, *others], retain_graph=True, materialize_grads=True) for g in gradient
        ]
        second = torch.stack([self.flat(row) for row in rows])
        return gradient.detach(), second[:, : len(gradient)], second[:, len(gradient) :]

    def scores(self):
        """Of (TWEETS, CORPUS), one column per test, the damping added to both Hessians."""
        trained, inherited = [self.fine[n] for n in self.trained], [self.fine[n] for n in self.inherited]
        _, hessian, mixed = self.derivatives(self.objective(), trained, inherited)
        test = [torch.autograd.grad(loss, [*trained, *inherited], retain_graph=True) for loss in self.losses(TESTS)]
        test = torch.stack([self.flat(row) for row in test], 1)
        size = len(hessian)
        u = torch.linalg.solve(hessian + DAMPING * torch.eye(size).double(), test[:size])
        tweets = self.jacobian(self.losses(TWEETS), trained)
        b = test[size:] - mixed.T @ u

        batch = tiny.objective("masked").collate(CORPUS)
        plain = tiny.Plain(self.before, "masked", batch)
        names = [n for n in plain.parameters if any(part in n for part in ("self.query", "self.value", "transform"))]
        parameters, sums = [plain.parameters[n] for n in names], plain.sums()
        _, hessian, _ = self.derivatives(sums.sum() / len(batch["labels"]), parameters)
        start, parts = 0, {}
        for n, former in self.inherited.items():
            parts[former] = b[start : start + self.fine[n].numel()]
            start += self.fine[n].numel()
        zero = torch.zeros(0, len(TESTS)).double()
        a = [parts.get(n, zero.new_zeros(plain.parameters[n].numel(), len(TESTS))) for n in names]
        second = torch.linalg.solve(hessian + DAMPING * torch.eye(len(hessian)).double(), torch.cat(a))
        return -tweets @ u, -self.jacobian(sums, parameters) @ second

    def jacobian(self, values, parameters):
        rows = [torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True) for v in values]
        return torch.stack([self.flat(row) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "injected"])
def test_the_chain_is_that_of_dense_algebra(pair, tuned, wrapped):
    """u, the mixed derivative in the frozen base and the scores of both stages, through W + (lora_alpha / r) B A."""
    model, exact = tuned if wrapped else tuned.base_model.model, {"curvature": "hessian"}
    exact["solver"] = solvers.Dense(damping=DAMPING)
    stages = [
        Stage("pre", pair[0], tiny.objective("masked"), CORPUS, PRETRAINED, mask_rounds=None, **exact),
        Stage("fine", model, tiny.objective("classification"), TWEETS, "head", weight_decay=DECAY, **exact),
    ]
    query = MultiStageInfluence(stages, progress=False).query(TESTS)
    for stage, expected in zip(("fine", "pre"), Oracle(pair[0], tuned).scores(), strict=True):
        rows = TWEETS if stage == "fine" else CORPUS
        found = np.stack([query.score(rows, stage).influence(q) for q in range(2)], 1)
        assert float(expected.abs().min()) > 0
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


EVERYWHERE = ["query", "q_lin", "query_proj", "Wqkv", "c_attn", "q_proj", "lin2", "c_proj", "Wo", "down_proj"]
EVERYWHERE += ["word_embeddings", "tok_embeddings", "embed_tokens", "wte"]


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_architecture(name):
    """Roles, and the slope of every loss against its gradient."""
    before = tiny.model(name, "causal" if name in tiny.CAUSAL else "masked")
    after = tiny.finetuned(before, name)
    model = adapted(after, target_modules=EVERYWHERE, task_type="SEQ_CLS", size=0.1)
    found = split("fine", model, before, "head")
    usual = split("fine", after, before, "head")
    assert set(found.inherited.values()) == set(usual.inherited.values())
    assert found.count(found.frozen) == usual.count(usual.frozen)
    assert len([n for n in found.head if "lora_" in n]) >= 4
    assert len([n for n in found.head if "lora_embedding" in n]) == 2
    batch = tiny.objective("classification").collate(TWEETS)
    functional, plain = FunctionalModel(model), tiny.Plain(model, "classification", batch)
    v = tiny.block({n: functional.parameters[n] for n in found.head}, 1, 3)
    direction = {n: t[0] for n, t in v.items()}
    with functional.evaluating():
        slopes, _, _ = directional_derivatives(
            Evaluation(functional, tiny.objective("classification"), batch), direction
        )
    gradients = [plain.gradient(found.head, of=value) for value in plain.sums()]
    expected = torch.stack([sum((g[n] * direction[n]).sum() for n in found.head) for g in gradients])
    torch.testing.assert_close(slopes, expected, rtol=1e-5, atol=1e-5)
    assert slopes.abs().min() > 0


@pytest.mark.parametrize("memo", [True, False])
def test_a_masked_lm_goes_on_with_lora(pair, memo):
    """The head at the masked positions alone, and no encoder taken for constant that has adapters in it."""
    model, exact = adapted(pair[0]), {"curvature": "hessian", "solver": solvers.Dense(DAMPING)}
    msif = MultiStageInfluence(
        [
            Stage("pre", pair[0], tiny.objective("masked"), CORPUS, solver=solvers.CG(damping=1.0)),
            Stage("more", model, tiny.objective("masked"), CORPUS, "head", mask_rounds=None, **exact),
        ],
        progress=False,
    )
    bound = msif.stage("more")
    batch = bound.stage.objective.collate(CORPUS)
    plain = tiny.Plain(model, "masked", batch)
    functional = FunctionalModel(model)
    with functional.evaluating(), torch.no_grad():
        call = functional.bind({}, {} if memo else None)
        sums, _ = tiny.objective("masked").losses(call, batch)
    torch.testing.assert_close(sums, plain.sums().detach(), rtol=1e-10, atol=1e-10)
    names = list(bound.split.trained)
    assert any("lora_" in n for n in names)
    for seed in (0, 1):
        v = tiny.block({n: bound.model.parameters[n] for n in names}, 1, seed)
        expected = plain.along({n: t[0] for n, t in v.items()}, lambda: plain.gradient(names))
        expected = {n: t / len(batch["labels"]) for n, t in expected.items()}
        tiny.close({n: t[0] for n, t in bound.differentiation.operator.matvec(v).items()}, expected, 1e-6)
    assert np.abs(msif.query(CORPUS[:1]).score(CORPUS).influence()).min() > 0


def test_only_the_embeddings_below_the_adapters_are_remembered(pair, tuned):
    msif = tiny.chain(pair[0], tuned, 1e-11, (CORPUS, TWEETS))
    bound, memo = msif.stage("fine"), {}
    call = bound.model.bind({n: bound.model.parameters[n] for n in bound.split.trained}, memo)
    inputs = {k: v for k, v in bound.collate(TWEETS).items() if k in ("input_ids", "attention_mask")}
    with bound.model.evaluating():
        call(**inputs)
        assert set(memo) == {"embeddings"}
        bound.model.bind({n: p for n, p in bound.model.parameters.items() if "classifier" in n}, memo := {})(**inputs)
    assert set(memo) == {"base_model"}


@pytest.mark.slow
def test_the_model_leaves_as_it_came(pair):
    before = tiny.model("bert", "masked", attention="flex_attention")
    model = adapted(tiny.finetuned(before, "bert", attention="flex_attention"), task_type="SEQ_CLS")
    pictures = photograph(before), photograph(model)
    assert len(tiny.chain(before, model).query(TESTS).score(CORPUS)) == len(CORPUS)
    assert (photograph(before), photograph(model)) == pictures
    training.polish(copy.deepcopy(model), tiny.objective("classification"), TWEETS, previous=before, trainable="head")
    assert (photograph(before), photograph(model)) == pictures


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_base_weight_may_be_trained_beside_its_adapter(pair, tuned):
    """Proximal then, by the name of the stage before: b = 2α u."""
    patterns = ["*query.base_layer.weight", "*.lora_*", "*.modules_to_save.*"]
    msif = tiny.chain(pair[0], tuned, 1e-11, (CORPUS, TWEETS), trainable=patterns, alpha=0.2)
    bound = msif.stage("fine")
    (own,) = bound.split.proximal
    solution, inherited = bound.differentiation.pull_back(msif.measurement(TESTS)[0])
    u = solution.tensors()
    torch.testing.assert_close(inherited[own], 0.4 * u[own], rtol=0, atol=0)
    carried = bound.carry(inherited)["bert.encoder.layer.0.attention.self.query.weight"]
    assert torch.equal(carried, inherited[own])
    assert carried.abs().max() > 0


def test_merged_adapters(pair):
    before, after = pair
    model = adapted(after, task_type="SEQ_CLS")
    expected = tiny.chain(before, model).query(TESTS).score(CORPUS).influence()
    model.merge_adapter()
    for work in (lambda: tiny.chain(before, model), lambda: training.save(model, None, "nowhere")):
        with pytest.raises(InputError, match=r"adapters \['default'\] are merged .*call unmerge_adapter\(\)"):
            work()
    with pytest.raises(InputError, match=r"stage 'pre': the adapters .* are merged"):
        split("fine", after, merged(before), previous_stage="pre")
    plain = copy.deepcopy(model)
    plain.unmerge_adapter()
    found = tiny.chain(before, plain).query(TESTS).score(CORPUS).influence()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    with pytest.raises(
        InputError, match=r"query\.weight' counts as frozen, but differs .*adapters were merged into it"
    ):
        tiny.chain(before, plain.merge_and_unload())


def merged(model):
    made = adapted(model)
    made.merge_adapter()
    return made


VIRTUAL = {
    "prompt": (peft.PromptTuningConfig, "PROMPT_TUNING"),
    "prefix": (peft.PrefixTuningConfig, "PREFIX_TUNING"),
}


@pytest.mark.parametrize(("config", "kind"), VIRTUAL.values(), ids=VIRTUAL)
def test_virtual_tokens(pair, config, kind):
    before, after = pair
    model = peft.get_peft_model(copy.deepcopy(after), config(task_type="SEQ_CLS", num_virtual_tokens=2))
    work = [
        lambda: tiny.chain(before, model),
        lambda: training.evaluate(model, tiny.objective("classification"), TWEETS),
    ]
    for one in work:
        with pytest.raises(InputError, match=rf"has virtual tokens \({kind}\), .*expected LoRA"):
            one()


def test_dora(pair):
    with pytest.raises(InputError, match=r"'[\w.]+query' is a DoRA, .*expected use_dora=False"):
        tiny.chain(pair[0], adapted(pair[1], use_dora=True))


# Training -----------------------------------------------------------------------------------------------------------


def changed(model, start):
    return {n for n, p in weights(model).items() if not torch.equal(p, start[n])}


def test_training_changes_adapters_and_head_alone(pair, tuned, tmp_path):
    model, start = copy.deepcopy(tuned), weights(tuned)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    settings = {"previous": pair[0], "trainable": "head", "weight_decay": 0.01, "progress": False}
    training.train(model, tiny.objective("classification"), TWEETS, arguments(tmp_path, max_steps=2), **settings)
    assert changed(model, start) == set(split("fine", tuned, pair[0], "head").trained)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted


def native(model):
    """Adapters as Transformers itself injects them; its `save_pretrained` writes them alone."""
    made = copy.deepcopy(model)
    made.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda model: adapted(model, task_type="SEQ_CLS"), native], ids=["PeftModel", "native"]
)
def test_a_training_that_goes_on_from_a_checkpoint(pair, tmp_path, make):
    """The pooler is trained and no part of an adapter's checkpoint."""
    settings = {"previous": pair[0], "trainable": "head", "progress": False}
    plan = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    begin = make(pair[1])
    whole, resumed = copy.deepcopy(begin), copy.deepcopy(begin)
    training.train(whole, tiny.objective("classification"), TWEETS, plan, **settings)
    shutil.rmtree(tmp_path / "checkpoint-4")
    training.train(resumed, tiny.objective("classification"), TWEETS, plan, **settings)
    same(weights(resumed), weights(whole))
    assert ending(changed(whole, weights(begin)), "pooler.dense.weight")
    assert getattr(whole, "_hf_peft_config_loaded", None) == getattr(begin, "_hf_peft_config_loaded", None)


@pytest.mark.slow
def test_polished_and_retrained(pair):
    """To a stationary point, all but adapters and head untouched; again without a sentence, from its encoder."""
    before, part = copy.deepcopy(pair[0]), ["*attention.self.value.*"]
    first, second = {"trainable": part, "weight_decay": 0.02}, {"trainable": "head", "weight_decay": 0.003}
    masked, classes = tiny.objective("masked"), tiny.objective("classification")
    training.polish(before, masked, CORPUS, **first)
    model = adapted(tiny.finetuned(before, "bert", **NARROW), r=1)
    start = weights(model)
    assert training.polish(model, classes, TWEETS, previous=before, **second).reached
    assert changed(model, start) == set(split("fine", model, before, "head").trained)

    retrain = WarmStart(
        [Stage("pre", before, masked, CORPUS, **first), Stage("fine", model, classes, TWEETS, **second)], TESTS
    )
    whole, one = retrain(frozenset()), retrain(frozenset([0]))
    assert whole.reached
    assert one.reached
    training.polish(before, masked, CORPUS, omit=[0], **first)
    value = "bert.encoder.layer.0.attention.self.value"
    with torch.no_grad():
        for end in ("weight", "bias"):
            own = model.get_parameter(f"base_model.model.{value}.base_layer.{end}")
            own.copy_(before.get_parameter(f"{value}.{end}"))
    training.polish(model, classes, TWEETS, previous=before, **second)
    expected = tiny.Plain(model, "classification", classes.collate(TESTS)).sums().tolist()
    np.testing.assert_allclose(one.losses, expected, rtol=1e-5)
    assert np.abs(np.subtract(one.losses, whole.losses)).max() > 1e-3 * max(expected)


def test_what_is_inherited_is_handed_on(pair, tuned):
    other, model = tiny.perturbed(copy.deepcopy(pair[0]), 5), copy.deepcopy(tuned)
    roles = split("fine", model, pair[0], "head")
    hand_on(other, model, roles, roles.frozen)
    for own, source in roles.inherited.items():
        assert torch.equal(model.get_parameter(own), other.get_parameter(source))
    assert changed(model, weights(tuned)) == set(roles.frozen)


# Files --------------------------------------------------------------------------------------------------------------

KINDS = {
    "classification": (lambda pair: adapted(pair[1], task_type="SEQ_CLS"), "AutoModelForSequenceClassification"),
    "tied": (lambda pair: adapted(pair[0], target_modules=["word_embeddings", "query"]), "AutoModelForMaskedLM"),
    "named": (lambda pair: named(pair[1]), "AutoModelForSequenceClassification"),
    "two dtypes": (lambda pair: adapted(copy.deepcopy(pair[1]).bfloat16()), "AutoModelForSequenceClassification"),
}


def named(model):
    return peft.get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["key"], use_rslora=True), "mine")


@pytest.mark.parametrize(("make", "auto"), KINDS.values(), ids=KINDS)
def test_what_is_saved_is_loaded_again(pair, tmp_path, make, auto):
    model, auto = make(pair), getattr(transformers, auto)
    training.save(model, tiny.tokenizer(), tmp_path / "fine")
    found = load_with_adapters(tmp_path / "fine", auto)
    inner = model.base_model.model
    same(weights(found), weights(inner))
    assert {n: p.dtype for n, p in found.named_parameters()} == {n: p.dtype for n, p in inner.named_parameters()}
    inputs = {
        k: v for k, v in tiny.objective("masked").collate(CORPUS).items() if k in ("input_ids", "attention_mask")
    }
    found.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, model.eval()(**inputs).logits)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "fine")) == len(tiny.WORDS)
    # Without the adapters' places in it, a plain model would be made of what is left.
    with pytest.raises(OSError, match=r"no file named .*safetensors"):
        auto.from_pretrained(tmp_path / "fine")


def test_several_adapters_are_not_saved(pair, tmp_path):
    model = adapted(pair[1])
    model.add_adapter("other", LoraConfig(target_modules=["query"]))
    with pytest.raises(InputError, match=r"adapters \['default', 'other'\]; expected one: delete_adapter"):
        training.save(model, None, tmp_path / "fine")
    assert not list(tmp_path.iterdir())


# The command line ---------------------------------------------------------------------------------------------------

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "lora_dropout": 0.1}


def lora_project(folder, **changes):
    path = project(folder)
    settings = json.loads(path.read_text())
    settings["stages"]["finetuning"]["model"] = {"lora": {**LORA, **changes}}
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.slow
def test_train_query_and_score(tmp_path, capsys):
    path = lora_project(tmp_path)
    assert msif("train", "--config", path) == 0
    assert msif("query", "--config", path) == 0
    assert msif("score", "--config", path, "--json") == 0
    assert msif("plan", "--config", path) == 0
    run = Run(load(path), progress=False)
    before, model = run.model("pretraining"), run.model("finetuning")
    assert type(model) is transformers.BertForSequenceClassification
    fresh = run.new_model("finetuning")
    roles = split("finetuning", model, before, "head")
    assert changed(model, weights(fresh)) == set(roles.trained)
    assert len([n for n in roles.trained if "lora_" in n]) == 4
    scores = run.chain().query(run.tests()).score(run.corpus())
    assert np.abs(scores.influence(0)).max() > 0
    assert (tmp_path / "run" / "table1.md").exists()
    same(weights(run.new_models(3)[1]), weights(run.new_models(3)[1]))

    other = ("stages.finetuning.model.lora.lora_alpha", 400)
    with pytest.raises(InputError, match=r"trained with stages\.finetuning\.model\.lora\.lora_alpha = 4; the config"):
        Run(load(path, [other]), progress=False).model("finetuning")
    # Where it is taken as it is, the finished model says what its adapters are, not the configuration.
    taken = [("stages.finetuning.model.path", str(run.folder / "finetuning")), ("stages.finetuning.training", {})]
    again = Run(load(path, [other, *taken]), progress=False).model("finetuning")
    layer = again.bert.encoder.layer[0].attention.self.query
    assert layer.scaling == {"default": 2.0}


WRONG = {
    "unknown": ({"lora_alhpa": 3}, r"lora_alhpa.*stages\.finetuning\.model\.lora\.lora_alpha"),
    "type": ({"r": "many"}, r"stages\.finetuning\.model\.lora\.r is many; expected a whole number"),
    "ours": ({"task_type": "SEQ_CLS"}, r"stages\.finetuning\.model\.lora\.task_type"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', which changes the inherited weights"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_settings_of_lora_are_checked_first(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        Run(load(lora_project(tmp_path, **changes)), progress=False)


def test_modules_that_the_model_has_not(tmp_path):
    path = lora_project(tmp_path, target_modules=["q_proj"])
    assert msif("train", "--config", path, "--stage", "pretraining") == 0
    with pytest.raises(InputError, match=r"stages\.finetuning\.model\.lora: Target modules \{'q_proj'\} not found"):
        Run(load(path), progress=False).new_model("finetuning")


def test_lora_is_for_the_last_stage(tmp_path):
    path = lora_project(tmp_path)
    with pytest.raises(InputError, match=r"stages\.pretraining\.model\.lora is for later stages"):
        load(path, [("stages.pretraining.model.lora", {"r": 2})])
    stages = json.loads(path.read_text())["stages"]
    stages["again"] = {**stages["finetuning"], "model": {}}
    with pytest.raises(
        InputError, match=r"stages\.again would build on the encoder of 'finetuning', which has adapters"
    ):
        load(path, [("stages", stages)])


def test_without_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'model\.lora needs peft, .*: pip install "hf_msif\[peft\]"'):
        Run(load(lora_project(tmp_path)), progress=False)
    before = tiny.model("bert", "masked")
    assert len(tiny.chain(before, tiny.finetuned(before, "bert")).query(TESTS).score(CORPUS)) == len(CORPUS)
