"""Pictures of any kind through a model that computes without torch."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from PIL import Image
from portable_parts import graph_with_weights

from dinoseg.extensions.export.onnx_model import OnnxModel
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.model import Model
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png

FACTS = ModelFacts(("dark", "bright"), ((0, 0, 0), (255, 0, 0)), 255)
draw = np.random.default_rng(0)


class Thresholds:
    """Classes by red above 127; remembers the batches that it saw."""

    name = "numpy"

    def __init__(self):
        self.seen = []

    def ids(self, images):
        self.seen.append([image.shape[:2] for image in images])
        return (np.stack(images)[..., 0] > 127).astype(np.uint8)

    def predict(self, images):
        return [(ids, None) for ids in self.ids(images)]

    def probabilities(self, images):
        red = np.stack(images)[..., 0] / np.float32(255)
        return np.stack([1 - red, red], axis=1)


@pytest.fixture
def model():
    return Model(Thresholds(), FACTS)


def picture(height=5, width=7):
    return draw.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_prediction_has_mask_areas_probabilities_and_overlay(model, tmp_path):
    image = picture()
    out = model.predict(image)
    assert out.mask.dtype == np.uint8 and (out.mask == (image[..., 0] > 127)).all()
    assert out.areas == {"dark": int((out.mask == 0).sum()), "bright": int(out.mask.sum())}
    dark = model.predict(np.zeros((5, 7, 3), np.uint8))
    assert dark.areas == {"dark": 35, "bright": 0} and repr(dark) == "dinoseg.Segmentation(7 x 5, dark 100.0%)"
    dark.source, dark.mask[0, 0:7] = Path("a/b.png"), 1
    assert repr(dark) == "dinoseg.Segmentation(a/b.png, 7 x 5, dark 80.0%, bright 20.0%)"
    assert out.probabilities.shape == (2, 5, 7) and out.probabilities is out.probabilities
    assert (out.overlay(1.0)[out.mask == 1] == (255, 0, 0)).all() and (out.overlay(0.0) == image).all()
    out.save(tmp_path / "deeper/mask.png")
    assert (read_ids(tmp_path / "deeper/mask.png") == out.mask).all()
    assert_refused(lambda: out.save(tmp_path / "deeper/mask.png/x.png"), "Cannot read or write")


@pytest.mark.parametrize(
    "given",
    [
        lambda rgb: rgb,
        lambda rgb: Image.fromarray(rgb),
        lambda rgb: torch.from_numpy(rgb).permute(2, 0, 1),
        lambda rgb: (torch.from_numpy(rgb).permute(2, 0, 1) / 255).requires_grad_(),
        lambda rgb: rgb / 255,
        lambda rgb: (rgb / 255).astype(np.float16).astype(np.float64),
        lambda rgb: rgb.astype(np.uint16) * 257,
        lambda rgb: np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)]),
        lambda rgb: Image.fromarray(np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])),
        lambda rgb: rgb[:, ::-1][:, ::-1],
    ],
)
def test_images_in_all_supported_forms_are_equivalent(model, given):
    rgb = picture()
    assert (model.predict(given(rgb)).image == rgb).all()


def test_grey_and_channels_first_images_are_converted(model):
    grey = picture()[..., 0]
    for given in (grey, grey[..., None], Image.fromarray(grey), torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert (model.predict(given).image == grey[..., None]).all()
    square = picture(3, 3)
    assert (model.predict(torch.from_numpy(square)).image == square.transpose(1, 2, 0)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 5, 7), np.uint8), "\\[3, 5, 7\\] \\(H, W, C\\): give \\(H, W, 3\\)"),
        (torch.zeros(5, 7, 3, dtype=torch.uint8), "give \\(3, H, W\\)"),
        (np.zeros((5, 7, 2), np.uint8), "give \\(H, W, 3\\)"),
        (np.zeros((0, 7, 3), np.uint8), "is of \\[0, 7, 3\\]"),
        (np.zeros((5, 7, 3), np.int64), "is of int64: give uint8"),
        (np.full((5, 7, 3), 200.0), "floats from 200 to 200"),
        (np.full((5, 7, 3), -1.5), "Do not normalise"),
        (np.full((5, 7, 3), np.nan), "floats from nan"),
        (np.zeros(5, np.uint8), "give \\(H, W, 3\\)"),
        (None, "image 0 is of type NoneType, not an image"),
        ([{"image": 1}], "image 0 is of type dict"),
        ("nowhere.png", "File not found"),
        ("nowhere/*.png", "nowhere/\\*.png holds or matches no image"),
        (Image.fromarray(np.zeros((5, 7), np.float32)), "holds floating-point values"),
    ],
)
def test_invalid_image_is_refused_with_a_remedy(model, given, message):
    with pytest.raises(UserError, match=message):
        model.predict(given)


def test_images_of_one_size_are_batched_in_order(model):
    images = [picture(5, 7), picture(5, 7), picture(5, 7), picture(4, 7), picture(5, 7)]
    found = model.predict(images, batch_size=2)
    assert [out.image.shape for out in found] == [image.shape for image in images]
    assert [len(batch) for batch in model.runtime.seen] == [2, 1, 1, 1]
    stack = np.stack(images[:3])
    assert all((out.image == image).all() for out, image in zip(model.predict(stack), stack, strict=True))
    assert len(model.predict(torch.from_numpy(stack).permute(0, 3, 1, 2))) == 3 and model.predict([]) == []


def test_a_folder_is_read_as_it_goes_in_the_order_of_numbers(model, tmp_path, caplog):
    for number in (10, 2, 1):
        write_png(tmp_path / f"x{number}.png", picture())
    (tmp_path / "x3.png").touch()
    (tmp_path / "notes.txt").touch()
    results = model.predict(tmp_path, batch_size=1)
    assert next(results).source == tmp_path / "x1.png" and len(model.runtime.seen) == 1
    assert_refused(lambda: list(results), "x3.png as an image")
    with caplog.at_level(logging.WARNING):
        kept = list(model.predict(str(tmp_path / "*.png"), on_error="skip"))
    assert [out.source.name for out in kept] == ["x1.png", "x2.png", "x10.png"] and "x3.png" in caplog.text
    endless = model.predict(picture() for _ in iter(int, 1))
    assert next(endless).mask.shape == (5, 7)
    assert_refused(lambda: model.predict(tmp_path.parent), "holds or matches no image")
    assert_refused(lambda: model.predict(tmp_path, on_error="pass"), "on_error=pass")


def test_unusual_image_files_are_read_correctly_or_refused(model, tmp_path):
    rgb = picture(6, 9)
    turned = Image.fromarray(rgb)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert (model.predict(tmp_path / "turned.png").image == np.rot90(rgb, -1)).all()
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(model.predict(tmp_path / "cmyk.tif").image.astype(int) - rgb).max() <= 1
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert (model.predict(tmp_path / "deep.png").image == rgb[..., :1]).all()
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    frames[0].save(tmp_path / "moves.png", save_all=True, append_images=frames[1:])
    assert (model.predict(tmp_path / "moves.png").image == rgb).all()
    for name, content in (("empty.png", b""), ("cut.png", (tmp_path / "deep.png").read_bytes()[:60]), ("a.mp4", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            model.predict(tmp_path / name)


def test_facts_round_trip_with_unknown_keys_ignored():
    facts = replace(FACTS, normalisation={"mean": [0.5, 0.5, 0.5]})
    assert ModelFacts.of(facts.description(), "x") == facts
    description = facts.description()
    assert ModelFacts.of({**description, "facts": {**description["facts"], "newer": 1}}, "x") == facts


SOURCE = {"name": "a", "hash": "a", "licence": "a", "weights": None, "revision": None, "gated": "no"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("facts", 3),
        ("facts", {"backbone": SOURCE}),
        ("facts", {"scores": [1]}),
        ("facts", {"delta": "no"}),
        ("facts", {"versions": {"torch": 2}}),
        ("facts", {"backbone": {"name": "a"}}),
        *(("classes", []), ("classes", "ab"), ("palette", [[1]])),
    ],
)
def test_invalid_facts_of_a_model_are_refused(key, value):
    with pytest.raises(UserError, match="^x: "):
        ModelFacts.of({**FACTS.description(), key: value}, "x")


@pytest.mark.parametrize("name", ["model.onnx", "renamed.onnx"])
def test_external_weights_are_saved_under_their_referenced_name(tmp_path, name):
    file = graph_with_weights(tmp_path, "model.onnx.data").rename(tmp_path / name)
    model = OnnxModel(Thresholds(), FACTS, file)
    model.save(tmp_path / "copy/model.onnx")
    assert (tmp_path / "copy/model.onnx.data").read_bytes() == b"weights."
    assert (tmp_path / "copy/model.onnx").read_bytes() == file.read_bytes()
    assert len([*(tmp_path / "copy").iterdir()]) == 2
    assert_refused(lambda: model.save(tmp_path / "other.onnx"), "Name its copy model.onnx, not other.onnx")
