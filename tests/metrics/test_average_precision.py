"""Average precision: equal to a plain count over pixels on drawn cases, and to decisions at each bin's edge."""

import numpy as np
import pytest
import torch
from plain_precision import plain_average_precision

from dinoseg.core.metric import BINS, LabelledImage, PredictedImage, sum_counts
from dinoseg.core.task import MultilabelTask, probability_bins
from dinoseg.evaluation.scoring.intervals import jackknife, unit_sums
from dinoseg.evaluation.unit_scores import further_scores, leave_units_out, metric_intervals
from dinoseg.metrics import AveragePrecision
from dinoseg.testing import check_metric

METRIC = AveragePrecision()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw_probabilities(rng, shape):
    """Return probabilities with ties, exact 0 and 1, edges of bins and their neighbours, in any precision."""
    kind = rng.integers(0, 5)
    if kind == 0:
        drawn = np.full(shape, rng.choice([0.0, 0.5, 1.0, rng.random()]))
    elif kind == 1:
        drawn = rng.choice([0.0, 1.0, 0.3], shape)
    elif kind == 2:
        drawn = rng.integers(0, BINS + 1, shape) / BINS
    elif kind == 3:
        edges = (rng.integers(0, BINS, shape) / BINS).astype(np.float32)
        drawn = np.clip(np.nextafter(edges, rng.choice([-1, 2], shape).astype(np.float32)), 0, 1)
    else:
        drawn = rng.random(shape) ** rng.choice([1, 8])
    return torch.from_numpy(np.asarray(drawn)).to(DTYPES[rng.integers(0, 4)])


def draw_case(seed):
    """Return 1 to 3 images of layers: probabilities (K, H, W) and masks of 0, 1 and 255, some absent or ignored."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 5))
    images = []
    for _ in range(rng.integers(1, 4)):
        shape = (num_classes, *rng.integers(1, 12, 2)) if rng.random() < 0.9 else (num_classes, 1, 1)
        mask = (rng.random(shape) < rng.choice([0.02, 0.5, 0.98])).astype(np.uint8)
        mask[rng.random(shape) < rng.choice([0, 0.3])] = 255
        if rng.random() < 0.2:
            mask[rng.integers(0, num_classes)] = rng.choice([0, 1, 255])
        images.append((draw_probabilities(rng, shape), mask))
    return images


def count_layers(images):
    """Return the counts of images of layers."""
    rows = []
    for probabilities, mask in images:
        bins = probability_bins(probabilities).numpy()
        prediction = PredictedImage(np.zeros_like(mask), bins=bins)
        rows.append(METRIC.count(prediction, LabelledImage(mask, len(mask))))
    return rows


def pool_class(images, label):
    """Return the lower edges of the bins and the labels of all labelled pixels of a class."""
    scores, labels = [], []
    for probabilities, mask in images:
        known = mask[label] != 255
        edges = np.minimum(np.floor(probabilities[label].double().numpy() * BINS), BINS - 1) / BINS
        scores += edges[known].tolist()
        labels += (mask[label][known] == 1).astype(int).tolist()
    return scores, labels


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_scores_equal_a_plain_count(start):
    for seed in range(start, start + 50):
        images = draw_case(seed)
        sums = sum_counts(count_layers(images))
        wanted = [plain_average_precision(*pool_class(images, label)) for label in range(len(images[0][1]))]
        found = METRIC.per_class(sums)["average_precision"].tolist()
        defined = [value for value in wanted if value is not None]
        for ours, theirs in zip(found, wanted, strict=True):
            assert np.isnan(ours) if theirs is None else ours == pytest.approx(theirs, abs=1e-12)
        mean = METRIC.score(count_layers(images))["average_precision"]
        assert mean is None if not defined else mean == pytest.approx(np.mean(defined), abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decisions_agree_with_bins_at_each_edge(dtype):
    edges = torch.arange(BINS + 1, dtype=torch.float64) / BINS
    near = [edges.to(dtype), *(torch.nextafter(edges.to(dtype), torch.tensor(end, dtype=dtype)) for end in (-1, 2))]
    probabilities = torch.cat([*near, torch.rand(500).to(dtype)]).clamp(0, 1).view(1, 1, 1, -1)
    bins = probability_bins(probabilities)
    assert bins.min() == 0 and bins.max() == BINS - 1
    for level in range(1, BINS):
        decided = MultilabelTask(1, level / BINS).decide(probabilities)
        assert torch.equal(decided.bool(), bins >= level)


@pytest.mark.parametrize("ignored", [255, 1])  # the second is a class
def test_semantic_classes_are_scored_one_against_the_others(ignored):
    check_metric(METRIC)
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (9, 7)).astype(np.uint8)
    mask[:2] = ignored
    shares = torch.from_numpy(rng.random((3, 9, 7))).softmax(dim=0)
    prediction = PredictedImage(shares.argmax(dim=0).numpy(), bins=probability_bins(shares).numpy())
    layers = np.where(mask == ignored, 255, mask == np.arange(4)[:3, None, None]).astype(np.uint8)
    found = METRIC.score([METRIC.count(prediction, LabelledImage(mask, 3, ignored))])
    assert found == METRIC.score(count_layers([(shares, layers)]))


class FlatSums:
    """The metric as a function of flat sums (..., d) of three classes."""

    keys = ("average_precision",)
    unbounded = ()
    highest = {}

    def scores(self, sums):
        return METRIC.compute(
            dict(
                zip(
                    ("positives", "totals"),
                    np.moveaxis(sums.reshape(*sums.shape[:-1], 2, -1, BINS), -3, 0),
                    strict=True,
                )
            )
        )


def test_intervals_leave_out_units_as_one_block_does():
    rows = [row for seed in range(60) for row in count_layers([case for case in draw_case(seed) if len(case[1]) == 2])]
    units = [f"video {number % 9}" for number in range(len(rows))]
    assert len(rows) > 12
    sums = unit_sums(np.stack([np.stack([*row.values()]) for row in rows]), units)
    wanted = jackknife(FlatSums(), sums)["average_precision"]
    assert metric_intervals(METRIC, leave_units_out(METRIC, rows, units))["average_precision"] == pytest.approx(
        wanted.ci95, abs=1e-12
    )
    assert further_scores(METRIC, leave_units_out(METRIC, rows, units))["average_precision"].value == pytest.approx(
        wanted.value, abs=1e-12
    )


def test_narrow_counts_of_groups_do_not_overflow():
    counts = {"positives": np.full((1, BINS), 90, np.uint8), "totals": np.full((1, BINS), 200, np.uint8)}
    wide = {name: value.astype(np.int64) for name, value in counts.items()}
    found = [
        further_scores(METRIC, leave_units_out(METRIC, [each] * 4, ["a", "a", "b", "b"])) for each in (counts, wide)
    ]
    assert found[0] == found[1]
