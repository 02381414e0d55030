"""Print time and memory of class ids of a mixture of masks, against mixing all masks at all pixels.

`python benchmarks/mask_class_ids.py [--size 1088 1920] [--threads 1] [--repeats 3]`: masks at a quarter of the size,
100 of them, of which some lie on regions of the image and the others are hardly anything, as of a trained model; or all
of them noise, as of an untrained one. Both ways in turn on the same masks, the least of the repeats. Exits with 1 where
ids differ whose scores do not tie.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rows import Row, machine, tell
from tabulate import tabulate
from torch import Tensor

from dinoseg.core.class_ids import argmax_ids, mixed_class_ids
from dinoseg.core.shapes import MaskOutputs
from dinoseg.inference.memory import PeakBytes
from dinoseg.models.heads.semantic import semantic_map, weighted_masks

QUERIES = 100
GIVEN = ((12, 19), (40, 19), (20, 150), (0, 19))  # masks on regions, classes
Size = tuple[int, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1088, 1920))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = (args.size[0], args.size[1])
    rows, differing = [], 0
    for regions, classes in GIVEN:
        outputs = drawn(regions, classes, size)
        seconds, mebibytes, ids = measured(outputs, size, args.repeats)
        differing += apart(outputs, ids["usual"], ids["ours"], size)
        row = [f"{regions} regions, {classes} classes" if regions else f"noise, {classes} classes"]
        for what, numbers, form in (("time", seconds, ".2f"), ("memory", mebibytes, ".0f")):
            ratio = numbers["usual"] / numbers["ours"]
            row += [*(f"{numbers[way]:{form}}" for way in WAYS), f"{ratio:.1f}"]
            tell(Row(f"class ids of {row[0]}, {what}", "all masks at all pixels", ratio))
        rows.append(row)
    print(tabulate(rows, headers=("masks", "usual s", "ours s", "ratio", "usual MiB", "ours MiB", "ratio")))
    print(f"\nids of {size[0]} x {size[1]}; {differing} ids differ that do not tie; usual: all masks upsampled and")
    print(f"mixed at all pixels, then the highest class; {args.threads} threads; {machine()}")
    return int(differing > 0)


def drawn(regions: int, classes: int, size: Size) -> MaskOutputs:
    """Return masks of so many regions with edges, and of nothing; or of noise."""
    torch.manual_seed(0)
    grid = (-(-size[0] // 4), -(-size[1] // 4))
    scores, masks = torch.randn(1, QUERIES, classes + 1), torch.randn(1, QUERIES, *grid)
    if regions:
        field = F.interpolate(4 * torch.randn(1, regions, 5, 8), grid, mode="bicubic")
        first, second = field.topk(2, 1).values.split(1, dim=1)
        inside = 20 * (field - torch.where(field == first, second, first))
        masks[:, :regions] = 0.5 * masks[:, :regions] + inside.clamp(-9, 7)
        masks[:, regions:] -= 7
        scores[..., -1] += 6
        scores[:, :regions, -1] -= 6
        scores[:, torch.arange(regions), torch.randint(classes, (regions,))] += 8
    return MaskOutputs(scores, masks)


def usual(outputs: MaskOutputs, size: Size) -> Tensor:
    """Return ids of all masks at all pixels."""
    return argmax_ids(semantic_map(outputs, size, (1.0, 1.0)))


def ours(outputs: MaskOutputs, size: Size) -> Tensor:
    """Return ids tile by tile."""
    return mixed_class_ids(*weighted_masks(outputs), size, (1.0, 1.0))


WAYS: dict[str, Callable[[MaskOutputs, Size], Tensor]] = {"usual": usual, "ours": ours}


def measured(
    outputs: MaskOutputs, size: Size, repeats: int
) -> tuple[dict[str, float], dict[str, float], dict[str, Tensor]]:
    """Return the least seconds of each way, the most MiB that its tensors take at a time, and its ids."""
    seconds, mebibytes, ids = dict.fromkeys(WAYS, float("inf")), {}, {}
    with torch.inference_mode():
        for _ in range(repeats):
            for way, function in WAYS.items():
                start = time.perf_counter()
                ids[way] = function(outputs, size)
                seconds[way] = min(seconds[way], time.perf_counter() - start)
        for way, function in WAYS.items():
            with PeakBytes() as peak:
                function(outputs, size)
            mebibytes[way] = peak.most / 2**20
    return seconds, mebibytes, ids


def apart(outputs: MaskOutputs, usual: Tensor, ours: Tensor, size: Size) -> int:
    """Return how many ids differ where the two classes' scores do by more than rounding."""
    if torch.equal(usual, ours):
        return 0
    scores = semantic_map(outputs, size, (1.0, 1.0))
    first, second = (scores.gather(1, ids[:, None].long()) for ids in (usual, ours))
    return int((first - second > 1e-5).sum())


if __name__ == "__main__":
    sys.exit(main())
