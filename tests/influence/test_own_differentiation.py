"""A differentiation from outside of the package, through query, save, load, score, plan and a configuration."""

import json
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.project import msif, project
from helpers.toy import ToyModel, ToyObjective, example_losses, toy, toy_rows

from hf_msif import InputError, MultiStageInfluence, Query, Scores, Stage, influence
from hf_msif.project import config
from hf_msif.project.plan import plan
from hf_msif.project.run import Run

SCRIPT = Path(__file__).parents[2] / "examples" / "own_differentiation.py"
CORPUS, TWEETS, TESTS = toy_rows(1, 14), toy_rows(2, 9), toy_rows(3, 2)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield
    sys.modules.pop("own_differentiation", None)


@pytest.fixture
def averaged():
    from own_differentiation import Averaged

    class Planned(Averaged):
        def cost(self, columns, processes=1, adjoint=None):
            return influence.Cost(
                0.0, 1.0, memory_bytes=8, model_bytes=8, vector_bytes=8 * columns, text=("no system",)
            )

    return Planned


def chain_of(kind, folder):
    before, after, earlier = toy(0), toy(1), toy(2)
    after.encoder.load_state_dict(before.encoder.state_dict())
    earlier.save_pretrained(folder)
    stages = [
        Stage("pre", before, ToyObjective(), CORPUS, link=kind, run=folder),
        Stage("fine", after, ToyObjective(), TWEETS, "head", curvature="hessian"),
    ]
    return MultiStageInfluence(stages, progress=False), before


def test_the_example_prints_its_scores(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.startswith("averaged: a formula, nothing was solved\n[")


def test_query_save_load_and_score(averaged, tmp_path):
    """−½ Σ_models ⟨a, ∇ℓ_x⟩ by plain autograd; a through the implicit stage after it."""
    msif, before = chain_of(averaged, tmp_path / "earlier")
    query = msif.query(TESTS)
    a = query.solutions["pre"].tensors()
    scores = query.score(CORPUS)
    for q in range(2):
        expected = torch.zeros(len(CORPUS), dtype=torch.float64)
        for model in (before, ToyModel.from_pretrained(tmp_path / "earlier", dtype=torch.float64)):
            parameters = dict(model.named_parameters())
            for i, loss in enumerate(example_losses(model, parameters, CORPUS)[0]):
                slopes = torch.autograd.grad(
                    loss, list(parameters.values()), retain_graph=True, materialize_grads=True
                )
                expected[i] -= sum((a[n][q].cpu() * g).sum() for n, g in zip(parameters, slopes, strict=True)) / 2
        np.testing.assert_allclose(scores.influence(q), expected.detach().numpy(), rtol=1e-9, atol=1e-12)
    query.save_pretrained(tmp_path / "query")
    assert Query.from_pretrained(tmp_path / "query", msif).score(CORPUS).frame.equals(scores.frame)
    stages = [bound.stage for bound in msif.stages]
    implicit = MultiStageInfluence([replace(stages[0], link="implicit", run=None), stages[1]], progress=False)
    with pytest.raises(InputError, match=r"stage 'pre' .*link was '.*Planned' and is 'implicit'"):
        Query.from_pretrained(tmp_path / "query", implicit)


def test_settings_of_a_partial_are_known_to_a_saved_query(tmp_path):
    """Two partials of one function differ; a lambda, of which nothing is known, is refused."""
    stage = partial(Stage, "only", toy(0), ToyObjective(), CORPUS)
    chains = [MultiStageInfluence([stage(link=partial(scaled, scale=s))], progress=False) for s in (1.0, 2.0)]
    assert chains[0].stage().cache_key != chains[1].stage().cache_key
    chains[0].query(TESTS).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"link was '.*scale=1.0\)' and is '.*scale=2.0\)'"):
        Query.from_pretrained(tmp_path, chains[1])
    with pytest.raises(InputError, match="stage 'only': link is a lambda"):
        stage(link=lambda bound: scaled(bound, 1.0))


def scaled(bound, scale):
    """The gradient product, `scale` times."""

    class Scaled(influence.Differentiation):
        def pull_back(self, adjoint, checkpoint=None):
            u = {name: scale * t for name, t in adjoint.items()}
            return self.load(u, influence.DirectCertificate("scaled", 2).to_dict()), {}

        def load(self, tensors, certificate):
            certificate = influence.DirectCertificate(**certificate)
            return influence.Direction(self.bound.model, self.bound.objective, tensors, certificate)

    return Scaled(bound)


def test_plan_and_a_configuration(averaged, tmp_path, capsys, monkeypatch):
    """A configuration names it by where it is defined; every command asks the object."""
    module = tmp_path / "modules"
    module.mkdir()
    (module / "mine.py").write_text(
        "from hf_msif import influence\nfrom own_differentiation import Averaged\n\n\n"
        "class Mine(Averaged):\n    def cost(self, columns, processes=1, adjoint=None):\n"
        "        return influence.Cost(0.0, 1.0, 8, 8, 8 * columns, text=('no system',))\n"
    )
    monkeypatch.syspath_prepend(str(module))
    path = project(tmp_path / "project")
    assert msif("train", "--config", path, "--json") == 0
    flags = (
        "--stages.pretraining.link",
        "mine:Mine",
        "--stages.pretraining.run",
        tmp_path / "project/run/pretraining",
    )
    report = plan(
        Run(config.load(path, [(f[2:], str(v)) for f, v in zip(flags[::2], flags[1::2], strict=True)]), False)
    )
    assert "  no system" in report["text"]
    capsys.readouterr()
    assert msif("query", "--config", path, *flags, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["stages"]["pretraining"]["link"] == "mine:Mine"
    assert answer["stages"]["pretraining"]["text"] == "averaged: a formula, nothing was solved"
    assert msif("score", "--config", path, *flags, "--json") == 0
    scores = Scores.from_parquet(json.loads(capsys.readouterr().out)["scores"])
    assert np.abs(scores.influence(0)).max() > 0
    assert msif("sweep", "--config", path, *flags) == 2
    assert "without a linear system to damp" in capsys.readouterr().err
