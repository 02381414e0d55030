"""Reader of images with shapes from an annotation tool: maps labels to classes, and draws masks on reading."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from dinoseg.core.sources import Layers
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import IncompletePair, PairDataset, collect_pairs
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import Partition, divide, file_list, read_name_list
from dinoseg.extensions.annotations.annotation_files import (
    KINDS,
    AnnotationLayout,
    Kind,
    find_annotations,
    read_annotations,
)
from dinoseg.extensions.annotations.drawing import Drawing, Form, Polygons
from dinoseg.extensions.annotations.entry import Entry, LabelledShape, size_of
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import IMAGE_SUFFIXES, read_size
from dinoseg.utils.wording import count_of, format_override, format_text, join_names

log = logging.getLogger(__name__)
IGNORE = "ignore"
MAX_SHAPES = (
    2**15
)  # of an image, and polygons of an object, which take 15 s to draw; dense datasets have some thousands


class NotThere(ValueError):
    """Error that an image does not exist at its expected place."""


def find_image_folder(
    default: Path, root: Path, layout: AnnotationLayout, *, split: str, entries: Sequence[Entry]
) -> Path:
    """Return the folder that image names are relative to.

    Args:
        default: folder that they are relative to by the files.
        root: folder that the layout's paths are relative to.
        layout: locations of the files.
        split: split of the entries.
        entries: entries of the split; the first three are used to find the folder.

    Raises:
        UserError: the layout names a folder that does not exist, or an image's name leads out of its folder.
    """
    names = layout.names(split)
    if layout.images is not None:
        folders = [root / layout.images.replace("{split}", name) for name in names]
        if found := next((folder for folder in folders if folder.is_dir()), None):
            return found
        raise UserError(f"data.reader.layout.images: no folder {folders[0]}. Give the folder of the images.")
    below = [root / pattern.format(name) for pattern in ("images/{}", "{}", "{}/images") for name in names]
    for folder in (default, *below, default / "images", root / "images", root / "images/default", root):
        if any(_image_file(folder, entry) for entry in entries[:3]):
            return folder
    return default


def find_image(entry: Entry, folder: Path) -> Path:
    """Return the image of an entry; if its file is missing, fall back to one with another image suffix.

    Raises:
        UserError: the image's name leads out of the folder.
        NotThere: the image cannot be found.
    """
    found = _image_file(folder, entry)
    if found is None:
        raise NotThere(f"{entry.path} names the image {format_text(entry.image)}, which is not in {folder}.")
    return found


def size_of_image(entry: Entry, image: Path) -> tuple[int, int]:
    """Return height and width of an entry's image, from the image file if the annotations lack them.

    Raises:
        NotThere: the image cannot be read, or is too large.
    """
    if entry.size is not None:
        return entry.size
    try:
        return size_of(*read_size(image))
    except ValueError as error:
        raise NotThere(f"{image}: {error}") from None


def name_of(entry: Entry) -> str:
    """Return an entry's name: its image's name without image suffix."""
    path = PurePosixPath(entry.image.replace("\\", "/"))
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def _count_shapes(entry: Entry) -> int:
    """Return the number of an entry's shapes; each polygon of an object counts, as it is drawn by itself."""
    forms = [shape.form for shape in entry.shapes]
    return sum(len(form.rings) if isinstance(form, Polygons) else 1 for form in forms)


def _stays_below(image: str) -> bool:
    """Return whether a relative path stays inside its folder."""
    path = PurePosixPath(image.replace("\\", "/"))
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and "\0" not in image and ":" not in path.parts[0]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long, or the folder is not readable
        return False


def _image_file(folder: Path, entry: Entry) -> Path | None:
    """Return the file of an image's name, or one of the same stem with another image suffix."""
    if not _stays_below(entry.image):
        raise UserError(
            f"{entry.path} names the image {format_text(entry.image)}, which is outside of the image folder. Give "
            "names relative to data.reader.layout.images."
        )
    endings = [case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper())]
    names = [entry.image.replace("\\", "/"), *(f"{name_of(entry)}{ending}" for ending in endings)]
    return next((folder / name for name in names if _is_file(folder / name)), None)


@dataclass(frozen=True)
class Shapes:
    """Rules that turn shapes into a mask.

    Args:
        labels: label of the tool to class, or to `ignore`; a label not listed here is the class of its name.
        others: the class of labels that are no class, or `ignore`; None: raise an error.
        unlabelled: the class of pixels that no shape covers, or `ignore`; None: no class, for masks with layers.
        order: `file`: the order of the file; `area`: the one with the most pixels first, so that small objects are
            drawn over large ones.
        without_shapes: `keep`: an image without any shape is all unlabelled; `skip`: it is left out.
        crowds: of COCO. `class`: a crowd has the class of its label and lies below all objects; `ignore`: its
            pixels are ignored; `object`: it is an object like others, since CVAT exports brush masks as crowds.
        grouped: of COCO: use the supercategories as labels.
    """

    labels: Mapping[str, str] | None = None
    others: str | None = None
    unlabelled: str | None = "background"
    order: Literal["file", "area"] = "file"
    without_shapes: Literal["keep", "skip"] = "keep"
    crowds: Literal["class", "ignore", "object"] = "class"
    grouped: bool = False


