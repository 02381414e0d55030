"""Formats that datasets are converted to: where their files lie, who writes them, and who reads them back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import yaml

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.data.classes.file import CLASS_FILE
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.annotations.coco_ids import CocoIds
from dinoseg.extensions.annotations.written_files import (
    CocoAnnotations,
    LabelmeAnnotations,
    MaskRegion,
    PanopticSegments,
    PredictedShapes,
    edge_polygons,
    find_parts,
    write_shape_classes,
)
from dinoseg.extensions.annotations.yolo import find_text_file
from dinoseg.inference.outputs import ImagePrediction, ImageWriter
from dinoseg.report.palette import write_indexed_png
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

MOST_IDS = 2**16 - 1  # of objects in a PNG of 16 bits


@dataclass(frozen=True)
class Classes:
    """Classes of a dataset.

    Args:
        labels: names, colours and the ignored id.
        background: class id that is no object; None: there is none.
        things: class ids that have objects; None: the dataset has no objects.
    """

    labels: Labels
    background: int | None
    things: Collection[int] | None


@dataclass(frozen=True)
class AnnotatedShapes(PredictedShapes):
    """Conversion of annotated objects, and of the parts of classes, to shapes."""

    scored: ClassVar[bool] = False

    def parts(self, prediction: ImagePrediction, background: int | None) -> Iterator[MaskRegion]:
        """Yield the objects of an image that have pixels."""
        found = prediction.objects
        assert found is not None
        for place, box in enumerate(found.boxes.tolist()):
            if found.areas[place] > 0:
                label, runs = int(found.classes[place]), found.masks[place]
                yield MaskRegion(label, runs, found.size, box, place + 1, None, bool(found.crowds[place]))


class Format(ABC):
    """Base class of formats.

    Args:
        folder: of the converted dataset.
        classes: of the dataset.
        shapes: how shapes are written.

    Attributes:
        reader: option of the group `data` that reads it.
        object_reader: option that reads it with objects; None: it holds none.
        images: folder of the images of a split.
        overlap: whether it holds objects that overlap.
    """

    reader: ClassVar[str]
    object_reader: ClassVar[str | None] = None
    images: ClassVar[str] = "{split}/images"
    overlap: ClassVar[bool] = False

    def __init__(self, folder: Path, classes: Classes, shapes: AnnotatedShapes) -> None:
        self.folder, self.classes, self.shapes = folder, classes, shapes

    @property
    def options(self) -> dict[str, Any]:
        """The keys that read it, besides `data` and `data.root`."""
        return {}

    @abstractmethod
    def make_writer(self, split: str) -> ImageWriter:
        """Return the writer of the images of a split."""

    def finish_split(self, split: str, writer: ImageWriter) -> None:
        """Write the files that cover a split."""
        writer.finish()

    @abstractmethod
    def finish(self, splits: Sequence[str]) -> None:
        """Write the files that cover all splits."""


class MaskFormat(Format):
    """PNG files of class ids, for data=folder."""

    reader = "folder"

    def make_writer(self, split: str) -> ImageWriter:
        """Return the writer of masks."""
        return _MaskWriter(self.folder / split, self.classes)

    def finish(self, splits: Sequence[str]) -> None:
        """Write classes.yaml."""
        labels, ground, things = self.classes.labels, self.classes.background, self.classes.things
        content: dict[str, Any] = {
            "classes": {name: {"color": [*color]} for name, color in zip(labels.classes, labels.palette, strict=True)},
            "background": None if ground is None else labels.classes[ground],
            "masks": "ids",
        }
        if self.object_reader and things is not None:
            content["things"] = [labels.classes[each] for each in sorted(things)]
        if labels.ignore_index >= len(labels.classes):
            content["ignore"] = {"ids": [labels.ignore_index]}
        write_text(self.folder / CLASS_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


class IdFormat(MaskFormat):
    """PNG files of class ids, and of 16-bit ids of objects, for data=folder_instances."""

    object_reader = "folder_instances"

    @property
    def options(self) -> dict[str, Any]:
        """The keys of files of ids next to the masks."""
        return {"data.objects.files": ["masks", "ids"]}


@dataclass
class _MaskWriter:
    """Writer of class ids, and of ids of objects if there are some, which do not overlap."""

    folder: Path
    classes: Classes
    needs_probabilities = False

    def write(self, prediction: ImagePrediction) -> None:
        """Write the PNG files of one image."""
        ids, found = prediction.ids, prediction.objects
        write_indexed_png(self.folder / "masks" / f"{prediction.name}.png", ids, self.classes.labels.palette)
        if self.classes.things is None:
            return
        assert found is not None
        if len(found) > MOST_IDS:
            raise UserError(f"{prediction.name} has {len(found)} objects, and mode.to=ids holds {MOST_IDS:,}.")
        numbers = np.zeros(found.size, np.uint16)
        for place in np.flatnonzero(~found.crowds & np.isin(found.classes, [*self.classes.things])).tolist():
            found.masks[place].paint(numbers, place + 1)
        write_png(self.folder / "ids" / f"{prediction.name}.png", numbers)

    def finish(self) -> None:
        """Do nothing: each image is complete once written."""


class ShapeFormat(Format):
    """Base class of formats of labelled shapes, whose unlabelled pixels are the background, or ignored without one."""

    overlap = True

    @property
    def options(self) -> dict[str, Any]:
        """The class of unlabelled pixels."""
        ground = self.classes.background
        name = "ignore" if ground is None else self.classes.labels.classes[ground]
        return {} if name == "background" else {"data.unlabelled": name}

    def finish(self, splits: Sequence[str]) -> None:
        """Write classes.yaml."""
        write_shape_classes(self.folder, self.classes.labels, self.classes.background, self.classes.things)


class CocoFormat(ShapeFormat):
    """COCO's JSON of instances."""

    reader, object_reader, images = "coco", "coco_instances", "{split}"

    def make_writer(self, split: str) -> ImageWriter:
        """Return the writer of annotations."""
        labels, ground, things = self.classes.labels, self.classes.background, self.classes.things
        return CocoAnnotations(self._part(split), labels, ground, self.shapes, things, CocoIds.read(None, labels))

    def finish_split(self, split: str, writer: ImageWriter) -> None:
        """Write the JSON file of a split."""
        writer.finish()
        target = self.folder / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(exist_ok=True)
        (self._part(split) / "annotations.json").replace(target)

    def _part(self, split: str) -> Path:
        return self.folder / ".parts" / split


