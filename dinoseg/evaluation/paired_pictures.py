"""Images of compared predictions: masks from the run folders, frames and references from the data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.report.html.comparison import PairShot
from dinoseg.report.overlay import reduced
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, read_size

SHOWN, _IN_ALL = 4, 28  # most improved images per side and in all, and most worsened: the page is e-mailed
_LONGEST = 512  # pixels of an image's longer side


@dataclass(frozen=True)
class Pictures:
    """Image source for a first run and the runs compared with it.

    Args:
        open_data: opens the data set of the first run.
        record: record of the first run.
        folder: folder of that record.
    """

    open_data: Callable[[], SegmentationData]
    record: ImageRecord
    folder: Path

    @property
    def data(self) -> SegmentationData:
        """Return the data set of the first run.

        Raises:
            UserError: the data set cannot be opened, or has changed.
        """
        if isinstance(self._opened, UserError):
            raise self._opened
        return self._opened

    @cached_property
    def _opened(self) -> SegmentationData | UserError:
        """Return the data set or its error, cached so that other runs do not open it again."""
        try:
            return self._open()
        except UserError as error:
            return error

    def _open(self) -> SegmentationData:
        data = self.open_data()
        if list(data.names) != list(self.record.images):
            raise UserError(f"{self.record.root} does not hold the images that were evaluated.")
        return data

    def shot(self, index: int, other: Path, mious: tuple[float, float]) -> PairShot:
        """Return an image with the predictions of the first run and of another run.

        Raises:
            UserError: a file is missing, of another size, or not a mask of the classes.
        """
        name = self.record.images[index]
        sample = self.data[index]
        reference: np.ndarray = sample["mask"].numpy()
        predictions = []
        for folder in (self.folder, other):
            base, path = folder / "predictions", folder / "predictions" / f"{name}_pred.png"
            if not path.resolve().is_relative_to(base.resolve()):
                raise UserError(f"{folder} names an image outside its own folder: {name}.")
            if read_size(path) != reference.shape:
                raise UserError(f"{path} differs in size from its reference.")
            ids = read_ids(path)
            if ids.ndim != 2 or ids.max() >= len(self.record.classes):
                raise UserError(f"{path} is not a mask of the {len(self.record.classes)} classes.")
            predictions.append(reduced(ids, _LONGEST))
        frame = reduced(sample["image"].permute(1, 2, 0).numpy(), _LONGEST)
        return PairShot(name, mious, frame, reduced(reference, _LONGEST), (predictions[0], predictions[1]))


def most_different(
    pictures: Pictures, other: Path, first: Sequence[float | None], second: Sequence[float | None], sides: int = 1
) -> tuple[list[PairShot], str]:
    """Return the images whose mIoU differs most in another run, by size of the difference; or none, and the reason.

    Args:
        pictures: source of the images.
        other: folder of the other run's record.
        first: mIoU of each image in the first run.
        second: mIoU of each image in the other run.
        sides: number of runs compared with the first: many runs get fewer images each.

    Raises:
        UserError: predictions exist, but their images cannot be built.
    """
    pairs: list[Any] = [
        (theirs - ours, index)
        for index, (ours, theirs) in enumerate(zip(first, second, strict=True))
        if ours is not None and theirs is not None and ours != theirs
    ]
    pairs.sort()
    lost, gained = [pair for pair in pairs if pair[0] < 0], [pair for pair in pairs if pair[0] > 0]
    shown = max(1, min(SHOWN, _IN_ALL // sides))
    chosen = {index: gap for gap, index in (*lost[:shown], *gained[-shown:])}
    order = sorted(chosen, key=lambda index: -abs(chosen[index]))
    if not order:
        return [], "No image has different scores in the two runs."
    if any(not (folder / "predictions").is_dir() for folder in (pictures.folder, other)):
        return [], "No images: a run was evaluated with mode.metrics_only=true, so its predictions were not saved."
    return [pictures.shot(index, other, (first[index] or 0.0, second[index] or 0.0)) for index in order], ""
