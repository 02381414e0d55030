"""COCO's average precision of instance masks: a JSON file of references and one of results; no torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import Counts
from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.annotations import rle
from dinoseg.extensions.annotations.entry import polygons, size_of
from dinoseg.extensions.objects.scoring.average_precision import InstanceAveragePrecision, count_instances
from dinoseg.extensions.objects.scoring.coco_files import (
    IMAGES,
    Named,
    check_unique,
    group_entries,
    name_images,
    read_coco_json,
)
from dinoseg.extensions.protocols.contract import BadFile, Cases, Measured, RowProtocol, ScoringCase
from dinoseg.utils import forms
from dinoseg.utils.wording import format_value

_OBJECT: dict[str, forms.Form] = {"image_id": forms.integer, "category_id": forms.integer, "segmentation": forms.plain}
_REFERENCE = forms.object_with(
    images=IMAGES,
    categories=forms.list_of(forms.object_with(id=forms.integer, name=forms.text)),
    annotations=forms.list_of(forms.object_with(id=forms.integer, area=forms.plain, **_OBJECT)),
)
_RESULTS = forms.list_of(forms.object_with(score=forms.plain, **_OBJECT))


@dataclass(frozen=True)
class InstanceCase(ScoringCase):
    """Objects of an image.

    Args:
        image: entry of the image.
        reference: its annotations.
        prediction: its results.
    """

    image: Mapping[str, Any]
    reference: Sequence[Named]
    prediction: Sequence[Named]


class CocoInstances(RowProtocol):
    """AP of instance masks as pycocotools computes it, with the categories of the reference."""

    name = "coco_instances"
    unit = "image"
    keys = tuple(InstanceAveragePrecision.scores)
    metric: InstanceAveragePrecision

    def __init__(self) -> None:
        # set by `find`: name of each category by its id, and the metric of these
        self._categories: dict[int, str] = {}
        self.metric = InstanceAveragePrecision(0)
        self.rules: Mapping[str, Any] = {
            "absent_class": "a class without an object of the reference (of a size) enters no mean (of this size)",
            "resolution": "as annotated; run lengths of another size are an error",
            "ignore": "crowds and, in scores by size, objects of other sizes: matches with them are neither hits nor "
            "misses",
            "sizes": "area of the reference's JSON: small up to 32 x 32, large from 96 x 96 pixels",
            "aggregation": "all objects of a class sorted by score, the first 100 of an image and class; mean over 101 "
            "recalls, then over IoUs of 0.5 to 0.95, then over classes",
            "version": "pycocotools 2.0.11, COCOeval with iouType=segm",
            "differs": [
                "an object of the reference with the id 0 can be matched; pycocotools counts its match as a miss",
                "results of an unknown category are an error; pycocotools leaves them out",
                "the size of a result is the area of its mask; pycocotools takes that of its box if there is one",
            ],
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each image of the reference.

        Raises:
            UserError: a file is not of its form, or an id occurs twice.
        """
        whole = read_coco_json(reference, "reference", _REFERENCE, "COCO's annotations of instances")
        results = read_coco_json(prediction, "prediction", _RESULTS, "COCO's results: a list of scored masks")
        for what in ("images", "categories", "annotations"):
            check_unique((entry["id"] for entry in whole[what]), reference, what)
        self._categories = {
            entry["id"]: entry["name"] for entry in sorted(whole["categories"], key=lambda one: one["id"])
        }
        self.metric = InstanceAveragePrecision(len(self._categories))
        images = {entry["id"]: entry for entry in whole["images"]}
        listing = Cases([])
        if len(results) > 1 and all(entry["score"] == results[0]["score"] for entry in results):
            listing.notes.append(
                f"{prediction}: all {len(results):,} results have the score {format_value(results[0]['score'], 40)}. "
                "AP ranks results by score, so it depends on their order in the file: give each result its own score."
            )
        sides: list[dict[int, list[Named]]] = []
        for path, kind, entries in ((reference, "annotation", whole["annotations"]), (prediction, "result", results)):
            by_image, problems = group_entries([(path, entry) for entry in entries], kind, "image", images, reference)
            sides.append(by_image)
            listing.problems += problems
        for number, name in name_images(whole["images"]).items():
            files = ((reference, prediction),)
            objects = (side[number] for side in sides)
            listing.cases.append(InstanceCase(name, name, files, images[number], *objects))
        return listing

    def measure(self, case: ScoringCase) -> Measured:
        """Return the rows of an image.

        Raises:
            BadFile: an object of it is invalid.
        """
        assert isinstance(case, InstanceCase)
        (reference, prediction), *_ = case.files
        assert prediction is not None
        try:
            size = size_of(case.image.get("height"), case.image.get("width"))
        except ValueError as error:
            raise BadFile(reference, f"image {case.image['id']}: {error}") from None
        held = read_objects(case.reference, reference, size, self._categories, is_result=False)
        found = read_objects(case.prediction, prediction, size, self._categories, is_result=True)
        counts = {"reference_objects": len(held.masks), "predicted_objects": len(found.masks)}
        return Measured(np.array([*counts.values()]), counts, count_instances(held, found))

    def per_class(self, rows: Sequence[Counts]) -> list[dict[str, Any]]:
        """Return the scores and numbers of objects of each class."""
        found = self.metric.score_classes(rows)
        return [
            {"id": number, "name": name, **{key: values[place] for key, values in found.items()}}
            for place, (number, name) in enumerate(self._categories.items())
        ]


