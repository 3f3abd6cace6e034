"""The example of a user's own solver, run as a script: it converges, and agrees with CG."""

import re
import runpy
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "own_solver.py"


def test_own_solver(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) == 6
    for name, certificate in (("neumann", lines[:2]), ("cg", lines[3:5])):
        for q, line in enumerate(certificate):
            assert re.match(rf"{name}, column {q}: converged in \d+ iterations; residual \d\.\de-04 ", line), line
    neumann, cg = (np.fromstring(lines[i].strip("[]"), sep=" ") for i in (2, 5))
    assert neumann.shape == (3,)
    np.testing.assert_allclose(neumann, cg, rtol=2e-3)
    assert len(SCRIPT.read_text().splitlines()) <= 40
