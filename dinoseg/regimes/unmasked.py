"""The images without masks that a training learns from beside those with."""

from pathlib import Path

from omegaconf import DictConfig

from dinoseg.config.nodes import instantiate
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.selection.pool import Candidate, found_in
from dinoseg.shapes import SegmentationData
from dinoseg.training.mixed_feed import Unlabelled


def unmasked_images(cfg: DictConfig, options: Unlabelled, train: SegmentationData) -> list[Candidate]:
    """Return the training images that are not among those with masks, and those that `trainer.unlabelled` names.

    Args:
        cfg: the whole config.
        options: of the trainer.
        train: the images with masks; what `data.on_error=skip` left out of it is left out here.

    Raises:
        UserError: `trainer.unlabelled` names nothing, or what cannot be read.
    """
    others, found = {*train.names, *train.skipped}, []
    whole = instantiate(cfg.data.reader)(split="train")
    if isinstance(whole, PairDataset):
        found += [Candidate(pair.name, pair.image) for pair in whole.pairs if pair.name not in others]
    if options.images is not None:
        key, cache_dir = "trainer.unlabelled", Path(cfg.cache_dir).expanduser()
        found += found_in(options.images, every=options.every, cache_dir=cache_dir, key=key)
    return found
