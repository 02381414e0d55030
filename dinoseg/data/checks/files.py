"""Checks of single files: unreadable, size mismatch, values without class, lossy masks."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from statistics import median

from dinoseg.data.checks.findings import Finding, ScannedSplit
from dinoseg.data.classes.mask_advice import (
    HIGHEST_ID,
    for_binary,
    for_colors,
    for_coloured,
    for_ids,
    for_instances,
)
from dinoseg.data.scan.measure import Record
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import varies_in_alpha
from dinoseg.utils.levels import WHITE
from dinoseg.utils.wording import join_names

_FEWER_BITS = (8, 10, 12, 14)  # depths of sensors whose values are stored in 16 bits
SKIP = "data.on_error=skip leaves the pairs out of training and of scores."
_MANY = 5  # objects in an image; fewer ids are as likely classes, of which images show the first few
_SMALL = 0.05  # share of an image's pixels that the median object has at most
_PROBLEMS = {  # code to the kind of file, its fault and the remedy
    "unreadable_image": ("image", "cannot be read", "Replace or remove the files."),
    "unreadable_mask": ("mask", "cannot be read", "Replace or remove the files."),
    "mask_is_jpeg": (
        "mask",
        "are JPEG files, which changes the ids near borders",
        "Save the masks again as PNG from their source: converting the files does not restore the ids. Masks of 0 and "
        "255 can be thresholded at 128.",
    ),
    "size_mismatch": (
        "mask",
        "have another size (width x height) than their image",
        "Create them again from their source at the image's size; data.reader.masks.on_size_mismatch=resize_mask "
        "resizes masks of the image's aspect ratio.",
    ),
}


def check_files(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield findings about files that stop a run, over all splits together."""
    records = [record for part in splits for record in part.records]
    if not any(len(record.pixels) > 1 for record in records):
        yield from _check_alpha(records)
    yield from _check_problems(records)
    yield from _check_ids(splits)


def check_range(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of channels of 16 bits whose highest level is that of fewer bits: they would be nearly black."""
    deep = [record for part in splits for record in part.records if any(record.peaks)]
    peaks = [max(levels) for levels in zip_longest(*(record.peaks for record in deep), fillvalue=0)]
    whites = {channel: _find_white(peak) for channel, peak in enumerate(peaks) if peak}
    dark = [f"{peaks[channel]} (channel {channel})" for channel, white in whites.items() if white < WHITE]
    if not dark:
        return
    white = max(white for white in whites.values() if white < WHITE)
    yield Finding(
        "warning",
        "dark_images",
        f"The highest levels of the images of 16 bits that were read ({len(deep)}) are {join_names(dark, 10)}. "
        "They are scaled from 0..65535, and so these channels are nearly black.",
        tuple(record.image for record in deep),
        f"If the range of all channels is 0 to {white}, declare it: data/pixels=files "
        f"data.pixels.value_range=[0,{white}], for grey images with data.channels=1. If channels differ in range, "
        "scale each to 0..65535. If they are dark photos, nothing is wrong.",
    )


def _find_white(peak: int) -> int:
    """Return the highest level of the least depth that holds a level."""
    return next((2**bits - 1 for bits in _FEWER_BITS if peak < 2**bits), WHITE)


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


def _check_problems(records: Sequence[Record]) -> Iterator[Finding]:
    """Yield a finding for each kind of problem that concerns a single file or pair."""
    for code, (kind, fault, remedy) in _PROBLEMS.items():
        bad = [record for record in records if code in record.problems]
        if bad:
            yield Finding(
                "error",
                code,
                f"{len(bad)} of {len(records)} {kind}s {fault}.",
                tuple(getattr(record, kind) for record in bad),
                f"{remedy} {SKIP}",
                reasons=tuple(
                    format_sizes(record) if code == "size_mismatch" else record.problems[code] for record in bad
                ),
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
        f"{_advise_on_ids(part, list(foreign), [record for record, _ in bad])} {SKIP}",
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
    is_mapped = part.masks.ids or part.masks.others or part.masks.reduce_zero_label
    next_id = None if is_mapped else len(part.classes)
    advice = for_ids(numbers, part.ignore_index, described=described, next_id=next_id)
    if _look_like_instances(records, part):
        return f"{advice} {for_instances(part.classes[-1], described=described)}"
    return advice


def _look_like_instances(records: Sequence[Record], part: ScannedSplit) -> bool:
    """Return whether the ids number objects: many in a mask, small ones, and others in each mask.

    Each mask counts its objects from 1, or no number is in most masks. With more than two classes, the first
    objects would have the ids of classes.
    """
    if len(part.classes) != 2:
        return False
    ids = [
        {
            int(value): pixels
            for value, pixels in record.raw.items()
            if value.isdecimal() and value not in ("0", str(part.ignore_index))
        }
        for record in records
    ]
    counted = all(each.keys() == {*range(1, len(each) + 1)} for each in ids) and len({*map(len, ids)}) > 1
    most_frequent = max(Counter(number for each in ids for number in each).values(), default=0)
    shares = [
        pixels / sum(record.raw.values()) for each, record in zip(ids, records, strict=True) for pixels in each.values()
    ]
    return (counted or 2 * most_frequent <= len(records)) and max(map(len, ids)) >= _MANY and median(shares) <= _SMALL


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


def format_sizes(record: Record) -> str:
    """Return the sizes of a mask and its image, in words."""
    return f"{record.mask}: {_format_size(record.mask_size)}, its image {_format_size(record.image_size)}"


def _format_size(size: Sequence[int] | None) -> str:
    return f"{size[1]} x {size[0]}" if size else "unknown"
