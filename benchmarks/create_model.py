"""Time `dinoseg.create_model` against `timm.create_model`, of the same ViT-S with random weights, in turns.

`python benchmarks/create_model.py [--repeats 5]`: both build it once before, so imports do not count. dinoseg also
composes and checks the config, and adds a linear head. Printed are the least seconds of the repeats and their ratio,
dinoseg over timm; at most 1.5 is promised.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import timm
from rows import Row, machine, tell
from tabulate import tabulate

import dinoseg

MAX = 1.5
MODELS = {"dinov2_vits14": "vit_small_patch14_dinov2", "dinov3_vits16": "vit_small_patch16_dinov3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    table = []
    for ours, theirs in MODELS.items():
        makers: dict[str, Callable[[], object]] = {
            "timm": lambda name=theirs: timm.create_model(name, pretrained=False),
            "dinoseg": lambda name=ours: dinoseg.create_model(name, num_classes=2, weights="random"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(args.repeats + 1):
            for name, make in makers.items():
                start = perf_counter()
                make()
                seconds[name].append(perf_counter() - start)
        least = {name: min(times[1:]) for name, times in seconds.items()}
        ratio = least["dinoseg"] / least["timm"]
        table.append([ours, *(f"{least[name]:.2f}" for name in makers), f"{ratio:.2f}"])
        tell(Row(f"dinoseg.create_model of {ours}, time", f"timm.create_model of {theirs}", 1 / ratio, 1 / MAX))
    print(tabulate(table, headers=("model", "timm s", "dinoseg s", "ratio")))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
