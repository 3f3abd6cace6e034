"""What `Auto` chooses, and that the answer is that of its choice."""

import numpy as np
import pytest
import torch
from helpers.toy import ToyObjective, toy, toy_rows

from hf_msif import InputError, MultiStageInfluence, Stage, solvers, vectors
from hf_msif.solvers import CG, Auto, BlockCG, ClosedForm, Dense, MinRes, Nystrom, Problem

CHOICES = {
    "a known inverse": (Problem(10**6, 3, semidefinite=True, closed_form=True), ClosedForm(), "knows its inverse"),
    "indefinite": (Problem(100, 1), MinRes(), "may be indefinite"),
    "small": (Problem(100, 2, semidefinite=True), Dense(damping="auto"), "for 100 parameters"),
    "small shards": (Problem(100, 1, semidefinite=True, sharded=True), CG(), "one right-hand side"),
    "one column": (Problem(10**6, 1, semidefinite=True), CG(), "one right-hand side"),
    "several": (Problem(10**6, 8, semidefinite=True), BlockCG(), "8 right-hand sides share"),
    "many": (Problem(10**6, 32, semidefinite=True), BlockCG(preconditioner=Nystrom()), "nystrom"),
    "too large for Nystrom": (Problem(10**8, 32, semidefinite=True), BlockCG(), "32 right-hand sides share"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice(name):
    problem, expected, reason = CHOICES[name]
    solver, why = Auto().chosen(problem)
    assert solver == expected
    assert reason in why


def test_settings_are_handed_on():
    auto = Auto(damping=0.3, tol=1e-5, max_iter=7)
    assert auto.chosen(Problem(10**6, 1, semidefinite=True))[0] == CG(damping=0.3, tol=1e-5, max_iter=7)
    assert auto.chosen(Problem(10**6, 1))[0] == MinRes(damping=0.3, tol=1e-5, max_iter=7)
    assert auto.with_damping(0.5).chosen(Problem(10, 1, semidefinite=True))[0] == Dense(damping=0.5, tol=1e-5)
    with pytest.raises(InputError, match=r"Auto\(tol=-1\): expected a number >= 0"):
        Auto(tol=-1)


class Diagonal:
    """Of the eigenvalues 1, …, P."""

    semidefinite = True

    def __init__(self, size):
        self.parameters = {"w": torch.zeros(size, dtype=torch.float64)}

    def matvec(self, v):
        return {"w": v["w"] * torch.arange(1.0, len(self.parameters["w"]) + 1).double()}


@pytest.mark.parametrize(("size", "columns", "name"), [(20, 2, "dense"), (600, 1, "cg"), (600, 3, "block_cg")])
def test_the_certificate_says_what_was_chosen(size, columns, name):
    operator = Diagonal(size)
    b = vectors.rademacher(operator.parameters, columns, seed=1)
    value, certificate = vars(solvers.solve(operator, b, Auto(tol=1e-8, max_iter=2000))).values()
    assert certificate.solver == name
    assert certificate.choice.startswith(name)
    assert str(certificate).startswith(f"solver='auto' took {certificate.choice}\n{name}, column 0: ")
    expected = b["w"].numpy() / (np.arange(1, size + 1) + certificate.damping)
    np.testing.assert_allclose(value["w"].numpy(), expected, atol=1e-6)
    assert certificate.from_dict(certificate.to_dict()) == certificate


def test_a_stage_asks_it():
    def chain(**settings):
        return MultiStageInfluence([Stage("only", toy(0), ToyObjective(), toy_rows(1, 9), **settings)], progress=False)

    tests = toy_rows(2, 2)
    chosen, dense = chain().query(tests), chain(solver=Dense(damping="auto")).query(tests)
    assert chosen.certificates["only"].solver == "dense"
    assert "solver='auto' took dense, for" in chosen.certificate()["stages"]["only"]["text"]
    torch.testing.assert_close(chosen.solutions["only"].u, dense.solutions["only"].u, rtol=0, atol=0)
    indefinite = chain(curvature="hessian").query(tests)
    assert indefinite.certificates["only"].solver == "minres"
    known = chain(curvature="ekfac").query(tests)
    assert known.certificates["only"].solver == "closed_form"


def test_curvature_auto(monkeypatch):
    from hf_msif.curvature import EKFAC, GaussNewton, auto

    def bound(rows=9):
        stage = Stage("only", toy(0), ToyObjective(), toy_rows(1, rows), curvature="auto")
        return MultiStageInfluence([stage], progress=False)

    small = bound()
    kind, why = small.stages[0].differentiation.curvature_kind
    assert kind is GaussNewton
    assert why.startswith("gauss_newton, since a solve with the exact matrix of 9 rows takes about")
    query = small.query(toy_rows(2, 2))
    assert query.certificate()["stages"]["only"]["curvature_choice"] == why
    assert f"curvature='auto' took {why}" in query.certificate()["stages"]["only"]["text"]
    assert f"curvature='auto' takes {why}" in small.stages[0].differentiation.cost(2).text
    monkeypatch.setattr(auto, "BUDGET", 1e-9)
    large = bound().stages[0].differentiation
    assert isinstance(large.operator, EKFAC)
    assert "ekfac, an approximation" in large.curvature_kind[1]
