"""Preconditioners: Nyström's against dense NumPy, what the solvers do with one, and what they refuse."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.spectra import SPECTRA, Diagonal, gradients

from hf_msif import vectors
from hf_msif.registry import PRECONDITIONERS
from hf_msif.solvers import CG, BlockCG, Nystrom, Preconditioner, solve

PRECONDITIONED = [CG, BlockCG]


def written_out(preconditioner, operator, damping):
    state = preconditioner.init(operator, damping)
    size = sum(p.numel() for p in operator.parameters.values())
    return vectors.flatten(preconditioner.apply(state, operator.block(np.eye(size)))).double().numpy()


F64, F32 = torch.float64, torch.float32


@pytest.mark.parametrize(("rank", "dtype"), [*((rank, F64) for rank in (1, 8, 20, 64)), (1, F32), (8, F32), (20, F32)])
def test_nystrom_is_its_formula(rank, dtype):
    eigenvalues, damping = np.geomspace(1e-3, 10, 40), 1e-3
    operator, size = Diagonal(eigenvalues, dtype), min(rank, 40)
    inverse = written_out(Nystrom(rank), operator, damping)
    omega = np.concatenate([vectors.flatten(vectors.rademacher(operator.parameters, 1, i)) for i in range(size)]).T
    core = omega.T @ (eigenvalues[:, None] * omega)
    approximation = (eigenvalues[:, None] * omega) @ np.linalg.pinv(core)
    approximation = approximation @ (omega.T * eigenvalues)
    values, basis = np.linalg.eigh((approximation + approximation.T) / 2)
    values, basis = values[-size:], basis[:, -size:]
    expected = np.eye(40) + (basis * ((values[0] + damping) / (values + damping) - 1)) @ basis.T
    # Both invert the core: what a processor's linear algebra rounds comes back times its condition.
    rounding = max(1e-9, 100 * np.finfo(float).eps * np.linalg.cond(core))
    np.testing.assert_allclose(inverse, expected, atol=rounding if dtype == F64 else 2e-2)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_nystrom_is_symmetric_and_definite_and_improves_the_condition(spectrum, dtype):
    eigenvalues = SPECTRA[spectrum][::20]
    eigenvalues, damping = eigenvalues / eigenvalues.max(), 1e-3
    inverse = written_out(Nystrom(32), Diagonal(eigenvalues, dtype), damping)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-5)
    assert np.linalg.eigvalsh((inverse + inverse.T) / 2)[0] > 0
    root = np.sqrt(eigenvalues + damping)
    before, after = root.max() ** 2 / root.min() ** 2, np.linalg.cond(root[:, None] * inverse * root)
    assert after < before * 1.01


def test_nystrom_solves_a_low_rank_operator_in_one_step_or_two():
    eigenvalues = np.zeros(500)
    eigenvalues[::50] = np.geomspace(0.1, 100, 10)
    operator = Diagonal(eigenvalues)
    b = operator.block(np.random.default_rng(0).standard_normal((2, 500)))
    certificate = solve(operator, b, CG(damping=0.01, tol=1e-8, preconditioner=Nystrom(rank=12))).certificate
    assert max(certificate.iterations) <= 2
    assert all(certificate.converged)


def test_what_is_left_out_of_nystrom():
    operator = Diagonal(np.concatenate([[5.0, 1.0], np.full(30, 1e-4)]))
    assert len(Nystrom(8).init(operator, 0.1).change) == 2  # the others are far below λ
    assert len(Nystrom(8).init(operator, 1e-5).change) == 8
    assert len(Nystrom(8).init(operator, 100.0).change) == 0  # nothing to do: M = I
    block = operator.block(np.ones((2, 32)))
    assert Nystrom(8).apply(Nystrom(8).init(operator, 100.0), block) is block
    assert len(Nystrom(8).init(Diagonal(np.zeros(9)), 1.0).change) == 0
    assert 7 <= len(Nystrom(64).init(Diagonal(np.linspace(1, 2, 9)), 1e-3).change) <= 9  # nine vectors of ±1


@pytest.mark.parametrize("solver", PRECONDITIONED)
@pytest.mark.parametrize("spectrum", ["power 0.7", "power 1", "power 1.5", "outliers on a slope"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_nystrom_pays_from_eight_columns_on(solver, spectrum, dtype):
    operator, b = Diagonal(SPECTRA[spectrum], dtype), gradients(SPECTRA[spectrum], 8)
    block = operator.block(b)
    plain = solve(operator, block, solver()).certificate
    operator.widths.clear()
    certificate = solve(operator, block, solver(preconditioner="nystrom")).certificate
    assert all(certificate.converged)
    assert max(certificate.residual) <= 1e-3  # the true one, not that of the preconditioned system
    if solver is CG:
        assert max(certificate.iterations) < 0.75 * min(plain.iterations)
        assert sum(operator.widths) < sum(plain.matvecs)
    else:
        assert max(certificate.iterations) <= max(plain.iterations)


@pytest.mark.parametrize("solver", PRECONDITIONED)
def test_the_certificate_claims_no_eigenvalues_of_the_preconditioned_system(solver):
    operator, b = Diagonal(SPECTRA["power 1"]), gradients(SPECTRA["power 1"], 2)
    certificate = solve(operator, operator.block(b), solver(preconditioner="nystrom")).certificate
    assert certificate.smallest_ritz == certificate.largest_ritz == [None, None]
    assert certificate.muted is None
    assert certificate.iteration_bound is None
    assert certificate.largest_eigenvalue == pytest.approx(1, rel=0.02)
    assert "0.001 × the largest eigenvalue 1" in str(certificate)


@pytest.mark.parametrize("solver", PRECONDITIONED)
def test_settings(solver):
    named = solver(preconditioner="nystrom")
    assert named == solver(preconditioner=Nystrom()) != solver() != solver(preconditioner=Nystrom(rank=3))
    assert hash(named) == hash(solver(preconditioner=Nystrom()))
    assert "preconditioner=Nystrom(rank=64, seed=0)" in repr(named)
    assert "preconditioner=None" in repr(solver())
    assert named.products(1000, 8) == solver().products(1000, 8) + 8
    assert named.products(20, 8) == solver().products(20, 8) + 3
    assert (named.state_vectors, solver().state_vectors) == (72, 0)
    assert (named.vectors_held, named.extra_bytes(10)) == (solver().vectors_held + 1, 0)
    assert named.with_damping(0.5) == solver(damping=0.5, preconditioner="nystrom")


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_every_name_stands_for_a_preconditioner(name):
    assert isinstance(CG(preconditioner=name).preconditioner, Preconditioner)


@dataclass
class Unhashable(Preconditioner):
    pass


@pytest.mark.parametrize("value", ["jacobi", 3, Nystrom, Unhashable()], ids=str)
def test_refuses_what_is_no_preconditioner(value):
    with pytest.raises(ValueError, match=r"preconditioner is .*; expected None, one of 'nystrom'"):
        CG(preconditioner=value)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "64"])
def test_refuses_a_bad_rank(rank):
    with pytest.raises(ValueError, match=r"Nystrom\(rank=.*\): expected a whole number >= 1"):
        Nystrom(rank=rank)


@dataclass(frozen=True)
class Scaling(Preconditioner):
    """A user's own: divides by a number, and asks what it was given."""

    factor: float

    def init(self, operator, damping):
        assert damping == 0.5
        return [operator]

    def apply(self, state, block):
        assert len(state) == 1
        return vectors.scale(block, 1 / self.factor)


@pytest.mark.parametrize("solver", PRECONDITIONED)
def test_one_of_your_own(solver):
    operator, b = Diagonal(SPECTRA["power 1"]), gradients(SPECTRA["power 1"], 3)
    block = operator.block(b)
    expected = solve(operator, block, solver(damping=0.5))
    solution = solve(operator, block, solver(damping=0.5, preconditioner=Scaling(7.0)))
    assert solution.certificate.iterations == expected.certificate.iterations
    np.testing.assert_allclose(vectors.flatten(solution.value), vectors.flatten(expected.value), rtol=1e-9)
    with pytest.raises(ValueError, match=r"the preconditioner is not positive definite: .*Solve without it"):
        solve(operator, block, solver(damping=0.5, preconditioner=Scaling(-1.0)))
