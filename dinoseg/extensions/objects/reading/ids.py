"""Objects of files of ids: a number for each object, which may hold its class, too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from dinoseg.core.object_ids import check_object_range, encode_object
from dinoseg.core.sources import MaskSource, ObjectSource, VirtualMask, mask_file
from dinoseg.data.classes.mask_advice import for_ids
from dinoseg.data.classes.masks import MaskReader, take_one_channel
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.extensions.objects.reading.things import advise_on_background, find_things
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids
from dinoseg.utils.ranges import Natural, Range

Instances = bool | Annotated[int, Range("a whole number from 2 to 65535", 2, 65535)]


@dataclass(frozen=True)
class ClassesOfIds(VirtualMask):
    """Numbers of classes in a file of ids, each of which is class number * divisor + number of the object.

    Args:
        path: the file.
        divisor: the divisor.
        has_areas: whether a lower id is a class number itself, of pixels whose objects are not separated.
    """

    path: Path
    divisor: int
    has_areas: bool

    def __str__(self) -> str:
        return f"{self.path}, divided by {self.divisor},"

    def read(self) -> np.ndarray:
        """Return the numbers (H, W)."""
        ids = _read_ids(self.path)
        # of Cityscapes: 26001 is a car, 26 an area of cars
        return np.where(ids < self.divisor, ids, ids // self.divisor) if self.has_areas else ids // self.divisor

    def digest(self) -> str:
        """Return a text that differs for each rule."""
        return f"{self.divisor} {self.has_areas}"


@dataclass(frozen=True)
class OneThing(VirtualMask):
    """Class ids of a file whose ids, but 0, number the objects of one thing.

    Args:
        path: the file.
        thing: class id of the objects, 0 or 1; the file's id 0 is the other class.
        ignore_index: id that is ignored in files of 8 bits; others have ids enough to number objects beyond it.
        mapped: file ids with their class id or ignore_index, where that is another.
    """

    path: Path
    thing: int
    ignore_index: int
    mapped: Sequence[tuple[int, int]]
    has_class_ids = True

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> np.ndarray:
        """Return class ids and ignore_index (H, W) uint8."""
        ids = take_one_channel(read_ids(self.path), self.path)
        classes = np.where(ids != 0, self.thing, 1 - self.thing).astype(np.uint8)
        ignored = [(self.ignore_index, self.ignore_index)] if ids.dtype == np.uint8 else []
        for file_id, class_id in (*ignored, *self.mapped):
            classes[ids == file_id] = class_id
        return classes

    def digest(self) -> str:
        """Return a text that differs for each rule."""
        return f"{self.thing} {self.ignore_index} {self.mapped}"


@dataclass(frozen=True)
class IdObjects(ObjectSource):
    """Objects of a file of ids; id 0 is no object.

    Args:
        path: the file.
        mask: where the class of each pixel comes from.
        reader: reads it.
        things: ids of the classes that have objects.
    """

    path: Path
    mask: MaskSource
    reader: MaskReader
    things: frozenset[int]

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> np.ndarray:
        """Return the objects as one layer (1, H, W) int32, or (0, H, W) if there are none.

        Raises:
            UserError: a file is unreadable, both differ in size, an object has two classes, or the ignored id looks
                like that of an object.
        """
        ids = _read_ids(self.path)
        classes = self.reader.read(self.mask)
        if ids.shape != classes.shape:
            raise UserError(f"{self.path} is {ids.shape[::-1]} (width, height), {self.mask} {classes.shape[::-1]}.")
        self._check_ignored_id(ids, classes)
        shown = np.isin(classes, list(self.things)) & (ids != 0)
        # one sort finds the ids, a pixel of each, and the id of every pixel
        numbers, first, owners = np.unique(ids[shown], return_index=True, return_inverse=True)
        check_object_range(len(numbers), self.path)
        of_pixels = classes[shown]
        # the class at an object's first pixel is compared with those at its others
        wrong = of_pixels != of_pixels[first][owners]
        if wrong.any():
            number = ids[shown][wrong][0]
            names = [self.reader.labels.classes[each] for each in np.unique(of_pixels[ids[shown] == number])]
            raise UserError(
                f"{self.path}: the object of id {number} has pixels of several classes: {', '.join(names)}."
            )
        values = []
        for number, (file_id, position) in enumerate(zip(numbers.tolist(), first.tolist(), strict=True), 1):
            values.append(encode_object(number, int(of_pixels[position]), crowd=self._is_area(file_id)))
        layer = np.zeros(ids.shape, np.int32)
        layer[shown] = np.array(values, np.int32)[owners]
        return layer[None][: bool(values)]

    def digest(self) -> str:
        """Return a text that differs for each rule; that of the classes is in the fingerprint of the dataset."""
        return f"{sorted(self.things)} {'' if isinstance(self.mask, Path) else self.mask.digest()}"

    def _check_ignored_id(self, ids: np.ndarray, classes: np.ndarray) -> None:
        """Refuse the ignored id beside the next one in a file that numbers objects, unless the config maps it."""
        ignore = self.reader.labels.ignore_index
        # a file that numbers objects 254, 255, 256 would lose one of them in silence
        is_one_file = not isinstance(self.mask, ClassesOfIds) and mask_file(self.mask) == self.path
        is_unmapped = is_one_file and ignore not in (0, *(self.reader.masks.ids or ()))
        is_ignored = (classes[ids == ignore] == ignore).any()
        if is_unmapped and is_ignored and np.isin(ids, list({ignore - 1, ignore + 1} - {0})).any():
            raise UserError(
                f"{self.path}: the id {ignore} is ignored, but with the next id in this file it looks like an object. "
                f"{for_ids([ignore], ignore, described=self.reader.masks.described is not None)}"
            )

    def _is_area(self, file_id: int) -> bool:
        """Return whether an id is an area of objects that were not separated."""
        return isinstance(self.mask, ClassesOfIds) and self.mask.has_areas and file_id < self.mask.divisor


def _read_ids(path: Path) -> np.ndarray:
    """Return the ids (H, W) of a file, integers of at least 32 bits."""
    return take_one_channel(read_ids(path), path).astype(np.int64)


def add_id_objects(
    dataset: PairDataset,
    *,
    instances: Instances = True,
    files: tuple[str, str] | None = None,
    has_areas: bool = False,
    things: Sequence[str] | None = None,
    background: Natural | None = None,
) -> PairDataset:
    """Return a dataset of mask files with the objects of its things.

    Args:
        dataset: its masks are files.
        instances: a number: an id of an object is class number * `instances` + its number, and class numbers have the
            meaning of mask values. True: each id is an object, whose class is in the mask.
        files: `[text, other]`: in the path of a mask, the last `text` is replaced to find its file of ids; None: the
            mask files are those of ids, which give the masks, too: by `instances`, or all ids but 0 are the one thing.
        has_areas: of a number for `instances`: whether lower ids are class numbers, as in Cityscapes. Those of things
            are areas of objects that were not separated: crowds.
        things: see `find_things`.
        background: id of the class that is no object.

    Raises:
        UserError: masks are no files, a file of ids is missing, or ids without classes have several things.
    """
    found = find_things(dataset.classes, things, background)
    if instances is False:
        raise UserError("data.instances=false: a dataset without objects is data=folder. Or give true, or a divisor.")
    if instances is True and files is None and len(found) > 1:
        names = ", ".join(dataset.classes[each] for each in sorted(found))
        advice = "" if background is not None else advise_on_background(dataset.classes)
        raise UserError(
            f"data.instances=true: ids in mask files have no classes, and there are {len(found)} things: {names}. "
            f"{advice}{', name' if advice else 'Name'} one as data.things=[NAME], or give the divisor of ids with "
            "classes, such as data.instances=1000."
        )
    masks = dataset.reader.masks
    mapped = sorted((masks.ids or {}).items())
    # of two classes, and without rules for values, every id but 0 can only be the thing
    is_one_thing = (
        *(files is None, len(dataset.classes) == 2, masks.format == "ids", masks.described is None or not mapped),
        *(masks.others is None, not masks.reduce_zero_label, all(class_id >= 0 for _, class_id in mapped)),
    )
    pairs = []
    sources = []
    for pair in dataset.pairs:
        if not isinstance(pair.mask, Path):
            raise UserError(
                f"{pair.mask} is not a mask file, which objects need. Set task=semantic, or choose data without "
                "objects, such as data=folder."
            )
        path = pair.mask if files is None else _find_ids(pair.mask, *files)
        mask: MaskSource = pair.mask
        if instances is not True:
            mask = ClassesOfIds(path, instances, has_areas)
        elif all(is_one_thing):
            mask = OneThing(path, min(found), dataset.ignore_index, tuple(mapped))
        sources.append(IdObjects(path, mask, dataset.reader, found))
        pairs.append(replace(pair, mask=mask) if files is None else pair)
    return dataset.with_pairs(pairs).with_objects(sources, found)


def _find_ids(mask: Path, text: str, other: str) -> Path:
    """Return the file of ids of a mask."""
    before, _, after = str(mask).rpartition(text)
    path = Path(f"{before}{other}{after}")
    if not str(mask).count(text) or not path.is_file():
        raise UserError(f"{mask} has no file of ids {path}. Check data.objects.files=[{text},{other}].")
    return path
