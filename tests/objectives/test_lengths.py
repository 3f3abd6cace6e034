"""One limit of length: the tokenizer's and the model's, wherever a model comes together with an objective."""

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny

from hf_msif import InputError, MultiStageInfluence, Stage, objectives, solvers, training
from hf_msif.objectives import within_positions
from hf_msif.objectives.lengths import positions_of

UNLIMITED = 10**30
LONG = [*tiny.rows(4, seed=1), {"example_id": 9, "text": "vote wall " * 60, "label": 0}]


@pytest.mark.parametrize(
    ("architecture", "task", "positions"),
    [
        ("bert", "masked", 24),
        ("roberta", "masked", 24 - 1),  # its padding_idx is 0 here: one row of the table is for padding
        ("gpt2", "causal", 20),
        ("distilbert", "classification", 20),
        ("llama", "causal", 24),
        ("bart", "sequence to sequence", 20),
        ("t5", "sequence to sequence", None),
    ],
)
def test_positions(architecture, task, positions):
    model = tiny.model(architecture, task)
    assert positions_of(model) == positions
    if positions is not None:
        with torch.no_grad():
            model.eval()(torch.full((1, positions), 7))


def test_robertas_offset():
    config = transformers.RobertaConfig(
        **{**tiny._NARROW, "pad_token_id": 1, "max_position_embeddings": 22}, num_hidden_layers=1
    )
    model = transformers.RobertaForMaskedLM(config).eval()
    assert positions_of(model) == 20
    with torch.no_grad():
        model(torch.full((1, 20), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 21), 7))


def unlimited(task, **settings):
    tokenizer = tiny.tokenizer(model_max_length=UNLIMITED, template=task != "causal")
    kind = {"masked": objectives.MaskedLM, "causal": objectives.CausalLM}[task]
    return kind(tokenizer, **settings)


@pytest.mark.parametrize(("task", "architecture", "limit"), [("masked", "bert", 24), ("causal", "gpt2", 20)])
def test_a_text_beyond_the_models_positions_is_cut_and_counted(task, architecture, limit):
    """The Python way: a stage, a query and a scoring (case03)."""
    objective, model = unlimited(task), tiny.model(architecture, task)
    stage = Stage("only", model, objective, LONG, solver=solvers.CG(damping=1.0))
    assert stage.objective.max_length == limit
    assert objective.max_length is None
    scores = MultiStageInfluence([stage], progress=False).query(LONG[:1]).score(LONG)
    assert scores.metadata["truncated"] == 1
    assert np.isfinite(scores.influence()).all()
    assert training.evaluate(model, objective, LONG)["examples"] == 5


def test_a_longer_max_length_is_refused_wherever_it_comes_in():
    objective, model = unlimited("masked", max_length=25), tiny.model("bert", "masked")
    with pytest.raises(InputError, match=r"objective of stage 'only': max_length is 25; expected at most 24"):
        Stage("only", model, objective, LONG)
    with pytest.raises(InputError, match="max_length is 25; expected at most 24"):
        training.evaluate(model, objective, LONG)
    objective = tiny.objective("sequence to sequence", max_target_length=21)
    with pytest.raises(InputError, match="max_target_length is 21; expected at most 20"):
        within_positions(objective, tiny.model("bart", "sequence to sequence"))


def test_what_fits_stays_as_it_is():
    for objective in (tiny.objective("masked"), unlimited("masked", max_length=20)):
        assert within_positions(objective, tiny.model("bert", "masked")) is objective
    alone = within_positions(unlimited("masked").unpadded(), tiny.model("bert", "masked"))
    assert (alone.pads, alone.max_length) == (False, 24)


def test_an_objective_of_ones_own_has_the_limit_if_it_takes_one():
    class Own(objectives.Objective):
        def __init__(self, tokenizer, max_length=None):
            self.tokenizer, self.max_length = tokenizer, max_length

        def collate(self, rows): ...

        def losses(self, call, batch): ...

    own = Own(tiny.tokenizer(model_max_length=UNLIMITED))
    assert within_positions(own, tiny.model("bert", "masked")).max_length == 24
    assert own.max_length is None
