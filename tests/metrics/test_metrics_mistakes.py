"""Arrays, counts and settings that metrics refuse, and what the message of each names."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from mistakes import assert_refused, refusals
from test_metric_contract import NO_MEAN

from dinoseg import metrics
from dinoseg.core.metric import LabelledImage, PredictedImage
from dinoseg.extensions.protocols.clustering import contingency
from dinoseg.metrics import BoundaryIoU, ClDice, ConfusionMatrix, LayerMetric, MeanIoU, SurfaceDice
from dinoseg.metrics.calibration import fit_temperature
from dinoseg.metrics.region_boundary import pair_scores
from dinoseg.metrics.rows import check_score_names
from dinoseg.metrics.surface import boundary_ious, surface_dices

IDS = torch.zeros(4, 4, dtype=torch.uint8)
PAIRS = np.arange(16, dtype=np.uint8).reshape(4, 4) % 2
LOGITS = torch.zeros(1, 2, 4, 4)
LAYERS = PAIRS[None]
calibrate = metrics.expected_calibration_error


def count(ids, mask, classes=2, metric=None):
    """Count ids of an image named x."""
    prediction = PredictedImage(ids, np.zeros((classes, 4, 4), np.float32))
    return (metric or MeanIoU()).count(prediction, LabelledImage(mask, classes, name="x"))


def count_outsiders(*ids):
    mask = torch.tensor([[[0, *ids]]])
    ConfusionMatrix(3).update(torch.zeros_like(mask), mask)


test_message_names_value_and_remedy = refusals(
    {
        "logits of other sizes": (lambda: calibrate(LOGITS, torch.zeros(1, 5, 4).long()), "do not fit"),
        "targets of 7": (lambda: calibrate(LOGITS, IDS[None] + 7), "not classes: give ids below 2, or 255"),
        "ids of no class": (lambda: metrics.mean_iou(IDS[None], IDS[None] + 2, 2), "outside 0..1"),
        "a list": (lambda: metrics.mean_iou([[0, 1]], IDS, 3), "is of type list. Give a tensor or an array"),
        "a list of logits": (lambda: metrics.fit_temperature([LOGITS], IDS[None]), "is of type list. Give a tensor"),
        "ids of floats": (lambda: metrics.boundary_iou(IDS.float(), IDS, 1), "is torch.float32. Give ids of an int"),
        "doubles": (lambda: metrics.surface_dice(IDS, IDS.double(), 1, tolerance=1.0), "is torch.float64. Give ids"),
        "ids of halves": (lambda: metrics.region_and_boundary(IDS.half(), IDS, 1), "is torch.float16. Give ids"),
        "targets of floats": (lambda: calibrate(LOGITS, IDS[None].float()), "is torch.float32. Give ids"),
        "temperature of 0": (lambda: calibrate(LOGITS, IDS[None], temperature=0.0), "temperature=", "above 0"),
        "infinite temperature": (
            lambda: calibrate(LOGITS, IDS[None], temperature=math.inf),
            "temperature=inf",
            "finite",
        ),
        "ratio of 0": (lambda: metrics.boundary_iou(IDS, IDS, 1, ratio=0.0), "ratio=", "above 0 and at most 1"),
        "ratio of 1.1": (lambda: metrics.boundary_iou(IDS, IDS, 1, ratio=1.1), "ratio=", "above 0 and at most 1"),
        "0 classes": (lambda: metrics.boundary_iou(IDS, IDS, 0), "num_classes=0 ", "at least 1"),
        "0 objects": (lambda: metrics.region_and_boundary(IDS, IDS, 0), "num_objects=0 ", "at least 1"),
        "calibration of NaN": (lambda: calibrate(LOGITS * math.nan, IDS[None]), "logits of labelled pixels are NaN"),
        "masked array": (lambda: metrics.mean_iou(np.ma.array(PAIRS, mask=PAIRS), PAIRS, 2), "prediction is ", "array"),
        "two ids of no class": (lambda: count_outsiders(3, 7), "2 mask pixels ", "0..2", "found: [3, 7", "255"),
        "negative ids": (lambda: count_outsiders(-1), "1 mask pixels ", "0..2", "found: [-1", "255"),
        "ids above a byte": (lambda: count_outsiders(256), "1 mask pixels ", "0..2", "found: [256", "255"),
        "ids of int32": (lambda: ConfusionMatrix(3).update(IDS, IDS.int() + 7), "16 mask pixels hold ids outside 0..2"),
        "no class at all": (lambda: ConfusionMatrix(0), "num_classes=0: give a whole number of at least 1"),
        **{
            f"{key}={value!r}": (partial(ConfusionMatrix, 2, **{key: value}), f"{key}=")
            for key in ("ignore_index", "background")
            for value in (1.0, True, "1")
        },
        "background below 0": (lambda: ConfusionMatrix(2, background=-1), "background=-1"),
        "background of K": (lambda: ConfusionMatrix(2, background=2), "background=2"),
        "ignore_index of None": (lambda: ConfusionMatrix(2, ignore_index=None), "ignore_index=None"),
        "ids of another size": (lambda: count(PAIRS[:1], PAIRS), "x: ", "[1, 4]", "[4, 4]"),
        "probabilities": (lambda: count(PAIRS * 0.7, PAIRS), "x: ", "float64"),
        "negative labels": (lambda: count(PAIRS, PAIRS.astype(int) - 1), "x: ", "holds -1"),
        "layers of bytes": (lambda: count(LAYERS * 255, LAYERS, 1), "holds 255"),
        "labels of 7": (lambda: count(LAYERS, LAYERS * 7, 1), "holds 7"),
        "more layers": (lambda: count(LAYERS.repeat(2, 0), LAYERS, 1), "[2, 4, 4]", "[1, 4, 4]"),
        "more classes than layers": (lambda: count(LAYERS, LAYERS, 2), "1 layers", "2"),
        "layers of a metric": (lambda: count(LAYERS * 255, LAYERS, 1, LayerMetric(BoundaryIoU())), "holds 255"),
        "ratio above 1": (lambda: BoundaryIoU(2), "=2 is"),
        "no ratio": (lambda: BoundaryIoU(0), "=0 is"),
        "negative tolerance": (lambda: SurfaceDice(-1), "=-1 is"),
        "classes of clDice": (lambda: ClDice(classes=[1, 4]).check_classes(4), "classes=[1, 4]", "from 0 to 3"),
        "no classes of clDice": (lambda: ClDice(classes=[]), "classes=[]: name at least one"),
        "an unknown class": (lambda: count(PAIRS, PAIRS, metric=ClDice([1, 2])), "classes=[1, 2]", "from 0 to 1"),
        "classes of layers": (lambda: ClDice(classes=[0]).check_classes(4, has_layers=True), "classes=[0]: each class"),
        "no images": (lambda: MeanIoU().score([]), "counts", "at least one image"),
        "one score twice": (lambda: check_score_names([SurfaceDice(), SurfaceDice(0)]), "the score nsd of SurfaceDice"),
        "a score of every evaluation": (lambda: check_score_names([MeanIoU()]), "the score miou of MeanIoU"),
        "infinite images without a mean": (lambda: check_score_names([NO_MEAN]), "area_error_finite_mean"),
    }
)

test_function_names_arrays_that_it_cannot_use = refusals(
    {
        "predicted ids of 5": (lambda: ConfusionMatrix(3).update(IDS + 5, IDS), "16 predicted ids"),
        "masks of another size": (lambda: ConfusionMatrix(2).update(PAIRS, PAIRS[:2]), "mask (2, 4) differ"),
        "predicted floats": (lambda: ConfusionMatrix(2).update(IDS.float(), IDS), "prediction is torch.float32"),
        "masks of booleans": (lambda: ConfusionMatrix(2).update(IDS, IDS.bool()), "mask is torch.bool"),
        "merge of other classes": (lambda: ConfusionMatrix(2).merge(ConfusionMatrix(3)), "Cannot merge 3 classes"),
        "void of another size": (
            lambda: metrics.region_and_boundary(IDS, IDS, 1, void=IDS[:, :1]),
            "void has the shape [4, 1]",
            "[4, 4]",
        ),
        "no logits": (lambda: fit_temperature(np.zeros((0, 3)), np.zeros(0, int)), "two classes"),
        "logits of one class": (lambda: fit_temperature(np.zeros((4, 1)), np.zeros(4, int)), "two classes"),
        "segments of two sizes": (lambda: contingency(PAIRS, PAIRS[:2]), "must be equal"),
        "negative segments": (lambda: contingency(PAIRS, PAIRS.astype(int) - 1), "negative"),
        "objects of two sizes": (lambda: pair_scores(PAIRS, PAIRS[:, 1:], 1, 1), "(4, 4) and prediction (4, 3)"),
        "objects of a stack": (lambda: pair_scores(LAYERS, LAYERS, 1, 1), "of one size"),
        "surfaces of two sizes": (lambda: surface_dices(PAIRS, PAIRS[:2], [1], 1), "(4, 4)", "(2, 4)"),
        "bands of two sizes": (lambda: boundary_ious(PAIRS, PAIRS[:2], [1]), "(4, 4)", "(2, 4)"),
    },
    error=ValueError,
)


@pytest.mark.parametrize("metric", [BoundaryIoU(), SurfaceDice(), metrics.CalibrationError(), ClDice()])
def test_every_metric_refuses_labels_of_no_class(metric):
    assert_refused(lambda: count(PAIRS, PAIRS * 7, metric=metric), "x: ", "holds 7")
