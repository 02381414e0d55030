"""Scores of tracks over videos: HOTA with its parts, and track AP; no torch."""

from collections.abc import Sequence

import numpy as np

from dinoseg.core.metric import Counts
from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.scoring.average_precision import InstanceAveragePrecision, count_instances
from dinoseg.extensions.tracks.hota import NAMES, count_tracks, has_tracks, score_tracks
from dinoseg.extensions.tracks.video import VideoTracks
from dinoseg.metrics.counts import mean_defined

POOLED = "_pooled"  # suffix of scores of the counts of all classes together
_HIGHEST = 1e5**2
# inclusive on both sides: a track of exactly 128 x 128 pixels is small and medium
AREAS = np.array([(0, _HIGHEST), (0, 128**2), (128**2, 256**2), (256**2, _HIGHEST)])
_NONE = Objects.of_runs((0, 0), (), ())


class TrackScores(InstanceAveragePrecision):
    """HOTA and its parts, as means over the classes and of all classes together, and AP of whole tracks.

    Each score is a mean over the classes that occur; nan without any. HOTA and its parts are means over 19 alphas.

    Args:
        num_classes: K.
    """

    scores = dict.fromkeys((*NAMES, *(f"{name}{POOLED}" for name in NAMES), *InstanceAveragePrecision.scores), "max")

    def count_video(self, video: VideoTracks) -> Counts:
        """Return the counts and rows of a video."""
        scored = video.scored or (_NONE, _NONE)
        rows = count_instances(*scored, AREAS, is_crowd_iou=True)
        return {**rows, "tracks": count_tracks(video, self.num_classes)[None]}

    def score_rows(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return each score over videos."""
        return {**_score_means(_sum_tracks(rows)), **super().score_rows(rows)}

    def score_classes(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return the scores (K,) of each class, and numbers of annotated and predicted masks."""
        counts = _sum_tracks(rows)
        found = super().score_classes(rows)
        hits, misses, invented = counts[:, :3, 0].T.astype(np.int64)
        numbers = {"masks": hits + misses, "predicted_masks": hits + invented}
        return {**_score_defined(counts), **{name: found[name] for name in InstanceAveragePrecision.scores}, **numbers}

    def leave_one_out(self, rows: Sequence[Counts], units: Sequence[int]) -> dict[str, np.ndarray]:
        """Return each score (U,) without each unit."""
        parts = np.concatenate([row["tracks"] for row in rows])
        rest = np.repeat(parts.sum(axis=0)[None], max(units, default=-1) + 1, axis=0)
        np.subtract.at(rest, np.asarray(units), parts)
        return {**_score_means(rest), **super().leave_one_out(rows, units)}

    def has_counts(self, row: Counts) -> bool:
        """Return whether a video has a track."""
        return bool(has_tracks(row["tracks"]).any() or len(row["labels"]) or len(row["classes"]))


def _sum_tracks(rows: Sequence[Counts]) -> np.ndarray:
    """Return the counts (K, 7, 19) over videos."""
    return np.concatenate([row["tracks"] for row in rows]).sum(axis=0)


def _score_defined(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return HOTA and its parts (...) as means over alphas, from counts (..., 7, 19); nan without a track."""
    occurs = has_tracks(counts)
    return {name: np.where(occurs, values.mean(axis=-1), np.nan) for name, values in score_tracks(counts).items()}


def _score_means(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores (...) over classes, from counts (..., K, 7, 19)."""
    means = {name: mean_defined(values) for name, values in _score_defined(counts).items()}
    pooled = _score_defined(counts.sum(axis=-3))
    return {**means, **{f"{name}{POOLED}": values for name, values in pooled.items()}}
