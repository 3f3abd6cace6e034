"""Diagonal operators with spectra of the shapes that curvatures have, fast enough for thousands of eigenvalues."""

import numpy as np
import torch

from hf_msif import vectors

SIZE = 2000
RANDOM = np.random.default_rng(0)
POSITIONS = np.arange(1, SIZE + 1)
SPECTRA = {
    "power 0.7": POSITIONS**-0.7,
    "power 1": POSITIONS**-1.0,
    "power 1.5": POSITIONS**-1.5,
    "power 2": POSITIONS**-2.0,
    "clusters": np.repeat([1.0, 0.05, 5e-4], [20, 200, SIZE - 220]) * (1 + 0.1 * RANDOM.random(SIZE)),
    "flat with outliers": np.concatenate([np.geomspace(0.05, 1, 12), 3e-4 * RANDOM.random(SIZE - 12)]),
    "outliers on a slope": np.concatenate([np.geomspace(0.05, 1, 12), 3e-3 * RANDOM.random(SIZE - 12)]),
    "uniform": POSITIONS / SIZE,
    "geometric": np.geomspace(1e-6, 1, SIZE),
    "exponential": np.exp(-POSITIONS / 40),
}


class Diagonal:
    """A = diag(eigenvalues), in two parameters; it remembers how many columns each product had."""

    def __init__(self, eigenvalues, dtype=torch.float64):
        first, second = np.array_split(eigenvalues, 2)
        self.eigenvalues = {"a": torch.tensor(first, dtype=dtype), "b": torch.tensor(second, dtype=dtype)}
        self.parameters = {name: torch.zeros_like(t) for name, t in self.eigenvalues.items()}
        self.widths = []

    def matvec(self, v):
        self.widths.append(vectors.columns(v))
        return {name: t * self.eigenvalues[name] for name, t in v.items()}

    def block(self, b):
        return vectors.unflatten(torch.as_tensor(b), vectors.stack([self.parameters]))


def gradients(eigenvalues, columns, seed=0, shared=1.0):
    """Right-hand sides as gradients have them: large where curvature is large, with a common part."""
    random = np.random.default_rng(seed)
    own, common = random.standard_normal((columns, len(eigenvalues))), random.standard_normal(len(eigenvalues))
    return (own + shared * common) * np.sqrt(eigenvalues)
