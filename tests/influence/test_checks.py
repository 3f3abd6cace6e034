"""The checks of a stage when it is bound: what they find, what they refuse, and that equal lengths are exact."""

import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as T
from helpers import digits, tiny
from helpers.toy import ToyModel, ToyObjective, toy, toy_rows

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, training
from hf_msif.influence.findings import findings
from hf_msif.models import ConvNetConfig, ConvNetForImageClassification
from hf_msif.registry import CHECKS

BERT = {"vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = {**BERT, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
AXK2 = {**LLAMA, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "moe_intermediate_size": 8}
AXK2 |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 4}
AXK2 |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "index_topk": 4}
AXK2 |= {"index_n_heads": 2, "index_head_dim": 16, "experts_implementation": "eager"}
FNET = {key: value for key, value in BERT.items() if key != "num_attention_heads"}
SENTENCES = tiny.rows(9, seed=3, longest=14, shortest=3)
LONG_SENTENCES = tiny.rows(8, seed=3, longest=18, shortest=16)

# Padding reaches the loss of each of them. (FNet has no attention mask; MobileBERT and ConvBERT convolve over padding;
# Nystromformer does too; BigBird attends in blocks; AXK2 attends to a few tokens that it selects; the Llama takes its
# last token for padding.)
REACHED = {
    "fnet": lambda: T.FNetForMaskedLM(T.FNetConfig(**FNET)),
    "mobilebert": lambda: T.MobileBertForMaskedLM(
        T.MobileBertConfig(**BERT, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=1)
    ),
    "convbert": lambda: T.ConvBertForMaskedLM(
        T.ConvBertConfig(**BERT, embedding_size=16, conv_kernel_size=3, head_ratio=1)
    ),
    "nystromformer": lambda: T.NystromformerForMaskedLM(
        T.NystromformerConfig(**BERT, num_landmarks=8, segment_means_seq_len=8, conv_kernel_size=3)
    ),
    "big_bird": lambda: T.BigBirdForMaskedLM(
        T.BigBirdConfig(**BERT, block_size=2, num_random_blocks=1, attention_type="block_sparse", sep_token_id=3)
    ),
    "axk2": lambda: T.AXK2ForCausalLM(T.AXK2Config(**AXK2)),
    "llama": lambda: T.LlamaForSequenceClassification(
        T.LlamaConfig(**{**LLAMA, "pad_token_id": 3, "eos_token_id": 3}, num_labels=2)
    ),
}


def perturbed(make, dtype=torch.float64):
    torch.manual_seed(0)
    return tiny.perturbed(make().to(dtype), 0, 0.2)


def objective_of(model):
    tokenizer = tiny.tokenizer()
    kinds = {"Masked": objectives.MaskedLM, "Sequence": objectives.SequenceClassification}
    return next((kind for key, kind in kinds.items() if key in type(model).__name__), objectives.CausalLM)(tokenizer)


def stage(model, rows=SENTENCES, **settings):
    settings = {"solver": solvers.CG(damping=10.0, tol=1e-10, max_iter=500), **settings}
    return Stage("only", model, objective_of(model), rows, **settings)


def bound(model, rows=SENTENCES, **settings):
    return MultiStageInfluence([stage(model, rows, **settings)], progress=False)


def one_row_at_a_time(query, model, objective, rows):
    """−⟨u, ∇ℓ⟩ by plain backward passes over single rows: no padding, no forward mode."""
    u = {name: t[0] for name, t in query.solutions["only"].items()}
    model, influences = model.eval(), []
    for row in rows:
        sums, _ = objective.losses(
            lambda positions=None, **inputs: at(model(**inputs), positions), objective.collate([row])
        )
        gradients = torch.autograd.grad(sums.sum(), [model.get_parameter(name) for name in u], allow_unused=True)
        influences.append(-sum(float((u[n] * g).sum()) for n, g in zip(u, gradients, strict=True) if g is not None))
    return influences


def at(output, positions):
    if positions is not None:
        output.logits = output.logits[positions]
    return output


@pytest.mark.parametrize("name", REACHED)
def test_where_padding_reaches_the_loss_scores_are_those_of_single_rows(name):
    model, rows = perturbed(REACHED[name]), LONG_SENTENCES if name == "big_bird" else SENTENCES
    with pytest.warns(UserWarning, match="'only': padding reaches the loss: batches of rows of equal length are used"):
        chain = bound(model, rows, batch_size=4)
    query = chain.query(rows[:1])
    expected = np.array(one_row_at_a_time(query, model, chain.stages[0].objective, rows))
    limit = 1e-7 if name in ("llama", "axk2") else 1e-12  # they normalise in float32
    for size in (1, 3, 8):
        np.testing.assert_allclose(
            query.score(rows, batch_size=size).influence(), expected, rtol=0, atol=limit * np.abs(expected).max()
        )


