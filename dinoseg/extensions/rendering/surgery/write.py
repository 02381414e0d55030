"""Writer for rendered operations in the download format of SAR-RARP50: zipped videos with 1 Hz masks."""

import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from dinoseg.extensions.rendering.canvas import Canvas
from dinoseg.extensions.rendering.noise import Wander
from dinoseg.extensions.rendering.relief import DETAIL, metal_sphere
from dinoseg.extensions.rendering.rendering import find_missing, render_videos
from dinoseg.extensions.rendering.surgery.parts import paint_needle
from dinoseg.extensions.rendering.surgery.tissue import Tissue
from dinoseg.extensions.rendering.surgery.tools import Catheter, Clamp, Pose, Reach, Robot, Suction, Thread, curve
from dinoseg.utils.atomic import scratch_folder
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural

FPS = 60
RATE = 10  # unique frames per second
SPLITS = ("train1", "test")
FIRST_TEST_VIDEO = 41  # as in SAR-RARP50
# the thread runs from the needle through these zones of the frame, (x, y) as shares of its sides
KNOT_ZONES = (((0.5, 0.1), (0.9, 0.3)), ((0.15, 0.15), (0.5, 0.4)), ((0.2, 0.6), (0.6, 0.85)))
Seed = int | Sequence[int]
CONTENT = 2  # version of what a zip holds: 2 has the ids of instances
NOISES = 7  # number of noise images, used in rotation


@dataclass(frozen=True)
class SurgeryVideo:
    """Settings that determine one video's content; stored as the comment of its zip."""

    seed: int
    split: str
    number: int
    seconds: int
    size: tuple[int, int]

    @property
    def description(self) -> bytes:
        """The description stored in the finished zip."""
        return f"dinoseg render {CONTENT} {json.dumps(asdict(self))}".encode()

    def path(self, root: Path) -> Path:
        """Return the path of the finished zip."""
        return root / self.split / f"video_{self.number:02d}.zip"


def render_dataset(
    root: Path,
    *,
    train_videos: Natural = 64,
    test_videos: Natural = 2,
    seconds: Count = 4,
    size: tuple[int, int] = (192, 320),
    seed: Natural = 0,
    workers: Count = 2,
) -> None:
    """Write `root/train1/video_*.zip` and `root/test/video_*.zip`, several videos in parallel.

    Each zip holds `video_left.avi` (60 fps, `size` (H, W)), and for every 60th frame `segmentation/%09d.png` and
    `instances/%09d.png`, whose ids are those of `render_objects`. Zips
    finished by an earlier call with the same settings are reused; zips are written atomically.

    Raises:
        UserError: a setting is out of range, or `root` is not writable or holds other videos.
    """
    root = Path(root)
    size = (int(size[0]), int(size[1]))
    _check_sizes(train_videos, test_videos, size)
    first_test = max(FIRST_TEST_VIDEO, train_videos + 1)
    numbers = {"train1": range(1, train_videos + 1), "test": range(first_test, first_test + test_videos)}
    videos = [SurgeryVideo(seed, split, number, seconds, size) for split in SPLITS for number in numbers[split]]
    work = functools.partial(_write_video, root=root)
    render_videos(root, functools.partial(_find_missing_videos, root, videos), work, total=len(videos), workers=workers)


def _check_sizes(train_videos: int, test_videos: int, size: tuple[int, int]) -> None:
    if train_videos < 0 or test_videos < 0 or train_videos + test_videos == 0:
        raise UserError(
            f"train_videos={train_videos} and test_videos={test_videos} give no videos to render. "
            "Neither may be negative and one must be at least 1."
        )
    if min(size) < 16 or size[0] % 2 or size[1] % 2:
        raise UserError(
            f"size={list(size)} cannot be a video's (height, width): both must be even and at least 16. "
            "Take for example [192, 320]."
        )


def _find_missing_videos(root: Path, videos: list[SurgeryVideo]) -> list[SurgeryVideo]:
    """Return the videos that are not written yet, and refuse a root with other content."""
    for split in SPLITS:
        (root / split).mkdir(parents=True, exist_ok=True)
    existing = [path for split in SPLITS for path in sorted((root / split).glob("*.zip"))]
    return find_missing(root, videos, existing, _comment, "file")


