"""Optional outputs of images and video frames, selected by name in `mode.outputs`."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dinoseg.data.classes.labels import Labels
from dinoseg.inference.outputs import FurtherOutputs, ImagePrediction, ImageWriter
from dinoseg.report.indexed import write_indexed_png
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import format_value, join_names


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
        _save(self.folder / f"{prediction.name}.npy", _require_probabilities(prediction).half())

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
        highest = _require_probabilities(prediction).max(dim=0).values
        _save(self.folder / f"{prediction.name}.npy", highest.half())
        levels = (highest.clamp(0, 1) * 255).round().cpu().numpy().astype(np.uint8)
        write_png(self.folder / f"{prediction.name}.png", levels)

    def finish(self) -> None:
        """Do nothing: each image is complete once written."""


def _require_probabilities(prediction: ImagePrediction) -> Tensor:
    assert prediction.probabilities is not None, "a writer that needs probabilities gets them"
    return prediction.probabilities


def _save(path: Path, values: Tensor) -> None:
    with atomic_file(path) as part, open(part, "wb") as file:
        np.save(file, values.cpu().numpy())


_MAKERS: Mapping[str, Callable[[Path, Labels], ImageWriter]] = {
    "palette": PalettePictures,
    "probabilities": lambda folder, _: Probabilities(folder),
    "confidence": lambda folder, _: Confidence(folder),
}


def image_writers(
    outputs: Sequence[str], folder: Path, labels: Labels, background: int | None, shapes: FurtherOutputs | None
) -> dict[str, ImageWriter]:
    """Return the requested writers by name; each writes into a subfolder of its name.

    Args:
        outputs: names of outputs, validated by `check_outputs`.
        folder: the run folder.
        labels: the classes.
        background: ID of the background class, which gets no shapes; None: every class gets shapes.
        shapes: makes the writers of annotation tools; None: there are none.
    """
    writers = {}
    for name in outputs:
        if shapes is not None and name in shapes.names:
            writers[name] = shapes.make_writer(name, folder / name, labels, background)
        else:
            writers[name] = _MAKERS[name](folder / name, labels)
    return writers


def frame_writer(name: str, folder: Path, labels: Labels) -> ImageWriter:
    """Return the writer of one output of video frames into `folder`; `check_frame_outputs` has validated the name."""
    return _MAKERS[name](folder, labels)


def check_outputs(outputs: Sequence[str], shapes: FurtherOutputs | None) -> None:
    """Check that `mode.outputs` lists known outputs, each at most once; `shapes`: see `image_writers`.

    Raises:
        UserError: a name is unknown or repeated, or the value is not a list.
    """
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise UserError(f"mode.outputs={format_value(outputs)}: give a list, such as mode.outputs=[coco,palette].")
    known = [*(() if shapes is None else shapes.names), *_MAKERS]
    unknown = [format_value(name) for name in outputs if name not in known]
    if unknown:
        raise UserError(f"mode.outputs names {join_names(unknown)}: choose some of {', '.join(known)}.")
    if twice := [name for name, count in Counter(outputs).items() if count > 1]:
        raise UserError(f"mode.outputs names {join_names(twice)} more than once: name each output once.")


def check_frame_outputs(outputs: Sequence[str], video: str) -> None:
    """Check that each output is available for video frames.

    Raises:
        UserError: outputs that exist for image files only; the message names them and the video.
    """
    if tools := [name for name in outputs if name not in _MAKERS]:
        raise UserError(
            f"mode.outputs names {join_names(tools)}, which need image files, but {video} is a video: its frames "
            f"support {', '.join(_MAKERS)}. Leave videos out, or give a folder of frames (ffmpeg -i IN "
            "FRAMES/%09d.png)."
        )