class PanopticFormat(CocoFormat):
    """COCO's panoptic JSON, in which each class without objects is one segment, also the background."""

    reader, object_reader = "coco_panoptic", "coco_panoptic"
    overlap = False

    def __init__(self, folder: Path, classes: Classes, shapes: AnnotatedShapes) -> None:
        super().__init__(folder, replace(classes, background=None), replace(shapes, objects="class"))

    @property
    def options(self) -> dict[str, Any]:
        """None: the background is a segment."""
        return {}

    def make_writer(self, split: str) -> ImageWriter:
        """Return the writer of segments."""
        labels = self.classes.labels
        ids = CocoIds.read(None, labels)
        return PanopticSegments(self._part(split), labels, None, self.classes.things or (), ids, scored=False)

    def finish_split(self, split: str, writer: ImageWriter) -> None:
        """Write the JSON file of a split, and move its PNG files into a folder of its name."""
        writer.finish()
        target = self.folder / "annotations"
        target.mkdir(exist_ok=True)
        (self._part(split) / "panoptic.json").replace(target / f"panoptic_{split}.json")
        (self._part(split) / "panoptic").replace(target / f"panoptic_{split}")

    def finish(self, splits: Sequence[str]) -> None:
        """Do nothing: the JSON files hold the classes."""


class LabelmeFormat(ShapeFormat):
    """LabelMe: a JSON file next to each image."""

    reader, object_reader, images = "labelme", "labelme_instances", "{split}"

    @property
    def options(self) -> dict[str, Any]:
        """The class of unlabelled pixels, and that a group is an object."""
        joined = {} if self.classes.things is None else {"data.objects.joined": True}
        return {**super().options, **joined}

    def make_writer(self, split: str) -> ImageWriter:
        """Return the writer of JSON files."""
        things = self.classes.things
        folder, labels, ground = self.folder / split, self.classes.labels, self.classes.background
        return LabelmeAnnotations(folder, labels, ground, self.shapes, things)

    def finish_split(self, split: str, writer: ImageWriter) -> None:
        """Do nothing: each image is complete once written."""


