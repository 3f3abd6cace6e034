"""Every solver against dense NumPy, by property over one list: a new solver is one line in `cases.SOLVERS`."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import SOLVERS, SolverCase, shifted
from helpers.toy import ToyObjective, toy, toy_rows

from hf_msif import MultiStageInfluence, Stage, vectors
from hf_msif.solvers import CG, Certificate, Dense, Identity, MinRes, Solution, Solver, SquaredCG, as_solver, solve
from hf_msif.solvers._krylov import LinearSystem
from hf_msif.solvers.cg import ConjugateGradients
from hf_msif.solvers.lanczos import MOST_STEPS
from hf_msif.solvers.operator import CountedOperator

SHAPES = {"weight": (3, 4), "bias": (5,), "temperature": ()}
P = 18


@dataclass(frozen=True)
class Richardson(Solver):
    """A user's own solver, u ← u + step (b − (A + λI)u): each column until it is done, or diverges."""

    damping: float = 0.3
    tol: float = 1e-10
    max_iter: int = 500
    step: float = 0.18

    shardable = True

    def compute(self, operator, b, state, progress=None, checkpoint=None):
        u, norms = vectors.zeros_like(b), operator.norm(b)
        relative, iterations = (norms > 0).double(), torch.zeros_like(norms, dtype=torch.long)
        running = norms.nonzero().flatten()
        while len(running):
            v = vectors.take(u, running)
            residual = vectors.add(vectors.take(b, running), operator.matvec(v, running), -1.0)
            residual = vectors.add(residual, v, -self.damping)
            relative[running] = operator.norm(residual) / norms[running]
            go_on = (relative > self.tol) & (relative < 2) & (iterations < self.max_iter)
            keep = go_on[running]
            running = running[keep]
            iterations[running] += 1
            vectors.put_(u, running, vectors.add(vectors.take(v, keep), vectors.take(residual, keep), self.step))
        certificate = Certificate.from_residual("richardson", self.damping, self.tol, relative, operator.counts)
        return Solution(u, dataclasses.replace(certificate, iterations=iterations.tolist()))


KRYLOV = [case for case in SOLVERS if hasattr(case.solver, "max_iter")]
SPECTRAL = [case for case in KRYLOV if case.spectrum]
DAMPED = [case for case in SOLVERS if case.solver.damped]
ALL = [*SOLVERS, SolverCase(Richardson(), shifted, indefinite=False)]


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=name_of)


def name_of(case):
    preconditioner = getattr(case.solver, "preconditioner", None)
    name = type(case.solver).__name__
    return name if preconditioner is None else f"{name}-{type(preconditioner).__name__}"


class Matrix:
    """A symmetric matrix as an operator that remembers how many columns each product had."""

    def __init__(self, matrix, dtype=torch.float64, shapes=SHAPES):
        self.matrix = torch.tensor(matrix, dtype=dtype)
        self.parameters = {name: torch.ones(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}
        self.widths = []

    def matvec(self, v):
        self.widths.append(vectors.columns(v))
        return vectors.unflatten(vectors.flatten(v) @ self.matrix, v)

    def block(self, b):
        like = vectors.stack([{name: p.detach() for name, p in self.parameters.items()}])
        return vectors.unflatten(torch.as_tensor(b).to(self.matrix.dtype), like)


def symmetric(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues), len(eigenvalues))))
    a = q * eigenvalues @ q.T
    return (a + a.T) / 2


def right_hand_sides(q=3, size=P, seed=1):
    return np.random.default_rng(seed).standard_normal((q, size))


def run(a, b, solver, dtype=torch.float64, **options):
    """Solves on a flat parameter space; returns u as float64 NumPy, the certificate and the operator."""
    shapes = SHAPES if len(a) == P else {"w": (len(a),)}
    operator = Matrix(a, dtype, shapes)
    solution = solve(operator, operator.block(b), solver, **options)
    return vectors.flatten(solution.value).double().numpy(), solution.certificate, operator


def residuals(a, b, u, case, certificate):
    s, c = case.system(a, certificate.damping)
    rhs = b @ c
    return np.linalg.norm(u @ s - rhs, axis=1) / np.linalg.norm(rhs, axis=1)


DEFINITE = symmetric(np.geomspace(0.1, 10, P))
INDEFINITE = symmetric(np.concatenate([-np.geomspace(0.7, 4, 6), np.geomspace(0.5, 10, P - 6)]))


