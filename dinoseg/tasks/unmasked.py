"""Images without masks that a training uses in addition to those with masks."""

import logging
from collections.abc import Hashable, Sequence
from pathlib import Path

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.unlabelled import fault
from dinoseg.data.video.access import ImageSource
from dinoseg.experiment.builder import Builder
from dinoseg.tasks.selection.pool import PoolImage, found_in
from dinoseg.training.mixed_data_module import Unlabelled
from dinoseg.utils.wording import join_names
from dinoseg.utils.workers import in_processes

logger = logging.getLogger(__name__)
_FEW = 64  # number of images below which starting processes costs more than it saves


def unmasked_images(
    parts: Builder, options: Unlabelled, train: SegmentationData, val: SegmentationData
) -> list[PoolImage]:
    """Return the training images that are not among those with masks, and those that `trainer.unlabelled` names.

    An image that both name appears once. Validation images among them cause a warning. With `data.on_error=skip`,
    unreadable images are left out with a warning.

    Args:
        parts: builds the parts of the experiment.
        options: options of the trainer.
        train: the images with masks; those that `data.on_error=skip` left out of it are left out here, too.
        val: the validation images.

    Raises:
        UserError: `trainer.unlabelled` names nothing, or something unreadable.
    """
    others, found = {*train.names, *train.skipped}, []
    whole = parts.reader()("train")
    if isinstance(whole, PairDataset):
        found += [PoolImage(pair.name, pair.image) for pair in whole.pairs if pair.name not in others]
    if options.images is not None:
        key = "trainer.unlabelled"
        found += found_in(options.images, every=options.every, cache_dir=parts.cache_dir, key=key)
    images: dict[Hashable, PoolImage] = {}
    for candidate in found:
        images.setdefault(_identity(candidate.source), candidate)
    pairs: Sequence[Pair] = val.source.pairs if isinstance(val, PairDataset) else []
    scored = {_identity(pair.image) for pair in pairs}
    if seen := images.keys() & scored:
        logger.warning(
            "%d of the images without masks are validation images, so the scores are on images seen in training. "
            "Remove them from trainer.unlabelled for scores on unseen images.",
            len(seen),
        )
    chosen = [*images.values()]
    return _readable(chosen, parts.workers) if parts.skips_faulty_files else chosen


def _readable(images: Sequence[PoolImage], workers: int) -> list[PoolImage]:
    """Return the images that can be read, and warn of the others."""
    sources, processes = [image.source for image in images], workers if len(images) >= _FEW else 1
    faults = [why for _, why in in_processes(fault, sources, processes, remedy="Use fewer processes: data.workers=1.")]
    if bad := [why for why in faults if why]:
        logger.warning("data.on_error=skip: left out of the images without masks: %d. %s", len(bad), join_names(bad, 3))
    return [image for image, why in zip(images, faults, strict=True) if not why]


def _identity(source: ImageSource) -> Hashable:
    """Return a key that is the same for all names of one image or frame."""
    return source.resolve() if isinstance(source, Path) else (source.path.resolve(), source.index)
