"""Which further outputs of images and frames there are, by the names that `mode.outputs` takes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dinoseg.data.classes.labels import Labels
from dinoseg.inference.annotations import CocoAnnotations, CvatAnnotations, LabelmeAnnotations, PredictedShapes
from dinoseg.inference.outputs import ImagePrediction, ImageWriter
from dinoseg.utils.atomic import whole_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import listed, shown


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


_MAKERS: Mapping[str, Callable[[Path, Labels, int | None, PredictedShapes], ImageWriter]] = {
    "coco": CocoAnnotations,
    "labelme": LabelmeAnnotations,
    "cvat": CvatAnnotations,
    "palette": lambda place, labels, *_: PalettePictures(place, labels),
    "probabilities": lambda place, *_: Probabilities(place),
    "confidence": lambda place, *_: Confidence(place),
}
_OF_FRAMES = ("palette", "probabilities", "confidence")  # the others name picture files, which frames are not


def image_writers(
    outputs: Sequence[str], folder: Path, labels: Labels, background: int | None, shapes: PredictedShapes
) -> dict[str, ImageWriter]:
    """Return the writers of further outputs by name; each writes into a folder of its name.

    Args:
        outputs: some of `coco`, `labelme`, `cvat`, `palette`, `probabilities`, `confidence`: as `check_outputs` wants.
        folder: of the run.
        labels: the classes.
        background: id of the class that is no object, of which no shapes are made; None: there is none.
        shapes: how class ids become shapes.
    """
    return {name: _MAKERS[name](folder / name, labels, background, shapes) for name in outputs}


def frame_writer(name: str, folder: Path, labels: Labels) -> ImageWriter:
    """Return the writer into `folder` of a further output of a video's frames, as `check_frame_outputs` wants it."""
    return _MAKERS[name](folder, labels, None, PredictedShapes())


def check_outputs(outputs: Sequence[str]) -> None:
    """Refuse names that are no output, or that stand twice.

    Raises:
        UserError: naming them.
    """
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise UserError(f"mode.outputs={shown(outputs)}: give a list, such as mode.outputs=[coco,palette].")
    unknown = [shown(name) for name in outputs if name not in _MAKERS]
    if unknown:
        raise UserError(f"mode.outputs names {listed(unknown)}: choose some of {', '.join(_MAKERS)}.")
    if twice := [name for name, count in Counter(outputs).items() if count > 1]:
        raise UserError(f"mode.outputs names {listed(twice)} more than once: name each output once.")


def check_frame_outputs(outputs: Sequence[str], video: str) -> None:
    """Refuse outputs that a video's frames do not have.

    Raises:
        UserError: naming them, and the video.
    """
    if tools := [name for name in outputs if name not in _OF_FRAMES]:
        raise UserError(
            f"mode.outputs names {listed(tools)}, files of picture files, and {video} is a video: of its frames there "
            f"are {', '.join(_OF_FRAMES)}. Leave videos out, or give a folder of frames (ffmpeg -i IN FRAMES/%09d.png)."
        )
