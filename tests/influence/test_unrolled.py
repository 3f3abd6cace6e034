"""The pull-back through a recorded run: against re-running it by torch.optim with perturbed weights, against autograd
through a run written out here, and against the implicit answer where the run has converged."""

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.runs import (
    BATCH,
    DECAY,
    EPOCHS,
    MINIMUM,
    PATTERNS,
    ROWS,
    RUN,
    TESTS,
    Minimum,
    Mixed,
    Run,
    arguments,
    pair,
    parameters_of,
    rows_of,
    trained_names,
    unrolled_chain,
)
from helpers.toy import ToyObjective, decayed, example_losses, toy, toy_rows
from transformers import get_scheduler

from hf_msif import InputError, MultiStageInfluence, Query, Stage, solvers, training, vectors
from hf_msif.engine.checkpoints import open_checkpoint
from hf_msif.influence import unrolled
from hf_msif.influence.multistage import checkpoint_name
from hf_msif.influence.sweep import damping_sweep
from hf_msif.influence.unrolled import check_replay
from hf_msif.training.record import rerun
from hf_msif.training.recording import Recording
from hf_msif.training.replay import Replay


@dataclass
class Case:
    """Settings of a run, in Hugging Face's words, and how torch does the same."""

    name: str
    arguments: dict
    optimiser: type
    settings: dict
    trainable: str = "all"
    alpha: float | None = None


SMOOTH = {"learning_rate": 0.05, "adam_beta2": 0.9, "adam_epsilon": 0.1}
CASES = [
    Case("sgd", {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}, torch.optim.SGD, {}),
    Case(
        "momentum, clipped, linear",
        {
            "optim": "sgd",
            "optim_args": "momentum=0.8",
            "learning_rate": 0.3,
            "max_grad_norm": 0.2,
            "weight_decay": 0.1,
            "warmup_steps": 3,
        },
        torch.optim.SGD,
        {"momentum": 0.8},
    ),
    Case(
        "nesterov, frozen",
        {"optim": "sgd", "optim_args": "momentum=0.8,nesterov=true", "learning_rate": 0.3},
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True},
        trainable="head",
    ),
    Case(
        "adamw, cosine, clipped",
        {**SMOOTH, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.3, "weight_decay": 0.2},
        torch.optim.AdamW,
        {"betas": (0.9, 0.9), "eps": 0.1},
    ),
    Case(
        "adamw, frozen, accumulated",
        {**SMOOTH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        torch.optim.AdamW,
        {"betas": (0.9, 0.9), "eps": 0.1},
        trainable="head",
    ),
    Case(
        "adamw, tied",
        {**SMOOTH, "lr_scheduler_type": "constant"},
        torch.optim.AdamW,
        {"betas": (0.9, 0.9), "eps": 0.1},
        alpha=0.4,
    ),
]


def names_of(case, model):
    return [n for n, _ in model.named_parameters() if case.trainable == "all" or n.startswith("head.")]


@dataclass
class Setting:
    """A finished run, and what it started from."""

    case: Case
    folder: object
    before: object
    model: object
    head: dict
    rows: list
    arguments: object

    def rerun(self, weights=None, encoder=None):
        """Final test losses by torch.optim, with row weights and the pretrained encoder given."""
        model = toy(1)
        start = {n: p for n, p in self.before.named_parameters() if n.startswith("encoder.")}
        model.load_state_dict({**start, **self.head, **(encoder or {})})
        anchors = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("encoder.")}
        names, case, given = names_of(self.case, model), self.case, self.arguments
        weights = torch.ones(len(self.rows), dtype=torch.float64) if weights is None else weights
        wanted = {n: p for n, p in model.named_parameters() if n in names}
        groups = [
            {"params": [p for n, p in wanted.items() if decayed(n)], "weight_decay": given.weight_decay},
            {"params": [p for n, p in wanted.items() if not decayed(n)], "weight_decay": 0.0},
        ]
        optimiser = case.optimiser(groups, lr=given.learning_rate, **case.settings)
        steps = EPOCHS * math.ceil(len(self.rows) / BATCH)
        scheduler = get_scheduler(given.lr_scheduler_type, optimiser, given.get_warmup_steps(steps), steps)
        for rows in Recording.from_pretrained(self.folder).schedule.rows:
            parameters = dict(model.named_parameters())
            sums, counts = example_losses(model, parameters, [self.rows[i] for i in rows])
            loss = (weights[rows] * sums).sum() / counts.sum()
            loss = loss + DECAY / 2 * sum((parameters[n] ** 2).sum() for n in names if decayed(n))
            if case.alpha:
                loss = loss + case.alpha * sum(((parameters[n] - a) ** 2).sum() for n, a in anchors.items())
            optimiser.zero_grad()
            loss.backward()
            if given.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(list(wanted.values()), given.max_grad_norm)
            optimiser.step()
            scheduler.step()
        return model, example_losses(model, dict(model.named_parameters()), TESTS)[0].detach()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def setting(request, tmp_path_factory):
    return finished(request.param, tmp_path_factory.mktemp("run"))