@over(ALL)
def test_agrees_with_numpy(case):
    b = right_hand_sides()
    u, certificate, _ = run(DEFINITE, b, case.solver)
    s, c = case.system(DEFINITE, certificate.damping)
    np.testing.assert_allclose(u, np.linalg.solve(s, c @ b.T).T, rtol=1e-7, atol=1e-9)
    assert certificate.converged == [True] * 3
    assert certificate.status == ["converged"] * 3
    assert certificate.negative_curvature == [False] * 3


@over([case for case in SOLVERS if case.indefinite])
def test_solves_indefinite_systems(case):
    b = right_hand_sides()
    u, certificate, _ = run(INDEFINITE, b, case.solver)
    s, c = case.system(INDEFINITE, certificate.damping)
    np.testing.assert_allclose(u, np.linalg.solve(s, c @ b.T).T, rtol=1e-6, atol=1e-8)
    assert all(certificate.converged)
    indefinite = np.linalg.eigvalsh(s)[0] < 0
    assert certificate.negative_curvature == [indefinite] * 3


@over([case for case in KRYLOV if not case.indefinite])
def test_reports_indefinite_systems(case):
    u, certificate, _ = run(INDEFINITE, right_hand_sides(), case.solver)
    assert certificate.negative_curvature == [True] * 3
    assert certificate.converged == [False] * 3
    assert certificate.status == ["negative_curvature"] * 3
    if case.spectrum:
        assert all(e < -0.3 for e in certificate.smallest_ritz)
    assert np.isfinite(u).all()
    assert "use MinRes" in str(certificate)


def test_cg_keeps_the_iterate_before_the_direction_of_negative_curvature():
    # b = (1, 1), A = diag(3, -1): the first step goes to u = b, the second meets negative curvature.
    u, certificate, _ = run(np.diag([3.0, -1.0]), np.ones((1, 2)), CG(damping=0.0))
    np.testing.assert_allclose(u, [[1.0, 1.0]])
    assert certificate.iterations == [2]
    u, certificate, _ = run(np.diag([1.0, -3.0]), np.ones((1, 2)), CG(damping=0.0))
    np.testing.assert_array_equal(u, [[0.0, 0.0]])
    assert certificate.iterations == [1]
    assert certificate.residual == [1.0]


def test_zero_curvature_is_not_called_negative():
    _, certificate, _ = run(np.diag([1.0, 0.0]), np.ones((1, 2)), CG(damping=0.0))
    assert certificate.status == ["stalled"]
    assert certificate.negative_curvature == [False]


@over(ALL)
def test_solving_twice_gives_the_same(case):
    operator = Matrix(DEFINITE)
    b, before = operator.block(right_hand_sides()), operator.block(right_hand_sides())
    for solver in {case.solver, _auto(case.solver)}:
        state = solver.init(operator)
        first, second, fresh = (solve(operator, b, solver, prepared) for prepared in (state, state, None))
        for again in (second, fresh):
            assert again.certificate == first.certificate
            assert all(torch.equal(again.value[name], first.value[name]) for name in b)
    assert all(torch.equal(b[name], before[name]) for name in b)
    assert torch.equal(operator.matrix, torch.as_tensor(DEFINITE))


def _auto(solver):
    return dataclasses.replace(solver, damping="auto") if solver.damped else solver


@over(ALL)
def test_linear_in_the_right_hand_side(case):
    x, y = right_hand_sides(2)
    u, _, _ = run(DEFINITE, np.stack([x, y, 2 * x - 3 * y]), case.solver)
    np.testing.assert_allclose(u[2], 2 * u[0] - 3 * u[1], atol=1e-7)


@over(ALL)
def test_symmetric_in_its_arguments(case):
    """⟨x, u(y)⟩ = ⟨u(x), y⟩: what a solver applies is a function of A."""
    b = right_hand_sides(4)
    u, _, _ = run(DEFINITE, b, case.solver)
    np.testing.assert_allclose(u @ b.T, (u @ b.T).T, atol=1e-6)


@over(ALL)
def test_a_block_equals_its_columns_one_by_one(case):
    b = np.stack(
        [right_hand_sides(1)[0], np.zeros(P), np.linalg.eigh(DEFINITE)[1][:, 4], right_hand_sides(1, seed=5)[0]]
    )
    u, certificate, _ = run(DEFINITE, b, case.solver)
    assert not u[1].any()
    if case in KRYLOV:
        assert certificate.iterations[1] == 0
        assert certificate.iterations[0] > 5
    if case in SPECTRAL:
        assert certificate.iterations[2] == 1
    for q, column in enumerate(b):
        alone, single, _ = run(DEFINITE, column[None], case.solver)
        np.testing.assert_allclose(u[q], alone[0], atol=1e-9 if case.joint else 1e-11)
        if case.joint:
            assert certificate.iterations[q] <= single.iterations[0]
            continue
        assert certificate.iterations[q] == single.iterations[0]
        assert certificate.matvecs[q] == single.matvecs[0]
        rounding = 1e-14 if case.spectrum else 1e-11  # the matrix products of a preconditioner depend on the width
        assert certificate.residual[q] == pytest.approx(single.residual[0], rel=1e-2, abs=rounding)


