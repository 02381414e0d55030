"""Print what attention of bfloat16 costs on a CPU as matrix products, against torch's fused attention.

`python benchmarks/attention.py [--shapes 4x3x661 ...] [--channels 64] [--threads 1] [--repeats 8]`: images x heads x
tokens of drawn noise, values alone and with their gradients, both ways in turn, the least of the repeats; beside it how
far the gradients of either are from those in float64 (the norm of the difference over theirs). Products are taken on
processors that have fast ones of bfloat16, and no AMX: on others the table shows why not.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rows import Row, machine, tell
from tabulate import tabulate
from torch import Tensor

from dinoseg.models.backbones.attention import by_products

SHAPES = ("4x3x661", "2x6x1321", "4x12x265")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shapes:
        parts, upstream = drawn(*map(int, shape.split("x")), args.channels)
        for what, step in (("values", values), ("values and gradients", gradients)):
            ways = {name: partial(step, way, parts, upstream) for name, way in WAYS.items()}
            seconds = least(ways, args.repeats)
            ratio = seconds["torch"] / seconds["products"]
            off = [f"{error(of, parts, upstream):.2%}" for of in WAYS.values()] if step is gradients else ["", ""]
            rows.append([shape, what, *(f"{1000 * seconds[way]:.1f}" for way in WAYS), f"{ratio:.2f}", *off])
            tell(Row(f"attention of {shape} in bfloat16, {what}, time", "torch's fused attention", ratio))
    headers = ("images x heads x tokens", "", "torch ms", "ours ms", "ratio", "torch off", "ours off")
    print(tabulate(rows, headers=headers))
    print(f"\n{args.channels} channels a head, {args.threads} threads; {machine()}")


def usual(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend as torch does."""
    return F.scaled_dot_product_attention(query, key, value)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by products, whatever the processor."""
    return by_products(query, key, value, query.shape[-1] ** -0.5)


WAYS: dict[str, Callable[..., Tensor]] = {"torch": usual, "products": ours}


def drawn(images: int, heads: int, tokens: int, channels: int) -> tuple[list[Tensor], Tensor]:
    """Return queries, keys and values as one projection gives them, and what asks for their gradients."""
    torch.manual_seed(0)
    projected = torch.randn(images, tokens, 3, heads, channels).bfloat16().permute(2, 0, 3, 1, 4)
    return list(projected), torch.randn(images, heads, tokens, channels).bfloat16()


def values(way: Callable[..., Tensor], parts: list[Tensor], _upstream: Tensor) -> None:
    """Attend, with nothing to learn."""
    with torch.no_grad():
        way(*parts)


def gradients(way: Callable[..., Tensor], parts: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Attend, and return the gradients of queries, keys and values."""
    leaves = [part.detach().requires_grad_() for part in parts]
    return list(torch.autograd.grad(way(*leaves), leaves, upstream))


def error(way: Callable[..., Tensor], parts: list[Tensor], upstream: Tensor) -> float:
    """Return how far gradients are from those in float64, over the norm of these; the largest of the three."""
    exact = gradients(usual, [part.double() for part in parts], upstream.double())
    return max(
        float((found.double() - true).norm() / true.norm())
        for found, true in zip(gradients(way, parts, upstream), exact, strict=True)
    )


def least(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least seconds of each way, taken in turns; the first round warms up."""
    found = dict.fromkeys(ways, float("inf"))
    for number in range(repeats + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            if number:
                found[name] = min(found[name], time.perf_counter() - begin)
    return found


if __name__ == "__main__":
    main()
