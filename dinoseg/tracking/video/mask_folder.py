"""The masks of a run as they come: written as pictures, and with them, every so often, where the run stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoseg.core.shapes import Palette
from dinoseg.report.indexed import voc_palette, write_indexed_png
from dinoseg.report.progress import Bar
from dinoseg.tracking.video.state import MASKS, Standing, save_standing


@dataclass(frozen=True)
class Look:
    """How masks are shown.

    Args:
        palette: a colour for each id.
        background: the id that is no object; None: all are.
    """

    palette: Palette = voc_palette()
    background: int | None = 0


class TrackedBatch(NamedTuple):
    """What a tracker gives for frames that it is handed at once."""

    standing: Standing | None  # of the run before these, where it is to be saved
    masks: Mapping[str, np.ndarray]  # (H, W) uint8 by the name of the frame


class MaskFolder:
    """Writes masks/<frame>.png to a run's folder, and where the run stands.

    Args:
        folder: of the run.
        palette: the masks' colours.
        bar: told of each mask.
    """

    def __init__(self, folder: Path, palette: Palette, bar: Bar) -> None:
        self.count = 0
        self._folder, self._palette, self._bar = folder, palette, bar
        self._unsaved: list[Path] = []  # masks that do not yet count as done

    def write(self, batch: TrackedBatch) -> None:
        """Write a batch's masks, and before them where the run stands.

        Raises:
            UserError: it cannot be written.
            OSError: the disk is full.
        """
        if batch.standing is not None:  # all masks before are written by now
            save_standing(self._folder, batch.standing, self._unsaved)
            self._unsaved.clear()
        for name, mask in batch.masks.items():
            self._unsaved.append(self._folder / MASKS / f"{name}.png")
            write_indexed_png(self._unsaved[-1], mask, self._palette)
        self.count += len(batch.masks)
        self._bar.update(len(batch.masks))
