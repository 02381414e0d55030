"""IDD-Lite: mean IoU over its seven classes, the last number that the official script prints."""

import numpy as np

from dinoseg.extensions.protocols.idd import SIZES as IDD_SIZES
from dinoseg.extensions.protocols.idd import Frames
from dinoseg.extensions.protocols.trees import Tree
from dinoseg.metrics.counts import mean_defined
from dinoseg.utils.ranges import Count

ENDING = "_label.png"
SIZES = {128: (256, 128)} | IDD_SIZES
NAMES = ("drivable", "non-drivable", "living-things", "vehicles", "road-side-objs", "far-objects", "sky")
_TREE = Tree(ENDING, f"<drive>/<id>{ENDING}", depth=1, exclude="*_inst_label.png")


class IddLite(Frames):
    """Mean IoU of IDD-Lite, `<drive>/<id>_label.png` on both sides.

    Args:
        resolution: height to which reference and prediction are resized by Pillow's nearest neighbour, as in the
            official script: 128, or one of IDD's.
    """

    name = "idd_lite"
    ending = ENDING
    keys = ("mIoU",)
    classes = NAMES
    version = "AutoNUE/public-code, evaluation/idd_lite_evaluate_mIoU.py, the last number it prints"
    reference_tree = prediction_tree = _TREE

    def __init__(self, resolution: Count = 128) -> None:
        super().__init__(resolution, SIZES)

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mean (...)."""
        return {"mIoU": mean_defined(self.ious(sums))}