def test_the_curvature_of_such_a_model_is_that_of_single_rows():
    model = perturbed(REACHED["fnet"])
    products = []
    for size in (1, 8):
        with pytest.warns(UserWarning, match="padding reaches"):
            operator = bound(model, batch_size=size).stages[0].differentiation.operator
        products.append(operator.matvec(tiny.block(operator.parameters, 2, seed=1)))
    tiny.close(*products, 1e-12)


def test_skipped_padding_leaves_the_batches_as_they_were():
    model = perturbed(REACHED["fnet"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        chain = bound(model, skip_checks=["padding"])
    assert chain.stages[0].objective.pads
    assert [f.text for f in chain.stages[0].findings if f.check == "padding"] == ["skipped"]


def test_other_models_keep_their_batches():
    chain = bound(perturbed(lambda: T.BertForMaskedLM(T.BertConfig(**BERT))))
    assert chain.stages[0].objective.pads
    found = {finding.check: finding for finding in chain.stages[0].findings}
    assert list(found) == list(CHECKS)
    assert all(f.value is None or f.value < 1e-9 for f in found.values())


@pytest.mark.parametrize("task", ["images", "texts"])
def test_rows_learned_by_heart_pass(task):
    """Their losses are differences of nearly equal numbers, all rounding in float32."""
    if task == "images":
        config = ConvNetConfig(image_size=8, channels=[4], kernel_size=3, dense=[], num_labels=4)
        model, objective = ConvNetForImageClassification(config), objectives.ImageClassification(scale=0.0625)
        rows = digits.rows(range(4), 8, seed=0)
    else:
        model = T.BertForSequenceClassification(T.BertConfig(**BERT, num_labels=2))
        objective, rows = objectives.SequenceClassification(tiny.tokenizer()), SENTENCES
    perturbed(lambda: model, torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("classifier"):
                p.mul_(100)
    labels = model.eval()(**{k: v for k, v in objective.collate(rows).items() if k in objective.inputs}).logits.argmax(
        1
    )
    rows = [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]
    chain = MultiStageInfluence([Stage("only", model, objective, rows)], progress=False)
    assert chain.stages[0].objective.pads


def test_polishing_minimises_the_loss_of_single_rows():
    """The F that is polished is the F that is differentiated: without padding."""
    model = perturbed(REACHED["llama"])
    training.polish(model, objective_of(model), SENTENCES, trainable=["score.*"], weight_decay=0.1)
    with pytest.warns(UserWarning, match="padding reaches"):
        chain = bound(model, trainable=["score.*"], weight_decay=0.1, curvature="hessian")
    assert chain.stages[0].differentiation.gradient_norm < 1e-8


def test_evaluation_reads_single_rows_too():
    """The Llama that takes its last token for padding: accuracy and mistakes are those of rows alone."""
    model, objective = perturbed(REACHED["llama"]), objectives.SequenceClassification(tiny.tokenizer())
    labels = [int(model.eval()(**of_row(objective, row)).logits.argmax()) for row in SENTENCES]
    rows = [{**row, "label": label} for row, label in zip(SENTENCES, labels, strict=True)]
    assert training.evaluate(model, objective, rows)["accuracy"] == 1
    assert training.mistakes(model, objective, rows) == []


def of_row(objective, row):
    return {key: t for key, t in objective.collate([row]).items() if key in objective.inputs}


REFUSED = {
    "a masked model as a causal one": (
        lambda: T.BertLMHeadModel(T.BertConfig(**BERT)),
        "CausalLM predicts each token from those before it, but in BertLMHeadModel another token .* moves",
    ),
    "XLNet": (
        lambda: T.XLNetLMHeadModel(
            T.XLNetConfig(vocab_size=len(tiny.WORDS), d_model=16, n_layer=2, n_head=2, d_inner=24)
        ),
        "XLNetLMHeadModel another token .* moves the logits before it",
    ),
    "RoBERTa": (
        lambda: T.RobertaForCausalLM(T.RobertaConfig(**BERT)),
        "RobertaForCausalLM another token .* moves",
    ),
    "a classifier without a pad id": (
        lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**{**LLAMA, "pad_token_id": None}, num_labels=2)),
        r"takes single rows, but not several of different length .* set model.config.pad_token_id = 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        bound(perturbed(make))


@pytest.mark.parametrize("settings", [{}, {"curvature": "hessian"}, {"solver": solvers.Identity()}], ids=str)
def test_a_backward_that_is_no_derivative_is_refused(settings):
    """YOSO's attention has a backward function that is not the derivative of its forward function, and no jvp: the
    Gauss-Newton products of such a model are symmetric, and Identity takes none."""
    model = perturbed(lambda: T.YosoForMaskedLM(T.YosoConfig(**BERT)))
    with pytest.raises(ValueError, match="is not symmetric"), pytest.warns(UserWarning, match="padding reaches"):
        bound(model, **settings)


class Square(torch.autograd.Function):
    """x², with neither a jvp nor a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Squaring(ToyModel):
    def forward(self, x):
        output = super().forward(x)
        output.logits = Square.apply(output.logits)
        return output


def test_a_model_with_one_derivative_has_scores_and_no_curvature():
    rows = toy_rows(0, 6)
    chain = MultiStageInfluence(
        [Stage("only", toy(0, Squaring), ToyObjective(), rows, solver=solvers.Identity())], progress=False
    )
    text = "Identity uses no curvature, and a backward function of Squaring has no derivative"
    assert [f.text for f in chain.stages[0].findings if f.check == "symmetry"] == [text]
    query = chain.query(rows[:1])
    u = {name: t[0] for name, t in query.solutions["only"].items()}
    model, expected = toy(0, Squaring), []
    for row in rows:
        sums, _ = ToyObjective().losses(model, ToyObjective().collate([row]))
        gradients = torch.autograd.grad(sums.sum(), [model.get_parameter(name) for name in u])
        expected.append(-sum(float((t * g).sum()) for t, g in zip(u.values(), gradients, strict=True)))
    np.testing.assert_allclose(query.score(rows).influence(), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="Squaring has no derivative of the kind that curvature='gauss_newton' needs"):
        MultiStageInfluence([Stage("only", toy(0, Squaring), ToyObjective(), rows)], progress=False)


def test_a_run_of_such_a_model_is_not_gone_back_through(tmp_path):
    """Autograd would leave out what passes the function, without a word."""
    model, rows = toy(0, Squaring), toy_rows(0, 6)
    arguments = T.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True, num_train_epochs=1)
    training.record(model, ToyObjective(), rows, arguments, tmp_path / "run", progress=False)
    stage = Stage("only", model, ToyObjective(), rows, link="unrolled", run=tmp_path / "run")
    with pytest.raises(ValueError, match="a function of Squaring is marked as once_differentiable"):
        MultiStageInfluence([stage], progress=False).query(rows[:1])


class PrefixLlama(T.LlamaForCausalLM):
    """The first four tokens see each other."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[:4, :4] = True
        seen = seen[None, None] & attention_mask[:, None, None].bool()
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)
        return super().forward(input_ids=input_ids, attention_mask=mask, **inputs)


class GlancingLlama(T.LlamaForCausalLM):
    """Each logit sees the next token, but not the last one."""

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        ahead = torch.nn.functional.pad(self.model.embed_tokens(input_ids)[:, 1:-1], (0, 0, 0, 2))
        output.logits = output.logits + self.lm_head(ahead)
        return output


@pytest.mark.filterwarnings("ignore:stage .only.. padding")
@pytest.mark.parametrize("kind", [PrefixLlama, GlancingLlama])
def test_a_model_that_sees_some_tokens_ahead_is_refused(kind):
    with pytest.raises(ValueError, match=f"in {kind.__name__} another token .* moves the logits before it"):
        bound(perturbed(lambda: kind(T.LlamaConfig(**LLAMA))))


class MaskedVocabulary(T.FNetForMaskedLM):
    """Never predicts [PAD]: its logit is the smallest number."""

    smallest = torch.finfo(torch.float64).min

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits.clone()
        output.logits[..., 0] = self.smallest
        return output


def test_a_masked_vocabulary_hides_nothing():
    with pytest.warns(UserWarning, match="padding reaches the loss"):
        assert not bound(perturbed(lambda: MaskedVocabulary(T.FNetConfig(**FNET)))).stages[0].objective.pads


def test_a_row_whose_loss_is_not_finite_is_refused():
    class Undefined(ToyObjective):
        def losses(self, call, batch):
            sums, counts = super().losses(call, batch)
            return sums * torch.nan, counts

    with pytest.raises(ValueError, match=r"stage 'only': the loss of its row .* is not finite"):
        MultiStageInfluence([Stage("only", toy(0), Undefined(), toy_rows(0, 6))], progress=False)


class Logits(ToyModel):
    """Returns a tuple, as a model of one's own may."""

    def forward(self, x):
        return (super().forward(x).logits,)


class OfTuples(ToyObjective):
    def losses(self, call, batch):
        return super().losses(lambda **inputs: SimpleNamespace(logits=call(**inputs)[0]), batch)


def test_models_may_return_a_tuple():
    stage = Stage("only", toy(0, Logits), OfTuples(), toy_rows(0, 6), solver=solvers.Identity())
    MultiStageInfluence([stage], progress=False)


def test_a_trained_model_with_parts_in_float32_passes_in_float64():
    """The rounding of RMSNorm and rotary positions is larger than that of float64."""
    torch.manual_seed(0)
    model, objective = T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)), objectives.CausalLM(tiny.tokenizer())
    optimiser, batch = torch.optim.Adam(model.parameters(), lr=1e-2), objective.collate(SENTENCES)
    for _ in range(100):
        optimiser.zero_grad()
        sums, counts = objective.losses(model, batch)
        (sums.sum() / counts.sum()).backward()
        optimiser.step()
    assert bound(model.double()).stages[0].objective.pads