def read_objects(
    entries: Sequence[Named],
    path: Path,
    size: tuple[int, int],
    categories: Collection[int],
    *,
    is_result: bool,
    remedy: str = "If dinoseg wrote the file, predict with mode.shapes.ids=REFERENCE",
) -> Objects:
    """Return the objects of entries of COCO's JSON, whose masks have `size` (H, W).

    Args:
        entries: annotations or results.
        path: their file.
        size: of the image.
        categories: ids of the classes, in their order.
        is_result: whether the entries have scores, and are never crowds.
        remedy: for an unknown category.

    Raises:
        BadFile: an entry is invalid.
    """
    masks: list[RunLengths] = []
    classes, areas, scores, crowds = [], [], [], []
    places = {number: place for place, number in enumerate(categories)}
    known = _read_together([entry["segmentation"] for _, entry in entries], size)
    for place, (name, entry) in enumerate(entries):
        try:
            mask = known[place] if known else _read_mask(entry["segmentation"], size)
            if entry["category_id"] not in places:
                raise ValueError(
                    f"its category_id is {entry['category_id']}, which is not in the categories of the reference. "
                    f"{remedy}"
                )
            # as in pycocotools, results are never crowds, and scores of references do not count
            areas.append(mask.area if is_result else _finite(entry["area"], "area"))
            scores.append(_finite(entry["score"], "score") if is_result else 0)
            crowds.append(not is_result and forms.read_flag(entry, "iscrowd"))
        except ValueError as error:
            raise BadFile(path, f"{name}: {error}") from None
        masks.append(mask)
        classes.append(places[entry["category_id"]])
    return Objects(
        size,
        masks,
        np.array(classes, np.int64),
        np.array(scores, np.float64),
        np.array(areas, np.float64),
        np.array(crowds, bool),
    )


def _read_together(segmentations: Sequence[Any], size: tuple[int, int]) -> list[RunLengths]:
    """Return the masks of compressed run lengths; none if one of them is something else, or has a fault."""
    if not all(isinstance(each, dict) and each.get("size") == [*size] for each in segmentations):
        return []
    texts = [each.get("counts") for each in segmentations]
    if not all(isinstance(text, str) for text in texts):
        return []
    return [*map(RunLengths.of_counts, rle.parse_texts(texts, size[0] * size[1]) or ())]


def _read_mask(segmentation: Any, size: tuple[int, int]) -> RunLengths:
    """Return the mask of polygons or run lengths, compressed or not."""
    if isinstance(segmentation, list) and segmentation:
        canvas = np.zeros(size, bool)
        polygons(segmentation).paint(canvas, True)
        return RunLengths.of_mask(canvas)
    if not isinstance(segmentation, dict):
        raise ValueError("it has no segmentation: give polygons or run lengths")
    return RunLengths.of_counts(rle.parse_mask(segmentation, size))


def _finite(value: Any, what: str) -> float:
    if not forms.fits(value, forms.number()):
        raise ValueError(f"its {what} is {format_value(value, 40)}: give a finite number")
    return value
