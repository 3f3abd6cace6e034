"""The Lanczos tridiagonal, the largest eigenvalue and the bound on iterations, against dense NumPy."""

import math

import numpy as np
import pytest
import torch
from helpers.spectra import SPECTRA, Diagonal, gradients

from hf_msif import vectors
from hf_msif.solvers import CG, solve
from hf_msif.solvers.damping import iteration_bound, muted_share
from hf_msif.solvers.lanczos import MOST_STEPS, lanczos, largest_eigenvalue, ritz
from hf_msif.solvers.operator import CountedOperator

over_spectra = pytest.mark.parametrize("spectrum", SPECTRA)


def run(operator, b, steps):
    return lanczos(CountedOperator(operator, len(b)), operator.block(b), steps)


def test_the_tridiagonal_is_the_operator_on_the_krylov_space():
    eigenvalues, steps = np.linspace(-1, 2, 40), 6
    b = np.random.default_rng(0).standard_normal((2, 40))
    t = run(Diagonal(eigenvalues), b, steps)
    for q in range(2):
        basis, _ = np.linalg.qr(np.stack([eigenvalues**k * b[q] for k in range(steps)], 1))
        expected = (basis.T * eigenvalues) @ basis
        values, shares = ritz(t.diagonal[q], t.off[q])
        np.testing.assert_allclose(values, np.linalg.eigvalsh(expected), atol=1e-10)
        # Gauss quadrature: exact on polynomials of degree below 2 k.
        measure = b[q] ** 2 / (b[q] ** 2).sum()
        for degree in range(2 * steps):
            assert (shares * values**degree).sum().item() == pytest.approx((measure * eigenvalues**degree).sum())


def test_exhausted_and_zero_columns_continue_with_zeros():
    eigenvalues = np.array([1.0, 2.0, 3.0, 5.0])
    t = run(Diagonal(eigenvalues), np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), 4)
    assert t.off[0, 1:].tolist() == [0, 0, 0]
    assert t.diagonal[0, 2:].tolist() == [0, 0]
    assert not t.diagonal[1].any()
    assert not t.off[1].any()
    np.testing.assert_allclose(ritz(t.diagonal[2], t.off[2])[0], eigenvalues)
    np.testing.assert_allclose(ritz(t.diagonal[0, :2], t.off[0, :2])[0], [1, 2])


@over_spectra
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_eigenvalue(spectrum, dtype, sign):
    operator = Diagonal(sign * SPECTRA[spectrum], dtype)
    largest = SPECTRA[spectrum].max()
    estimate = largest_eigenvalue(operator)
    assert 0.97 * largest <= estimate <= largest * (1 + 1e-6)
    assert estimate == largest_eigenvalue(operator)
    assert set(operator.widths) == {1}
    assert len(operator.widths) <= 2 * (MOST_STEPS - 4)  # settled before the limit


@pytest.mark.parametrize("eigenvalues", [[3.0], [-3.0, 1.0], [0.0, 2.0, 2.0]], ids=str)
def test_largest_eigenvalue_of_small_operators(eigenvalues):
    assert largest_eigenvalue(Diagonal(np.array(eigenvalues))) == pytest.approx(max(map(abs, eigenvalues)))
    assert largest_eigenvalue(Diagonal(np.zeros(3))) == 0


def test_most_of_the_directions_may_be_flat():
    """What a fraction of the mean eigenvalue fails on: 20 curved directions among 200,000."""
    eigenvalues = np.zeros(200_000)
    eigenvalues[:20] = np.geomspace(1, 182, 20)
    operator = Diagonal(eigenvalues)
    b = np.sqrt(eigenvalues + 1e-4)[None] * np.random.default_rng(0).standard_normal((1, len(eigenvalues)))
    certificate = solve(operator, operator.block(b), CG()).certificate
    assert certificate.damping == pytest.approx(0.182, rel=0.02)
    assert certificate.converged == [True]
    assert certificate.iterations[0] <= 40 < certificate.iteration_bound == 178


def test_the_bound_needs_the_root_of_the_condition_number():
    """½ √κ ln(2/tol) bounds the error in the operator's norm; the residual takes more on an ordinary spectrum."""
    operator, tol = Diagonal(SPECTRA["geometric"]), 1e-3
    b = np.random.default_rng(1).standard_normal((1, len(SPECTRA["geometric"])))
    certificate = solve(operator, operator.block(b), CG(tol=tol)).certificate
    condition = 1 + 1 / CG().damping_fraction
    assert 0.5 * math.sqrt(condition) * math.log(2 / tol) < certificate.iterations[0] <= certificate.iteration_bound


@pytest.mark.parametrize("condition", [1.0, 1.5, 10, 1e3, 1e6])
@pytest.mark.parametrize("tol", [0.5, 1e-3, 1e-9])
def test_iteration_bound(condition, tol):
    root = math.sqrt(condition)
    rate, k = (root - 1) / (root + 1), iteration_bound(condition, tol)
    assert 2 * root * rate**k <= tol * (1 + 1e-9)
    assert iteration_bound(condition, 0) is None


@over_spectra
def test_muted_share(spectrum):
    eigenvalues, damping = SPECTRA[spectrum], 1e-3
    b = gradients(eigenvalues, 1)
    t = run(Diagonal(eigenvalues), b, 60)
    share = muted_share(*ritz(t.diagonal[0] + damping, t.off[0]), damping)
    expected = (b[0, eigenvalues < damping] ** 2).sum() / (b**2).sum()
    assert share == pytest.approx(expected, abs=0.03)


def test_it_runs_with_the_inner_product_of_the_operator():
    operator = Diagonal(np.array([1.0, 3.0]))
    weight = {"a": torch.tensor([4.0]).double(), "b": torch.tensor([1.0]).double()}
    operator.dot = lambda x, y: vectors.dot({name: t * weight[name] for name, t in x.items()}, y)
    t = run(operator, np.array([[1.0, 1.0]]), 1)
    assert t.diagonal.item() == pytest.approx((4 * 1 + 1 * 3) / 5)
