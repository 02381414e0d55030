"""Parser of COCO's JSON: images, categories, and annotations as polygons or run lengths; imports no torch."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dinoseg.extensions.annotations import rle
from dinoseg.extensions.annotations.drawing import CompressedColumns
from dinoseg.extensions.annotations.entry import (
    Annotations,
    Entry,
    LabelledShape,
    check_unique_names,
    polygons,
    size_of,
    text,
)
from dinoseg.utils import forms
from dinoseg.utils.wording import format_text, format_value

MakeShape = Callable[[Mapping[str, Any], Mapping[int, str], tuple[int, int]], LabelledShape]
_FORM = forms.object_with(
    images=forms.list_of(
        forms.object_with(id=forms.plain, file_name=forms.text, width=forms.plain, height=forms.plain)
    ),
    categories=forms.list_of(forms.object_with(id=forms.plain, name=forms.text)),
)


def read_coco(content: bytes, path: Path) -> Annotations:
    """Parse a COCO file; its labels are ordered by category id.

    An annotation of polygons covers their union; a crowd (`iscrowd`) lies below all others.

    Raises:
        ValueError: it is not a COCO file, or an id is duplicate or undefined.
    """
    return collect_annotations(parse_coco(content), path, _shape)


def parse_coco(content: bytes) -> Mapping[str, Any]:
    """Return the content of a COCO file with lists of images, categories and annotations.

    Raises:
        ValueError: it is not a COCO file.
    """
    whole = forms.parse_json(content, _FORM)
    if not isinstance(whole.get("annotations"), list):
        raise ValueError("it has no list named annotations: export the annotations, not the images alone")
    return whole


def collect_annotations(whole: Mapping[str, Any], path: Path, make_shape: MakeShape) -> Annotations:
    """Return the images of a COCO file with the shapes of their annotations.

    Args:
        whole: content of the file, see `parse_coco`.
        path: the file.
        make_shape: returns the shape of an annotation, given the names of categories by id, and its image's size;
            raises a ValueError that names its mistake.

    Raises:
        ValueError: an id is duplicate or undefined.
    """
    images = {_id(image["id"], "an image"): image for image in whole["images"]}
    categories = {_id(entry["id"], "a category"): text(entry["name"], "a category") for entry in whole["categories"]}
    for what, entries, known in (("images", whole["images"], images), ("categories", whole["categories"], categories)):
        if len(known) < len(entries):
            raise ValueError(f"{len(entries) - len(known)} ids of {what} occur more than once: make each unique")
    for key in _find_groupings(whole):
        del categories[key]
    check_unique_names(categories.values(), "categories")
    entries = {key: _entry(image, path) for key, image in images.items()}
    for position, annotation in enumerate(whole["annotations"]):
        if not isinstance(annotation, dict):
            raise ValueError(f"annotations[{position}] is not an object")
        if "segments_info" in annotation:
            raise ValueError(
                "it is in COCO's panoptic format, whose masks are PNG files: read it by data=coco_panoptic"
            )
        entry = entries.get(_id(annotation.get("image_id"), f"annotations[{position}], image_id,"))
        if entry is None:
            raise ValueError(
                f"annotations[{position}] belongs to image {annotation['image_id']}, which is not in images"
            )
        if entry.wrong:
            continue
        try:
            entry.shapes.append(make_shape(annotation, categories, entry.size))
        except ValueError as error:
            entry.wrong = f"annotation {format_value(annotation.get('id', position), 40)} of {entry.image}: {error}"
    kept = [entry for entry in whole["categories"] if entry["id"] in categories]
    groups = {entry["name"]: entry.get("supercategory") for entry in kept}
    given = {name: text(group, f"the supercategory of {format_text(name)}") for name, group in groups.items() if group}
    return Annotations([categories[key] for key in sorted(categories)], list(entries.values()), given)


def _find_groupings(whole: Mapping[str, Any]) -> set[int]:
    """Return the ids of categories that no annotation has, and that others name as their supercategory.

    They are no classes: Roboflow lists the name of a project in this way, which may be the name of a class, too.
    """
    annotated = [entry.get("category_id") for entry in whole["annotations"] if isinstance(entry, dict)]
    used = {category for category in annotated if type(category) is int}
    groups = [entry.get("supercategory") for entry in whole["categories"]]
    members = Counter(group for group in groups if isinstance(group, str))
    free = [entry for entry in whole["categories"] if entry["id"] not in used]
    # a category may name itself, such as COCO's person
    return {entry["id"] for entry in free if members[entry["name"]] > (entry.get("supercategory") == entry["name"])}


def _entry(image: Mapping[str, Any], path: Path) -> Entry:
    name = text(image["file_name"], f"the file_name of image {image['id']}")
    try:
        return Entry(path, name, size_of(image["height"], image["width"]))
    except ValueError as error:
        return Entry(path, name, None, wrong=f"image {image['id']}: {error}")


def _id(value: Any, what: str) -> int:
    if not forms.fits(value, forms.integer):
        raise ValueError(f"{what} has the id {format_value(value, 40)}: ids must be whole numbers of 64 bits")
    return value


def find_label(annotation: Mapping[str, Any], categories: Mapping[int, str]) -> str:
    """Return the name of an annotation's category.

    Raises:
        ValueError: the category is unknown.
    """
    category = annotation.get("category_id")
    if type(category) is not int or category not in categories:
        raise ValueError(f"its category_id is {format_value(category, 40)}, which is not in categories")
    return categories[category]


def _shape(annotation: Mapping[str, Any], categories: Mapping[int, str], size: tuple[int, int]) -> LabelledShape:
    label = find_label(annotation, categories)
    drawn = annotation.get("segmentation")
    crowd = forms.read_flag(annotation, "iscrowd")
    key = annotation.get("id")
    if isinstance(drawn, list) and drawn:
        return LabelledShape(label, polygons(drawn), crowd, key)
    if not isinstance(drawn, dict):
        raise ValueError("it has no segmentation, only a box: export polygons or masks")
    columns = CompressedColumns(rle.to_text(rle.parse_mask(drawn, size)))
    return LabelledShape(label, columns, crowd, key)
