"""The segments link: against the unrolled link, against autograd through written-out runs, and from files."""

import json

import pytest
import torch
from helpers import runs, tiny
from helpers.runs import PATTERNS, ROWS, TESTS, Run, pair, trained_names, unrolled_chain
from helpers.toy import ToyObjective, toy_rows
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_msif import InputError, MultiStageInfluence, Query, Stage, objectives, solvers
from hf_msif.influence import segments, segments_cost
from hf_msif.training import trajectory
from hf_msif.training.optimisers import SGD, AdamW
from hf_msif.training.recording import Recording

EXACT = {"link": "segments", "curvature": "hessian", "solver": solvers.Auto(tol=1e-12)}


def states(msif):
    """Every state of the unrolled last stage."""
    link = msif.stages[-1].differentiation
    slots = [link.recording.state(0)]
    for t in range(link.recording.steps):
        slots.append(link.replay.forward(slots[-1], t))
    return slots


def at(model, slots):
    """Copies of the model with the parameters of each state."""
    from copy import deepcopy

    models = []
    for state in slots:
        models.append(deepcopy(model))
        for name, value in state["parameters"].items():
            models[-1].get_parameter(name).data.copy_(value)
    return models


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize(("trainable", "alpha"), [("all", None), ("all", 0.3), ("head", None), (PATTERNS, None)])
def test_one_step_per_segment_is_the_unrolled_link(tmp_path, trainable, alpha, momentum):
    before, model = pair()
    rows = toy_rows(3, ROWS)
    run = Run(rows, trained_names(model, trainable), momentum=momentum, warmup=2, alpha=alpha, batch=ROWS, epochs=6)
    run.record(model, tmp_path, before, trainable)
    unrolled = unrolled_chain(run, before, model, tmp_path, trainable)
    reference = unrolled.query(TESTS)
    recording, every = Recording.from_pretrained(tmp_path), states(unrolled)
    steps = recording.steps
    given = trajectory.of_models(at(model, every[:steps]), range(steps), recording.schedule.rates, recording.optimiser)
    if alpha is not None:  # a recorded run says its own
        assert trajectory.of_recording(recording, 1).alpha == alpha
    msif = unrolled_chain(run, before, model, None, trainable, **EXACT, checkpoints=given, alpha=alpha)
    query = msif.query(TESTS)
    for stage, data in (("first", toy_rows(2, 12)), ("second", rows)):
        expected = reference.score(data, stage=stage).influences()
        found = query.score(data, stage=stage).influences()
        assert abs(found - expected).max() < 1e-8 * abs(expected).max()


# A quadratic objective --------------------------------------------------------------------------------------------


class Lines(PreTrainedModel):
    """x·w + z·v + q·c, of which w and v are the encoder."""

    config_class = PretrainedConfig
    base_model_prefix = "encoder"

    def __init__(self, config=None):
        super().__init__(config or PretrainedConfig())
        self.encoder = torch.nn.Module()
        self.encoder.w = torch.nn.Parameter(torch.zeros(4))
        self.encoder.v = torch.nn.Parameter(torch.zeros(3))
        self.c = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return ModelOutput(logits=x @ torch.cat([self.encoder.w, self.encoder.v, self.c]))


class Squares(objectives.Objective):
    """½ (prediction − y)²; the prediction itself where y is NaN, whose gradient is the same everywhere."""

    def collate(self, rows):
        return {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in ("x", "y")}

    def losses(self, call, batch):
        prediction, linear = call(x=batch["x"]).logits, batch["y"].isnan()
        error = prediction - batch["y"].nan_to_num()
        return torch.where(linear, prediction, error**2 / 2), torch.ones_like(error)


def lines(seed):
    generator = torch.Generator().manual_seed(seed)
    model = Lines().double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def quadratic_rows(size=12):
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (9, 1))
    return [{"example_id": i, "x": a.tolist(), "y": float(b)} for i, (a, b) in enumerate(zip(x, y, strict=True))]


FIXED = {"encoder.w": 0.5, "encoder.v": 2.0, "c": 3.0}  # P
RATES = [0.02 * (t + 1) if t < 5 else 0.1 * (1 - t / 30) for t in range(24)]
NAMES = ["encoder.w", "c"]  # v is frozen
FORCE = torch.linspace(-1, 2, 9, dtype=torch.float64)


