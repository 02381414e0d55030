"""Processor and wall seconds between the steps of a training that runs in a process of its own.

`python benchmarks/step_times.py KEY=VALUE ...` trains with dinoseg and prints them as JSON, in its last line.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from torch.optim.optimizer import register_optimizer_step_post_hook

Times = list[tuple[float, float]]


def step_times(train: Callable[[], object]) -> Times:
    """Return processor and wall seconds of each step but the first, which waits for imports, of a training."""
    ends: Times = []
    register_optimizer_step_post_hook(lambda *_: ends.append((time.process_time(), time.perf_counter())))
    train()
    return [(later[0] - sooner[0], later[1] - sooner[1]) for sooner, later in zip(ends[:-1], ends[1:], strict=True)]


def by_dinoseg(words: Sequence[str]) -> None:
    """Train by a command line, in this process."""
    from dinoseg.__main__ import main

    sys.argv = ["dinoseg", "mode=train", *words]
    main()


def told(command: Sequence[str], folder: str, threads: int, what: str) -> Times:
    """Return what a process tells in its last line; the program ends where that one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    environment["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    times = [(busy, wall) for busy, wall in json.loads(done.stdout.splitlines()[-1])]
    print(f"{what}: processor seconds {[round(busy, 3) for busy, _ in times]}", file=sys.stderr, flush=True)
    return times


if __name__ == "__main__":
    print(json.dumps(step_times(lambda: by_dinoseg(sys.argv[1:]))))
