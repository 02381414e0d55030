"""Print memory and time of windows whose finished rows are freed, against keeping full-size scores, side by side.

`OMP_NUM_THREADS=1 python benchmarks/windows.py [--size 3072 2048] [--classes 19] [--window 512] [--overlap 0.25]`: each
way in a process of its own, one thread, the same random ViT; the reference keeps scores and counts of the whole image
and divides at the end, as mmsegmentation does. Exits with 1 where it takes less than its least multiple of our memory.

`... --strips 20000 [--kind png]` writes a picture of that side as a file (tif: uncompressed; png; jpg), segments it in
strips with the mean colour of patches for a backbone, and prints time and peak memory.
"""

import argparse
import multiprocessing
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import Row, tell
from tabulate import tabulate
from torch import Tensor

from dinoseg.inference.predictor import Predictor
from dinoseg.inference.windows import Windows, starts
from dinoseg.models.backbones.rgb import RgbBackbone
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
    parser.add_argument("--strips", type=int, metavar="SIDE")
    parser.add_argument("--kind", choices=("tif", "png", "jpg"), default="tif")
    parser.add_argument("--way", choices=("freed", "kept"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.strips:
        return strips(args)
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


def strips(args: argparse.Namespace) -> int:
    """Segment a large file in strips and print what it took."""
    torch.manual_seed(0)
    model = SegmentationModel(RgbBackbone(patch_size=16), LinearHead(3, 1, args.classes)).eval()
    strategy = Windows(args.window, overlap=args.overlap)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / f"large.{args.kind}", Path(folder) / "ids.png"
        # in a process of its own: a peak is not forgotten
        writer = multiprocessing.get_context("spawn").Process(target=WRITERS[args.kind], args=(source, args.strips))
        writer.start()
        writer.join()
        before, start = peak(), time.perf_counter()
        Predictor(model, torch.device("cpu"), nullcontext, strategy).write_ids(source, target)
        seconds, after = time.perf_counter() - start, peak()
        print(f"{args.strips} x {args.strips}, {args.classes} classes, windows of {args.window} px: {seconds:.0f} s")
        print(f"peak memory {after / MIB:.0f} MiB, of which {before / MIB:.0f} before the first row")
        print(
            f"image {source.stat().st_size / MIB:.0f} MiB, ids {target.stat().st_size / MIB:.1f} MiB; probabilities of",
            end=" ",
        )
        print(f"the whole image would be {args.strips**2 * args.classes * 4 / MIB:.0f} MiB")
    return 0


def write_tiff(path: Path, side: int) -> None:
    """Write the picture of `lines` as an uncompressed TIFF file, a row of it at a time."""
    bits, pixels = 512, 4096  # where they lie
    tags = {256: side, 257: side, 258: bits, 259: 1, 262: 2, 273: pixels, 277: 3, 278: side, 279: 3 * side**2, 284: 1}
    entries = [struct.pack("<HHII", tag, 4, 3 if tag == 258 else 1, value) for tag, value in tags.items()]
    header = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    with path.open("wb") as file:
        file.write(header.ljust(bits, b"\0") + struct.pack("<3I", 8, 8, 8))
        file.seek(pixels)
        for line in lines(side):
            file.write(line.tobytes())


def write_png(path: Path, side: int) -> None:
    """Write the same as a PNG file, of each row what differs from the row above."""
    packer, above = zlib.compressobj(1), np.zeros((side, 3), np.uint8)
    with path.open("wb") as file:

        def write(name: bytes, content: bytes) -> None:
            file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))

        file.write(b"\x89PNG\r\n\x1a\n")
        write(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        for line in lines(side):
            write(b"IDAT", packer.compress(b"\2" + (line - above).tobytes()))
            above = line
        write(b"IDAT", packer.flush())
        write(b"IEND", b"")


def write_jpeg(path: Path, side: int) -> None:
    """Write the same as a JPEG file."""
    image = Image.new("RGB", (side, side))
    for row, line in enumerate(lines(side)):
        image.paste(Image.fromarray(line[None]), (0, row))
    image.save(path)


def lines(side: int) -> Iterator[np.ndarray]:
    """Yield the rows (side, 3) of a square RGB picture of colours that change slowly."""
    across = np.linspace(0, 40, side)
    for row in range(side):
        phase = row / 300
        line = np.stack([np.sin(across + phase), np.cos(across - phase), np.sin(2 * across)], axis=1)
        yield (line * 127 + 128).astype(np.uint8)


WRITERS = {"tif": write_tiff, "png": write_png, "jpg": write_jpeg}


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
