"""Parser of COCO's panoptic JSON, whose segments are ids in a PNG file for each image; imports no torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoseg.extensions.annotations.coco import collect_annotations, find_label, parse_coco
from dinoseg.extensions.annotations.drawing import Segment
from dinoseg.extensions.annotations.entry import Annotations, LabelledShape
from dinoseg.utils import forms

_CATEGORIES = forms.list_of(forms.object_with(isthing=forms.bit))
_FORM = forms.list_of(
    forms.object_with(
        image_id=forms.integer,
        file_name=forms.text,
        segments_info=forms.list_of(forms.object_with(id=forms.whole(1))),
    )
)


def read_coco_panoptic(content: bytes, path: Path) -> Annotations:
    """Parse a file in COCO's panoptic format; its PNG files lie in the folder of its name, beside it or one level up.

    The first is COCO's archive when unpacked, the second the layout of detectron2. Pixels of no segment, id 0, are
    void.

    Raises:
        ValueError: it is not such a file, or an id is duplicate or undefined.
    """
    whole = parse_coco(content)
    _CATEGORIES(whole["categories"], "categories")
    _FORM(whole["annotations"], "annotations")
    images = Counter(annotation["image_id"] for annotation in whole["annotations"])
    if twice := [image for image, count in images.items() if count > 1]:
        raise ValueError(f"image {twice[0]} has {images[twice[0]]} annotations, whose segments may overlap: keep one")
    segments = []
    for annotation in whole["annotations"]:
        numbers = tuple(segment["id"] for segment in annotation["segments_info"])
        shared = {"image_id": annotation["image_id"], "png": annotation["file_name"], "numbers": numbers}
        segments += [{**segment, **shared} for segment in annotation["segments_info"]]
    beside, above = path.with_suffix(""), path.parent.parent / path.stem
    folder = above if above.is_dir() and not beside.is_dir() else beside

    def make_shape(segment: Mapping[str, Any], categories: Mapping[int, str], size: tuple[int, int]) -> LabelledShape:
        number = segment["id"]
        if segment["numbers"].count(number) > 1:
            raise ValueError("another segment of this image has the same id")
        form = Segment(folder / segment["png"], number, segment["numbers"])
        return LabelledShape(find_label(segment, categories), form, forms.read_flag(segment, "iscrowd"), number)

    found = collect_annotations({**whole, "annotations": segments}, path, make_shape)
    stuff = {category["name"] for category in whole["categories"] if not category["isthing"]}
    return replace(found, stuff=frozenset(stuff))
