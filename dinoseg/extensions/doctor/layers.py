"""Checks of masks with a layer for each class: classes without files, and overlaps."""

from collections.abc import Iterator

from dinoseg.data.checks.findings import Finding, ScannedSplit
from dinoseg.utils.wording import count_of, join_names


def check_layers(part: ScannedSplit) -> Iterator[Finding]:
    """Yield findings about masks with layers; none for class ids."""
    if part.has_layers:
        yield from _missing_files(part)
        yield from _overlaps(part)


def _missing_files(part: ScannedSplit) -> Iterator[Finding]:
    """Yield a finding of the images without a mask file of a class; shapes of annotation files need none."""
    of_files = [record for record in part.records if record.raw]
    missing = {
        name: [record.name for record in of_files if not any(key.startswith(f"{index}: ") for key in record.raw)]
        for index, name in enumerate(part.classes)
    }
    counts = [f"{name} ({len(images)} of {len(of_files)})" for name, images in missing.items() if images]
    if counts:
        yield Finding(
            "note",
            "missing_layers",
            f"Images of {part.split} without a mask file of a class, which they thus do not show: "
            f"{join_names(counts, 20)}.",
            tuple(f"{image}: {name}" for name, images in missing.items() for image in images),
            "If an image shows the class, add its mask.",
        )


def _overlaps(part: ScannedSplit) -> Iterator[Finding]:
    shown = [record for record in part.records if record.overlap]
    if len(part.classes) > 1 and part.num_labelled:
        yield Finding(
            "note",
            "overlaps",
            f"{sum(record.overlap for record in shown):,} pixels of {part.split} show several classes, in "
            f"{len(shown)} of {count_of(part.records, 'image')}.",
            tuple(record.mask for record in shown),
            "" if shown else "If classes never overlap, task=semantic with a class for all other pixels fits, too.",
            tuple((part.split, record.name) for record in shown[:2]),
        )
