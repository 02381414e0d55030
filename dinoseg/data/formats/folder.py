"""Reader of a folder of images and a folder of masks, paired by name."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from dinoseg.core.sources import Layers, MaskPage, MaskSource, mask_file
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.data.pairs.dataset import IncompletePair, PairDataset, collect_pairs, pair_by_name
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import Partition, divide, file_list, read_name_list
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import ROOT_REMEDY, check_exists, visible_files
from dinoseg.utils.images import IMAGE_SUFFIXES, TIFF_SUFFIXES, UNREAD_SUFFIXES
from dinoseg.utils.wording import count_of, join_names

log = logging.getLogger(__name__)

_REMEDY = (
    "Add the missing files or remove the others; an image and its mask have the same name except for the suffixes in "
    "data.reader.layout."
)
_PER_CLASS = " Masks of one class each need task=multilabel."
_FLAT = " For masks NAME_CLASS.png in one folder, set 'data.reader.layout.mask_suffix=\"_{class}\"'."
_CONVERT = "Convert such files to PNG, or move them away."
_MASK_FOLDER = re.compile("mask|label|annot|seg|gt|truth", re.IGNORECASE)  # in the name of a mask folder


@dataclass(frozen=True)
class FolderLayout:
    """Locations of the files below the root; subfolders are searched and become part of the name.

    Args:
        images: image folder, with `{split}` for the split.
        masks: mask folder, with `{split}` for the split.
        image_suffix: end of an image's stem, after its name; files without it are not images.
        mask_suffix: end of a mask's stem, after its name; files without it are not masks.
        exclude: patterns of file names that are neither.
        splits: split to its name on disk, such as `{val: valid}`.
    """

    images: str = "{split}/images"
    masks: str = "{split}/masks"
    image_suffix: str = ""
    mask_suffix: str = ""
    exclude: Sequence[str] = ()
    splits: Mapping[str, str] = field(default_factory=dict)


def folder_dataset(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int = 255,
    layout: FolderLayout = FolderLayout(),  # noqa: B008 (frozen)
    masks: Masks = Masks(),  # noqa: B008 (frozen)
    partition: Partition = Partition(),  # noqa: B008 (frozen)
    layers: bool = False,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
) -> PairDataset:
    """Return the dataset of images and masks in folders.

    Args:
        root: folder that the layout's paths are relative to.
        split: `train`, `val` or another name that the layout or the lists know.
        classes: names in id order.
        palette: one colour per class, or None for default colours.
        ignore_index: id that is ignored.
        layout: locations of the files.
        masks: how mask files are encoded.
        partition: rule that assigns pairs to splits.
        layers: whether each class has its own mask files, see `class_layouts`, so that classes may overlap.
        suffixes: those of images, in lower case.

    Raises:
        UserError: a folder is missing or empty, no image has its mask, or two files have one name; when an item is
            read: an unreadable file, differing sizes, ids without class.
    """
    labels = Labels.of(classes, palette, ignore_index, has_layers=layers)
    top = Path(root).expanduser()
    _check_source(top, layout, partition)

    def find(side: str) -> list[Pair | IncompletePair]:
        """Return the pairs that the folders or the file list of a split name."""
        if layers:
            read_layer = MaskReader(labels, masks, has_layers=True).read
            by_name = _match_layers(labels, read_layer, suffixes, top, side, layout)
        else:
            by_name = _match_masks(suffixes, top, side, layout)
        names = (
            _read_listed_names(top, side, layout, partition, by_name) if partition.by == "lists" else sorted(by_name)
        )
        return [by_name[name] for name in names]

    pairs = divide(split, find, partition)
    if not pairs:
        images = _fill_pattern(top, split, layout.images, layout)
        raise UserError(
            f"Split {split} is empty: {images} holds no image named *{layout.image_suffix}.* "
            f"({', '.join(IMAGE_SUFFIXES)}). Check data.root and data.reader.layout."
        )
    return collect_pairs(pairs, split, labels, masks, has_layers=layers)


def _read_listed_names(
    root: Path, split: str, layout: FolderLayout, partition: Partition, by_name: Mapping[str, Pair | IncompletePair]
) -> list[str]:
    names = read_name_list(root / file_list(split, partition), "partition.lists")
    if absent := [name for name in names if name not in by_name]:
        raise UserError(
            f"The file list of split {split} has {count_of(absent, 'name')} without image and mask under "
            f"{_find_folder(root, split, layout.images, layout)}: "
            f"{join_names(absent)}. A name is the path below that folder, without suffix."
        )
    return names


def _match_masks(
    suffixes: Sequence[str], root: Path, split: str, layout: FolderLayout
) -> dict[str, Pair | IncompletePair]:
    """Return the pairs of images and masks of all classes, and what lacks a counterpart, by name."""
    folders = _find_folder(root, split, layout.images, layout), _find_folder(root, split, layout.masks, layout)
    images, unread = _find_files(folders[0], layout.image_suffix, layout, suffixes)
    masks, unread_masks = _find_files(folders[1], layout.mask_suffix, layout)
    by_name = pair_by_name(images, masks, folders, _REMEDY + _PER_CLASS)
    unread = {**unread_masks, **unread}
    return by_name | _report_unread({name: path for name, path in unread.items() if name not in images.keys() & masks})


def _report_unread(files: Mapping[str, Path]) -> dict[str, IncompletePair]:
    return {name: IncompletePair(name, f"{path} has an unsupported format.", _CONVERT) for name, path in files.items()}


def class_layouts(layout: FolderLayout, classes: Sequence[str]) -> list[FolderLayout]:
    """Return the layout of each class's mask files.

    `{class}` in the mask folder or the mask suffix stands for the class's name. If neither has it, the mask folder has
    a folder for each class, or TIFF files with a page for each class.
    """
    if "{class}" not in layout.masks + layout.mask_suffix:
        layout = replace(layout, masks=f"{layout.masks}/{{class}}")
    return [
        replace(
            layout,
            masks=layout.masks.replace("{class}", name),
            mask_suffix=layout.mask_suffix.replace("{class}", name),
        )
        for name in classes
    ]


def _match_layers(
    labels: Labels,
    read_layer: Callable[[MaskSource], np.ndarray],
    suffixes: Sequence[str],
    root: Path,
    split: str,
    layout: FolderLayout,
) -> dict[str, Pair | IncompletePair]:
    """Return the pairs of images and the masks of each class, and what lacks a counterpart, by name.

    An image does not show a class that has no mask of its name, or no folder; it needs a mask of at least one class.
    """
    folder = _find_folder(root, split, layout.images, layout)
    images, unread = _find_files(folder, layout.image_suffix, layout, suffixes)
    by_class: list[dict[str, MaskSource]] = []
    by_name: dict[str, Pair | IncompletePair] = {}
    layouts = class_layouts(layout, labels.classes)
    folders = [_fill_pattern(root, split, each.masks, each) for each in layouts]
    if not any(place.is_dir() for place in folders):
        by_class, unread_masks = _find_pages(root, split, layout, len(labels.classes))
        unread |= unread_masks
        folders = []
    if not folders and not any(by_class):  # raises an error
        _find_folder(root, split, layouts[0].masks, layouts[0], "" if layout.mask_suffix else _FLAT)
    for place, each in zip(folders, layouts, strict=False):
        if not place.is_dir():
            others = sorted(path.name for path in place.parent.glob("*/") if path.name not in labels.classes)
            unused = f" Folders of no class: {join_names(others, 10)}." if others else ""
            log.warning("%s is missing: no image of split %s shows this class.%s", place, split, unused)
            by_class.append({})
            continue
        masks, unread_masks = _find_files(place, each.mask_suffix, each)
        by_class.append({**masks})
        unread |= unread_masks
        for name, path in _find_folders(place, each.mask_suffix).items():
            if name in images and name not in masks:
                by_name[name] = IncompletePair(
                    name, f"{path} is a folder, not a mask.", "Replace each folder by the mask."
                )
    files = {mask_file(path) for masks in by_class for path in masks.values()}
    images = {name: path for name, path in images.items() if path not in files}
    shown = {name: [masks.get(name) for masks in by_class] for name in images}
    used = Counter(path for sources in shown.values() for path in sources if path is not None)
    if twice := next((path for path, count in used.items() if count > 1), None):
        raise UserError(f"{twice} is the mask of two images or classes by its name. Rename images or classes.")
    for name, path in images.items():
        if name in by_name:
            continue
        reason = f"{path} has no mask of any class. If it shows none, add an empty mask."
        pair = Pair(name, path, Layers(tuple(shown[name]), read_layer))
        by_name[name] = pair if any(shown[name]) else IncompletePair(name, reason, _REMEDY)
    for name, mask in (entry for masks in by_class for entry in masks.items()):
        if mask not in used:
            by_name[name] = IncompletePair(name, f"{mask_file(mask)} has no image in {folder}.", _REMEDY)
    return by_name | _report_unread(unread)


def _find_pages(
    root: Path, split: str, layout: FolderLayout, count: int
) -> tuple[list[dict[str, MaskSource]], dict[str, Path]]:
    """Return name to page of each class, of TIFF masks with a page for each class, and name to unreadable file."""
    folder = _fill_pattern(root, split, layout.masks, layout)
    if "{class}" in layout.masks + layout.mask_suffix or not folder.is_dir():
        return [], {}
    masks, unread = _find_files(folder, layout.mask_suffix, layout)
    tiffs = {name: path for name, path in masks.items() if path.suffix.lower() in TIFF_SUFFIXES}
    return [{name: MaskPage(path, index, count) for name, path in tiffs.items()} for index in range(count)], unread


def _find_files(
    folder: Path, suffix: str, layout: FolderLayout, suffixes: Sequence[str] | None = None
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return name to path of the files below a folder whose stem ends with `suffix`: readable ones, unreadable ones.

    `suffixes` are those of images; without them, the files are masks.
    """
    kinds = (*(suffixes or IMAGE_SUFFIXES), *UNREAD_SUFFIXES)
    has_masks = suffixes is not None and layout.mask_suffix != "" and layout.images == layout.masks
    paths: dict[str, Path] = {}
    unread: dict[str, Path] = {}
    for path in (parent / file for parent, files in visible_files(folder) for file in files):
        kind = path.suffix.lower()
        excluded = any(fnmatch(path.name, pattern) for pattern in layout.exclude)
        is_mask = has_masks and path.stem.endswith(layout.mask_suffix)
        if excluded or is_mask or kind not in kinds or not path.stem.endswith(suffix):
            continue
        name = (path.parent / path.stem.removesuffix(suffix)).relative_to(folder).as_posix()
        if kind in UNREAD_SUFFIXES:
            unread[name] = path
            continue
        if name in paths:
            raise UserError(f"{paths[name]} and {path} have the same name ({name}): keep one of them.")
        paths[name] = path
    return paths, unread


