"""Settings of every test."""

import pytest
import torch

# A failed assertion in a helper shows its values, as one in a test does.
pytest.register_assert_rewrite("helpers", "cases")

# Threads cost such small tensors more time than they save: minutes, on a busy machine, where they wait for each other.
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