@over(DAMPED)
def test_finished_columns_cost_nothing(case):
    eigenvectors = np.linalg.eigh(DEFINITE)[1].T
    b = np.stack([right_hand_sides(1)[0], np.zeros(P), eigenvectors[4], eigenvectors[2] + eigenvectors[9]])
    operator = Matrix(DEFINITE)
    state = case.solver.init(operator)
    operator.widths.clear()
    certificate = solve(operator, operator.block(b), case.solver, state).certificate
    assert sum(operator.widths) == sum(certificate.matvecs)
    assert certificate.matvecs[1] == 0
    if case in SPECTRAL:
        assert certificate.iterations[1:] == [0, 1, 2]
        setup = case.passes - 1  # Hb of the squared system
        assert certificate.matvecs[2:] == [setup + case.passes * (k + 1) for k in (1, 2)]
        assert (
            operator.widths[: setup + 3 * case.passes]
            == [3] * (setup + case.passes) + [2] * case.passes + [1] * case.passes
        )


@over(ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_certificate_tells_the_true_residual(case, dtype):
    a = torch.as_tensor(DEFINITE).to(dtype).double().numpy()  # the operator as it is after rounding
    b = torch.as_tensor(right_hand_sides()).to(dtype).double().numpy()
    solver = dataclasses.replace(case.solver, tol=1e-3) if hasattr(case.solver, "tol") else case.solver
    u, certificate, _ = run(a, b, solver, dtype)
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(certificate.residual, residuals(a, b, u, case, certificate), rtol=1e-2, atol=rounding)
    if type(solver) is SquaredCG:
        plain = np.linalg.norm(u @ a - b, axis=1) / np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(certificate.residual_unsquared, plain, rtol=1e-4)
    else:
        assert certificate.residual_unsquared is None


@over(SOLVERS)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e7])
@pytest.mark.parametrize("sign", [1, -1])
def test_float32_reaches_the_tolerance_or_says_not(case, condition, sign):
    signs = np.where(np.arange(60) % 3 == 0, sign, 1)
    a = symmetric(np.geomspace(1 / condition, 1, 60) * signs).astype(np.float32).astype(float)
    b = right_hand_sides(2, 60).astype(np.float32).astype(float)
    u, certificate, _ = run(a, b, _set(case.solver, damping=0.0, tol=1e-4, max_iter=200), torch.float32)
    true = residuals(a, b, u, case, certificate)
    for converged, residual, claimed in zip(certificate.converged, true, certificate.residual, strict=True):
        assert converged == (claimed <= certificate.tol)
        assert residual < 2e-4 or not converged
    if condition == 1e2 and sign == 1 and case.passes == 1:
        assert all(certificate.converged)
    if type(case.solver) is MinRes:
        assert (true < 1).all()  # minimal over the Krylov space: worse than u = 0 would be rounding


def _set(solver, **settings):
    known = {field.name for field in dataclasses.fields(solver)}
    return dataclasses.replace(solver, **{name: value for name, value in settings.items() if name in known})


@over(KRYLOV)
def test_restarts_until_the_true_residual_agrees(case):
    a = symmetric(np.geomspace(1e-2, 1, 100))
    estimates = []
    solver = _set(case.solver, damping=0.1, tol=1.5e-7, max_iter=500)
    _, certificate, _ = run(
        a, right_hand_sides(1, 100), solver, torch.float32, progress=lambda _, residual: estimates.append(residual)
    )
    assert min(estimates) <= solver.tol
    if certificate.converged[0]:
        assert certificate.residual[0] <= solver.tol
    else:
        assert certificate.status == ["stalled"]
        assert "stalled" in str(certificate)
    restarts = sum(residual <= solver.tol for residual in estimates[:-1])  # believed, and not true
    assert certificate.matvecs[0] == case.passes * (certificate.iterations[0] + 1 + restarts) + case.passes - 1


