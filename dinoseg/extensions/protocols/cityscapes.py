"""Cityscapes: class and category IoU, and instance-weighted iIoU, of the official pixel-level evaluation."""

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.data.label_tables.read import label_table
from dinoseg.extensions.protocols.contract import BadFile, Cases, DatasetProtocol, Measured, ScoringCase
from dinoseg.extensions.protocols.trees import Tree, match, pictures_hint, read_both, read_labels, refuse_ids
from dinoseg.metrics.counts import confusion, iou, mean_defined, parts
from dinoseg.utils.errors import UserError

ENDING = "_gtFine_labelIds.png"
AVERAGE_SIZES = {  # pixels per instance in the training set, as fixed by the official evaluation
    **{"person": 3462.4756337644, "rider": 3930.4788056518, "car": 12794.0202738185, "truck": 27855.1264367816},
    **{"bus": 35732.1511111111, "train": 67583.7075812274, "motorcycle": 6298.7200839748},
    **{"bicycle": 4672.3249222261},
}
_IMAGE = re.compile(r"[^_]+_\d+_\d+")
_LABELS = [row for row in label_table("cityscapes") if int(row["id"]) >= 0]  # in the order of their ids
_SIZE = len(_LABELS)
_SCORED = [int(row["id"]) for row in _LABELS if row["ignored"] == "0"]
_THINGS = [int(row["id"]) for row in _LABELS if row["name"] in AVERAGE_SIZES]
_TRAIN_IDS = {int(row["train_id"]): int(row["id"]) for row in _LABELS if row["train_id"] != "255"}
_CATEGORY = np.array([int(row["category_id"]) for row in _LABELS])
_CATEGORIES = sorted({int(_CATEGORY[label]) for label in _SCORED})
_THING_CATEGORIES = sorted({int(_CATEGORY[label]) for label in _THINGS})
_REFERENCE = Tree(ENDING, f"<city>/<city>_<sequence>_<frame>{ENDING}, such as gtFine/val", depth=1)
_PREDICTION = Tree(layout="PNG files whose names begin with <city>_<sequence>_<frame>")
_NO_INSTANCES = (
    "is missing, but iIoU needs it. It is in gtFine_trainvaltest.zip: put it into the folder of the label ids."
)
_CHECKED = 8  # predictions searched for train ids


