"""User-supplied inputs of prediction: image files, videos, folders and glob patterns."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dinoseg.core.channels import PixelFormat, check_rgb
from dinoseg.inference.results import result_names
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_exists, entries, expand_path, find_files, is_pattern
from dinoseg.utils.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from dinoseg.utils.wording import count_of, join_names

log = logging.getLogger(__name__)
NamedPath = tuple[Path, str]  # an input, and the unique name of its results


def find_inputs(
    source: str, pixels: PixelFormat, videos: Sequence[str] = ()
) -> tuple[list[NamedPath], list[NamedPath]]:
    """Return the images and the videos that `list_inputs` finds, with the names of their results.

    Raises:
        UserError: as `list_inputs`, or there is a video and images have other channels.
    """
    paths = list_inputs(source, suffixes=pixels.suffixes, videos=videos)
    images, found = [], []
    for path, name in zip(paths, result_names(paths), strict=True):
        if path.suffix.lower() in videos:
            check_rgb(pixels, f"the video {path}")
            found.append((path, name))
        else:
            images.append((path, name))
    return images, found


def list_inputs(
    source: str, key: str = "input", suffixes: Sequence[str] = IMAGE_SUFFIXES, videos: Sequence[str] = ()
) -> list[Path]:
    """Return the images and videos that a file, folder or glob pattern names, in natural order (x2 before x10).

    In folders and among pattern matches, hidden files and files of other types are skipped. Subfolders are not
    searched.

    Args:
        source: the file, folder or pattern.
        key: the config key that messages name.
        suffixes: of images.
        videos: suffixes of videos; none: videos are not accepted.

    Raises:
        UserError: nothing is there, it cannot be read, or it contains nothing that is accepted.
    """
    kinds = (*suffixes, *videos)
    wanted = "image or video" if videos else "image"
    video = f" a video ({' '.join(videos)})," if videos else ""
    accepted = (
        f"Accepted are an image ({' '.join(suffixes)}),{video} a folder of them, or a quoted pattern such as "
        "'frames/**/*.png'."
    )
    path = expand_path(source, ".jpg")
    if path.is_file() and path.suffix.lower() in kinds:
        return [path]
    if path.is_dir():
        nothing = f"{key}={source}: the folder holds no {wanted} directly."
    elif is_pattern(source):
        nothing = f"{key}={source}: the pattern matches no {wanted}."
    else:
        check_exists(source, key, accepted, suffix=".jpg")
        nothing = f"{key}={source} is of an unknown kind ({path.suffix or 'no suffix'})."
    media, unread = find_files(source, kinds), find_files(source, UNREAD_SUFFIXES)
    left_out = f"{count_of(unread, 'file')} of unsupported formats: {join_names([path.name for path in unread])}."
    if not media:
        raise UserError(f"{nothing} {accepted}{f' There are {left_out} Convert them to PNG.' if unread else ''}")
    if unread:
        log.warning("%s=%s: left out %s Convert them to PNG.", key, source, left_out)
    if path.is_dir() and (below := [folder.name for folder in entries(path) if _has_media(folder, kinds)]):
        what = f"{wanted.replace(' or ', 's or ')}s in {count_of(below, 'subfolder')} ({join_names(below)})"
        log.warning("%s=%s: left out %s. Give %s='%s/**/*' to include them.", key, source, what, key, path)
    return media


def _has_media(path: Path, kinds: Sequence[str]) -> bool:
    """Return whether a path is a folder with an image or a video in it or below it."""
    return path.is_dir() and any(each.suffix.lower() in kinds for each in path.rglob("*"))
