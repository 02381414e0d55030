"""India Driving Dataset: mean IoU of its official script at the three levels of its class hierarchy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoseg.data.label_tables.read import label_table
from dinoseg.extensions.protocols.contract import Cases, DatasetProtocol, Measured, ScoringCase
from dinoseg.extensions.protocols.trees import Tree, match, read_labels
from dinoseg.metrics.counts import confusion, group_counts, iou, mean_defined, parts
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count

ENDING = "_gtFine_labellevel3Ids.png"
SIZES = {720: (1280, 720), 1080: (1920, 1080), 480: (858, 480), 240: (426, 240)}  # resolution to (W, H)
NAMES = (
    *("road", "drivable fallback", "sidewalk", "non-drivable fallback", "person", "rider", "motorcycle", "bicycle"),
    *("autorickshaw", "car", "truck", "bus", "vehicle fallback", "curb", "wall", "fence", "guard rail", "billboard"),
    *("traffic sign", "traffic light", "pole", "obs-str-bar-fallback", "building", "bridge", "vegetation", "sky"),
)
_PREDICTION = Tree(ENDING, f"<drive>/<id>{ENDING}", depth=1)
_REFERENCE = Tree(ENDING, f"<drive>/<id>{ENDING} (mode=prepare data=idd creates them from the polygons)", depth=1)


def _groups(fine: str, coarse: str) -> np.ndarray:
    """Return the class at a coarser level of each class at a finer level."""
    pairs = {int(row[fine]): int(row[coarse]) for row in label_table("idd") if row[fine] != "255"}
    return np.array([pairs[index] for index in range(len(pairs))])


_TO_LEVEL2, _TO_LEVEL1 = _groups("level3", "level2"), _groups("level2", "level1")


class Frames(DatasetProtocol):
    """Base class of IDD scores: one matrix over the frames `<drive>/<id>` of all drives, resized by nearest neighbour.

    Args:
        resolution: height of the compared frames.
        sizes: the official (W, H) of each height.

    Raises:
        UserError: the resolution is unknown.
    """

    unit = "drive"
    any_size = True
    classes: Sequence[str]  # names of the ids 0 to K - 1; larger ids are void
    version: str  # of the official script
    reference_tree: Tree
    prediction_tree: Tree

    def __init__(self, resolution: int, sizes: Mapping[int, tuple[int, int]]) -> None:
        if resolution not in sizes:
            known = ", ".join(map(str, sizes))
            raise UserError(f"resolution={resolution} is unknown. Choose one of {known}.")
        self.size = sizes[resolution]
        void = len(self.classes)
        self.rules: dict[str, Any] = {
            "absent_class": "left out of the mean (neither in the reference nor in a prediction of its pixels)",
            "ignore": "void in the reference: every id without class; void in the prediction: false negative",
            "aggregation": "one matrix over all frames, then the mean over classes",
            "resolution": f"reference and prediction are each resized to {self.size[0]} x {self.size[1]} by Pillow's "
            "nearest neighbour",
            "version": self.version,
            "ids": f"{void} and above are void on both sides; unknown_pixels counts those besides {void} and 255",
            "differs": [
                "official: a class that occurs nowhere makes the mean nan; here it is left out. Equal when all occur."
            ],
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each reference frame."""
        predictions = self.prediction_tree.files(prediction, "prediction")
        return match(
            self.reference_tree.files(reference, "reference", predictions.__contains__),
            predictions,
            folders=(reference, prediction),
            missing=lambda name: prediction / self.target(name),
            unit=self.unit_of,
        )

    def measure(self, case: ScoringCase) -> Measured:
        """Return the matrix ((K + 1)^2,) of a frame, where all ids of K or more share the last index.

        Raises:
            BadFile: a file is unreadable or has colour channels.
        """
        void = len(self.classes)
        (reference_file, prediction_file), *_ = case.files
        assert prediction_file is not None
        files = [read_labels(path) for path in (reference_file, prediction_file)]
        unknown = [int(((ids > void) & (ids != 255)).sum()) for ids in files]
        sides = [np.where((ids < 0) | (ids > void), void, ids).astype(np.uint8) for ids in files]
        resized = [np.asarray(Image.fromarray(ids).resize(self.size, Image.Resampling.NEAREST)) for ids in sides]
        return Measured(
            confusion(resized[0], resized[1], void + 1).ravel(),
            {"unknown_pixels_reference": unknown[0], "unknown_pixels_prediction": unknown[1]},
        )

    def matrix(self, sums: np.ndarray) -> np.ndarray:
        """Return sums as a matrix (..., K + 1, K + 1), whose last id is void."""
        size = len(self.classes) + 1
        return sums.reshape(*sums.shape[:-1], size, size)

    def ious(self, sums: np.ndarray) -> np.ndarray:
        """Return the IoU (..., K) of each class."""
        return iou(*parts(self.matrix(sums), range(len(self.classes))))

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the IoU of each class."""
        rows = zip(self.classes, self.ious(sums), strict=True)
        return [{"id": index, "name": name, "IoU": float(value)} for index, (name, value) in enumerate(rows)]

    def unit_of(self, name: str) -> str:
        """Return the drive at the start of a frame's name."""
        return name.rpartition("/")[0] or name


class Idd(Frames):
    """Mean IoU of IDD, `<drive>/<id>_gtFine_labellevel3Ids.png` on both sides.

    Args:
        resolution: height to which reference and prediction are resized by Pillow's nearest neighbour, as in the
            official script: 720, 1080, 480 or 240.
    """

    name = "idd"
    ending = ENDING
    keys = ("mIoU_level3", "mIoU_level2", "mIoU_level1", "mIoU_level1_as_shipped")
    classes = NAMES
    version = "AutoNUE/public-code, evaluation/evaluate_mIoU.py"
    reference_tree, prediction_tree = _REFERENCE, _PREDICTION

    def __init__(self, resolution: Count = 720) -> None:
        super().__init__(resolution, SIZES)
        self.rules |= {
            "levels": "2 and 1 are sums of the level-3 matrix without void, so void predictions cost nothing there",
            "differs": [
                *self.rules["differs"],
                "official level 1 groups the ids 0..15 of level 3 as if they were level 2: that number is "
                "mIoU_level1_as_shipped, with absent groups left out; mIoU_level1 groups level 2.",
            ],
        }

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the four means (...)."""
        known = self.matrix(sums)[..., : len(NAMES), : len(NAMES)]
        level2 = group_counts(known, _TO_LEVEL2)
        misread = known[..., : len(_TO_LEVEL1), : len(_TO_LEVEL1)]  # level-3 ids misread as level 2
        return {
            "mIoU_level3": mean_defined(self.ious(sums)),
            "mIoU_level2": _mean_iou(level2),
            "mIoU_level1": _mean_iou(group_counts(level2, _TO_LEVEL1)),
            "mIoU_level1_as_shipped": _mean_iou(group_counts(misread, _TO_LEVEL1)),
        }


def _mean_iou(matrix: np.ndarray) -> np.ndarray:
    return mean_defined(iou(*parts(matrix, range(matrix.shape[-1]))))
