"""Print the end-to-end FPS of predicting a video against its slowest stage alone, in turns within one run.

`OMP_NUM_THREADS=1 python benchmarks/predict_video.py [--frames 90] [--size 360 640] [--dim 192] [--repeats 3]`. The
stages are those of mode=predict: decoding H.264, a ViT of random weights with a linear head, and blending and encoding
H.264. Alone each has nothing beside it: its input is ready, its output dropped. Exits with 1 where the ratio misses its
bound.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from tabulate import tabulate

from dinoseg.backbones.transformers_vit import TransformersVit
from dinoseg.data.classes.labels import Labels
from dinoseg.heads.linear import LinearHead
from dinoseg.inference.done import DoneInputs
from dinoseg.inference.image_run import ImageRun, Segmentation
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.video_file import VideoReader
from dinoseg.inference.video_run import VideoInput, VideoOptions, segment_video
from dinoseg.inference.video_writer import VideoWriter
from dinoseg.model import Segmenter
from dinoseg.report.overlay import blend

NEEDED = 0.9
BATCH = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=90)
    parser.add_argument("--size", type=int, nargs=2, default=(360, 640))
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by = Segmentation(
        Predictor(model(args.dim).to(device).eval(), device, nullcontext), Labels.of(list("abcd"), None, 255)
    )
    with tempfile.TemporaryDirectory() as name:
        return compared(by, Path(name), args)


def compared(by: Segmentation, folder: Path, args: argparse.Namespace) -> int:
    path = write_video(folder / "in.mp4", args.frames, tuple(args.size))
    with VideoReader(path) as reader:
        frames = list(reader)
    batches = [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]
    ids = [mask for batch in batches for mask in by.predictor.ids(batch)]
    ways: dict[str, Callable[[], object]] = {
        "read": partial(read, path),
        "model": lambda: [by.predictor.ids(batch) for batch in batches],
        "write": partial(write, by, folder / "alone.mp4", frames, ids),
    }
    times: dict[str, list[float]] = {way: [] for way in (*ways, "end to end")}
    for turn in range(args.repeats):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - start)
        out = folder / str(turn)
        passed = segment_video(
            by, VideoInput("v", partial(VideoReader, path), path), ImageRun(out, None, DoneInputs(out)), VideoOptions()
        )
        assert passed is not None and passed.items == args.frames
        times["end to end"].append(passed.seconds)
    fps = {way: args.frames / statistics.median(seconds) for way, seconds in times.items()}
    slowest = min(ways, key=lambda way: fps[way])
    ratio = fps["end to end"] / fps[slowest]
    print(tabulate([(way, f"{rate:.1f}") for way, rate in fps.items()], ["way", "frames/s"], disable_numparse=True))
    print(f"last turn, batches of {BATCH}: {passed.report()}")
    print(f"end to end / {slowest} alone: {ratio:.2f} (needed: {NEEDED})")
    print(
        f"{args.frames} frames of {args.size[1]} x {args.size[0]}, {by.predictor.device.type}, PyAV {av.__version__}, "
        f"torch {torch.__version__}, one thread of torch, median of {args.repeats} turns"
    )
    return int(ratio < NEEDED)


def model(dim: int) -> Segmenter:
    """Return a ViT of 12 blocks with a linear head, of random weights."""
    arch = {"hidden_size": dim, "num_hidden_layers": 12, "num_attention_heads": dim // 64, "intermediate_size": 4 * dim}
    torch.manual_seed(0)
    backbone = TransformersVit("dinov3_vit", arch, "random", 16)
    return Segmenter(backbone, LinearHead(backbone.dim, backbone.num_layers, 4))


def read(path: Path) -> None:
    with VideoReader(path) as reader:
        for _ in reader:
            pass


def write(by: Segmentation, path: Path, frames: list[np.ndarray], ids: list[np.ndarray]) -> None:
    with VideoWriter(path, 30, frames[0].shape[:2]) as writer:
        for frame, mask in zip(frames, ids, strict=True):
            writer.write(blend(frame, mask, by.labels.palette, ignore_index=255, opacity=by.opacity))


def write_video(path: Path, count: int, size: tuple[int, int]) -> Path:
    """Write a scene that moves, of many fine structures."""
    draw = np.random.default_rng(0)
    scene = np.repeat(np.repeat(draw.integers(0, 256, (size[0] // 4, size[1] // 4, 3)), 4, 0), 4, 1).astype(np.uint8)
    with VideoWriter(path, 30, scene.shape[:2]) as writer:
        for index in range(count):
            writer.write(np.roll(scene, 3 * index, axis=1))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
