"""Check of SAR-RARP50 masks against the frame count of their videos."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dinoseg.data.doctor.findings import Finding, Scanned
from dinoseg.data.formats.sarrarp_files import (
    MASK_FOLDER,
    MASK_STEP,
    VIDEO,
    frame_files,
    png_files,
    prepared_frames,
)
from dinoseg.data.video.length import count_frames, promised_frames
from dinoseg.utils.wording import count_of, listed


def check_videos(splits: Sequence[Scanned]) -> Iterator[Finding]:
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
            f"but has {len(masks)} (missing: {listed(missing) or 'none'}; without a frame: {listed(extra) or 'none'}).",
            tuple(str(folder / MASK_FOLDER / f"{stem}.png") for stem in (*missing, *extra)),
            "Unpack the video's archive again: mode=prepare data=sarrarp.",
            stops=False,
        )
    shown = frame_files(folder)
    if shown and (lacking := sorted(masks.keys() - shown.keys())):
        yield Finding(
            "error",
            "masks_without_frame",
            f"{folder} has {count_of(lacking, 'mask')} without extracted frame: {listed(lacking)}.",
            tuple(str(masks[stem]) for stem in lacking),
            "Extract the frames: mode=prepare data=sarrarp.",
            stops=False,
        )


def _due(frames: int) -> set[str]:
    return {f"{index:09d}" for index in range(0, frames, MASK_STEP)}
