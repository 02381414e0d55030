"""Print the end-to-end FPS of predicting a video against its slowest stage alone, in turns within one run.

`OMP_NUM_THREADS=1 python benchmarks/predict_video.py [--cases model read write] [--frames 60] [--repeats 3]`. The
stages are those of mode=predict: decoding, a model, and blending and encoding H.264. Alone each has nothing beside it:
its input is ready, its output dropped. Three cases, of each of which another stage is the slowest:

- model: 640 x 360, a ViT of 12 blocks and width 192, of random weights, with a linear head;
- read: noise of 1920 x 1080 in H.264 of a high rate, whose overlay is of plain colours; the model costs nothing;
- write: 1280 x 720 with class ids beside the overlay; the model costs nothing, as one on a GPU to the processor.

Decoding and encoding alone take all cores that they can, so where these are busy no pipeline reaches the slowest stage:
together the stages are no faster than the cores do their work, which is the cores that this process gets (measured in
each turn by hashing on all of them) / processor seconds a frame. Exits with 1 where end to end is below 0.9 of the
lower of both.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from rows import Row, tell
from tabulate import tabulate

from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.extensions.video.run import VideoInput, VideoOptions, segment_video
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.inference.image_run import ImageRun, SegmentationSettings
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.results import DoneInputs
from dinoseg.inference.stream import Throughput
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.report.overlay import blend
from dinoseg.utils.cores import count_cores
from dinoseg.utils.images import write_png

NEEDED = 0.9
BATCH = 4


@dataclass(frozen=True)
class Free(Predictor):
    """A model that costs nothing: the upper half of each picture is of one class, the lower one of another."""

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8."""
        height, width = images[0].shape[:2]
        return np.broadcast_to((np.arange(height) >= height // 2)[:, None], (len(images), height, width)).astype(
            "uint8"
        )


@dataclass(frozen=True)
class Case:
    """What is segmented, how the result looks, and whether class ids are written."""

    size: tuple[int, int]
    free: bool = True
    crf: int = 20  # of the input
    noise: bool = False
    opacity: float = 0.5
    masks: bool = False


CASES = {
    "model": Case((360, 640), free=False),
    "read": Case((1080, 1920), crf=8, noise=True, opacity=1.0),
    "write": Case((720, 1280), masks=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            missed += compared(name, CASES[name], Path(folder), args.frames, args.repeats)
    return int(missed > 0)


def compared(name: str, case: Case, folder: Path, count: int, repeats: int) -> bool:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = (Free if case.free else Predictor)(model().to(device).eval(), device, nullcontext)
    palette = [(200, 40, 0), (0, 90, 255), (20, 180, 20), (200, 200, 0)]
    by = SegmentationSettings(predictor, Labels.of(list("abcd"), palette, 255), case.opacity, BATCH)
    path = write_video(folder / "in.mp4", count, case)
    with VideoReader(path) as reader:
        frames = list(reader)
    batches = [frames[start : start + BATCH] for start in range(0, count, BATCH)]
    ids = [mask for batch in batches for mask in predictor.ids(batch)]
    ways: dict[str, Callable[[], object]] = {
        "read": partial(read, path),
        "model": lambda: [predictor.ids(batch) for batch in batches],
        "write": partial(write, by, folder / "alone", frames, ids, case.masks),
        "end to end": partial(whole, by, path, folder, case.masks),
    }
    walls: dict[str, list[float]] = {way: [] for way in ways}
    works: dict[str, list[float]] = {way: [] for way in ways}
    had: list[float] = []
    for _ in range(repeats):
        had.append(cores())
        for way, run in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            passed = run()
            walls[way].append(time.perf_counter() - start)
            works[way].append(time.process_time() - busy)
    assert isinstance(passed, Throughput) and passed.items == count
    fps = {way: count / statistics.median(seconds) for way, seconds in walls.items()}
    work = {way: 1000 * statistics.median(seconds) / count for way, seconds in works.items()}
    slowest = min(("read", "model", "write"), key=lambda way: fps[way])
    bound = 1000 * statistics.median(had) / work["end to end"]
    ratio = fps["end to end"] / fps[slowest]
    of_bound = fps["end to end"] / min(fps[slowest], bound)
    print(f"\n{name}: {count} frames of {case.size[1]} x {case.size[0]}, {device.type}")
    rows = [(way, f"{fps[way]:.1f}", f"{work[way]:.1f}") for way in ways]
    print(tabulate(rows, ["way", "frames/s", "processor ms a frame"], disable_numparse=True))
    print(f"last turn, batches of {BATCH}: {passed.report()}")
    print(
        f"end to end / {slowest} alone: {ratio:.2f}; bound of {statistics.median(had):.2f} cores: {bound:.1f} frames/s"
    )
    print(f"end to end / the lower of both: {of_bound:.2f} (needed: {NEEDED})")
    print(
        f"PyAV {av.__version__}, torch {torch.__version__} with one thread, median of {repeats} turns, load "
        f"{os.getloadavg()[0]:.1f}",
        flush=True,
    )
    slower = f"the slower of {slowest} alone and all cores at work"
    tell(Row(f"video end to end, {name}, frames/s", slower, of_bound, NEEDED))
    return of_bound < NEEDED


def model() -> SegmentationModel:
    """Return a ViT of 12 blocks with a linear head, of random weights."""
    arch = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    torch.manual_seed(0)
    backbone = TransformersVit("dinov3_vit", arch, "random", 16)
    return SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, 4))


def cores() -> float:
    """Return how many cores' work this process gets now, with a thread on each."""
    data, count = bytes(2**20), count_cores()

    def hash_for(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            hashlib.sha256(data)

    start, busy = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(hash_for, [0.5] * count))
    return (time.process_time() - busy) / (time.perf_counter() - start)


def read(path: Path) -> None:
    with VideoReader(path) as reader:
        for _ in reader:
            pass


def write(by: SegmentationSettings, folder: Path, frames: list[np.ndarray], ids: list[np.ndarray], masks: bool) -> None:
    with VideoWriter(folder / "alone.mp4", 30, frames[0].shape[:2]) as writer:
        for number, (frame, mask) in enumerate(zip(frames, ids, strict=True)):
            if masks:
                write_png(folder / f"{number:09d}.png", mask)
            writer.write(blend(frame, mask, by.labels.palette, ignore_index=255, opacity=by.opacity))


def whole(by: SegmentationSettings, path: Path, folder: Path, masks: bool) -> Throughput | None:
    out = Path(tempfile.mkdtemp(dir=folder))
    video = VideoInput("v", path)
    return segment_video(by, video, ImageRun(out, None, DoneInputs(out)), VideoOptions(masks))


def write_video(path: Path, count: int, case: Case) -> Path:
    """Write a scene that moves, of many fine structures, or noise."""
    draw = np.random.default_rng(0)
    height, width = case.size
    grain = 1 if case.noise else 4
    scene = draw.integers(0, 256, (height // grain, width // grain, 3)).astype(np.uint8)
    scene = scene.repeat(grain, axis=0).repeat(grain, axis=1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": str(case.crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(count):
            shown = np.roll(scene, 3 * index, axis=index % 2 if case.noise else 1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        file.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
