"""Time and memory of ensembles on the CPU: members that share a frozen backbone, members that do not, one at a time.

python benchmarks/ensembles.py [WEIGHTS]

WEIGHTS is a file of timm's vit_tiny_patch16_224; without it the weights are random, which changes no figure. Weights
are the distinct bytes of all models that are on the device at a time. Activations are the peak bytes that operations
of one prediction have allocated (`PeakBytes`), results included. Times are medians of interleaved repeats.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import dinoseg
from dinoseg.inference.memory import PeakBytes

SIZE, CLASSES, MEMBERS, REPEATS = (480, 640), 11, (1, 3, 5), 5


def write_models(folder, weights):
    """Write five models of one frozen backbone with heads of their own, and five with other backbones."""
    files = {"shared": [], "separate": []}
    for number in range(max(MEMBERS)):
        torch.manual_seed(number)
        keys = {"name": "vit_tiny_patch16_224", "mean": [0.5] * 3, "std": [0.5] * 3, "weights": weights or "random"}
        of_backbone = {f"backbone.{key}": value for key, value in keys.items()}
        model = dinoseg.create_model("timm", head="linear", adapter="frozen", num_classes=CLASSES, **of_backbone)
        for kind, factor in (("shared", 1.0), ("separate", 1.0 + number / 1000)):
            with torch.no_grad():
                next(model.backbone.parameters()).mul_(factor)
            files[kind].append(folder / f"{kind}{number}.safetensors")
            model.save(files[kind][-1])
    return files


def weight_bytes(models):
    """Return the bytes of the distinct tensors of models."""
    tensors = {value.data_ptr(): value.nbytes for model in models for value in model.state_dict().values()}
    return sum(tensors.values())


def main():
    """Print a row for each kind and number of members."""
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as name:
        files = write_models(Path(name), sys.argv[1] if len(sys.argv) > 1 else None)
        loaded = {("one model", 1, False): dinoseg.load(files["shared"][0], device="cpu", precision="fp32")}
        for count in MEMBERS[1:]:
            for kind, paths in files.items():
                for offload in (False, True):
                    loaded[kind, count, offload] = dinoseg.load(
                        paths[:count], device="cpu", precision="fp32", offload=offload
                    )
        times = {key: [] for key in loaded}
        for _ in range(REPEATS):
            for key, model in loaded.items():
                start = time.perf_counter()
                model.runtime.probabilities([image])
                times[key].append(time.perf_counter() - start)
    print("| members | count | offload | ms | weights, MB | activations, MB |\n|---|---|---|---|---|---|")
    for (kind, count, offload), model in loaded.items():
        strategy = model.runtime.predictor.strategy
        groups = [model.model] if count == 1 else [each.model for each in strategy.groups_of(SIZE).values()]
        held = max(map(weight_bytes, [[each] for each in groups])) if offload else weight_bytes(groups)
        with PeakBytes() as peak:
            model.runtime.probabilities([image])
        milliseconds = 1000 * statistics.median(times[kind, count, offload])
        print(f"| {kind} | {count} | {offload} | {milliseconds:.0f} | {held / 1e6:.1f} | {peak.most / 1e6:.1f} |")


if __name__ == "__main__":
    main()
