"""SAR-RARP50 scores as in a public LoRA training code: a mean over images, not the challenge's score."""

from typing import Any

import numpy as np

from dinoseg.extensions.protocols.contract import Measured, ScoringCase
from dinoseg.extensions.protocols.sar_rarp50 import CLASSES, VideoFrames, class_counts, frame_details, read_frame

_EPSILON = 1e-6  # added to every union, as in that code


class SarRarp50Seed(VideoFrames):
    """Mean over images of the mean IoU over those of the classes 1 to 9 in the image's reference or prediction.

    It is not comparable with challenge tables: classes absent from both are left out here, but count as 1 there.
    """

    name = "sar_rarp50_seed"
    keys = ("mIoU_seed_per_image",)

    def __init__(self) -> None:
        self.rules: dict[str, Any] = {
            "absent_class": "absent from reference and prediction of an image: left out of its mean; from one: 0",
            "absent_image": "an image whose reference and prediction are all background is left out",
            "missing_prediction": "counts as an empty prediction: its reference's classes score 0",
            "resolution": "as stored; another size than the reference's is an error",
            "ignore": "nothing is ignored; the background (0) is not scored",
            "aggregation": "per image, mean over its classes, then mean over all images, regardless of the video",
            "version": "mIoU of a public LoRA training code; not the challenge's: see protocol=sar_rarp50",
            "differs": ["float64 where that code has float32; both add 1e-6 to the union"],
        }

    def measure(self, case: ScoringCase) -> Measured:
        """Return the image's mean and count, then each class's IoU and count, with 0 where left out: (20,) float64."""
        reference, prediction = read_frame(case)
        both, either = class_counts(reference, np.zeros_like(reference) if prediction is None else prediction)
        held = either > 0
        iou = both / (either + _EPSILON)
        mean = [iou[held].mean(), 1.0] if held.any() else [0.0, 0.0]
        return Measured(np.concatenate((mean, iou, held)), frame_details(case))

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the score (...) from sums (..., 20) over images; nan where all images are left out."""
        return {self.keys[0]: _ratio(sums[..., 0], sums[..., 1])}

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return each class's mean IoU over the `images` that contain it; nan without such images."""
        iou, images = sums[2:].reshape(2, len(CLASSES))
        rows = zip(CLASSES, _ratio(iou, images), images, strict=True)
        return [
            {"id": label, "name": name, "iou": float(value), "images": int(count)}
            for label, (name, value, count) in enumerate(rows, start=1)
        ]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
