"""Tracks of "CVAT for video 1.1": what each frame holds, by the rule by which CVAT reads such files itself."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from pathlib import Path, PurePosixPath

from dinoseg.data.annotation.between import Outline
from dinoseg.data.annotation.drawing import Between, Form
from dinoseg.data.annotation.entry import Clip, Entry, Labelled, size_of
from dinoseg.utils.wording import shown

_MOST_FRAMES = 2**18  # of a task: two hours at 30 a second
_MOST_BETWEEN = 2**21  # shapes of a file that stand in none of its lines: two keyframes could stand for any number


@dataclass(frozen=True, slots=True)
class Key:
    """What a track says of one frame.

    Args:
        frame: its number.
        fixed: it was drawn there (a keyframe), not found between two that were.
        hidden: the object is not to be seen from here to the next keyframe.
        depth: its z_order.
        form: the shape; None: see `wrong`.
        outline: what may move from here to the next keyframe; None of a mask.
        wrong: why it cannot be drawn.
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
    """One object of a task, by the task's id."""

    label: str
    task: str
    keys: list[Key] = field(default_factory=list)


def frames_of(path: Path, tasks: Sequence[Mapping[str, str]], tracks: Sequence[Track]) -> list[Entry]:
    """Return an entry for each frame of the tasks, with the shapes that the tracks have there.

    Between two keyframes a shape moves as CVAT moves it; after the last one it stays, up to the end of the task. What
    the file says of a frame itself is taken as it stands. A mask is seen on its own frame alone.

    Args:
        path: the annotation file.
        tasks: what it says of each (`id`, `source`, `start_frame`, ...); none: the frames of the tracks are all.
        tracks: of all tasks.

    Raises:
        ValueError: more frames or shapes than a file may stand for, or a track that does not go forwards.
    """
    last = max((key.frame for track in tracks for key in track.keys), default=0)
    entries: list[Entry] = []
    left = _MOST_BETWEEN + sum(len(track.keys) for track in tracks)
    for task in tasks or ({"stop_frame": str(last)},):
        frames = _frames(path, task, alone=len(tasks) < 2)
        for track in tracks:
            if len(tasks) > 1 and track.task != task.get("id", ""):
                continue
            for frame, key in _seen(track, frames):
                left -= 1
                if left < 0:
                    raise ValueError(f"its tracks stand for more than {_MOST_BETWEEN:,} shapes: export fewer frames")
                _add(frames[frame], track.label, key)
        entries += frames.values()
    return entries


def _frames(path: Path, task: Mapping[str, str], *, alone: bool) -> dict[int, Entry]:
    start, stop = (_whole(task, key) for key in ("start_frame", "stop_frame"))
    step = re.fullmatch(r"step\s*=\s*([1-9]\d{0,8})", task.get("frame_filter", "").strip())
    numbers = range(start, stop + 1, int(step[1]) if step else 1)
    if len(numbers) > _MOST_FRAMES:
        raise ValueError(f"a task has {len(numbers):,} frames, and may have {_MOST_FRAMES:,}: divide it into several")
    source, subset = PurePosixPath(task.get("source", "").replace("\\", "/")).name, task.get("subset", "")
    clip = Clip(source, subset, numbers)
    above = f"{PurePosixPath(source).stem}/" if source else "" if alone else f"task_{task.get('id', '')}/"
    size, wrong = None, ""
    if "width" in task or "height" in task:
        try:
            size = size_of(_whole(task, "height"), _whole(task, "width"))
        except ValueError as error:
            wrong = f"a task's original_size: {error}"
    return {
        number: Entry(path, f"{above}frame_{number:06d}", size, [], wrong, subset, clip, number) for number in numbers
    }


def _whole(task: Mapping[str, str], key: str) -> int:
    value = task.get(key, "0").strip()
    if not (value.isdecimal() and len(value) < 10):
        raise ValueError(f"{key} of a task is {shown(value, 40)}, and must be a whole number")
    return int(value)


def _seen(track: Track, frames: Mapping[int, Entry]) -> Iterator[tuple[int, Key]]:
    """Yield each frame that a track is seen on, and what is there."""
    keys = sorted(track.keys, key=lambda key: key.frame)
    for one, other in pairwise(keys):
        if one.frame == other.frame:
            raise ValueError(f"a track ({shown(track.label, 40)}) has two shapes on frame {one.frame}: leave one")
    said = {key.frame for key in keys}
    yield from ((key.frame, key) for key in keys if not key.hidden and key.frame in frames)
    fixed = [key for key in keys if key.fixed]
    for one, other in zip_longest(fixed, fixed[1:]):
        if one.hidden or (one.outline is None and not one.wrong):
            continue
        end = other.frame if other else max(frames, default=-1) + 1
        for frame in range(one.frame + 1, end):
            if frame in frames and frame not in said:
                yield frame, _moved(one, other, frame) if other else one


def _moved(one: Key, other: Key, frame: int) -> Key:
    """Return what lies between two keyframes."""
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
        entry.wrong = f"{entry.image}, a track ({shown(label, 40)}): {key.wrong}"
    else:
        entry.shapes.append(Labelled(label, key.form, key.depth))