def _find_folders(top: Path, suffix: str) -> dict[str, Path]:
    """Return name to path of the folders below another one that are named as mask files."""
    folders = [parent for parent, _ in visible_files(top) if parent != top]
    named = [folder for folder in folders if folder.suffix.lower() in IMAGE_SUFFIXES and folder.stem.endswith(suffix)]
    return {(folder.parent / folder.stem.removesuffix(suffix)).relative_to(top).as_posix(): folder for folder in named}


def _fill_pattern(root: Path, split: str, pattern: str, layout: FolderLayout) -> Path:
    return root / pattern.replace("{split}", layout.splits.get(split, split))


def _find_folder(root: Path, split: str, pattern: str, layout: FolderLayout, remedy: str = "") -> Path:
    folder = _fill_pattern(root, split, pattern, layout)
    if not folder.is_dir():
        there = next(parent for parent in folder.parents if parent.is_dir())
        folders = sorted(path.name for path in there.iterdir() if path.is_dir())
        raise UserError(
            f"No folder {folder} for split {split} (pattern {pattern}). {there} holds "
            f"{f'the folders {join_names(folders, 10)}' if folders else 'no folders'}. Check data.root and "
            f"data.reader.layout.{remedy}{_advise_on_coco(root)}"
            f"{_advise_on_splits(root, folders) if there == root else ''}"
        )
    return folder


