"""f(A) b by Lanczos against dense eigendecompositions."""

import pytest
import torch

from hf_msif import InputError
from hf_msif.solvers.matrix_functions import apply_functions

SIZE = 40


class Matrix:
    """A symmetric matrix with given eigenvalues."""

    def __init__(self, eigenvalues, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())
        self.eigenvalues, self.basis = torch.as_tensor(eigenvalues, dtype=torch.float64), basis
        self.matrix = ((basis * self.eigenvalues) @ basis.T).to(dtype)
        self.parameters = {"w": torch.zeros(len(eigenvalues), dtype=dtype)}
        self.products = 0

    def matvec(self, v):
        self.products += len(v["w"])
        return {"w": v["w"] @ self.matrix}

    def function(self, v, f):
        return (v.double() @ self.basis * f(self.eigenvalues)) @ self.basis.T


def block(columns=3, dtype=torch.float64):
    return {"w": torch.randn(columns, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)}


def both(values, columns):
    """e^{−2σ}, and (1 − e^{−2σ})/σ."""
    return torch.stack([torch.exp(-2 * values), -torch.expm1(-2 * values) / values], 1)


@pytest.mark.parametrize(
    "eigenvalues", [torch.linspace(0.01, 25, SIZE), torch.linspace(-0.3, 4, SIZE)], ids=["positive", "indefinite"]
)
def test_two_functions_of_one_krylov_space(eigenvalues):
    operator, b = Matrix(eigenvalues), block()
    (decay, response), report = apply_functions(operator, b, both, 1e-11, SIZE)
    for found, f in ((decay, lambda x: torch.exp(-2 * x)), (response, lambda x: -torch.expm1(-2 * x) / x)):
        expected = operator.function(b["w"], f)
        assert (found["w"] - expected).norm() < 1e-9 * expected.norm()
    assert max(report.error) <= 1e-11
    assert min(report.smallest_ritz) >= eigenvalues[0] - 1e-9
    assert max(report.largest_ritz) <= eigenvalues[-1] + 1e-9


def test_columns_end_on_their_own():
    """One that is zero, one in an invariant space of three dimensions, one that needs more, each as if alone."""
    operator, b = Matrix(torch.linspace(0.01, 25, SIZE)), block()
    b["w"][0] = 0
    b["w"][1] = operator.basis[:, [3, 17, 30]].sum(1)
    (decay, _), report = apply_functions(operator, b, both, 1e-10, SIZE)
    assert report.iterations[0] == 0
    assert 3 <= report.iterations[1] <= 5 < report.iterations[2] / 2  # two checks, where rounding hides the end
    assert operator.products == sum(report.iterations)
    assert not decay["w"][0].any()
    for q in (1, 2):
        alone, _ = apply_functions(operator, {"w": b["w"][q : q + 1]}, both, 1e-10, SIZE)
        torch.testing.assert_close(alone[0]["w"][0], decay["w"][q], rtol=1e-9, atol=1e-12)


def test_what_is_not_settled_is_reported():
    _, report = apply_functions(Matrix(torch.linspace(0.01, 25, SIZE)), block(), both, 1e-10, 4)
    assert report.iterations == [4] * 3
    assert min(report.error) > 1e-10


def test_a_small_column_of_a_group_is_measured_by_the_largest():
    operator, b = Matrix(torch.linspace(0.01, 25, SIZE)), block(2)
    b["w"][1] *= 1e-9
    apart = apply_functions(operator, b, both, 1e-6, SIZE)[1].iterations
    together = apply_functions(operator, b, both, 1e-6, SIZE, groups=[0, 0])[1].iterations
    assert together[0] == apart[0]
    assert together[1] < apart[1] / 2


def test_float32_keeps_its_vectors_orthogonal():
    """Without orthogonalisation the largest eigenvalues come again and again, and the small ones late."""
    eigenvalues = torch.cat([torch.linspace(0.01, 1, SIZE - 2), torch.tensor([1e3, 2e3])])
    operator, b = Matrix(eigenvalues, torch.float32), block(dtype=torch.float32)
    (decay, _), report = apply_functions(operator, b, both, 1e-5, SIZE)
    expected = operator.function(b["w"], lambda x: torch.exp(-2 * x))
    assert (decay["w"].double() - expected).norm() < 1e-4 * expected.norm()
    assert max(report.iterations) < 20


def test_what_is_not_finite_is_refused():
    with pytest.raises(InputError, match="holds NaN or inf"):
        apply_functions(Matrix(torch.full((SIZE,), torch.inf)), block(), both, 1e-3, 5)