def test_restarts_mend_what_the_recurrence_missed():
    a = symmetric(np.geomspace(1e-3, 1, 100)).astype(np.float32).astype(float)
    b = right_hand_sides(1, 100).astype(np.float32).astype(float)
    operator = Matrix(a, torch.float32, {"w": (100,)})
    unit = operator.block(b / np.linalg.norm(b))
    system = LinearSystem(CountedOperator(operator, 1), None, unit, damping=0.0)
    state = ConjugateGradients.start(unit, system)
    while state.error > 1e-6:
        state = state.step(operator.matvec, system)
    believed = vectors.flatten(state.x).double().numpy() * np.linalg.norm(b)
    drifted = np.linalg.norm(believed @ a - b) / np.linalg.norm(b)
    u, certificate, _ = run(a, b, CG(damping=0.0, tol=1e-6, max_iter=1000), torch.float32)
    assert drifted > 1e-5
    assert np.linalg.norm(u @ a - b) / np.linalg.norm(b) < 0.5 * drifted
    assert certificate.status == ["stalled"]  # float32 has no u that is good to 1e-6 here


@over(KRYLOV)
def test_stops_at_max_iter(case):
    _, certificate, _ = run(DEFINITE, right_hand_sides(), _set(case.solver, max_iter=3))
    assert certificate.iterations == [3] * 3
    assert certificate.status == ["max_iter"] * 3
    assert certificate.converged == [False] * 3
    assert str(certificate).count("stopped at 3 iterations, not converged; residual ") == 3


@over(KRYLOV)
def test_tolerance_zero_ends(case):
    _, certificate, _ = run(DEFINITE, right_hand_sides(), _set(case.solver, tol=0.0, max_iter=1000))
    assert max(certificate.residual) < 1e-12
    assert max(certificate.iterations) < 200


@over(KRYLOV)
def test_the_scale_of_the_right_hand_side_does_not_matter(case):
    b = right_hand_sides(2)
    u, certificate, _ = run(DEFINITE, b, _set(case.solver, tol=1e-4), torch.float32)
    tiny, other, _ = run(DEFINITE, b * 2.0**-100, _set(case.solver, tol=1e-4), torch.float32)
    np.testing.assert_array_equal(tiny * 2.0**100, u)
    assert other.iterations == certificate.iterations


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_iterates_are_optimal_over_the_krylov_space(steps):
    b = right_hand_sides(1)
    powers = np.stack([np.linalg.matrix_power(INDEFINITE, k) @ b[0] for k in range(steps)])
    basis, _ = np.linalg.qr(powers.T)
    best = np.linalg.lstsq(INDEFINITE @ basis, b[0], rcond=None)[0]
    u, _, _ = run(INDEFINITE, b, MinRes(tol=0.0, max_iter=steps))
    np.testing.assert_allclose(u[0], basis @ best, atol=1e-9)

    powers = np.stack([np.linalg.matrix_power(DEFINITE, k) @ b[0] for k in range(steps)])
    basis, _ = np.linalg.qr(powers.T)
    best = np.linalg.solve(basis.T @ DEFINITE @ basis, basis.T @ b[0])
    u, _, _ = run(DEFINITE, b, CG(damping=0.0, tol=0.0, max_iter=steps))
    np.testing.assert_allclose(u[0], basis @ best, atol=1e-9)


