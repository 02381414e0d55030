"""Checks of single files: unreadable, size mismatch, EXIF rotation, values without class, lossy masks."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.mask_advice import (
    HIGHEST_ID,
    MAX_IDS,
    for_binary,
    for_colors,
    for_coloured,
    for_ids,
    for_instances,
)
from dinoseg.data.classes.masks import MaskReader
from dinoseg.data.doctor.findings import Finding, ScannedSplit
from dinoseg.data.scan.measure import Record
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import IMAGE_SUFFIXES, is_turned, read_image, varies_in_alpha
from dinoseg.utils.levels import WHITE
from dinoseg.utils.wording import join_names

_FEWER_BITS = (8, 10, 12, 14)  # depths of sensors whose values are stored in 16 bits
_MASK_COLORS = 32  # a mask has more colours only if objects have ids
_SKIP = "Or leave the pairs out: data.on_error=skip."


def check_files(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield findings about files that stop a run, over all splits together."""
    records = [record for part in splits for record in part.records]
    if not any(len(record.pixels) > 1 for record in records):
        yield from _check_alpha(records)
    if not any(record.problems for record in records):
        return
    yield from _check_swapped_folders(splits)  # first: it explains foreign ids, as the next but one does
    yield from _check_unreadable(records)
    yield from _check_lossy_masks(records, splits)
    yield from _check_ids(splits)
    yield from _check_sizes(records, splits)


