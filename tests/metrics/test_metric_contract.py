"""Metrics keep their contract, and equal independent references on random ugly images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mistakes import refusals
from scipy import ndimage
from score_making import boundary_iou, mean, overlap, surface_dice

from dinoseg.core.metric import LabelledImage, Metric, PredictedImage
from dinoseg.metrics import BoundaryIoU, CalibrationError, ClDice, ConfusionMatrix, MeanIoU, SurfaceDice
from dinoseg.metrics.wrapped import WrappedMetric
from dinoseg.testing import check_metric

METRICS = {
    "miou": MeanIoU(),
    "boundary_iou": BoundaryIoU(),
    "wide boundary_iou": BoundaryIoU(ratio=0.2),
    "nsd": SurfaceDice(),
    "exact nsd": SurfaceDice(tolerance=0),
    "ece": CalibrationError(),
    "cldice": ClDice(),
}
CLASSES = 4


def ugly_case(seed, ignored=255):
    """Return predictions and labels of 1 to 3 images of odd sizes with empty, ignored, single and wrong classes."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(rng.integers(1, 4)):
        shape = tuple(rng.integers(1, 24, 2))
        smooth = ndimage.gaussian_filter(rng.normal(size=(2, CLASSES, *shape)), (0, 0, 1.5, 1.5)).argmax(axis=1)
        mask = smooth[0]
        ids = np.where(rng.random(shape) < rng.random(), smooth[0], smooth[1])
        kind = rng.integers(0, 6)
        if kind == 0:
            mask = np.full(shape, ignored)
        elif kind == 1:
            mask = np.zeros(shape, int)
        elif kind == 2:
            ids = np.full(shape, CLASSES - 1)
        elif kind == 3:
            mask = np.where(rng.random(shape) < 0.3, ignored, mask)
        images.append((ids.astype(np.uint8), mask.astype(np.uint8)))
    return images


def score(metric, images, ignored=255):
    rows = [metric.count(PredictedImage(ids), LabelledImage(mask, CLASSES, ignored)) for ids, mask in images]
    return metric.score(rows)


def masks_of(images, label):
    return [[(side == label) & (mask != 255) for side in (mask, ids)] for ids, mask in images]


def reference_scores(images):
    """Return mIoU, Dice, boundary IoU, means over classes, and surface Dice, a mean over images and classes."""
    classes = [masks_of(images, label) for label in range(CLASSES)]
    ious, dices = zip(*map(overlap, classes), strict=True)
    shares = [surface_dice(*pair) for pairs in classes for pair in pairs]
    return [mean(ious), mean(dices), mean(map(boundary_iou, classes)), mean(shares)]


@pytest.mark.parametrize("name", METRICS)
def test_metric_keeps_the_contract(name):
    check_metric(METRICS[name])


def test_scores_equal_references_on_ugly_cases():
    for seed in range(120):
        images = ugly_case(seed)
        regions = score(MeanIoU(), images)
        found = [regions["miou"], regions["dice"], *(score(metric, images)[name] for name, metric in OUTLINES)]
        assert found == pytest.approx(reference_scores(images), abs=1e-12), seed


OUTLINES = (("boundary_iou", BoundaryIoU()), ("nsd", SurfaceDice()))


@pytest.mark.parametrize("ignored", [255, 0])
def test_overlap_equals_the_confusion_matrix(ignored):
    for seed in range(20):
        images = ugly_case(seed, ignored)
        matrix = ConfusionMatrix(CLASSES, ignored)
        for ids, mask in images:
            matrix.update(ids[None], mask[None])
        found = score(MeanIoU(), images, ignored)
        expected = matrix.compute()
        assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)


def test_an_ignored_class_has_no_outline_of_its_own():
    ids = np.zeros((8, 8), np.uint8)
    mask = np.ones((8, 8), np.uint8)
    for name, metric in OUTLINES:
        assert score(metric, [(ids, mask)], ignored=0)[name] == 0.0  # of class 1, which the prediction lacks
        assert score(metric, [(ids, ids)], ignored=0)[name] is None