class Cityscapes(DatasetProtocol):
    """Scores of Cityscapes: label ids 0..33 on both sides, with `_gtFine_instanceIds.png` next to each reference."""

    name = "cityscapes"
    unit = "image"
    group = "^[^/]+"  # a city, as in data=cityscapes
    ending = ENDING
    keys = ("IoU_classes", "IoU_categories", "iIoU_classes", "iIoU_categories")

    def __init__(self) -> None:
        self.rules: dict[str, Any] = {
            "absent_class": "left out of the mean (no pixel in the reference and none predicted on scored pixels)",
            "resolution": "as stored; both sides must have the same size",
            "ignore": "pixels whose reference is an ignored label; predicting one elsewhere is a false negative",
            "aggregation": "one matrix over all images, then the mean over classes",
            "iIoU": "hits and misses of an instance are weighted by its class's average size / its own; groups have no "
            "weight",
            "version": "mcordts/cityscapesScripts, evaluation/evalPixelLevelSemanticLabeling.py",
            "differs": [
                "official: stops at the first image without prediction, with two, or with ids above 33; "
                "here all such files are named."
            ],
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each reference image that has its instance file and exactly one prediction."""
        by_image = _by_image(_PREDICTION.files(prediction, "prediction"))
        references = _REFERENCE.files(reference, "reference", lambda name: _image(name) in by_image)
        predictions = {name: by_image.pop(_image(name)) for name in references if _image(name) in by_image}
        firsts = {name: files[0] for name, files in (predictions | by_image).items()}
        folders = (reference, prediction)
        listing = match(references, firsts, folders=folders, missing=lambda name: prediction / self.target(name))
        _refuse_train_ids(listing.cases, prediction)
        whole = []
        for case in listing.cases:
            files, instances = predictions[case.name], _instance_file(case.files[0][0])
            if len(files) > 1:
                listing.problems.append(
                    (files[0], f"is one of {len(files)} predictions of its image, like {files[1]}: keep one.")
                )
            elif not instances.is_file():
                listing.problems.append((instances, _NO_INSTANCES))
            else:
                whole.append(case)
        listing.cases = whole
        return listing

    def measure(self, case: ScoringCase) -> Measured:
        """Return the matrix (34 * 34,) of an image, followed by weighted hits and misses of instances (2 * 10,)."""
        reference, prediction = read_both(case)
        reference_file, prediction_file = case.files[0]
        for ids, path in ((reference, reference_file), (prediction, prediction_file)):
            assert path is not None
            rule = f"Label ids are 0..{_SIZE - 1}; map train ids (0..18, 255 = ignored) to them first."
            refuse_ids(ids, (ids < 0) | (ids >= _SIZE), path, rule)
        path = _instance_file(reference_file)
        instances = read_labels(path).astype(np.int32)  # 8-bit if no pixel is of a thing
        if instances.shape != reference.shape:
            raise BadFile(path, f"differs in size from {reference_file}. Take both from the same archive.")
        labels = instances // 1000
        known = np.isin(labels, [i for i in range(_SIZE) if i in _THINGS or i not in _SCORED])
        known = np.where(instances > 1000, known, (instances >= 0) & (instances < _SIZE))
        rule = "An instance's id is 1000 * its label id + a number, that of any other pixel its label id."
        refuse_ids(instances, ~known, path, rule)
        weighted = _instance_counts(instances, labels, prediction)
        return Measured(np.concatenate([confusion(reference, prediction, _SIZE).ravel(), weighted.ravel()]))

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the four means (...)."""
        matrix, weighted = _split(sums)
        hits, misses = weighted[..., 0, :], weighted[..., 1, :]
        things = len(_THINGS)
        wrong = _category_parts(matrix, _THING_CATEGORIES, columns=range(_SIZE))[1]
        return {
            "IoU_classes": mean_defined(iou(*parts(matrix, _SCORED))),
            "IoU_categories": mean_defined(iou(*_category_parts(matrix, _CATEGORIES, columns=_SCORED))),
            "iIoU_classes": mean_defined(_instance_iou(matrix, weighted)),
            "iIoU_categories": mean_defined(iou(hits[..., things:], wrong, misses[..., things:])),
        }

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the IoU of each of the 19 classes, and the iIoU of classes with instances."""
        matrix, weighted = _split(sums)
        values = iou(*parts(matrix, _SCORED))
        instance_values = dict(zip(_THINGS, _instance_iou(matrix, weighted), strict=True))
        return [
            {
                "id": label,
                "name": _LABELS[label]["name"],
                "IoU": float(value),
                "iIoU": float(instance_values.get(label, np.nan)),
            }
            for label, value in zip(_SCORED, values, strict=True)
        ]

    def case(self, name: str, reference: Path, prediction: Path) -> ScoringCase:
        """Return the case of one image; a reference in train ids is replaced by the label ids next to it."""
        labels = reference.with_name(reference.name.replace("_labelTrainIds.", "_labelIds."))
        if not (instances := _instance_file(labels)).is_file():
            raise BadFile(instances, _NO_INSTANCES)
        return super().case(name, labels, prediction)

    def file_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return the label ids of train ids 0..18."""
        return np.array([_TRAIN_IDS[index] for index in range(len(_TRAIN_IDS))], np.uint8)[ids]


def _split(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix (..., 34, 34) and the weighted counts (..., 2, 10), hits before misses."""
    start = sums.shape[:-1]
    return sums[..., : _SIZE**2].reshape(*start, _SIZE, _SIZE), sums[..., _SIZE**2 :].reshape(*start, 2, -1)


def _instance_counts(instances: np.ndarray, labels: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return weighted hits and misses (2, 10): of each class with instances, then of each category of these classes."""
    numbers = np.where(instances > 1000, instances, 0)
    labels = np.minimum(labels, _SIZE - 1)  # group regions and pixels without an instance count as number 0
    length = 1000 * _SIZE
    sizes = np.bincount(numbers.ravel(), minlength=length)
    right = np.bincount(numbers[prediction == labels], minlength=length)
    near = np.bincount(numbers[_CATEGORY[prediction] == _CATEGORY[labels]], minlength=length)
    counts = np.zeros((2, len(_THINGS) + len(_THING_CATEGORIES)))
    for index, label in enumerate(_THINGS):
        category = len(_THINGS) + _THING_CATEGORIES.index(int(_CATEGORY[label]))
        held = slice(1000 * label, 1000 * (label + 1))
        present = sizes[held] > 0
        size = sizes[held][present]
        weight = AVERAGE_SIZES[_LABELS[label]["name"]] / size
        for column, hits in ((index, right[held][present]), (category, near[held][present])):
            counts[:, column] += (hits * weight).sum(), ((size - hits) * weight).sum()
    return counts


def _instance_iou(matrix: np.ndarray, weighted: np.ndarray) -> np.ndarray:
    """Return the iIoU (..., 8) of each class with instances; false positives are unweighted pixels."""
    wrong = parts(matrix, _SCORED)[1][..., [_SCORED.index(label) for label in _THINGS]]
    count = len(_THINGS)
    return iou(weighted[..., 0, :count], wrong, weighted[..., 1, :count])


def _category_parts(
    matrix: np.ndarray, categories: Sequence[int], *, columns: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, false positives and false negatives (..., C), ignoring confusions within a category.

    Args:
        matrix: counts (..., 34, 34).
        categories: ids of the C categories.
        columns: predicted labels that count for their category; for iIoU, ignored labels too.
    """
    by_category = []
    for category in categories:
        inside = [label for label in _SCORED if _CATEGORY[label] == category]
        others = [label for label in _SCORED if _CATEGORY[label] != category]
        meant = [label for label in columns if _CATEGORY[label] == category]
        hits = matrix[..., inside, :][..., meant].sum((-2, -1))
        by_category.append(
            (hits, matrix[..., others, :][..., meant].sum((-2, -1)), matrix[..., inside, :].sum((-2, -1)) - hits)
        )
    hits, wrong, missed = (np.stack(counts, axis=-1) for counts in zip(*by_category, strict=True))
    return hits, wrong, missed


def _image(name: str) -> str:
    """Return `<city>_<sequence>_<frame>` of a path, or the whole path if it has another name."""
    start = _IMAGE.match(name.rpartition("/")[2])
    return start[0] if start else name


def _by_image(files: Mapping[str, Path]) -> dict[str, list[Path]]:
    """Group files by image."""
    by_image: dict[str, list[Path]] = {}
    for name, path in files.items():
        by_image.setdefault(_image(name), []).append(path)
    return by_image


def _instance_file(reference: Path) -> Path:
    return reference.with_name(reference.name.replace("_labelIds.", "_instanceIds."))


def _refuse_train_ids(cases: Sequence[ScoringCase], folder: Path) -> None:
    """Refuse predictions in train ids, which would score nearly 0 without an error."""
    held: set[int] = set()
    paths = [path for case in islice(cases, _CHECKED) for _, path in case.files if path is not None]
    for path in paths:
        try:
            held |= set(np.unique(read_labels(path)).tolist())
        except BadFile:
            continue  # reported by `measure`
    seen = held - {255}
    if seen and max(seen) < len(_TRAIN_IDS) and seen & set(range(1, 7)):
        raise UserError(
            f"prediction={folder} holds train ids ({min(seen)}..{max(seen)}), but the official evaluation takes label "
            "ids (road is 7, not 0). Map them by the train_id column of "
            "dinoseg/data/label_tables/cityscapes.csv." + pictures_hint(folder, (path.name for path in paths))
        )
