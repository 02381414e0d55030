"""Tracks in the text format of MOTS: a file for each video, and a line for each mask; no torch.

A line is `frame id class height width counts`, with COCO's compressed run lengths. Masks of a frame do not overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoseg.core.objects import RunLengths
from dinoseg.extensions.annotations import rle
from dinoseg.extensions.annotations.entry import size_of
from dinoseg.extensions.protocols.contract import BadFile, Cases
from dinoseg.extensions.tracks.video import TrackCase, Tracks, VideoTracks, join_frames
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import read_regular
from dinoseg.utils.wording import format_text, join_names

_REGION = -1  # place of the class of ignored regions


@dataclass(frozen=True)
class MotsCase(TrackCase):
    """Text files of a video.

    Args:
        ignore_id: class of ignored regions in the reference; None: it has none.
    """

    ignore_id: int | None = None

    def read(self, places: Mapping[int, int]) -> VideoTracks:
        """Return the tracks of the video, see `TrackCase`."""
        ((reference, prediction),) = self.files
        assert prediction is not None
        regions = {} if self.ignore_id is None else {self.ignore_id: _REGION}
        held, size = _read_tracks(reference, {**places, **regions}, None)
        found, _ = _read_tracks(prediction, places, size)
        is_region = held.classes == _REGION
        return VideoTracks(held.select(~is_region), found, _join_regions(held.select(is_region), size))


def find_mots(
    reference: Path, prediction: Path, categories: Mapping[int, str] | None, ignore_id: int | None
) -> tuple[dict[int, str], Cases]:
    """Return the categories, by default the class ids of the reference, and a case for each text file of it.

    Raises:
        UserError: a folder has no text file, or one of the reference cannot be read.
    """
    sides = [{path.stem: path for path in sorted(folder.glob("*.txt"))} for folder in (reference, prediction)]
    for key, folder, files in zip(("reference", "prediction"), (reference, prediction), sides, strict=True):
        if not files:
            raise UserError(
                f"{key}={folder} has no file NAME.txt of MOTS. Give the folder that holds one for each video, such as "
                "RUN/mots of mode=track, or JSON files of YouTube-VIS on both sides."
            )
    held, found = sides
    if categories is None:
        ids = {row[2] for path in held.values() for row in _read_rows(path)[0]} - {ignore_id}
        categories = {number: str(number) for number in sorted(ids)}
    cases = [MotsCase(name, name, ((path, found[name]),), ignore_id) for name, path in held.items() if name in found]
    missing = [(prediction / f"{name}.txt", "is missing; an empty file has no track") for name in held.keys() - found]
    surplus = sorted(found.keys() - held.keys())
    notes = [f"{prediction} has videos that {reference} lacks: {join_names(surplus)}."] if surplus else []
    return {**categories}, Cases(cases, sorted(missing), notes)


def _read_rows(path: Path) -> tuple[list[tuple[int, ...]], list[str]]:
    """Return frame, id, class, height and width of each line, and its run lengths.

    Raises:
        BadFile: a line is of another form.
    """
    rows, texts = [], []
    try:
        lines = read_regular(path).decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"it is no text file of MOTS: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            *values, text = line.split()
            frame, track, label, height, width = map(int, values)
        except ValueError:
            raise BadFile(
                path, f"line {number} is {format_text(line, 60)}: give frame, id, class, height, width and run lengths"
            ) from None
        rows.append((frame, track, label, height, width))
        texts.append(text)
    return rows, texts


def _read_tracks(
    path: Path, places: Mapping[int, int], size: tuple[int, int] | None
) -> tuple[Tracks, tuple[int, int] | None]:
    """Return the tracks of a file and the size of its frames; None without a line.

    Args:
        path: the file.
        places: 0..K-1 of each class.
        size: (H, W) of the reference; None: any.

    Raises:
        BadFile: a line is invalid, masks of a frame overlap, or an id occurs twice in a frame.
    """
    rows, texts = _read_rows(path)
    if not rows:
        return Tracks.of_rows([], []), size
    try:
        size = size or size_of(*rows[0][3:])
        for line, (_, _, label, *own) in enumerate(rows, 1):
            if tuple(own) != size:
                raise ValueError(
                    f"line {line} is of {own[0]} x {own[1]} pixels, and the video of {size[0]} x {size[1]}"
                )
            if label not in places:
                raise ValueError(
                    f"line {line} has the unknown class {label}. Name all classes, such as "
                    "'protocol.categories={1: car, 2: pedestrian}'"
                )
        counts = rle.parse_texts(texts, size[0] * size[1])
        if counts is None:
            counts = [_parse_line(text, size, line) for line, text in enumerate(texts, 1)]
    except ValueError as error:
        raise BadFile(path, str(error)) from None
    tracks = Tracks.of_rows(
        [(frame, track, places[label]) for frame, track, label, *_ in rows], [*map(RunLengths.of_counts, counts)]
    )
    _check_tracks(tracks, path, size)
    return tracks, size


def _parse_line(text: str, size: tuple[int, int], line: int) -> np.ndarray:
    try:
        return rle.parse_counts(text, size[0] * size[1])
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from None


def _check_tracks(tracks: Tracks, path: Path, size: tuple[int, int]) -> None:
    """Refuse an id that occurs twice in a frame, and masks that overlap; ignored regions may overlap one another."""
    is_region = tracks.classes == _REGION
    objects = tracks.select(~is_region)
    pairs, numbers = np.unique(np.stack([objects.frames, objects.ids]), axis=1, return_counts=True)
    if numbers.max(initial=1) > 1:
        frame, track = pairs[:, numbers.argmax()].tolist()
        raise BadFile(path, f"the id {track} occurs twice in frame {frame}")
    regions = _join_regions(tracks.select(is_region), size)
    # as runs of one image, in which the frames follow one another
    whole = join_frames([*objects.masks, *regions.values()], [*objects.frames.tolist(), *regions], size)
    order = np.argsort(whole.starts, kind="stable")
    overlapping = whole.ends[order][:-1] > whole.starts[order][1:]
    if overlapping.any():
        frame = int(whole.starts[order][1:][overlapping.argmax()]) // (size[0] * size[1])
        raise BadFile(path, f"masks of frame {frame} overlap: give each pixel to one object")


def _join_regions(regions: Tracks, size: tuple[int, int] | None) -> dict[int, RunLengths]:
    """Return the union of the masks of each frame."""
    canvases: dict[int, np.ndarray] = {}
    for frame, mask in zip(regions.frames.tolist(), regions.masks, strict=True):
        assert size is not None  # of a file with lines
        mask.paint(canvases.setdefault(frame, np.zeros(size, bool)), True)
    return {frame: RunLengths.of_mask(canvas) for frame, canvas in canvases.items()}
