"""Reader of IDD, Indian driving scenes in the layout of Cityscapes: one part or several, in any label encoding."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.label_tables.read import label_table
from dinoseg.data.pairs.dataset import IncompletePair, PairDataset, collect_pairs
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import Partition, divide
from dinoseg.extensions.idd.files import (
    ENCODINGS,
    HOME_MADE,
    IMAGE,
    IMAGES,
    LABELS,
    POLYGONS,
    files_of,
    find_parts,
    label_suffix,
    prepare_command,
)
from dinoseg.extensions.idd.home_made import check_home_made
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries
from dinoseg.utils.wording import join_names

log = logging.getLogger(__name__)

BY_DRIVE = Partition(group="^(.+)/")
_LEVEL3_CLASSES = 26  # whose 0 and 3 are road and rail track
_NO_CLASS_AT_HOME = (0, 3, *range(26, 255))  # ignored file ids of the home-made remap, which maps 255 to road


def idd(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int = 255,
    encoding: str = "level3Id",
    masks: Masks = Masks(),  # noqa: B008 (frozen)
    partition: Partition = BY_DRIVE,
) -> PairDataset:
    """Return the images with their label maps, named `{drive}/{id}`.

    Names are `{part}/{drive}/{id}` if several parts have a drive of the same name.

    Args:
        root: a part, which holds `leftImg8bit` and `gtFine`, or the folder of several parts, which are all read.
        split: `train`, `val`, or `test` if you have its labels.
        classes: names in id order.
        palette: one colour per class, or None for default colours.
        ignore_index: id that is ignored.
        encoding: label maps to read: `id`, `csId`, `csTrainId`, `level4Id`, `level3Id`, `level2Id`, `level1Id`, or
            `home_made` (a faulty conversion to `*_gtFine_labelIds.png`, whose 255 is read as road; logs a warning).
        masks: how mask files are encoded.
        partition: folds, by drive; without folds, the split is given by the folders.

    Raises:
        UserError: a folder is missing, no image has its label map, or the classes are not those of the encoding; when
            an item is read: an unreadable file, differing sizes, ids without class.
    """
    labels = Labels.of(classes, palette, ignore_index)
    if partition.by != "folder":
        raise UserError(
            f"data.reader.partition.by={partition.by}: IDD has split folders. Remove it, or set data.folds and "
            "data.fold for cross-validation."
        )
    if encoding == HOME_MADE:
        log.warning(
            "data=idd_home_made trains on a custom remap: 255 is void in IDD but road here, and true road (0) is "
            "dropped. Its scores are not comparable with IDD. Use data=idd, after mode=prepare data=idd."
        )
        remap = {**dict.fromkeys(_NO_CLASS_AT_HOME, ignore_index), 255: 0}
        masks = replace(masks, ids={**remap, **(masks.ids or {})})
    else:
        _check_encoding(encoding, labels, masks)
    top = Path(root).expanduser()
    pairs = divide(split, lambda side: find_pairs(top, side, encoding), partition)
    dataset = collect_pairs(pairs, split, labels, masks)
    if len(labels.classes) == _LEVEL3_CLASSES and masks.format == "ids":
        dataset.check_labels = partial(check_home_made, on_purpose=encoding == HOME_MADE)
    return dataset


def find_pairs(root: Path, split: str, encoding: str) -> list[Pair | IncompletePair]:
    """Return the pairs in a split's folders, part by part, ordered by name.

    Raises:
        UserError: see `idd`.
    """
    parts = find_parts(root)
    with_split = {name: part for name, part in parts.items() if (part / IMAGES / split).is_dir()}
    if not with_split:
        splits = sorted({path.name for part in parts.values() for path in entries(part / IMAGES) if path.is_dir()})
        folders = ", ".join(str(part / IMAGES / split) for part in parts.values())
        raise UserError(f"No folder {folders}: the splits there are {join_names(splits) or 'none'}. Check data.root.")
    prefixed = _share_a_drive(parts)
    pairs = [
        pair
        for part, folder in with_split.items()
        for pair in _pairs_of(root, folder, split, encoding, f"{part}/" if prefixed else "")
    ]
    if not pairs:
        folders = ", ".join(str(part / IMAGES / split) for part in with_split.values())
        raise UserError(f"{folders} holds no image {{drive}}/{{id}}{IMAGE}.png or .jpg. Unpack the archive again.")
    return pairs


def _pairs_of(root: Path, part: Path, split: str, encoding: str, prefix: str) -> Iterator[Pair | IncompletePair]:
    folder, suffix = part / LABELS / split, label_suffix(encoding)
    images = files_of(part / IMAGES / split, IMAGE, (".png", ".jpg", ".jpeg"))
    masks = files_of(folder, suffix, (".png",))
    if split == "test" and images and not masks:
        raise UserError(
            f"no {suffix[1:]}.png in {folder}: the labels of IDD's test split are not public. Use split val, or "
            "predict without labels."
        )
    polygons = files_of(folder, POLYGONS, (".json",)) if images.keys() - masks.keys() else {}
    for name, image in images.items():
        if name in masks:
            yield Pair(prefix + name, image, masks[name])
        elif name in polygons:
            reason = f"{image} has no {suffix[1:]}.png in {folder}, but it has polygons."
            yield IncompletePair(prefix + name, reason, _to_draw(root, encoding))
        else:
            reason = f"{image} has no {suffix[1:]}.png in {folder}, and no polygons to create it from."
            yield IncompletePair(prefix + name, reason, "Unpack the archive again, or remove the images.")
    for name in (name for name in masks if name not in images):
        reason = f"{masks[name]} has no image in {part / IMAGES / split}."
        yield IncompletePair(prefix + name, reason, "Unpack the archive again, or remove the label maps.")


def _to_draw(root: Path, encoding: str) -> str:
    if encoding == HOME_MADE:
        return f"Create the official label maps from the polygons and use data=idd: {prepare_command(root, 'level3Id')}"
    return f"Create the label maps first: {prepare_command(root, encoding)}"


def _check_encoding(encoding: str, labels: Labels, masks: Masks) -> None:
    """Raise a UserError for an unknown encoding, or for classes of another encoding unless `masks.ids` maps them."""
    if encoding not in ENCODINGS:
        raise UserError(
            f"data.reader.encoding={encoding} is unknown. Choose one of {', '.join(ENCODINGS)}, {HOME_MADE}."
        )
    ids = {int(row[ENCODINGS[encoding]]) for row in label_table("idd")}
    count = max(value for value in ids if value < 255) + 1
    if len(labels.classes) != count and not masks.ids:
        raise UserError(
            f"data.classes has {len(labels.classes)} names, but the ids of data.reader.encoding={encoding} go from 0 "
            f"to {count - 1}. Choose the data set by its name (data=idd, idd_level2, idd_level1, idd_cityscapes, "
            "idd_ids), or map the ids with data.reader.masks.ids."
        )


def _share_a_drive(parts: Mapping[str, Path]) -> bool:
    """Return whether two parts share a drive name in any split, so that names do not depend on the split."""
    drives = [
        {drive.name for split in entries(part / IMAGES) for drive in entries(split) if drive.is_dir()}
        for part in parts.values()
    ]
    return len(set().union(*drives)) < sum(map(len, drives))