class YoloFormat(ShapeFormat):
    """YOLO's segmentation: data.yaml, and a text file of polygons for each image."""

    reader, object_reader, images = "yolo", "yolo_instances", "images/{split}"

    def make_writer(self, split: str) -> ImageWriter:
        """Return the writer of text files."""
        if not self.numbers:
            raise UserError("mode.to=yolo needs a class besides the background. Choose mode.to=masks.")
        return _YoloWriter(self.numbers, self.shapes, self.classes.things)

    @property
    def numbers(self) -> dict[int, int]:
        """The number of each class in the files by class id; the background has none."""
        kept = [each for each in range(len(self.classes.labels.classes)) if each != self.classes.background]
        return {label: number for number, label in enumerate(kept)}

    def finish(self, splits: Sequence[str]) -> None:
        """Write data.yaml and classes.yaml."""
        super().finish(splits)
        names = {number: self.classes.labels.classes[label] for label, number in self.numbers.items()}
        content = {"path": ".", **{split: f"images/{split}" for split in splits}, "names": names}
        write_text(self.folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


@dataclass
class _YoloWriter:
    """Writer of a line for each object: its class and polygon, in shares of width and height.

    Several parts of an object are joined by lines to and fro, as in Ultralytics' own conversion; its holes are filled.
    Parts of a class that is no thing have a line each, cut where they have holes. Crowds are left out, as there.
    """

    numbers: Mapping[int, int]
    shapes: AnnotatedShapes
    things: Collection[int] | None
    needs_probabilities = False

    def write(self, prediction: ImagePrediction) -> None:
        """Write the text file of one image."""
        lines = []
        for part in self.shapes.parts(prediction, None):
            if part.is_crowd:
                continue
            is_object = part.class_id in (self.things or ())
            polygons = [*edge_polygons(_fill_holes(part) if is_object else part, self.shapes.tolerance)]
            for outline in [_join_outlines(polygons)] if is_object else polygons:
                values = (outline / np.array(prediction.ids.shape[::-1])).ravel()
                lines.append(" ".join([str(self.numbers[part.class_id]), *(f"{value:.9g}" for value in values)]))
        write_text(find_text_file(prediction.path), "".join(f"{line}\n" for line in dict.fromkeys(lines)))

    def finish(self) -> None:
        """Do nothing: each image is complete once written."""


def _join_outlines(outlines: Sequence[np.ndarray]) -> np.ndarray:
    """Return one closed polygon (N, 2) around several ones, which goes to each and back along the same line."""
    first, *others = outlines
    if not others:
        return first
    detours = [point for other in others for point in (*other, other[0], first[0])]
    return np.concatenate([first, first[:1], detours])


FORMATS: Mapping[str, Callable[[Path, Classes, AnnotatedShapes], Format]] = {
    "coco": CocoFormat,
    "coco_panoptic": PanopticFormat,
    "yolo": YoloFormat,
    "labelme": LabelmeFormat,
    "masks": MaskFormat,
    "ids": IdFormat,
}


def _fill_holes(part: MaskRegion) -> MaskRegion:
    """Return an object without holes."""
    outlines, _ = cv2.findContours(part.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(part.mask.shape, np.uint8)
    cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
    left, top, width, height = part.box
    canvas = np.zeros(part.size, bool)
    canvas[top : top + height, left : left + width] = filled
    return replace(part, runs=RunLengths.of_mask(canvas))


def collect_objects(mask: np.ndarray, objects: Objects | None, classes: Classes, *, joined: bool) -> Objects:
    """Return the objects of an image and the parts of its other classes, in the order in which they are drawn.

    Args:
        mask: class ids (H, W).
        objects: annotated ones; None: the dataset has none.
        classes: of the dataset. Pixels of the background have no part.
        joined: whether all pixels of a class are one part; otherwise each connected component is one.
    """
    ground, ignored = classes.background, classes.labels.ignore_index
    left_out = ignored if ground is None else ground
    stuff = np.where(np.isin(mask, [ignored, *(classes.things or ())]), left_out, mask)
    parts = find_parts(stuff.astype(np.uint8), leave_out=left_out, joined=joined)
    if objects is None:
        return parts
    order = np.argsort(~objects.crowds, kind="stable")
    drawn = objects.select(order)
    return Objects.of_runs(
        drawn.size,
        [*parts.masks, *drawn.masks],
        np.concatenate([parts.classes, drawn.classes]),
        crowds=np.concatenate([parts.crowds, drawn.crowds]),
    )


def remove_overlaps(objects: Objects, mask: np.ndarray) -> Objects:
    """Return objects without hidden pixels: where the mask (H, W) has another class, or a later object of it lies."""
    owners = np.zeros(objects.size, np.int64)
    for place, (runs, label) in enumerate(zip(objects.masks, objects.classes.tolist(), strict=True), 1):
        owners[runs.to_mask(objects.size) & (mask == label)] = place
    seen = RunLengths.of_ids(owners)
    places = np.array([*seen], np.int64) - 1
    return Objects.of_runs(objects.size, [*seen.values()], objects.classes[places], crowds=objects.crowds[places])
