"""Class ids and objects in the formats of annotation tools (COCO, LabelMe), and of COCO's scores."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from PIL import Image

import dinoseg
from dinoseg.core.objects import MIN_SCORE, Objects, RunLengths
from dinoseg.core.task import ObjectTask, Task
from dinoseg.data.classes.file import CLASS_FILE
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.annotations.coco_ids import CocoIds
from dinoseg.extensions.annotations.drawing import Polygons
from dinoseg.extensions.annotations.rle import to_text
from dinoseg.inference.outputs import FurtherOutputs, ImagePrediction, ImageWriter
from dinoseg.report.palette import layer_colours
from dinoseg.utils.atomic import atomic_file, write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import visible_files
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import Count, NotNegative, Share

_PIECES = ".pieces"  # one file per image, merged at the end; needed again when a stopped run resumes
_FINE = 3  # upscaling factor: outline corners are then distinct from edge midpoints


@dataclass(frozen=True)
class MaskRegion:
    """An object, or pixels of one class, which become an object of a file.

    Args:
        class_id: its class.
        runs: its pixels.
        size: (H, W) of the image.
        box: left, top, width and height in pixels.
        number: of an object, from 1 in the order of the image's; 0: it is none.
        score: of a predicted object.
        is_crowd: whether it is an area of many objects.
    """

    class_id: int
    runs: RunLengths
    size: tuple[int, int]
    box: Sequence[int]
    number: int = 0
    score: float | None = None
    is_crowd: bool = False

    @property
    def mask(self) -> np.ndarray:
        """Its pixels (h, w) bool in the box."""
        _, top, _, height = self.box
        _, columns = self.runs.to_columns(self.size[0])
        return np.ascontiguousarray(columns[top : top + height])


def find_parts(ids: np.ndarray, *, leave_out: int | None, joined: bool) -> Objects:
    """Return the parts of class ids (H, W) uint8 as objects, class by class.

    Args:
        ids: class ids of an image.
        leave_out: the class that is not an object; None: every class has parts.
        joined: all pixels of a class are one part; otherwise each 8-connected component is one.
    """
    masks: list[RunLengths] = []
    classes: list[int] = []
    for value in np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist():
        if value != leave_out:
            mask = (ids == value).view(np.uint8)
            labels = mask if joined else cv2.connectedComponents(mask, connectivity=8)[1]
            masks += RunLengths.of_ids(labels).values()
            classes += [value] * (len(masks) - len(classes))
    return Objects.of_runs(ids.shape, masks, classes)


def edge_polygons(part: MaskRegion, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) along pixel edges, as in COCO; together they cover the part.

    Polygons have no holes: a part with holes is cut along a row through each hole. With tolerance 0 they are exact;
    otherwise corners are dropped if no edge moves by more than `tolerance` pixels (Douglas and Peucker).
    """
    left, top, *_ = part.box
    for row, band in _bands(part.mask):
        fine = np.repeat(np.repeat(band, _FINE, axis=0), _FINE, axis=1)
        for outline in _outlines(fine):
            corners = (outline + 1) // _FINE  # the first or last subpixel of a pixel, never its middle one
            yield _simpler(_drop_repeats(corners), tolerance) + (left, top + row)


