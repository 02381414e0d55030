"""Faults of single files: unreadable, of another size, values without class, masks saved with loss."""

from collections import Counter
from collections.abc import Iterator, Sequence

from dinoseg.data.doctor.findings import Finding, Scanned
from dinoseg.data.scan_record import Record
from dinoseg.data.wording import listed

_LOSSY = ("JPEG", "MPO")


def check_files(splits: Sequence[Scanned]) -> Iterator[Finding]:
    """Yield what is wrong with single files, over all splits together."""
    records = [record for part in splits for record in part.records]
    yield from _unreadable(records)
    yield from _foreign_ids(splits)
    yield from _sizes(records)
    yield from _saved_with_loss(records)


def _unreadable(records: Sequence[Record]) -> Iterator[Finding]:
    for code, kind in (("unreadable_image", "image"), ("unreadable_mask", "mask")):
        bad = [record for record in records if code in record.problems]
        if bad:
            yield Finding(
                "error",
                code,
                f"{len(bad)} of {len(records)} {kind}s cannot be read. The first: {bad[0].problems[code]}",
                tuple(getattr(record, kind) for record in bad),
                "Replace or remove the files, or leave the pairs out of a run: data.on_error=skip.",
            )


def _foreign_ids(splits: Sequence[Scanned]) -> Iterator[Finding]:
    bad = [(record, part) for part in splits for record in part.records if "foreign_ids" in record.problems]
    if not bad:
        return
    foreign = Counter(value for record, part in bad for value in record.raw if not _is_known(value, part))
    values = [f"{value} (in {count})" for value, count in foreign.most_common()]
    total = sum(len(part.records) for part in splits)
    yield Finding(
        "error",
        "foreign_ids",
        f"{len(bad)} of {total} masks hold values that are no class: {listed(values, 10)}. "
        f"The first: {next(iter(bad))[0].problems['foreign_ids']}",
        tuple(record.mask for record, _ in bad),
        "Correct the masks, or the class table: data.classes, data.reader.masks.ids.",
    )


def _is_known(value: str, part: Scanned) -> bool:
    masks = part.masks
    if masks.format == "palette":
        further = [color for colors in (masks.colors or {}).values() for color in colors]
        return value in {str(tuple(color)) for color in (*part.palette, *masks.ignore_colors, *further)}
    if masks.format == "binary" or not value.isdecimal():
        return value in ("0", "255")
    number, last = int(value), len(part.classes) - 1 + int(masks.reduce_zero_label)
    mapped = (masks.ids or {}).get(number)
    return mapped != -1 if mapped is not None else number <= last or number == part.ignore_index


def _sizes(records: Sequence[Record]) -> Iterator[Finding]:
    other = [
        record
        for record in records
        if record.image_size and record.mask_size and tuple(record.image_size) != tuple(record.mask_size)
    ]
    if not other:
        return
    stops = [record for record in other if "size_mismatch" in record.problems]
    first = (stops or other)[0]
    assert first.image_size and first.mask_size
    example = f"{_size(first.mask_size)} beside {_size(first.image_size)}"
    resized = (
        "" if stops else " They are resized by nearest neighbour (data.reader.masks.on_size_mismatch=resize_mask)."
    )
    refused = f" {len(stops)} of them stop a run." if stops else ""
    yield Finding(
        "error" if stops else "warning",
        "size_mismatch",
        f"{len(other)} of {len(records)} masks differ in size from their image: the first is {example} (width x "
        f"height).{refused}{resized}",
        tuple(record.mask for record in other),
        "Make them again from their source at the image's size; a mask of the same proportions can be resized as it "
        "is read: data.reader.masks.on_size_mismatch=resize_mask.",
    )


def _size(size: Sequence[int]) -> str:
    return f"{size[1]} x {size[0]}"


def _saved_with_loss(records: Sequence[Record]) -> Iterator[Finding]:
    lossy = [record for record in records if record.mask_format in _LOSSY]
    if lossy:
        suffix = "" if lossy[0].mask.lower().endswith((".jpg", ".jpeg")) else ", whatever their names end with"
        yield Finding(
            "error",
            "mask_is_jpeg",
            f"{len(lossy)} of {len(records)} masks are JPEG files{suffix}. JPEG changes the numbers near borders.",
            tuple(record.mask for record in lossy),
            "Save the masks again as PNG from their source; converting the JPEG files does not bring the ids back.",
        )