def _comment(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except zipfile.BadZipFile:
        return b""


def _write_video(video: SurgeryVideo, root: Path) -> Path:
    """Render one video in a scratch folder next to its target, then move the finished zip there."""
    path = video.path(root)
    with scratch_folder(path.parent, path.name) as part:
        entropy = (video.seed, SPLITS.index(video.split), video.number)
        clip = render_objects(entropy, video.seconds * RATE, video.size)
        masks = _encode(part / "video_left.avi", clip, video.size)
        _pack(part / path.name, part / "video_left.avi", masks, video.description)
        os.replace(part / path.name, path)
    return path


def _encode(
    path: Path, clip: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Write the frames at 60 fps; return the masks and ids of every 60th frame by file name."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"XVID"), FPS, size[::-1])
    if not writer.isOpened():
        raise UserError(f"OpenCV {cv2.__version__} cannot encode XVID here. Install opencv-python-headless from PyPI.")
    masks = {}
    repeats = FPS // RATE
    try:
        for index, (rgb, mask, ids) in enumerate(clip):
            if index * repeats % FPS == 0:
                masks[f"segmentation/{index * repeats:09d}.png"] = mask
                masks[f"instances/{index * repeats:09d}.png"] = ids
            bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
            for _ in range(repeats):
                writer.write(bgr)
    finally:
        writer.release()
    return masks


def _pack(path: Path, video: Path, masks: dict[str, np.ndarray], comment: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(video, video.name)
        for name, mask in masks.items():
            archive.writestr(name, cv2.imencode(".png", mask)[1].tobytes())
        archive.comment = comment


def render_clip(seed: Seed, frames: int, size: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield `frames` images (H, W, 3) uint8 RGB with their masks (H, W) uint8 at 10 Hz.

    The same seed and size give the same frames; mask values are the SAR-RARP50 ids 0..9.
    """
    for rgb, mask, _ in render_objects(seed, frames, size):
        yield rgb, mask


def render_objects(
    seed: Seed, frames: int, size: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the images and masks of `render_clip` with the ids (H, W) uint16 of the parts of instruments.

    An id is class id * 1000 + number of the instrument, which is the same in all frames; 0 is background. Both jaws of
    an instrument are one object, and so are its wrist and its shaft.
    """
    scene = Scene(seed, size)
    for index in range(frames):
        yield scene.draw(index / RATE)


class Scene:
    """The world of one video; a pure function of time once built."""

    def __init__(self, seed: Seed, size: tuple[int, int]) -> None:
        rng = np.random.default_rng(seed)
        height, width = size
        self._unit = float(np.sqrt(height * width / (192 * 320)))
        self._span = np.array([width, height], float)
        self._mirror = bool(rng.random() < 0.5)
        self._tissue = Tissue(rng, size, self._unit)
        self._camera = [Wander(rng, -0.07 * side, 0.07 * side, 8.0) for side in (width, height)]
        self._lens = Lens(rng, size)
        ball = metal_sphere(rng, (190, 90, 80))
        self._right = self._robot(rng, ball, (0.76, 0.52), (1.6, rng.uniform(-0.9, 1.9)), holder=True)
        self._left = self._robot(rng, ball, (0.24, 0.50), (-0.6, rng.uniform(-0.9, 1.9)), holder=False)
        self._behind = self._layers_behind(rng, ball)
        self._suction = self._maybe_suction(rng, ball)
        self._third = rng.random() < 0.25
        if self._third:
            self._top = self._robot(
                rng, ball, (rng.uniform(0.4, 0.6), 0.12), (rng.uniform(0.2, 0.8), -1.2), holder=False
            )
        self._needle = paint_needle(rng, ball, self._unit)
        self._needle_turn = Wander(rng, 1.2, 1.9, 5.0)
        self._needle_squash = Wander(rng, 0.7, 1.0, 4.0)
        self._thread = Thread(rng, self._unit)
        self._knots = [
            [Wander(rng, middle - 0.14, middle + 0.14, 6.0) for middle in rng.uniform(low, high)]
            for low, high in KNOT_ZONES
        ]
        self._thread_over = rng.random() < 0.5

    def frame(self, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the image (H, W, 3) uint8 RGB and the mask (H, W) uint8 at `seconds`."""
        rgb, mask, _ = self.draw(seconds)
        return rgb, mask

    def draw(self, seconds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the image, the mask and the ids at `seconds`, see `render_objects`."""
        camera = np.array([shift(seconds) for shift in self._camera])
        canvas = Canvas(self._tissue.frame(seconds, camera), self._unit, camera)
        for number, draw in enumerate(self._behind, 1):
            canvas.number = number
            draw(canvas, seconds)
        canvas.number = 1  # of the left instrument, and of the thread and the suction tool
        thread = self._thread_line(seconds)
        if not self._thread_over:
            self._thread.draw(canvas, thread)
        if self._third:
            canvas.number = 3
            self._top.draw(canvas, seconds)
            canvas.number = 1
        if self._suction is not None:
            self._suction.draw(canvas, seconds)
        self._left.draw(canvas, seconds)
        canvas.number = 2
        self._right.draw(canvas, seconds, self._draw_needle)
        canvas.number = 1
        if self._thread_over:
            self._thread.draw(canvas, thread)
        return self._finish(canvas, seconds)

    def _finish(self, canvas: Canvas, seconds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rgb, mask = canvas.rgb, canvas.mask
        ids: np.ndarray = np.where(mask > 0, 1000 * mask.astype(np.uint16) + canvas.numbers, 0).astype(np.uint16)
        if self._mirror:
            rgb, mask, ids = (each[:, ::-1].copy() for each in (rgb, mask, ids))
        return self._lens.expose(rgb, seconds), mask, ids

    def _robot(
        self,
        rng: np.random.Generator,
        ball: np.ndarray,
        home: Sequence[float],
        port: Sequence[float],
        *,
        holder: bool,
    ) -> Robot:
        span = self._span * (0.09, 0.16)
        at = (np.asarray(home) + rng.uniform(-0.05, 0.05, 2)) * self._span
        reach = Reach(rng, at, np.asarray(port) * self._span, span)
        return Robot(rng, reach, ball, self._unit, holder=holder)

    def _layers_behind(self, rng: np.random.Generator, ball: np.ndarray) -> list[Callable[[Canvas, float], None]]:
        layers: list[Callable[[Canvas, float], None]] = []
        if rng.random() < 0.9:
            top = rng.random() < 0.5
            origin = self._span * (rng.uniform(0.3, 0.7), -0.12 if top else 1.12)
            tip = self._span * (rng.uniform(0.4, 0.6), 0.62 if top else 0.38)
            layers.append(Catheter(rng, self._unit, origin, tip).draw)
        if rng.random() < 0.9:
            for _ in range(int(rng.integers(1, 3))):
                home = self._span * (rng.uniform(0.2, 0.8), rng.choice([0.2, 0.8]))
                layers.append(Clamp(rng, home, ball, self._unit).draw)
        return layers

    def _maybe_suction(self, rng: np.random.Generator, ball: np.ndarray) -> Suction | None:
        if rng.random() > 0.9:
            return None
        side = rng.choice([-1, 1])
        home = self._span * (0.5 + side * rng.uniform(0, 0.15), 0.62)
        port = self._span * (0.5 + side * rng.uniform(0.1, 0.8), 1.9)
        return Suction(rng, Reach(rng, home, port, self._span * (0.18, 0.16)), ball, self._unit)

    def _needle_place(self, pose: Pose, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the needle's placement on the canvas and its threaded end (x, y)."""
        _, radius, spread = self._needle
        x, y, angle = pose.jaws
        grip = pose.scale * 30 * self._unit
        held = np.array([x + grip * np.cos(angle), y + grip * np.sin(angle)])
        turn, squash = angle + self._needle_turn(seconds), self._needle_squash(seconds)
        across = np.array([-np.sin(turn), np.cos(turn)])
        along = np.array([np.cos(turn), np.sin(turn)])
        reach = radius * self._unit
        # the jaws hold it a third of the way from its threaded end
        bite = spread * 0.4
        centre = held - reach * (np.cos(bite) * along + np.sin(bite) * squash * across)
        tail = centre + reach * (np.cos(spread) * along + np.sin(spread) * squash * across)
        return np.array([*centre, turn, squash]), tail

    def _draw_needle(self, canvas: Canvas, pose: Pose, seconds: float) -> None:
        place, _ = self._needle_place(pose, seconds)
        canvas.shade(self._needle[0], place, 1 / DETAIL, 3)
        canvas.paste(self._needle[0], place, 1 / DETAIL)

    def _thread_line(self, seconds: float) -> np.ndarray:
        _, tail = self._needle_place(self._right.pose(seconds), seconds)
        knots = [tail] + [self._span * (x(seconds), y(seconds)) for x, y in self._knots]
        return curve(np.array(knots))


class Lens:
    """Camera model: illumination, blur, haze and sensor noise."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        height, width = size
        rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        centre = rng.uniform(-0.25, 0.25, 2)
        away = np.hypot((columns - centre[0]) * 0.9, (rows - centre[1]) * 0.75)
        fall = np.clip(1.12 - rng.uniform(0.35, 0.6) * away**2, 0.2, 1.15)
        balance = rng.uniform(0.92, 1.08, 3) * rng.uniform(1.0, 1.4)
        self._light = np.clip(fall[..., None] * balance * 160, 0, 255).astype(np.uint8)  # 160 = gain 1
        self._gain = Wander(rng, 0.92, 1.08, 5.0)
        self._blur = [Wander(rng, 0.35, 0.75, 3.0) for _ in range(2)]
        self._haze = rng.uniform(0, 14)
        strength = rng.uniform(2.0, 4.0)
        self._noise = [_grain(rng, strength, size) for _ in range(NOISES)]

    def expose(self, rgb: np.ndarray, seconds: float) -> np.ndarray:
        """Return the recorded image (H, W, 3) uint8."""
        seen = cv2.multiply(rgb, self._light, scale=self._gain(seconds) / 160)
        seen = cv2.GaussianBlur(seen, (3, 3), self._blur[0](seconds), sigmaY=self._blur[1](seconds))
        noise = self._noise[round(seconds * 1000) // 7 % NOISES]
        return cv2.addWeighted(seen, 1 - self._haze / 255, noise, 1.0, self._haze - 128)


def _grain(rng: np.random.Generator, strength: float, size: tuple[int, int]) -> np.ndarray:
    """Return sensor noise (H, W, 3) uint8 around 128."""
    grain = rng.standard_normal((*size, 3), np.float32)
    return np.clip(np.rint(128 + strength * grain), 0, 255).astype(np.uint8)
