"""What a model makes of a picture: a class for each pixel, and on demand probabilities, areas and an overlay."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np

from dinoseg.export.runtime.facts import Facts
from dinoseg.utils.errors import telling_file_errors
from dinoseg.utils.images import write_png


@dataclass
class Segmentation:
    """A picture's segmentation, at the picture's own size.

    Attributes:
        mask: class ids (H, W) uint8.
        image: the picture (H, W, 3) uint8 RGB.
        facts: of the model.
        source: the picture's file, where it came from one.
    """

    mask: np.ndarray
    image: np.ndarray
    facts: Facts
    source: Path | None = None
    # asked only when needed, since they are 4 * K bytes a pixel and their own pass through the model
    ask: Callable[[np.ndarray], np.ndarray] = field(repr=False, kw_only=True)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Class probabilities (K, H, W) float32."""
        return self.ask(self.image)

    @property
    def areas(self) -> dict[str, int]:
        """Number of pixels of each class, in the order of their ids."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.facts.classes))
        return {name: int(count) for name, count in zip(self.facts.classes, counts, strict=False)}

    def overlay(self, opacity: float = 0.5) -> np.ndarray:
        """Return the picture (H, W, 3) uint8 tinted by the classes; opacity 0..1, 1 = colours alone."""
        from dinoseg.report.overlay import blend

        colours = self.facts.palette
        return blend(self.image, self.mask, colours, ignore_index=self.facts.ignore_index, opacity=opacity)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the class ids as a PNG without loss; the file appears whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        target = Path(path).expanduser()
        with telling_file_errors(target.parent):
            write_png(target, self.mask)
