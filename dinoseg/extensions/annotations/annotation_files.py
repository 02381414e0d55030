"""Lookup and parsing of annotation files below a folder; imports no torch."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dinoseg.extensions.annotations.coco import read_coco
from dinoseg.extensions.annotations.coco_panoptic import read_coco_panoptic
from dinoseg.extensions.annotations.entry import LARGEST_FILE, Annotations, Entry
from dinoseg.extensions.annotations.labelme import read_labelme
from dinoseg.extensions.annotations.yolo import list_yolo_images, read_yolo
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import ROOT_REMEDY, Stamp, check_exists, check_regular, entries, stamp, visible_files
from dinoseg.utils.wording import join_names

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_ALIASES = {
    "train": ("train", "train2017", "training", "Train"),
    "val": ("val", "valid", "validation", "val2017", "Val", "Validation"),
    "test": ("test", "test2017", "Test"),
}


@dataclass(frozen=True)
class AnnotationLayout:
    """Locations of the files below the root.

    Args:
        annotations: the annotation file (of LabelMe: the folder of files), with `{split}` for the split; None: the
            default places of the tools and their exports.
        images: the folder that image names are relative to, with `{split}` for the split; None: found by the first
            images.
        splits: split to its name on disk, such as `{val: valid}`; the names of common datasets are known.
    """

    annotations: str | None = None
    images: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)

    def names(self, split: str) -> Sequence[str]:
        """Return the possible names of a split on disk."""
        return (self.splits[split],) if split in self.splits else _ALIASES.get(split, (split,))


@dataclass(frozen=True)
class Kind:
    """Kind of annotation files.

    Args:
        title: name in messages.
        read: its parser.
        by_split: usual locations of a file for each split.
        single: of a file for all.
        per_image: whether each image has a file.
        list_images: adds the images of some splits to the contents of a file that only lists their places.
    """

    title: str
    read: Callable[[bytes, Path], Annotations]
    by_split: Sequence[str]
    single: Sequence[str]
    per_image: bool = False
    list_images: Callable[[Annotations, Path, Sequence[str]], Annotations] | None = None


KINDS = {
    "coco": Kind(
        "COCO",
        read_coco,
        (
            *("annotations/instances_{split}.json", "annotations/{split}.json", "{split}/_annotations.coco.json"),
            *("{split}/annotations.json", "{split}.json", "instances_{split}.json"),
        ),
        (
            *("annotations.json", "_annotations.coco.json", "annotations/instances_default.json", "result.json"),
            *("annotations/annotations.json", "instances_default.json", "coco.json"),
        ),
    ),
    "coco_panoptic": Kind(
        "COCO panoptic",
        read_coco_panoptic,
        ("annotations/panoptic_{split}.json", "panoptic_{split}.json"),
        ("annotations/panoptic.json", "panoptic.json"),
    ),
    "labelme": Kind("LabelMe", read_labelme, ("{split}", "annotations/{split}"), (".", "annotations"), per_image=True),
    "yolo": Kind(
        "YOLO",
        read_yolo,
        ("data.yaml", "data.yml", "dataset.yaml"),
        ("data.yaml", "data.yml", "dataset.yaml"),
        list_images=list_yolo_images,
    ),
}


def find_annotations(kind: Kind, root: Path, split: str, layout: AnnotationLayout, *, by_split: bool | None) -> Path:
    """Return the annotation file of a split, of all splits, or of either (None); of LabelMe, its folder.

    Raises:
        UserError: there is none.
    """
    check_exists(root, "data.root", ROOT_REMEDY)
    if not root.is_dir():
        unpack = "Archives are not read: unpack it and give" if root.suffix.lower() in _ARCHIVES else "Give"
        raise UserError(f"data.root={root} is not a folder. {unpack} the folder that holds the annotations.")
    usual = {True: kind.by_split, False: kind.single, None: (*kind.single, *kind.by_split)}
    patterns = usual[by_split] if layout.annotations is None else (layout.annotations,)
    places = list(
        dict.fromkeys(root / _insert_split(pattern, name) for pattern in patterns for name in layout.names(split))
    )
    found = [candidate for candidate in places if (_has_json(candidate) if kind.per_image else candidate.is_file())]
    if found:
        return found[0]
    tried = join_names([str(candidate.relative_to(root)) for candidate in places], 20)
    single = [pattern for pattern in kind.single if (root / pattern).is_file()] if by_split else []
    if kind.per_image and by_split and _has_json(root):
        single = [str(root)]
    remedy = "Set data.reader.layout.annotations (with {split} for the split)"
    if single:
        remedy = f"{single[0]} exists, without splits: divide it by data.reader.partition.by=fraction"
    elif packed := [path.name for path in entries(root) if path.suffix.lower() in _ARCHIVES]:
        remedy = f"{packed[0]} exists, but archives are not read: unpack it"
    what = "folder with files of LabelMe" if kind.per_image else f"file of {kind.title}"
    of_split = f" for split {split}" if by_split else ""
    raise UserError(f"No {what}{of_split} in {root}: looked for {tried}. {remedy}.")


def read_annotations(kind: Kind, path: Path, *, grouped: bool = False, splits: Sequence[str] = ()) -> Annotations:
    """Parse an annotation file, or LabelMe's files in a folder; image names are relative to its folder.

    Args:
        kind: kind of the files.
        path: the file; of LabelMe, the folder.
        grouped: replace labels by their groups.
        splits: of YOLO: possible names of the splits whose images are listed; none: the labels suffice.

    Raises:
        UserError: a file cannot be read, or is not of this kind. A file of a single image instead becomes an entry with
            that error.
    """
    held = _read(kind, path) if not kind.per_image else _of_folder(kind, path)
    if splits and kind.list_images is not None:
        held = kind.list_images(held, path, splits)
    try:
        return held.group_labels() if grouped else held
    except ValueError as error:
        raise UserError(f"{path}: {error}. Set data.reader.shapes.grouped=false.") from None


def _of_folder(kind: Kind, root: Path) -> Annotations:
    labels: set[str] = set()
    found: list[Entry] = []
    for folder, files in visible_files(root):
        for path in (folder / file for file in files if file.lower().endswith(".json")):
            try:
                held = _read(kind, path)
            except UserError as error:
                found.append(Entry(path, path.relative_to(root).as_posix(), None, wrong=str(error)))
                continue
            inner = path.parent.relative_to(root)
            found += [replace(entry, image=(inner / entry.image).as_posix()) for entry in held.entries]
            labels.update(held.labels)
    return Annotations(sorted(labels), found)


def annotations_below(kind: Kind, root: Path, layout: AnnotationLayout, *, grouped: bool = False) -> list[Annotations]:
    """Return the contents of the train and val files, or of the file for both, with labels or groups.

    Raises:
        UserError: there is no file, or one cannot be read.
    """
    places: dict[Path, None] = {}  # ordered set
    for by_split in (True, False):
        for split in ("train", "val"):
            with suppress(UserError):
                places[find_annotations(kind, root, split, layout, by_split=by_split)] = None
        if places:
            break
    else:
        find_annotations(kind, root, "train", layout, by_split=None)  # names all places
    return [read_annotations(kind, path, grouped=grouped) for path in places]


def classes_of_labels(
    root: Path,
    *,
    kind: str,
    layout: Mapping[str, Any],
    labels: Collection[str],
    grouped: bool = False,
    background: str | None = None,
) -> list[str]:
    """Return the classes of annotation files: that of unlabelled pixels, and the labels that are no other class.

    Args:
        root: folder of the data.
        kind: of the files, see `KINDS`.
        layout: arguments of `AnnotationLayout`.
        labels: that are mapped to a class or ignored.
        grouped: replace labels by their groups.
        background: class of unlabelled pixels; None: they are ignored.

    Raises:
        UserError: there is no file, one cannot be read, or a label holds an interpolation.
    """
    held = annotations_below(KINDS[kind], root, AnnotationLayout(**layout), grouped=grouped)
    found = dict.fromkeys(label for annotations in held for label in annotations.labels)
    names = [label for label in found if label not in labels]
    pointer = next((name for name in names if "${" in name), None)
    if pointer is not None:
        raise UserError(f"The label {pointer} would be read as a reference to a key. Rename it, or map it to a class.")
    return list(dict.fromkeys([*filter(None, [background]), *names]))


def things_of_labels(
    root: Path, *, kind: str, layout: Mapping[str, Any], labels: Collection[str], grouped: bool, **_: object
) -> list[str]:
    """Return the classes of `classes_of_labels` that annotation files declare to be things; the arguments are the same.

    Raises:
        UserError: there is no file, or one cannot be read.
    """
    held = annotations_below(KINDS[kind], root, AnnotationLayout(**layout), grouped=grouped)
    things = dict.fromkeys(
        label for annotations in held for label in annotations.labels if label not in annotations.stuff
    )
    return [label for label in things if label not in labels]


def _insert_split(pattern: str, name: str) -> str:
    return pattern.replace("{split}", name)


def _has_json(folder: Path) -> bool:
    return folder.is_dir() and any(
        file.lower().endswith(".json") for _, files in visible_files(folder) for file in files
    )


def _read(kind: Kind, path: Path) -> Annotations:
    try:
        check_regular(path)
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes; the limit is {LARGEST_FILE:,}: divide it into several")
        return _parse_file(kind, path, stamp(path))
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Check the path and its permissions.") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{path} is not a readable {kind.title} file: {error}. Export it again, or correct it."
        ) from None


@functools.lru_cache(maxsize=2**14)
def _parse_file(kind: Kind, path: Path, _stamp: Stamp | None) -> Annotations:
    """Parse a file once per state, since the classes and every split request it."""
    return kind.read(path.read_bytes(), path)
