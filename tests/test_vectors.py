"""Block algebra against NumPy, and the files that `save_tensors` writes."""

import numpy as np
import pytest
import torch

from hf_msif import vectors
from hf_msif.engine.files import load_tensors, save_tensors


def block(q=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (2, 3), "bias": (4,), "temperature": ()}
    return {
        name: torch.randn(q, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def matrix(x):
    return np.concatenate(
        [t.double().numpy().reshape(t.shape[0], int(np.prod(t.shape[1:]))) for t in x.values()], axis=1
    )


def equal(x, y):
    return list(x) == list(y) and all(torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x)


def test_sizes():
    assert vectors.columns(block()) == 3
    assert vectors.numel(block()) == vectors.numel(block(0)) == 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dot_and_norm(dtype):
    x, y = block(dtype=dtype), block(seed=1, dtype=dtype)
    assert vectors.dot(x, y).dtype == torch.float64
    np.testing.assert_allclose(vectors.dot(x, y), (matrix(x) * matrix(y)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(vectors.norm(x), np.linalg.norm(matrix(x), axis=1), rtol=1e-12)


def test_dot_is_accumulated_in_float64():
    # 1e8 swallows ones in float32: 1e8 + 1 - 1e8 = 0.
    x = {"w": torch.tensor([[1e8, 1.0, -1e8]]), "v": torch.tensor([[1.0]])}
    ones = {name: torch.ones_like(t) for name, t in x.items()}
    assert vectors.dot(x, ones).item() == 2.0
    # 2²⁴ + 1 is no float32.
    x = {"big": torch.tensor([[2.0**12]]), "one": torch.tensor([[1.0]])}
    assert vectors.dot(x, x).item() == 2**24 + 1


def test_linear_combinations():
    x, y, by = block(), block(seed=1), torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    np.testing.assert_allclose(matrix(vectors.add(x, y, by)), matrix(x) + by.numpy()[:, None] * matrix(y))
    np.testing.assert_allclose(matrix(vectors.add(x, y, -0.5)), matrix(x) - 0.5 * matrix(y))
    np.testing.assert_allclose(matrix(vectors.scale(x, by)), by.numpy()[:, None] * matrix(x))
    assert equal(x, block())
    same = vectors.add_(x, y, by)
    assert same is x
    assert equal(x, vectors.add(block(), y, by))


def test_columns_are_picked_and_put_back():
    x, y = block(), block(seed=1)
    index = torch.tensor([2, 0])
    taken = vectors.take(x, index)
    assert equal(taken, vectors.stack([vectors.column(x, 2), vectors.column(x, 0)]))
    assert equal(taken, {name: t[[2, 0]] for name, t in x.items()})
    vectors.put_(y, index, taken)
    assert equal(y, vectors.where(torch.tensor([True, False, True]), x, block(seed=1)))
    vectors.add_(taken, taken)
    assert equal(x, block())  # `take` copies
    mask = torch.tensor([False, True, False])
    assert equal(vectors.take(x, mask), {name: t[1:2] for name, t in x.items()})


def test_select_clone_and_zeros():
    x = block()
    assert list(vectors.select(x, ["bias", "weight"])) == ["bias", "weight"]
    copy = vectors.clone(x)
    vectors.add_(copy, x)
    assert equal(x, block())
    assert not matrix(vectors.zeros_like(x)).any()


@pytest.mark.parametrize("q", [0, 1, 3])
def test_flatten_and_unflatten_are_inverse(q):
    x = block(q)
    flat = vectors.flatten(x)
    assert flat.shape == (q, 11)
    np.testing.assert_array_equal(flat, matrix(x))
    assert equal(vectors.unflatten(flat, block(2)), x)
    narrow = vectors.unflatten(flat, block(2, dtype=torch.float32))
    assert all(t.dtype == torch.float32 for t in narrow.values())


def test_rademacher():
    parameters = vectors.column(block(dtype=torch.float32), 0)
    x = vectors.rademacher(parameters, columns=500, seed=3)
    assert {t.dtype for t in x.values()} == {torch.float32}
    assert x["weight"].shape == (500, 2, 3)
    assert x["temperature"].shape == (500,)
    assert set(matrix(x).ravel()) == {-1.0, 1.0}
    assert abs(matrix(x).mean()) < 0.05
    state = torch.get_rng_state()
    assert equal(x, vectors.rademacher(parameters, columns=500, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not equal(x, vectors.rademacher(parameters, columns=500, seed=4))
    wide = vectors.rademacher({name: p.double() for name, p in parameters.items()}, columns=500, seed=3)
    np.testing.assert_array_equal(matrix(wide), matrix(x))  # the same signs in any dtype


def test_save_and_load(tmp_path):
    path = tmp_path / "query.safetensors"
    metadata = {"n": 3, "settings": {"tol": 1e-3, "names": ["ä", None]}}
    x = block() | {"half": torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)}
    save_tensors(x, path, metadata)
    y, loaded = load_tensors(path)
    assert loaded == metadata
    assert equal(x, y)  # in the order they were saved in
    save_tensors(vectors.take(block(), torch.tensor([1])), path)  # overwrites
    y, loaded = load_tensors(str(path))
    assert loaded == {}
    assert equal(y, vectors.take(block(), torch.tensor([1])))
    assert [p.name for p in tmp_path.iterdir()] == ["query.safetensors"]


def test_views_of_one_tensor_can_be_saved(tmp_path):
    x = vectors.unflatten(torch.arange(11.0)[None], block(1, dtype=torch.float32))
    save_tensors(x, tmp_path / "x")
    assert equal(load_tensors(tmp_path / "x")[0], x)
    save_tensors(vectors.column(block(), 1), tmp_path / "x")
    assert equal(load_tensors(tmp_path / "x")[0], vectors.column(block(), 1))


def test_a_crash_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(block(), path)

    def crash(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(block(seed=1), path)
    assert equal(load_tensors(path)[0], block())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_loads_files_of_other_tools(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "x")
    tensors, metadata = load_tensors(tmp_path / "x")
    assert (tensors["w"].tolist(), metadata) == ([1.0, 1.0], {})
