"""What a run will cost: bounds that hold, memory that is there, and a frozen encoder that is paid for once."""

import pytest
import torch
from helpers.project import SIZES, copied, msif

from hf_msif import solvers
from hf_msif.adapters.functional import memo_bytes
from hf_msif.curvature import Curvature
from hf_msif.influence import cost, implicit_cost
from hf_msif.project import config, memory, plan
from hf_msif.project.run import Run
from hf_msif.solvers.lanczos import MOST_STEPS


@pytest.fixture(scope="module")
def path(trained_project, tmp_path_factory):
    return copied(trained_project, tmp_path_factory.mktemp("plan"))


@pytest.fixture
def run(path):
    return lambda *overrides: Run(config.load(path, overrides), progress=False)


def counted(monkeypatch, run):
    """Time in plans is the number of the encoder's forward passes, and a little."""
    passes = []
    for name in run.names:
        encoder = run.present_model(name).base_model
        encoder.encoder.register_forward_hook(lambda *_: passes.append(1))

    def seconds(work, *arguments, once=False):
        before = len(passes)
        work(*arguments)
        return len(passes) - before + 0.001

    monkeypatch.setattr(implicit_cost, "best_seconds", seconds)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_a_frozen_encoder_is_paid_for_once(run, monkeypatch, curvature):
    one = run(("stages.finetuning.curvature", curvature), ("stages.finetuning.batch_size", 8))
    counted(monkeypatch, one)
    stages = plan.plan(one)["stages"]
    pretraining, finetuning = stages["pretraining"], stages["finetuning"]
    assert finetuning["first_product_seconds"] > 100 * finetuning["product_seconds"]
    assert finetuning["product_seconds"] < 0.01 * finetuning["forward_seconds"]
    assert pretraining["product_seconds"] == pretraining["first_product_seconds"]
    assert pretraining["product_seconds"] >= pretraining["forward_seconds"]


def test_beyond_the_memo_the_encoder_is_paid_for_again(run, monkeypatch):
    one = run(("stages.finetuning.batch_size", 8))
    counted(monkeypatch, one)
    whole = plan.plan(one)["stages"]["finetuning"]
    monkeypatch.setattr(implicit_cost, "MEMO_BYTES", whole["memo_bytes"] / 4)
    part = plan.plan(one)["stages"]["finetuning"]
    assert part["memo_bytes"] == pytest.approx(whole["memo_bytes"] / 4, rel=0.01)
    assert part["product_seconds"] == pytest.approx(0.75 * part["first_product_seconds"], rel=0.02)


def test_the_memo_is_as_large_as_promised(run):
    one = run()
    promised = plan.plan(one)["stages"]
    bound = one.chain().stage("finetuning")
    operator = bound.differentiation.operator
    operator.matvec({name: torch.zeros(1, *p.shape, device=p.device) for name, p in operator.parameters.items()})
    held = sum(memo_bytes(evaluation.memo) for evaluation in operator.evaluations)
    assert promised["finetuning"]["memo_bytes"] == pytest.approx(held, rel=0.3)
    assert held >= len(bound.rows) * SIZES["hidden_size"] * 4
    assert promised["pretraining"]["memo_bytes"] == 0


SOLVERS = [
    solvers.CG(damping="auto", tol=1e-6, max_iter=3),
    solvers.CG(damping=0.1, tol=1e-6, max_iter=3),
    solvers.SquaredCG(damping="auto", tol=1e-6, max_iter=3),
    solvers.MinRes(damping=0.1, tol=1e-6, max_iter=3),
    solvers.Dense(chunk=2),
    solvers.Identity(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'damping', '')}")
def test_the_number_of_products_is_a_tight_bound(run, monkeypatch, solver):
    bound = run().chain().stage("finetuning")
    spent, matvec = [], Curvature.matvec
    monkeypatch.setattr(
        Curvature, "matvec", lambda self, v: spent.append(len(next(iter(v.values())))) or matvec(self, v)
    )
    b = {name: torch.randn(2, *p.shape, device=p.device) for name, p in bound.model.parameters.items()}
    bound.differentiation.with_solver(solver).pull_back(b)
    bound = 2 * solver.products(bound.split.count(bound.split.trained), columns=2)
    settled = MOST_STEPS if getattr(solver, "damping", None) == "auto" else 0  # the largest eigenvalue, earlier
    assert sum(spent) <= bound <= 1.3 * sum(spent) + settled


def test_sizes_are_those_of_the_files(run, path):
    assert msif("query", "--config", path, "--json") == 0
    report = plan.plan(run())
    query = run().folder / "query" / "query.safetensors"
    assert 0 <= query.stat().st_size - report["disk_bytes"] < 2 * 8000  # names and shapes of two replicates
    one = plan.plan(run(("test.replicates", 1)))
    assert report["disk_bytes"] == pytest.approx(2 * one["disk_bytes"], rel=0.1)
    assert "2 replicates (test.replicates), for error bars" in report["text"]
    assert "for error bars" not in one["text"]
    model = run().folder / "pretraining" / "model.safetensors"
    assert report["stages"]["pretraining"]["model_bytes"] == pytest.approx(model.stat().st_size, rel=0.5)
    assert report["splits"]["finetuning"][0]["role"] == "frozen"
    assert report["score_seconds"] > 0


