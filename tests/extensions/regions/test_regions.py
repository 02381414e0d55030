"""Removal of regions, against a flood fill that follows the definition pixel by pixel, on drawn and ugly cases."""

from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from mistakes import assert_refused

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import SEMANTIC, MultilabelTask
from dinoseg.extensions.regions import regions as regions_module
from dinoseg.extensions.regions.regions import Regions, with_regions
from dinoseg.inference.auto import Auto
from dinoseg.inference.memory import OutOfMemory
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.rows import MemoryRows
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.inference.windows import Whole, Windows
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel

NEIGHBOURS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]


def components(mask):
    """Return the 8-connected components of a mask as sets of pixels, in reading order of their first pixels."""
    height, width = mask.shape
    found = []
    seen = set()
    for start in zip(*map(list, np.nonzero(mask)), strict=True):
        if start in seen:
            continue
        seen.add(start)
        component = set()
        waiting = deque([start])
        while waiting:
            y, x = waiting.popleft()
            component.add((y, x))
            for down, right in NEIGHBOURS:
                near = (y + down, x + right)
                if 0 <= near[0] < height and 0 <= near[1] < width and mask[near] and near not in seen:
                    seen.add(near)
                    waiting.append(near)
        found.append(component)
    return found


def reference(scores, min_region, largest):
    """Return class ids (H, W) of scores (K, H, W), by the definition: each round looks at every pixel and class."""
    count, height, width = scores.shape
    first = scores.argmax(axis=0)
    kept = {}  # the largest component of a class when it first occurs
    lost = {}  # pixel to the classes that it had

    def ids_now():
        ids = first.copy()
        for (y, x), had in lost.items():
            ids[y, x] = max((k for k in range(count) if k not in had), key=lambda k: (scores[k, y, x], -k))
        return ids

    for attempt in range(count):
        ids = ids_now()
        bad = set()
        for label in range(count):
            parts = components(ids == label)
            if label in largest and parts and label not in kept:
                kept[label] = max(parts, key=len)
            for part in parts:
                if len(part) < min_region or (label in largest and not kept[label] <= part):
                    bad |= part
        if not bad:
            return ids
        if attempt == count - 1:
            for pixel in bad:
                ids[pixel] = first[pixel]
            return ids
        for pixel in bad:
            lost.setdefault(pixel, set()).add(ids[pixel])
    raise AssertionError


class Given(InferenceStrategy):
    """Strategy that yields given logits (B, K, H, W) in bands of some rows."""

    def __init__(self, logits, rows=None):
        self.logits, self.rows = logits, rows or logits.shape[2]
        self.freed = 0

    def bands(self, model, rows, autocast, *, size=None, on_pass=None):
        buffer = torch.empty(0)
        for band in self.logits.split(self.rows, dim=2):
            buffer.fill_(float("nan"))  # a band is valid only until the next one
            buffer = band.clone()
            yield Prediction(buffer, tuple(band.shape[2:]), (1.0, 1.0), upsample, task=model.task)

    def reduce_memory(self, model, rows, *, size=None):
        self.freed += 1
        return self.freed == 1


class Model:
    """What the strategy reads of a model."""

    def __init__(self, num_classes, task=SEMANTIC):
        self.num_classes, self.task = num_classes, task

    def parameters(self):
        return iter(())


def edited(logits, strategy_options, *, task=SEMANTIC, rows=None):
    """Return the edited prediction of logits (K, H, W), and the ids before."""
    given = torch.as_tensor(logits, dtype=torch.float32)[None]
    strategy = Regions(Given(given, rows), **strategy_options)
    images = MemoryRows(torch.zeros(1, 3, *given.shape[2:], dtype=torch.uint8))
    (prediction,) = strategy.bands(Model(given.shape[1], task), images, nullcontext)
    return prediction, strategy.original[0].numpy()


