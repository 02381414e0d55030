"""All doctor checks on all splits, and a summary of each split."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.data.checks.errors import find_errors
from dinoseg.data.checks.files import check_range
from dinoseg.data.checks.findings import Finding, ScannedSplit, by_severity
from dinoseg.extensions.doctor.classes import check_coverage
from dinoseg.extensions.doctor.duplicates import check_duplicates
from dinoseg.extensions.doctor.layers import check_layers
from dinoseg.extensions.doctor.pairing import check_orientation, check_pairing, check_resized
from dinoseg.extensions.doctor.suggestions import constant_class, suggest
from dinoseg.extensions.video.length import count_frames, promised_frames
from dinoseg.extensions.video.sarrarp_files import (
    MASK_FOLDER,
    MASK_STEP,
    VIDEO,
    frame_files,
    png_files,
    prepared_frames,
)
from dinoseg.utils.wording import count_of, join_names


def examine(
    splits: Sequence[ScannedSplit],
    *,
    group: str | None = None,
    near_distance: int = 6,
    has_objects: bool = False,
) -> list[Finding]:
    """Return the errors and all advice, errors first.

    Args:
        splits: one or more splits with the same class table.
        group: regular expression on the name that gives an image's group; None: the name's first folder.
        near_distance: maximum number of differing bits, of 64, for two images to be nearly equal.
        has_objects: see `find_errors`.
    """
    findings = find_errors(splits, group=group, has_objects=has_objects)
    findings += [*check_range(splits), *check_resized(splits), *check_orientation(splits), *check_coverage(splits)]
    findings += [*check_videos(splits), *check_duplicates(splits, near_distance)]
    for part in splits:
        findings += [*check_layers(part), *check_pairing(part)]
    return by_severity([*findings, *suggest(splits)])


def summary(part: ScannedSplit, objects: Mapping[int, int] | None = None) -> dict[str, Any]:
    """Return the contents of a split in numbers: images, sizes, void share, constant-class scores and class counts.

    Args:
        part: the split.
        objects: number of objects by class id, of classes that have objects.
    """
    sizes = sorted(
        {record.image_size for record in part.records if record.image_size}, key=lambda size: (math.prod(size), size)
    )
    labelled = part.num_labelled
    return {
        "images": len(part.records),
        "smallest": _size(sizes[0]) if sizes else None,
        "largest": _size(sizes[-1]) if sizes else None,
        "void_share": part.void / (labelled + part.void) if labelled + part.void else None,
        "constant_class": constant_class(part),
        "classes": [_class_row(part, index, labelled, objects or {}) for index in range(len(part.classes))],
    }


def _size(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[1], "height": size[0]}


def _class_row(part: ScannedSplit, index: int, labelled: int, objects: Mapping[int, int]) -> Mapping[str, Any]:
    pixels = int(part.counts[index])
    return {
        "id": index,
        "class": part.classes[index],
        "pixels": pixels,
        "share": pixels / labelled * (len(part.classes) if part.has_layers else 1) if labelled else 0.0,
        "images": sum(index in record.pixels for record in part.records),
        "objects": objects.get(index),
    }


def check_videos(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield findings about videos whose masks are not one per 60th frame: floor((N - 1) / 60) + 1 of N frames."""
    mask_folders = {Path(record.mask).parent for part in splits for record in part.records}
    for folder in sorted(mask_folder.parent for mask_folder in mask_folders if mask_folder.name == MASK_FOLDER):
        if (folder / VIDEO).is_file():
            yield from _check_masks_of_frames(folder)


def _check_masks_of_frames(folder: Path) -> Iterator[Finding]:
    masks = png_files(folder / MASK_FOLDER)
    frames = prepared_frames(folder) or promised_frames(folder / VIDEO)
    if masks.keys() != _due(frames):
        frames = count_frames(folder / VIDEO)  # a header may be off by a frame or two, so count them
    due = _due(frames)
    if masks.keys() != due:
        missing, extra = sorted(due - masks.keys()), sorted(masks.keys() - due)
        yield Finding(
            "error",
            "masks_against_video",
            f"{folder / VIDEO} has {count_of(frames, 'frame')}, so {MASK_FOLDER}/ should have {count_of(due, 'mask')}, "
            f"but has {len(masks)} (missing: {join_names(missing) or 'none'}; without a frame: "
            f"{join_names(extra) or 'none'}).",
            tuple(str(folder / MASK_FOLDER / f"{stem}.png") for stem in (*missing, *extra)),
            "Unpack the video's archive again: mode=prepare data=sarrarp.",
            stops=False,
        )
    shown = frame_files(folder)
    if shown and (lacking := sorted(masks.keys() - shown.keys())):
        yield Finding(
            "error",
            "masks_without_frame",
            f"{folder} has {count_of(lacking, 'mask')} without extracted frame: {join_names(lacking)}.",
            tuple(str(masks[stem]) for stem in lacking),
            "Extract the frames: mode=prepare data=sarrarp.",
            stops=False,
        )


def _due(frames: int) -> set[str]:
    return {f"{index:09d}" for index in range(0, frames, MASK_STEP)}