def finished(case, folder):
    before, model, rows = toy(0), toy(1), toy_rows(3, ROWS)
    model.encoder.load_state_dict(before.encoder.state_dict())
    head = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("head.")}
    given = arguments(folder, **case.arguments)
    training.record(
        model,
        ToyObjective(),
        rows,
        given,
        folder / "run",
        previous=before,
        trainable=case.trainable,
        weight_decay=DECAY,
        alpha=case.alpha,
        progress=False,
    )
    return Setting(case, folder / "run", before, model, head, rows, given)


def chain(setting, **finetuning):
    exact = {"curvature": "hessian", "solver": solvers.Dense()}
    own = {"trainable": setting.case.trainable, "link": "unrolled", "run": setting.folder, "weight_decay": DECAY}
    first = Stage("first", setting.before, ToyObjective(), toy_rows(2, 12), weight_decay=0.1, **exact)
    return MultiStageInfluence(
        [first, Stage("second", setting.model, ToyObjective(), setting.rows, **own, **exact, **finetuning)],
        progress=False,
    )


def test_a_run_ends_where_torch_ends(setting):
    model, _ = setting.rerun()
    for name, p in setting.model.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_pull_back_equals_central_differences_of_rerunning(setting):
    found = chain(setting)
    rows = [{"example_id": i, **row} for i, row in enumerate(TESTS)]
    solution, b = found.stages[1].differentiation.pull_back(found.measurement(rows)[0])
    u, certificate = solution.tensors(), solution.certificate
    assert certificate.replay_difference == 0.0
    step = 1e-5
    for i in range(ROWS):
        weights = torch.ones(ROWS, dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            weights[i] = 1 + sign * step
            sides.append(setting.rerun(weights)[1])
        expected = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(u["weights"][:, i], expected, rtol=1e-6, atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    encoder = {n: p.detach() for n, p in setting.before.named_parameters() if n.startswith("encoder.")}
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in encoder.items()}
        sides = [
            setting.rerun(encoder={n: p + sign * step * direction[n] for n, p in encoder.items()})[1]
            for sign in (1, -1)
        ]
        found_slope = sum((b[n] * direction[n]).flatten(1).sum(1) for n in encoder)
        torch.testing.assert_close(found_slope, (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-9)


# Against autograd through a run that is written out -----------------------------------------------------------------


RUNS = {
    "sgd": {},
    "momentum, clipped": {"momentum": 0.8, "clip": 0.2, "adam_decay": 0.1, "warmup": 3},
    "momentum, tied": {"momentum": 0.5, "alpha": 0.4},
    "adamw": {"optim": "adamw", "adam_decay": 0.2, "rate": 0.05, "clip": 0.3, "warmup": 2},
    "adamw, root, tied": {"optim": "adamw", "inside": True, "rate": 0.05, "alpha": 0.4},
}


@pytest.mark.parametrize("trainable", ["all", PATTERNS], ids=["all", "patterns"])
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_pull_back_equals_autograd_through_the_whole_run(settings, trainable, tmp_path):
    before, model = pair()
    run = Run(toy_rows(3, ROWS), trained_names(model, trainable), **settings)
    start = parameters_of(model)
    run.record(model, tmp_path / "run", before, trainable)

    encoder = {n: p.requires_grad_() for n, p in parameters_of(before, "encoder.").items()}
    if run.alpha:
        run.anchors = {n: p for n, p in encoder.items() if n in run.trained}
    weights = torch.ones(ROWS, dtype=torch.float64, requires_grad=True)
    end = run.end(model, {**start, **encoder}, weights, graph=True)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), end[n].detach(), rtol=0, atol=1e-12)
    losses = example_losses(model, end, TESTS)[0]

    found = unrolled_chain(run, before, model, tmp_path / "run", trainable)
    solution, b = found.stages[1].differentiation.pull_back(found.measurement(rows_of(TESTS))[0])
    u = solution.tensors()
    assert set(b) == set(encoder)
    for q in range(2):
        slopes = torch.autograd.grad(losses[q], [weights, *encoder.values()], retain_graph=True)
        torch.testing.assert_close(u["weights"][q], slopes[0], rtol=1e-9, atol=1e-12)
        for n, slope in zip(encoder, slopes[1:], strict=True):
            torch.testing.assert_close(b[n][q], slope, rtol=1e-9, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")


# Against the implicit answer, where the run has converged -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["all", "head"])
def test_a_converged_run_gives_the_implicit_answer(trainable, tmp_path):
    before, model = pair()
    alpha = 0.4 if trainable == "all" else None
    run = Run(toy_rows(3, ROWS), [], momentum=0.7, batch=ROWS, epochs=200, rate=1.0, alpha=alpha, decay=0.1)
    given = run.arguments(tmp_path)
    given.lr_scheduler_type = "constant"
    own = {"previous": before, "trainable": trainable, "weight_decay": 0.1, "alpha": alpha}
    training.record(model, ToyObjective(), run.rows, given, tmp_path / "run", progress=False, **own)
    pulled = unrolled_chain(run, before, model, tmp_path / "run", trainable)
    exact = {"link": "implicit", "alpha": alpha, "curvature": "hessian", "solver": solvers.Dense()}
    solved = unrolled_chain(run, before, model, None, trainable, **exact)
    assert solved.stages[1].differentiation.gradient_norm < 1e-10

    a = solved.measurement(rows_of(TESTS))[0]
    through_run, b = pulled.stages[1].differentiation.pull_back(a)
    found, certificate = through_run.tensors(), through_run.certificate
    at_minimum, expected = solved.stages[1].differentiation.pull_back(a)
    u = at_minimum.tensors()
    assert max(certificate.norms[-1][1]) < 1e-8  # the run has forgotten where it started
    for n, t in expected.items():
        torch.testing.assert_close(b[n], t, rtol=1e-6, atol=1e-9)
        if alpha:
            torch.testing.assert_close(b[n], 2 * alpha * u[n], rtol=1e-6, atol=1e-9)
    parameters = dict(model.named_parameters())
    sums, counts = example_losses(model, parameters, run.rows)
    influence = counts.sum() * found["weights"]
    for i, loss in enumerate(sums):
        slopes = dict(zip(u, torch.autograd.grad(loss, [parameters[n] for n in u], retain_graph=True), strict=True))
        wanted = -vectors.dot(u, {n: torch.stack([g, g]) for n, g in slopes.items()})
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(influence[:, i], wanted, rtol=1e-6, atol=1e-9)


# Chains of both links -----------------------------------------------------------------------------------------------


MIXED = {
    "minimum, run": [(Minimum, "all", {}), RUN],
    "minimum, run with frozen parameters": [(Minimum, "all", {}), (Run, PATTERNS, {"alpha": 0.2})],
    "run, minimum": [RUN, MINIMUM],
    "run, minimum with frozen parameters": [RUN, (Minimum, "head", {"alpha": None})],
    "run, minimum, run": [RUN, (Minimum, PATTERNS, {"alpha": 0.3}), (Run, "head", {"optim": "adamw", "rate": 0.05})],
    "minimum, run, minimum": [(Minimum, "all", {}), RUN, MINIMUM],
    "run, run": [RUN, (Run, "all", {"optim": "adamw", "rate": 0.05})],
}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", MIXED.values(), ids=MIXED)
def test_chains_of_both_links_equal_training_all_stages_again(kinds, tmp_path):
    mixed, step = Mixed(kinds, tmp_path), 1e-3
    query = mixed.chain.query(TESTS)
    for k, kind in enumerate(mixed.kinds):
        scores = query.score(kind.rows, stage=f"stage{k}")
        count = float(example_losses(mixed.models[k], mixed.ends[k], kind.rows)[1].sum())
        assert scores.metadata["N"] == count
        for i in (0, 5):
            sides = []
            for sign in (1, -1):
                weights = torch.ones(len(kind.rows), dtype=torch.float64)
                weights[i] += sign * step
                sides.append(mixed.losses(k, weights))
            expected = count * (sides[0] - sides[1]) / (2 * step)
            assert expected.abs().min() > 1e-5
            found = torch.tensor([scores.influence(q)[i] for q in range(2)])
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


# Columns ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with momentum, and the model it started from; not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "run"
    before, model = pair()
    run = Run(toy_rows(3, ROWS), [], momentum=0.8, clip=0.2, adam_decay=0.1)
    run.record(model, folder, before)
    return run, before, model, folder


def test_columns_share_a_sweep_and_equal_single_ones(made, monkeypatch):
    run, before, model, folder = made
    tests, steps, backward = toy_rows(7, 4), [], Replay.backward
    monkeypatch.setattr(Replay, "backward", lambda self, *given: steps.append(1) or backward(self, *given))
    found = unrolled_chain(run, before, model, folder)
    together = found.query(tests)
    assert len(steps) == 9
    singles = [found.query([row]) for row in tests]
    for stage, solution in together.solutions.items():
        for n, t in solution.tensors().items():
            expected = torch.cat([query.solutions[stage].tensors()[n] for query in singles])
            torch.testing.assert_close(t, expected, rtol=1e-10, atol=1e-14)
    certificates = [query.certificates["second"] for query in singles]
    assert together.certificates["second"].growth == pytest.approx([c.growth[0] for c in certificates], rel=1e-10)
    for aggregate, share in (("sum", 1.0), ("mean", 0.25)):
        group = found.query(tests, aggregate=aggregate)
        for stage in ("first", "second"):
            rows = found.stage(stage).rows
            scores = together.score(rows, stage=stage)
            expected = share * sum(scores.influence(q) for q in range(4))
            np.testing.assert_allclose(group.score(rows, stage=stage).influence(), expected, rtol=1e-9, atol=1e-13)


def test_the_sizes_of_batches_do_not_change_an_answer(made):
    run, before, model, folder = made
    whole = unrolled_chain(run, before, model, folder).query(TESTS).score(run.rows, stage="second")
    assert whole.frame.loss.tolist() == pytest.approx(
        example_losses(model, parameters_of(model), run.rows)[0].tolist()
    )
    some = unrolled_chain(run, before, model, folder, batch_size=2).query(TESTS)
    part = some.score(run.rows[::-3], stage="second", batch_size=3)
    for q in range(2):
        np.testing.assert_allclose(part.influence(q), whole.influence(q)[::-3], rtol=1e-12)


def test_the_certificate_has_the_norms_of_the_adjoint(made):
    run, before, model, folder = made
    found = unrolled_chain(run, before, model, folder)
    certificate = found.query(TESTS).certificates["second"]
    assert [t for t, _ in certificate.norms] == [9, 6, 3, 0]
    assert certificate.norms[0][1] == [1.0, 1.0]
    run = replace(run, trained=trained_names(model, "all"))
    start = {
        n: p.requires_grad_()
        for n, p in found.stage("second").differentiation.recording.state(0)["parameters"].items()
    }
    end = run.end(model, start, graph=True)
    losses = example_losses(model, end, TESTS)[0]
    for q in range(2):
        last, first = (
            torch.cat([g.flatten() for g in torch.autograd.grad(losses[q], p, retain_graph=True)]).norm()
            for p in (list(end.values()), list(start.values()))
        )
        assert certificate.norms[-1][1][q] == pytest.approx(float(first / last), rel=1e-9)
        assert certificate.growth[q] >= max(norms[q] for _, norms in certificate.norms)
    facts = found.query(TESTS).certificate()["stages"]["second"]
    assert (facts["link"], facts["weight_decay"], facts["alpha"]) == ("unrolled", DECAY, None)
    text = facts["text"]
    assert f"unrolled, column 1: 9 steps; adjoint grew at most {certificate.growth[1]:.2g} times" in text
    assert certificate.from_dict(certificate.to_dict()) == certificate


# A head that goes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}])
def test_a_head_that_goes_on_is_inherited(settings, tmp_path):
    """Masked LM twice: the second run starts with the first stage's head, which then hangs on it like the encoder."""
    before, model = tiny.model("bert", "masked", seed=0, **settings), tiny.model("bert", "masked", seed=1, **settings)
    model.load_state_dict(before.state_dict())
    corpus, rows, tests = tiny.rows(4, seed=1), tiny.rows(5, seed=2), tiny.rows(2, seed=8)
    objective = tiny.objective("masked")
    own = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": 2}
    recording = training.record(
        model, objective, rows, arguments(tmp_path, **own), tmp_path / "run", previous=before, progress=False
    )
    stages = [
        Stage("one", before, objective, corpus, solver=solvers.CG(damping=0.1)),
        Stage("two", model, objective, rows, link="unrolled", run=tmp_path / "run"),
    ]
    found = MultiStageInfluence(stages, progress=False)
    bound = found.stage("two")
    head = {n for n, _ in before.named_parameters() if n.startswith("cls.")}
    assert head
    assert head <= set(bound.split.proximal)
    assert not bound.split.head
    _, b = bound.differentiation.pull_back(found.measurement(rows_of(tests))[0])
    carried = bound.carry(b)
    assert all(carried[n].any() for n in head)

    step, generator = 1e-5, torch.Generator().manual_seed(0)
    for chosen in (head, set(b) - head):
        direction = {n: torch.randn(b[n].shape[1:], generator=generator, dtype=torch.float64) for n in sorted(chosen)}
        sides = []
        for sign in (1, -1):
            moved = copy.deepcopy(before)
            with torch.no_grad():
                for n, v in direction.items():
                    moved.get_parameter(n).add_(sign * step * v)
            rerun(recording, moved, objective, rows, previous=before)
            sides.append(tiny.Plain(moved, "masked", objective.collate(rows_of(tests))).sums().detach())
        slope = sum((carried[n] * v).flatten(1).sum(1) for n, v in direction.items())
        torch.testing.assert_close(slope, (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-8)


# Interrupted sweeps -------------------------------------------------------------------------------------------------


def sweeps(folder):
    return list(folder.glob("sweep-*"))


def interrupted_sweep(monkeypatch, chain, after, tests=TESTS):
    """A query that fails in its backward step number `after`."""
    calls, backward = [], Replay.backward

    def failing(self, *given):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(None)
        return backward(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr("hf_msif.influence.backward.SAVE_EVERY", 0.0)
        patch.setattr(Replay, "backward", failing)
        with pytest.raises(KeyboardInterrupt):
            chain.query(tests)


@pytest.fixture
def own(made, tmp_path):
    """As `made`, in a folder that may be changed, with frozen parameters and a tie."""
    before, model = pair()
    run = Run(toy_rows(3, ROWS), [], optim="adamw", rate=0.05, alpha=0.4)
    run.record(model, tmp_path / "run", before, PATTERNS)
    return unrolled_chain(run, before, model, tmp_path / "run", PATTERNS), tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2, 3, 5, 8])
def test_an_interrupted_sweep_goes_on_unchanged(own, monkeypatch, after):
    found, folder = own
    whole = found.query(TESTS)
    assert not sweeps(folder)
    interrupted_sweep(monkeypatch, found, after)
    assert len(sweeps(folder)) == (after >= 3)
    steps, backward = [], Replay.backward
    monkeypatch.setattr(Replay, "backward", lambda self, s, t, a: steps.append(t) or backward(self, s, t, a))
    again = found.query(TESTS)
    assert steps == list(reversed(range(9 - after // 3 * 3)))
    for stage, solution in whole.solutions.items():
        assert all(torch.equal(t, again.solutions[stage].tensors()[n]) for n, t in solution.tensors().items())
    assert again.certificates == whole.certificates
    assert not sweeps(folder)


def test_a_sweep_of_another_question_is_not_gone_on_with(own, monkeypatch):
    found, folder = own
    other = toy_rows(17, 2)
    whole = found.query(other)
    interrupted_sweep(monkeypatch, found, 4)
    (left,) = sweeps(folder)
    again = found.query(other)
    assert sweeps(folder) == [left]
    interrupted_sweep(monkeypatch, found, 4, other)
    (theirs,) = {*sweeps(folder)} - {left}
    theirs.write_bytes(left.read_bytes())  # under the right name
    third = found.query(other)
    for query in (again, third):
        for stage, solution in whole.solutions.items():
            assert all(torch.equal(t, query.solutions[stage].tensors()[n]) for n, t in solution.tensors().items())


def test_a_damaged_sweep_starts_anew(own, monkeypatch):
    found, folder = own
    whole = found.query(TESTS)
    interrupted_sweep(monkeypatch, found, 4)
    (left,) = sweeps(folder)
    left.write_bytes(left.read_bytes()[:-100])
    again = found.query(TESTS)
    for stage, solution in whole.solutions.items():
        assert all(torch.equal(t, again.solutions[stage].tensors()[n]) for n, t in solution.tensors().items())
    assert not sweeps(folder)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adjoint_that_grows_is_refused_with_remedies(made, tmp_path):
    run, before, model, folder = made
    found = unrolled_chain(run, before, model, folder, max_growth=0.5)
    with pytest.raises(
        InputError, match=r"stage 'second': on the way back the adjoint grew .* times at step 9 of 9"
    ) as e:
        found.query(TESTS)
    for remedy in ("smaller learning rate", "larger batches", "warm-up", "averaging", "fewer steps", "'implicit'"):
        assert remedy in str(e.value)
    assert not sweeps(folder)

    before, model = pair()
    wild = Run(toy_rows(3, ROWS), [], rate=6.0, momentum=0.9, epochs=60, decay=0.0)
    wild.record(model, tmp_path / "run", before)
    with pytest.raises(InputError, match=r"grew .*e\+1\d times at step \d+ of 180; expected at most 4\.5e\+12"):
        unrolled_chain(wild, before, model, tmp_path / "run").query(TESTS)


def test_a_run_of_other_rows_models_or_stages_is_refused(made):
    run, before, model, folder = made

    def refused(message, **changes):
        given = {"run": run, "before": before, "model": model, "folder": folder, **changes}
        with pytest.raises(InputError, match=f"stage 'second': .*{message}|{message}"):
            unrolled_chain(**given)

    refused("was trained on other rows", run=replace(run, rows=run.rows[::-1]))
    changed = [*run.rows[:-1], {**run.rows[-1], "label": 1 - min(1, run.rows[-1]["label"])}]
    refused("was trained on other rows", run=replace(run, rows=changed))
    moved = copy.deepcopy(model)
    moved.head.bias.data += 0.1
    refused("'head.bias' of its model differs from the end of the run", model=moved)
    refused("did not start from stage 'first': 'encoder", before=toy(5))
    refused(r"do not agree on \['encoder", trainable="head")
    refused("holds no recorded run", folder=folder / "nowhere")


def test_an_unfinished_run_is_refused(own):
    found, folder = own
    (folder / "state-00000009.safetensors").rename(folder / "elsewhere")
    with pytest.raises(InputError, match=r"lacks its state after step 9 of 9: let its training end"):
        MultiStageInfluence([bound.stage for bound in found.stages], progress=False)


def test_a_run_that_left_out_a_row_is_refused(made, tmp_path):
    run, before, _, _ = made
    model = pair()[1]
    run.record(model, tmp_path / "run", before, omit=[3])
    with pytest.raises(InputError, match=r"left out the rows \['3'\] \(omit\)"):
        unrolled_chain(run, before, model, tmp_path / "run")


def test_rows_that_the_run_did_not_see_have_no_influence(made):
    run, before, model, folder = made
    query = unrolled_chain(run, before, model, folder).query(TESTS)
    with pytest.raises(InputError, match=r"the row 99 is not one of the rows that stage 'second' was trained on"):
        query.score([run.rows[2], {**run.rows[1], "example_id": 99}], stage="second")
    with pytest.raises(InputError, match="the row 1 is not one of the rows"):
        query.score([{**run.rows[1], "label": (run.rows[1]["label"] + 1) % 3}], stage="second")
    assert len(query.score(toy_rows(4, 3), stage="first")) == 3


def test_a_saved_query_knows_its_links(made, tmp_path):
    run, before, model, folder = made
    found = unrolled_chain(run, before, model, folder)
    query = found.query(TESTS)
    query.save_pretrained(tmp_path)
    loaded = Query.from_pretrained(tmp_path, unrolled_chain(run, before, model, folder))
    assert loaded.certificates == query.certificates
    for stage in ("first", "second"):
        rows = found.stage(stage).rows
        left, right = (q.score(rows, stage=stage) for q in (query, loaded))
        assert left.frame.equals(right.frame)
        assert left.metadata["certificate"] == right.metadata["certificate"]
    other = unrolled_chain(run, before, model, None, link="implicit", alpha=0.1)
    with pytest.raises(
        InputError, match=r"stage 'second' .*link was 'unrolled' and is 'implicit'; the recorded run differs"
    ):
        Query.from_pretrained(tmp_path, other)


def test_a_saved_query_is_scored_without_counting_the_rows_again(made, tmp_path, monkeypatch):
    """A pass for N inside of scoring would be one that not every process of a launch reaches."""
    run, before, model, folder = made
    query = unrolled_chain(run, before, model, folder).query(TESTS)
    query.save_pretrained(tmp_path)
    loaded = Query.from_pretrained(tmp_path, unrolled_chain(run, before, model, folder))
    sizes, collate = [], ToyObjective.collate
    monkeypatch.setattr(ToyObjective, "collate", lambda self, rows: sizes.append(len(rows)) or collate(self, rows))
    scores = loaded.score(run.rows[:1], stage="second")
    assert sizes == [1]
    np.testing.assert_allclose(scores.influence(0), query.score(run.rows[:1], stage="second").influence(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("mark", "slot"), [(m, s) for s in ("parameters", "first_moment", "second_moment") for m in (3, 6)]
)
def test_a_run_that_does_not_repeat_itself_is_refused(own, mark, slot):
    found, folder = own
    state = found.stages[1].differentiation.recording.state(mark)
    for t in state[slot].values():
        t *= 1.2
    found.stages[1].differentiation.recording.write(mark, state)
    with pytest.raises(InputError, match=r"stage 'second': replaying steps \d to \d ends .* away from the recorded"):
        found.query(TESTS)
    assert not sweeps(folder)


def test_check_replay_measures_the_whole_run(own):
    found, _ = own
    bound = found.stages[1]
    assert check_replay(bound) == 0.0
    state = bound.differentiation.recording.state(9)
    way = math.sqrt(sum(float((state["parameters"][n] - p).square().sum()) for n, p in first_state(bound).items()))
    state["parameters"]["head.bias"][0] += 0.1 * way
    bound.differentiation.recording.write(9, state)
    assert check_replay(bound) == pytest.approx(0.1, rel=0.2)


def first_state(bound):
    return bound.differentiation.recording.state(0)["parameters"]


def test_there_is_no_damping_to_sweep(made):
    run, before, model, folder = made
    found = unrolled_chain(run, before, model, folder)
    with pytest.raises(
        InputError, match="stage 'second' is differentiated by link='unrolled', without a linear system"
    ):
        damping_sweep(found, TESTS, run.rows, [0.1, 1.0], "second")


def test_replicates_do_not_share_an_interrupted_sweep(tmp_path, monkeypatch):
    """Each has a checkpoint of its own, under the cache key of the query."""
    before, model = pair()
    run = Run(rows_of(TESTS), [], epochs=2)
    run.record(model, tmp_path / "run", before)
    msif, keys = unrolled_chain(run, before, model, tmp_path / "run"), []

    def seen(recording, replay, adjoint, name, limit, cache_key):
        keys.append(cache_key)
        raise KeyboardInterrupt

    monkeypatch.setattr(unrolled, "go_back", seen)
    for r in (0, 1):
        checkpoint = open_checkpoint(tmp_path, checkpoint_name("second", r), "key", msif.engine)
        with pytest.raises(KeyboardInterrupt):
            msif.stages[1].differentiation.pull_back(msif.measurement(rows_of(TESTS))[0], checkpoint)
    assert len(set(keys)) == 2
