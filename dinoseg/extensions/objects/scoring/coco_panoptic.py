"""COCO's panoptic quality: on both sides a JSON file of segments and a folder of PNGs; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.objects.scoring.coco_files import check_unique, name_images, read_coco_json
from dinoseg.extensions.objects.scoring.panoptic_quality import (
    COUNTS,
    GROUPS,
    Segments,
    class_qualities,
    count_segments,
    mean_qualities,
)
from dinoseg.extensions.protocols.contract import BadFile, Cases, Measured, ScoringCase, SumProtocol
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids

_SEGMENTS = forms.list_of(forms.object_with(id=forms.whole(), category_id=forms.integer))
_ANNOTATIONS = forms.list_of(forms.object_with(image_id=forms.integer, file_name=forms.text, segments_info=_SEGMENTS))
_CATEGORIES = forms.list_of(forms.object_with(id=forms.integer, name=forms.text, isthing=forms.bit))
_REFERENCE = forms.object_with(categories=_CATEGORIES, annotations=_ANNOTATIONS)
_PREDICTION = forms.object_with(annotations=_ANNOTATIONS)
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class PanopticCase(ScoringCase):
    """Segments of an image: the entries of the reference and of the prediction."""

    reference: Entry
    prediction: Entry


class CocoPanoptic(SumProtocol):
    """PQ, SQ and RQ as panopticapi computes them, with the categories of the reference."""

    name = "coco_panoptic"
    unit = "image"
    keys = tuple(f"{name}{suffix}" for suffix in GROUPS for name in ("PQ", "SQ", "RQ"))

    def __init__(self) -> None:
        self._categories: dict[int, Entry] = {}  # by id, set by `find`
        self.rules: Mapping[str, Any] = {
            "absent_class": "a class without a segment on both sides enters no mean; SQ of one without a hit is 0",
            "resolution": "as annotated; another size is an error",
            "ignore": "pixels of id 0 in the reference; a predicted segment with more than half of its pixels in "
            "them, or in the last crowd of its class in an image, is not counted",
            "aggregation": "segments of a class match with an IoU above 0.5; counts and IoUs summed over images, then "
            "the mean over classes",
            "version": "panopticapi 7bb4655, pq_compute",
            "differs": [
                "a group of classes without any segment is undefined; panopticapi divides by zero",
                "ids of a PNG that are not in the JSON, or the reverse, are an error on both sides; panopticapi checks "
                "predictions only, and takes areas of references from the JSON",
                "images that only the prediction has are an error; panopticapi leaves them out",
            ],
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each image of the reference; PNGs lie in a folder of the JSON file's name.

        Raises:
            UserError: a file is not of its form, an id occurs twice, or a folder is missing.
        """
        what = "COCO's panoptic annotations"
        sides = [
            read_coco_json(path, option, form, what)
            for path, option, form in (
                (reference, "reference", _REFERENCE),
                (prediction, "prediction", _PREDICTION),
            )
        ]
        check_unique((entry["id"] for entry in sides[0]["categories"]), reference, "categories")
        self._categories = {entry["id"]: entry for entry in sorted(sides[0]["categories"], key=lambda one: one["id"])}
        held, found = [
            _by_image(whole["annotations"], path) for whole, path in zip(sides, (reference, prediction), strict=True)
        ]
        folders = [_png_folder(path) for path in (reference, prediction)]
        listing = Cases([])
        for number, name in name_images([{**entry, "id": number} for number, entry in held.items()]).items():
            # an error, since PQ would be higher without the misses of this image
            if number not in found:
                listing.problems.append((prediction, f"image {number} has no prediction. Add it"))
                continue
            files = folders[0] / held[number]["file_name"], folders[1] / found[number]["file_name"]
            listing.cases.append(PanopticCase(name, name, (files,), held[number], found[number]))
        for number in sorted(found.keys() - held.keys()):
            listing.problems.append((prediction, f"image {number} is not in {reference}"))
        return listing

    def measure(self, case: ScoringCase) -> Measured:
        """Return the counts of an image, (4 K,) float64.

        Raises:
            BadFile: a PNG is unreadable or does not fit its entry or the other one.
        """
        assert isinstance(case, PanopticCase)
        (reference, prediction), *_ = case.files
        assert prediction is not None
        held = self._read(case.reference, reference)
        found = self._read(case.prediction, prediction)
        if held.ids.shape != found.ids.shape:
            sizes = [f"{side.ids.shape[1]} x {side.ids.shape[0]}" for side in (found, held)]
            number = case.reference["image_id"]
            raise BadFile(prediction, f"image {number} is {sizes[0]} (width x height), its reference {sizes[1]}.")
        counts = count_segments(held, found, len(self._categories))
        numbers = zip(COUNTS[1:], counts[1:].sum(axis=1).astype(int).tolist(), strict=True)
        return Measured(counts.ravel(), dict(numbers))

    def _read(self, entry: Entry, path: Path) -> Segments:
        """Return the segments of an image; refuse ids that PNG and entry do not both have."""
        where = f"image {entry['image_id']}"
        segments = entry["segments_info"]
        numbers = np.array([segment["id"] for segment in segments], np.int64)
        places = {number: place for place, number in enumerate(self._categories)}
        try:
            pixels = read_ids(path)
        except UserError as error:
            raise BadFile(path, f"{where}: {error}") from None
        if pixels.ndim != 3:
            raise BadFile(path, f"{where} has one channel: store ids as colours, red + 256 green + 65536 blue")
        # id = red + 256 green + 65536 blue, as in COCO's `rgb2id`
        ids = pixels.astype(np.int64) @ np.array([1, 2**8, 2**16])
        drawn, areas = np.unique(ids, return_counts=True)
        area_of = dict(zip(drawn.tolist(), areas.tolist(), strict=True))
        if unlisted := area_of.keys() - {0, *numbers.tolist()}:
            raise BadFile(path, f"{where}: the id {min(unlisted)} is in the PNG, but not in segments_info of the JSON")
        if len({*numbers.tolist()}) < len(numbers):
            raise BadFile(path, f"{where}: an id occurs twice in segments_info of the JSON. Make each unique")
        for segment in segments:
            number, category = segment["id"], segment["category_id"]
            if number == 0 or number not in area_of:
                reason = "is void" if number == 0 else "is not in the PNG"
                raise BadFile(path, f"{where}: the id {number} in segments_info of the JSON {reason}")
            if category not in places:
                raise BadFile(
                    path, f"{where}: segment {number} has the category {category}, which is not in categories"
                )
        classes = np.array([places[segment["category_id"]] for segment in segments], np.int64)
        try:
            crowds = [forms.read_flag(segment, "iscrowd", f"segment {segment['id']}:") for segment in segments]
        except forms.SchemaError as error:
            raise BadFile(path, f"{where}, {error}") from None
        return Segments(ids, numbers, classes, np.array(crowds, bool))

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each score (...) from sums (..., 4 K)."""
        things = np.array([entry["isthing"] for entry in self._categories.values()], bool)
        return mean_qualities(self._by_class(sums), things)

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the scores and counts of each class."""
        counts = self._by_class(sums)
        columns = class_qualities(counts) | dict(zip(COUNTS[1:], counts[1:].astype(int), strict=True))
        return [
            {"id": number, "name": entry["name"], **{key: values[place] for key, values in columns.items()}}
            for place, (number, entry) in enumerate(self._categories.items())
        ]

    def _by_class(self, sums: np.ndarray) -> np.ndarray:
        return sums.reshape(*sums.shape[:-1], len(COUNTS), len(self._categories))


def _by_image(entries: Sequence[Entry], path: Path) -> dict[int, Entry]:
    check_unique((entry["image_id"] for entry in entries), path, "annotations of images")
    return {entry["image_id"]: entry for entry in entries}


def _png_folder(path: Path) -> Path:
    folder = path.with_suffix("")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the PNG files of {path} in a folder of this name.")
    return folder
