"""Counts of the objects of a dataset, and findings about them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median

import cv2
import numpy as np

from dinoseg.core.object_ids import OBJECTS, crowd_flags, object_classes
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.data.checks.findings import Finding, ScannedSplit
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.report.progress import Bar
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names


@dataclass
class ObjectCounts:
    """Objects of the images of a split, by image name; crowds are none of `objects`.

    Args:
        objects: number of objects with pixels.
        crowds: number of crowds.
        empty: number of objects that the files list but that have no pixels.
        divided: number of objects of several connected parts.
        repeated: number of objects that are equal to an earlier one, pixel by pixel.
        unreadable: what is wrong with the objects of an image, instead of numbers.
        by_class: number of objects with pixels of each thing, by class id and not by image.
        crowds_by_class: the same of crowds.
    """

    objects: dict[str, int] = field(default_factory=dict)
    crowds: dict[str, int] = field(default_factory=dict)
    empty: dict[str, int] = field(default_factory=dict)
    divided: dict[str, int] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    by_class: Counter[int] = field(default_factory=Counter)
    crowds_by_class: Counter[int] = field(default_factory=Counter)


def count_objects(data: PairDataset, workers: int = 1) -> ObjectCounts:
    """Return the counts of a dataset with objects, which `workers` threads read."""
    kind = data.maps[OBJECTS]
    assert isinstance(kind, ObjectMap)
    counts = ObjectCounts(by_class=Counter(dict.fromkeys(kind.things, 0)))
    with Bar(total=len(data.pairs), desc="counting objects", unit="image", delay=2, leave=False) as bar:
        pool = ThreadPoolExecutor(workers)
        try:
            for part in pool.map(_count_image, data.pairs):
                for name, table in vars(counts).items():
                    table.update(getattr(part, name))  # a Counter adds the numbers
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return counts


def _count_image(pair: Pair) -> ObjectCounts:
    """Return the counts of one image."""
    source = pair.objects
    assert source is not None
    try:
        shown = [each for layer in source.read() for each in _crop_objects(layer)]
    except UserError as error:
        return ObjectCounts(unreadable={pair.name: str(error)})
    objects = [each for each in shown if not crowd_flags(each[0])]
    name = pair.name
    return ObjectCounts(
        {name: len(objects)},
        crowds={name: len(shown) - len(objects)},
        empty={name: 0 if source.count is None else source.count - len(shown)},
        divided={name: sum(_is_divided(mask) for _, _, mask in objects)},
        repeated={name: len(objects) - len({key for _, key, _ in objects})},
        by_class=Counter(object_classes(value) for value, _, _ in objects),
        crowds_by_class=Counter(object_classes(value) for value, _, _ in shown if crowd_flags(value)),
    )


def _crop_objects(layer: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the value of each object of a layer (H, W), a hash of its pixels, and its mask in its bounding box."""
    pixels = np.flatnonzero(layer)
    values, owners, counts = np.unique(layer.reshape(-1)[pixels], return_inverse=True, return_counts=True)
    order = np.argsort(owners, kind="stable")  # so that the pixels of each object remain in order of rows
    for value, own in zip(values.tolist(), np.split(pixels[order], np.cumsum(counts))[:-1], strict=True):
        rows, columns = np.divmod(own, layer.shape[1])
        yield value, hash(own.tobytes()), layer[rows[0] : rows[-1] + 1, columns.min() : columns.max() + 1] == value


def _is_divided(mask: np.ndarray) -> bool:
    """Return whether a mask (H, W) has several 8-connected parts."""
    parts, _ = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    return parts > 2  # the first is the background


