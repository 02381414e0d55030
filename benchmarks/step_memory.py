"""Print the memory that mode=plan foretells of a training step against what real steps take, model by model.

`python benchmarks/step_memory.py [--only NAME] [--crop 256 256]`: three steps of each model of random weights on drawn
images, in a process of its own. The reference is the peak of resident memory above what the process held before the
model was made, once where the C library returns what is freed (MALLOC_MMAP_THRESHOLD_=65536) and the code that a step
runs has been read, which is what tensors take, and once as it comes, in a new process whose heap keeps holes: against
this stands all that is foretold, holes and libraries included. Exits with 1 where the foretold tensors are off the
first by more than MOST and SLACK, or all that is foretold is below LEAST of the second.
"""

import argparse
import os
import platform
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tabulate import tabulate

import dinoseg
from dinoseg.config.job import job_config
from dinoseg.config.nodes import instantiate
from dinoseg.config.resolvers import register_resolvers
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto.random_batch import random_batch
from dinoseg.extensions.auto.step_bytes import LossBytes, step_bytes
from dinoseg.extensions.auto.target import Target
from dinoseg.extensions.auto.training_parts import training_parts
from dinoseg.extensions.auto.trial import try_steps

MAX = 0.1  # share
SLACK = 16 * 2**20  # bytes that Python and its libraries take by chance, of which tiny models have no more
MIN = 0.8
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
    "full checkpointing": (*VIT, "adapter=full", "backbone.checkpointing=true"),
    "last_blocks checkpointing": (*VIT, "adapter=last_blocks", "backbone.checkpointing=true"),
    "tiny full": (*BASE, "backbone=tiny", "adapter=full"),
    "tiny full checkpointing": (*BASE, "backbone=tiny", "adapter=full", "backbone.checkpointing=true"),
    "tiny lora checkpointing": (*BASE, "backbone=tiny", "adapter=lora", "backbone.checkpointing=true"),
    "slots": (*VIT[:2], "hparam=dinosavi_control", "backbone=dinov3_vits16", "data.batch_size=2"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--crop", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--foretold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        cfg = config([*MODELS[args.one], f"resolution.crop=[{args.crop[0]},{args.crop[1]}]"])
        print(*(() if args.measured else foretold(cfg)), *(() if args.foretold else (measured(cfg),)))
        return 0
    rows, failed = [], False
    for name in args.only:
        tensors, _, tight = run(name, MALLOC_MMAP_THRESHOLD_="65536")
        (loose,) = run(name, "--measured")
        _, need = run(name, "--foretold")
        failed |= abs(tensors - tight) > max(MAX * tight, SLACK) or need < MIN * loose
        rows.append((name, tensors / MIB, tight / MIB, tensors / tight, need / MIB, loose / MIB, need / loose))
    headers = ("model", "tensors MiB", "measured", "ratio", "all MiB", "measured", "ratio")
    print(tabulate(rows, headers=headers, floatfmt=("", ".0f", ".0f", ".3f", ".0f", ".0f", ".3f")))
    print(f"\ncrops of {args.crop[0]} x {args.crop[1]}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    return int(failed)


def run(name: str, *options: str, **environment: str) -> list[float]:
    """Return the foretold and the measured bytes of a model, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, *options]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings)
    return list(map(float, done.stdout.splitlines()[-1].split()))


def config(words: list[str]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(Path(dinoseg.__file__).parent / "cfg"), version_base="1.3"):
        composed = compose("main", [*words, "backbone.weights=random"], return_hydra_config=True)
    return job_config(composed, composed.hydra.runtime)


def foretold(cfg: DictConfig) -> tuple[int, int]:
    """Return the bytes of a step's tensors, and of all that it takes."""
    bf16, parts = cfg.engine.precision == "bf16", training_parts(Builder(cfg))
    loss = LossBytes(parts, bf16=bf16, accelerator=False)
    step = step_bytes(parts, loss, samples=parts.batch_size, accumulate=parts.accumulate, bf16=bf16)
    return step.peak, Target("cpu", 0, bf16=bf16).need(step)


def measured(cfg: DictConfig) -> int:
    """Return the bytes that real steps take."""
    engine, parts = instantiate(cfg.engine), training_parts(Builder(cfg))
    return try_steps(parts, engine, repeat(random_batch(parts, parts.batch_size)), steps=3).peak


if __name__ == "__main__":
    sys.exit(main())
