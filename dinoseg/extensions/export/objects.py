"""Objects of the masks of queries in numpy: what `Task.find_objects` finds, from the outputs of a graph, without torch.

`GraphRuntime` uses it for ONNX files. Other programs can call it with the outputs of their own runtime.
"""

from collections.abc import Collection

import numpy as np

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.core.sizes import Size
from dinoseg.extensions.export.numpy_ops import bilinear_matrix, sigmoid, softmax

MAX_INSTANCES = 100  # of an image, over queries and classes
_EPSILON = 1e-6  # pixels, added to the area of a mask, the divisor of its mean probability


def find_instances(
    class_logits: np.ndarray,
    mask_logits: np.ndarray,
    size: Size,
    valid: tuple[float, float],
    *,
    num_classes: int,
    things: Collection[int],
    max_instances: int = MAX_INSTANCES,
) -> Objects:
    """Return the instances of an image, which may overlap, best first.

    Of all pairs of a query and a class, the `max_instances` with the highest class probability are instances. The mask
    of one is where its logit is above 0, and its score the class probability times the mean probability of the mask
    inside it. Empty masks are left out, and classes that are no things, which count among the `max_instances`.

    Args:
        class_logits: (Q, K + 1), the last column means "no object"; (Q, K) without it.
        mask_logits: (Q, h, w).
        size: (H, W) of the image.
        valid: share of the height and width of `mask_logits` that the image covers; the rest is padding.
        num_classes: K.
        things: class ids.
        max_instances: number of pairs.
    """
    shares = softmax(class_logits.astype(np.float32, copy=False), axis=1)[:, :num_classes]
    pairs = np.argsort(-shares, axis=None, kind="stable")[:max_instances]
    masks: dict[int, RunLengths] = {}
    means: dict[int, float] = {}
    kept = []
    for query, label in zip(*(places.tolist() for places in np.divmod(pairs, num_classes)), strict=True):
        if label not in things:
            continue
        if query not in masks:
            pixels = _upsample(mask_logits[query], size, valid)
            inside = pixels > 0
            masks[query] = RunLengths.of_mask(inside)
            means[query] = float(sigmoid(pixels[inside]).sum() / (inside.sum() + _EPSILON))
        kept.append((query, label))
    scores = np.array([float(shares[query, label]) * means[query] for query, label in kept])
    objects = Objects.of_runs(size, [masks[query] for query, _ in kept], [label for _, label in kept], scores)
    return objects.sort_by_score()


def find_segments(
    class_logits: np.ndarray,
    mask_logits: np.ndarray,
    size: Size,
    valid: tuple[float, float],
    *,
    num_classes: int,
    things: Collection[int],
    score_threshold: float,
    overlap_threshold: float,
) -> Objects:
    """Return the segments of an image, which do not overlap, best first.

    Queries whose most probable class has more than `score_threshold` compete for each pixel by class probability times
    mask probability. A query whose pixels are fewer than `overlap_threshold` of its mask is left out; the others keep
    the pixels with a mask probability of at least 0.5. Segments of one class of stuff become one, of the highest score.

    Args:
        class_logits: as in `find_instances`.
        mask_logits: as in `find_instances`.
        size: as in `find_instances`.
        valid: as in `find_instances`.
        num_classes: K.
        things: class ids; the others are stuff.
        score_threshold: class probability, which is the score of a segment.
        overlap_threshold: number of pixels that a query wins, divided by the number of those in its mask.
    """
    shares = softmax(class_logits.astype(np.float32, copy=False), axis=1)
    classes, scores = (found.tolist() for found in (shares.argmax(axis=1), shares.max(axis=1)))
    queries = [query for query, score in enumerate(scores) if classes[query] < num_classes and score > score_threshold]
    highest = np.full(size, -1, np.float32)
    winners = np.full(size, -1)
    is_inside = np.zeros(size, bool)  # whether a pixel is in its winner's mask
    areas = {}
    for query in queries:
        shown = sigmoid(_upsample(mask_logits[query], size, valid))
        value = np.float32(scores[query]) * shown
        wins = value > highest  # of equal values, the first query's wins
        highest[wins] = value[wins]
        winners[wins] = query
        is_inside[wins] = shown[wins] >= 0.5
        areas[query] = (shown >= 0.5).sum()
    merged: dict[tuple[int, int], list[int]] = {}  # of stuff, all queries of a class
    for query in queries:
        if areas[query] and (winners == query).sum() / areas[query] >= overlap_threshold:
            merged.setdefault((classes[query], query if classes[query] in things else -1), []).append(query)
    masks = [RunLengths.of_mask(is_inside & np.isin(winners, members)) for members in merged.values()]
    best = [max(scores[query] for query in members) for members in merged.values()]
    return Objects.of_runs(size, masks, [label for label, _ in merged], best).sort_by_score()


def _upsample(logits: np.ndarray, size: Size, valid: tuple[float, float]) -> np.ndarray:
    """Return the logits (h, w) of a mask at full size (H, W)."""
    rows, columns = map(bilinear_matrix, size, logits.shape, valid)
    return rows @ logits.astype(np.float32, copy=False) @ columns.T