def annotated_dataset(
    root: str | Path,
    split: str,
    *,
    kind: str,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int = 255,
    layout: AnnotationLayout = AnnotationLayout(),  # noqa: B008 (frozen)
    shapes: Shapes = Shapes(),  # noqa: B008 (frozen)
    masks: Masks = Masks(),  # noqa: B008 (frozen)
    partition: Partition = Partition(),  # noqa: B008 (frozen)
    layers: bool = False,
) -> PairDataset:
    """Return the images that an annotation tool's files list, with masks drawn from their shapes.

    Args:
        root: folder that the layout's paths are relative to.
        split: `train`, `val` or another name that the layout or the lists know.
        kind: `coco`, `coco_panoptic`, `labelme` or `yolo`.
        classes: names in id order.
        palette: one colour per class, or None for default colours.
        ignore_index: id that is ignored.
        layout: locations of the files.
        shapes: rules that turn shapes into a mask.
        masks: whether to resize a mask that has its image's aspect ratio.
        partition: rule that assigns images to splits.
        layers: whether each class has a layer of its own, so that shapes of different classes may overlap.

    Raises:
        UserError: an annotation file is missing or unreadable, a label is no class, an image is listed twice, or no
            image is usable.
    """
    if kind not in KINDS:
        raise UserError(f"data.reader.kind={kind} is unknown. Choose one of {', '.join(KINDS)}.")
    labels = Labels.of(classes, palette, ignore_index, has_layers=layers)
    maker = _Maker(KINDS[kind], Path(root).expanduser(), layout, shapes, labels, layers)
    pairs = divide(split, lambda side: maker.pairs(side, partition), partition)
    return collect_pairs(pairs, split, labels, masks, has_layers=layers)


