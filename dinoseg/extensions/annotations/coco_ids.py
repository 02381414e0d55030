"""Ids of images or videos, and of categories, in the files of COCO and YouTube-VIS that predictions are written to."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import dirname, splitext
from pathlib import Path
from typing import Any, Self

from dinoseg.data.classes.labels import Labels
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_text, format_value

_CATEGORIES = forms.list_of(forms.object_with(id=forms.integer, name=forms.text))
_FORMS = {
    "images": forms.list_of(forms.object_with(id=forms.integer, file_name=forms.text)),
    "videos": forms.list_of(forms.object_with(id=forms.integer, file_names=forms.list_of(forms.text))),
}


@dataclass(frozen=True)
class CocoIds:
    """Ids of a reference, so that predictions can be scored with it; without one, numbers from 1.

    Args:
        labels: the classes.
        categories: id of each class in the files, by class id; a reference may lack some.
        images: id of each image by its name without suffix, and by its file's if no other image has that; or of each
            video by the folder of its frames; None: they are numbered in their order.
        path: of the reference.
        option: key of the reference, for messages.
    """

    labels: Labels
    categories: Mapping[int, int]
    images: Mapping[str, int] | None = None
    path: Path | None = None
    option: str = "mode.shapes.ids"

    @classmethod
    def read(cls, path: str | None, labels: Labels, option: str = option, kind: str = "images") -> Self:
        """Return the ids of a file of COCO with images, or of YouTube-VIS with videos; None: numbers from 1.

        Raises:
            UserError: it is no such file, or an id or the name of an image or video occurs twice.
        """
        if path is None:
            return cls(labels, {index: index + 1 for index in range(len(labels.classes))})
        file = Path(path).expanduser()
        try:
            whole = forms.read_json(file, forms.object_with(categories=_CATEGORIES, **{kind: _FORMS[kind]}))
        except (OSError, forms.SchemaError) as error:
            raise UserError(
                f"{option}={path} is not a JSON file with {kind} and categories: {error}. Give that of the references."
            ) from None
        stems = [_find_name(image) for image in whole[kind]]
        image_ids = [image["id"] for image in whole[kind]]
        category_ids = [category["id"] for category in whole["categories"]]
        category_names = [category["name"] for category in whole["categories"]]
        groups = [
            (kind, stems),
            (kind, image_ids),
            ("categories", category_ids),
            ("categories", category_names),
        ]
        for what, values in groups:
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise UserError(
                    f"{option}={path} has several {what} {format_value(twice[0])}, which would get one id. Make each "
                    "unique."
                )
        names = dict(zip(stems, image_ids, strict=True))
        counts = Counter(Path(name).name for name in names)
        short = {Path(name).name: number for name, number in names.items() if counts[Path(name).name] == 1}
        numbers = {category["name"]: category["id"] for category in whole["categories"]}
        categories = {index: numbers[name] for index, name in enumerate(labels.classes) if name in numbers}
        return cls(labels, categories, {**short, **names}, file, option)

    def find_image(self, name: str) -> int | None:
        """Return the id of an image by its name without suffix, or of a video; None: its number.

        Raises:
            UserError: the reference does not have it.
        """
        if self.images is None:
            return None
        number = self.images.get(name, self.images.get(Path(name).name))
        if number is None:
            raise UserError(
                f"{self.option}={self.path} has no image or video {format_text(name)}. Give the file that has it."
            )
        return number

    def find_category(self, class_id: int) -> int:
        """Return the id of a class.

        Raises:
            UserError: the reference has no category of its name.
        """
        if class_id not in self.categories:
            name = format_text(self.labels.classes[class_id])
            raise UserError(
                f"{self.option}={self.path} has no category {name}, a class of the model. Give the file that has it."
            )
        return self.categories[class_id]


def _find_name(entry: Mapping[str, Any]) -> str:
    """Return the name of an image without suffix, or the folder of a video's frames."""
    if "file_name" in entry:
        return splitext(entry["file_name"])[0].replace("\\", "/")
    return dirname("".join(entry["file_names"][:1]).replace("\\", "/"))
