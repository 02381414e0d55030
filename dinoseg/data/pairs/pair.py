"""Image and mask pairs, and their fingerprints; imports no torch."""

import functools
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dinoseg.data.annotation.drawing import MaskSource, mask_file
from dinoseg.data.classes.masks import MaskReader
from dinoseg.data.video.access import ImageSource, VideoFrame, source_origin
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import Stamp, check_regular, stamp


@dataclass(frozen=True)
class Pair:
    """Image (a file or video frame) and mask (a file, a drawing or layers); `name` is unique in the dataset."""

    name: str
    image: ImageSource
    mask: MaskSource

    @property
    def origin(self) -> str:
        """Return the location of the image."""
        return source_origin(self.image)


def fingerprint(pairs: Iterable[Pair], reader: MaskReader) -> str:
    """Return a hash that changes with the names, any file or its location, the classes and the mask rules."""
    resolved = functools.cache(os.path.realpath)  # cached per folder: there are few, and each call stats all parents
    digest = hashlib.sha256(reader.rules().encode())
    for pair in pairs:
        image, frame = (pair.image.path, pair.image.index) if isinstance(pair.image, VideoFrame) else (pair.image, None)
        files = [(resolved(path.parent), path.name, stamp(path)) for path in (image, mask_file(pair.mask))]
        drawn = () if isinstance(pair.mask, Path) else (pair.mask.digest(),)
        digest.update(f"{(pair.name, frame, files, *drawn)!r}\n".encode())  # repr, since some names are no valid text
    return digest.hexdigest()


def image_hash(source: ImageSource) -> str:
    """Return a hash of a file's bytes and the frame index; a process reads an unchanged file only once.

    Raises:
        UserError: the file cannot be read.
    """
    path, frame = (source.path, source.index) if isinstance(source, VideoFrame) else (source, None)
    try:
        return hashlib.sha256(f"{_file_hash(path, stamp(path))} {frame}".encode()).hexdigest()
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Check that file, or leave it out.") from error


@functools.lru_cache(2**17)
def _file_hash(path: Path, stamped: Stamp | None) -> str:
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
