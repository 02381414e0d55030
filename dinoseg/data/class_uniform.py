"""Index of the images that contain each class, for class-uniform sampling."""

import logging
from pathlib import Path

import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.likeness import digest
from dinoseg.data.scan.scan import scan
from dinoseg.data.train_views import ClassUniform
from dinoseg.report.progress import Bar
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import HighShare
from dinoseg.utils.wording import join_names

log = logging.getLogger(__name__)


def class_uniform(
    dataset: SegmentationData, share: HighShare, *, cache_dir: str | Path, workers: int = 1
) -> ClassUniform:
    """Return the class-uniform sampling of a dataset; warn of classes without a pixel in any mask.

    Masks are scanned as by the doctor, and the results are cached in `cache_dir`. An unreadable mask counts as having
    no class. Datasets other than `PairDataset` are read on every call.

    Raises:
        UserError: no mask has a pixel of a class.
    """
    if isinstance(dataset, PairDataset):
        files = dataset.source  # the masks of a packed dataset may be reduced
        records = scan(files.pairs, files.reader, images=False, workers=workers, cache_dir=cache_dir)
        counts = [record.counts for record in records]
        digests = [record.mask_digest for record in records]
    else:
        bar = Bar(range(len(dataset)), desc="looking for classes", unit="mask", delay=2, leave=False)
        masks = (dataset[index]["mask"].numpy() for index in bar)
        found = [(np.bincount(mask.ravel(), minlength=256), digest(mask)) for mask in masks]
        counts, digests = [count for count, _ in found], [text for _, text in found]
    has = np.stack(counts) > 0  # (images, 256)
    has[:, dataset.ignore_index] = False
    named = dict(enumerate(dataset.classes))
    images = {id: np.flatnonzero(has[:, id]) for id in named if has[:, id].any()}
    if not images:
        raise UserError(
            f"data.class_uniform={share}: no training mask has a pixel of a class. Check the masks with mode=doctor, "
            "or set data.class_uniform=0."
        )
    if absent := [name for id, name in named.items() if id not in images and id != dataset.ignore_index]:
        log.warning(
            "data.class_uniform=%g: no training mask has a pixel of %s, so it is never sampled. Remove such a class "
            "from data.classes, or add images that show it.",
            share,
            join_names(absent),
        )
    return ClassUniform(share, images, digests)
