"""Block conjugate gradients: what the columns gain from each other, and what must not break it."""

import numpy as np
import pytest
import torch
from helpers.spectra import SPECTRA, Diagonal, gradients

from hf_msif import vectors
from hf_msif.solvers import CG, BlockCG, Nystrom, block_cg, solve
from hf_msif.solvers._krylov import LinearSystem
from hf_msif.solvers.block_cg import BlockConjugateGradients, orthonormalise
from hf_msif.solvers.operator import CountedOperator

DECAYING = [name for name in SPECTRA if name not in ("uniform", "geometric", "clusters")]


def run(spectrum, b, solver, dtype=torch.float64):
    operator = Diagonal(SPECTRA[spectrum], dtype)
    solution = solve(operator, operator.block(b), solver)
    return vectors.flatten(solution.value).double().numpy(), solution.certificate, operator


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eight_columns_against_each_alone(spectrum, dtype):
    b = gradients(SPECTRA[spectrum], 8)
    _, alone, _ = run(spectrum, b, CG(damping=1e-3), dtype)
    u, together, operator = run(spectrum, b, BlockCG(damping=1e-3), dtype)
    assert all(together.converged)
    expected = b / (SPECTRA[spectrum] + 1e-3)
    error = np.linalg.norm((u - expected) * (SPECTRA[spectrum] + 1e-3), axis=1) / np.linalg.norm(b, axis=1)
    assert error.max() < 1.01e-3
    assert sum(operator.widths) == sum(together.matvecs)
    ratio = max(together.iterations) / min(alone.iterations)
    # Where the spectrum decays the columns find its large eigenvalues together; a uniform one has none to find.
    assert ratio <= (0.65 if spectrum in DECAYING else 1.05)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_iterates_are_optimal_over_the_sum_of_the_krylov_spaces(steps):
    eigenvalues, b = SPECTRA["power 1"][:200], gradients(SPECTRA["power 1"][:200], 3)
    operator, shift = Diagonal(eigenvalues), 0.01
    basis, _ = np.linalg.qr(np.concatenate([eigenvalues**k * b for k in range(steps)]).T)
    best = basis @ np.linalg.solve(basis.T @ (basis * (eigenvalues + shift)[:, None]), basis.T @ b.T)
    solver = BlockCG(damping=shift, tol=0.0, max_iter=steps)
    u = vectors.flatten(solve(operator, operator.block(b), solver).value)
    np.testing.assert_allclose(u, best.T, atol=1e-9 * np.abs(best).max())


