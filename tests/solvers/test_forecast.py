"""Forecasts of products against the solves that they foretell."""

import math

import numpy as np
import pytest
import torch
from helpers.spectra import SPECTRA, Diagonal, gradients

from hf_msif import vectors
from hf_msif.solvers import CG, Identity, MinRes, forecast, solve
from hf_msif.solvers.damping import iteration_bound
from hf_msif.solvers.forecast import residual_history, usual_iterations
from hf_msif.solvers.lanczos import lanczos
from hf_msif.solvers.operator import CountedOperator


def residuals(operator, b, solver):
    """The relative residuals of a solve as its recurrence tells them."""
    told = []
    solve(operator, operator.block(b), solver, progress=lambda _, residual: told.append(residual))
    return np.array(told)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_history_is_that_of_the_solve(spectrum, dtype):
    # Later steps agree in size only: once the first Ritz value has converged, both follow their own rounding.
    steps, rtol = (8, 1e-6) if dtype == torch.float64 else (6, 0.05)
    operator, b, damping = Diagonal(SPECTRA[spectrum], dtype), gradients(SPECTRA[spectrum], 1), 1e-3
    history = residual_history(lanczos(CountedOperator(operator, 1), operator.block(b), steps), damping)[0]
    told = residuals(operator, b, CG(damping=damping, tol=0.0, max_iter=steps))
    np.testing.assert_allclose(history, told, rtol=rtol)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kind", ["gradients", "white"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_forecast_is_within_thirty_percent(spectrum, kind, dtype):
    eigenvalues = SPECTRA[spectrum]
    operator, b = Diagonal(eigenvalues, dtype), gradients(eigenvalues, 3, seed=4)
    if kind == "white":
        b /= np.sqrt(eigenvalues)
    b[1] = 0
    usual, worst, _ = forecast(operator, operator.block(b), CG())
    spent = solve(operator, operator.block(b), CG()).certificate.matvecs
    assert worst == 179
    assert usual[1] == spent[1] == 0
    for q in (0, 2):
        assert spent[q] <= worst
        assert usual[q] == pytest.approx(spent[q], rel=0.3)


def test_its_price_and_its_bounds():
    operator, b = Diagonal(SPECTRA["geometric"]), gradients(SPECTRA["geometric"], 2)
    state = CG().init(operator)
    operator.widths.clear()
    usual, worst, _ = forecast(operator, operator.block(b), CG(max_iter=30), state, steps=10)
    assert operator.widths == [2] * 10
    assert usual == [31, 31]
    assert worst == 31
    b[0] = 0
    assert forecast(operator, operator.block(b), CG(tol=0.0), state).worst == 201
    assert forecast(operator, operator.block(b), CG(damping=1e-2)).worst == 1 + iteration_bound(1 + 100, 1e-3)


def test_negative_curvature_ends_the_solve_and_the_forecast():
    eigenvalues = np.concatenate([np.linspace(-0.5, -0.1, 5), np.linspace(0, 1, 60)])
    operator, b = Diagonal(eigenvalues), np.random.default_rng(0).standard_normal((1, 65))
    certificate = solve(operator, operator.block(b), CG(damping=0.01)).certificate
    assert certificate.status == ["negative_curvature"]
    assert forecast(operator, operator.block(b), CG(damping=0.01)) == ([certificate.iterations[0] + 1], 201, 201)


def test_extrapolation_of_a_geometric_history():
    history = torch.tensor(0.7).double() ** torch.arange(1, 13)
    assert usual_iterations(history, 1e-3) == pytest.approx(math.log(1e-3) / math.log(0.7), abs=0.1)
    assert usual_iterations(history, 0.5) == 2
    assert usual_iterations(history[:1], 1e-3) > 4
    assert usual_iterations(torch.full((9,), torch.inf).double(), 1e-3) == math.inf
    assert usual_iterations(history, 0.0) == math.inf


def test_the_smallest_residuals_are_those_of_minres():
    """The identity by which a forecast smooths the residuals of conjugate gradients."""
    operator, b = Diagonal(SPECTRA["power 1"]), gradients(SPECTRA["power 1"], 1)
    settings = {"damping": 1e-3, "tol": 0.0, "max_iter": 12}
    plain, smallest = (residuals(operator, b, solver(**settings)) for solver in (CG, MinRes))
    np.testing.assert_allclose((1 + (plain**-2).cumsum()) ** -0.5, smallest, rtol=1e-3)


def test_refuses_other_solvers():
    operator = Diagonal(np.ones(4))
    with pytest.raises(ValueError, match=r"solver is Identity\(.*; expected one that iterates"):
        forecast(operator, vectors.stack([operator.parameters]), Identity())
