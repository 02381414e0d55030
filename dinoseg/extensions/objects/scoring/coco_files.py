"""COCO's JSON files of references and results, as the protocols of objects read them; no torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os.path import splitext
from pathlib import Path
from typing import Any

from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

Named = tuple[str, Mapping[str, Any]]  # how messages name an object, and its entry
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


def group_entries(
    entries: Iterable[tuple[Path, Mapping[str, Any]]], kind: str, owner: str, known: Iterable[int], reference: Path
) -> tuple[dict[int, list[Named]], list[tuple[Path, str]]]:
    """Return the entries of each image or video, and a problem for each entry of an unknown one.

    Args:
        entries: the file and the content of each.
        kind: of the entries, for messages.
        owner: `image` or `video`.
        known: ids of the images or videos.
        reference: the file that lists them.
    """
    # by the images, not by the results: without any result, the objects of an image are misses
    grouped: dict[int, list[Named]] = {number: [] for number in known}
    problems = []
    for position, (path, entry) in enumerate(entries):
        number = entry[f"{owner}_id"]
        name = f"{owner} {number}, {kind} {format_value(entry.get('id', position))}"
        if number in grouped:
            grouped[number].append((name, entry))
        else:
            problems.append((path, f"{name}: the {owner} is not in {reference}"))
    return grouped, problems


def name_images(images: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return the name of each image in the order of the ids: its file without suffix, or the id if names repeat."""
    names = {image["id"]: splitext(str(image.get("file_name", image["id"])))[0] for image in images}
    repeats = len({*names.values()}) < len(names)
    return {number: str(number) if repeats else names[number] for number in sorted(names)}
