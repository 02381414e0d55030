"""Images without masks that a training uses in addition to those with masks."""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dinoseg.core.channels import PixelFormat, check_rgb
from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sources import ImageSource, source_origin
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.feature_cache.unlabelled import Unmasked, fault
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.extensions.video.index import VideoIndex, find_index
from dinoseg.extensions.video.length import VIDEO_SUFFIXES, is_video
from dinoseg.inference.inputs import list_inputs
from dinoseg.inference.results import mask_names
from dinoseg.runs.split_file import OUTSIDE
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Positive
from dinoseg.utils.wording import count_of, join_names
from dinoseg.utils.workers import in_processes

logger = logging.getLogger(__name__)
_FEW = 64  # number of images below which starting processes costs more than it saves
_RATE = 25.0  # frames per second of a video without a valid rate
_ROUNDING = 1e-6  # tolerance in seconds of a frame's time at a step
# from parameters of `open_unmasked` to the keys that set them
UNMASKED = {
    "source": "trainer.unlabelled",
    "every": "trainer.unlabelled_every",
    "batch_size": "trainer.unlabelled_batch_size",
}


@dataclass(frozen=True)
class UnmaskedImage:
    """Image, or frame of a video, without a mask.

    Args:
        name: unique: that of the data set; else a relative path without suffix, the image's path below the input, or
            a frame's number.
        source: where to read it from.
    """

    name: str
    source: ImageSource


def find_unmasked_images(
    builder: Builder,
    train: SegmentationData,
    val: SegmentationData,
    *,
    source: str | None,
    every: Positive,
    exclude: Collection[str] = (),
) -> list[UnmaskedImage]:
    """Return the training images that are not among those with masks, and those that `trainer.unlabelled` names.

    An image that both name appears once. Those that are not of the data set have names that begin with `unlabelled/`.
    Validation images among them cause a warning. With `data.on_error=skip`, unreadable images are left out with a
    warning.

    Args:
        builder: builds the parts of the experiment.
        train: the images with masks; those that `data.on_error=skip` left out of it are left out here, too.
        val: the validation images.
        source: `trainer.unlabelled`; None: the training images alone.
        every: seconds between two frames of a video.
        exclude: origins of images to leave out, see `source_origin`.

    Raises:
        UserError: `trainer.unlabelled` names nothing, or something unreadable.
    """
    others, found = {*train.names, *train.skipped}, []
    whole = builder.reader()("train")
    if isinstance(whole, PairDataset):
        found += [UnmaskedImage(pair.name, pair.image) for pair in whole.pairs if pair.name not in others]
    if source is not None:
        more = list_images(source, every=every, cache_dir=builder.cache_dir, pixels=builder.pixels)
        found += [replace(image, name=f"{OUTSIDE}{image.name}") for image in more]
    images: dict[str, UnmaskedImage] = {}
    for candidate in found:
        images.setdefault(source_origin(candidate.source), candidate)
    pairs: Sequence[Pair] = val.source.pairs if isinstance(val, PairDataset) else []
    scored = {source_origin(pair.image): pair.name for pair in pairs}
    if seen := images.keys() & scored.keys():
        logger.warning(
            "%d of the images without masks are validation images, so the scores are on images seen in training. "
            "Remove them from trainer.unlabelled for scores on unseen images.",
            len(seen),
        )
        names = {image.name for image in found} | others  # an equal name of val is that of another image
        named = {origin: replace(images[origin], name=scored[origin]) for origin in seen if scored[origin] not in names}
        images |= named
    chosen = [image for origin, image in images.items() if origin not in exclude]
    return _select_readable(chosen, builder.workers) if builder.skips_faulty_files else chosen


