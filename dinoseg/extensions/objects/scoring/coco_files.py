"""COCO's JSON files of references and results, as the protocols of objects read them; no torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os.path import splitext
from pathlib import Path
from typing import Any

from dinoseg.utils import forms
from dinoseg.utils.errors import UserError

IMAGES = forms.list_of(forms.object_with(id=forms.integer))


def read_coco_json(path: Path, option: str, form: forms.Form, what: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        option: `reference` or `prediction`, for messages.
        form: of the content.
        what: the content, for messages.

    Raises:
        UserError: it is no such file.
    """
    if not path.is_file():
        raise UserError(f"{option}={path} is not a file. Give the JSON file of {what}.")
    try:
        return forms.read_json(path, form)
    except (OSError, forms.SchemaError) as error:
        raise UserError(
            f"{option}={path} is not the JSON file of {what}: {error}. Correct it, or give another."
        ) from None


def check_unique(ids: Iterable[int], path: Path, what: str) -> None:
    """Refuse an id that occurs twice: one of the two would be lost.

    Raises:
        UserError: naming the id.
    """
    number, count = next(iter(Counter(ids).most_common(1)), (0, 0))
    if count > 1:
        raise UserError(f"{path}: {count} {what} have the id {number}. Make each id unique.")


def name_images(images: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return the name of each image in the order of the ids: its file without suffix, or the id if names repeat."""
    names = {image["id"]: splitext(str(image.get("file_name", image["id"])))[0] for image in images}
    repeats = len({*names.values()}) < len(names)
    return {number: str(number) if repeats else names[number] for number in sorted(names)}
