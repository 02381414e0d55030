"""Pictures larger than any of the training: seen at its scale, and said."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mistakes import refusals
from omegaconf import OmegaConf

from dinoseg.data.transforms import Augment
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.serving.source import model_of
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.methods import images as images_task
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel

SIZES = TrainedSizes(typical=32, largest=64)


@pytest.fixture
def model(tiny_backbone):
    return SegmentationModel(tiny_backbone(), LinearHead(24, 1, 3)).eval()


@pytest.fixture
def seen_sizes(model):
    """Collect the sizes that the backbone is given."""
    sizes = []
    model.backbone.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[-2:])))
    return sizes


def images(height, width):
    return torch.zeros(1, 3, height, width, dtype=torch.uint8)


def check_data(monkeypatch, splits, scale, augment=None):
    """Return the sizes that a training finds in splits: each a list of (image size, mask size)."""
    found = [
        SimpleNamespace(records=[SimpleNamespace(image_size=image, mask_size=mask) for image, mask in split])
        for split in splits
    ]
    monkeypatch.setattr(images_task, "check_for_errors", lambda *_, **__: found)
    data = {"group": None, "workers": 1, "augment": {"scale": scale}}
    groups = {"data": data, "loss": {"weights": "none"}, "resolution": {"longest": None}}
    parts = Builder(OmegaConf.create({**groups, "cache_dir": "", "choices": {"data": "folder"}}))
    module = SimpleNamespace(train=None, val=None, strategy=None, augment=augment)
    return images_task.ImageTraining.check_data(SimpleNamespace(builder=parts, data_module=module))


def test_sizes_are_those_that_the_model_was_fed():
    assert TrainedSizes.of([(30, 40)] * 100, [], longest=None, enlarged=1.5) == TrainedSizes(40, 60)
    assert TrainedSizes.of([(30, 40)], [(9, 99)], longest=20, enlarged=0.5) == TrainedSizes(20, 20)
    info = TrainedSizes(40, 60).as_info()
    assert TrainedSizes.from_info(info) == TrainedSizes(40, 60) and TrainedSizes.from_info({}) is None


@pytest.mark.parametrize("enlarged", [0.8, 1.0, 1.5])
def test_images_of_training_and_validation_are_not_reduced(enlarged, model):
    trained = [(30, 40)] * 99 + [(300, 4)]
    scored = [(20, 40), (7, 470)]
    sizes = TrainedSizes.of(trained, scored, longest=None, enlarged=enlarged)
    assert sizes == TrainedSizes(40, 470)
    limit_to_trained_size(model, sizes)
    assert all(model.input_size(size) == size for size in (*trained, *scored))
    assert model.input_size((471, 471)) == (40, 40)


def test_images_to_be_scored_count_as_they_are(monkeypatch):
    records = [[((6, 8), (9, 9))], [((5, 7), (9, 9))]]
    for splits, largest in ((records, 8), (records[::-1], 8), (([], []), None)):
        found = check_data(monkeypatch, splits, [0.5, 0.75])
        assert (found and found.largest) == largest


@pytest.mark.parametrize(
    ("relative_to", "expected"), [("image", (100, 200)), ("short", (50, 100)), ("long", (40, 80)), ("fit", (40, 80))]
)
def test_sizes_of_views_count_where_the_augmentation_gives_them(monkeypatch, relative_to, expected):
    augment = Augment((30, 40), relative_to=relative_to)
    found = check_data(monkeypatch, ([((60, 100), None)], []), [0.5, 2.0], augment)
    assert found == TrainedSizes(*expected)


def test_only_larger_images_are_reduced_and_masks_keep_size(model, seen_sizes, caplog):
    limit_to_trained_size(model, SIZES)
    for size in ((60, 64), (40, 80), (160, 120), (20, 60)):
        assert model(images(*size)).scores().shape[-2:] == size
    assert seen_sizes == [(60, 64), (16, 32), (32, 24), (20, 60)]
    (message,) = caplog.messages
    assert "Images of 80 x 40 (width x height) are larger than those" in message and "resolution.longest" in message
    assert "about 32 pixels, enlarged at most to 64" in message


def test_evaluation_warns_of_large_images_without_reducing_them(model, seen_sizes, caplog):
    limit_to_trained_size(model, SIZES, reduces=False)
    model(images(40, 80))
    assert (
        seen_sizes == [(40, 80)] and "scored at full size; mode=predict and mode=track reduce them to 32" in caplog.text
    )


def test_unknown_sizes_or_a_reducing_model_give_no_warning(model, seen_sizes, caplog):
    limit_to_trained_size(model, None)
    model(images(40, 80))
    model.longest = 48
    limit_to_trained_size(model, SIZES)
    with caplog.at_level(logging.INFO):
        model(images(40, 80))
    assert seen_sizes == [(40, 80), (24, 48)] and not caplog.messages


def test_a_model_that_is_served_keeps_the_scale(model):
    info = {"classes": ["a"], "palette": [[0, 0, 0]], "ignore_index": 255}
    model_of(SimpleNamespace(model=model, predictor=None, info=info), SIZES)
    assert model.limit((40, 80)) == 32


test_a_damaged_description_is_refused = refusals(
    {
        str(sizes): (partial(TrainedSizes.from_info, {"sizes": sizes}), "description is damaged: sizes")
        for sizes in (3, {}, {"typical": 3}, {"typical": "3", "largest": 9}, {"typical": 0, "largest": 1})
    }
)
