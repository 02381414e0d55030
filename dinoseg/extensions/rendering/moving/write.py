"""Writer for videos of moving objects: folders of frames and masks that `data=movi` reads."""

import functools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from dinoseg.extensions.rendering.canvas import Canvas
from dinoseg.extensions.rendering.noise import Wander, fractal, mix, smoothstep
from dinoseg.extensions.rendering.relief import Sprite
from dinoseg.extensions.rendering.rendering import find_missing, render_videos
from dinoseg.utils.atomic import atomic_folder
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import Count, Natural
from dinoseg.utils.wording import join_names

log = logging.getLogger(__name__)
FOLDERS = ("train", "validation", "test")
PICTURES = ("frames", "segmentations")  # subfolders of each video
DESCRIPTION = "rendering.json"  # inside each finished video
RATE = 12  # frames per second
FEWEST, MAX = 3, 5  # number of objects in a video
SIZES = (0.28, 0.45)  # diameter of an object, as a share of the frame's shorter side
CONTRASTS = (0.2, 0.7)  # maximum share of the second palette colour in an object's pattern
CALM = (0.3, 1.0)  # the same for the ground, whose colours are dull, so that objects stand out
SPEEDS = (0.3, 0.9)  # shorter sides per second
SPIN = 1.5  # maximum angular speed, radians per second
SHOWN = 0.4  # minimum visible share of each object in the first frame
_SMALLEST = 32  # pixels: smaller frames could leave objects without pixels
_DETAIL = 2  # sprite pixels per frame pixel
_FINE = 4  # supersampling of outlines, per sprite pixel
_SHADOW = 0.45  # opacity of shadows: below 0.5, so that a shadow never enters the mask
_SOFT = 0.25  # extent of a shadow beyond its object, in radii
_ROOM = 0.1  # margin of the ground on each side of the frame, for its drift, as a share of the shorter side
Seed = int | Sequence[int]
_POINTS = 96  # points of a curved outline
COLOURS = 6  # colours in a video's palette
_CANDIDATES = 12  # candidates per colour; the most distant from the others is taken


@dataclass(frozen=True)
class MovingVideo:
    """Settings that determine one video's content; stored in its folder."""

    seed: int
    folder: str
    number: int
    seconds: int
    size: tuple[int, int]

    @property
    def description(self) -> str:
        """The text stored in the finished folder."""
        return json.dumps({"dinoseg": "moving objects", **asdict(self)}, indent=1)

    def path(self, root: Path) -> Path:
        """Return the path of the finished video; names are unique across folders."""
        return root / self.folder / f"{self.folder}_{self.number:04d}"


def render_moving_objects(
    root: str | Path,
    *,
    train_videos: Natural = 512,
    val_videos: Natural = 64,
    test_videos: Natural = 0,
    seconds: Count = 2,
    size: tuple[int, int] = (128, 128),
    seed: Natural = 0,
    workers: Count = 2,
) -> None:
    """Write `root/{train,validation,test}/<video>/{frames,segmentations}/%05d.png`, several videos in parallel.

    Videos have 12 frames per second of `size` (H, W). Masks are greyscale: 0 = ground, k = the video's k-th object.
    Videos finished by an earlier call with the same settings are reused; videos are written atomically. No two seeds
    or folders share a video.

    Raises:
        UserError: a setting is out of range, or `root` is not writable or holds other data.
    """
    root = Path(root).expanduser()
    counts = (train_videos, val_videos, test_videos)
    _check_sizes(counts, size)
    videos = [
        MovingVideo(seed, folder, number, seconds, (size[0], size[1]))
        for folder, count in zip(FOLDERS, counts, strict=True)
        for number in range(1, count + 1)
    ]
    work = functools.partial(_write_video, root=root)
    render_videos(root, functools.partial(_find_missing_videos, root, videos), work, total=len(videos), workers=workers)


def _check_sizes(counts: tuple[int, int, int], size: tuple[int, int]) -> None:
    if min(counts) < 0 or sum(counts) == 0:
        raise UserError(
            f"train_videos={counts[0]}, val_videos={counts[1]} and test_videos={counts[2]} give no videos to render. "
            "None may be negative and one must be at least 1."
        )
    if min(size) < _SMALLEST:
        raise UserError(
            f"size={list(size)} cannot be a frame's [height, width]: both must be at least {_SMALLEST}. "
            "Take for example [128, 128]."
        )


