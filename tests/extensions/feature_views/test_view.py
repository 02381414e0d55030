from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import TINY_KEYS
from mistakes import assert_refused

import dinoseg
from dinoseg.extensions.feature_views.basis import Basis, Moments

IMAGE = np.random.default_rng(1).integers(0, 256, (37, 50, 3)).astype(np.uint8)


def model(**keys):
    torch.manual_seed(0)
    return dinoseg.create_model("tiny", classes=["a", "b"], adapter="frozen", **TINY_KEYS, **keys)


def plain_features(segmenter, image, layer):
    """Return the normalised features (h, w, C) of a block in float64, by the model's own maps."""
    maps = segmenter.features(torch.from_numpy(image).permute(2, 0, 1)[None])[layer]
    values = maps[0].permute(1, 2, 0).detach().double().numpy()
    return values / np.linalg.norm(values, axis=2, keepdims=True)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_features_are_those_of_the_layer(layer):
    segmenter = model(**{"head.layers": [0, 1]})
    found = dinoseg.FeatureView(segmenter, layer=layer, precision="fp32").features(IMAGE)
    assert found.shape == (5, 7, 24) and found.dtype == np.float32
    np.testing.assert_allclose(found, plain_features(segmenter, IMAGE, layer), atol=1e-6)
    raw = dinoseg.FeatureView(segmenter, layer=layer, normalise=False, precision="fp32").features(IMAGE)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=2, keepdims=True), found, atol=1e-6)
    assert not np.allclose(np.linalg.norm(raw, axis=2), 1)


@pytest.mark.parametrize(("rank", "used"), [(3, 3), (None, 12)])
def test_positions_are_projected_out(rank, used):
    segmenter = model()
    black = plain_features(segmenter, np.zeros_like(IMAGE), -1).reshape(-1, 24)
    directions = torch.linalg.svd(torch.from_numpy(black - black.mean(0)).T)[0][:, :used].numpy()
    kept = plain_features(segmenter, IMAGE, -1)
    rest = kept - kept @ directions @ directions.T
    found = dinoseg.FeatureView(segmenter, position="remove", rank=rank, precision="fp32").features(IMAGE)
    np.testing.assert_allclose(found, rest / np.linalg.norm(rest, axis=2, keepdims=True), atol=2e-6)


def test_one_basis_holds_for_all_images(tmp_path):
    view = dinoseg.FeatureView(model())
    images = [IMAGE, IMAGE[:20], IMAGE[::-1]]
    basis = view.fit(iter(images))
    flat = np.concatenate([view.features(image).reshape(-1, 24) for image in images]).astype(np.float64)
    np.testing.assert_allclose(basis.mean, flat.mean(0), atol=1e-12)
    projected = (flat - flat.mean(0)) @ basis.directions.T
    np.testing.assert_allclose(basis.high, np.quantile(projected, 0.99, axis=0), atol=1e-6)
    basis.save(tmp_path / "basis.safetensors")
    again = dinoseg.FeatureView(model(), basis=tmp_path / "basis.safetensors")
    for image in images:
        assert np.array_equal(again.colours(image), view.colours(image)) and view.colours(image).shape == image.shape
    assert view.colours(IMAGE, "bilinear").std() < view.colours(IMAGE).std()


@pytest.mark.parametrize(
    ("longest", "options"),
    [(None, {"normalise": False, "layer": 0}), (30, {}), (None, {"position": "remove", "rank": 3})],
)
def test_similarity_is_the_mean_cosine_of_the_points(longest, options):
    view = dinoseg.FeatureView(model(**{"head.layers": [0, 1], "resolution.longest": longest}), **options)
    rng = np.random.default_rng(3)
    for height, width in ((37, 50), (64, 24), (8, 9)):
        image, other = rng.integers(0, 256, (2, height, width, 3)).astype(np.uint8)
        points = [(0, 0), (width - 0.01, height - 0.01), (width - 1, 0), rng.uniform(0, (width, height))]
        units = [view.features(each).astype(np.float64) for each in (image, other)]
        units = [each / np.linalg.norm(each, axis=2, keepdims=True) for each in units]
        patches = min(1, (longest or 64) / max(height, width)) / 8  # of a pixel
        clicked = [units[0][int((int(y) + 0.5) * patches), int((int(x) + 0.5) * patches)] for x, y in points]
        maps = view.similarity(image, points), view.similarity(image, points, other)
        for unit, found in zip(units, maps, strict=True):
            np.testing.assert_allclose(found, np.mean([unit @ each for each in clicked], axis=0), atol=2e-6)
            assert found.dtype == np.float32 and np.abs(found).max() <= 1
        assert view.similarity(image, points[:1])[0, 0] == pytest.approx(1)


def test_extracted_features_are_not_computed_again(monkeypatch):
    view = dinoseg.FeatureView(model())
    view.fit([IMAGE])
    wanted = view.colours(IMAGE)
    kept = view.extract(IMAGE)
    monkeypatch.setattr(view, "_features", None)
    assert np.array_equal(view.colours(kept), wanted)
    assert view.features(kept) is kept.patches.values and view.similarity(kept, [(1, 1)], kept).shape == (5, 7)


def test_what_does_not_fit_is_refused():
    segmenter = model()
    assert_refused(lambda: dinoseg.FeatureView(segmenter).colours(IMAGE), "no basis yet", "fit(images)")
    assert_refused(lambda: dinoseg.FeatureView(segmenter, layer=2), "layers=[2]", "2 blocks")
    assert_refused(lambda: dinoseg.FeatureView(segmenter).features([IMAGE, IMAGE]), "2 images")
    assert_refused(lambda: dinoseg.FeatureView(segmenter).fit([]), "no image")
    assert_refused(lambda: dinoseg.FeatureView(segmenter).fit([IMAGE], [1, 2, 3, 4]), "one to three")
    assert_refused(lambda: dinoseg.FeatureView(segmenter).fit([IMAGE], [1, 1]), "different")
    view = dinoseg.FeatureView(segmenter)
    view.fit([IMAGE])
    assert_refused(lambda: view.colours(IMAGE, "cubic"), "upsample=cubic", "bilinear")
    for points in ([], (3, 4), [(1, 2, 3)], [(1, 2), (3,)]):
        assert_refused(lambda points=points: view.similarity(IMAGE, points), "points=", "pair (x, y)")
    for point in ((50, 3), (3, 37), (-0.1, 3), (float("nan"), 3)):
        assert_refused(lambda point=point: view.similarity(IMAGE, [point]), f"{point[0]:g}, ", "x from 0 to 49", "36")
    graph = SimpleNamespace(runtime=None, source="model.onnx")
    assert_refused(lambda: dinoseg.FeatureView(graph), "model.onnx", "model.safetensors")
    view.basis = Basis.fit(Moments.of(np.eye(3)[None]), [1], {})
    assert_refused(lambda: view.colours(IMAGE), "3 channels", "24")
    shallow = model(**{"head.layers": [0]})
    assert_refused(lambda: dinoseg.FeatureView(shallow), "layer=-1", "this model has 0", "resume")
