"""Parser of CVAT's XML, "for images 1.1" and "for video 1.1": polygons, boxes, ellipses, masks; imports no torch."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from pathlib import Path, PurePosixPath
from typing import NoReturn
from xml.parsers import expat

import numpy as np

from dinoseg.data.annotation import rle
from dinoseg.data.annotation.between import Outline
from dinoseg.data.annotation.drawing import MAX_PIXELS, Between, Box, Form, Polygons
from dinoseg.data.annotation.entry import AnnotatedVideo, Annotations, Entry, LabelledShape, size_of, text
from dinoseg.data.annotation.polygon import FARTHEST, check_polygon
from dinoseg.utils.wording import format_value

_DEEPEST = 32
_LONGEST = 1000  # most characters stored of a text
_AREAS = ("polygon", "box", "ellipse", "mask")
_NO_AREAS = ("polyline", "points", "cuboid", "skeleton")


def read_cvat(content: bytes, path: Path) -> Annotations:
    """Parse a file of "CVAT for images 1.1" or "for video 1.1"; labels are in file order.

    Polygons, boxes and ellipses cover the pixels of CVAT's own mask export (by pycocotools); masks cover their pixels.

    Raises:
        ValueError: it is not a CVAT file, declares a document type (whose entities may expand exponentially), or its
            tracks expand to more shapes or frames than allowed.
    """
    document = _Document(path)
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_doctype
    parser.StartElementHandler, parser.EndElementHandler = document.start, document.end
    parser.CharacterDataHandler = document.characters
    parser.buffer_text = True
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"it is not valid XML: {error}") from None
    if not document.is_cvat:
        raise ValueError("it has no element <annotations>: it is not a CVAT file")
    frames = frames_of(path, document.tasks, document.tracks) if document.tracks else []
    return Annotations(list(document.labels), [*document.entries, *frames])


def _refuse_doctype(*_: object) -> NoReturn:
    raise ValueError("it declares a document type (<!DOCTYPE>), which is not read and which CVAT does not write")


class _Document:
    """Parser state: the contents of a file read so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_cvat = False
        self.labels: Counter[str] = Counter()  # in file order
        self.entries: list[Entry] = []
        self.tasks: list[dict[str, str]] = []  # metadata of each task
        self.tracks: list[Track] = []
        self._tags: list[str] = []
        self._text = ""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self._tags) == _DEEPEST:
            raise ValueError(f"its elements are nested deeper than {_DEEPEST}")
        parent = self._tags[-1] if self._tags else ""
        self.is_cvat |= not self._tags and tag == "annotations"
        self._tags.append(tag)
        self._text = ""
        if tag in ("task", "job") and parent in ("meta", "tasks"):
            self.tasks.append({})
        elif tag == "track" and parent == "annotations":
            label = text(attributes.get("label"), "the label of a track")
            self.tracks.append(Track(label, attributes.get("task_id", "")))
        elif tag == "image" and parent == "annotations":
            self.entries.append(_entry(attributes, self.path))
        elif parent in ("image", "track") and (tag in _AREAS or tag in _NO_AREAS):
            (self._shape if parent == "image" else self._key)(tag, attributes)

    def end(self, tag: str) -> None:
        found = self._text.strip()
        if self._tags[-3:] == ["labels", "label", "name"] and found:
            self.labels[found] += 1
        elif self._tags[-2:-1] in (["task"], ["job"], ["original_size"]) and found and self.tasks:
            self.tasks[-1][tag] = found
        self._tags.pop()

    def characters(self, text: str) -> None:
        self._text += text[:_LONGEST] if len(self._text) < _LONGEST else ""

    def _shape(self, tag: str, attributes: dict[str, str]) -> None:
        entry = self.entries[-1]
        if entry.wrong:
            return
        try:
            label = text(attributes.get("label"), "its label")
            form, _ = _form(tag, attributes)
            entry.shapes.append(LabelledShape(label, form, _number(attributes, "z_order", "0")))
        except ValueError as error:
            named = format_value(attributes.get("label", ""), 40)
            entry.wrong = f"image {format_value(entry.image)}, {tag} {len(entry.shapes)} ({named}): {error}"

    def _key(self, tag: str, attributes: dict[str, str]) -> None:
        frame, form, outline, wrong, depth = attributes.get("frame", ""), None, None, "", 0.0
        if not (frame.isdecimal() and len(frame) < 10):
            raise ValueError(f"a {tag} of a track has the frame {format_value(frame, 40)}, which is not a whole number")
        try:
            depth = _number(attributes, "z_order", "0")
            form, outline = _form(tag, attributes)
        except ValueError as error:
            wrong = f"{tag} of frame {int(frame)}: {error}"
        fixed, hidden = attributes.get("keyframe", "1") == "1", attributes.get("outside", "0") == "1"
        self.tracks[-1].keys.append(Key(int(frame), fixed, hidden, depth, form, outline, wrong))