def written_out(optimiser, start, frozen, force, rows):
    """The end of a run of which every step is differentiable; AdamW has the fixed preconditioner `FIXED`."""
    p, batch = dict(start), Squares().collate(rows)
    m = {n: torch.zeros_like(t) for n, t in p.items()}
    for t, rate in enumerate(RATES, 1):
        error = batch["x"] @ torch.cat([p["encoder.w"], frozen, p["c"]]) - batch["y"]
        slopes = error @ batch["x"] / len(rows) + force * FORCE
        g = {"encoder.w": slopes[:4], "c": slopes[7:]}
        for n in p:
            if isinstance(optimiser, AdamW):
                m[n] = optimiser.beta1 * m[n] + (1 - optimiser.beta1) * g[n]
                p[n] = p[n] * (1 - rate * optimiser.weight_decay) - rate * FIXED[n] * m[n] / (1 - optimiser.beta1**t)
            else:
                g[n] = g[n] + optimiser.weight_decay * p[n]
                m[n] = optimiser.momentum * m[n] + g[n]
                p[n] = p[n] - rate * (g[n] + optimiser.momentum * m[n] if optimiser.nesterov else m[n])
    return p


OPTIMISERS = [
    SGD(),
    SGD(momentum=0.7),
    SGD(momentum=0.7, nesterov=True, weight_decay=0.2),
    AdamW(beta1=0.0, weight_decay=0.3),
    AdamW(beta1=0.8),
]


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=str)
def test_exact_on_a_quadratic_for_any_number_of_segments(optimiser, segments):
    rows, before, model = quadratic_rows(), lines(1), lines(2)
    model.encoder.load_state_dict(before.encoder.state_dict())
    start = {n: model.get_parameter(n).detach().clone().requires_grad_() for n in NAMES}
    frozen = model.encoder.v.detach().clone().requires_grad_()
    force = torch.zeros((), dtype=torch.float64, requires_grad=True)
    end = written_out(optimiser, start, frozen, force, rows)
    test = {"x": rows[3]["x"], "y": 2.0}
    final = torch.cat([end["encoder.w"], frozen, end["c"]])
    loss = (final @ torch.tensor(test["x"], dtype=torch.float64) - test["y"]) ** 2 / 2
    on_force, on_w, on_v = torch.autograd.grad(loss, [force, start["encoder.w"], frozen])
    for n, value in end.items():
        model.get_parameter(n).data.copy_(value.detach())
    moments = None
    if isinstance(optimiser, AdamW):
        v = {n: (torch.full_like(p, 1 / FIXED[n]) - optimiser.eps) ** 2 for n, p in model.named_parameters()}
        moments = [v] * segments
    steps = [round((i + 0.5) * len(RATES) / segments) for i in range(segments)]
    given = trajectory.of_models([model] * segments, steps, RATES, optimiser, NAMES, moments)
    first = Stage("first", before, Squares(), rows, weight_decay=0.1, curvature="hessian", solver=solvers.Dense())
    second = Stage("second", model, Squares(), rows, trainable=NAMES, checkpoints=given, **EXACT)
    msif = MultiStageInfluence([first, second], progress=False)
    adjoint, _ = msif.measurement([{"example_id": 0, **test}])
    solution, inherited = msif.stages[1].differentiation.pull_back(adjoint)
    assert (inherited["encoder.w"][0] - on_w).abs().max() < 1e-8 * on_w.abs().max()
    assert (inherited["encoder.v"][0] - on_v).abs().max() < 1e-8 * on_v.abs().max()
    linear = [{"example_id": 0, "x": FORCE.tolist(), "y": float("nan")}]
    influence = solution.influence(Squares().collate(linear), linear).influence
    assert abs(float(influence) - float(on_force)) < 1e-8 * abs(float(on_force))


# As a query ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of AdamW with momentum, of which three states are on disk beside the first."""
    folder, (before, model) = tmp_path_factory.mktemp("recorded"), pair()
    run = Run(toy_rows(3, ROWS), [], optim="adam", rate=0.03, warmup=2, adam_decay=0.1, epochs=3)
    run.record(model, folder, before)
    return run, before, model, folder


def three(recorded, **settings):
    run, before, model, folder = recorded
    given = {"link": "segments", "checkpoints": 3, "solver": solvers.Auto(tol=1e-10), **settings}
    return unrolled_chain(run, before, model, folder, **given)


def test_a_saved_query_scores_as_before_and_depends_on_the_states(recorded, tmp_path):
    query = three(recorded).query(TESTS)
    query.save_pretrained(tmp_path)
    again = Query.from_pretrained(tmp_path, three(recorded))
    rows = recorded[0].rows
    for stage in ("first", "second"):
        assert (again.score(rows, stage=stage).influences() == query.score(rows, stage=stage).influences()).all()
    text = json.loads((tmp_path / "query.json").read_text())["stages"]["second"]["text"]
    assert "9 steps in 3 segments, the recorded run in" in text
    assert "steps 7 to 9 at the state after" in text
    with pytest.raises(InputError, match="the checkpoints of its run differs"):
        Query.from_pretrained(tmp_path, three(recorded, checkpoints=2))