def draw(seed):
    """Return logits (K, H, W) of a case, and the options."""
    rng = np.random.default_rng(seed)
    count = int(rng.choice([2, 3, 5, 40]))
    height, width = (int(side) for side in rng.integers(1, 13, 2))
    kind = rng.choice(["noise", "ties", "smooth", "flat", "checkerboard", "specks"])
    scores = rng.standard_normal((count, height, width))
    if kind == "ties":
        scores = rng.integers(0, 2, scores.shape).astype(float)
    elif kind == "smooth":
        coarse = rng.standard_normal((count, 3, 3))
        scores = np.kron(coarse, np.ones((1, 4, 4)))[:, :height, :width] + 0.3 * scores[:, :12, :12]
    elif kind == "flat":
        scores[0] += 20
    elif kind == "checkerboard":
        board = np.indices((height, width)).sum(axis=0) % 2
        scores[0] += 20 * board
        scores[1] += 20 * (1 - board)
    elif kind == "specks":
        scores[rng.integers(count)] += 9 * (rng.random((height, width)) < 0.9)
    largest = set(rng.choice(count, int(rng.integers(0, min(count, 3) + 1)), replace=False).tolist())
    return np.float32(scores), {"min_region": int(rng.choice([0, 2, 3, 6, 20, 200])), "largest": largest}


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_ids_equal_the_definition_on_random_cases(start):
    changed = 0
    for seed in range(start, start + 50):
        scores, options = draw(seed)
        prediction, before = edited(scores, options, rows=1 + seed % 4)
        ids = prediction.class_ids()[0].numpy()
        assert np.array_equal(before, scores.argmax(axis=0)), seed
        assert np.array_equal(ids, reference(scores, **options)), seed
        assert np.array_equal(ids, SEMANTIC.decide(prediction.probabilities())[0]), seed
        changed += (ids != before).any()
    assert changed > 10


@pytest.mark.parametrize("seed", range(40))
def test_layers_equal_the_definition(seed):
    rng = np.random.default_rng(seed)
    logits = np.float32(rng.standard_normal((3, *rng.integers(1, 14, 2))) + 0.3)
    task = MultilabelTask(3, [0.5, 0.4, 0.7])
    options = {"min_region": int(rng.choice([0, 2, 5])), "largest": {1} if seed % 2 else set()}
    prediction, before = edited(logits, options, task=task, rows=2)
    expected = np.zeros_like(before)
    for label, layer in enumerate(before):
        parts = components(layer)
        most = max(map(len, parts), default=0)
        if label in options["largest"]:
            parts = [part for part in parts if len(part) == most][:1]
        for part in parts:
            if len(part) >= options["min_region"]:
                expected[label][tuple(zip(*part, strict=True))] = 1
    assert np.array_equal(prediction.class_ids()[0], expected)
    stays = expected == before
    torch.testing.assert_close(prediction.probabilities()[0][stays], torch.from_numpy(logits).sigmoid()[stays])


def test_second_most_probable_class_replaces_a_speck():
    logits = np.zeros((3, 5, 5))
    logits[0] = 3
    logits[:, 2, 2] = [1, 5, 2]  # a pixel of class 1; class 2 comes next, then class 0
    alone, _ = edited(logits, {"min_region": 1})
    assert alone.class_ids()[0, 2, 2] == 1
    prediction, _ = edited(logits, {"min_region": 2})
    assert not prediction.class_ids().any()  # class 2 would be a speck again
    shares = prediction.probabilities()[0, :, 2, 2]
    assert shares[0] == 1 and not shares[1:].any()
    assert prediction.logits().isfinite().all()


def test_improbable_classes_stay_in_their_order():
    logits = np.zeros((4, 6, 6))
    logits[3, :, :2] = 90
    logits[0, :, 2:] = 20
    logits[:, 2, 2] = [-150, -120, 120, -100]  # all but class 2 have probabilities below 1e-90
    assert edited(logits, {"min_region": 2})[0].class_ids()[0, 2, 2] == 3


def test_region_of_exactly_the_limit_stays():
    logits = np.zeros((2, 4, 6))
    logits[1, [0, 1, 2], [0, 1, 2]] = 1  # three pixels on a diagonal
    assert edited(logits, {"min_region": 3})[0].class_ids().sum() == 3
    assert edited(logits, {"min_region": 4})[0].class_ids().sum() == 0


def test_holes_of_the_background_are_filled():
    logits = np.zeros((2, 7, 7))
    logits[1] = 1
    logits[1, 3, 3] = -1
    assert edited(logits, {"min_region": 2})[0].class_ids().all()


