"""Vectors, roles, batches and parts on inputs that hypothesis makes up."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.scorables import scorable

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hf_msif import InputError, vectors  # noqa: E402
from hf_msif.adapters.split import split  # noqa: E402
from hf_msif.engine.batching import deal_batches, deal_equal  # noqa: E402
from hf_msif.engine.files import flat_keys, load_tensors, nested_keys, save_tensors  # noqa: E402
from hf_msif.scoring import on_disk  # noqa: E402
from hf_msif.scoring.scorer import score  # noqa: E402

settings.register_profile("suite", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("suite")

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=6), st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4
)


@st.composite
def blocks(draw, number=2):
    """Several blocks of the same names and shapes, in float64."""
    shapes, columns = draw(SHAPES), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = {name: (columns, *sizes) for name, sizes in shapes.items()}
    return [
        {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shape.items()}
        for _ in range(number)
    ]


def as_matrix(x):
    """(Q, P) by NumPy alone."""
    return np.concatenate([t.numpy().reshape(len(t), -1) for t in x.values()], axis=1)


@given(blocks(), st.floats(-3, 3))
def test_algebra_on_blocks_is_that_of_matrices(pair, factor):
    x, y = pair
    a, b = map(as_matrix, pair)
    np.testing.assert_allclose(vectors.flatten(x), a, rtol=1e-14)
    np.testing.assert_allclose(vectors.dot(x, y), (a * b).sum(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(vectors.gram(x, y), a @ b.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(vectors.flatten(vectors.add(x, y, factor)), a + factor * b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(vectors.flatten(vectors.scale(x, factor)), factor * a, rtol=1e-14)
    back = vectors.unflatten(vectors.flatten(x), x)
    assert list(back) == list(x)
    assert all(torch.equal(back[name], x[name]) for name in x)


@given(blocks(number=1))
def test_tensors_come_back_from_a_file_as_they_were(one):
    (x,) = one
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(flat_keys({"u": x}), Path(folder) / "x.safetensors", {"step": 1})
        tensors, metadata = load_tensors(Path(folder) / "x.safetensors")
    assert metadata == {"step": 1}
    back = nested_keys(tensors)["u"]
    assert list(back) == list(x)
    assert all(torch.equal(back[name], x[name]) for name in x)


COSTS = st.lists(st.floats(0, 1e6), max_size=60)


@given(COSTS, st.integers(1, 9), st.integers(1, 5))
def test_each_row_is_in_one_batch_of_one_process(costs, size, processes):
    shares = deal_batches(costs, size, processes)
    assert len(shares) == processes
    batches = [batch for share in shares for batch in share]
    assert sorted(row for batch in batches for row in batch) == list(range(len(costs)))
    assert all(0 < len(batch) <= size for batch in batches)
    fewest = -(-len(costs) // (size * processes))
    assert len(batches) <= (fewest + 1) * processes


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100)), max_size=60), st.integers(1, 9), st.integers(1, 5))
def test_rows_of_a_batch_have_one_shape(rows, size, processes):
    shapes = [shape for shape, _ in rows]
    batches = [b for share in deal_equal(shapes, [cost for _, cost in rows], size, processes) for b in share]
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    assert all(len({shapes[row] for row in batch}) == 1 and len(batch) <= size for batch in batches)
    fewest = sum(-(-count // size) for count in Counter(shapes).values())
    assert len(batches) == fewest


@pytest.fixture(scope="module")
def pair():
    before = tiny.model("bert", "masked")
    return before, tiny.finetuned(before, "bert")


@settings(max_examples=25)
@given(data=st.data())
def test_every_tensor_has_one_role(pair, data):
    before, model = pair
    names = [name for name, _ in model.named_parameters()]
    chosen = data.draw(
        st.one_of(st.sampled_from(["all", "head"]), st.lists(st.sampled_from(names), min_size=1, unique=True))
    )
    roles = split("second", model, before, chosen)
    groups = [roles.frozen, roles.proximal, roles.head, tuple(roles.left_out)]
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert set(roles.trained) == set(roles.proximal) | set(roles.head)
    if isinstance(chosen, list):
        assert set(roles.trained) == set(chosen)
    with pytest.raises(InputError, match="nowhere"):
        split("second", model, before, ["nowhere.*"])


class StoppedError(InputError):
    pass


@settings(max_examples=25)
@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=20),
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), max_size=3),
)
def test_interrupted_anywhere_parts_are_the_whole(numbers, part_rows, stops):
    """However often a scoring is stopped after some parts, and whatever its batches, its file is that of one pass."""
    rows = [{"example_id": i, "text": f"row {i}", "x": x} for i, x in enumerate(numbers)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        question = scorable(identity=lambda: {"seed": 0})
        write = on_disk.write_frame
        for after, batch_size in [*stops, (None, 3)]:
            left = [after]

            def stopping(*arguments, left=left):
                if left[0] is not None:
                    left[0] -= 1
                    if left[0] < 0:
                        raise StoppedError
                write(*arguments)

            patch.setattr(on_disk, "write_frame", stopping)
            try:
                scores = score(question, rows, batch_size, output_dir=folder, resume=True, part_rows=part_rows)
            except StoppedError:
                continue
            np.testing.assert_array_equal(scores.influence(0), numbers)
            np.testing.assert_array_equal(scores.influence(1), np.square(numbers))
            assert scores.frame["example_id"].tolist() == list(range(len(numbers)))
            break
        assert not (Path(folder) / "scores-toy.parts").exists()
