"""Tiny Hugging Face models, a tokenizer, sentences, and losses that share no code with the library."""

import copy
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hf_msif import MultiStageInfluence, Stage, objectives, solvers
from hf_msif.engine.accelerated import to_device
from hf_msif.models import ElmoConfig, ElmoTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "a", "vote", "debate", "candidate", "wall", "tax", "jobs", "won", "lost", "great", "sad"]
WORDS += ["said", "of", "and", "we", "they", "will", "no", "yes"]
LENGTH = 20


def tokenizer(side="right", template=True, words=WORDS, **settings):
    """Whole words; `template` adds [CLS] and [SEP]."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        ends = [(word, words.index(word)) for word in ("[CLS]", "[SEP]")]
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, special_tokens=ends)
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side=side, **{"model_max_length": LENGTH, **names, **settings}
    )


def pair_tokenizer():
    """One that says which of two texts a token belongs to, as BERT's does."""
    return tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def rows(size, seed=0, classes=2, longest=9, shortest=1):
    """Sentences of uneven length with a label."""
    generator = np.random.default_rng(seed)
    return [
        {
            "example_id": i,
            "text": " ".join(generator.choice(WORDS[len(SPECIAL) :], generator.integers(shortest, longest + 1))),
            "label": int(generator.integers(classes)),
        }
        for i in range(size)
    ]


def rows_of_all_tasks(size, seed=0, longest=6, shortest=2):
    """The same sentences with all that the objectives read beside them."""
    generator = np.random.default_rng(seed + 100)
    found = []
    for row, other in zip(rows(size, seed, 2, longest, shortest), rows(size, seed + 50, 2, longest), strict=True):
        words = row["text"].split()
        applies = generator.permutation(3)[: generator.integers(4)]
        found.append(
            {
                **row,
                "text_pair": other["text"],
                "target": other["text"],
                "next_sentence_label": row["label"],
                "number": float(generator.normal()),
                "classes": sorted(int(c) for c in applies),
                "tokens": words,
                "tags": [int(c) for c in generator.integers(3, size=len(words))],
            }
        )
    return found