class MeanError:
    """A metric in the form of torchmetrics: the share of wrong pixels over all updates; nan for one pixel."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.wrong = self.pixels = 0

    def update(self, ids, mask):
        assert ids.shape == mask.shape and len(ids) == 1
        self.wrong += int((ids != mask).sum())
        self.pixels += ids.numel()

    def compute(self):
        return self.wrong / self.pixels if self.pixels > 1 else float("nan")


def test_settings_of_a_wrapped_metric_name_its_own_options():
    def wrap(power):
        metric = MeanError()
        metric.power = power
        return WrappedMetric("error", metric, "min", ignored="remove")

    metric = wrap(1)
    before = metric.settings
    score(metric, [(np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8))])
    assert metric.settings == before == wrap(1).settings
    assert "MeanError" in before and before != wrap(2).settings


@pytest.mark.parametrize("convert", [np.array, torch.tensor, lambda weights: {"of classes": [np.array(weights)]}])
def test_settings_differ_by_arrays_and_tensors(convert):
    def weighted(*weights):
        return changed(MeanIoU(), weights=convert(weights * 400)).settings

    assert weighted(0.5, 1.0) == weighted(0.5, 1.0)
    assert weighted(0.5, 1.0, 1.0, 1.0) != weighted(0.5, 1.0, 0.9, 1.0)  # printed arrays of 1600 values are equal


def test_settings_of_a_wrapped_module_have_its_buffers():
    def wrap(threshold):
        module = torch.nn.Module()
        module.reset = module.update = module.compute = lambda: None
        module.register_buffer("threshold", torch.tensor(threshold))
        return WrappedMetric("error", module, ignored="remove").settings

    assert wrap(0.5) == wrap(0.5) != wrap(0.6)


class Share(Metric):
    """Share of correct labelled pixels, with faults on request."""

    scores = {"share": "max"}

    def __init__(self, **faults):
        usual = {"dtype": np.int64, "name": "share", "void": 0, "undefined": np.nan}
        self.fault = SimpleNamespace(**usual | faults)
        self.calls = 0

    def count(self, prediction, sample):
        self.calls += 1
        known = sample.mask != sample.ignore_index
        correct = (prediction.ids == sample.mask)[known].sum() + getattr(self.fault, "state", 0) * self.calls
        if hasattr(self.fault, "errors"):
            correct = known.sum() - correct
        pixels = known.size if hasattr(self.fault, "size") and known.any() else known.sum()
        void = 0 if known.any() else self.fault.void
        return {"correct": np.array(correct + void, self.fault.dtype), "pixels": pixels + void}

    def compute(self, sums):
        pixels = np.maximum(sums["pixels"], 1)
        shares = np.where(sums["pixels"] > 0, sums["correct"] / pixels, self.fault.undefined)
        return {self.fault.name: shares.mean() if hasattr(self.fault, "scalar") else shares}


class AreaError(Metric):
    """Error of the area of class K - 1 relative to that of the reference."""

    scores = {"area_error": "min"}

    def count(self, prediction, sample):
        known = sample.mask != sample.ignore_index
        sides = [(known & (side == sample.num_classes - 1)).sum() for side in (sample.mask, prediction.ids)]
        return {"error": np.abs(sides[0] - sides[1]) * (sides[0] > 0), "area": sides[0]}

    def compute(self, sums):
        return {"area_error": np.where(sums["area"] > 0, sums["error"] / np.maximum(sums["area"], 1), np.nan)}


class InfiniteAreaError(AreaError):
    """An error of the area that is infinite where an image lacks the class, as messages advise."""

    number, mean = "area_error_infinite_images", "area_error_finite_mean"
    scores = {"area_error": "min", number: "min", mean: "min"}
    unbounded = tuple(scores)
    totals = (number,)

    def count(self, prediction, sample):
        counts = super().count(prediction, sample)
        labelled = (sample.mask != sample.ignore_index).any()
        return {**counts, "infinite": np.int64(labelled and counts["area"] == 0)}

    def compute(self, sums):
        mean = super().compute(sums)["area_error"]
        infinite = sums["infinite"] > 0
        found = {"area_error": np.where(infinite, np.inf, mean), self.number: sums["infinite"], self.mean: mean}
        return {name: found[name] for name in self.scores}


def changed(metric, **attributes):
    """Return a metric with other attributes than those of its class."""
    for name, value in attributes.items():
        setattr(metric, name, value)
    return metric


def test_check_accepts_unbounded_scores_that_are_named():
    for accepted in (changed(AreaError(), unbounded=("area_error",)), InfiniteAreaError(), Share()):
        check_metric(accepted)


def infinite_without_images():
    metric = changed(AreaError(), unbounded=("area_error",))
    return changed(metric, compute=lambda sums: {"area_error": np.where(sums["area"] > 0, np.nan, np.inf)})


NO_TOTALS = changed(InfiniteAreaError(), totals=())
ONLY_NUMBER = {"area_error": "min", InfiniteAreaError.number: "min"}
NO_MEAN = changed(InfiniteAreaError(), scores=ONLY_NUMBER, unbounded=tuple(ONLY_NUMBER))
NUMBER = ("area_error_infinite_images", "`totals`")
HALF = ("right half is ignored", "enlarge a denominator")

test_check_names_the_broken_rule = refusals(
    {
        "counts of float32": (lambda: check_metric(Share(dtype=np.float32)), "must be int64 or float64"),
        "errors above 1": (lambda: check_metric(AreaError()), "must lie in 0..1; else name it in `unbounded`"),
        "other scores": (lambda: check_metric(Share(name="other")), "scores are"),
        "a state": (lambda: check_metric(Share(state=1)), "keep no state"),
        "scores of no image": (lambda: check_metric(Share(scalar=True)), "has the shape"),
        "ignored pixels in a denominator": (lambda: check_metric(Share(size=True)), *HALF),
        "ignored pixels in that of errors": (lambda: check_metric(Share(size=True, errors=True)), *HALF),
        "0 of no counts": (lambda: check_metric(Share(undefined=0)), "share=0.0 of counts of 0 must be nan"),
        "counts of ignored images": (lambda: check_metric(Share(void=1)), "without labelled pixels", "must be 0"),
        "another class": (lambda: check_metric(SimpleNamespace(scores={})), "must inherit"),
        "a direction": (lambda: check_metric(changed(Share(), scores={"share": "up"})), "must hold for each score one"),
        "bounded totals": (lambda: check_metric(changed(Share(), totals=("share",))), "totals=", "`unbounded`"),
        "infinite scores": (lambda: check_metric(infinite_without_images()), "area_error is infinite", *NUMBER),
        "infinite images that are no totals": (lambda: check_metric(NO_TOTALS), *NUMBER),
        "infinite images without a mean": (lambda: check_metric(NO_MEAN), "area_error_finite_mean"),
    },
    error=AssertionError,
)