def open_unmasked(
    builder: Builder,
    data_module: ImageDataModule,
    *,
    source: str | None,
    every: Positive,
    batch_size: Count | None,
    exclude: Collection[str] = (),
) -> ImageDataModule | None:
    """Return the feed of a training's images without masks; None if there are none.

    Args:
        builder: builds the parts of the experiment.
        data_module: feed of the images with masks.
        source: see `find_unmasked_images`.
        every: see `find_unmasked_images`.
        batch_size: images without masks per batch, over all ranks; None: as many as images with masks.
        exclude: see `find_unmasked_images`.

    Raises:
        UserError: see `find_unmasked_images`; or the batch size does not fit.
    """
    found = find_unmasked_images(
        builder, data_module.train, data_module.val, source=source, every=every, exclude=exclude
    )
    if not found:
        if batch_size is not None:
            raise UserError(
                f"trainer.unlabelled_batch_size={batch_size}: {explain_none(source)}; or leave it out to train on "
                "images with masks only."
            )
        return None
    images = Unmasked([image.name for image in found], [image.source for image in found], data_module.train)
    size = batch_size or data_module.batch_size
    if size > len(images) or size % data_module.world_size:
        devices = data_module.world_size
        raise UserError(
            f"trainer.unlabelled_batch_size={size}{'' if batch_size else ' (data.batch_size)'} with "
            f"{count_of(len(images), 'image')} without masks: choose a number from 1 to {len(images)}"
            f"{f', a multiple of {devices} for the devices,' if devices > 1 else ''} or add images."
        )
    return replace(data_module, train=images, batch_size=size)


def explain_none(source: str | None) -> str:
    """Return that there are no images without masks, though `trainer.unlabelled` may name some, and the remedy."""
    named = "" if source is None else f": all of trainer.unlabelled={source} are training images with masks"
    return (
        f"there are no images without masks{named}. Give trainer.unlabelled=<folder, quoted pattern or video>"
        f"{' of others' if named else ''}, or data.labelled=<share or file of names>, which leaves masks out"
    )


def list_images(
    source: str,
    *,
    every: float,
    cache_dir: Path,
    pixels: PixelFormat = PixelFormat(),  # noqa: B008 (frozen)
) -> list[UnmaskedImage]:
    """Return the images and frames that an image, video, folder or pattern refers to, in order.

    A video contributes the first frame of each `every` seconds. If the source is a single video, frames are named by
    their number, as in mode=track, else `<video>/<number>`.

    Args:
        source: as for `list_inputs`.
        every: seconds from frame to frame.
        cache_dir: folder of cached video indexes.
        pixels: format of the images.

    Raises:
        UserError: nothing is found, a video cannot be read, or images are not RGB and there is a video.
    """
    paths = list_inputs(source, "trainer.unlabelled", pixels.suffixes, VIDEO_SUFFIXES)
    names = mask_names(paths, source)
    found: list[UnmaskedImage] = []
    for path, name in zip(paths, names, strict=True):
        if is_video(path):
            check_rgb(pixels, f"the video {path} in trainer.unlabelled")
            found += _list_frames(path, "" if len(paths) == 1 else f"{name}/", every, cache_dir)
        else:
            found.append(UnmaskedImage(name, pixels.source(path)))
    return found


def _list_frames(path: Path, prefix: str, every: float, cache_dir: Path) -> Iterator[UnmaskedImage]:
    steps = np.floor((_seconds(find_index(path, cache_dir)) + _ROUNDING) / every)
    for index in np.unique(steps, return_index=True)[1].tolist():
        yield UnmaskedImage(f"{prefix}{index:09d}", VideoFrame(path, index, cache_dir))


def _seconds(index: VideoIndex) -> np.ndarray:
    """Return the time of each frame from the first on; evenly spaced if the file's own times are invalid."""
    if len(index) > 1 and np.all(np.diff(index.times) > 0):
        return (index.times - index.times[0]) / 1000
    return np.arange(len(index)) / (index.fps if 0 < index.fps <= 1000 else _RATE)


def _select_readable(images: Sequence[UnmaskedImage], workers: int) -> list[UnmaskedImage]:
    """Return the images that can be read, and warn of the others."""
    sources, processes = [image.source for image in images], workers if len(images) >= _FEW else 1
    faults = [why for _, why in in_processes(fault, sources, processes, remedy="Use fewer processes: data.workers=1.")]
    if bad := [why for why in faults if why]:
        logger.warning("data.on_error=skip: left out of the images without masks: %d. %s", len(bad), join_names(bad, 3))
    return [image for image, why in zip(images, faults, strict=True) if not why]
