"""The parts of benchmarks/peers that need no peer: its cases, and what its tables make of results."""

import doctest
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.scripts import imported_from
from scipy.stats import spearmanr

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def peers():
    with imported_from(FOLDER) as import_module:
        yield import_module


def test_every_case_has_a_file_of_its_own(peers):
    measurements = peers("measurements")
    for sizes in (measurements.Sizes(), measurements.SMALL):
        made = [
            *measurements.scoring(sizes),
            *measurements.fitting(sizes),
            *measurements.solving(sizes),
            *measurements.quality(sizes, 1.0),
        ]
        assert len({case.key for case in made}) == len(made)
        assert {case.library for case in made} == set(measurements.LIBRARIES)
        assert all(case.settings != other.settings for case in made for other in made if case is not other)


def test_the_examples_of_the_tables_are_true(peers):
    found = doctest.testmod(peers("tables"))
    assert found.attempted >= 4
    assert not found.failed


def test_agreement_with_itself_with_noise_and_with_retraining(peers):
    tables, generator = peers("tables"), np.random.default_rng(0)
    exact = {name: generator.standard_normal((40, 3)) for name in ("gauss_newton", "hessian")}
    omissions = np.array([generator.choice(40, 4, replace=False) for _ in range(12)])
    effects = exact["gauss_newton"][omissions].sum(1)
    scores = 7 * exact["gauss_newton"]
    found = tables.agreement(scores, exact, omissions, effects)
    assert found["spearman_gauss_newton"] == pytest.approx(1)
    assert found["overlap_gauss_newton"] == 1
    assert found["lds"] == pytest.approx(1)
    expected = [spearmanr(x, y).statistic for x, y in zip(scores.T, exact["hessian"].T, strict=True)]
    assert found["spearman_hessian"] == pytest.approx(np.mean(expected))
    assert tables.spearman(np.ones((5, 1)), np.arange(5.0)[:, None]) == 0


def test_tables_have_medians_ratios_and_reasons(peers):
    measurements, tables = peers("measurements"), peers("tables")
    rows = []
    for case in measurements.scoring(measurements.SMALL) + measurements.fitting(measurements.SMALL):
        for repeat, seconds in enumerate((30.0, 10.0, 20.0)):
            result = {"seconds": seconds, "forward_seconds": 10.0, "peak_bytes": 2**30, "parameters": 123_456}
            if case.library == "dattri":
                result = {"error": "UnboundLocalError: a_prev"}
            rows.append(tables.row_of(vars(case), repeat, result))
    frame = pd.DataFrame(rows)
    summary = tables.medians(frame)
    assert len(summary) == len(frame) // 3
    measured = summary[summary["error"] == ""]
    assert set(measured["ratio"]) == {2.0}
    assert set(measured["smallest"]) == {1.0}
    assert set(measured["largest"]) == {3.0}
    text = tables.markdown(frame, {"cpu": "a processor", "cores": 2, "packages": "torch 2"})
    assert "2.00 (1.00–3.00)" in text
    assert "UnboundLocalError: a_prev" in text
    assert text.count("\n| dattri") == 1 + 2  # one line of scores, one fit per vocabulary


def test_a_reason_fits_into_a_line(peers):
    reason = peers("worker").reason
    refused = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes. Error")
    assert reason(refused, 2**31) == "needs more than 2 GiB: a tensor of 3.0 GiB was refused"
    assert reason(ValueError("two\nlines"), 1) == "ValueError: two lines"


def test_the_environment_of_a_peer_is_not_that_of_hf_msif(peers):
    environments = peers("environments")
    assert environments.python_of("hf_msif") == Path(sys.executable)
    assert len({environments.python_of(name) for name in environments.PEERS}) == len(environments.PEERS)
