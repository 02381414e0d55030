"""Print how long a training step takes on an idle machine and beside one busy process, by how threads wait.

`python benchmarks/busy.py [--threads 2] [--steps 12] [--size 224] [--spins 1000 3000]`: a ViT-Tiny whose blocks all
learn, in a process for each policy; the processes take turns, step by step, so that other load hits all alike. The
reference is OpenMP's default policy on the idle machine, in the same run; each figure is a median. `--spins` adds
other values of GOMP_SPINCOUNT.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

from rows import Row, machine, tell
from tabulate import tabulate

DEFAULT, OURS = "OpenMP's default", "dinoseg"
IDLE, BUSY = 1.3, 2.2  # times the default's idle step that ours may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--spins", nargs="*", default=[])
    parser.add_argument("--train", choices=(DEFAULT, OURS), help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.train:
        train(args.train, args.size)
        return
    policies = {DEFAULT: {}, OURS: {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
    policies |= {f"{spins} spins": {"GOMP_SPINCOUNT": spins} for spins in args.spins}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(start(name, told, args)) for name, told in policies.items()}
        idle = in_turn(processes, args.steps)
        busy_process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        stack.callback(busy_process.kill)
        busy = in_turn(processes, args.steps)
    reference = idle[DEFAULT]
    rows = [[name, idle[name], idle[name] / reference, busy[name], busy[name] / reference] for name in policies]
    headers = ("threads wait by", "idle s", "ratio", "beside one busy process s", "ratio")
    print(tabulate(rows, headers=headers, floatfmt=".2f"))
    print(f"\n{args.threads} threads; {machine()}")
    for where, seconds, most in (("idle", idle[OURS], IDLE), ("beside one busy process", busy[OURS], BUSY)):
        tell(Row(f"a step of a ViT-Tiny {where}, time", f"{DEFAULT} idle", reference / seconds, 1 / most))


def start(name: str, told: dict[str, str], args: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a process that trains a step for each line it reads, and wait until it is ready."""
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"OMP_NUM_THREADS": str(args.threads), **told}
    command = [sys.executable, __file__, "--train", OURS if name == OURS else DEFAULT, "--size", str(args.size)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and json.loads(process.stdout.readline()) == args.threads
    return process


def in_turn(processes: dict[str, subprocess.Popen[str]], steps: int) -> dict[str, float]:
    """Return each process's median seconds of a step."""
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(steps):
        for name, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[name].append(json.loads(process.stdout.readline()))
    return {name: statistics.median(each) for name, each in seconds.items()}


def train(policy: str, size: int) -> None:
    """Train a step for each line of standard input, and print its seconds; first the number of threads."""
    if policy == OURS:
        importlib.import_module("dinoseg")  # sets the variables that torch reads when it is imported
    import time

    import timm
    import torch

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=size)
    optimizer, images = torch.optim.AdamW(model.parameters()), torch.randn(4, 3, size, size)

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # starts the threads
    print(torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
