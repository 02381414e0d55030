"""Print one table of ratios, each against a named reference that ran beside it in the same run.

`python benchmarks/run.py [--only NAME ...] [--full] [--json FILE]`: each NAME is a script of this folder, run in a
process of its own, one after the other, at small sizes; `--full` takes the sizes of the documentation. Exits with 1
where a ratio is below what is promised, or a script fails.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import FILE, machine
from tabulate import tabulate

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder, and the words that make it quick; without them it has the sizes of the documentation."""

    script: str
    quick: str = ""


BENCHMARKS = {
    "loss": Benchmark("full_resolution_loss.py", "--classes 26 --rounds 1 --ways usual tiles"),
    "packed": Benchmark("packed.py", "--frames 4 --repeats 2"),
    "scores": Benchmark("scores.py", "--repeats 2"),
    "tracking": Benchmark("tracking.py", "--repeats 2"),
    "windows": Benchmark("windows.py"),
    "video": Benchmark("predict_video.py", "--frames 24 --repeats 2"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME",
                        help=f"of {', '.join(BENCHMARKS)}")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="sizes of the documentation: an hour")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for rows, machine and command")
    args = parser.parse_args()
    rows = [row for name in args.only for row in run(name, BENCHMARKS[name], full=args.full, threads=args.threads)]
    about = {
        "machine": machine(("torch", "numpy", "opencv-python-headless", "Pillow")),
        "threads": args.threads,
        "command": shlex.join(["python", *sys.argv]),
    }
    shown = [
        (row["name"], row["what"], row["reference"], _ratio(row["ratio"]), _ratio(row["needed"]), _verdict(row))
        for row in rows
    ]
    headers = ["name", "what", "reference", "ratio", "needed", ""]
    print(tabulate(shown, headers, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 2 + ("left",)))
    print(f"\nA ratio above 1 is in our favour. {about['machine']}, {args.threads} threads; {about['command']}")
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return int(any(_verdict(row) for row in rows))


def run(name: str, benchmark: Benchmark, *, full: bool, threads: int) -> list[dict[str, Any]]:
    """Return what a script tells, and a row without a ratio where it fails."""
    command = [sys.executable, str(HERE / benchmark.script), *([] if full else shlex.split(benchmark.quick))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        start = time.perf_counter()
        print(f"{name}: {shlex.join(command[1:])}", file=sys.stderr, flush=True)
        done = subprocess.run(
            command,
            env={**os.environ, FILE: str(path), "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    common = {"name": name, "load": round(os.getloadavg()[0], 1), "seconds": round(time.perf_counter() - start, 1)}
    if done.returncode not in (0, 1) or not told:
        last = (done.stdout.strip().splitlines() or ["it says nothing"])[-1]
        told.append({"what": f"failed: {last[:100]}", "reference": "", "ratio": None, "needed": None})
    return [{**common, **row} for row in told]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _verdict(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return "FAILED"
    return "BELOW" if row["needed"] is not None and row["ratio"] < row["needed"] else ""


if __name__ == "__main__":
    sys.exit(main())
