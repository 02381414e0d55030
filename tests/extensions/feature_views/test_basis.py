import numpy as np
import pytest
import torch
from mistakes import refusals
from safetensors.torch import save_file

from dinoseg.extensions.feature_views.basis import Basis, Moments, Projections
from dinoseg.extensions.feature_views.drawing import enlarge, to_bytes

INFO = {"backbone": "tiny", "layer": 3}


def drawn(seed, *, width=12, count=4, offset=100.0):
    """Return the features (h, w, C) of images of several sizes, far from 0, whose variances differ by channel."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(3, 0.01, width) * rng.uniform(0.8, 1.2, width)
    mixing = np.linalg.qr(rng.standard_normal((width, width)))[0]
    sizes = rng.integers(1, 9, (count, 2))
    return [(rng.standard_normal((*size, width)) * scales) @ mixing + offset for size in sizes]


def svd_of(images):
    """Return mean, variances and components of all patches by NumPy's SVD, with the sign rule as a plain loop."""
    flat = np.concatenate([image.reshape(-1, image.shape[-1]) for image in images])
    _, singular, rows = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for row in rows:
        if max(row, key=abs) < 0:
            row *= -1
    return flat.mean(0), singular**2 / len(flat), rows


def sum_of(images):
    total = Moments()
    for image in images:
        total += Moments.of(image)
    return total


@pytest.mark.parametrize("seed", range(12))
def test_components_equal_the_svd_in_any_split(seed):
    images = drawn(seed, count=30)
    mean, variances, rows = svd_of(images)
    for parts in (images, images[::-1]):
        halves = sum_of(parts[:7]) + sum_of(parts[7:])  # as two ranks would add them
        assert halves.count == sum(len(image) * image.shape[1] for image in images)
        found, axes = halves.principal_axes()
        np.testing.assert_allclose(halves.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(found, variances, rtol=1e-10)
        np.testing.assert_allclose(axes, rows, atol=1e-10)


def test_one_patch_has_no_variance_and_is_drawn_grey():
    basis = Basis.fit(Moments.of(np.ones((1, 1, 4))), [1, 2, 3], INFO)
    assert basis.shares.tolist() == [0, 0, 0, 0] and basis.effective_rank == 1
    assert (basis.colours(basis.project(np.ones((1, 1, 4)))) == 0.5).all()


def test_effective_rank_counts_equal_variances():
    corners = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 3, 0], [0, -3, 0]])
    basis = Basis.fit(Moments.of(corners), [2], INFO)
    assert basis.shares == pytest.approx([0.5, 0.5, 0]) and basis.effective_rank == pytest.approx(2)


@pytest.mark.parametrize("values", ["normal", "ties", "signs", "one"])
def test_quantiles_equal_those_of_numpy(tmp_path, monkeypatch, values):
    rng = np.random.default_rng(3)
    drawn = {
        "normal": rng.standard_normal((1003, 4)) * [1e-30, 1, 1e5, 1e30],
        "ties": rng.integers(-1, 2, (517, 2)),
        "signs": np.array([[0.0, -0.0], [-0.0, 1e-45], [1.0, -1e-45], [-1.0, 0.0]]),
        "one": np.array([[7.5, -2.0]]),
    }[values].astype(np.float32)
    monkeypatch.setattr("dinoseg.extensions.feature_views.basis.ROWS", 100)
    with Projections(tmp_path, drawn.shape[1]) as projections:
        projections.add(np.full((5, drawn.shape[1]), 99))
        projections.cut(0)
        for part in np.array_split(drawn, 3):
            projections.add(part)
        shares = (0, 0.01, 0.37, 0.5, 0.99, 1)
        expected = np.quantile(drawn.astype(np.float64), shares, axis=0)
        np.testing.assert_array_equal(projections.quantiles(*shares), expected)
        projections.rewind()
        np.testing.assert_array_equal(projections.read(2), drawn[:2])
        assert len(projections.read(10_000)) == max(len(drawn) - 2, 0)


