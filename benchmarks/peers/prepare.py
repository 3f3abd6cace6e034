"""Makes the two problems of the comparison with hf_msif: `cost`, for time and memory, and `quality`, for agreement.

`cost` is a BERT with random weights; `quality` a tiny BERT trained on sentences of the grammar of `msif demo`, whose
exact scores are known and which was trained again on subsets of its sentences.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problem import MaskedWords, Problem, Sentences, losses, untied
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, TrainingArguments

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, training, validation
from hf_msif.project.demo import grammar

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DECAY = 0.01  # of the runs of `quality`
STEPS = 150


def tokenizer_of(words: list[str]) -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def cost(folder: Path, sentences: int, queries: int, vocabulary: int, tokens: int = 32, seed: int = 0) -> None:
    """BERT with random weights, 4 layers of 256, on random words whose frequency is proportional to 1/rank."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocabulary - len(SPECIAL) + 1)
    drawn = generator.choice(words[len(SPECIAL) :], (sentences + queries, tokens - 2), p=weights / weights.sum())
    texts = [" ".join(row) for row in drawn]
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
    )
    model = BertForMaskedLM(config).eval()
    save(folder, model, words, texts[:sentences], texts[sentences:], {"mask_probability": 0.15, "seed": seed}, {})


def quality(folder: Path, sentences: int, queries: int, subsets: int, seed: int = 0) -> None:
    """A trained model with its exact scores and the measured effects of leaving sentences out.

    Files beside those of every problem: `exact.npz` with the removal effects (N, Q) under the Gauss-Newton matrix and
    under the Hessian, each plus λ, in float64; `subsets.npz` with the omitted rows and their measured effects.
    """
    world = grammar.world(seed, decoys=6 * sentences // 16, filler=6 * sentences)
    every = dict.fromkeys(row["text"] for row in world.corpus if len(row["text"].split()) == 9)
    texts = list(itertools.islice(every, sentences + queries))
    words = [*SPECIAL, *sorted({word for text in texts for word in text.split()})]
    masks = {"mask_probability": 0.3, "seed": seed, "static": True}
    rows, tests = rows_of(texts[:sentences], texts[sentences:])
    objective = objectives.MaskedLM(tokenizer_of(words), **masks)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.25,
        layer_norm_eps=1.0,  # as in recipes/text_lds: with BERT's own, decay makes the curvature grow
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model, run = BertForMaskedLM(config).double().eval(), folder / "run"
    # ε inside the root: a smooth run, which can be repeated without a sentence.
    adam = {"learning_rate": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 30, "max_grad_norm": 0.0}
    adam |= {"adam_beta2": 0.99, "adam_epsilon": 1e-3, "optim_args": "eps_inside_root=true"}
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=sentences,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        **adam,
    )
    training.record(model, objective, rows, arguments, run, weight_decay=DECAY, name="only")
    stage = Stage("only", model, objective, rows, link="unrolled", run=run, weight_decay=DECAY, batch_size=sentences)
    bank = validation.Bank(validation.WarmStart([stage], tests), folder / "bank")
    omissions = validation.experiments.random_omissions(range(sentences), subsets, 0.95, seed)
    effects = bank.effects(omissions)
    # From here on the model is what every library is given: weights rounded to float32.
    model = model.float().double()
    answers, damping = {}, "auto"
    for curvature in ("gauss_newton", "hessian"):
        query = chain(model, objective, rows, curvature, solvers.Dense(damping=damping, chunk=256)).query(tests)
        answers[curvature] = query.score(rows).removal_effects()
        damping = query.certificates["only"].damping  # λ of the first is that of the second, and of every library
    np.savez(folder / "exact.npz", **answers)
    np.savez(folder / "subsets.npz", omissions=np.array(omissions), effects=effects)
    facts = {"damping": damping, "run": run.name, "weight_decay": DECAY}
    save(folder, model.float(), words, texts[:sentences], texts[sentences:], masks, facts)


def gradient_products(folder: Path) -> None:
    """`gradients.npz`: ⟨∇ℓ_i, ∇f_q⟩ (N, Q) in float64 over the parameters that the libraries cover."""
    problem = Problem.load(folder)
    model = untied(problem.model().double())
    masked, linear = MaskedWords(model), torch.nn.Linear
    encoder, head = (
        [p for m in part.modules() if isinstance(m, linear) for p in m.parameters()] for part in model.children()
    )
    products = {}
    for name, parameters in {"linear": encoder + head, "encoder_linear": encoder}.items():
        products[name] = (
            _gradients(masked, problem.train, parameters) @ _gradients(masked, problem.queries, parameters).T
        )
    tied = MaskedWords(problem.model().double())
    parameters = list(tied.parameters())
    products["all"] = _gradients(tied, problem.train, parameters) @ _gradients(tied, problem.queries, parameters).T
    np.savez(folder / "gradients.npz", **{name: product.numpy() for name, product in products.items()})


def _gradients(masked: MaskedWords, sentences: Sentences, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    rows = []
    for one in sentences.batches(1):
        loss = losses(masked(one.input_ids, one.columns), one.labels).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def chain(model, objective, rows: list[dict], curvature: str, solver: Any, **stage: Any) -> MultiStageInfluence:
    """The one stage of a problem: the loss of the queries at the finished model."""
    stage = {"curvature": curvature, "solver": solver} | stage
    return MultiStageInfluence([Stage("only", model, objective, rows, **stage)], progress=False)


def rows_of(train: list[str], queries: list[str]) -> tuple[list[dict], list[dict]]:
    """Rows with ids, which seed their masks: no query shares one with a sentence."""
    rows = [{"example_id": i, "text": text} for i, text in enumerate([*train, *queries])]
    return rows[: len(train)], rows[len(train) :]


def save(
    folder: Path,
    model: BertForMaskedLM,
    words: list[str],
    train: list[str],
    queries: list[str],
    masks: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Writes what `problem.Problem` reads; `problem.json` last, so that a folder with it is whole."""
    objective, tensors = objectives.MaskedLM(tokenizer_of(words), **masks), {}
    for part, rows in zip(("train", "queries"), rows_of(train, queries), strict=True):
        batch = objective.collate(rows)
        assert batch["attention_mask"].all(), "all sentences have the same length"
        tensors[f"{part}.input_ids"] = batch["input_ids"]
        tensors[f"{part}.columns"] = batch["columns"].view(len(rows), -1)
        tensors[f"{part}.labels"] = batch["labels"].view(len(rows), -1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sentences.safetensors")
    model.save_pretrained(folder / "model")
    facts = {"words": words, "train": train, "queries": queries, "masks": masks} | facts
    (folder / "problem.json").write_text(json.dumps(facts, indent=1))
