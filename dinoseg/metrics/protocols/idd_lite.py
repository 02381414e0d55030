"""IDD-Lite: the mean IoU over its seven classes, the last number that its official script prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.metrics.counts import iou, mean_defined, parts
from dinoseg.metrics.protocols.contract import Case, Found, Measured, pooled
from dinoseg.metrics.protocols.idd import (
    ABSENT_DIFFERS,
    SHARED_RULES,
    class_rows,
    drive,
    find_frames,
    measure_resized,
    official_size,
    resolution_rule,
)
from dinoseg.metrics.protocols.idd import SIZES as IDD_SIZES
from dinoseg.metrics.protocols.trees import Tree
from dinoseg.ranges import Count

ENDING = "_label.png"
SIZES = {128: (256, 128)} | IDD_SIZES
NAMES = ("drivable", "non-drivable", "living-things", "vehicles", "road-side-objs", "far-objects", "sky")
VOID = len(NAMES)
_TREE = Tree(ENDING, f"<drive>/<id>{ENDING}", depth=1, exclude="*_inst_label.png")


class IddLite:
    """Mean IoU of IDD-Lite, `<drive>/<id>_label.png` on both sides.

    Args:
        resolution: height that reference and prediction are resized to by Pillow's nearest neighbour, as the official
            script does: 128, or one of IDD's.
    """

    name = "idd_lite"
    unit = "drive"
    any_size = True
    keys = ("mIoU",)

    def __init__(self, resolution: Count = 128) -> None:
        self.size = official_size(resolution, SIZES)
        self.rules: dict[str, Any] = SHARED_RULES | {
            "resolution": resolution_rule(self.size),
            "version": "AutoNUE/public-code, evaluation/idd_lite_evaluate_mIoU.py, the last number it prints",
            "ids": f"{VOID} and above are void on both sides; unknown_pixels counts those besides {VOID} and 255",
            "differs": [ABSENT_DIFFERS],
        }

    def find(self, reference: Path, prediction: Path) -> Found:
        """Return a case for each frame of the reference."""
        return find_frames((_TREE, _TREE), (reference, prediction), self.target)

    def measure(self, case: Case) -> Measured:
        """Return the matrix (8 * 8,) of a frame."""
        return measure_resized(case, self.size, VOID)

    def join(self, measured: Sequence[Measured]) -> np.ndarray:
        """Return the matrix of a drive."""
        return pooled(measured)

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mean (...)."""
        matrix = sums.reshape(*sums.shape[:-1], VOID + 1, VOID + 1)
        return {"mIoU": mean_defined(iou(*parts(matrix, range(VOID))))}

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the IoU of each class."""
        return class_rows(sums, NAMES)

    def target(self, name: str) -> str:
        """Return where the prediction of `drive/id` belongs."""
        return f"{name}{ENDING}"

    def case(self, name: str, reference: Path, prediction: Path) -> Case:
        """Return the case of one image."""
        return Case(name, drive(name), ((reference, prediction),))

    def file_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return level-1 ids as they are."""
        return ids.astype(np.uint8)
