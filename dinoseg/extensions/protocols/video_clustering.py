"""Scores of object-centric video models: ARI, FG-ARI and mBO, over whole videos and per frame."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np

from dinoseg.extensions.protocols.clustering import Contingency, Matching, contingency, segment_scores
from dinoseg.extensions.protocols.contract import BadFile, Cases, Measured, ScoringCase, SumProtocol
from dinoseg.extensions.protocols.trees import Tree, extra, read_labels, read_pair
from dinoseg.utils.ranges import Range, check_annotations

BACKGROUND = 0
ObjectId = Annotated[int, Range("an id of at least 1 (0 is the background)", 1)]
MAX_SEGMENTS = 2048  # ids in a video: maps with more are not segments, and the pair table would fill memory
_VIDEO_KEYS = ("ARI", "FG-ARI", "mBO")


class VideoClustering(SumProtocol):
    """Scores of segments whose ids have no meaning across videos; 0 is the reference's background.

    Args:
        ignore: reference id whose pixels do not count, such as 255 for padding; null for none.
        matching: matching of mBO: `overlap`, the best segment of each object, or `hungarian`, one to one.
        labelled_background: whether id 0 is a label. If it is none, FG-ARI leaves out videos without objects.

    Raises:
        UserError: an option is unknown or out of range.
    """

    name = "video_clustering"
    unit = "video"
    keys = (*_VIDEO_KEYS, *(f"{key}_per_frame" for key in _VIDEO_KEYS))
    unbounded = tuple(key for key in keys if "ARI" in key)  # negative if worse than chance
    highest = dict.fromkeys(unbounded, 1.0)

    @check_annotations
    def __init__(
        self, ignore: ObjectId | None = None, matching: Matching = "overlap", labelled_background: bool = True
    ) -> None:
        self.ignore, self.matching = ignore, matching
        self.labelled_background = labelled_background
        self._tree = Tree(layout="<video>/<frame>.png", depth=1)
        best = (
            "its best predicted segment, which may serve several"
            if matching == "overlap"
            else "one segment, one to one"
        )
        self.rules: dict[str, Any] = {
            "absent_class": "a video (or frame) without foreground has FG-ARI 1 and counts, as in SAVi, VideoSAUR and "
            "OCLF; mBO leaves it out; an ARI of 0 / 0 is 1"
            if labelled_background
            else "FG-ARI and mBO leave out a video (or frame) without foreground, as in SlotContrast and VideoSAUR for "
            "data without background labels; an ARI of 0 / 0 is 1",
            "resolution": "as stored; another size than the reference's is an error",
            "ignore": "nothing" if ignore is None else f"pixels of reference id {ignore}",
            "background": "reference id 0: no object, and not in FG-ARI; predicted id 0 is a segment like any other",
            "aggregation": "over all pixels of all frames of a video, mean over videos; _per_frame: each frame by "
            "itself, mean over the frames of all videos",
            "matching": f"mBO is the mean over objects of the IoU with {best}",
            "version": "ARI of Hubert and Arabie (1985) over pixels as in SAVi, VideoSAUR and OCLF; mBO as in OCLF",
            "differs": ["ARI is counted in whole numbers; SAVi counts in float32"],
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each folder of the reference, with its frames in the order of their names."""
        frames = _by_video(self._tree.files(reference, "reference"))
        predicted = self._tree.files(prediction, "prediction")
        listing = Cases([])
        for video, names in frames.items():
            if not any(name in predicted for name in names):
                listing.problems.append((prediction / video, f"holds no prediction of {video}. Add its frames."))
                continue
            missing = [name for name in names if name not in predicted]
            listing.problems += [
                (
                    prediction / f"{name}.png",
                    f"is missing: {names[name]} has no prediction, so its video is not scored. Add it.",
                )
                for name in missing
            ]
            if not missing:
                files = tuple((path, predicted[name]) for name, path in names.items())
                listing.cases.append(ScoringCase(video, video, files))
        known = {name for names in frames.values() for name in names}
        listing.notes += extra(predicted.keys() - known, prediction)
        return listing

    def measure(self, case: ScoringCase) -> Measured:
        """Return the scores of the video and the summed scores of its frames, each with counts: (10,) float64."""
        total = contingency(np.zeros(0, np.uint8), np.zeros(0, np.uint8))
        frames = np.zeros(5)
        for file, predicted in case.files:
            assert predicted is not None
            one = self._count(*read_pair(file, predicted, _read_segments))
            frames += self._scores(one)
            total += one
            _refuse_crowd(len(total.true_ids), file)
            _refuse_crowd(len(total.predicted_ids), predicted)
        objects = int((total.true_ids != BACKGROUND).sum())
        details = {"frames": len(case.files), "objects": objects, "segments": len(total.predicted_ids)}
        return Measured(np.concatenate([self._scores(total), frames]), details)

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores (...) from sums (..., 10); mBO, and FG-ARI without background labels, may be nan."""
        halves = (sums[..., :5], sums[..., 5:])
        means = [
            np.divide(
                half[..., column], half[..., count], out=np.full(sums.shape[:-1], np.nan), where=half[..., count] > 0
            )
            for half in halves
            for column, count in ((0, 3), (1, 3 if self.labelled_background else 4), (2, 4))
        ]
        return dict(zip(self.keys, means, strict=True))

    def _count(self, true: np.ndarray, predicted: np.ndarray) -> Contingency:
        if self.ignore is not None:
            counted = true != self.ignore
            true, predicted = true[counted], predicted[counted]
        return contingency(true, predicted)

    def table_scores(self, table: Contingency) -> tuple[float, float | None, float | None]:
        """Return ARI, FG-ARI and mBO of a video or frame, see `segment_scores`."""
        return segment_scores(
            table, background=BACKGROUND, labelled_background=self.labelled_background, matching=self.matching
        )

    def _scores(self, table: Contingency) -> np.ndarray:
        """Return ARI, FG-ARI and mBO (0 where undefined), 1, and whether there are objects: (5,)."""
        ari, foreground, mean = self.table_scores(table)
        return np.array([ari, foreground or 0.0, mean or 0.0, 1.0, float(mean is not None)])


def _by_video(files: dict[str, Path]) -> dict[str, dict[str, Path]]:
    """Group files by folder: name to path."""
    videos: dict[str, dict[str, Path]] = {}
    for name, path in files.items():
        videos.setdefault(name.rpartition("/")[0], {})[name] = path
    return videos


def _read_segments(path: Path) -> np.ndarray:
    ids = read_labels(path)
    if ids.dtype != np.uint8:
        _refuse_crowd(len(np.unique(ids)), path)
    return ids


def _refuse_crowd(count: int, path: Path) -> None:
    if count > MAX_SEGMENTS:
        raise BadFile(
            path, f"raises the ids of its video to {count}, above {MAX_SEGMENTS}. Give segment maps, not depth maps."
        )
