"""Objects of images from inference strategies."""

import numpy as np
import pytest
import torch
from object_models import LABELS, SCORES, draw_image, make_predictor

from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.letterbox import Letterbox
from dinoseg.extensions.objects.tasks import InstanceTask
from dinoseg.extensions.regions.regions import Regions
from dinoseg.inference.auto import Auto
from dinoseg.inference.memory import OutOfMemory
from dinoseg.inference.objects import ObjectCollector
from dinoseg.inference.strategy import Place
from dinoseg.inference.windows import Whole, Windows

WINDOWS = Windows((36, 40), overlap=0.35)


@pytest.mark.parametrize("strategy", [Whole(), WINDOWS, Auto(40), Letterbox(90)])
def test_strategies_find_each_object_once(strategy):
    images, masks = zip(*(draw_image(seed=seed) for seed in range(3)), strict=True)
    for (ids, _, objects), own in zip(make_predictor(strategy=strategy).predict(images), masks, strict=True):
        # best first: red, green, blue, and the ground as a whole
        assert objects.classes.tolist() == list(LABELS)
        assert objects.scores == pytest.approx(SCORES, abs=1e-5)
        for mask, expected in zip(objects.masks, [*own, ~own.any(axis=0)], strict=True):
            assert np.array_equal(mask.to_mask(ids.shape), expected)
        assert np.array_equal(ids, np.select(list(own), LABELS[:3], 0))


def test_instances_of_windows_overlap_nothing_else():
    image, masks = draw_image()
    objects = make_predictor("instance", WINDOWS).predict([image])[0].objects
    best = objects.select(np.flatnonzero(objects.scores > 0.5))
    assert best.classes.tolist() == list(LABELS[:3])  # stuff is left out
    for mask, expected in zip(best.masks, masks, strict=True):
        assert np.array_equal(mask.to_mask(image.shape[:2]), expected)


def test_probabilities_come_with_the_same_objects():
    image, _ = draw_image()
    ids, probabilities, objects = make_predictor().predict([image], probabilities=True)[0]
    plain = make_predictor().predict([image])[0]
    assert probabilities.shape == (3, *image.shape[:2])
    assert np.array_equal(ids, plain.ids) and len(objects) == len(plain.objects) and plain.probabilities is None


def test_windows_of_a_resized_image_find_objects_at_its_own_size():
    image, masks = draw_image((120, 180))
    strategy = Windows((40, 50), overlap=0.3, shortest=60)
    objects = make_predictor(strategy=strategy).predict([image])[0].objects
    assert objects.size == (120, 180) and objects.classes.tolist() == list(LABELS)
    for mask, expected in zip(objects.masks, masks, strict=False):
        found = mask.to_mask(objects.size)
        assert (found & expected).sum() / (found | expected).sum() > 0.85


@pytest.mark.parametrize("side", [45, 200])
def test_letterbox_finds_objects_at_the_size_of_the_image(side):
    image, masks = draw_image()
    ids, _, objects = make_predictor(strategy=Letterbox(side)).predict([image])[0]
    assert ids.shape == objects.size == (60, 90) and objects.classes.tolist() == list(LABELS)
    for mask, expected in zip(objects.masks, masks, strict=False):
        found = mask.to_mask(objects.size)
        assert (found & expected).sum() / (found | expected).sum() > 0.85


def test_a_retry_with_less_memory_forgets_earlier_objects(monkeypatch):
    strategy = Auto((36, 40), overlap=0.35)
    bands = strategy.whole.bands

    def fail_late(*args, **kwargs):
        yield from list(bands(*args, **kwargs))[:0]
        raise OutOfMemory("no memory")

    monkeypatch.setattr(strategy.whole, "bands", fail_late)
    image, _ = draw_image()
    assert len(make_predictor(strategy=strategy).predict([image])[0].objects) == 4


@pytest.mark.parametrize(
    ("strategy", "key"),
    [
        (Whole(flips="horizontal"), "inference.flips=none"),
        (Windows(40, scales=[0.5, 1.0]), "inference.scales=[1.0]"),
        (Auto(40, flips="all"), "inference.flips=none"),
        (Regions(Whole(), 5), "inference.min_region=0"),
        (Windows(40, overlap=0.0), "inference.overlap=0.25"),
        (Windows(40, stride=(30, 40)), "inference.stride=null"),
        (Windows(40, placement="even"), "inference.placement=stride"),
    ],
)
def test_strategies_that_average_classes_are_refused(strategy, key):
    assert key in strategy.no_objects_reason


def test_objects_need_no_gradient_graph():
    image, _ = draw_image()
    with torch.inference_mode():
        assert make_predictor().predict([image])[0].objects.scores.dtype == np.float64


@pytest.mark.parametrize("size", [(45, 120), (100, 60)])
def test_letterbox_of_two_sides_finds_the_same_objects(size):
    image, masks = draw_image()
    objects = make_predictor(strategy=Letterbox(size)).predict([image])[0].objects
    assert objects.classes.tolist() == list(LABELS)
    for mask, expected in zip(objects.masks, masks, strict=False):
        found = mask.to_mask(objects.size)
        assert (found & expected).sum() / (found | expected).sum() > 0.85


def test_letterbox_keeps_a_row_of_thin_images():
    assert Letterbox(40).fit((1, 200)) == (1, 40) and Letterbox((40, 80)).fit((500, 2)) == (40, 1)


class RecordedParts(InstanceTask):
    """A task that returns the parts which it is given, and a prediction of objects of the requested size."""

    def join_objects(self, parts, size):
        return [(objects.size, top, left) for objects, top, left in parts]

    def of_images(self, images):
        return self

    def objects(self, size):
        return [Objects.of_runs(size, [], [])]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 9), [((3, 7), 0, 2), ((3, 7), 7, 2)]), ((1, 1), [((1, 1), 0, 0), ((1, 1), 0, 0)])],
)
def test_parts_of_resized_images_are_rounded(size, expected):
    collector = ObjectCollector(RecordedParts(["leaf"]), 1, size)
    for top in (0, 2):
        collector(RecordedParts(["leaf"]), torch.zeros(1, 3, 1, 3), [Place(0, top, 1)], (3, 4))
    assert collector.objects() == [expected]
