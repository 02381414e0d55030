"""Print memory and time of windows whose finished rows are freed, against keeping full-size scores, side by side.

`OMP_NUM_THREADS=1 python benchmarks/windows.py [--size 3072 2048] [--classes 19] [--window 512] [--overlap 0.25]`: each
way in a process of its own, one thread, the same random ViT; the reference keeps scores and counts of the whole image
and divides at the end, as mmsegmentation does. Exits with 1 where it takes less than its least multiple of our memory.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext

import numpy as np
import torch
from rows import Row, tell
from tabulate import tabulate
from torch import Tensor

from dinoseg.inference.predictor import Predictor
from dinoseg.inference.windows import Windows, starts
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel

MIN = 3.0
ARCH = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(3072, 2048))
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--way", choices=("freed", "kept"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way:
        print(*measured(args))
        return 0
    found = {way: run(way) for way in ("freed", "kept")}
    rows = [(way, f"{memory / MIB:.0f}", f"{seconds:.1f}") for way, (memory, seconds, _) in found.items()]
    ratio = found["kept"][0] / found["freed"][0]
    print(tabulate(rows, headers=("rows that are done", "MiB above the model's", "s")))
    print(f"\nkept / freed: memory {ratio:.1f} (at least {MIN}), time {found['kept'][1] / found['freed'][1]:.2f}")
    print(f"{args.size[0]} x {args.size[1]}, {args.classes} classes, windows of {args.window}; same mask: ", end="")
    print(found["kept"][2] == found["freed"][2])
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    tell(Row("windows, memory above the model's", "scores of the whole image kept", ratio, MIN))
    return int(ratio < MIN or found["kept"][2] != found["freed"][2])


def run(way: str) -> tuple[float, float, str]:
    """Return bytes, seconds and the mask's fingerprint of one way, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    memory, seconds, mask = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(memory), float(seconds), mask


def measured(args: argparse.Namespace) -> tuple[int, float, str]:
    """Return the bytes above those of a single window, seconds, and a fingerprint of the mask."""
    torch.manual_seed(0)
    backbone = TransformersVit("dinov3_vit", ARCH, "random", 16, (-1,))
    model = SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, args.classes)).eval()
    strategy = Windows(args.window, overlap=args.overlap, weights="uniform", average="scores", batch_size=1)
    predictor = Predictor(model, torch.device("cpu"), nullcontext, strategy)
    image = np.random.default_rng(0).integers(0, 256, (*args.size, 3), dtype=np.uint8)
    predictor.ids([image[: args.window, : args.window]])
    before, start = peak(), time.perf_counter()
    ids = predictor.ids([image])[0] if args.way == "freed" else kept(model, image, args).numpy()
    return peak() - before, time.perf_counter() - start, f"{zlib.crc32(ids.tobytes()):08x}"


@torch.inference_mode()
def kept(model: SegmentationModel, image: np.ndarray, args: argparse.Namespace) -> Tensor:
    """Return class ids of an image, of full-size sums and counts."""
    height, width = args.size
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    total, counts = torch.zeros(1, args.classes, height, width), torch.zeros(1, 1, height, width)
    for top in starts(height, args.window, args.overlap):
        for left in starts(width, args.window, args.overlap):
            place = (..., slice(top, top + args.window), slice(left, left + args.window))
            total[place] += model(pixels[place]).scores()
            counts[place] += 1
    return (total / counts).argmax(dim=1)[0].to(torch.uint8)


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