def check_range(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of channels of 16 bits whose highest level is that of fewer bits: they would be nearly black."""
    deep = [record for part in splits for record in part.records if any(record.peaks)]
    peaks = [max(levels) for levels in zip_longest(*(record.peaks for record in deep), fillvalue=0)]
    whites = {channel: _find_white(peak) for channel, peak in enumerate(peaks) if peak}
    dark = [f"{peaks[channel]} (channel {channel})" for channel, white in whites.items() if white < WHITE]
    if not dark:
        return
    white = max(whites.values())
    remedies = []
    if white < WHITE:
        remedies.append(
            f"If their range is 0 to {white}, declare it: data/pixels=files data.pixels.value_range=[0,{white}], for "
            "grey images with data.channels=1."
        )
    if len(set(whites.values())) > 1:
        remedies.append(
            "If the channels differ in range, no value_range fits all: save those of 0 to 255 as images of 8 bits, in "
            "files (data.pixels.files) or TIFF pages of their own, or scale the values of each channel to 0..65535."
        )
    yield Finding(
        "warning",
        "dark_images",
        f"The highest levels of the images of 16 bits that were read ({len(deep)}) are {join_names(dark, 10)}. "
        "They are scaled from 0..65535, and so these channels are nearly black.",
        tuple(record.image for record in deep),
        f"{' '.join(remedies)} If they are dark photos, nothing is wrong.",
    )


def _find_white(peak: int) -> int:
    """Return the highest level of the least depth that holds a level."""
    return next((2**bits - 1 for bits in _FEWER_BITS if peak < 2**bits), WHITE)


def check_resized(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of the masks that are resized to their images when they are read."""
    records = [record for part in splits for record in part.records]
    resized = [record for record in records if _has_other_size(record) and "size_mismatch" not in record.problems]
    if resized:
        yield Finding(
            "warning",
            "resized_masks",
            f"{len(resized)} of {len(records)} masks of another size (width x height) than their image. They are "
            "resized by nearest neighbour when they are read.",
            tuple(record.mask for record in resized),
            "Create them again from their source at the image's size; until then borders are as coarse as in the "
            "smaller masks.",
            reasons=tuple(map(_format_sizes, resized)),
        )


def check_orientation(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of the images that are rotated on reading while their masks are not."""
    turned = [(part, record) for part in splits for record in part.records if _is_turned(record.image)]
    if turned:
        total = sum(len(part.records) for part in splits)
        yield Finding(
            "warning",
            "turned_by_exif",
            f"{len(turned)} of {total} images with an EXIF orientation: they are rotated or mirrored when they are "
            "read, but their masks are not.",
            tuple(record.image for _, record in turned),
            "Compare images and masks. If a mask matches the stored pixels, remove the orientation from the image file "
            "(exiftool -Orientation= FILE); if it matches the image as viewers show it, nothing is wrong.",
            tuple((part.split, record.name) for part, record in turned[:4]),
        )


def _is_turned(image: str) -> bool:
    if Path(image).suffix.lower() not in IMAGE_SUFFIXES:  # a video frame has no file of its own
        return False
    try:
        return is_turned(image)
    except Exception:  # a decoder may raise anything on a damaged file, which other checks report
        return False


def _check_alpha(records: Sequence[Record]) -> Iterator[Finding]:
    """Yield a finding of masks of one id each whose values differ in the alpha channel."""
    hidden = [record.mask for record in records if record.pixels and _varies_in_alpha(record.mask)]
    if hidden:
        yield Finding(
            "warning",
            "ids_in_alpha",
            f"{len(hidden)} of {len(records)} masks hold one colour and several values of alpha, which is not read.",
            tuple(hidden),
            "If the class ids are there, save the alpha channel as a grey PNG.",
        )


def _varies_in_alpha(mask: str) -> bool:
    try:
        return varies_in_alpha(mask)
    except UserError:  # masks of an annotation file are no images
        return False


def _check_swapped_folders(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of splits whose images and masks are swapped, judged by the first pair.

    They are swapped if the image is a valid mask, while the mask is not and has more colours than the image.
    """
    for part in splits:
        first = part.records[0] if part.records else None
        if first is None or "foreign_ids" not in first.problems or not _is_mask(part, Path(first.image)):
            continue
        if _count_colors(first.mask) > max(_count_colors(first.image), _MASK_COLORS):
            yield Finding(
                "error",
                "swapped_folders",
                f"Split {part.split}: {first.image} can be read as a mask, and {first.mask} cannot: images and masks "
                "are swapped.",
                remedy="Swap the folders, such as those of data.reader.layout.images and .masks.",
            )


def _is_mask(part: ScannedSplit, path: Path) -> bool:
    reader = MaskReader(Labels(tuple(part.classes), tuple(part.palette), part.ignore_index), part.masks)
    try:
        reader.read(path)
    except Exception:  # a decoder may raise anything on a damaged file
        return False
    return True


def _count_colors(path: str) -> int:
    """Return the number of colours of an image that was read before."""
    pixels = read_image(path).astype(np.int32)  # (H, W, 3)
    return len(np.unique(pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]))


def _check_unreadable(records: Sequence[Record]) -> Iterator[Finding]:
    for code, kind in (("unreadable_image", "image"), ("unreadable_mask", "mask")):
        bad = [record for record in records if code in record.problems]
        if bad:
            yield Finding(
                "error",
                code,
                f"{len(bad)} of {len(records)} {kind}s cannot be read.",
                tuple(getattr(record, kind) for record in bad),
                f"Replace or remove the files. {_SKIP}",
                reasons=tuple(record.problems[code] for record in bad),
            )


def _check_ids(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    bad = [(record, part) for part in splits for record in part.records if "foreign_ids" in record.problems]
    if not bad:
        return
    foreign_values = [[value for value in record.raw if not _is_known(value, part)] for record, part in bad]
    foreign = Counter(value for values in foreign_values for value in values)
    total = sum(len(part.records) for part in splits)
    part = bad[0][1]
    yield Finding(
        "error",
        "foreign_ids",
        f"{len(bad)} of {total} masks with values that are not classes: "
        f"{join_names([f'{value} (in {count})' for value, count in foreign.most_common()], 10)}. {_describe_ids(part)}",
        tuple(record.mask for record, _ in bad),
        f"{_advise_on_ids(part, list(foreign), [record for record, _ in bad])} {_SKIP}",
        reasons=tuple(
            f"{record.mask}: {join_names(values, 10) or record.problems['foreign_ids']}"
            for (record, _), values in zip(bad, foreign_values, strict=True)
        ),
    )


def _describe_ids(part: ScannedSplit) -> str:
    if part.masks.format == "palette":
        return f"{len(part.classes)} classes have colours."
    if part.masks.format == "binary":
        return "Masks are 0 and 255 (data.reader.masks.format=binary)."
    return f"The classes are 0 to {len(part.classes) - 1}, and {part.ignore_index} is ignored."


def _advise_on_ids(part: ScannedSplit, foreign: Sequence[str], records: Sequence[Record]) -> str:
    described = part.masks.described is not None
    if part.masks.format == "palette":
        return for_colors([_parse_color(value) for value in foreign if value.startswith("(")], described=described)
    numbers = [int(value) for value in foreign if value.lstrip("-").isdecimal()]
    if not numbers:
        counts: Counter[tuple[int, ...]] = Counter()
        for record in records:
            counts.update(
                {tuple(_parse_color(value)): pixels for value, pixels in record.raw.items() if value[:1] == "("}
            )
        return for_coloured(counts, part.classes, described=described)
    if part.masks.format == "binary":
        every = {int(value) for record in records for value in record.raw if value.isdecimal()}
        return for_binary(every, described=described)
    if _count_objects(records, part):
        return for_instances(part.classes[-1], described=described)
    advice = for_ids(numbers, part.ignore_index, described=described)
    if len(numbers) <= MAX_IDS:
        return advice
    return f"{advice} {for_instances(part.classes[-1], described=described, likely=False)}"


def _count_objects(records: Sequence[Record], part: ScannedSplit) -> bool:
    """Return whether the ids in each mask are 1, 2, ... up to a number of its own, as instance IDs are."""
    ids = [{int(value) for value in record.raw if value.isdecimal()} - {0, part.ignore_index} for record in records]
    counted = all(numbers == set(range(1, len(numbers) + 1)) for numbers in ids)
    return counted and (len(part.classes) == 2 or len({len(numbers) for numbers in ids}) > 1)


def _parse_color(value: str) -> list[int]:
    return [int(number) for number in value.strip("()").split(",")]


def _is_known(value: str, part: ScannedSplit) -> bool:
    masks = part.masks
    if masks.format == "palette":
        further = [color for colors in (masks.colors or {}).values() for color in colors]
        return value in {str(tuple(color)) for color in (*part.palette, *masks.ignore_colors, *further)}
    if masks.format == "binary" or not value.isdecimal():
        return value in ("0", "255")
    number, last = int(value), len(part.classes) - 1 + int(masks.reduce_zero_label)
    mapped = (masks.ids or {}).get(number)
    if mapped is not None:
        return mapped != -1
    return number <= (last if masks.others is None else HIGHEST_ID) or number == part.ignore_index


def _check_sizes(records: Sequence[Record], splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    other = [record for record in records if "size_mismatch" in record.problems]
    if not other:
        return
    message = f"{len(other)} of {len(records)} masks of another size (width x height) than their image."
    remedy = "Create them again from their source at the image's size"
    if all(part.masks.on_size_mismatch == "resize_mask" for part in splits):
        message += " They cannot be resized, since their aspect ratio differs."
    else:
        remedy += (
            "; masks with the image's aspect ratio can be resized when they are read: "
            "data.reader.masks.on_size_mismatch=resize_mask"
        )
    yield Finding(
        "error",
        "size_mismatch",
        message,
        tuple(record.mask for record in other),
        f"{remedy}. {_SKIP}",
        reasons=tuple(map(_format_sizes, other)),
    )


def _has_other_size(record: Record) -> bool:
    """Return whether image and mask have known and different sizes."""
    if record.image_size is None or record.mask_size is None:
        return False
    return tuple(record.image_size) != tuple(record.mask_size)


def _format_sizes(record: Record) -> str:
    return f"{record.mask}: {_format_size(record.mask_size)}, its image {_format_size(record.image_size)}"


def _format_size(size: Sequence[int] | None) -> str:
    return f"{size[1]} x {size[0]}" if size else "unknown"


def _check_lossy_masks(records: Sequence[Record], splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    lossy = [record for record in records if "mask_is_jpeg" in record.problems]
    if not lossy:
        return
    suffix = "" if lossy[0].mask.lower().endswith((".jpg", ".jpeg")) else ", whatever their suffix"
    binary = all(part.masks.format == "binary" for part in splits)
    converted = "threshold them at 128" if binary else "converting the JPEG files does not restore the ids"
    yield Finding(
        "error",
        "mask_is_jpeg",
        f"{len(lossy)} of {len(records)} masks as JPEG files{suffix}. JPEG changes the ids near borders.",
        tuple(record.mask for record in lossy),
        f"Save the masks again as PNG from their source; {converted}. {_SKIP}",
    )