def test_pixels_keep_their_class_if_none_is_left():
    assert edited(np.ones((4, 1, 1)) * [[[1]], [[3]], [[2]], [[0]]], {"min_region": 2})[0].class_ids() == 1
    stripes = np.stack([np.arange(6)[None] % 2, 1 - np.arange(6)[None] % 2])
    assert np.array_equal(edited(stripes, {"min_region": 2})[0].class_ids()[0], stripes.argmax(axis=0))


def test_largest_component_is_that_of_the_prediction():
    logits = np.zeros((2, 3, 9))
    logits[1, :, :3] = 1
    logits[1, 0, 6:8] = 1
    ids = edited(logits, {"largest": {1}})[0].class_ids()[0]
    assert ids[:, :3].all() and not ids[:, 3:].any()
    tie = np.zeros((2, 3, 9))
    tie[1, 1, 0] = tie[1, 0, 8] = 1
    assert edited(tie, {"largest": {1}})[0].class_ids()[0].nonzero().tolist() == [[0, 8]]  # the first in reading order


def tiny_model(classes=4):
    torch.manual_seed(0)
    return SegmentationModel(RgbBackbone(patch_size=2), LinearHead(3, 1, classes), num_classes=classes).eval()


def pictures(seed, *, count=2, height=33, width=41):
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


STRATEGIES = {
    "whole": Whole(),
    "flips": Whole(flips="all"),
    "windows": Windows((16, 16), flips="horizontal"),
    "auto": Auto((16, 16)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_images_of_every_strategy_are_edited_whole(name, tmp_path):
    model = tiny_model()
    images = pictures(0)
    plain = Predictor(model, torch.device("cpu"), nullcontext, STRATEGIES[name])
    predictor = Predictor(model, torch.device("cpu"), nullcontext, with_regions(STRATEGIES[name], "abcd", 6, ["b"]))
    logits = plain.probabilities(images).log().numpy()
    expected = np.stack([reference(scores, 6, {1}) for scores in logits])
    ids = predictor.ids(images)
    assert np.array_equal(ids, expected)
    assert (ids != plain.ids(images)).any()
    assert np.array_equal(SEMANTIC.decide(predictor.probabilities(images)), expected)


def test_images_that_memory_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr(regions_module, "free_bytes", lambda device: 20 * 4 * 33 * 41 - 1)
    predictor = Predictor(tiny_model(), torch.device("cpu"), nullcontext, Regions(Whole(), 6))
    words = ("41 x 33", "inference.min_region=0")
    with pytest.raises(OutOfMemory):
        predictor.ids(pictures(0, count=1))
    assert_refused(lambda: predictor.ids(pictures(0, count=1)), *words)


def test_memory_is_that_of_the_device_of_the_images(monkeypatch):
    devices = []
    monkeypatch.setattr(regions_module, "free_bytes", lambda device: devices.append(device.type) or 0)
    images = MemoryRows(torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device="meta"))
    with pytest.raises(OutOfMemory):
        next(Regions(Given(torch.zeros(1, 2, 4, 4)), 2).bands(Model(2), images, nullcontext))
    assert devices == ["meta"]


def test_inner_strategy_reduces_memory():
    inner = Given(torch.zeros(1, 2, 3, 3))
    assert [Regions(inner, 2).reduce_memory(Model(2), None) for _ in range(2)] == [True, False]


def test_edited_images_are_no_single_pass():
    strategy = Regions(Whole(), 2)
    model = tiny_model()
    assert not strategy.is_single_pass(model, (8, 8), nullcontext)
    assert not strategy.equals_single_pass(model, (8, 8), nullcontext)


@pytest.mark.parametrize(("min_region", "largest"), [(0, []), (1, [])])
def test_nothing_to_remove_is_the_strategy_itself(min_region, largest):
    strategy = Whole()
    assert with_regions(strategy, ["a", "b"], min_region, largest) is strategy


def test_order_of_classes_is_no_difference_between_strategies():
    names = [f"c{number}" for number in range(9)]
    first, second = (with_regions(Whole(), names, 0, chosen) for chosen in (["c0", "c8"], ["c8", "c0"]))
    assert repr(first) == repr(second)


def test_unknown_class_is_refused():
    assert_refused(
        lambda: with_regions(Whole(), ["sky", "road"], 0, ["car"]), "inference.largest_component", "car", "sky", "road"
    )
