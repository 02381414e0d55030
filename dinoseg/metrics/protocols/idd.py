"""India Driving Dataset: the mean IoU of its official script at the three levels of its classes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoseg.errors import UserError
from dinoseg.label_tables.read import label_table
from dinoseg.metrics.counts import confusion, grouped, iou, mean_defined, parts
from dinoseg.metrics.protocols.contract import Case, Found, Measured, pooled
from dinoseg.metrics.protocols.trees import Tree, match, read_labels
from dinoseg.ranges import Count

ENDING = "_gtFine_labellevel3Ids.png"
SIZES = {720: (1280, 720), 1080: (1920, 1080), 480: (858, 480), 240: (426, 240)}  # resolution to (W, H)
NAMES = (
    *("road", "drivable fallback", "sidewalk", "non-drivable fallback", "person", "rider", "motorcycle", "bicycle"),
    *("autorickshaw", "car", "truck", "bus", "vehicle fallback", "curb", "wall", "fence", "guard rail", "billboard"),
    *("traffic sign", "traffic light", "pole", "obs-str-bar-fallback", "building", "bridge", "vegetation", "sky"),
)
VOID = len(NAMES)  # every larger id is the same
SHARED_RULES = {
    "absent_class": "left out of the mean (neither in the reference nor in a prediction of its pixels)",
    "ignore": "void in the reference: every id without class; void in the prediction: false negative",
    "aggregation": "one matrix over all frames, then the mean over classes; intervals over drives",
}
ABSENT_DIFFERS = "official: a class that occurs nowhere makes the mean nan; here it is left out. Equal when all occur."
_PREDICTION = Tree(ENDING, f"<drive>/<id>{ENDING}", depth=1)
_REFERENCE = Tree(ENDING, f"<drive>/<id>{ENDING} (mode=prepare data=idd makes them from the polygons)", depth=1)


def _groups(fine: str, coarse: str) -> np.ndarray:
    """Return for each class of a level the one it belongs to at a coarser level."""
    pairs = {int(row[fine]): int(row[coarse]) for row in label_table("idd") if row[fine] != "255"}
    return np.array([pairs[index] for index in range(len(pairs))])


_TO_LEVEL2, _TO_LEVEL1 = _groups("level3", "level2"), _groups("level2", "level1")


class Idd:
    """Mean IoU of IDD, `<drive>/<id>_gtFine_labellevel3Ids.png` on both sides.

    Args:
        resolution: height that reference and prediction are resized to by Pillow's nearest neighbour, as the official
            script does: 720, 1080, 480 or 240.
    """

    name = "idd"
    unit = "drive"
    any_size = True
    keys = ("mIoU_level3", "mIoU_level2", "mIoU_level1", "mIoU_level1_as_shipped")

    def __init__(self, resolution: Count = 720) -> None:
        self.size = official_size(resolution, SIZES)
        self.rules: dict[str, Any] = SHARED_RULES | {
            "resolution": resolution_rule(self.size),
            "version": "AutoNUE/public-code, evaluation/evaluate_mIoU.py",
            "ids": f"{VOID} and above are void on both sides; unknown_pixels counts those besides {VOID} and 255",
            "levels": "2 and 1 are sums of the level-3 matrix without void, so void predictions cost nothing there",
            "differs": [
                ABSENT_DIFFERS,
                "official level 1 groups the ids 0..15 of level 3 as if they were level 2: that number is "
                "mIoU_level1_as_shipped, with absent groups left out; mIoU_level1 groups level 2.",
            ],
        }

    def find(self, reference: Path, prediction: Path) -> Found:
        """Return a case for each frame of the reference."""
        return find_frames((_REFERENCE, _PREDICTION), (reference, prediction), self.target)

    def measure(self, case: Case) -> Measured:
        """Return the matrix (27 * 27,) of a frame."""
        return measure_resized(case, self.size, VOID)

    def join(self, measured: Sequence[Measured]) -> np.ndarray:
        """Return the matrix of a drive."""
        return pooled(measured)

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the four means (...)."""
        matrix = sums.reshape(*sums.shape[:-1], VOID + 1, VOID + 1)
        known = matrix[..., :VOID, :VOID]
        level2 = grouped(known, _TO_LEVEL2)
        misread = known[..., : len(_TO_LEVEL1), : len(_TO_LEVEL1)]  # level-3 ids where level 2 belongs
        return {
            "mIoU_level3": mean_defined(iou(*parts(matrix, range(VOID)))),
            "mIoU_level2": _mean_iou(level2),
            "mIoU_level1": _mean_iou(grouped(level2, _TO_LEVEL1)),
            "mIoU_level1_as_shipped": _mean_iou(grouped(misread, _TO_LEVEL1)),
        }

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the IoU of each level-3 class."""
        return class_rows(sums, NAMES)

    def target(self, name: str) -> str:
        """Return where the prediction of `drive/id` belongs."""
        return f"{name}{ENDING}"

    def case(self, name: str, reference: Path, prediction: Path) -> Case:
        """Return the case of one image."""
        return Case(name, drive(name), ((reference, prediction),))

    def file_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return level-3 ids as they are."""
        return ids.astype(np.uint8)


def _mean_iou(matrix: np.ndarray) -> np.ndarray:
    return mean_defined(iou(*parts(matrix, range(matrix.shape[-1]))))


def find_frames(trees: tuple[Tree, Tree], folders: tuple[Path, Path], target: Callable[[str], str]) -> Found:
    """Return a case for each frame of the reference, by drive.

    Args:
        trees: how references and predictions lie.
        folders: of references and of predictions.
        target: where the prediction of a name should lie.
    """
    predictions = trees[1].files(folders[1], "prediction")
    return match(
        trees[0].files(folders[0], "reference", predictions.__contains__),
        predictions,
        folders=folders,
        missing=lambda name: folders[1] / target(name),
        unit=drive,
    )


def drive(name: str) -> str:
    """Return the drive that a frame's name begins with."""
    return name.rpartition("/")[0] or name


def official_size(resolution: int, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return (W, H) of an official resolution.

    Raises:
        UserError: there is no such one.
    """
    if resolution not in sizes:
        known = ", ".join(map(str, sizes))
        raise UserError(f"protocol.resolution={resolution} is unknown. Choose one of {known}.")
    return sizes[resolution]


def resolution_rule(size: tuple[int, int]) -> str:
    """Return what happens to files of another size, in words."""
    return f"reference and prediction are each resized to {size[0]} x {size[1]} by Pillow's nearest neighbour"


def measure_resized(case: Case, size: tuple[int, int], void: int) -> Measured:
    """Return the matrix ((void + 1)^2,) of a frame, both sides resized and every id from `void` on taken as one.

    Raises:
        BadFile: a file is unreadable or in colours.
    """
    (reference_file, prediction_file), *_ = case.files
    assert prediction_file is not None
    files = [read_labels(path) for path in (reference_file, prediction_file)]
    unknown = [int(((ids > void) & (ids != 255)).sum()) for ids in files]
    sides = [np.where((ids < 0) | (ids > void), void, ids).astype(np.uint8) for ids in files]
    resized = [np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST)) for ids in sides]
    return Measured(
        confusion(resized[0], resized[1], void + 1).ravel(),
        {"unknown_pixels_reference": unknown[0], "unknown_pixels_prediction": unknown[1]},
    )


def class_rows(sums: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the IoU of each class from a matrix ((K + 1)^2,) whose last id is void."""
    size = len(names) + 1
    values = iou(*parts(sums.reshape(size, size), range(len(names))))
    return [{"id": index, "name": name, "IoU": float(values[index])} for index, name in enumerate(names)]
