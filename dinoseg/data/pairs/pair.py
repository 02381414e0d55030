"""Image and mask pairs, and their fingerprints; imports no torch."""

import functools
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoseg.core.sources import (
    ImageSource,
    MaskSource,
    ObjectSource,
    mask_file,
    read_valid_pixels,
    reading_rule,
    source_files,
    source_origin,
)
from dinoseg.data.classes.masks import MaskReader, check_fit
from dinoseg.utils.files import Stamp, stamp


@dataclass(frozen=True)
class Pair:
    """Image (files or a video frame) and mask (a file, a drawing or layers); `name` is unique in the dataset.

    Either all pairs of a dataset have objects or none.
    """

    name: str
    image: ImageSource
    mask: MaskSource
    objects: ObjectSource | None = None

    @property
    def origin(self) -> str:
        """Return the location of the image."""
        return source_origin(self.image)


def ignore_invalid(mask: np.ndarray, image: ImageSource, ignore_index: int, *, rule: str, path: object) -> np.ndarray:
    """Return class ids (H, W), layers (K, H, W) or objects (N, H, W), ignored where the internal mask ignores.

    Raises:
        UserError: the image cannot be read, or it has another size than the mask.
    """
    valid = read_valid_pixels(image)
    if valid is None:
        return mask
    check_fit((mask.shape[-2], mask.shape[-1]), (valid.shape[0], valid.shape[1]), rule, image=image, path=path)
    return np.where(valid, mask, np.uint8(ignore_index))


def fingerprint(pairs: Iterable[Pair], reader: MaskReader) -> str:
    """Return a hash that changes with the names, any file or its location, the classes and the mask rules."""
    resolved = functools.cache(os.path.realpath)  # cached per folder: there are few, and each call stats all parents
    digest = hashlib.sha256(reader.rules().encode())
    for pair in pairs:
        paths = [*source_files(pair.image), mask_file(pair.mask)]
        drawn = [] if isinstance(pair.mask, Path) else [pair.mask.digest()]
        if pair.objects is not None:
            paths.append(pair.objects.path)
            drawn.append(pair.objects.digest())
        files = [(resolved(path.parent), path.name, stamp(path)) for path in paths]
        # repr, since some names are no valid text
        digest.update(f"{(pair.name, reading_rule(pair.image), files, *drawn)!r}\n".encode())
    return digest.hexdigest()


def image_hash(source: ImageSource) -> str:
    """Return a hash of the bytes of an image's files and its `reading_rule`; unchanged files are read only once."""
    hashes = [_file_hash(path, stamp(path)) for path in source_files(source)]
    return hashlib.sha256(f"{' '.join(hashes)} {reading_rule(source)}".encode()).hexdigest()


@functools.lru_cache(2**17)
def _file_hash(path: Path, stamped: Stamp | None) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
