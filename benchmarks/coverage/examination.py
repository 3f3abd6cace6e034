"""Examines one pair of tiny models: everything that a query needs, against plain reverse-mode gradients.

    python benchmarks/coverage/examination.py bert/masked mixtral/causal      # prints a JSON object per pair

`run.py` calls it for all pairs. The oracle shares no code with the library: it calls the models as they are, in
evaluation mode, one row at a time, without padding, and differentiates by `torch.autograd.grad`.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from tiny_models import SPECIAL, WORDS, Pair, models_of, pairs, pass_on, tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers, vectors
from hf_msif.adapters import split
from hf_msif.curvature import GaussNewton
from hf_msif.objectives import Objective
from hf_msif.objectives.next_sentence import PAIR_LOGITS

SECONDS = 120  # of processor time, of one pair
# Relative to the largest number. Models that compute parts in float32 whatever their dtype is differ by up to 1e-6.
LIMITS = {torch.float64: 1e-5, torch.float32: 2e-3}


@dataclass
class Examination:
    """What was measured of a pair; all numbers are relative differences.

    Attributes:
        name: "architecture/task".
        classes: the language model's and the classifier's.
        dtype: in which the pair was examined: float64, or float32 where the library asked for it.
        query: the direction of the pretraining stage, by the identity through both stages, and by plain autograd.
        scores: influences, and −⟨u, ∇ℓ⟩ by a plain backward pass per row.
        batches: influences by batches of one row and of six.
        symmetry: ⟨w, G v⟩ and ⟨v, G w⟩ of a Gauss-Newton product of padded rows.
        notes: what the library said.
        error: why it failed; empty if it passed.
        seconds: of processor time.
    """

    name: str
    classes: list[str]
    dtype: str = "float64"
    query: float | None = None
    scores: float | None = None
    batches: float | None = None
    symmetry: float | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.error


def examine(pair: Pair) -> Examination:
    """Examines a pair in float64, and in float32 where the library says that float64 is the reason of a refusal."""
    result = Examination(pair.name, [pair.language_model, pair.classifier])
    started = time.process_time()
    for dtype in (torch.float64, torch.float32):
        result.dtype, result.error, result.notes = str(dtype).removeprefix("torch."), "", []
        with _at_most(SECONDS), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                _measure(result, pair, dtype)
            except InputError as error:
                result.error = f"refused: {error}"
            except Exception as error:  # whatever it is, the next pair is examined
                result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        result.notes += [_short(str(w.message)) for w in caught if issubclass(w.category, UserWarning)]
        if "try float32" not in result.error:
            break
    result.notes = sorted(set(result.notes))
    result.seconds = round(time.process_time() - started, 1)
    return result


def _measure(result: Examination, pair: Pair, dtype: torch.dtype) -> None:
    language_model, classifier = models_of(pair, dtype)
    roles = split("finetuning", classifier, language_model, "head", previous_stage="pretraining")
    result.notes += [f"{n} is in one encoder alone" for n in (*roles.encoder_only[:1], *roles.not_passed_on[:1])]
    pass_on(language_model, classifier, roles.inherited)
    rows, tweets = sentences(6, 1), sentences(5, 2)
    first, second = objective_of(pair, language_model), objectives.SequenceClassification(tokenizer())
    identity = solvers.Identity()
    msif = MultiStageInfluence(
        [
            Stage("pretraining", language_model, first, rows, solver=identity, batch_size=6),
            Stage("finetuning", classifier, second, tweets, trainable="head", solver=identity, batch_size=6),
        ],
        progress=False,
    )
    bound, last = msif.stages
    query = msif.query(tweets[:1])
    u = vectors.column(query.solutions["pretraining"].tensors(), 0)
    scores = [query.score(rows, batch_size=size).influence() for size in (1, 6)]
    with _plain(language_model, classifier):
        direction = plain_direction(classifier, second, tweets, last.split)
        true_u = {name: direction.get(name, torch.zeros_like(t)) for name, t in u.items()}
        expected = plain_scores(language_model, bound.objective, rows, u)
    result.query = _gap(vectors.flatten(vectors.stack([u])), vectors.flatten(vectors.stack([true_u])))
    result.scores = _gap(scores[0], expected)
    result.batches = _gap(scores[1], scores[0])
    operator = GaussNewton(bound.model, bound.objective, rows, bound.split.trained, bound.engine, 6)
    one, other = (vectors.rademacher(operator.parameters, 1, seed) for seed in (1, 2))
    products = operator.matvec(one), operator.matvec(other)
    left, right = float(vectors.dot(other, products[0])), float(vectors.dot(one, products[1]))
    result.symmetry = abs(left - right) / float(vectors.norm(products[0]))
    for what in ("query", "scores", "batches", "symmetry"):
        if not getattr(result, what) <= LIMITS[dtype]:
            result.error = f"{what}: relative difference {getattr(result, what):.1e}"
            return


def objective_of(pair: Pair, model: PreTrainedModel) -> Objective:
    """That of the language model's task; a class of the pretraining table says its task by its name or its output."""
    task = pair.task
    if task == "pretraining":
        task = "causal" if "CausalLM" in pair.language_model or "LMHead" in pair.language_model else "masked"
        task = task if task == "causal" else _task_by_output(model)
    kinds = {"masked": objectives.MaskedLM, "causal": objectives.CausalLM, "seq2seq": objectives.Seq2SeqLM}
    kinds |= {"pairs": objectives.NextSentenceMaskedLM, "replaced": objectives.ReplacedTokenDetection}
    return kinds[task](tokenizer())