def _find_missing_videos(root: Path, videos: list[MovingVideo]) -> list[MovingVideo]:
    """Return the videos that are not written yet, and refuse a root with other content.

    A video with missing images is deleted and counts as missing.
    """
    foreign = [path.name for path in _visible_entries(root) if path.name not in FOLDERS]
    if foreign:
        raise UserError(
            f"{root} holds {join_names(foreign)}, which was not rendered by this command. Choose another root: "
            "rendering does not write into folders with other data."
        )
    existing = [path for folder in FOLDERS for path in _visible_entries(root / folder)]
    absent = find_missing(root, videos, existing, _description, "folder")
    cut = [video for video in videos if video not in absent and not _is_complete(video, video.path(root))]
    for video in cut:
        log.warning("%s lacks images: rendering it again.", video.path(root))
        shutil.rmtree(video.path(root))
    return [*absent, *cut]


def _is_complete(video: MovingVideo, path: Path) -> bool:
    return all(len(_visible_entries(path / folder)) >= video.seconds * RATE for folder in PICTURES)


def _visible_entries(folder: Path) -> list[Path]:
    """Return the visible entries of a folder, or an empty list if it does not exist."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.exists() else []


def _description(path: Path) -> str:
    try:
        return (path / DESCRIPTION).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return ""


def _write_video(video: MovingVideo, root: Path) -> Path:
    """Render one video into its folder, which appears when it is finished."""
    path = video.path(root)
    with atomic_folder(path) as part:
        entropy = (video.seed, FOLDERS.index(video.folder), video.number)
        for index, (rgb, mask) in enumerate(draw_video(entropy, video.seconds * RATE, video.size)):
            for folder, pixels in zip(PICTURES, (rgb, mask), strict=True):
                write_png(part / folder / f"{index:05d}.png", pixels)
        (part / DESCRIPTION).write_text(video.description, encoding="utf-8")
    return path


def draw_video(seed: Seed, frames: int, size: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield `frames` images (H, W, 3) uint8 RGB with their masks (H, W) uint8, 12 per second.

    The same seed and size give the same frames. Mask value 0 is the ground, k the k-th object from the back. A pixel
    has the ID of the object visible at its centre.
    """
    scene = _Scene(seed, size)
    for index in range(frames):
        yield scene.frame(index / RATE)


@dataclass
class _Mover:
    """An object: its sprite, its shadow, and a straight path that is reflected at the borders."""

    body: Sprite
    shadow: Sprite
    radius: float  # pixels
    start: np.ndarray  # (x, y) of the centre in pixels
    speed: np.ndarray  # (x, y) in pixels per second
    turn: tuple[float, float]  # radians, radians per second

    def place(self, seconds: float, size: tuple[int, int]) -> np.ndarray:
        """Return (x, y, angle) at a time; the centre is reflected at 0.8 of a radius from the border."""
        low = 0.8 * self.radius
        room = np.array([size[1], size[0]]) - 2 * low
        way = (self.start - low + self.speed * seconds) % (2 * room)
        return np.array([*(low + np.minimum(way, 2 * room - way)), self.turn[0] + self.turn[1] * seconds])


