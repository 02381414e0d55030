"""Optional outputs of images and video frames, selected by name in `mode.outputs`, and what their writers get."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from dinoseg.core.objects import Objects
from dinoseg.core.task import SEMANTIC, Task
from dinoseg.data.classes.labels import Labels
from dinoseg.report.palette import write_indexed_png
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import format_text, join_names


@dataclass(frozen=True)
class ImagePrediction:
    """Image and the model's prediction for it.

    Args:
        name: the image's path relative to the input, without suffix, which is also the mask's name: `a/x`.
        path: the image file.
        image: (H, W, 3) uint8 RGB, upright; or (H, W, C), uint8 or uint16, of other channels.
        ids: (H, W) uint8, classes 0..K-1; or layers (K, H, W) of 0 and 1.
        probabilities: (K, H, W) float32 on the model's device; None if no writer needs them.
        objects: of a model of objects; else None.
    """

    name: str
    path: Path
    image: np.ndarray
    ids: np.ndarray
    probabilities: Tensor | None = None
    objects: Objects | None = None


class ImageWriter(Protocol):
    """Protocol of writers of one output per image, called sequentially from one thread."""

    needs_probabilities: bool  # if False, `probabilities` may be None

    def write(self, prediction: ImagePrediction) -> None:
        """Write the files of one image atomically."""
        ...

    def finish(self) -> None:
        """Write the files that cover all images, including those of an earlier run that was stopped."""
        ...


class FurtherOutputs(ABC):
    """Base class of what brings outputs of its own to mode=predict, such as the files of annotation tools."""

    names: ClassVar[Sequence[str]]  # of the outputs
    ids: str | None = None  # JSON file of references whose ids of images and categories the files have; None: none

    @abstractmethod
    def make_writer(self, name: str, folder: Path, labels: Labels, background: int | None, task: Task) -> ImageWriter:
        """Return the writer of one of its outputs.

        Args:
            name: of the output.
            folder: receives its files.
            labels: the classes.
            background: ID of the class that is not an object; None: without one.
            task: of the model.

        Raises:
            UserError: the task does not have what the output needs.
        """


@dataclass(frozen=True)
class PalettePictures:
    """Writer of class-ID PNGs with a palette: viewers show the class colours, data=folder reads the IDs."""

    folder: Path
    labels: Labels
    needs_probabilities = False

    def write(self, prediction: ImagePrediction) -> None:
        """Write the PNG of one image."""
        write_indexed_png(self.folder / f"{prediction.name}.png", prediction.ids, self.labels.palette)

    def finish(self) -> None:
        """Do nothing: each image is complete once written."""


@dataclass(frozen=True)
class Probabilities:
    """Writer of per-pixel class probabilities as `<name>.npy`, (K, H, W) float16."""

    folder: Path
    needs_probabilities = True

    def write(self, prediction: ImagePrediction) -> None:
        """Write the array of one image."""
        assert prediction.probabilities is not None
        _save(self.folder / f"{prediction.name}.npy", prediction.probabilities.half())

    def finish(self) -> None:
        """Do nothing: each image is complete once written."""


@dataclass(frozen=True)
class Confidence:
    """Writer of the highest class probability p per pixel.

    `<name>.npy` holds p as (H, W) float16, `<name>.png` holds round(255 p).
    """

    folder: Path
    needs_probabilities = True

    def write(self, prediction: ImagePrediction) -> None:
        """Write the array and the PNG of one image."""
        assert prediction.probabilities is not None
        highest = prediction.probabilities.max(dim=0).values
        _save(self.folder / f"{prediction.name}.npy", highest.half())
        levels = (highest.clamp(0, 1) * 255).round().cpu().numpy().astype(np.uint8)
        write_png(self.folder / f"{prediction.name}.png", levels)

    def finish(self) -> None:
        """Do nothing: each image is complete once written."""


def _save(path: Path, values: Tensor) -> None:
    with atomic_file(path) as part, open(part, "wb") as file:
        np.save(file, values.cpu().numpy())


_MAKERS: Mapping[str, Callable[[Path, Labels], ImageWriter]] = {
    "palette": PalettePictures,
    "probabilities": lambda folder, _: Probabilities(folder),
    "confidence": lambda folder, _: Confidence(folder),
}


def image_writers(
    outputs: Sequence[str],
    folder: Path,
    labels: Labels,
    background: int | None,
    shapes: FurtherOutputs | None,
    task: Task = SEMANTIC,
) -> dict[str, ImageWriter]:
    """Return the requested writers by name; each writes into a subfolder of its name.

    Args:
        outputs: names of outputs, validated by `check_outputs`.
        folder: the run folder.
        labels: the classes.
        background: ID of the background class, which gets no shapes; None: every class gets shapes.
        shapes: makes the writers of annotation tools; None: there are none.
        task: of the model.

    Raises:
        UserError: the task does not have what an output needs.
    """
    writers = {}
    for name in outputs:
        if shapes is not None and name in shapes.names:
            writers[name] = shapes.make_writer(name, folder / name, labels, background, task)
        else:
            writers[name] = _MAKERS[name](folder / name, labels)
    return writers


def frame_writer(name: str, folder: Path, labels: Labels) -> ImageWriter:
    """Return the writer of one output of video frames into `folder`; `check_outputs` has validated the name."""
    return _MAKERS[name](folder, labels)


def check_outputs(outputs: Sequence[str], shapes: FurtherOutputs | None, video: str | None = None) -> None:
    """Check that `mode.outputs` lists known outputs.

    Args:
        outputs: their names.
        shapes: see `image_writers`; its outputs need image files.
        video: a video among the inputs; None: there is none.

    Raises:
        UserError: a name is unknown, or not available for the frames of the video.
    """
    known = [*(() if shapes is None or video else shapes.names), *_MAKERS]
    unknown = [format_text(name) for name in outputs if name not in known]
    if unknown:
        of_frames = f" for the frames of {video}, or leave videos out" if video else ""
        raise UserError(f"mode.outputs names {join_names(unknown)}: choose some of {', '.join(known)}{of_frames}.")