def test_colours_span_the_range_of_each_component():
    mean, directions = np.zeros(2), np.eye(2)[[0, 0, 1]]
    basis = Basis(mean, directions, np.array([0, 0, -2.0]), np.array([1, 1, 2.0]), np.ones(2), {"components": [1, 2]})
    projected = basis.project(np.array([[0.25, 1.0], [9, -9]]))
    assert basis.colours(projected).tolist() == [[0.25, 0.75], [1, 0]]
    assert to_bytes(basis.colours(projected)[None]).tolist() == [[[64, 191, 0], [255, 0, 0]]]
    assert to_bytes(np.full((1, 1, 1), 0.2)).tolist() == [[[51, 51, 51]]]


@pytest.mark.parametrize(
    ("size", "seen"), [((7, 5), (7, 5)), ((13, 40), (26, 33)), ((1, 1), (3, 9)), ((64, 3), (8, 8))]
)
def test_pixels_have_the_values_of_their_patches(size, seen):
    patch, grid = 4, [-(-side // 4) for side in seen]
    values = np.arange(np.prod(grid), dtype=float).reshape(*grid, 1)
    found = enlarge(values, size, seen, patch)
    for row in range(size[0]):
        for column in range(size[1]):
            place = [int((at + 0.5) * b / a / patch) for at, a, b in zip((row, column), size, seen, strict=True)]
            assert found[row, column] == values[tuple(place)]
    smooth = enlarge(values, size, seen, patch, "bilinear")
    assert smooth.shape == (*size, 1) and values.min() <= smooth.min() <= smooth.max() <= values.max()


def saved(tmp_path="."):
    basis = Basis.fit(sum_of(drawn(0)), [1, 2], INFO)
    basis.low, basis.high = np.arange(3.0), np.arange(3.0) + 1
    basis.save(f"{tmp_path}/basis.safetensors")
    return basis


def test_a_saved_basis_is_read_equal(tmp_path):
    basis = saved(tmp_path)
    again = Basis.load(tmp_path / "basis.safetensors", INFO)
    assert again.info == basis.info == {**INFO, "components": [1, 2]}
    for name in ("mean", "directions", "low", "high", "eigenvalues"):
        np.testing.assert_array_equal(getattr(again, name), getattr(basis, name))


def load_changed(**changes):
    def act():
        basis = saved()
        for name, value in changes.items():
            setattr(basis, name, value)
        basis.save("basis.safetensors")
        Basis.load("basis.safetensors", INFO)

    return act


def load_text():
    with open("basis.safetensors", "w", encoding="utf-8") as file:
        file.write("no tensors")
    Basis.load("basis.safetensors", INFO)


def load_half():
    tensors = {name: torch.zeros(2, dtype=torch.bfloat16) for name in ("mean", "directions", "low", "high")}
    save_file(
        tensors | {"eigenvalues": torch.zeros(2)}, "basis.safetensors", {"dinoseg.features": '{"components": [1]}'}
    )
    Basis.load("basis.safetensors", INFO)


test_bases_that_do_not_fit_are_refused = refusals(
    {
        "more components than channels": (
            lambda: Basis.fit(sum_of(drawn(0)), [1, 13], INFO),
            "components=[1, 13]",
            "12",
        ),
        "missing file": (lambda: Basis.load("none.safetensors", INFO), "basis", "none.safetensors"),
        "no tensors": (load_text, "basis=basis.safetensors holds no basis", "mode=features"),
        "shapes": (load_changed(low=np.zeros(2)), "holds no basis"),
        "not a number": (load_changed(mean=np.full(12, np.nan)), "holds no basis"),
        "counts": (load_changed(info={**INFO, "components": [1]}), "holds no basis"),
        "numbers": (load_changed(info={**INFO, "components": [1, 10**9]}), "holds no basis"),
        "great values": (load_changed(mean=np.full(12, 1e308)), "holds no basis"),
        "types": (load_half, "holds no basis"),
        "no components": (load_changed(info=INFO), "holds no basis"),
        "another layer": (
            lambda: (saved(), Basis.load("basis.safetensors", {**INFO, "layer": 2})),
            "layer=3",
            "layer=2",
        ),
        "another width": (lambda: saved().check(np.ones((1, 1, 3))), "12 channels", "3"),
    }
)
