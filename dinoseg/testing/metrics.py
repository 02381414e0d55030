"""Check of the metric contract, in the manner of scikit-learn's `check_estimator`."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from dinoseg.core.metric import (
    BETTER,
    BINS,
    INFINITE_IMAGES,
    Counts,
    LabelledImage,
    Metric,
    PredictedImage,
    check_forms,
    check_infinite_scores,
    count_image,
    explain_infinite_scores,
    sum_counts,
)
from dinoseg.utils.errors import UserError

_SHAPES = ((17, 23), (1, 1), (1, 40), (31, 2), (8, 8))  # odd sizes, a single pixel, single rows and columns
_IGNORED = 255
_DTYPES = (np.int64, np.float64)


def check_metric(metric: Metric, num_classes: int = 5, seed: int = 0) -> None:
    """Check that a metric keeps the contract of `Metric` on random images, among them ugly ones.

    It needs named scores, counts of equal names and shapes, the same counts when it is called again, scores of sums
    that are vectorised over leading axes, and values in 0..1 unless they are `unbounded`. Ignored pixels must neither
    count as correct or wrong nor enlarge a denominator. An image without other pixels must have counts of 0, and scores
    of such counts must be nan.

    Args:
        metric: the metric.
        num_classes: K of the images.
        seed: of the images.

    Raises:
        AssertionError: a rule is broken; the message names it.

    Examples:
        >>> from dinoseg.metrics import BoundaryIoU
        >>> from dinoseg.testing import check_metric
        >>> check_metric(BoundaryIoU(ratio=0.05))
    """
    assert isinstance(metric, Metric), f"{type(metric).__name__} must inherit dinoseg.core.metric.Metric"
    _check_names(metric)
    for classes in (num_classes, 1):
        images = list(_images(classes, metric, np.random.default_rng(seed)))
        try:
            rows = [count_image(metric, *image) for image in images]
            check_forms(metric, rows, [f"{labels.mask.shape}" for _, labels in images])
        except UserError as error:
            raise AssertionError(str(error)) from error
        _check_counts(metric, images, rows)
        _check_scores(metric, rows, classes)
        _check_ignored(metric, classes, np.random.default_rng(seed))


def _check_names(metric: Metric) -> None:
    scores = metric.scores
    assert scores and all(isinstance(name, str) for name in scores), f"scores={scores} must name at least one score"
    wrong = {name: better for name, better in scores.items() if better not in BETTER}
    assert not wrong, f"scores={wrong} must hold for each score one of {BETTER}"
    assert set(metric.unbounded) <= set(scores), f"unbounded={metric.unbounded} must be names of scores"
    assert set(metric.totals) <= set(metric.unbounded), f"totals={metric.totals} must be names of `unbounded` scores"
    try:
        check_infinite_scores(metric)
    except UserError as error:
        raise AssertionError(str(error)) from error


def _check_counts(metric: Metric, images: list[tuple[PredictedImage, LabelledImage]], rows: list[Counts]) -> None:
    for (prediction, sample), row in zip(images, rows, strict=True):
        for name, value in row.items():
            assert value.dtype in _DTYPES, f"counts[{name!r}] is {value.dtype}; it must be int64 or float64"
        again = metric.count(prediction, sample)
        assert _are_equal(row, again), "counts of an image must be the same when it is counted again: keep no state"
        is_void = (sample.mask == _IGNORED).all()
        assert not (is_void and any(value.any() for value in row.values())), (
            f"counts of an image without labelled pixels are {dict(row)}; they must be 0"
        )
        other = np.where(sample.mask == _IGNORED, 0, prediction.ids).astype(prediction.ids.dtype)
        assert _are_equal(row, metric.count(prediction._replace(ids=other), sample)), "ignored pixels must not count"


def _check_ignored(metric: Metric, num_classes: int, rng: np.random.Generator) -> None:
    """Check that an image scores as its labelled half does, where all pixels are alike: a shape would change."""
    height, width = 16, 24
    half = width // 2
    for label, predicted in product({0, num_classes - 1}, repeat=2):
        whole = np.full((height, width), label), np.full((height, width), predicted)
        prediction, sample = _pair(*whole, num_classes, metric, rng)
        logits = None if prediction.logits is None else prediction.logits[..., : len(range(half)[prediction.places[1]])]
        bins = None if prediction.bins is None else prediction.bins[..., :half]
        cut = prediction._replace(ids=prediction.ids[:, :half], logits=logits, bins=bins)
        expected = metric.score([metric.count(cut, replace(sample, mask=sample.mask[:, :half]))])
        hidden = np.where(np.arange(width) < half, sample.mask, _IGNORED).astype(sample.mask.dtype)
        found = metric.score([metric.count(prediction, replace(sample, mask=hidden))])
        for name, value in found.items():
            assert _are_close(value, expected[name]), (
                f"{name}={value} of an image whose right half is ignored must be the {expected[name]} of its left "
                "half: ignored pixels must not count, nor enlarge a denominator"
            )


def _check_scores(metric: Metric, rows: list[Counts], num_classes: int) -> None:
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    total = sum_counts(rows)
    nothing = {name: value * 0 for name, value in total.items()}
    for sums, shape in ((total, ()), (stacked, (len(rows),)), (nothing, ())):
        found = metric.compute(sums)
        assert list(found) == list(metric.scores), f"compute gives {list(found)}, and scores are {list(metric.scores)}"
        for name, values in found.items():
            values = np.asarray(values)
            assert values.shape == shape, f"{name} has the shape {values.shape} for sums (..., *shape) with {shape}"
            defined = values[~np.isnan(values)]
            is_finite = not np.isinf(defined).any() or f"{name}{INFINITE_IMAGES}" in metric.scores
            assert is_finite, (
                f"{name} is infinite: return nan where it is undefined, or {explain_infinite_scores(name)}"
            )
            is_share = name in metric.unbounded or ((defined >= -1e-9) & (defined <= 1 + 1e-9)).all()
            assert is_share, f"{name}={defined} must lie in 0..1; else name it in `unbounded`"
        for name, values in metric.per_class(sums).items():
            expected = (*shape, num_classes)
            assert values.shape == expected, f"per_class[{name!r}] has the shape {values.shape} instead of {expected}"
    for name, score in metric.compute(nothing).items():
        is_undefined = np.isnan(score) or name in metric.totals
        assert is_undefined, f"{name}={score} of counts of 0 must be nan: no image has anything to count"
    each = [metric.compute(row) for row in rows]
    for name, values in metric.compute(stacked).items():
        alone = [one[name] for one in each]
        np.testing.assert_allclose(values, alone, rtol=1e-12, err_msg=f"{name} must be vectorised over images")
    halves = [sum_counts(rows[:3]), sum_counts(rows[3:])]
    for name, value in metric.score(halves).items():
        whole = metric.score(rows)[name]
        assert _are_close(value, whole), f"{name}={value} of two parts of the images must be the {whole} of all images"


def _images(
    num_classes: int, metric: Metric, rng: np.random.Generator
) -> Iterator[tuple[PredictedImage, LabelledImage]]:
    """Yield predictions and labels: random ones of odd sizes, all ignored, all wrong, all correct, a single pixel."""
    first, last = 0, num_classes - 1
    for shape in _SHAPES:
        mask = rng.integers(0, num_classes, shape)
        holes = np.where(rng.random(shape) < 0.3, _IGNORED, mask)
        ids = rng.integers(0, num_classes, shape)
        single = np.full(shape, first)
        single[0, 0] = last  # shares of the reference's area are above 1 where all of it is predicted
        masks = (holes, np.full(shape, _IGNORED), np.full(shape, first), mask, single)
        predictions = (ids, ids, np.full(shape, last), mask, np.full(shape, last))
        for labels, predicted in zip(masks, predictions, strict=True):
            yield _pair(labels, predicted, num_classes, metric, rng)


def _pair(
    mask: np.ndarray, ids: np.ndarray, num_classes: int, metric: Metric, rng: np.random.Generator
) -> tuple[PredictedImage, LabelledImage]:
    arrays: list[np.ndarray] = [mask.astype(np.uint8), ids.astype(np.uint8)]
    places = (slice(0, None, 2), slice(0, None, 3))
    logits = None
    bins = None
    if metric.needs_bins:
        bins = rng.integers(0, BINS, (num_classes, *mask.shape)).astype(np.int16)
        arrays.append(bins)
    if metric.needs_logits:
        logits = rng.normal(size=(num_classes, *mask[places].shape)).astype(np.float32)
        arrays.append(logits)
    for array in arrays:
        array.setflags(write=False)  # a metric must not change what others read
    return PredictedImage(arrays[1], logits, places, bins), LabelledImage(arrays[0], num_classes, _IGNORED, "image")


def _are_close(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool(np.isclose(first, second, rtol=1e-12))


def _are_equal(first: Counts, second: Counts) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
