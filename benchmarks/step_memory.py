"""Print the memory that mode=plan foretells of a training step against what real steps take, model by model.

`python benchmarks/step_memory.py [--only NAME] [--crop 256 256]`: three steps of each model of random weights on drawn
images, in a process of its own. The reference is the peak of resident memory above what the process held before the
model was made, once where the C library returns what is freed (MALLOC_MMAP_THRESHOLD_=65536), which is what tensors
take, and once as it comes, where its heap keeps holes. Exits with 1 where the foretold peak is off the first by more
than MOST.
"""

import argparse
import os
import platform
import subprocess
import sys
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from tabulate import tabulate

import dinoseg
from dinoseg import build
from dinoseg.config.job import job_config
from dinoseg.config.nodes import instantiate
from dinoseg.config.resolvers import register_resolvers
from dinoseg.costs.stand_in import drawn_batch
from dinoseg.costs.step_bytes import LossBytes, step_bytes
from dinoseg.costs.trial import try_steps

MOST = 0.1  # share
MIB = 2**20
BASE = ("engine=cpu", "engine.precision=fp32", "data.classes=[a,b,c,d,e,f,g]", "data.batch_size=4")
VIT = (*BASE, "backbone=dinov3_vits16")
MODELS = {
    "frozen linear": VIT,
    "frozen dpt": (*VIT, "head=dpt"),
    "frozen mask2former": (*VIT, "head=mask2former", "loss=mask_classification", "data.batch_size=2"),
    "frozen upernet": (*VIT, "head=upernet"),
    "lora linear": (*VIT, "adapter=lora"),
    "lora linear bf16": (*VIT, "adapter=lora", "engine.precision=bf16"),
    "lora checkpointing": (*VIT, "adapter=lora", "backbone.checkpointing=true"),
    "lora blocks=3": (*VIT, "adapter=lora", "adapter.blocks=3"),
    "lora_all mlp, 2 x 2": (*VIT, "adapter=lora_all", "head=mlp", "data.batch_size=2", "trainer.accumulate=2"),
    "full cnn ema": (*VIT, "adapter=full", "head=cnn", "trainer.ema=0.99"),
    "full eomt": (*VIT, "adapter=full", "head=eomt", "head.blocks=3", "loss=mask_classification"),
    "last_blocks lovasz": (*VIT, "adapter=last_blocks", "loss=lovasz"),
    "convnext frozen upernet": (*BASE, "backbone=dinov3_convnext_tiny", "head=upernet"),
    "qlora linear": (*VIT, "adapter=qlora", "engine.precision=bf16"),
    "slots": (*VIT[:2], "hparam=dinosavi/control", "backbone=dinov3_vits16", "data.batch_size=2"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--crop", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*foretold_and_measured([*MODELS[args.one], f"resolution.crop=[{args.crop[0]},{args.crop[1]}]"]))
        return 0
    rows, failed = [], False
    for name in args.only:
        foretold, tight = run(name, MALLOC_MMAP_THRESHOLD_="65536")
        _, loose = run(name)
        failed |= abs(foretold / tight - 1) > MOST
        rows.append((name, foretold / MIB, tight / MIB, foretold / tight, loose / MIB, foretold / loose))
    headers = ("model", "foretold MiB", "measured", "ratio", "with holes", "ratio")
    print(tabulate(rows, headers=headers, floatfmt=("", ".0f", ".0f", ".3f", ".0f", ".3f")))
    print(f"\ncrops of {args.crop[0]} x {args.crop[1]}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    return int(failed)


def run(name: str, **environment: str) -> tuple[float, float]:
    """Return the foretold and the measured bytes of a model, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings)
    foretold, measured = map(float, done.stdout.split()[-2:])
    return foretold, measured


def foretold_and_measured(words: list[str]) -> tuple[int, int]:
    register_resolvers()
    with initialize_config_dir(str(Path(dinoseg.__file__).parent / "cfg"), version_base="1.3"):
        composed = compose("main", [*words, "backbone.weights=random"], return_hydra_config=True)
    cfg = job_config(composed, composed.hydra.runtime.choices)
    engine = instantiate(cfg.engine)
    samples, accumulate = cfg.data.batch_size, cfg.trainer.accumulate
    loss = LossBytes(cfg, bf16=engine.bf16, accelerator=False)
    foretold = step_bytes(cfg, loss, samples=samples, accumulate=accumulate, bf16=engine.bf16)
    batches = repeat(drawn_batch(cfg, samples))
    trial = try_steps(cfg, partial(build.model, cfg, untrained=True), engine, batches, steps=3)
    return foretold.peak, trial.peak


if __name__ == "__main__":
    sys.exit(main())
