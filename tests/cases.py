"""The lists that property tests run over: objectives with their models, curvatures, solvers, differentiations.

Each entry is one line, in float64. A new one here gets every test of `test_properties.py`, and a solver those of
`solvers/test_solvers.py` as well.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from helpers import digits, tiny
from helpers.runs import MINIMUM, PATTERNS, RUN, Minimum, Run, arguments
from helpers.toy import ToyObjective, toy, toy_rows

from hf_msif import MultiStageInfluence, Stage, objectives, solvers, training
from hf_msif.curvature import EKFAC, GaussNewton, Hessian
from hf_msif.models import SkipGramConfig, SkipGramForPreTraining

# Objectives and models ----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An objective, a model that it fits, and rows of uneven length or weight."""

    name: str
    model: Callable  # () → model
    objective: Callable  # () → objective
    rows: Callable  # (size, seed=0) → rows with the ids 0, 1, ...


def text(task, architecture, **settings):
    rows = partial(tiny.rows, longest=6, shortest=2) if task in tiny.PLAIN else tiny.rows_of_all_tasks
    name = ", ".join([task, architecture, *map(str, settings.values())])
    return Case(name, partial(tiny.model, architecture, task), partial(tiny.objective, task, **settings), rows)


def skip_gram():
    torch.manual_seed(0)
    return tiny.perturbed(SkipGramForPreTraining(SkipGramConfig(len(tiny.WORDS), 3)).double(), 0, 0.6)


def adapted():
    """BERT with LoRA, no adapter zero."""
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    return tiny.perturbed(peft.get_peft_model(tiny.model("bert", "classification"), settings), 4).train()


def skip_gram_objective():
    return objectives.SkipGram(tiny.tokenizer(), window=2, negatives=3).fitted(tiny.rows(8, seed=1))


def pictures(size, seed=0):
    return [{**row, "example_id": i} for i, row in enumerate(digits.rows(range(4), size, seed=seed))]


# ModernBERT and Llama compute some of their layers in float32, whatever their parameters are.
CASES = [
    text("masked", "bert"),
    text("masked", "bert", reduction="example"),
    text("masked", "albert"),
    text("causal", "gpt2"),
    text("classification", "bert"),
    text("sequence to sequence", "bart"),
    text("pairs", "bert"),
    text("regression", "bert"),
    text("multi-label", "bert"),
    text("words", "bert"),
    text("next sentence", "bert"),
    text("replaced tokens", "electra", draws=2),
    text("masked", "bert", chunk=5, stride=1),
    text("causal", "gpt2", chunk=4, stride=2),
    text("bidirectional", "elmo"),
    text("characters", "elmo"),
    Case("classification, LoRA", adapted, partial(tiny.objective, "classification"), partial(tiny.rows, shortest=2)),
    Case("skip-gram", skip_gram, skip_gram_objective, partial(tiny.rows, longest=6, shortest=2)),
    Case("images, ConvNet", partial(digits.network, 4, 0), lambda: digits.OBJECTIVE, pictures),
    Case("toy, rows of one and two terms", partial(toy, 0), ToyObjective, lambda size, seed=0: toy_rows(seed, size)),
]


# Curvatures ---------------------------------------------------------------------------------------------------------


class CurvatureCase(NamedTuple):
    name: str  # of Stage(curvature=...)
    operator: type
    semidefinite: bool = False  # its quadratic form is never negative
    is_sum: bool = True  # over batches, so that the shares of processes can be looked at one by one


CURVATURES = [
    CurvatureCase("hessian", Hessian),
    CurvatureCase("gauss_newton", GaussNewton, semidefinite=True),
    CurvatureCase("ekfac", EKFAC, semidefinite=True, is_sum=False),
]


# Solvers ------------------------------------------------------------------------------------------------------------


class SolverCase(NamedTuple):
    solver: Any
    system: Callable  # (A, λ) → (S, C) of the system Su = Cb that the solver defines
    indefinite: bool = True  # solves indefinite systems
    passes: int = 1  # products per iteration, and per check
    bounded: bool = False  # its certificate bounds the iterations where damping="auto"
    joint: bool = False  # its columns share directions, so that iterations and products depend on all of them
    spectrum: bool = True  # its certificate tells Ritz values of A, and what λ mutes


def shifted(a, damping):
    return a + damping * np.eye(len(a)), np.eye(len(a))


def squared(a, damping):
    return a @ a + damping * np.eye(len(a)), a


SOLVERS = [
    SolverCase(solvers.CG(damping=0.3, tol=1e-10), shifted, indefinite=False, bounded=True),
    SolverCase(solvers.BlockCG(damping=0.3, tol=1e-10), shifted, indefinite=False, bounded=True, joint=True),
    SolverCase(
        solvers.CG(damping=0.3, tol=1e-10, preconditioner=solvers.Nystrom(rank=5)),
        shifted,
        indefinite=False,
        spectrum=False,
    ),
    SolverCase(
        solvers.BlockCG(damping=0.3, tol=1e-10, preconditioner=solvers.Nystrom(rank=5)),
        shifted,
        indefinite=False,
        joint=True,
        spectrum=False,
    ),
    SolverCase(solvers.SquaredCG(damping=0.3, tol=1e-10), squared, passes=2, bounded=True),
    SolverCase(solvers.MinRes(damping=0.3, tol=1e-10), shifted),
    SolverCase(solvers.Dense(damping=0.3, tol=1e-10, chunk=5), shifted),
    SolverCase(solvers.Identity(), lambda a, damping: (np.eye(len(a)), np.eye(len(a)))),
]


# Differentiations ---------------------------------------------------------------------------------------------------

SIZE = 7  # rows of a stage


def one_stage(case, model, **settings):
    stage = Stage("only", model, case.objective(), case.rows(SIZE, seed=1), **settings)
    return MultiStageInfluence([stage], progress=False)


def implicit(case, folder, **settings):
    # A damping with which few products suffice: what is tested does not depend on it.
    solver = solvers.CG(damping=10.0, tol=1e-9)
    return one_stage(case, case.model(), **{"solver": solver, **settings})


def unrolled(case, folder):
    model = case.model()
    run = arguments(folder / "trainer", optim="sgd", learning_rate=0.02, num_train_epochs=1)
    training.record(model, case.objective(), case.rows(SIZE, seed=1), run, folder / "run", progress=False)
    return one_stage(case, model, link="unrolled", run=folder / "run")


# (case, folder) → a chain of one stage, differentiated so
DIFFERENTIATIONS = {"implicit": implicit, "unrolled": unrolled}
# Stages of the toy model for `helpers.runs.Mixed`: each link above each other.
CHAINS = {
    "minimum, tied minimum": [(Minimum, "all", {}), MINIMUM],
    "minimum, head": [(Minimum, "all", {}), (Minimum, "head", {"alpha": None})],
    "minimum, run": [(Minimum, "all", {}), RUN],
    "run, minimum": [RUN, MINIMUM],
    "run, run with frozen parameters": [RUN, (Run, PATTERNS, {"optim": "adamw", "rate": 0.05, "alpha": 0.2})],
}