@dataclass
class _Maker:
    """Builder of pairs from the entries of an annotation file."""

    kind: Kind
    root: Path
    layout: AnnotationLayout
    shapes: Shapes
    labels: Labels
    layers: bool
    values: dict[str, int] = field(init=False)  # known label to id
    others: int | None = field(init=False)
    ground: int = field(init=False)
    stuff: frozenset[int] = frozenset()  # ids of the classes that the file declares to be no things

    def __post_init__(self) -> None:
        where = "data.reader.shapes"
        ground = self.shapes.unlabelled
        if self.layers and (ground in self.labels.classes or ground not in (None, Shapes.unlabelled)):
            raise UserError(
                f"data.unlabelled={ground}: in masks with layers, pixels outside all shapes have no "
                "class. Set data.unlabelled=null."
            )
        self.ground = 0 if self.layers else self._value(ground, "data.unlabelled")
        self.others = None if self.shapes.others is None else self._value(self.shapes.others, f"{where}.others")
        given = {
            label: self._value(name, f"{where}.labels of {label}") for label, name in (self.shapes.labels or {}).items()
        }
        self.values = {name: index for index, name in enumerate(self.labels.classes)} | given

    def pairs(self, split: str, partition: Partition) -> list[Pair | IncompletePair]:
        """Return the pairs of a split's annotation file, or of its list of names, ordered by name."""
        by_split = partition.by == "folder"
        path = find_annotations(self.kind, self.root, split, self.layout, by_split=by_split)
        sides = (split,) if by_split else ("train", "val")
        names = [name for side in sides for name in self.layout.names(side)]
        held = read_annotations(self.kind, path, grouped=self.shapes.grouped, splits=names)
        entries = held.entries
        # a class that merges both kinds is a thing, as in `Annotations.group_labels`
        things = {self.values.get(label, self.others) for label in held.labels if label not in held.stuff}
        stuff = frozenset(self.values[label] for label in held.stuff if label in self.values)
        self.stuff = stuff.difference(things)
        if partition.by == "lists":
            entries = self._of_list(entries, split, partition)
        if not entries:
            raise UserError(f"{path} holds no image.")
        if self.shapes.without_shapes == "skip":
            entries = [entry for entry in entries if entry.shapes or entry.wrong]
            if not entries:
                raise UserError(
                    f"{path} holds no image with a shape. Annotate some, or set data.reader.shapes.without_shapes=keep."
                )
        self._refuse_unknown(entries, path)
        self._warn_of_bare(entries, path)
        default = held.folder or (path if self.kind.per_image else path.parent)
        folder = find_image_folder(default, self.root, self.layout, split=split, entries=entries)
        pairs = sorted((self._pair(entry, folder) for entry in entries), key=lambda pair: pair.name)
        twice = [name for name, count in Counter(pair.name for pair in pairs).items() if count > 1]
        if twice:
            raise UserError(
                f"{path} names {count_of(twice, 'image')} more than once, or with two suffixes: {join_names(twice)}. "
                "Keep one of each."
            )
        return pairs

    def _value(self, name: str | None, key: str) -> int:
        if name in self.labels.classes:
            return self.labels.classes.index(name)
        if name == IGNORE:
            return self.labels.ignore_index
        raise UserError(
            f"{key}={format_override(name)} is not a class: data.classes has {', '.join(self.labels.classes)}. Name "
            f"one of them, add it, or write {IGNORE}."
        )

    def _of_list(self, entries: Sequence[Entry], split: str, partition: Partition) -> list[Entry]:
        by_name = {name_of(entry): entry for entry in entries}
        names = read_name_list(self.root / file_list(split, partition), "partition.lists")
        if absent := [name for name in names if name not in by_name]:
            raise UserError(
                f"The file list of split {split} has {count_of(absent, 'name')} without annotation: "
                f"{join_names(absent)}. A name is the image name in the annotation file, without suffix."
            )
        return [by_name[name] for name in names]

    def _refuse_unknown(self, entries: Sequence[Entry], path: Path) -> None:
        if self.others is not None:
            return
        labels = Counter(shape.label for entry in entries for shape in entry.shapes if shape.label not in self.values)
        if not labels:
            return
        found = join_names([f"{format_text(label)} ({count})" for label, count in labels.most_common()], 20)
        first = format_text(next(iter(labels)))
        raise UserError(
            f"{path} has shapes with labels that are not classes: {found}. data.classes has "
            f"{', '.join(self.labels.classes)}. Add them there, map them to a class "
            f"('++data.reader.shapes.labels={{{first}: CLASS}}', where CLASS may be {IGNORE}), or ignore all: "
            f"data.reader.shapes.others={IGNORE}."
        )

    def _warn_of_bare(self, entries: Sequence[Entry], path: Path) -> None:
        if bare := sum(not entry.shapes and not entry.wrong for entry in entries):
            log.warning(
                "%s: %d of %d images have no shape and are read as %s throughout. If they are not annotated yet, leave "
                "them out: data.reader.shapes.without_shapes=skip.",
                path, bare, len(entries), self.shapes.unlabelled or "no class",
            )  # fmt: skip

    def _pair(self, entry: Entry, folder: Path) -> Pair | IncompletePair:
        name = name_of(entry)
        try:
            image = find_image(entry, folder)
            if entry.wrong:
                reason = entry.wrong if str(entry.path) in entry.wrong else f"{entry.path}: {entry.wrong}."
                return IncompletePair(name, reason, "Correct the shapes in the annotation tool, and export again.")
            size = size_of_image(entry, image)
            count = _count_shapes(entry)
            if count > MAX_SHAPES:
                return IncompletePair(
                    name,
                    f"{entry.path}: {entry.image} has {count} shapes, over {MAX_SHAPES}.",
                    "Split the image, or draw its shapes into a mask file for data=folder.",
                )
        except NotThere as error:
            return IncompletePair(
                name, str(error), "Put the images there, or set their folder: data.reader.layout.images."
            )
        if self.layers:
            # None saves memory and time with many classes; the first drawing states the size
            shown = [
                Drawing(entry.path, entry.image, size, self.ground, forms) if forms or not index else None
                for index, forms in enumerate(self._group_shapes(entry))
            ]
            return Pair(name, image, Layers(tuple(shown), Drawing.read))
        shapes = entry.shapes
        if self.shapes.crowds == "object":
            shapes = [replace(shape, crowd=False) for shape in shapes]
        drawn = sorted(shapes, key=lambda shape: not shape.crowd)
        mask = Drawing(
            entry.path,
            entry.image,
            size,
            self.ground,
            shapes=tuple((self._id(shape), shape.form) for shape in drawn),
            labelled=[(self._class_id(shape.label), shape) for shape in drawn],
            stuff=self.stuff,
            crowds=sum(shape.crowd for shape in drawn),
            by_area=self.shapes.order == "area",
        )
        return Pair(name, image, mask)

    def _group_shapes(self, entry: Entry) -> list[list[tuple[int, Form]]]:
        """Return the shapes of each class's layer: ignored ones, below those of the class, which have the value 1."""
        ignore = self.labels.ignore_index
        ignored: list[list[tuple[int, Form]]] = [[] for _ in self.labels.classes]
        shown: list[list[tuple[int, Form]]] = [[] for _ in self.labels.classes]
        for shape in entry.shapes:
            label = self._class_id(shape.label)
            if label == ignore:
                for forms in ignored:
                    forms.append((ignore, shape.form))
            elif self._id(shape) == ignore:
                ignored[label].append((ignore, shape.form))
            else:
                shown[label].append((1, shape.form))
        return [below + above for below, above in zip(ignored, shown, strict=True)]

    def _id(self, shape: LabelledShape) -> int:
        if shape.crowd and self.shapes.crowds == IGNORE:
            return self.labels.ignore_index
        return self._class_id(shape.label)

    def _class_id(self, label: str) -> int:
        return self.values.get(label, self.others or 0)
