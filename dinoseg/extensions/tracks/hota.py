"""Higher order tracking accuracy (Luiten et al., IJCV 2021), in memory linear in the pairs of masks; no torch.

The counts of a video and class add up over videos, and over classes. The rules and the rounding are those of TrackEval
(`trackeval/metrics/hota.py`): a best assignment of equal scores depends on the last bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dinoseg.core.objects import RunLengths
from dinoseg.extensions.objects.overlaps import overlaps
from dinoseg.extensions.tracks.video import VideoTracks

ALPHAS = np.arange(0.05, 0.99, 0.05)  # IoU from which a pair matches; as TrackEval rounds them
NAMES = ("HOTA", "DetA", "AssA", "LocA", "DetRe", "DetPr", "AssRe", "AssPr")
COUNTS = 7  # see `count_class`
_EPSILON = np.finfo(float).eps
_MATCHED = 0.5  # IoU from which an ignored region does not remove a prediction, and share of it above which it does
_TINY = 1e-10  # makes LocA 1 without a match, as in TrackEval


class FramePairs(NamedTuple):
    """Masks of one class in a frame: ids (G,) and (D,) of both sides, and their IoU (G, D)."""

    reference: np.ndarray
    prediction: np.ndarray
    iou: np.ndarray


def count_tracks(video: VideoTracks, num_classes: int) -> np.ndarray:
    """Return the counts (K, 7, 19) of a video, see `count_class`."""
    counts = np.zeros((num_classes, COUNTS, len(ALPHAS)))
    for label, frames in _compare_frames(video).items():
        counts[label] = count_class(frames)
    return counts


def _compare_frames(video: VideoTracks) -> dict[int, list[FramePairs]]:
    """Return the masks of each frame by class, without predictions that do not count."""
    found: dict[int, list[FramePairs]] = {}
    reference, prediction = video.reference, video.prediction
    for frame in np.union1d(reference.frames, prediction.frames).tolist():
        rows, columns = reference.find_frame(frame), prediction.find_frame(frame)
        iou = _find_ious(reference.masks[rows], prediction.masks[columns])
        labels = reference.classes[rows], prediction.classes[columns]
        for label in np.union1d(*labels).tolist():
            held, predicted = (np.flatnonzero(side == label) for side in labels)
            shares = iou[np.ix_(held, predicted)]
            if frame in video.ignored:
                masks = [prediction.masks[columns.start + place] for place in predicted.tolist()]
                counted = _find_counted(shares, masks, video.ignored[frame])
                predicted, shares = predicted[counted], shares[:, counted]
            ids = reference.ids[rows][held], prediction.ids[columns][predicted]
            found.setdefault(label, []).append(FramePairs(*ids, shares))
    return found


def _find_ious(reference: Sequence[RunLengths], prediction: Sequence[RunLengths]) -> np.ndarray:
    """Return the IoU (G, D) of each pair of masks; 0 of two empty ones."""
    common = overlaps(reference, prediction)
    held, predicted = (np.array([mask.area for mask in side], np.int64) for side in (reference, prediction))
    return common / np.maximum(held[:, None] + predicted - common, 1)


def _find_counted(iou: np.ndarray, masks: Sequence[RunLengths], ignored: RunLengths) -> np.ndarray:
    """Return the places of predictions that match an annotation, or lie to at most half in an ignored region."""
    inside = overlaps(masks, [ignored])[:, 0] / np.maximum([mask.area for mask in masks], 1)
    counted = inside <= _MATCHED + _EPSILON
    rows, columns = _assign(np.where(iou < _MATCHED - _EPSILON, -10000, iou))
    counted[columns[iou[rows, columns] >= _MATCHED - _EPSILON]] = True
    return np.flatnonzero(counted)


def _assign(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment  # lazy: most of a worker's imports

    return linear_sum_assignment(scores, maximize=True)


def count_class(frames: Sequence[FramePairs]) -> np.ndarray:
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


def score_tracks(counts: np.ndarray) -> Mapping[str, np.ndarray]:
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


def has_tracks(counts: np.ndarray) -> np.ndarray:
    """Return whether a track of counts (..., 7, 19) is annotated or predicted, (...) bool."""
    return counts[..., :3, :].any(axis=(-2, -1))
