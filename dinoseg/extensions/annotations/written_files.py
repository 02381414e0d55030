"""Predictions in the formats of annotation tools (COCO, LabelMe), for correction there."""

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from PIL import Image

import dinoseg
from dinoseg.data.classes.file import CLASS_FILE
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.annotations.rle import to_text
from dinoseg.inference.outputs import FurtherOutputs, ImagePrediction, ImageWriter
from dinoseg.utils.atomic import atomic_file, write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import visible_files
from dinoseg.utils.ranges import Count, NotNegative

_PIECES = ".pieces"  # one file per image, merged at the end; needed again when a stopped run resumes
_FINE = 3  # upscaling factor: outline corners are then distinct from edge midpoints


@dataclass(frozen=True)
class MaskRegion:
    """Pixels of one class: a mask (h, w) bool whose first pixel is at (left, top) of the image."""

    value: int
    left: int
    top: int
    mask: np.ndarray

    def counts(self, height: int, width: int) -> np.ndarray:
        """Return COCO's run lengths (N,) int64, by columns of the whole image."""
        x, y = np.nonzero(self.mask.T)
        places = (x + self.left) * height + y + self.top
        first = np.concatenate([[True], np.diff(places) > 1])
        starts, ends = places[first], places[np.roll(first, -1)] + 1
        edges = np.stack([starts, ends], axis=1).ravel()
        counts = np.diff(np.concatenate([[0], edges, [height * width]]))
        return counts if counts[-1] else counts[:-1]


def parts_of(ids: np.ndarray, *, leave_out: int | None, joined: bool, min_area: int) -> Iterator[MaskRegion]:
    """Yield the parts of class ids (H, W) uint8, class by class.

    Args:
        ids: class ids of an image.
        leave_out: the class that is not an object; None: every class has parts.
        joined: all pixels of a class are one part; otherwise each 8-connected component is one.
        min_area: parts with fewer pixels are dropped.
    """
    for value in np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist():
        if value == leave_out:
            continue
        mask = ids == value
        if joined:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            if box.sum() >= min_area:
                yield MaskRegion(value, int(columns[0]), int(rows[0]), box)
            continue
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        for label in range(1, count):
            left, top, width, height, area = boxes[label].tolist()
            if area >= min_area:
                yield MaskRegion(value, left, top, labels[top : top + height, left : left + width] == label)


def edge_polygons(part: MaskRegion, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) along pixel edges, as in COCO; together they cover the part.

    Polygons have no holes: a part with holes is cut along a row through each hole. With tolerance 0 they are exact;
    otherwise corners are dropped if no edge moves by more than `tolerance` pixels (Douglas and Peucker).
    """
    for top, band in _bands(part.mask):
        fine = np.repeat(np.repeat(band, _FINE, axis=0), _FINE, axis=1)
        for outline in _outlines(fine):
            corners = (outline + 1) // _FINE  # the first or last subpixel of a pixel, never its middle one
            yield _simpler(_drop_repeats(corners), tolerance) + (part.left, part.top + top)


def middle_polygons(part: MaskRegion, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) through the centres of border pixels, as drawn by LabelMe; else like `edge_polygons`."""
    for top, band in _bands(part.mask):
        for outline in _outlines(band):
            points = _simpler(outline, tolerance) + (part.left, part.top + top)
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
    return corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]


def _simpler(points: np.ndarray, tolerance: float) -> np.ndarray:
    if tolerance == 0 or len(points) < 4:
        return points
    fewer = cv2.approxPolyDP(points.astype(np.int32)[:, None], tolerance, closed=True)[:, 0]
    return fewer if len(fewer) >= 3 else points


@dataclass(frozen=True)
class PredictedShapes(FurtherOutputs):
    """Conversion of class IDs to shapes.

    Args:
        format: `polygons`, editable point by point, or `rle`: masks, exact to the pixel.
        objects: `component`: each connected component is an object; `class`: all pixels of a class in an image are one.
        tolerance: maximum shift in pixels of a polygon's edge by simplification; 0: exact.
        min_area: minimum area in pixels; smaller parts are dropped.
    """

    names: ClassVar = ("coco", "labelme")
    format: Literal["polygons", "rle"] = "polygons"
    objects: Literal["component", "class"] = "component"
    tolerance: NotNegative = 1.0
    min_area: Count = 1

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.tolerance < 1000 or self.min_area < 1:
            raise UserError(
                f"mode.shapes.tolerance={self.tolerance} min_area={self.min_area}: give a tolerance from 0 pixels, "
                "and an area from 1."
            )

    def make_writer(self, name: str, folder: Path, labels: Labels, background: int | None) -> ImageWriter:
        """Return the writer of `coco` or `labelme` files into a folder; see `FurtherOutputs`."""
        kind = CocoAnnotations if name == "coco" else LabelmeAnnotations
        return kind(folder, labels, background, self)

    def parts(self, ids: np.ndarray, background: int | None) -> Iterator[MaskRegion]:
        """Yield the parts of class IDs (H, W) that become objects."""
        joined = self.objects == "class"
        yield from parts_of(ids, leave_out=background, joined=joined, min_area=self.min_area)