def test_a_gradient_that_is_zero_is_no_effect():
    """The softmax of attention does not see what the bias of its keys adds to all of them."""
    assert (
        bound(perturbed(lambda: T.BertForMaskedLM(T.BertConfig(**BERT))), trainable=["*key.bias"])
        .stages[0]
        .objective.pads
    )


def test_causal_models_pass():
    models = [
        perturbed(lambda: T.BertLMHeadModel(T.BertConfig(**BERT, is_decoder=True))),
        perturbed(lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA))),
    ]
    for model in models:
        assert "moves no logit" in next(f.text for f in bound(model).stages[0].findings if f.check == "causality")


class Noisy(ToyObjective):
    """Draws random numbers when it is called, not from the rows."""

    def losses(self, call, batch):
        sums, counts = super().losses(call, batch)
        return sums + 0.1 * torch.rand(len(sums)).to(sums), counts


class RandomBatches(ToyObjective):
    def collate(self, rows):
        batch = super().collate(rows)
        key = next(k for k, t in batch.items() if t.is_floating_point())
        return {**batch, key: batch[key] + torch.rand(batch[key].shape).to(batch[key])}


class Contrastive(ToyObjective):
    """Losses that depend on the other rows of the batch, as those with in-batch negatives do."""

    def losses(self, call, batch):
        sums, counts = super().losses(call, batch)
        return sums - sums.mean() / 2, counts


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Noisy, "the loss of the same row is .* and .* after another row was read: .* draws random numbers"),
        (RandomBatches, "RandomBatches.collate made two different batches of the same row"),
        (Contrastive, "the loss of a row changes beside other rows in the same batch"),
    ],
)
def test_objectives_that_are_no_function_of_single_rows_are_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        MultiStageInfluence([Stage("only", toy(0), objective(), toy_rows(0, 6))], progress=False)


