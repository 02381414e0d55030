"""Predictions as pictures and arrays: class ids with a palette, probabilities, confidence."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dinoseg.data.classes.labels import Labels
from dinoseg.inference.outputs import ImagePrediction
from dinoseg.utils.atomic import whole_file
from dinoseg.utils.images import write_png


@dataclass(frozen=True)
class PalettePictures:
    """Writes class ids as PNGs that viewers show in the classes' colours; data=folder reads the ids from them."""

    folder: Path
    labels: Labels
    needs_probabilities = False

    def write(self, prediction: ImagePrediction) -> None:
        """Write an image's PNG."""
        picture = Image.fromarray(prediction.ids)
        picture.putpalette([level for color in self.labels.palette for level in color])
        with whole_file(self.folder / f"{prediction.name}.png") as part:
            picture.save(part, format="PNG")

    def finish(self) -> None:
        """Do nothing more."""


@dataclass(frozen=True)
class Probabilities:
    """Writes the probability of each class at each pixel as (K, H, W) float16, `<name>.npy`."""

    folder: Path
    needs_probabilities = True

    def write(self, prediction: ImagePrediction) -> None:
        """Write an image's array."""
        _save(self.folder / f"{prediction.name}.npy", _known(prediction).half())

    def finish(self) -> None:
        """Do nothing more."""


@dataclass(frozen=True)
class Confidence:
    """Writes the highest probability p of each pixel: `<name>.npy` (H, W) float16, `<name>.png` of round(255 p)."""

    folder: Path
    needs_probabilities = True

    def write(self, prediction: ImagePrediction) -> None:
        """Write an image's array and picture."""
        highest = _known(prediction).max(dim=0).values
        _save(self.folder / f"{prediction.name}.npy", highest.half())
        levels = (highest.clamp(0, 1) * 255).round().cpu().numpy().astype(np.uint8)
        write_png(self.folder / f"{prediction.name}.png", levels)

    def finish(self) -> None:
        """Do nothing more."""


def _known(prediction: ImagePrediction) -> Tensor:
    assert prediction.probabilities is not None, "a writer that needs probabilities is given them"
    return prediction.probabilities


def _save(path: Path, values: Tensor) -> None:
    with whole_file(path) as part, open(part, "wb") as file:
        np.save(file, values.cpu().numpy())