@dataclass(frozen=True)
class _Annotations:
    """Base class of the annotation writers below.

    Args:
        folder: output folder.
        labels: the classes.
        background: the background class, which is not written; None: every class is written.
        shapes: conversion of class IDs to shapes.
    """

    folder: Path
    labels: Labels
    background: int | None
    shapes: PredictedShapes
    needs_probabilities = False

    def names(self) -> list[tuple[int, str]]:
        """Return (ID, name) of each class that is written."""
        return [(index, name) for index, name in enumerate(self.labels.classes) if index != self.background]

    def finish(self) -> None:
        """Write `classes.yaml`, so that corrected annotations are read with the same classes and colours."""
        colors = zip(self.labels.classes, self.labels.palette, strict=True)
        classes = json.dumps({name: {"color": list(color)} for name, color in colors}, ensure_ascii=False)
        ground = None if self.background is None else self.labels.classes[self.background]
        text = f"classes: {classes}\nbackground: {json.dumps(ground, ensure_ascii=False)}\nmasks: labels\n"
        write_text(self.folder / CLASS_FILE, text)


class CocoAnnotations(_Annotations):
    """Writer of `annotations.json` for all images: polygons along pixel edges, or compressed run-length encoding.

    The category ID is the class ID + 1. COCO polygons have no holes: a part with holes is split into several polygons
    of one annotation.
    """

    def write(self, prediction: ImagePrediction) -> None:
        """Write the annotations of one image to an intermediate file."""
        height, width = prediction.ids.shape
        annotations = [
            self._annotation(part, height, width) for part in self.shapes.parts(prediction.ids, self.background)
        ]
        image = {"file_name": _image_name(prediction), "height": height, "width": width}
        write_text(_piece(self.folder, prediction), json.dumps({"image": image, "annotations": annotations}))

    def finish(self) -> None:
        """Merge the intermediate files and number images and annotations."""
        super().finish()
        categories = [{"id": index + 1, "name": name, "supercategory": ""} for index, name in self.names()]
        with atomic_file(self.folder / "annotations.json") as part, open(part, "w", encoding="utf-8") as file:
            info = {"description": "predictions of dinoseg", "version": dinoseg.__version__}
            head = {
                "info": info,
                "licenses": [],
                "categories": categories,
            }  # other tools require `info` and `licenses`
            file.write(f'{json.dumps(head)[:-1]},\n"images": [')
            _join(file.write, ({"id": number, **piece["image"]} for number, piece in _pieces(self.folder)))
            file.write('],\n"annotations": [')
            _join(file.write, self._number_annotations())
            file.write("]}\n")

    def _number_annotations(self) -> Iterator[dict[str, Any]]:
        count = 0
        for number, piece in _pieces(self.folder):
            for annotation in piece["annotations"]:
                count += 1
                yield {"id": count, "image_id": number, **annotation}

    def _annotation(self, part: MaskRegion, height: int, width: int) -> dict[str, Any]:
        if self.shapes.format == "rle":
            drawn: Any = {"size": [height, width], "counts": to_text(part.counts(height, width))}
        else:
            drawn = [points.ravel().tolist() for points in edge_polygons(part, self.shapes.tolerance)]
        box = [part.left, part.top, part.mask.shape[1], part.mask.shape[0]]
        area = int(part.mask.sum())
        return {"category_id": part.value + 1, "iscrowd": 0, "area": area, "bbox": box, "segmentation": drawn}


class LabelmeAnnotations(_Annotations):
    """Writer of one JSON file per image, next to the image: polygons through border-pixel centres, or masks.

    The image is a hard link to the original where the file system allows, else a copy. A part with holes is split into
    several polygons that share a group.
    """

    def write(self, prediction: ImagePrediction) -> None:
        """Write one image and its JSON file."""
        height, width = prediction.ids.shape
        suffix = prediction.path.suffix
        target = self.folder / f"{prediction.name}{suffix}"
        with atomic_file(target) as part:
            _link(prediction.path, part)
        parts = enumerate(self.shapes.parts(prediction.ids, self.background))
        content = {
            "version": "5.4.1", "flags": {},
            "shapes": [shape for number, part in parts for shape in self._draw_shape(part, number)],
            "imagePath": target.name, "imageData": None, "imageHeight": height, "imageWidth": width,
        }  # fmt: skip
        write_text(self.folder / f"{prediction.name}.json", json.dumps(content, indent=1))

    def _draw_shape(self, part: MaskRegion, number: int) -> Iterator[dict[str, Any]]:
        shape = {"label": self.labels.classes[part.value], "group_id": number, "description": "", "flags": {}}
        if self.shapes.format == "rle":
            height, width = part.mask.shape
            corners = [[part.left, part.top], [part.left + width - 1, part.top + height - 1]]
            with io.BytesIO() as picture:
                Image.fromarray(part.mask).save(picture, "PNG")
                mask = base64.b64encode(picture.getvalue()).decode("ascii")
            yield {**shape, "shape_type": "mask", "points": corners, "mask": mask}
            return
        for points in middle_polygons(part, self.shapes.tolerance):
            yield {**shape, "shape_type": "polygon", "points": points.tolist(), "mask": None}


def _image_name(prediction: ImagePrediction) -> str:
    """Return the path of an image relative to the input folder, with its suffix."""
    return (Path(prediction.name).parent / prediction.path.name).as_posix()


def _piece(folder: Path, prediction: ImagePrediction) -> Path:
    return folder / _PIECES / f"{prediction.name}.json"


def _pieces(folder: Path) -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and content of each intermediate file, sorted by path."""
    top = folder / _PIECES
    paths = sorted(parent / file for parent, files in visible_files(top) for file in files if file.endswith(".json"))
    for number, path in enumerate(paths, 1):
        yield number, json.loads(path.read_bytes())


def _join(write: Callable[[str], object], rows: Iterator[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        write(f"{',' * (number > 0)}\n{json.dumps(row)}")


def _link(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source.resolve(), target)
        return
    shutil.copyfile(source, target)
