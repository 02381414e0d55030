"""Print how long AdamW, gradient scaling and the moving average of the weights take, against one tensor at a time.

`OMP_NUM_THREADS=1 python benchmarks/optimizer_step.py [--device cpu] [--width 384] [--blocks 12] [--repeats 9]`: the
parameters of a ViT-S, with random gradients. Both ways run in turns; the median of each counts. Before that, the script
checks that both give the same numbers.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rows import Row, machine, tell
from tabulate import tabulate
from torch import Tensor, nn

from dinoseg.training.optim import MovingAverage, scale_gradients

DECAY, STEP = 0.999, 10**5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    rows = []
    sides = [Side(given.device, given.width, given.blocks, together=together) for together in (False, True)]
    for what in ("adamw", "scaling", "average"):
        seconds: list[list[float]] = [[], []]
        for _ in range(given.repeats + 1):  # the first round warms up
            for found, side in zip(seconds, sides, strict=True):
                found.append(timed(getattr(side, what), given.device))
        one, two = (side.parameters for side in sides)
        torch.testing.assert_close(one, two)
        before, after = (median(found[1:]) for found in seconds)
        rows.append((what, 1e3 * before, 1e3 * after, before / after))
        tell(Row(f"{what}, {given.device}, time", "one tensor at a time", before / after))
    count = sum(parameter.numel() for parameter in sides[0].parameters)
    print(tabulate(rows, ("", "one at a time, ms", "dinoseg, ms", "ratio"), floatfmt=".3g"))
    print(f"{count:,} numbers in {len(sides[0].parameters)} tensors; {machine()}")


class Side:
    """A model with gradients, updated by dinoseg or one tensor at a time."""

    def __init__(self, device: str, width: int, blocks: int, *, together: bool) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width)
        model = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False).to(device)
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter)
        kernels = {"fused": True} if together else {"fused": False, "foreach": False}
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, **kernels)
        self._average, self._together = MovingAverage(model.named_parameters(), DECAY), together
        self._scale = torch.tensor(0.999, dtype=torch.float64, device=device if device == "cuda" else "cpu")

    def adamw(self) -> None:
        """Take a step of AdamW."""
        self._optimizer.step()

    def scaling(self) -> None:
        """Multiply all gradients by a number."""
        if self._together:
            scale_gradients(self.parameters, self._scale)
            return
        for parameter in self.parameters:
            assert isinstance(parameter.grad, Tensor)
            parameter.grad.mul_(self._scale.to(parameter.grad.dtype))

    @torch.no_grad()
    def average(self) -> None:
        """Move the average of the weights."""
        if self._together:
            self._average.update(STEP)
            return
        for name, value in self._average.live.items():
            self._average.average[name].lerp_(value.detach(), 1 - DECAY)


def timed(call: Callable[[], None], device: str) -> float:
    """Return the seconds of a call, the device's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