def _advise_on_splits(root: Path, folders: Sequence[str]) -> str:
    """Return advice on splitting one image folder, or "" unless the root has one folder each of images and masks."""
    holding = [name for name in folders if _has_images(root / name)]
    masks = [name for name in holding if _MASK_FOLDER.search(name)]
    if len(holding) != 2 or len(masks) != 1:
        return ""
    images = next(name for name in holding if name not in masks)
    return (
        " These folders have no splits. To hold out a share of the images for val, add "
        f"data.reader.layout.images={images} data.reader.layout.masks={masks[0]} data.reader.partition.by=fraction"
    )


def _advise_on_coco(root: Path) -> str:
    """Return advice on data in COCO's layout; "" for others."""
    file = next(iter(sorted(root.glob("annotations/*.json"))), None)
    return f" {file} looks like COCO's: choose data=coco, or data=coco_instances for its objects." if file else ""


def _has_images(folder: Path) -> bool:
    return any(Path(file).suffix.lower() in IMAGE_SUFFIXES for _, files in visible_files(folder) for file in files)


def find_problem(root: Path, layout: FolderLayout, partition: Partition) -> str:
    """Return the error message on a missing root, or on missing folders of the training split; "" for none."""
    try:
        _check_source(root, layout, partition)
        for pattern in (layout.images, layout.masks):
            _find_folder(root, "train", pattern, layout)
    except UserError as error:
        return str(error)
    return ""


def split_folders(layout: FolderLayout) -> list[str]:
    """Return the folders of images and masks of train and val, relative to the root."""
    names = [layout.splits.get(split, split) for split in ("train", "val")]
    patterns = (layout.images, layout.masks)
    return list(dict.fromkeys(pattern.replace("{split}", name) for name in names for pattern in patterns))


def _check_source(root: Path, layout: FolderLayout, partition: Partition) -> None:
    check_exists(root, "data.root", ROOT_REMEDY)
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder. {ROOT_REMEDY}")
    patterns = (layout.images, layout.masks)
    if partition.by != "lists" and any(("{split}" in pattern) != (partition.by == "folder") for pattern in patterns):
        raise UserError(
            f"data.reader.layout.images={layout.images} and data.reader.layout.masks={layout.masks}: with "
            "data.reader.partition.by=folder, both must contain {split}, or all splits are the same files; with "
            "by=fraction, which splits one folder, neither may."
        )
