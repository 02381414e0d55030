"""Writer of a run's masks as images, and of its state at intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoseg.core.shapes import Palette
from dinoseg.extensions.tracking.video.state import MASKS, TrackState, save_track_state
from dinoseg.report.palette import default_palette, write_indexed_png
from dinoseg.report.progress import Bar


@dataclass(frozen=True)
class MaskColours:
    """Colours of masks, and classes of their objects.

    Args:
        palette: one colour per ID.
        background: ID of the background, which is no object; None: every ID is an object.
        classes: names of the classes of objects, in the order of their ids; empty if IDs have no class.
    """

    palette: Palette = tuple(default_palette(256))
    background: int | None = 0
    classes: tuple[str, ...] = ()


class TrackedBatch(NamedTuple):
    """Masks of the frames that a tracker processed at once."""

    state: TrackState | None  # of the run before this batch, if it is to be saved
    masks: Mapping[str, np.ndarray]  # (H, W) uint8 by frame name


class MaskFolder:
    """Writer of masks/<frame>.png to a run folder, and of the run's state.

    Args:
        folder: the run folder.
        palette: colours of the masks.
        bar: progress bar, advanced by each mask.
    """

    def __init__(self, folder: Path, palette: Palette, bar: Bar) -> None:
        self.count = 0
        self._folder, self._palette, self._bar = folder, palette, bar
        self._unsaved: list[Path] = []  # masks that the saved state does not count as done

    def write(self, batch: TrackedBatch) -> None:
        """Write a batch's masks, preceded by the run's state if it is due.

        Raises:
            UserError: the state cannot be written.
            OSError: the disk is full.
        """
        if batch.state is not None:  # all earlier masks are written by now
            save_track_state(self._folder, batch.state, self._unsaved)
            self._unsaved.clear()
        for name, mask in batch.masks.items():
            self._unsaved.append(self._folder / MASKS / f"{name}.png")
            write_indexed_png(self._unsaved[-1], mask, self._palette)
        self.count += len(batch.masks)
        self._bar.update(len(batch.masks))