@pytest.mark.parametrize("spectrum", ["power 1", "flat with outliers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_column_is_cg(spectrum, dtype):
    b = gradients(SPECTRA[spectrum], 1)
    u, certificate, _ = run(spectrum, b, BlockCG(tol=1e-2), dtype)
    expected, single, _ = run(spectrum, b, CG(tol=1e-2), dtype)
    np.testing.assert_allclose(u, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert abs(certificate.iterations[0] - single.iterations[0]) <= 1
    assert certificate.muted == pytest.approx(single.muted, abs=0.02)
    assert certificate.largest_ritz == pytest.approx(single.largest_ritz, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dependent_columns_cost_nothing(dtype):
    b = gradients(SPECTRA["power 1"], 3)
    dependent = np.stack([b[0], b[0], np.zeros_like(b[0]), b[1], 1e5 * b[0] - b[1], b[2], -1e-9 * b[2]])
    u, certificate, operator = run("power 1", dependent, BlockCG(damping=1e-3), dtype)
    _, independent, _ = run("power 1", b, BlockCG(damping=1e-3), dtype)
    assert all(certificate.converged)
    assert max(width for width in operator.widths if width != 6) == 3  # six to check
    assert max(certificate.iterations) <= max(independent.iterations) + 1
    assert not u[2].any()
    np.testing.assert_allclose(u[1], u[0], atol=2e-3 * np.abs(u[0]).max())
    assert sum(operator.widths) == sum(certificate.matvecs)


def test_columns_that_nearly_depend_on_others():
    """Directions from the level of the tolerance down to that of rounding."""
    b, noise = gradients(SPECTRA["power 1"], 1), gradients(SPECTRA["power 1"], 8, seed=7, shared=0.0)
    for dtype in (torch.float64, torch.float32):
        nearly = b + np.geomspace(1e-1, 1e-15, 8)[:, None] * noise
        _, certificate, _ = run("power 1", nearly, BlockCG(damping=1e-3), dtype)
        _, alone, _ = run("power 1", nearly, CG(damping=1e-3), dtype)
        assert all(certificate.converged)
        assert max(certificate.iterations) <= min(alone.iterations)


def test_as_many_columns_as_dimensions():
    operator = Diagonal(np.linspace(1, 3, 6))
    b = operator.block(np.random.default_rng(0).standard_normal((9, 6)))
    certificate = solve(operator, b, BlockCG(damping=0.5, tol=1e-10)).certificate
    assert all(certificate.converged)
    assert max(certificate.iterations) == 1
    assert max(operator.widths[:1]) == 6


def test_columns_that_are_done_early():
    eigenvalues, b = SPECTRA["power 1"], gradients(SPECTRA["power 1"], 4)
    b[0] = np.eye(1, len(eigenvalues), 3)  # an eigenvector: done after one step
    b[1, 30:] = 0
    _, certificate, operator = run("power 1", b, BlockCG(damping=1e-3, tol=1e-6))
    assert all(certificate.converged)
    assert certificate.iterations[0] == 1
    assert certificate.iterations[1] < certificate.iterations[2]
    assert operator.widths[-6] < 4 or 4 not in operator.widths[1:]
    assert sum(certificate.matvecs) == sum(operator.widths)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_orthonormalise(preconditioned):
    operator = Diagonal(np.linspace(1, 3, 50))
    random = np.random.default_rng(0)
    rows = random.standard_normal((3, 50))
    w = operator.block(np.stack([rows[0], rows[0] + 1e-5 * rows[1], 1e-4 * rows[2], rows[0] + rows[2]]))
    half = {name: 1 / t for name, t in operator.eigenvalues.items()}
    precondition = (lambda v: {name: t * half[name] for name, t in v.items()}) if preconditioned else None
    system = LinearSystem(CountedOperator(operator, 4), operator.matvec, w, 0.0, precondition=precondition)
    v, z, factor = orthonormalise(w, system, 0.0)
    assert factor.shape == (3, 4)
    torch.testing.assert_close(vectors.gram(v, z), torch.eye(3).double(), rtol=0, atol=1e-11)
    for name, t in vectors.combine(v, factor).items():
        torch.testing.assert_close(t, w[name], rtol=0, atol=1e-9)


def test_the_block_tridiagonal_is_the_operator_on_its_space(monkeypatch):
    eigenvalues, b, steps = np.linspace(0, 2, 60), np.random.default_rng(0).standard_normal((3, 60)), 4
    operator = Diagonal(eigenvalues)
    unit = operator.block(b / np.linalg.norm(b, axis=1, keepdims=True))
    system = LinearSystem(CountedOperator(operator, 3), operator.matvec, unit, 0.0)
    state, traces = BlockConjugateGradients.start(vectors.clone(unit), system), []
    for _ in range(steps):
        state = state.step(operator.matvec, system)
        traces.append(([0, 1, 2], state.trace()))
    basis, _ = np.linalg.qr(np.concatenate([eigenvalues**k * b for k in range(steps)]).T)
    spectra = BlockConjugateGradients.spectra(traces)
    for q in range(3):
        values, shares = spectra[q]
        np.testing.assert_allclose(values, np.linalg.eigvalsh(basis.T @ (basis * eigenvalues[:, None])), atol=1e-9)
        measure = b[q] ** 2 / (b[q] ** 2).sum()
        for degree in range(2 * steps):
            assert (shares * values**degree).sum().item() == pytest.approx((measure * eigenvalues**degree).sum())
    monkeypatch.setattr(block_cg, "MOST_ROWS", 8)  # a long one is cut: that of two steps
    for q, spectrum in BlockConjugateGradients.spectra(traces).items():
        for cut, expected in zip(spectrum, BlockConjugateGradients.spectra(traces[:2])[q], strict=True):
            assert torch.equal(cut, expected)


def test_negative_curvature_in_any_direction_ends_the_block():
    operator = Diagonal(np.concatenate([np.linspace(1, 3, 20), [-0.5]]))
    b = np.zeros((2, 21))
    b[0, :3], b[1, [0, 20]] = 1, 1
    certificate = solve(operator, operator.block(b), BlockCG(damping=0.1)).certificate
    assert certificate.status == ["negative_curvature"] * 2
    assert solve(operator, operator.block(b[:1]), BlockCG(damping=0.1)).certificate.status == ["converged"]


def test_with_a_preconditioner_the_columns_still_share():
    b = gradients(SPECTRA["power 1"], 8)
    settings = {"damping": 1e-3, "preconditioner": Nystrom(rank=40)}
    _, alone, _ = run("power 1", b, CG(**settings))
    _, together, _ = run("power 1", b, BlockCG(**settings))
    assert max(together.iterations) < min(alone.iterations)
    assert max(together.residual) <= 1e-3