def middle_polygons(part: MaskRegion, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) through the centres of border pixels, as drawn by LabelMe; else like `edge_polygons`."""
    left, top, *_ = part.box
    for row, band in _bands(part.mask):
        for outline in _outlines(band):
            points = _simpler(outline, tolerance) + (left, top + row)
            yield np.concatenate([points] * (3 if len(points) < 3 else 1))  # a polygon needs at least three points


def _bands(mask: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield first row and rows of a mask, cut along a row through each hole, so that no band has a hole."""
    outlines, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes = [outline for outline, (_, _, _, parent) in zip(outlines, tree[0], strict=True) if parent >= 0]
    boxes = [cv2.boundingRect(hole) for hole in holes]
    cuts = sorted({top + height // 2 for _, top, _, height in boxes})
    yield from ((top, mask[top:bottom]) for top, bottom in pairwise([0, *cuts, mask.shape[0]]))


def _outlines(mask: np.ndarray) -> Iterator[np.ndarray]:
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return (outline[:, 0] for outline in found)


def _drop_repeats(corners: np.ndarray) -> np.ndarray:
    before = np.concatenate([corners[-1:], corners[:-1]])  # three times as fast as np.roll
    return corners[(corners != before).any(axis=1)]


def _simpler(points: np.ndarray, tolerance: float) -> np.ndarray:
    if tolerance == 0 or len(points) < 4:
        return points
    fewer = cv2.approxPolyDP(points.astype(np.int32)[:, None], tolerance, closed=True)[:, 0]
    return fewer if len(fewer) >= 3 else points


@dataclass(frozen=True)
class PredictedShapes(FurtherOutputs):
    """Conversion of class IDs, or of the objects of a model that predicts some, to shapes.

    Args:
        format: `polygons`, editable point by point, or `rle`: masks, exact to the pixel.
        objects: `component`: each connected component is an object; `class`: all pixels of a class in an image are one.
            A model that predicts objects has its own.
        tolerance: maximum shift in pixels of a polygon's edge by simplification; 0: exact.
        min_area: minimum number of predicted pixels; smaller parts are dropped.
        min_score: minimum score of predicted objects; COCO's results hold all.
        ids: JSON file of COCO whose ids of images and categories the files of COCO get; None: from 1 on.
    """

    names: ClassVar = ("coco", "labelme", "panoptic")
    scored: ClassVar[bool] = True  # whether objects have scores
    format: Literal["polygons", "rle"] = "polygons"
    objects: Literal["component", "class"] = "component"
    tolerance: NotNegative = 1.0
    min_area: Count = 1
    min_score: Share = MIN_SCORE
    ids: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.tolerance < 1000 or self.min_area < 1:
            raise UserError(
                f"mode.shapes.tolerance={self.tolerance} min_area={self.min_area}: give a tolerance from 0 pixels, "
                "and an area from 1."
            )

    def make_writer(self, name: str, folder: Path, labels: Labels, background: int | None, task: Task) -> ImageWriter:
        """Return the writer of `coco`, `labelme` or `panoptic` files into a folder; see `FurtherOutputs`.

        Raises:
            UserError: `panoptic` of a model whose objects overlap or that has none, or `ids` is no such file, or lacks
                a class of the objects.
        """
        things = task.things if isinstance(task, ObjectTask) else None
        if name == "labelme":
            return LabelmeAnnotations(folder, labels, background, self, things)
        ids = CocoIds.read(self.ids, labels)
        # results have instances of nearly all classes, if of low scores; so the first image would fail later
        for label in sorted((things or ()) if name == "coco" else {*range(len(labels.classes))} - {background}):
            ids.find_category(label)
        if name == "coco":
            return CocoAnnotations(folder, labels, background, self, things, ids)
        if not isinstance(task, ObjectTask) or task.overlap:
            raise UserError(
                "mode.outputs=panoptic needs the segments of a model of task=panoptic. Leave it out, or choose coco."
            )
        return PanopticSegments(folder, labels, background, task.things, ids)

    def parts(self, prediction: ImagePrediction, background: int | None) -> Iterator[MaskRegion]:
        """Yield the predicted objects or parts of an image that become objects."""
        found = prediction.objects
        if found is None:
            found = find_parts(prediction.ids, leave_out=background, joined=self.objects == "class")
        else:
            found = found.select_distinct(self.min_score)
        is_kept = (found.areas >= self.min_area) & (found.classes != background)
        places = np.flatnonzero(is_kept)
        for place, box in zip(places.tolist(), found.select(places).boxes.tolist(), strict=True):
            part = MaskRegion(int(found.classes[place]), found.masks[place], found.size, box)
            scored = replace(part, number=place + 1, score=float(found.scores[place]))
            yield part if prediction.objects is None else scored


@dataclass(frozen=True)
class _Annotations:
    """Base class of the annotation writers below.

    Args:
        folder: output folder.
        labels: the classes.
        background: the background class, which is not written; None: every class is written.
        shapes: conversion of class IDs to shapes.
        things: ids of the classes whose objects the model predicts; None: it predicts none.
    """

    folder: Path
    labels: Labels
    background: int | None
    shapes: PredictedShapes
    things: Collection[int] | None
    needs_probabilities = False

    def finish(self) -> None:
        """Write `classes.yaml`, so that corrected annotations are read with the same classes, things and colours."""
        write_shape_classes(self.folder, self.labels, self.background, self.things)


def write_shape_classes(folder: Path, labels: Labels, background: int | None, things: Collection[int] | None) -> None:
    """Write the `classes.yaml` of shapes; arguments as of the annotation writers."""
    colors = zip(labels.classes, labels.palette, strict=True)
    classes = json.dumps({name: {"color": list(color)} for name, color in colors}, ensure_ascii=False)
    ground = None if background is None else labels.classes[background]
    text = f"classes: {classes}\nbackground: {json.dumps(ground, ensure_ascii=False)}\nmasks: labels\n"
    if things is not None:
        named = [labels.classes[thing] for thing in sorted(things)]
        text += f"things: {json.dumps(named, ensure_ascii=False)}\n"
    write_text(folder / CLASS_FILE, text)


@dataclass(frozen=True)
class CocoAnnotations(_Annotations):
    """Writer of `annotations.json` for all images: polygons along pixel edges, or compressed run-length encoding.

    COCO polygons have no holes: a part with holes is split into several polygons of one annotation. A model that
    predicts objects has `results.json`, too, which mode=score reads: the objects of things of any score, as run
    lengths.

    Args:
        ids: of images and categories.
    """

    ids: CocoIds

    def write(self, prediction: ImagePrediction) -> None:
        """Write the annotations of one image to an intermediate file."""
        annotations = [self._annotation(part) for part in self.shapes.parts(prediction, self.background)]
        found = prediction.objects if self.shapes.scored else None
        scored = () if found is None else zip(found.classes.tolist(), found.masks, found.scores.tolist(), strict=True)
        results = [
            {
                "category_id": self.ids.find_category(label),
                "segmentation": _encode(runs, prediction.ids.shape),
                "score": score,
            }
            for label, runs, score in scored
            if label in (self.things or ())
        ]
        piece = {"image": _describe(prediction, self.ids), "annotations": annotations, "results": results}
        write_text(_piece(self.folder, prediction), json.dumps(piece))

    def finish(self) -> None:
        """Merge the intermediate files and number images and annotations."""
        super().finish()
        if self.things is not None and self.shapes.scored:
            with atomic_file(self.folder / "results.json") as part, open(part, "w", encoding="utf-8") as file:
                file.write("[")
                _join(file.write, self._number("results"))
                file.write("]\n")
        numbers = self.ids.categories
        categories = [
            {"id": numbers[index], "name": name, "supercategory": ""}
            for index, name in enumerate(self.labels.classes)
            if index != self.background and index in numbers
        ]
        with atomic_file(self.folder / "annotations.json") as part, open(part, "w", encoding="utf-8") as file:
            info = {"description": "written by dinoseg", "version": dinoseg.__version__}
            head = {
                "info": info,
                "licenses": [],
                "categories": categories,
            }  # other tools require `info` and `licenses`
            file.write(f'{json.dumps(head)[:-1]},\n"images": [')
            _join(file.write, ({"id": number, **piece["image"]} for number, piece in _pieces(self.folder)))
            file.write('],\n"annotations": [')
            _join(file.write, ({"id": count, **one} for count, one in enumerate(self._number("annotations"), 1)))
            file.write("]}\n")

    def _number(self, key: str) -> Iterator[dict[str, Any]]:
        for number, piece in _pieces(self.folder):
            yield from ({"image_id": number, **entry} for entry in piece[key])

    def _annotation(self, part: MaskRegion) -> dict[str, Any]:
        area, box = part.runs.area, part.box
        if self.shapes.format == "rle" or part.is_crowd:
            segmentation: Any = _encode(part.runs, part.size)
        else:
            outlines = [*edge_polygons(part, self.shapes.tolerance)]
            segmentation = [points.ravel().tolist() for points in outlines]
            if self.shapes.tolerance > 0:  # simplified polygons cover other pixels than the part
                area, box = _measure(outlines, part.size)
        score = {} if part.score is None else {"score": part.score}
        category = self.ids.find_category(part.class_id)
        return {
            "category_id": category, "iscrowd": int(part.is_crowd), "area": area, "bbox": box,
            "segmentation": segmentation, **score,
        }  # fmt: skip


class LabelmeAnnotations(_Annotations):
    """Writer of one JSON file per image, next to the image: polygons through border-pixel centres, or masks.

    The image is a copy of the original. A part with holes is split into several polygons that share a group.
    """

    def write(self, prediction: ImagePrediction) -> None:
        """Write one image and its JSON file."""
        height, width = prediction.ids.shape
        suffix = prediction.path.suffix
        target = self.folder / f"{prediction.name}{suffix}"
        if prediction.path != target:
            with atomic_file(target) as part:
                shutil.copyfile(prediction.path, part)
        parts = enumerate(self.shapes.parts(prediction, self.background))
        content = {
            "version": "5.4.1", "flags": {},
            "shapes": [shape for number, part in parts for shape in self._draw_shape(part, number)],
            "imagePath": target.name, "imageData": None, "imageHeight": height, "imageWidth": width,
        }  # fmt: skip
        write_text(self.folder / f"{prediction.name}.json", json.dumps(content, indent=1))

    def _draw_shape(self, part: MaskRegion, number: int) -> Iterator[dict[str, Any]]:
        group = part.number or number  # an object's number is that of the overlay
        shape = {"label": self.labels.classes[part.class_id], "group_id": group, "description": "", "flags": {}}
        if self.shapes.format == "rle":
            left, top, width, height = part.box
            corners = [[left, top], [left + width - 1, top + height - 1]]
            with io.BytesIO() as picture:
                Image.fromarray(part.mask).save(picture, "PNG")
                mask = base64.b64encode(picture.getvalue()).decode("ascii")
            yield {**shape, "shape_type": "mask", "points": corners, "mask": mask}
            return
        for points in middle_polygons(part, self.shapes.tolerance):
            yield {**shape, "shape_type": "polygon", "points": points.tolist(), "mask": None}


@dataclass(frozen=True)
class PanopticSegments:
    """Writer of `panoptic.json` and of a PNG of segment ids for each image in the folder `panoptic` beside it.

    The background is void if the reference of the ids has no such category.

    Args:
        folder: output folder.
        labels: the classes.
        background: ID of the class that is no object; None: there is none.
        things: ids of the classes whose objects are separated.
        ids: of images and categories.
        scored: whether objects have scores.
    """

    folder: Path
    labels: Labels
    background: int | None
    things: Collection[int]
    ids: CocoIds
    scored: bool = True
    needs_probabilities = False

    def write(self, prediction: ImagePrediction) -> None:
        """Write the PNG of one image, and its entry to an intermediate file."""
        found = prediction.objects
        assert found is not None, "the task has objects"
        canvas = np.zeros(found.size, np.int64)
        segments = []
        for place, (mask, box) in enumerate(zip(found.masks, found.boxes.tolist(), strict=True)):
            number = place + 1
            label = int(found.classes[place])
            if label == self.background and label not in self.ids.categories:
                continue
            mask.paint(canvas, number)
            category = self.ids.find_category(label)
            segment = {"id": number, "category_id": category, "area": mask.area, "bbox": box}
            score = {"score": float(found.scores[place])} if self.scored else {}
            segments.append({**segment, "iscrowd": int(found.crowds[place]), **score})
        pixels = np.stack([canvas % 256, canvas // 256 % 256, canvas // 2**16], axis=-1).astype(np.uint8)
        write_png(self.folder / "panoptic" / f"{prediction.name}.png", pixels)
        entry = {"file_name": f"{prediction.name}.png", "segments_info": segments}
        piece = {"image": _describe(prediction, self.ids), "annotation": entry}
        write_text(_piece(self.folder, prediction), json.dumps(piece))

    def finish(self) -> None:
        """Merge the intermediate files and number the images."""
        # as in overlays: panopticapi takes black as void
        colours = layer_colours(self.labels.palette)
        categories = [
            {
                "id": number,
                "name": self.labels.classes[index],
                "isthing": int(index in self.things),
                "color": list(colours[index]),
            }
            for index, number in self.ids.categories.items()
        ]
        pieces = [*_pieces(self.folder)]
        content = {
            "images": [{"id": number, **piece["image"]} for number, piece in pieces],
            "categories": categories,
            "annotations": [{"image_id": number, **piece["annotation"]} for number, piece in pieces],
        }
        write_text(self.folder / "panoptic.json", json.dumps(content, ensure_ascii=False))


def _measure(outlines: Sequence[np.ndarray], size: tuple[int, int]) -> tuple[int, list[int]]:
    """Return the number of pixels that polygons (N, 2) cover, as in pycocotools, and their box as in `MaskRegion`."""
    patch = Polygons(tuple(points.astype(np.float64).tobytes() for points in outlines)).draw(size)
    covered = Objects.of_masks(patch.mask[None], classes=[0])
    left, top, width, height = covered.boxes[0].tolist()
    return int(covered.areas[0]), [patch.left + left, patch.top + top, width, height]


def _encode(runs: RunLengths, size: tuple[int, int]) -> dict[str, Any]:
    return {"size": [*size], "counts": to_text(runs.to_counts(size[0] * size[1]))}


def _describe(prediction: ImagePrediction, ids: CocoIds) -> dict[str, Any]:
    """Return the entry of an image, with an id if it does not get one from the order of the images."""
    height, width = prediction.ids.shape
    number = ids.find_image(prediction.name)
    known = {} if number is None else {"id": number}
    return {**known, "file_name": _image_name(prediction), "height": height, "width": width}


def _image_name(prediction: ImagePrediction) -> str:
    """Return the path of an image relative to the input folder, with its suffix."""
    return (Path(prediction.name).parent / prediction.path.name).as_posix()


def _piece(folder: Path, prediction: ImagePrediction) -> Path:
    return folder / _PIECES / f"{prediction.name}.json"


def _pieces(folder: Path) -> Iterator[tuple[int, Any]]:
    """Yield the id and the content of each intermediate file, sorted by path; without an id, a number from 1.

    Raises:
        UserError: two images have the same id, that of one image of a reference.
    """
    names: dict[int, str] = {}
    top = folder / _PIECES
    paths = sorted(parent / file for parent, files in visible_files(top) for file in files if file.endswith(".json"))
    for number, path in enumerate(paths, 1):
        piece = json.loads(path.read_bytes())
        number = piece["image"].pop("id", number)
        name = piece["image"]["file_name"]
        if names.setdefault(number, name) != name:
            raise UserError(
                f"mode.shapes.ids has one id, {number}, for both {names[number]} and {name}. Predict one of them, or "
                "give the file that has both with their folders."
            )
        yield number, piece


def _join(write: Callable[[str], object], rows: Iterator[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        write(f"{',' * (number > 0)}\n{json.dumps(row)}")