def test_a_group_is_one_column(run):
    columns = {
        a: plan.plan(run(("test.aggregate", a)))["stages"]["finetuning"]["vector_bytes"] for a in ("none", "sum")
    }
    assert columns["none"] == 2 * columns["sum"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "about 0.012 s"), (59, "about 59 s"), (600, "about 10 min"), (9000, "about 2.5 h")]
)
def test_times_are_readable(seconds, text):
    assert cost.time_text(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (3 * 2**40, "3072.0 GiB")])
def test_sizes_are_readable(size, text):
    assert cost.size_text(size) == text


def test_what_each_of_several_processes_holds(path, run, capsys, tmp_path):
    flags = ["--config", path, "--stages.finetuning.trainable", "all", "--stages.finetuning.alpha", "1.0"]
    flags += ["--run_dir", tmp_path]
    assert msif("plan", *flags, "--sharded", "true", "--processes", "4") == 0
    assert "memory on each of 4 process(es)" in capsys.readouterr().out
    one = run(("sharded", True), ("stages.pretraining.solver", {"name": "cg"}))
    alone, four = (plan.plan(one, processes)["stages"]["pretraining"] for processes in (1, 4))
    vector = four["vector_bytes"] / 2  # of two replicates
    assert four["solver_bytes"] == pytest.approx((5 / 4 + 4) * vector, abs=1)
    assert alone["solver_bytes"] == 9 * vector
    assert alone["activation_bytes"] == pytest.approx(four["activation_bytes"], rel=0.05)
    assert four["activation_bytes"] > 0
    assert four["products"] == alone["products"]
    assert msif("plan", *flags, "--processes", "0") == 2
    assert "--processes is 0; expected at least 1" in capsys.readouterr().err


def test_what_does_not_fit_is_said_and_refused(path, run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    assert "this does not fit: msif query would refuse" in plan.plan(run())["text"]
    capsys.readouterr()
    flags = ["--config", path, "--test.number", "1"]
    assert msif("query", *flags) == 2
    assert "memory_check: false to try all the same" in capsys.readouterr().err
    assert msif("query", *flags, "--memory_check", "false") == 0


def test_the_usual_cost_stands_beside_the_worst(run):
    one = run(("stages.pretraining.solver", {"name": "cg", "damping": 0.1, "tol": 0.1, "max_iter": 500}))
    report = plan.plan(one)
    stages = report["stages"].values()
    usual = sum(stage["usual_solve_seconds"] for stage in stages)
    assert report["usual_solve_seconds"] == pytest.approx(usual)
    assert report["solve_seconds"] == pytest.approx(sum(stage["solve_seconds"] for stage in stages))
    assert usual < report["solve_seconds"]
    assert "query, all stages: usually about" in report["text"]
    single = plan.plan(run(("test.replicates", 1)))["stages"]["pretraining"]
    assert single["usual_solve_seconds"] <= single["solve_seconds"]


@pytest.mark.parametrize(("rounds", "times", "told"), [(3, 3, "3 round(s)"), ("auto", 8, "at most 8 round(s)")])
def test_rounds_of_masks_are_counted(run, monkeypatch, rounds, times, told):
    reports = []
    for one in (run(), run(("corpus.mask_rounds", rounds))):
        counted(monkeypatch, one)
        reports.append(plan.plan(one))
    assert reports[1]["score_seconds"] == pytest.approx(times * reports[0]["score_seconds"])
    assert f"column(s) with {told} of masks" in reports[1]["text"]


def test_what_a_budget_buys_is_told_with_its_flags(run, monkeypatch):
    one = run(("corpus.sample", 5))
    counted(monkeypatch, one)  # a pass of one batch takes a second
    rows = len(one.rows("pretraining"))
    ample = plan.plan(one, budget=1e6)
    assert ample["budget"]["rows"] == rows
    assert ample["budget"]["mask_rounds"] == 8
    assert f"all {rows} rows scored with 8 round(s) of masks" in ample["text"]
    assert "  by --corpus.sample null --corpus.mask_rounds 8" in ample["text"]
    budget = ample["usual_solve_seconds"] + 3.5 * ample["score_seconds"] / 5  # fewer samples than these are not taken
    short = plan.plan(one, budget=budget)
    assert short["budget"]["rows"] == 3
    assert short["budget"]["curvature_samples"]["pretraining"] == rows
    assert "buys 3 rows scored with 1 round(s) of masks" in short["text"]
    assert "  by --corpus.sample 3" in short["text"]
    nothing = plan.plan(one, budget=1e-3)
    assert nothing["budget"] is None
    assert "is too short to score one row" in nothing["text"]
