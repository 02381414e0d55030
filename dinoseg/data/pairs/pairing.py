"""Images and masks paired by name; what is no whole pair is kept with the reason, and refused or left out later."""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular
from dinoseg.utils.images import FORMATS, read_image
from dinoseg.utils.wording import count_of, reasons

_MASK_COLORS = 32  # of which a mask has more only where objects have ids of their own
_FEW = 3  # reasons that are told where nothing is whole: they will be alike


@dataclass(frozen=True)
class Lacking:
    """What ought to be a pair, or all pairs of a video.

    Args:
        name: of the pair, or of the video's first; it is divided among the splits as if it were whole, so that
            these stay as they are when it is mended.
        reason: what is wrong, with the file.
        remedy: what to do about it.
        title: what it is called; "": its name.
    """

    name: str
    reason: str
    remedy: str
    title: str = ""

    @property
    def origin(self) -> str:
        """Return what is wrong, which names the file."""
        return self.reason


def pair_by_name(
    images: Mapping[str, Path], masks: Mapping[str, Path], folders: tuple[Path, Path], remedy: str
) -> list[Pair | Lacking]:
    """Return the pairs, and the images and masks that are alone, in the order of their names.

    Args:
        images: name to file.
        masks: likewise.
        folders: of the images and of the masks.
        remedy: what to do about those that are alone.
    """
    sides = ((images, masks, "mask", folders[1]), (masks, images, "image", folders[0]))
    by_name: dict[str, Pair | Lacking] = {name: Pair(name, images[name], masks[name]) for name in images.keys() & masks}
    for files, others, other, folder in sides:
        twins = {_composed(name): path for name, path in others.items() if name not in files}
        for name in files.keys() - others.keys():
            reason = f"{files[name]} has no {other} in {folder}."
            if twin := twins.get(_composed(name)):
                reason += f" {twin} only looks as if it had its name: one has accents as signs of their own (Unicode "
                reason += "NFD, as macOS writes them), the other has not (NFC). Rename one."
            by_name[name] = Lacking(name, reason, remedy)
    return [by_name[name] for name in sorted(by_name)]


def gathered(candidates: Iterable[Pair | Lacking], split: str, labels: Labels, masks: Masks) -> PairDataset:
    """Return the data set of the whole pairs, which knows what is none.

    Raises:
        UserError: nothing is whole.
    """
    whole: list[Pair] = []
    lacking: dict[str, str] = {}
    remedies: dict[str, None] = {}  # in order, each once
    for candidate in candidates:
        if isinstance(candidate, Pair):
            whole.append(candidate)
        else:
            lacking[candidate.title or candidate.name] = candidate.reason
            remedies[candidate.remedy] = None
    dataset = PairDataset(whole, labels, masks, lacking, "\n".join(remedies))
    if not whole:
        raise not_whole(dataset, split)
    _refuse_swapped(dataset, split)
    return dataset


def _refuse_swapped(dataset: PairDataset, split: str) -> None:
    """Refuse a data set of whose first pair the image can be read as a mask, and the mask has the colors of a photo."""
    image, mask = dataset.pairs[0].image, dataset.pairs[0].mask
    if not isinstance(image, Path) or not isinstance(mask, Path) or not _has_colors(mask) or _is_mask(dataset, mask):
        return
    if _is_mask(dataset, image) and _count_colors(mask) > max(_count_colors(image), _MASK_COLORS):
        raise UserError(
            f"Split {split}: {image} can be read as a mask, and {mask} cannot: images and masks are swapped. Swap the "
            "folders, such as those of data.reader.layout.images and .masks."
        )


def _is_mask(dataset: PairDataset, path: Path) -> bool:
    try:
        dataset.reader.read(path)
    except Exception:  # a decoder may raise anything on a damaged file
        return False
    return True


def _has_colors(path: Path) -> bool:
    """Return whether a picture has several channels by its header: masks without are not read before they are used."""
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as file:
            return len(file.getbands()) > 1
    except Exception:  # a decoder may raise anything on a damaged file
        return False


def _count_colors(path: Path) -> int:
    """Return the number of colors of a picture; 0 where it cannot be read."""
    try:
        pixels = read_image(path).astype(np.int32)  # (H, W, 3)
    except Exception:  # a decoder may raise anything on a damaged file
        return 0
    return len(np.unique(pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]))


def not_whole(dataset: PairDataset, split: str) -> UserError:
    """Return the error that names what is no whole pair."""
    lacking = dataset.lacking
    if not len(dataset):
        return UserError(f"Split {split} has no image with its mask:{reasons(lacking, _FEW)}\n{dataset.remedy}")
    return UserError(
        f"Split {split} has {count_of(dataset.pairs, 'image')} with a mask, and {len(lacking)} that lack something:"
        f"{reasons(lacking)}\n{dataset.remedy}\nTo go on without them: data.on_error=skip."
    )


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
