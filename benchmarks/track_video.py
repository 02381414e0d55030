"""Print the frames/s of following objects through a video, from file to masks, against the dense form of propagation.

`OMP_NUM_THREADS=1 python benchmarks/track_video.py [--frames 10] [--size 480 854] [--short 960] [--width 384]`: a drawn
video in H.264 with a mask for its first frame; a ViT/16 of 12 blocks and random weights, all of decoding, resizing,
backbone, propagation and writing as `mode=track` does it, one thread. The reference differs in one place alone: it
compares each cell with all cells of all context frames by one matrix product, as `tracking.py` does. Ways take turns,
the least of `--repeats` counts, in processor seconds. Exits with 1 where the masks differ.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from predict_video import Case, write_video
from rows import Row, machine, tell
from tabulate import tabulate
from torch import Tensor
from tracking import dense, too_far

from dinoseg.core.contracts import Backbone
from dinoseg.extensions.tracking.grid.propagator import ContextFrame
from dinoseg.extensions.tracking.grid.settings import MatchSettings
from dinoseg.extensions.tracking.propagation.settings import PropagationSettings
from dinoseg.extensions.tracking.propagation.tracker import PropagationTracker
from dinoseg.extensions.tracking.video.labels import TrackLabels
from dinoseg.extensions.tracking.video.run import TrackJob, track_video
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.utils.images import write_png

MATCH = "dinoseg.extensions.tracking.grid.propagator.match"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 854))
    parser.add_argument("--short", type=int, default=960, help="shorter side, as the backbone sees it")
    parser.add_argument("--width", type=int, default=384, help="of the backbone")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone = made(args.width)
    seconds: dict[str, float] = dict.fromkeys(("dense", "dinoseg"), float("inf"))
    masks = {}
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder)
        video = write_video(given / "in.mp4", args.frames, Case(tuple(args.size)))
        for turn in range(args.repeats):
            for way in seconds:
                out = given / f"{way}{turn}"
                start = time.process_time()
                with patch(MATCH, all_to_all) if way == "dense" else nullcontext():
                    follow(backbone, video, out, args)
                seconds[way] = min(seconds[way], time.process_time() - start)
                masks[way] = {path.name: path.read_bytes() for path in sorted((out / "masks").iterdir())}
    rates = {way: args.frames / busy for way, busy in seconds.items()}
    print(tabulate(list(rates.items()), ("way", "frames / processor s"), floatfmt=".3g"))
    same = masks["dense"] == masks["dinoseg"]
    print(f"{args.frames} frames of {args.size[1]} x {args.size[0]}, shorter side {args.short}; ", end="")
    print(f"same masks: {same};", machine(("torch", "av")))
    what = f"label propagation end to end, ViT/16 of width {args.width}, frames/s"
    tell(Row(what, "all similarities as one matrix", rates["dinoseg"] / rates["dense"]))
    return int(not same)


def made(width: int) -> Backbone:
    arch = {"hidden_size": width, "num_hidden_layers": 12, "num_attention_heads": width // 64}
    torch.manual_seed(0)
    backbone = TransformersVit("dinov3_vit", {**arch, "intermediate_size": 4 * width}, "random", 16, (-1,))
    return backbone.requires_grad_(False).eval()


def follow(backbone: Backbone, video: Path, out: Path, args: argparse.Namespace) -> None:
    """Write the masks of all frames of a video whose first mask has four columns."""
    height, width = args.size
    first = out / "first.png"
    write_png(first, np.broadcast_to(np.arange(width) * 4 // width, (height, width)).astype(np.uint8))
    with VideoReader(video) as frames:
        tracker = PropagationTracker(backbone, PropagationSettings(short_side=args.short), batch_size=2)
        track_video(TrackJob(tracker, frames, TrackLabels({0: first}, (height, width)), out, batch_size=2))


def all_to_all(target: Tensor, frames: Sequence[ContextFrame], settings: MatchSettings) -> Tensor:
    """Return the labels (h, w, L) of a target (h, w, C) by all similarities to the context."""
    grid = (target.shape[0], target.shape[1])
    if grid not in OUTSIDE:
        OUTSIDE[grid] = too_far(grid)
    state = {
        "features": torch.stack([features for features, _ in frames]),
        "labels": torch.stack([labels for _, labels in frames]),
    }
    return dense(target.permute(2, 0, 1), state, OUTSIDE[grid]).permute(1, 2, 0).contiguous()


OUTSIDE: dict[tuple[int, int], Tensor] = {}  # by grid: it is made once for a video


if __name__ == "__main__":
    sys.exit(main())