def test_minres_on_singular_systems():
    eigenvalues = np.concatenate([np.zeros(4), -np.geomspace(0.1, 2, 6), np.geomspace(0.1, 5, P - 10)])
    a, b = symmetric(eigenvalues), right_hand_sides(2)
    consistent = b @ a
    u, certificate, _ = run(a, consistent, MinRes(tol=1e-10))
    assert certificate.converged == [True, True]
    np.testing.assert_allclose(u, consistent @ np.linalg.pinv(a), atol=1e-7)  # started at 0: the shortest solution

    u, certificate, _ = run(a, b, MinRes(tol=1e-10))
    least = np.linalg.norm(b - b @ np.linalg.pinv(a) @ a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(certificate.residual, least, rtol=1e-6)
    assert certificate.status == ["stalled", "stalled"]
    assert np.linalg.norm(u) < 1e4

    u, certificate, _ = run(a, b, Dense())
    np.testing.assert_allclose(u, b @ np.linalg.pinv(a), atol=1e-9)
    assert certificate.status == ["stalled", "stalled"]

    # Nearly consistent: the residual falls far, but restarting on what is left would only chase rounding.
    nearly = consistent + 1e-3 * b
    u, certificate, _ = run(a, nearly, MinRes(tol=1e-10, max_iter=1000))
    least = np.linalg.norm(nearly - nearly @ np.linalg.pinv(a) @ a, axis=1) / np.linalg.norm(nearly, axis=1)
    np.testing.assert_allclose(certificate.residual, least, rtol=1e-4)
    assert certificate.status == ["stalled", "stalled"]


@pytest.mark.parametrize("solver", [MinRes(tol=1e-12), MinRes(tol=1e-3), Dense()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_is_not_indefinite(solver, dtype):
    for seed in range(5):
        a = symmetric(np.concatenate([np.zeros(6), np.geomspace(0.1, 5, P - 6)]), seed)
        _, certificate, _ = run(a, right_hand_sides(4, seed=seed), solver, dtype)
        assert certificate.negative_curvature == [False] * 4


def test_squared_cg_when_the_right_hand_side_vanishes_under_h():
    u, certificate, _ = run(np.diag([1.0, 0.0]), np.array([[0.0, 2.0]]), SquaredCG())
    assert not u.any()
    assert (certificate.residual, certificate.residual_unsquared) == ([0.0], [1.0])


@over(SPECTRAL)
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_ritz_values_are_those_of_the_undamped_operator(case, damping):
    # Squaring hides the smallest eigenvalue from the right-hand side (Hb): only late residuals resolve it.
    _, certificate, _ = run(DEFINITE, right_hand_sides(2), _set(case.solver, damping=damping, tol=1e-14))
    power = case.passes
    np.testing.assert_allclose(certificate.smallest_ritz, 0.1**power, rtol=1e-5)
    np.testing.assert_allclose(certificate.largest_ritz, 10**power, rtol=1e-5)


@over(DAMPED)
@pytest.mark.parametrize("a", [DEFINITE, INDEFINITE, -DEFINITE], ids=["definite", "indefinite", "negative"])
def test_auto_damping_is_a_fraction_of_the_largest_eigenvalue(case, a):
    expected = 10.0**case.passes
    _, certificate, _ = run(a, right_hand_sides(), _set(_auto(case.solver), damping_fraction=0.25))
    assert certificate.largest_eigenvalue == pytest.approx(expected, rel=0.02)
    assert certificate.damping == pytest.approx(0.25 * certificate.largest_eigenvalue)
    square = " of H²" if case.passes == 2 else ""
    text = f"damping {certificate.damping:.3g} = 0.25 × the largest eigenvalue{square} "
    assert str(certificate).count(text) == 3


@over([case for case in DAMPED if case.spectrum])
def test_the_certificate_tells_which_share_of_the_right_hand_side_is_muted(case):
    eigenvalues = np.geomspace(0.1, 10, P) * np.where(np.arange(P) % 2, -1, 1) ** case.indefinite
    a, b = symmetric(eigenvalues), right_hand_sides()
    rhs = b @ a if case.passes == 2 else b
    values, basis = np.linalg.eigh(a)
    parts = (rhs @ basis) ** 2 / (rhs**2).sum(1, keepdims=True)
    damping = 0.55**case.passes
    _, certificate, _ = run(a, np.vstack([b, np.zeros(P)]), _set(case.solver, damping=damping, tol=1e-13))
    expected = parts[:, np.abs(values) ** case.passes < damping].sum(1)
    np.testing.assert_allclose(certificate.muted, [*expected, 0], atol=1e-6)
    muted = (
        f"; curvature below {damping:.2g} is muted: {certificate.muted[1]:.0%} of {'Hb' if case.passes == 2 else 'b'}"
    )
    assert str(certificate).splitlines()[1].endswith(muted)
    assert (run(a, b, _set(case.solver, damping=0.0))[1].muted) == [0.0] * 3


@over([case for case in KRYLOV if case.bounded])
def test_iterations_stay_within_the_bound(case):
    for a in (DEFINITE, symmetric(np.linspace(0, 1, 60)), symmetric(np.geomspace(1e-6, 1, 60))):
        for tol in (1e-1, 1e-3, 1e-6):
            solver = _set(_auto(case.solver), tol=tol, max_iter=10_000, damping_fraction=0.01)
            _, certificate, _ = run(a, right_hand_sides(2, len(a)), solver)
            assert all(certificate.converged)
            assert max(certificate.iterations) <= certificate.iteration_bound
            assert f"(at most {certificate.iteration_bound:,} iterations)" in str(certificate)
    assert run(DEFINITE, right_hand_sides(), case.solver)[1].iteration_bound is None  # λ is a number


@over(ALL)
def test_products_are_never_written_to(case):
    """An operator may keep the tensors it hands out, or hand out its argument."""

    class Remembering(Matrix):
        products = ()

        def matvec(self, v):
            product = super().matvec(v)
            self.products = (*self.products, (product, vectors.clone(product)))
            return product

    operator = Remembering(DEFINITE)
    for damping in (0.3, 0.0):
        solve(operator, operator.block(right_hand_sides()), _set(case.solver, damping=damping))
    for product, copy in operator.products:
        assert all(torch.equal(product[name], copy[name]) for name in copy)

    operator.matvec = lambda v: v
    b = operator.block(right_hand_sides())
    value = solve(operator, b, case.solver).value
    factor = 1.0 if type(case.solver) is Identity else 1.3
    np.testing.assert_allclose(vectors.flatten(value), right_hand_sides() / factor)
    np.testing.assert_array_equal(vectors.flatten(b), right_hand_sides())


@over(ALL)
def test_values_carry_no_graph_and_keep_their_names_shapes_and_dtype(case):
    operator = Matrix(DEFINITE, torch.float32)
    operator.matrix.requires_grad_()
    b = operator.block(right_hand_sides())
    shuffled = {name: b[name].requires_grad_() for name in reversed(list(b))}
    value = solve(operator, shuffled, case.solver).value
    assert list(value) == list(operator.parameters)
    assert all(value[name].shape == b[name].shape and value[name].dtype == torch.float32 for name in b)
    assert not any(t.requires_grad for t in value.values())


@over(KRYLOV)
def test_progress_is_told_once_an_iteration(case):
    calls = []
    _, certificate, _ = run(DEFINITE, right_hand_sides(), case.solver, progress=lambda *call: calls.append(call))
    assert [iteration for iteration, _ in calls] == list(range(1, max(certificate.iterations) + 1))
    assert calls[-1][1] <= case.solver.tol


@over(ALL)
def test_no_columns(case):
    u, certificate, _ = run(DEFINITE, np.zeros((0, P)), case.solver)
    assert u.shape == (0, P)
    assert certificate.converged == []


@over(ALL)
@pytest.mark.parametrize("a", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
def test_certificate_survives_json(case, a):
    _, certificate, _ = run(a, np.vstack([right_hand_sides(), np.zeros(P)]), case.solver)
    text = json.dumps(certificate.to_dict(), allow_nan=False)
    assert Certificate.from_dict(json.loads(text)) == certificate
    lines = str(certificate).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{certificate.solver}, column {q}: ") for q, line in enumerate(lines))


@over(ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(case, bad):
    operator = Matrix(DEFINITE)
    b = operator.block(right_hand_sides())
    b["bias"][1, 2] = bad
    with pytest.raises(ValueError, match="b holds NaN or inf in parameter 'bias'"):
        solve(operator, b, case.solver)
    if type(case.solver) is not Identity:
        operator = Matrix(DEFINITE)
        operator.matrix[0, 0] = bad
        with pytest.raises(ValueError, match=r"a product of the operator .* NaN or inf in parameter 'weight'"):
            solve(operator, operator.block(right_hand_sides()), case.solver)


def test_refuses_a_right_hand_side_from_another_space():
    operator = Matrix(DEFINITE)
    b = operator.block(right_hand_sides())
    for wrong, message in [
        ({name: t for name, t in b.items() if name != "bias"}, r"differ in \['bias'\]"),
        ({**b, "extra": b["bias"]}, r"differ in \['extra'\]"),
        ({**b, "bias": b["bias"][:2]}, r"b\['bias'\] has shape"),
        ({**b, "bias": b["bias"][0]}, r"b\['bias'\] has shape"),
        ({**b, "bias": b["bias"].float()}, r"b\['bias'\] has shape, dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            solve(operator, wrong, CG())
    with pytest.raises(ValueError, match="same parameters"):
        solve(operator, {}, CG())


@over(DAMPED)
@pytest.mark.parametrize(
    "settings",
    [
        {"damping": "automatic"},
        {"damping": -0.1},
        {"damping": float("nan")},
        {"damping": None},
        {"damping_fraction": 0.0},
        {"tol": -1e-3},
        {"tol": float("nan")},
        {"tol": "small"},
        {"max_iter": 0},
        {"max_iter": 2.5},
        {"max_parameters": 0},
        {"chunk": 0},
    ],
    ids=str,
)
def test_refuses_bad_settings(case, settings):
    (name,) = settings
    if hasattr(case.solver, name):
        with pytest.raises(ValueError, match=rf"{type(case.solver).__name__}\({name}=.*: expected a"):
            dataclasses.replace(case.solver, **settings)


@over(DAMPED)
def test_refuses_auto_damping_of_a_zero_operator(case):
    operator = Matrix(np.zeros((P, P)))
    with pytest.raises(ValueError, match="damping='auto' needs curvature, but the operator is zero"):
        solve(operator, operator.block(right_hand_sides()), _auto(case.solver))


def test_dense_refuses_what_is_too_large_or_not_symmetric():
    operator = Matrix(DEFINITE)
    with pytest.raises(ValueError, match=r"18 × 18 matrix; its limit is max_parameters=17: use CG or MinRes"):
        Dense(max_parameters=17).init(operator)
    operator.matrix[0, 1] += 1e-3
    with pytest.raises(ValueError, match="not symmetric"):
        Dense().init(operator)
    slightly = Matrix(DEFINITE, torch.float32)
    slightly.matrix[0, 1] *= 1 + 1e-6
    Dense().init(slightly)


def test_dense_symmetrises_rounding():
    a = DEFINITE.copy()
    a[0, 1] += 1e-8
    operator = Matrix(a)
    np.testing.assert_allclose(Dense().init(operator).eigenvalues, np.linalg.eigvalsh((a + a.T) / 2), rtol=1e-12)


# What a solver says of itself ---------------------------------------------------------------------------------------


@over(ALL)
@pytest.mark.parametrize("columns", [1, 3])
def test_products_are_bounded_as_the_solver_says(case, columns):
    for solver in {case.solver, _auto(case.solver), _set(case.solver, max_iter=4)}:
        _, _, operator = run(DEFINITE, right_hand_sides(columns), solver)
        bound = columns * solver.products(P, columns)
        assert sum(operator.widths) <= bound
        if getattr(solver, "max_iter", 4) == 4:
            early = MOST_STEPS if getattr(solver, "damping", None) == "auto" else 0  # the estimate settled before
            assert bound - sum(operator.widths) <= max(columns, 4) + early


def test_facts():
    names = ("vectors_held", "state_vectors", "shardable", "damped")
    facts = {name_of(case): tuple(getattr(case.solver, name) for name in names) for case in ALL}
    assert facts == {
        "CG": (5, 0, True, True),
        "CG-Nystrom": (6, 13, True, True),
        "BlockCG": (7, 0, True, True),
        "BlockCG-Nystrom": (8, 13, True, True),
        "SquaredCG": (6, 0, True, True),
        "MinRes": (12, 0, True, True),
        "Dense": (2, 0, False, True),
        "Identity": (1, 0, False, False),
        "Richardson": (5, 0, True, False),
    }
    assert {name_of(case): case.solver.extra_bytes(10) for case in ALL if case.solver.extra_bytes(10)} == {
        "Dense": 1600
    }


class Plain:
    """A solver that derives from nothing."""

    vectors_held, max_iter = 3, 7

    def init(self, operator):
        return "state"

    def compute(self, operator, b, state, progress, checkpoint):
        assert state == "state"
        residual = operator.norm(vectors.add(b, operator.matvec(b), -1.0)) / operator.norm(b)
        return Solution(b, Certificate.from_residual("plain", 0.0, 0.0, residual, operator.counts))


def test_an_object_with_init_and_compute_is_a_solver():
    u, certificate, _ = run(2 * np.eye(P), right_hand_sides(), Plain())
    np.testing.assert_array_equal(u, right_hand_sides())
    assert (certificate.residual, certificate.status) == ([1.0] * 3, ["max_iter"] * 3)
    plain = Plain()
    solver = as_solver(plain)
    assert (solver.vectors_held, solver.shardable, solver.damped, solver.products(P, 2)) == (3, False, False, 8)
    assert solver == as_solver(plain) != as_solver(Plain())
    assert repr(solver) == repr(plain)
    assert as_solver(solver) is solver


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stage_takes_such_an_object(sharded):
    stage = Stage("only", toy(0), ToyObjective(), toy_rows(1, 5), solver=Plain())
    chain = MultiStageInfluence([stage], progress=False, sharded=sharded)
    with pytest.warns(UserWarning, match=r"stage 'only': not solved to tolerance. plain, column 0: stopped at 0 iter"):
        query = chain.query(toy_rows(2, 2))
    assert query.certificates["only"].solver == "plain"
    assert query.certificates["only"].matvecs == [1, 1]


@pytest.mark.parametrize("solver", ["cg", None, CG, Matrix(np.eye(P))], ids=["name", "none", "class", "operator"])
def test_refuses_what_is_no_solver(solver):
    with pytest.raises(ValueError, match=r"^solver is .*; expected a solver such as hf_msif.solvers.CG\(\)"):
        as_solver(solver)


def test_refuses_a_solver_that_says_too_little():
    class Silent(Solver):
        pass

    with pytest.raises(ValueError, match=r"does not say how many products.*expected a setting max_iter, or a method"):
        Silent().products(P, 1)
    with pytest.raises(NotImplementedError, match="Silent defines no compute"):
        run(DEFINITE, right_hand_sides(), Silent())

    @dataclass
    class Mutable(Solver):
        damping: float = 0.0

    with pytest.raises(ValueError, match="is not hashable; expected a frozen dataclass"):
        as_solver(Mutable())


# Solves that are interrupted ----------------------------------------------------------------------------------------


class Interrupted(Exception):  # noqa: N818
    pass


class Memory:
    """A checkpoint in memory, due after every step, which fails after `saves` saves."""

    def __init__(self, saves):
        self.saves, self.saved = saves, None

    def due(self):
        return True

    def save(self, blocks, tensors, facts):
        self.saved = (
            {name: vectors.clone(block) for name, block in blocks.items()},
            {name: t.clone() for name, t in tensors.items()},
            json.loads(json.dumps(facts)),
        )
        self.saves -= 1
        if self.saves == 0:
            raise Interrupted

    def load(self):
        return self.saved


@over(KRYLOV)
def test_an_interrupted_solve_continues(case):
    solver = _set(case.solver, tol=1e-8)
    state = solver.init(Matrix(DEFINITE))
    b = np.vstack([right_hand_sides(), np.zeros(P)])
    expected, complete, whole = run(DEFINITE, b, solver, state=state)
    checkpoint, widths = Memory(2), []
    for again in (2, 0):
        operator = Matrix(DEFINITE)
        with pytest.raises(Interrupted):
            solve(operator, operator.block(b), solver, state, checkpoint=checkpoint)
        widths += operator.widths
        checkpoint.saves = again
    u, certificate, last = run(DEFINITE, b, solver, state=state, checkpoint=checkpoint)
    np.testing.assert_array_equal(u, expected)
    assert certificate == complete
    repeated = [3] * (2 * (case.passes - 1))  # Hb of the squared system
    assert sum(widths + last.widths) == sum(whole.widths + repeated)


# Vectors in shards --------------------------------------------------------------------------------------------------


class Shards:
    """Two halves of a matrix's vectors in two threads, which exchange what two processes would."""

    def __init__(self, a):
        self.matrix, self.barrier, self.slots = torch.tensor(a), threading.Barrier(2, timeout=60), [None, None]

    def run(self, work):
        """work(operator) in both threads."""

        def guarded(rank):
            try:
                return work(Half(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(guarded, range(2)))

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class Half:
    def __init__(self, shards, rank):
        self.shards, self.rank, self.dimension = shards, rank, P
        self.parameters = {"shard": torch.zeros(P // 2, dtype=torch.float64)}

    def cut(self, rows):
        return {"shard": torch.as_tensor(rows)[:, self.rank * P // 2 : (self.rank + 1) * P // 2].clone()}

    def matvec(self, v):
        return self.cut(torch.cat(self.shards.exchange(self.rank, v["shard"]), 1) @ self.shards.matrix)

    def sum_over_processes(self, values):
        return sum(self.shards.exchange(self.rank, values))

    def dot(self, x, y):
        return self.sum_over_processes(vectors.dot(x, y))

    def gram(self, x, y):
        return self.sum_over_processes(vectors.gram(x, y))

    def rademacher(self, seed):
        whole = vectors.rademacher({n: torch.zeros(s).double() for n, s in SHAPES.items()}, 1, seed)
        return self.cut(vectors.flatten(whole))


@over([case for case in ALL if case.solver.shardable])
def test_the_operator_owns_the_inner_product(case):
    """With its vectors in shards a solver takes the same steps, though `vectors.dot` sees one shard."""
    a, b = symmetric(np.geomspace(1, 4, P)), right_hand_sides()
    for solver in (_set(case.solver, tol=1e-4), _set(_auto(case.solver), tol=1e-4)):
        expected, complete, _ = run(a, b, solver)
        halves = Shards(a).run(lambda half, solver=solver: solve(half, half.cut(b), solver))
        u = np.concatenate([half.value["shard"] for half in halves], axis=1)
        np.testing.assert_allclose(u, expected, rtol=1e-8, atol=1e-10)
        for half in halves:
            assert half.certificate == halves[0].certificate
            assert half.certificate.iterations == complete.iterations
            assert half.certificate.damping == pytest.approx(complete.damping)
            np.testing.assert_allclose(half.certificate.residual, complete.residual, rtol=1e-6, atol=1e-12)


def test_all_processes_refuse_what_is_not_finite_in_one():
    b = right_hand_sides()
    b[1, -1] = np.nan

    def refused(half):
        with pytest.raises(ValueError, match="b holds NaN or inf in parameter 'shard'"):
            solve(half, half.cut(b), CG())
        return True

    assert Shards(DEFINITE).run(refused) == [True, True]