def check_objects(
    part: ScannedSplit, counts: ObjectCounts, queries: int | None, *, are_needed: bool = False
) -> Iterator[Finding]:
    """Yield the findings about the objects of a split.

    Args:
        part: the split.
        counts: of the split.
        queries: most objects that the head can predict for an image; None: unknown.
        are_needed: whether the task trains on objects, so that a split without any is an error.
    """
    split = part.split
    if counts.unreadable:
        yield Finding(
            "error",
            "objects_unreadable",
            f"{count_of(counts.unreadable, 'image')} of {split} with objects that cannot be read.",
            tuple(counts.unreadable),
            "Correct these files.",
            reasons=tuple(counts.unreadable.values()),
        )
    if not counts.objects:
        return
    objects = counts.objects.values()
    crowds = sum(counts.crowds.values())
    by_class = [f"{part.classes[thing]} {number}" for thing, number in counts.by_class.items()]
    yield Finding(
        "note",
        "objects",
        f"{split}: {count_of(sum(objects), 'object')} in {count_of(objects, 'image')} (median {median(objects):g}, at "
        f"most {max(objects)}), {count_of(crowds, 'crowd')}; of several parts: "
        f"{sum(counts.divided.values())}. By class: {join_names(by_class, 20)}.",
    )
    if not sum(objects):
        yield Finding(
            "error" if are_needed else "warning",
            "no_objects",
            f"{split}: no image has an object. task=instance and task=panoptic refuse such data.",
            (),
            "Check data.things, data.background and data.instances, or the annotations.",
        )
    else:
        yield from _check_things(part, counts)
    remedy = "Correct or delete them in the annotation tool."
    yield from _list_faulty(split, "empty_objects", counts.empty, "without pixels, left out", remedy)
    fault = "equal to another object of the image, pixel by pixel"
    remedy = "Keep one of each in the annotation tool, or export the annotations once."
    yield from _list_faulty(split, "repeated_objects", counts.repeated, fault, remedy)
    if crowds > sum(objects):
        yield Finding(
            "warning",
            "more_crowds_than_objects",
            f"{split}: {count_of(crowds, 'crowd')} and {count_of(sum(objects), 'object')}; crowds are no objects.",
            tuple(name for name, count in counts.crowds.items() if count),
            "CVAT exports brush masks to COCO as crowds. If each is an object: data.reader.shapes.crowds=object.",
        )
    crowded = [name for name, count in counts.objects.items() if queries is not None and count > queries]
    if crowded:
        yield Finding(
            "warning",
            "more_objects_than_queries",
            f"{count_of(crowded, 'image')} of {split} with more objects than head.num_queries={queries}: a "
            "model predicts no more than that.",
            tuple(crowded),
            f"Set head.num_queries to at least {max(objects)}.",
        )


def _list_faulty(split: str, code: str, numbers: Mapping[str, int], fault: str, remedy: str) -> Iterator[Finding]:
    """Yield a finding of the images of which some number of objects has a fault; none without such images."""
    counts = {name: count_of(number, "object") for name, number in numbers.items() if number}
    if counts:
        message = f"{split}: {count_of(sum(numbers.values()), 'object')} {fault}."
        reasons = tuple(f"{name}: {count}" for name, count in counts.items())
        yield Finding("warning", code, message, tuple(counts), remedy, reasons=reasons)


def _check_things(part: ScannedSplit, counts: ObjectCounts) -> Iterator[Finding]:
    """Yield the findings about pixels of things without objects."""
    pixels = part.counts
    shown = [thing for thing, number in counts.by_class.items() if number]
    marked = {*shown, *counts.crowds_by_class}
    if missing := [thing for thing in counts.by_class if thing not in marked and pixels[thing]]:
        names = [f"{part.classes[thing]} ({pixels[thing]:,} pixels)" for thing in missing]
        yield Finding(
            "warning",
            "things_without_objects",
            f"{part.split}: things without an object: {join_names(names, 20)}.",
            (),
            f"If they are stuff: data.things=[{','.join(part.classes[thing] for thing in shown)}]. Otherwise correct "
            "the annotations.",
        )
    bare = {}
    for record in part.records:
        areas = [
            f"{record.pixels[thing]:,} pixels of {part.classes[thing]}" for thing in shown if thing in record.pixels
        ]
        if areas and counts.objects.get(record.name) == counts.crowds.get(record.name) == 0:
            bare[record.name] = f"{record.name}: {join_names(areas)}"
    if bare:
        yield Finding(
            "warning",
            "missing_objects",
            f"{count_of(bare, 'image')} of {part.split} with pixels of things, but no object or crowd. Training takes "
            "them for images without objects.",
            tuple(bare),
            "Check their files of ids, and that data.objects.files finds the right ones.",
            reasons=tuple(bare.values()),
        )
