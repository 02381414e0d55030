"""References of a segmentation by example: images and their masks, read and checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.channels import PixelFormat
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks, fit_mask
from dinoseg.extensions.example.matcher import ReferenceImage
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import expand_path
from dinoseg.utils.wording import format_override, join_names

ONE_CONCEPT = Labels.of(["background", "object"], None, 255)  # without classes: any value above 0 is the object
ONE_CONCEPT_MASKS: dict[str, Any] = {"ids": {255: 1}, "others": "object"}  # arguments of `Masks`


def object_reader() -> MaskReader:
    """Return a reader of masks whose values above 0 are the class 1."""
    return MaskReader(ONE_CONCEPT, Masks(**ONE_CONCEPT_MASKS))


def read_references(
    pairs: Any, reader: MaskReader, pixels: PixelFormat, background: int | None, concepts: Sequence[int]
) -> list[ReferenceImage]:
    """Return the references that pairs of paths name.

    Args:
        pairs: the value of `references`: a list of [image, mask].
        reader: of the masks.
        pixels: format of the images.
        background: class id; None: the classes have none.
        concepts: class ids to segment, in the order of a reference's masks.

    Raises:
        UserError: there are no pairs of paths, a file cannot be read, or a mask has another size than its image or
            shows no concept.
    """
    paths = [[expand_path(str(part), ".jpg") for part in pair] for pair in check_pairs(pairs)]
    return [_read_reference(image, mask, reader, pixels, background, concepts) for image, mask in paths]


def check_pairs(pairs: Any) -> list[tuple[Any, Any]]:
    """Return pairs of an image and a mask.

    Raises:
        UserError: the value is something else.
    """
    is_list = isinstance(pairs, list | tuple) and len(pairs) > 0
    if not is_list or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UserError(
            f"references={format_override(pairs)}: give a list of pairs of an image and its mask, such as "
            "'references=[[IMAGE,MASK]]'."
        )
    return [(image, mask) for image, mask in pairs]


def make_reference(
    image: np.ndarray, ids: np.ndarray, labels: Labels, background: int | None, concepts: Sequence[int], name: Any
) -> ReferenceImage:
    """Return an image (H, W, C) with the masks of the background and the concepts in its class ids (H, W).

    Args:
        image: uint8 or uint16.
        ids: class ids.
        labels: the classes.
        background: class id; None: no pixel is background.
        concepts: class ids of the masks, in this order.
        name: of the mask, for the message.

    Raises:
        UserError: the sizes differ, or the mask shows no concept.
    """
    if ids.shape != image.shape[:2]:
        raise UserError(
            f"{name} is of {list(ids.shape)} (H, W), and its image of {list(image.shape[:2])}. Give a mask of the size "
            "of its image."
        )
    masks = np.stack([ids == number for number in (-1 if background is None else background, *concepts)])
    if not masks[1:].any():
        wanted = join_names([labels.classes[concept] for concept in concepts])
        values = join_names([str(value) for value in np.unique(ids)])
        raise UserError(
            f"{name} shows nothing to segment: it has the class ids {values}, and no pixel of {wanted}. Give a mask "
            "that shows it."
        )
    return ReferenceImage(image, masks)


def _read_reference(
    image: Path,
    mask: Path,
    reader: MaskReader,
    pixels: PixelFormat,
    background: int | None,
    concepts: Sequence[int],
) -> ReferenceImage:
    shown = pixels.read(image)
    size = (shown.shape[0], shown.shape[1])
    ids = fit_mask(reader.read(mask), size, reader.masks.on_size_mismatch, image=image, path=mask)
    return make_reference(shown, ids, reader.labels, background, concepts, mask)