def test_every_check_can_be_skipped_and_is_named():
    for name in CHECKS:
        chain = bound(perturbed(lambda: T.BertForMaskedLM(T.BertConfig(**BERT))), skip_checks=[name])
        assert {f.check for f in chain.stages[0].findings if f.text == "skipped"} == {name}
    with pytest.raises(ValueError, match=r"skip_checks is \['pading'\]; expected a list of names"):
        stage(perturbed(REACHED["fnet"]), skip_checks=["pading"])


def test_findings_go_on_after_a_refusal():
    chain = bound(perturbed(REFUSED["XLNet"][0]), skip_checks=list(CHECKS))
    chain.stages[0].stage.skip_checks = ()
    found = {finding.check: finding for finding in findings(chain.stages[0])}
    assert [name for name, finding in found.items() if finding.refused] == ["causality"]
    assert list(found) == list(CHECKS)
    assert "REFUSED" in str(found["causality"])


@dataclass(frozen=True)
class Fixed(objectives.CausalLM):
    """Pads every text to the same length, so that there is nothing to compare."""

    def collate(self, rows):
        batch = super().collate(rows)
        width = tiny.LENGTH - batch["input_ids"].shape[1]
        return {k: torch.nn.functional.pad(t, (0, width)) if t.ndim == 2 else t for k, t in batch.items()}


@pytest.mark.parametrize("rows", [SENTENCES[:1], [{**SENTENCES[0], "example_id": i} for i in range(5)]], ids=len)
def test_rows_of_one_length_are_compared_with_shorter_ones(rows):
    """What is scored later may be shorter than what the stage was trained on."""
    with pytest.warns(UserWarning, match="padding reaches the loss"):
        query = bound(perturbed(REACHED["fnet"]), rows).query(rows[:1])
    scores = [query.score(SENTENCES, batch_size=size).influence() for size in (1, 8)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-12 * np.abs(scores[0]).max())


def test_a_row_of_one_word_has_nothing_to_be_compared_with():
    rows = [{"example_id": 0, "text": "vote", "label": 0}]
    chain = bound(perturbed(lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA))), rows)
    assert next(f.text for f in chain.stages[0].findings if f.check == "padding") == "there is one row only"


def test_texts_of_one_padded_length_pass():
    model = perturbed(lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)))
    chain = MultiStageInfluence([Stage("only", model, Fixed(tiny.tokenizer()), SENTENCES)], progress=False)
    assert "rows have the same losses" in next(f.text for f in chain.stages[0].findings if f.check == "padding")