@torch.no_grad()
def _task_by_output(model: PreTrainedModel) -> str:
    """ "pairs" of a model with logits for the next sentence, "replaced" of one with a logit per token, else masked."""
    output = model.eval()(input_ids=torch.tensor([tokenizer()(" ".join(WORDS[-9:]))["input_ids"]]))
    if any(getattr(output, name, None) is not None for name in PAIR_LOGITS):
        return "pairs"
    logits = getattr(output, "logits", None)
    return "replaced" if logits is not None and logits.dim() == 2 else "masked"


def sentences(number: int, seed: int) -> list[dict[str, Any]]:
    """Rows of uneven length with a label, with a target for encoder-decoders, and with a next sentence."""
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(WORDS[len(SPECIAL) :], generator.integers(8, 15))) for _ in range(2 * number)]
    rows = [
        {"example_id": i, "text": texts[i], "target": texts[-1 - i], "label": int(generator.integers(2))}
        for i in range(number)
    ]
    return [row | {"text_pair": row["target"], "next_sentence_label": i % 2} for i, row in enumerate(rows)]


# --- the oracle


def plain_direction(model: PreTrainedModel, objective: Objective, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    """u of the pretraining stage by the identity: ∂f/∂frozen − ∂/∂frozen ⟨∇_head F, ∇_head f⟩, by names there; f is
    the loss of the first row, F the mean over all."""
    losses = [_loss(model, objective, row) for row in rows]
    head, frozen = ([model.get_parameter(n) for n in names] for names in (roles.trained, roles.frozen))
    f, total = losses[0], torch.stack(losses).mean()
    u = torch.autograd.grad(f, head, retain_graph=True)
    own = torch.autograd.grad(f, frozen, retain_graph=True, allow_unused=True, materialize_grads=True)
    slopes = torch.autograd.grad(total, head, create_graph=True)
    along = torch.stack([(g * t).sum() for g, t in zip(slopes, u, strict=True)]).sum()
    mixed = torch.autograd.grad(along, frozen, allow_unused=True, materialize_grads=True)
    return {roles.inherited[n]: a - b for n, a, b in zip(roles.frozen, own, mixed, strict=True)}


def plain_scores(
    model: PreTrainedModel, objective: Objective, rows: list[dict], u: Mapping[str, Tensor]
) -> np.ndarray:
    """−⟨u, ∇ℓ⟩ of each row, by a backward pass."""
    parameters = [model.get_parameter(name) for name in u]
    scores = []
    for row in rows:
        gradients = torch.autograd.grad(_loss(model, objective, row), parameters, allow_unused=True)
        scores.append(-sum(float((t * g).sum()) for t, g in zip(u.values(), gradients, strict=True) if g is not None))
    return np.array(scores)


def _loss(model: PreTrainedModel, objective: Objective, row: dict) -> Tensor:
    accepted = inspect.signature(model.forward).parameters

    def call(positions: Any = None, **inputs: Any) -> Any:
        output = model(**{name: t for name, t in inputs.items() if name in accepted or "kwargs" in accepted})
        if positions is not None:
            words = "prediction_logits" if "prediction_logits" in output else "logits"
            setattr(output, words, getattr(output, words)[positions])
        return output

    return objective.losses(call, objective.collate([row]))[0].sum()


@contextmanager
def _plain(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, the models predict, by kernels that can be differentiated twice."""
    for model in models:
        model.eval().requires_grad_(True)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _gap(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


def _short(message: str) -> str:
    """What a warning says, without the stage and what follows the first clause."""
    return message.split(": ", 1)[-1].split(":")[0].split(" (")[0][:100]


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main(names: list[str], say: Callable[[str], None] = print) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    by_name = {pair.name: pair for pair in pairs("all")}
    for name in names:
        say(json.dumps({"started": name}))
        sys.stdout.flush()
        say(json.dumps(asdict(examine(by_name[name]))))
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