def test_terms_sum_to_the_influence(recorded):
    query, rows = three(recorded).query(TESTS), recorded[0].rows[:3]
    terms = query.token_scores(rows, stage="second")
    whole = query.score(rows, stage="second").influence(1)
    sums = terms.groupby("example_id", sort=False)["influence_1"].sum().to_numpy()
    assert abs(sums - whole).max() < 1e-12 * abs(whole).max()


def test_both_ways_to_score_agree(recorded):
    query, rows = three(recorded).query(TESTS), recorded[0].rows
    forward, layers = (query.score(rows, stage="second", method=m).influences() for m in ("forward", "layerwise"))
    assert abs(forward - layers).max() < 1e-10 * abs(forward).max()


def test_an_interrupted_query_goes_on_with_the_next_segment(recorded, tmp_path, monkeypatch):
    whole = three(recorded).query(TESTS).score(toy_rows(2, 12)).influences()
    solved, go_back = [], segments.go_back

    def interrupted(segment, *arguments):
        if segment.begin == 0 and not solved.count(0):
            solved.append(0)
            raise KeyboardInterrupt
        solved.append(segment.begin)
        return go_back(segment, *arguments)

    monkeypatch.setattr(segments, "go_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        three(recorded).query(TESTS, checkpoints=tmp_path)
    assert solved == [6, 3, 0]
    found = three(recorded).query(TESTS, checkpoints=tmp_path).score(toy_rows(2, 12)).influences()
    assert solved == [6, 3, 0, 0]
    assert (found == whole).all()


def test_columns_one_after_another_find_the_same(recorded, monkeypatch):
    """Where the Krylov vectors of all of them would not fit."""
    rows = recorded[0].rows
    together = three(recorded).query(TESTS)
    monkeypatch.setattr(segments_cost, "KRYLOV_BYTES", 1)
    apart = three(recorded).query(TESTS)
    for stage in ("first", "second"):
        expected, found = (q.score(rows, stage=stage).influences() for q in (together, apart))
        assert abs(found - expected).max() < 1e-10 * abs(expected).max()
    reports = [query.certificates["second"].segments for query in (together, apart)]
    for one, other in zip(*reports, strict=True):
        assert one.iterations == other.iterations
        assert len(other.error) == 2


def test_a_column_that_is_not_solved_says_so(recorded):
    with pytest.warns(UserWarning, match="stage 'second': not solved to tolerance"):
        query = three(recorded, solver=solvers.Auto(tol=1e-10, max_iter=2)).query(TESTS)
    assert query.certificates["second"].status == ["max_iter"] * 2


def test_the_plan_says_what_it_takes(recorded):
    link = three(recorded).stages[1].differentiation
    cost = link.cost(2)
    assert cost.details["segments"] == 3
    assert cost.vector_bytes == 3 * 2 * 8 * sum(p.numel() for p in recorded[2].parameters())
    assert any("solve: 3 segments, usually" in line for line in cost.text)
    assert set(link.memory(2, 10**9, 1)) == {"the states of the run", "the Krylov vectors"}
    assert set(link.sketch({n: p.new_ones(1, *p.shape) for n, p in link.bound.model.parameters.items()}))


def test_what_the_run_never_moved_keeps_its_adjoint(recorded):
    """v̂ = 0: no gradient ever came there, and P = 1/ε would be a very large number of no meaning."""
    run, before, model, _ = recorded
    moments = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    moments["encoder.shift"] = torch.zeros_like(moments["encoder.shift"])
    given = trajectory.of_models([model], [3], [0.1] * 4, AdamW(beta1=0.0), (), [moments])
    msif = unrolled_chain(run, before, model, None, link="segments", checkpoints=given, solver=solvers.Auto())
    adjoint, _ = msif.measurement(runs.rows_of(TESTS))
    solution, inherited = msif.stages[1].differentiation.pull_back(adjoint)
    assert (inherited["encoder.shift"] == adjoint["encoder.shift"]).all()
    assert not solution.tensors()["0/encoder.shift"].any()


def test_rates_that_are_too_large_for_a_curvature_count_as_converged(recorded):
    """|1 − ησ| > 1 would grow without end, where the run itself did not: 1/σ in its place, and it is told."""
    run, before, model, _ = recorded
    given = trajectory.of_models([model], [200], [50.0] * 400, SGD())
    settings = {"link": "segments", "checkpoints": given, "solver": solvers.Auto(tol=1e-9)}
    query = unrolled_chain(run, before, model, None, **settings).query(TESTS)
    assert query.certificates["second"].segments[0].unstable
    assert "too curved for the rates" in str(query.certificates["second"])
    assert all(t.isfinite().all() for t in query.solutions["second"].tensors().values())


def test_a_growing_adjoint_is_refused(recorded):
    run, before, model, _ = recorded
    given = trajectory.of_models([model], [200], [5.0] * 400, SGD())
    settings = {"link": "segments", "checkpoints": given, "curvature": "hessian", "solver": solvers.Auto()}
    with pytest.raises(InputError, match=r"the adjoint grew .* take curvature='gauss_newton'"):
        unrolled_chain(run, before, model, None, **settings).query(TESTS)


def test_the_alpha_of_a_recorded_run_is_taken(tmp_path):
    before, model = pair()
    run = Run(toy_rows(3, ROWS), [], alpha=0.7, batch=ROWS, epochs=9)
    run.record(model, tmp_path, before)
    links = [
        unrolled_chain(run, before, model, tmp_path, link="segments", solver=solvers.Auto(), alpha=alpha)
        .stages[1]
        .differentiation
        for alpha in (None, 0.7)
    ]
    assert [link.facts()["alpha"] for link in links] == [0.7, 0.7]
    assert set(links[0].quadratic.tie) == {n for n, _ in model.named_parameters() if n.startswith("encoder.")}


def test_a_run_of_another_start_is_refused(tmp_path):
    before, model = pair()
    run = Run(toy_rows(3, ROWS), [], batch=ROWS, epochs=9)
    run.record(model, tmp_path, before)
    with pytest.raises(InputError, match="did not start from stage 'first'"):
        unrolled_chain(
            run,
            at(before, [{"parameters": {"encoder.shift": torch.ones(3)}}])[0],
            model,
            tmp_path,
            **{"link": "segments", "solver": solvers.Auto()},
        )


def test_growth_in_the_only_segment_is_refused(recorded):
    """Where nothing is handed on, u itself would be huge, or not finite."""
    run, _, model, _ = recorded
    given = trajectory.of_models([model], [200], [5.0] * 2000, SGD())
    settings = {"link": "segments", "checkpoints": given, "curvature": "hessian", "solver": solvers.Auto()}
    msif = MultiStageInfluence([Stage("only", model, ToyObjective(), run.rows, **settings)], progress=False)
    with pytest.raises(InputError, match="the adjoint grew"):
        msif.query(TESTS)


def test_unknown_moments_need_the_size_of_a_step():
    with pytest.raises(InputError, match="the second moments of AdamW are not given, and batch is None"):
        trajectory.of_models([pair()[1]], [1], [0.1], AdamW())


def test_what_does_not_fit_is_refused(recorded):
    run, before, model, _ = recorded
    with pytest.raises(InputError, match=r"link is 'segments' and solver is CG.* without a damping"):
        three(recorded, solver=solvers.CG())
    with pytest.raises(InputError, match="alpha is 'auto'; expected the α with which the stage was trained"):
        three(recorded, alpha="auto")
    with pytest.raises(InputError, match=r"checkpoints is 99, but the run in .* has 3 saved states; expected at"):
        three(recorded, checkpoints=99)
    with pytest.raises(InputError, match="neither checkpoints nor run is given; expected"):
        unrolled_chain(run, before, model, None, link="segments")
    before, model = pair()
    moved = at(model, [{"parameters": {"encoder.shift": torch.full((3,), 9.0)}}])
    given = trajectory.of_models(moved, [1], [0.1], SGD())
    with pytest.raises(InputError, match=r"'encoder\.shift' is not trained, but changes along 1 models"):
        unrolled_chain(run, before, model, None, "head", link="segments", checkpoints=given).query(TESTS)
    with pytest.raises(InputError, match="got 1 models, the steps"):
        trajectory.of_models([model], [9], [0.1], SGD())


def test_adapters_alone_may_be_trained():
    """LoRA: the encoder is frozen. In a time so short that curvature does not matter, u = τ a."""
    peft = pytest.importorskip("peft")
    narrow = {"hidden_size": 8, "intermediate_size": 6, "attention": "eager"}
    before = tiny.model("bert", "masked", **narrow)
    adapted = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(tiny.finetuned(before, "bert", **narrow), adapted)
    tiny.perturbed(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad), 5)
    given = trajectory.of_models([model], [2], [1e-9, 2e-9], SGD())
    patterns = ["*.lora_*", "*.modules_to_save.*"]
    settings = {"trainable": patterns, "link": "segments", "checkpoints": given, "solver": solvers.Auto(tol=1e-10)}
    msif = tiny.chain(before, model, tol=1e-10, **settings)
    query, short = msif.query(tiny.rows(2, seed=8)), solvers.Identity()
    for stage in ("pre", "fine"):
        plain = tiny.chain(before, model, tol=1e-10, trainable=patterns, solver=short).query(tiny.rows(2, seed=8))
        rows = tiny.rows(5, seed=2)
        found, expected = (q.score(rows, stage=stage).influences() for q in (query, plain))
        if stage == "fine":
            assert abs(found - 3e-9 * expected).max() < 1e-6 * abs(found).max()
        assert abs(found).min() > 0
