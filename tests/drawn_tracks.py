"""Videos of drawn tracks for tests: rectangles that move, switch their ids, tie, vanish, and lie in ignored regions."""

import json

import numpy as np
from drawn_objects import encode

CLASSES = {1: "car", 2: "person", 3: "never"}


def draw_videos(seed):
    """Return videos: name, size, number of frames, and for each side tracks (class, masks by frame); then regions."""
    rng = np.random.default_rng(seed)
    videos = []
    for number in range(rng.integers(1, 4)):
        size = (12, 15)
        length = int(rng.integers(1, 7))
        held = [_draw_track(rng, size, length) for _ in range(rng.choice([0, 1, 4]))]
        found = [_draw_track(rng, size, length) for _ in range(rng.integers(0, 3))]
        for label, masks in held if rng.random() < 0.8 else ():
            shift = int(rng.integers(-1, 2))
            seen = {frame: np.roll(mask, shift, 1) for frame, mask in masks.items() if rng.random() < 0.9}
            cut = int(rng.integers(0, 2 * length))  # from where the track has another id
            parts = [{frame: mask for frame, mask in seen.items() if (frame < cut) == early} for early in (True, False)]
            found += [
                (label if rng.random() < 0.9 else 3 - label, part) for part in parts if part or rng.random() < 0.1
            ]
        regions = {frame: _draw_box(rng, size) for frame in range(length) if rng.random() < 0.4}
        videos.append((f"clip{number}", size, length, held, found, regions))
    return videos


def _draw_box(rng, size):
    mask = np.zeros(size, bool)
    top, left = rng.integers(0, size[0] - 2), rng.integers(0, size[1] - 2)
    mask[top : top + rng.integers(2, 9), left : left + rng.integers(2, 9)] = True
    return mask


def _draw_track(rng, size, length):
    box = _draw_box(rng, size)
    step = int(rng.integers(-1, 2))
    masks = {frame: np.roll(box, step * frame, 0) for frame in range(length) if rng.random() < 0.8}
    return int(rng.integers(1, 3)), masks


def separate(videos):
    """Return the videos with masks that do not overlap: earlier tracks cover later ones, and all cover regions."""
    apart = []
    for name, size, length, *sides, regions in videos:
        free = [{frame: np.ones(size, bool) for frame in range(length)} for _ in sides]
        cut = []
        for side, left in zip(sides, free, strict=True):
            cut.append(
                [(label, {frame: _take(mask, left[frame]) for frame, mask in masks.items()}) for label, masks in side]
            )
        apart.append((name, size, length, *cut, {frame: mask & free[0][frame] for frame, mask in regions.items()}))
    return apart


def _take(mask, free):
    taken = mask & free
    free &= ~mask
    return taken


def write_mots(folder, videos):
    """Write the videos as text files of MOTS, in `gt` and `found`."""
    for name, _, _, held, found, regions in videos:
        for side, tracks, ignored in (("gt", held, regions), ("found", found, {})):
            rows = [(frame, 1000 * label + number, label, mask) for number, (label, masks) in enumerate(tracks)
                    for frame, mask in masks.items()]  # fmt: skip
            rows += [(frame, 10000, 10, mask) for frame, mask in ignored.items()]
            lines = [f"{frame} {track} {label} {mask.shape[0]} {mask.shape[1]} {encode(mask)['counts']}\n"
                     for frame, track, label, mask in rows]  # fmt: skip
            (folder / side).mkdir(exist_ok=True)
            (folder / side / f"{name}.txt").write_text("".join(lines))


def as_youtube_vis(videos, seed=0):
    """Return references and results in the form of YouTube-VIS."""
    rng = np.random.default_rng(seed)
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    reference = {"videos": [], "categories": categories, "annotations": []}
    results = []
    for number, (name, size, length, held, found, _) in enumerate(videos, 1):
        names = [f"{name}/{frame:05d}.jpg" for frame in range(length)]
        reference["videos"].append({"id": number, "height": size[0], "width": size[1], "file_names": names})
        for tracks, entries in ((held, reference["annotations"]), (found, results)):
            for label, masks in tracks:
                masks = [masks.get(frame) for frame in range(length)]
                entry = {"video_id": number, "category_id": label, "iscrowd": int(rng.random() < 0.1)}
                entry["areas"] = [None if mask is None else 1000 * int(mask.sum()) for mask in masks]
                entry["segmentations"] = [None if mask is None else encode(mask) for mask in masks]
                score = float(rng.choice([0.5, rng.random()]))
                entries.append({**entry, "id": len(entries) + 1, "score": score})
    return reference, results


def write_youtube_vis(folder, reference, results):
    """Write both as gt.json and results.json."""
    for name, content in (("gt", reference), ("results", results)):
        (folder / f"{name}.json").write_text(json.dumps(content))