class _Scene:
    """The world of one video; a pure function of time once built."""

    def __init__(self, seed: Seed, size: tuple[int, int]) -> None:
        rng = np.random.default_rng(seed)
        self._size, side = size, min(size)
        palette = draw_palette(rng)
        pairs = [(i, j) for i in range(len(palette)) for j in range(i)]
        count = int(rng.integers(FEWEST, MAX + 1))
        taken = rng.permutation(len(pairs))[:count]  # no two objects share both colours
        colour_pairs = [rng.permutation(palette[list(pairs[number])]) for number in taken]
        self._ground = _paint_ground(rng, size, draw_greys(rng))
        self._drift = rng.uniform(-_ROOM, _ROOM, (2, 2)) * side * (rng.random() < 0.5)  # start and end of the drift
        self._light = Wander(rng, 0.82, 1.12, 3.0) if rng.random() < 0.4 else None
        self._shadows = rng.random() < 0.6
        self._fall = side * rng.uniform(0.015, 0.04) * _direction(rng)  # offset of shadows
        self._movers = [_make_mover(rng, size, colours, label) for label, colours in enumerate(colour_pairs, start=1)]
        while not self._shows_all():
            for mover in self._movers:
                mover.start = rng.uniform(mover.radius, np.array([size[1], size[0]]) - mover.radius)

    def frame(self, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the image (H, W, 3) uint8 RGB and the mask (H, W) uint8 at `seconds`."""
        canvas = Canvas(self._seen_ground(seconds), 1.0, np.zeros(2))
        for mover in self._movers:
            place = mover.place(seconds, self._size)
            if self._shadows:
                canvas.paste(mover.shadow, place + (*self._fall, 0), 1 / _DETAIL)
            canvas.paste(mover.body, place, 1 / _DETAIL)
        if self._light is None:
            return canvas.rgb, canvas.mask
        return cv2.convertScaleAbs(canvas.rgb, alpha=self._light(seconds)), canvas.mask

    def _seen_ground(self, seconds: float) -> np.ndarray:
        height, width = self._size
        share = 0.5 - 0.5 * np.cos(np.pi * seconds / 4)  # back and forth in 8 seconds
        shift = self._drift[0] + share * (self._drift[1] - self._drift[0])
        room = (np.array([self._ground.shape[1] - width, self._ground.shape[0] - height])) / 2
        moved = np.column_stack([np.eye(2), shift - room])
        return cv2.warpAffine(self._ground, moved, (width, height), borderMode=cv2.BORDER_REFLECT)

    def _shows_all(self) -> bool:
        _, mask = self.frame(0)
        seen = np.bincount(mask.ravel(), minlength=len(self._movers) + 1)[1:]
        whole = [np.count_nonzero(mover.body.rgba[..., 3] > 127) / _DETAIL**2 for mover in self._movers]
        return bool((seen >= np.maximum(1, SHOWN * np.array(whole))).all())


def _make_mover(rng: np.random.Generator, size: tuple[int, int], colours: np.ndarray, label: int) -> _Mover:
    side = min(size)
    radius = side * rng.uniform(*SIZES) / 2
    body = _paint_body(rng, radius, colours, label)
    return _Mover(
        body,
        _make_shadow(body, radius),
        radius,
        start=rng.uniform(radius, np.array([size[1], size[0]]) - radius),
        speed=side * rng.uniform(*SPEEDS) * _direction(rng),
        turn=(rng.uniform(0, 2 * np.pi), rng.uniform(-SPIN, SPIN)),
    )


def _paint_body(rng: np.random.Generator, radius: float, colours: np.ndarray, label: int) -> Sprite:
    """Return a sprite: an outline filled with a painted pattern that is darkened towards the rim."""
    reach = _DETAIL * radius
    half = int(np.ceil(reach * (1 + _SOFT))) + 2  # margin for the shadow's blur
    sheet = (2 * half + 1, 2 * half + 1)
    outline = OUTLINES[rng.integers(len(OUTLINES))](rng) * reach + half
    fine = np.zeros((_FINE * sheet[0], _FINE * sheet[1]), np.uint8)
    cv2.fillPoly(fine, [np.rint((_FINE * (outline + 0.5) - 0.5) * 16).astype(np.int32)], 255, cv2.LINE_8, 4)
    cover = cv2.resize(fine, sheet, interpolation=cv2.INTER_AREA)
    pattern = FIGURES[rng.integers(len(FIGURES))](rng, sheet, max(2.0 * _DETAIL, reach * rng.uniform(0.18, 0.4)))
    pattern *= rng.uniform(*CONTRASTS)
    colour = paint(pattern, colours, 0.08 * fractal(rng, sheet, 3.0 * _DETAIL, 2))
    inside = cv2.distanceTransform((cover > 127).astype(np.uint8), cv2.DIST_L2, 5)
    colour *= (0.65 + 0.4 * smoothstep(0, 0.4 * reach, inside))[..., None]
    rgba = np.dstack([np.clip(colour, 0, 255) * (cover[..., None] / 255.0), cover])
    return Sprite(np.rint(rgba).astype(np.uint8), cover, (half, half), label)


def _make_shadow(body: Sprite, radius: float) -> Sprite:
    """Return the soft shadow of a body as a sprite."""
    soft = cv2.GaussianBlur(body.rgba[..., 3], (0, 0), max(0.5, _SOFT / 3 * _DETAIL * radius))
    rgba = np.zeros_like(body.rgba)
    rgba[..., 3] = cv2.convertScaleAbs(soft, alpha=_SHADOW)
    return Sprite(rgba, soft, body.pivot, body.label)


def _paint_ground(rng: np.random.Generator, size: tuple[int, int], colours: np.ndarray) -> np.ndarray:
    """Return the ground (H', W', 3) uint8, larger than the frame by the margin for its drift."""
    side = min(size)
    room = 2 * int(np.ceil(_ROOM * side))
    sheet = (size[0] + room, size[1] + room)
    pattern = GROUNDS[rng.integers(len(GROUNDS))](rng, sheet, side * rng.uniform(0.08, 0.25)) * rng.uniform(*CALM)
    colour = paint(pattern, colours, 0.08 * fractal(rng, sheet, 4.0, 3))
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8)


def _direction(rng: np.random.Generator) -> np.ndarray:
    """Return a random unit vector (x, y)."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def ellipse(rng: np.random.Generator) -> np.ndarray:
    """Return an ellipse with an aspect ratio of 0.7 to 1."""
    around = np.linspace(0, 2 * np.pi, _POINTS, endpoint=False)
    return np.column_stack([np.cos(around), rng.uniform(0.7, 1) * np.sin(around)])


def box(rng: np.random.Generator) -> np.ndarray:
    """Return a rectangle, from a square to twice as long as wide."""
    half = np.array([1, rng.uniform(0.5, 1)])
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half / np.hypot(*half)


def star(rng: np.random.Generator) -> np.ndarray:
    """Return a star of four to seven rays."""
    rays = int(rng.integers(4, 8))
    return _radial(np.tile([1, rng.uniform(0.45, 0.65)], rays))


def polygon(rng: np.random.Generator) -> np.ndarray:
    """Return a slightly irregular polygon of three to seven corners."""
    corners = rng.uniform(0.8, 1, int(rng.integers(3, 8)))
    return _radial(corners / corners.max())


def blob(rng: np.random.Generator) -> np.ndarray:
    """Return a smooth shape with convex and concave parts."""
    around = np.linspace(0, 2 * np.pi, _POINTS, endpoint=False)
    waves = [rng.uniform(-1, 1) / order * np.cos(order * around + rng.uniform(0, 2 * np.pi)) for order in (2, 3, 4, 5)]
    reach = 1 + 0.5 * np.sum(waves, axis=0)
    return _radial(reach / reach.max())


OUTLINES = (ellipse, box, star, polygon, blob)


def _radial(reach: np.ndarray) -> np.ndarray:
    """Return points (N, 2) at equal angles, at distances `reach` (N,) from the centre."""
    around = np.linspace(0, 2 * np.pi, len(reach), endpoint=False)
    return reach[:, None] * np.column_stack([np.cos(around), np.sin(around)])


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Return well separated colours (COLOURS, 3) float32 RGB in 0..255, without black and white."""
    chosen = _draw_colours(rng, 1)
    while len(chosen) < COLOURS:
        candidates = _draw_colours(rng, _CANDIDATES)
        nearest = np.linalg.norm(candidates[:, None] - chosen, axis=-1).min(axis=1)
        chosen = np.vstack([chosen, candidates[nearest.argmax()]])
    return chosen


def draw_greys(rng: np.random.Generator) -> np.ndarray:
    """Return two dull colours (2, 3) float32 RGB in 0..255, for the ground."""
    return _rgb(rng.uniform((0, 0.0, 0.35), (360, 0.15, 0.6), (2, 1, 3)))


def _draw_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    return _rgb(rng.uniform((0, 0.35, 0.3), (360, 0.9, 0.95), (count, 1, 3)))


def _rgb(hsv: np.ndarray) -> np.ndarray:
    return 255 * cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2RGB)[:, 0]


def gradient(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Return a smooth transition from one side to the other; `cell` is ignored."""
    across = _random_coordinates(rng, size)[0]
    return smoothstep(across.min(), across.max(), across)


def blotches(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Return rough blotches."""
    return smoothstep(-0.35, 0.35, fractal(rng, size, 1.2 * cell, 4))


def clouds(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Return soft clouds without edges."""
    return smoothstep(-0.9, 0.9, fractal(rng, size, 2 * cell, 2))


def stripes(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Return slightly bent stripes."""
    across = _random_coordinates(rng, size)[0] + 0.25 * cell * fractal(rng, size, 3 * cell, 1)
    return smoothstep(-0.4, 0.4, np.sin(np.pi * across / cell))


def checks(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Return a chequerboard."""
    across, along = _random_coordinates(rng, size)
    return smoothstep(-0.2, 0.2, np.sin(np.pi * across / cell) * np.sin(np.pi * along / cell))


def dots(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Return rows of dots."""
    across, along = _random_coordinates(rng, size)
    return smoothstep(0.1, 0.7, np.cos(np.pi * across / cell) + np.cos(np.pi * along / cell) - 0.3)


FIGURES = (gradient, blotches, stripes, checks, dots)  # patterns of objects
GROUNDS = (gradient, blotches, clouds, stripes)  # patterns of the ground


def paint(pattern: np.ndarray, colours: Sequence[np.ndarray] | np.ndarray, grain: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) float32: a blend of the first and second colour by `pattern` (H, W), with fine `grain`."""
    flat = np.broadcast_to(np.asarray(colours[0], np.float32), (*pattern.shape, 3))
    return mix(flat, colours[1], pattern) * (1 + grain[..., None])


def _random_coordinates(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates across and along a random direction, each (H, W), with a random origin."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    angle, origin = rng.uniform(0, 2 * np.pi), rng.uniform(0, 100)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return columns * cosine + rows * sine + origin, rows * cosine - columns * sine + origin
