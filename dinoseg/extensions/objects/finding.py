"""Objects of the masks of queries: instances that may overlap, and segments that do not.

Both follow tue-mps/eomt (training/mask_classification_instance.py and `to_per_pixel_preds_panoptic` in
training/lightning_module.py), as does Mask2Former. Masks are upsampled to the size of the image before anything is
decided, a few at a time.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.geometry import upsample
from dinoseg.core.objects import Objects, RunLengths
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32

MAX_INSTANCES = 100  # of an image, over queries and classes: `eval_top_k_instances`
SCORE_THRESHOLD = 0.8  # a segment needs a higher class probability: `mask_thresh`
OVERLAP_THRESHOLD = 0.8  # share of a mask that a segment needs at least: `overlap_thresh`
_EPSILON = 1e-6  # pixels, added to the area by which the mean probability of a mask is divided
_CHUNK = 2**24  # values of masks at full size that are in memory at once


def find_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    valid: tuple[float, float],
    num_classes: int,
    things: Collection[int],
    *,
    max_instances: int = MAX_INSTANCES,
) -> list[Objects]:
    """Return the instances of each image, best first.

    Of all pairs of a query and a class, the `max_instances` with the highest class probability are instances. The mask
    of one is where its logit is above 0, and its score the class probability times the mean probability of the mask
    inside it. Empty masks are left out, and classes that are no things, which count among the `max_instances`.

    Args:
        class_logits: (B, Q, K + 1), the last column means "no object"; (B, Q, K) without it.
        mask_logits: (B, Q, h, w).
        size: (H, W) of the masks to predict.
        valid: share of the height and width of `mask_logits` that the image covers.
        num_classes: K.
        things: class ids.
        max_instances: number of pairs.

    Raises:
        UserError: a logit is not finite.
    """
    _check_finite(class_logits, mask_logits)
    probabilities = at_least_float32(class_logits).softmax(dim=-1)[..., :num_classes]
    found = []
    for shares, logits in zip(probabilities, mask_logits, strict=True):
        best = shares.flatten().sort(descending=True, stable=True)
        pairs = best.indices[:max_instances].tolist()
        kept = [(pair // num_classes, pair % num_classes) for pair in pairs if pair % num_classes in things]
        queries = sorted({query for query, _ in kept})
        masks: dict[int, RunLengths] = {}
        means: dict[int, float] = {}
        for chunk, pixels in _upsample_chunks(logits, queries, size, valid):
            inside = pixels > 0
            sums = (pixels.sigmoid() * inside).sum(dim=(1, 2))
            # integers and a float would add up to torch's default dtype, a setting of the calling program
            areas = inside.sum(dim=(1, 2)).float()
            masks |= zip(chunk, _find_runs(inside), strict=True)
            means |= zip(chunk, (sums / (areas + _EPSILON)).tolist(), strict=True)
        scores = np.array([float(shares[query, label]) * means[query] for query, label in kept])
        objects = Objects.of_runs(size, [masks[query] for query, _ in kept], [label for _, label in kept], scores)
        found.append(objects.sort_by_score())
    return found


def find_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    valid: tuple[float, float],
    num_classes: int,
    things: Collection[int],
    *,
    score_threshold: float = SCORE_THRESHOLD,
    overlap_threshold: float = OVERLAP_THRESHOLD,
) -> list[Objects]:
    """Return the segments of each image, which do not overlap, best first.

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

    Raises:
        UserError: a logit is not finite.
    """
    _check_finite(class_logits, mask_logits)
    best = at_least_float32(class_logits).softmax(dim=-1).max(dim=-1)
    return [
        _find_segments(
            scores.tolist(), classes.tolist(), logits, size, valid, num_classes, things, score_threshold,
            overlap_threshold,
        )
        for scores, classes, logits in zip(best.values, best.indices, mask_logits, strict=True)
    ]  # fmt: skip


def _check_finite(*logits: Tensor) -> None:
    if not all(each.isfinite().all() for each in logits):
        raise UserError(
            "The model returns logits that are not finite, so that objects have no score. Set engine.precision=fp32, "
            "or choose an earlier checkpoint."
        )


def _find_segments(
    scores: Sequence[float],
    classes: Sequence[int],
    logits: Tensor,
    size: tuple[int, int],
    valid: tuple[float, float],
    num_classes: int,
    things: Collection[int],
    score_threshold: float,
    overlap_threshold: float,
) -> Objects:
    queries = [query for query, score in enumerate(scores) if classes[query] < num_classes and score > score_threshold]
    if not queries:
        return Objects.of_runs(size, [], [])
    wide = at_least_float32(logits)
    highest = wide.new_full(size, -1.0)
    winners = torch.full(size, -1, device=logits.device)
    is_inside = torch.zeros(size, dtype=torch.bool, device=logits.device)  # whether a pixel is in its winner's mask
    areas: dict[int, int] = {}
    for chunk, pixels in _upsample_chunks(wide, queries, size, valid):
        for query, probabilities in zip(chunk, pixels.sigmoid(), strict=True):
            inside = probabilities >= 0.5
            # argmax over q of P(class of q) * P(pixel in mask q), as a running maximum: all masks at once would take
            # Q x H x W values
            value = scores[query] * probabilities
            wins = value > highest  # of equal values, the first query's wins
            highest = torch.where(wins, value, highest)
            winners[wins] = query
            is_inside = torch.where(wins, inside, is_inside)
            areas[query] = int(inside.sum())
    won = torch.bincount(winners.flatten(), minlength=len(scores)).tolist()
    kept = [query for query in queries if areas[query] and won[query] / areas[query] >= overlap_threshold]
    merged: dict[tuple[int, int], list[int]] = {}  # of stuff, all queries of a class
    for query in kept:
        label = classes[query]
        merged.setdefault((label, query if label in things else -1), []).append(query)
    masks = []
    for members in merged.values():
        mask = is_inside & torch.isin(winners, torch.tensor(members, device=winners.device))
        masks += _find_runs(mask[None])
    best = np.array([max(scores[query] for query in members) for members in merged.values()])
    return Objects.of_runs(size, masks, [label for label, _ in merged], best).sort_by_score()


def _upsample_chunks(
    logits: Tensor, queries: Sequence[int], size: tuple[int, int], valid: tuple[float, float]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield some of the queries, and their mask logits (n, H, W) at full size."""
    step = _count_masks_at_once(logits.device, size)
    for first in range(0, len(queries), step):
        chunk = queries[first : first + step]
        yield chunk, upsample(logits[None, list(chunk)], size, valid)[0]


def _count_masks_at_once(device: torch.device, size: tuple[int, int]) -> int:
    # a CPU computes the last values of a tensor without vectors, and rounds them differently: alone, a mask and its
    # score do not depend on the number of others, and fit the cache
    return 1 if device.type == "cpu" else max(1, _CHUNK // (size[0] * size[1]))


def _find_runs(masks: Tensor) -> list[RunLengths]:
    """Return the runs of masks (N, H, W) bool, found on their device."""
    flat = torch.nn.functional.pad(masks.transpose(1, 2).flatten(1), (1, 1))
    changes = (flat[:, 1:] != flat[:, :-1]).nonzero().cpu().numpy()
    ends = np.cumsum(np.bincount(changes[:, 0], minlength=len(masks)))
    return [RunLengths(bounds[::2], bounds[1::2]) for bounds in np.split(changes[:, 1], ends[:-1])]