_NARROW = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": LENGTH + 4}
_NARROW |= {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
CONFIGS = {
    "bert": lambda layers, **kw: transformers.BertConfig(num_hidden_layers=layers, **_NARROW | kw),
    "roberta": lambda layers, **kw: transformers.RobertaConfig(num_hidden_layers=layers, **_NARROW | kw),
    "distilbert": lambda layers, **kw: transformers.DistilBertConfig(
        n_layers=layers, dim=16, n_heads=2, hidden_dim=24, vocab_size=len(WORDS), max_position_embeddings=LENGTH, **kw
    ),
    "albert": lambda layers, **kw: transformers.AlbertConfig(
        num_hidden_layers=layers, **_NARROW | {"embedding_size": 8} | kw
    ),
    "electra": lambda layers, **kw: transformers.ElectraConfig(
        num_hidden_layers=layers, **_NARROW | {"embedding_size": 8} | kw
    ),
    "deberta-v2": lambda layers, **kw: transformers.DebertaV2Config(
        num_hidden_layers=layers,
        **_NARROW | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4} | kw,
    ),
    "modernbert": lambda layers, **kw: transformers.ModernBertConfig(
        num_hidden_layers=layers, **_NARROW | {"cls_token_id": 2, "sep_token_id": 3} | kw
    ),
    "gpt2": lambda layers, **kw: transformers.GPT2Config(
        n_layer=layers,
        **{"n_embd": 16, "n_head": 2, "n_positions": LENGTH, "vocab_size": len(WORDS)}
        | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        | kw,
    ),
    "llama": lambda layers, **kw: transformers.LlamaConfig(
        num_hidden_layers=layers, **_NARROW | {"num_key_value_heads": 1} | kw
    ),
}
ENCODER_DECODERS = {
    "bart": lambda layers, **kw: transformers.BartConfig(
        encoder_layers=layers, decoder_layers=layers, **_HALVES | {"max_position_embeddings": LENGTH} | kw
    ),
    "t5": lambda layers, **kw: transformers.T5Config(
        num_layers=layers, d_kv=8, d_ff=24, num_heads=2, **{k: _HALVES[k] for k in _SHARED} | kw
    ),
}
_SHARED = ("vocab_size", "d_model", "pad_token_id", "eos_token_id", "decoder_start_token_id")
_HALVES = {"vocab_size": len(WORDS), "d_model": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_HALVES |= {"decoder_start_token_id": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_HALVES |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "forced_eos_token_id": None}
_CHARACTERS = {"filters": [[1, 3], [2, 4]], "character_size": 3, "num_highway_layers": 1, "dropout": 0.1}
_CHARACTERS |= {"cell_size": 8, "projection_size": 4, "cell_clip": 0.8, "projection_clip": 0.6}
_CHARACTERS |= {"vocab_size": 12, "classifier_hidden_size": 6}
CAUSAL = ("gpt2", "llama")
MASKED = tuple(name for name in CONFIGS if name not in CAUSAL)
CLASSES = {
    "masked": transformers.AutoModelForMaskedLM,
    "causal": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "bidirectional": transformers.AutoModelForPreTraining,
    "characters": transformers.AutoModelForSequenceClassification,
    "base": transformers.AutoModel,
    "sequence to sequence": transformers.AutoModelForSeq2SeqLM,
    "pairs": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "multi-label": transformers.AutoModelForSequenceClassification,
    "words": transformers.AutoModelForTokenClassification,
    "next sentence": transformers.AutoModelForPreTraining,
    "replaced tokens": transformers.AutoModelForPreTraining,
}
PLAIN = ("masked", "causal", "classification", "bidirectional", "characters", "base")  # rows of a text and a label
OUTPUTS = {"regression": 1, "multi-label": 3, "words": 3}


def perturbed(model, seed, size=0.2):
    """No LayerNorm stays the identity and no bias zero, so that a tensor left out of a derivative shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator).to(p)
    return model


def model(name, task, seed=0, layers=1, dtype=torch.float64, attention=None, **config):
    """A model in train mode, with dropout configured: the library must switch it off."""
    torch.manual_seed(seed)
    settings = {"attn_implementation": attention} if attention else {}
    if name == "elmo":
        config = ElmoConfig(num_hidden_layers=layers + 1, **_CHARACTERS | config)
    else:
        labels = {"num_labels": OUTPUTS[task]} if task in OUTPUTS else {}
        config = {**CONFIGS, **ENCODER_DECODERS}[name](layers, **labels | config)
    made = CLASSES[task].from_config(config, **settings)
    return perturbed(made, seed).to(dtype).train()


def finetuned(before, name, seed=1, **settings):
    """A classifier on the encoder of `before`."""
    made = model(name, "characters" if name == "elmo" else "classification", seed, **settings)
    made.base_model.load_state_dict(before.base_model.state_dict(), strict=False)
    return made


def objective(task, **settings):
    if task == "masked":
        return objectives.MaskedLM(tokenizer(), **{"mask_probability": 0.4, **settings})
    if task == "causal":
        return objectives.CausalLM(tokenizer(template=False), **settings)
    if task in ("bidirectional", "characters"):
        words = ElmoTokenizer.train([" ".join(WORDS[len(SPECIAL) :])], size=12, model_max_length=LENGTH)
        kind = objectives.BidirectionalLM if task == "bidirectional" else objectives.SequenceClassification
        return kind(words, **settings)
    if task == "sequence to sequence":
        return objectives.Seq2SeqLM(tokenizer(), **settings)
    if task == "pairs":
        return objectives.SequenceClassification(pair_tokenizer(), text_pair_column="text_pair", **settings)
    if task == "regression":
        return objectives.Regression(tokenizer(), **{"label_column": "number", **settings})
    if task == "multi-label":
        return objectives.MultiLabel(tokenizer(), **{"label_column": "classes", **settings})
    if task == "words":
        return objectives.TokenClassification(tokenizer(), **{"label_column": "tags", **settings})
    if task in ("next sentence", "replaced tokens"):
        kinds = {
            "next sentence": objectives.NextSentenceMaskedLM,
            "replaced tokens": objectives.ReplacedTokenDetection,
        }
        tokens = pair_tokenizer() if task == "next sentence" else tokenizer()
        return kinds[task](tokens, **{"mask_probability": 0.4, **settings})
    return objectives.SequenceClassification(tokenizer(), **settings)


def chain(before, after, tol=1e-3, data=(), pretraining=(), **finetuning):
    """Pretraining and finetuning, the encoder frozen unless `finetuning` says otherwise."""
    corpus, tweets = data or (rows(6, seed=1), rows(5, seed=2))
    tasks = {"msif_elmo": ("bidirectional", "characters"), **dict.fromkeys(CAUSAL, ("causal", "classification"))}
    task, then = tasks.get(before.config.model_type, ("masked", "classification"))
    solver = solvers.CG(damping=0.5, tol=tol, max_iter=400)
    finetuning = {"trainable": "head", "solver": solver, **finetuning}
    return MultiStageInfluence(
        [
            Stage("pre", before, objective(task), corpus, **{"solver": solver, **dict(pretraining)}),
            Stage("fine", after, objective(then), tweets, **finetuning),
        ],
        progress=False,
    )


class Plain:
    """One batch's losses by an ordinary copy of the model: evaluation mode, all logits, −log softmax at targets.

    On the CPU, wherever the library computes. Of `draws` masks per row, the losses are averaged.
    """

    def __init__(self, model, task, batch, draws=1):
        self.model, self.task, self.draws = copy.deepcopy(model).cpu().eval().requires_grad_(True), task, draws
        self.batch = to_device(batch or {}, torch.device("cpu"))
        self.parameters = dict(self.model.named_parameters())

    def scored(self):
        """(logits (M, V), targets (M,), owner (M,)): what is predicted, and by which example of the batch."""
        batch = self.batch
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        logits = self.model(**inputs).logits
        if self.task == "masked":
            return logits[batch["rows"], batch["columns"]], batch["labels"], batch["rows"] // self.draws
        if self.task in ("classification", "characters"):
            return logits, batch["labels"], torch.arange(len(logits))
        owner, position = batch["attention_mask"][:, 1:].nonzero(as_tuple=True)
        if self.task == "bidirectional":
            words = [batch["labels"][owner, position + 1], batch["labels"][owner, position]]
            return logits.flatten(0, 1), torch.cat(words), owner.repeat(2)
        return logits[owner, position], batch["input_ids"][owner, position + 1], owner

    def sums(self):
        logits, targets, owner = self.scored()
        terms = (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]) / self.draws
        return terms.new_zeros(len(self.batch["input_ids"]) // self.draws).index_add(0, owner, terms)

    def gradient(self, names, of=None):
        leaves = [self.parameters[name] for name in names]
        total = self.sums().sum() if of is None else of
        found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=of is not None)
        return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, leaves, found, strict=True)}

    def along(self, direction, measure, step=1e-5):
        """Central difference of `measure()` (a tensor or a dict of tensors) along a direction, per unit."""
        values = []
        for sign in (1, -1):
            self._move(direction, sign * step)
            with torch.set_grad_enabled(True):
                values.append(measure())
            self._move(direction, -sign * step)
        up, down = values
        if isinstance(up, dict):
            return {name: (up[name] - down[name]) / (2 * step) for name in up}
        return ((up - down) / (2 * step)).detach()

    def _move(self, direction, step):
        with torch.no_grad():
            for name, v in direction.items():
                self.parameters[name] += step * v.to(self.parameters[name])


def dense_gauss_newton(plain, names):
    """Σ JᵀH_outJ with J built row by row by plain autograd and H_out = diag(p) − ppᵀ of each prediction."""
    logits = plain.scored()[0]
    rows = [plain.gradient(names, of=z) for z in logits.flatten()]
    jacobian = torch.stack([torch.cat([row[n].flatten() for n in names]) for row in rows])
    p = logits.detach().softmax(1)
    outer = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))
    return jacobian.T @ outer @ jacobian


def block(parameters, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(columns, *p.shape, generator=generator, dtype=p.dtype).to(p) for n, p in parameters.items()}


def close(found, expected, tolerance):
    """Each tensor of a vector within `tolerance` of the largest entry of the whole."""
    assert set(found) == set(expected)
    size = max(float(t.abs().max()) for t in expected.values())
    assert size > 0
    for name, t in expected.items():
        torch.testing.assert_close(
            found[name].cpu(), t.cpu(), rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def alone(rank=0, world=1, **more):
    """What `Engine` needs of an Accelerator, for one rank of a world that does not exist."""
    return SimpleNamespace(
        process_index=rank, num_processes=world, is_main_process=rank == 0, device=torch.device("cpu"), **more
    )