def _entry(attributes: dict[str, str], path: Path) -> Entry:
    name, subset = text(attributes.get("name"), "the name of an image"), attributes.get("subset", "")
    try:
        sides = (attributes.get(side, "") for side in ("height", "width"))
        size = size_of(*(int(side) if side.isdecimal() and len(side) < 10 else side for side in sides))
    except ValueError as error:
        return Entry(path, name, None, wrong=f"image {format_value(name)}: {error}", subset=subset)
    return Entry(path, name, size, subset=subset)


def _form(tag: str, attributes: dict[str, str]) -> tuple[Form, Outline | None]:
    """Return the form of a shape, and its outline for interpolation in a track."""
    if tag in _NO_AREAS:
        raise ValueError("it covers no pixels: draw a polygon or a mask instead, or delete it")
    if tag == "mask":
        return _mask(attributes), None
    if tag == "polygon":
        pairs = [pair.split(",") for pair in attributes.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("its points are not pairs x,y separated by ;")
        values = [_as_number(value, "points") for pair in pairs for value in pair]
    else:
        names = ("xtl", "ytl", "xbr", "ybr") if tag == "box" else ("cx", "cy", "rx", "ry")
        values = [_number(attributes, name) for name in names]
    outline = Outline(tag, np.array(values).tobytes(), _number(attributes, "rotation", "0"))
    points = outline.points()
    check_polygon(points)
    return Polygons((outline.numbers if tag == "polygon" and not outline.turned else points.tobytes(),)), outline


def _mask(attributes: dict[str, str]) -> Form:
    left, top, width, height = (_number(attributes, name) for name in ("left", "top", "width", "height"))
    box = int(left), int(top), int(width), int(height)
    if box != (left, top, width, height) or not (width > 0 and height > 0 and width * height <= MAX_PIXELS):
        raise ValueError(f"its mask has the box {box}, which is not a box of pixels")
    if abs(left) > FARTHEST or abs(top) > FARTHEST:
        raise ValueError(f"its mask has the box {box}, which is outside of any image")
    counts = [value.strip() for value in attributes.get("rle", "").split(",")]
    if not all(count.isdecimal() and len(count) < 10 for count in counts):
        raise ValueError("its rle is not a list of whole numbers")
    return Box(box, rle.checked([int(count) for count in counts], box[2] * box[3]).tobytes())


def _number(attributes: dict[str, str], name: str, default: str | None = None) -> float:
    return _as_number(attributes.get(name, default), name)


def _as_number(value: str | None, what: str) -> float:
    try:
        number = float(value) if value is not None and len(value) < 40 else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {format_value(value, 40)}, which is not a number")
    return number


_MAX_FRAMES = 2**18  # per task: two hours at 30 frames per second
_MAX_BETWEEN = 2**21  # interpolated shapes per file, since two keyframes may span any number


@dataclass(frozen=True, slots=True)
class Key:
    """State of a track on one frame.

    Args:
        frame: frame number.
        fixed: whether the frame is a keyframe, annotated by hand and not interpolated.
        hidden: the object is not visible from here to the next keyframe.
        depth: its z_order.
        form: the shape; None: see `wrong`.
        outline: shape to interpolate up to the next keyframe; None for a mask.
        wrong: why it cannot be rasterised.
    """

    frame: int
    fixed: bool
    hidden: bool
    depth: float
    form: Form | None
    outline: Outline | None
    wrong: str = ""


@dataclass
class Track:
    """One object of a task; `task` is the task's id."""

    label: str
    task: str
    keys: list[Key] = field(default_factory=list)


def frames_of(path: Path, tasks: Sequence[Mapping[str, str]], tracks: Sequence[Track]) -> list[Entry]:
    """Return an entry for each frame of the tasks, with the tracks' shapes on it.

    Between two keyframes, shapes are interpolated as in CVAT; after the last one, a shape persists to the end of the
    task. Shapes that the file lists for a frame are used unchanged. A mask applies only to its own frame.

    Args:
        path: the annotation file.
        tasks: metadata of each task (`id`, `source`, `start_frame`, ...); empty: the frames of the tracks are used.
        tracks: tracks of all tasks.

    Raises:
        ValueError: there are more frames or shapes than allowed per file, or a track has two shapes on one frame.
    """
    last = max((key.frame for track in tracks for key in track.keys), default=0)
    entries: list[Entry] = []
    left = _MAX_BETWEEN + sum(len(track.keys) for track in tracks)
    for task in tasks or ({"stop_frame": str(last)},):
        frames = _frames(path, task, alone=len(tasks) < 2)
        for track in tracks:
            if len(tasks) > 1 and track.task != task.get("id", ""):
                continue
            for frame, key in _visible_frames(track, frames):
                left -= 1
                if left < 0:
                    raise ValueError(f"its tracks expand to more than {_MAX_BETWEEN:,} shapes: export fewer frames")
                _add(frames[frame], track.label, key)
        entries += frames.values()
    return entries


def _frames(path: Path, task: Mapping[str, str], *, alone: bool) -> dict[int, Entry]:
    start, stop = (_whole_number(task, key) for key in ("start_frame", "stop_frame"))
    step = re.fullmatch(r"step\s*=\s*([1-9]\d{0,8})", task.get("frame_filter", "").strip())
    numbers = range(start, stop + 1, int(step[1]) if step else 1)
    if len(numbers) > _MAX_FRAMES:
        raise ValueError(f"a task has {len(numbers):,} frames; the limit is {_MAX_FRAMES:,}: divide it into several")
    source, subset = PurePosixPath(task.get("source", "").replace("\\", "/")).name, task.get("subset", "")
    clip = AnnotatedVideo(source, subset, numbers)
    above = f"{PurePosixPath(source).stem}/" if source else "" if alone else f"task_{task.get('id', '')}/"
    size, wrong = None, ""
    if "width" in task or "height" in task:
        try:
            size = size_of(_whole_number(task, "height"), _whole_number(task, "width"))
        except ValueError as error:
            wrong = f"a task's original_size: {error}"
    return {
        number: Entry(path, f"{above}frame_{number:06d}", size, [], wrong, subset, clip, number) for number in numbers
    }


def _whole_number(task: Mapping[str, str], key: str) -> int:
    value = task.get(key, "0").strip()
    if not (value.isdecimal() and len(value) < 10):
        raise ValueError(f"{key} of a task is {format_value(value, 40)}; it must be a whole number")
    return int(value)


def _visible_frames(track: Track, frames: Mapping[int, Entry]) -> Iterator[tuple[int, Key]]:
    """Yield each frame on which a track is visible, and its state there."""
    keys = sorted(track.keys, key=lambda key: key.frame)
    for one, other in pairwise(keys):
        if one.frame == other.frame:
            raise ValueError(
                f"a track ({format_value(track.label, 40)}) has two shapes on frame {one.frame}: remove one of them"
            )
    keyframes = {key.frame for key in keys}
    yield from ((key.frame, key) for key in keys if not key.hidden and key.frame in frames)
    fixed = [key for key in keys if key.fixed]
    for one, other in zip_longest(fixed, fixed[1:]):
        if one.hidden or (one.outline is None and not one.wrong):
            continue
        end = other.frame if other else max(frames, default=-1) + 1
        for frame in range(one.frame + 1, end):
            if frame in frames and frame not in keyframes:
                yield frame, _moved(one, other, frame) if other else one


def _moved(one: Key, other: Key, frame: int) -> Key:
    """Return the state of a track on a frame between two keyframes."""
    left, right = one.outline, other.outline
    if left is None or (right is None and other.wrong):
        return one if left is None else other
    if right is None or left.kind != right.kind:
        return replace(one, form=None, wrong=f"frames {one.frame} and {other.frame} have shapes of different kinds")
    return replace(one, form=Between(left, right, (frame - one.frame) / (other.frame - one.frame)))


def _add(entry: Entry, label: str, key: Key) -> None:
    if entry.wrong:
        return
    if key.form is None:
        entry.wrong = f"{entry.image}, a track ({format_value(label, 40)}): {key.wrong}"
    else:
        entry.shapes.append(LabelledShape(label, key.form, key.depth))
