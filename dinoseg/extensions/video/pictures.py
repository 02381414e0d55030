"""Frames of a video as image files in a folder."""

from pathlib import Path

from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries, natural_order
from dinoseg.utils.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from dinoseg.utils.wording import count_of, join_names


def picture_files(folder: Path) -> dict[str, str]:
    """Return stem to name of the image files in a folder, in natural order of the stems, without hidden ones.

    Raises:
        UserError: the folder does not exist, two of its files have one stem, or one is of an unsupported kind.
    """
    names: dict[str, str] = {}
    if not folder.is_dir():
        raise UserError(f"No folder {folder}. Check data.root, and that the dataset was unpacked completely.")
    paths = sorted(entries(folder), key=lambda path: (natural_order(path.stem), path.suffix))
    if unread := [path.name for path in paths if path.suffix.lower() in UNREAD_SUFFIXES]:
        raise UserError(
            f"{folder} holds {count_of(unread, 'file')} of unsupported formats: {join_names(unread)}. Convert them to "
            "PNG, or move them away."
        )
    for path in paths:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in names:
            raise UserError(f"{folder / names[path.stem]} and {path} are one frame: keep one of them.")
        names[path.stem] = path.name
    return names
