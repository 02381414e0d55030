"""Scores of tracks over videos: HOTA with its parts (Luiten et al., IJCV 2021), and AP of whole tracks; no torch.

The counts of HOTA add up over videos. Rules and rounding are those of TrackEval (`trackeval/metrics/hota.py`): a best
assignment of equal scores depends on the last bit.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dinoseg.core.metric import Counts
from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.scoring.average_precision import InstanceAveragePrecision, count_instances, find_ious
from dinoseg.extensions.tracks.files import VideoTracks
from dinoseg.metrics.counts import mean_defined

ALPHAS = np.arange(0.05, 0.99, 0.05)  # IoU from which a pair matches; as TrackEval rounds them
NAMES = ("HOTA", "DetA", "AssA", "LocA", "DetRe", "DetPr", "AssRe", "AssPr")
POOLED = "_pooled"  # suffix of scores of the counts of all classes together
_EPSILON = np.finfo(float).eps
_MATCHED = 0.5  # IoU from which a prediction in an ignored region counts
_TINY = 1e-10  # makes LocA 1 without a match, as in TrackEval
# inclusive on both sides: a track of exactly 128 x 128 pixels is small and medium
AREAS = np.array([(0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10)])


class FramePairs(NamedTuple):
    """Masks of one class in a frame: ids (G,) and (D,) of both sides, and their IoU (G, D)."""

    reference: np.ndarray
    prediction: np.ndarray
    iou: np.ndarray


class TrackScores(InstanceAveragePrecision):
    """HOTA and its parts, as means over the classes and of all classes together, and AP of whole tracks.

    Each score is a mean over the classes that occur; nan without any. HOTA and its parts are means over 19 alphas.

    Args:
        num_classes: K.
    """

    scores = dict.fromkeys((*NAMES, *(f"{name}{POOLED}" for name in NAMES), *InstanceAveragePrecision.scores), "max")

    def count_video(self, video: VideoTracks) -> Counts:
        """Return the counts and rows of a video."""
        none = Objects.of_runs((0, 0), (), ())
        rows = count_instances(*(video.scored or (none, none)), AREAS, is_crowd_iou=True)
        return {**rows, "tracks": count_tracks(video, self.num_classes)[None]}

    def score_rows(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return each score over videos."""
        return {**_score_means(_sum_tracks(rows)), **super().score_rows(rows)}

    def score_classes(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return the scores (K,) of each class, and numbers of annotated and predicted masks."""
        counts = _sum_tracks(rows)
        found = super().score_classes(rows)
        masks, predicted = (counts[:, 0, 0] + counts[:, 1:3, 0].T).astype(np.int64)
        ap = {name: found[name] for name in InstanceAveragePrecision.scores}
        return {**_score_defined(counts), **ap, "masks": masks, "predicted_masks": predicted}

    def leave_one_out(self, rows: Sequence[Counts], units: Sequence[int]) -> dict[str, np.ndarray]:
        """Return each score (U,) without each unit."""
        parts = np.concatenate([row["tracks"] for row in rows])
        rest = np.repeat(parts.sum(axis=0)[None], max(units, default=-1) + 1, axis=0)
        np.subtract.at(rest, np.asarray(units), parts)
        return {**_score_means(rest), **super().leave_one_out(rows, units)}

    def has_counts(self, row: Counts) -> bool:
        """Return whether a video has a track."""
        return bool(_has_tracks(row["tracks"]).any() or len(row["labels"]) or len(row["classes"]))


def _sum_tracks(rows: Sequence[Counts]) -> np.ndarray:
    """Return the counts (K, 7, 19) over videos."""
    return np.concatenate([row["tracks"] for row in rows]).sum(axis=0)


def _score_defined(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return HOTA and its parts (...) as means over alphas, from counts (..., 7, 19); nan without a track."""
    occurs = _has_tracks(counts)
    return {name: np.where(occurs, values.mean(axis=-1), np.nan) for name, values in score_tracks(counts).items()}


def _score_means(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores (...) over classes, from counts (..., K, 7, 19)."""
    means = {name: mean_defined(values) for name, values in _score_defined(counts).items()}
    pooled = _score_defined(counts.sum(axis=-3))
    return {**means, **{f"{name}{POOLED}": values for name, values in pooled.items()}}


def count_tracks(video: VideoTracks, num_classes: int) -> np.ndarray:
    """Return the counts (K, 7, 19) of a video, see `_count_class`."""
    frames: list[list[FramePairs]] = [[] for _ in range(num_classes)]
    sides = [_group(side.frames * num_classes + side.objects.classes) for side in (video.reference, video.prediction)]
    nothing = np.zeros(0, np.int64)
    for key in sorted({*sides[0], *sides[1]}):
        rows, columns = (side.get(key, nothing) for side in sides)
        held, found = video.reference.select(rows), video.prediction.select(columns)
        # transposed in memory, too: sums must be rounded as in TrackEval
        iou = find_ious(held.objects, found.objects, np.zeros(len(rows), bool)).T.copy()
        is_counted = ~video.is_ignored[columns]
        if not is_counted.all():
            pairs = _assign(np.where(iou < _MATCHED - _EPSILON, -10000, iou))
            is_counted[pairs[1][iou[pairs] >= _MATCHED - _EPSILON]] = True
        frames[key % num_classes].append(FramePairs(held.ids, found.ids[is_counted], iou[:, is_counted]))
    counts = np.zeros((num_classes, 7, len(ALPHAS)))
    for label, each in enumerate(frames):
        if each:
            counts[label] = _count_class(each)
    return counts


def _group(keys: np.ndarray) -> dict[int, np.ndarray]:
    """Return the places of each key (N,), in their order."""
    order = np.argsort(keys, kind="stable")
    values, starts = np.unique(keys[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=False))


def _assign(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment  # lazy: most of a worker's imports

    return linear_sum_assignment(scores, maximize=True)


def _count_class(frames: Sequence[FramePairs]) -> np.ndarray:
    """Return the counts (7, 19) of one class of a video by alpha.

    They are matches, misses (annotations without a match), false positives, and sums over the matches: of the
    association's accuracy, recall and precision, and of the IoU.
    """
    held, held_frames = _number(frame.reference for frame in frames)
    predicted, predicted_frames = _number(frame.prediction for frame in frames)
    # all pairs of all frames in a row, with the pair of tracks that each belongs to
    width = len(predicted_frames)
    codes = [(one[:, None] * width + two).ravel() for one, two in zip(held, predicted, strict=True)]
    pairs, owners = np.unique(np.concatenate(codes), return_inverse=True)
    iou = np.concatenate([frame.iou.ravel() for frame in frames])
    jaccard = np.concatenate([_find_jaccard(frame.iou).ravel() for frame in frames])
    potential = np.bincount(owners, jaccard, len(pairs))
    lengths = held_frames[pairs // max(width, 1)], predicted_frames[pairs % max(width, 1)]
    both = lengths[0] + lengths[1]
    scores = (potential / (both - potential))[owners] * iou
    places = [np.zeros(0, np.int64)]
    starts = np.cumsum([0, *(frame.iou.size for frame in frames)])
    for frame, start, end in zip(frames, starts, starts[1:], strict=False):
        rows, columns = _assign(scores[start:end].reshape(frame.iou.shape))
        places.append(start + rows * frame.iou.shape[1] + columns)
    matched = np.concatenate(places)
    is_match = iou[matched, None] >= ALPHAS - _EPSILON  # (M, 19)
    matches = np.zeros((len(pairs), len(ALPHAS)))
    np.add.at(matches, owners[matched], is_match)
    wholes = [both[:, None] - matches, *(length[:, None] for length in lengths)]
    associations = [(matches * (matches / whole)).sum(axis=0) for whole in wholes]
    located = (iou[matched, None] * is_match).sum(axis=0)
    hits = is_match.sum(axis=0)
    return np.stack([hits, held_frames.sum() - hits, predicted_frames.sum() - hits, *associations, located])


def _number(frames: Iterable[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return ids of frames as numbers 0..n-1, and how many frames (n,) each has."""
    parts = [*frames]
    _, numbers, counts = np.unique(np.concatenate(parts), return_inverse=True, return_counts=True)
    return np.split(numbers, np.cumsum([len(part) for part in parts])[:-1]), counts


def _find_jaccard(iou: np.ndarray) -> np.ndarray:
    """Return the IoU (G, D) of each pair divided by what both have with all others."""
    whole = iou.sum(0)[None] + iou.sum(1)[:, None] - iou
    return np.divide(iou, whole, out=np.zeros_like(iou), where=whole > _EPSILON)


def score_tracks(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return HOTA and its parts (..., 19) by alpha from counts (..., 7, 19)."""
    hits, misses, invented, accuracy, recall, precision, located = np.moveaxis(counts, -2, 0)
    detection = hits / np.maximum(1, hits + misses + invented)
    association = accuracy / np.maximum(1, hits)
    values = (
        np.sqrt(detection * association),
        detection,
        association,
        np.maximum(_TINY, located) / np.maximum(_TINY, hits),
        hits / np.maximum(1, hits + misses),
        hits / np.maximum(1, hits + invented),
        recall / np.maximum(1, hits),
        precision / np.maximum(1, hits),
    )
    return dict(zip(NAMES, values, strict=True))


def _has_tracks(counts: np.ndarray) -> np.ndarray:
    """Return whether a track of counts (..., 7, 19) is annotated or predicted, (...) bool."""
    return np.asarray(counts[..., :3, :].any(axis=(-2, -1)))
