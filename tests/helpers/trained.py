"""A small BERT that was trained: its Gauss-Newton matrix, and the gradients of sentences it has not seen."""

import torch
import transformers

from helpers import tiny
from hf_msif import MultiStageInfluence, Stage, objectives, vectors
from hf_msif.project.demo.grammar import vocabulary, world

STEPS, ROWS, TESTS = 150, 640, 8


def bert(dtype=torch.float32, hidden=32):
    """A masked language model of the demo's sentences, its objective, training rows and test rows."""
    data = world(seed=1)
    tokenizer = tiny.tokenizer(words=vocabulary(data))
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=4 * hidden,
            max_position_embeddings=24,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    objective = objectives.MaskedLM(tokenizer, seed=0, mask_probability=0.25)
    rows, tests = data.corpus[:ROWS], data.corpus[ROWS : ROWS + TESTS]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = objective.collate([rows[i] for i in torch.randint(ROWS, (32,), generator=generator)])
        logits = model(batch["input_ids"], batch["attention_mask"]).logits[batch["rows"], batch["columns"]]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
        optimiser.step()
    return model.to(dtype), objective, rows, tests


def gauss_newton(samples=64, dtype=torch.float32, **settings):
    """The Gauss-Newton matrix of `bert` on some rows, and the gradients of the losses of eight other rows."""
    model, objective, rows, tests = bert(dtype, **settings)
    stage = Stage("pretraining", model, objective, rows, curvature_samples=samples, batch_size=samples)
    chain = MultiStageInfluence([stage], progress=False)
    bound = chain.stage()
    adjoint, _ = chain.measurement(tests)
    return bound.differentiation.operator, vectors.select(adjoint, bound.split.trained)
