"""Print one table of ratios, each against a named reference that ran beside it in the same run, and write it as JSON.

`python benchmarks/run.py [--only NAME ...] [--quick] [--camvid DIR] [--threads 1] [--json ratios.json]`: each NAME is a
script of this folder, run in a process of its own, one after the other, at the sizes of the documentation: two hours.
`--quick` takes tiny sizes, minutes: it shows that everything runs, and its ratios mean nothing, so none is held against
what is promised. Where a script fails, or needs what is not installed, its row says so and the others go on; the JSON
file is written anew after each script. Exits with 1 where a ratio is below what is promised, or a script fails.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rows import FILE, Row, machine
from tabulate import tabulate

HERE = Path(__file__).parent
SAID = 30  # lines that are shown of a script that fails


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder.

    Args:
        script: its file.
        words: for the sizes of the documentation.
        quick: for tiny sizes, in place of those.
        camvid: whether it takes `--camvid`, and draws its images without.
    """

    script: str
    words: str = ""
    quick: str = ""
    camvid: bool = False


BENCHMARKS: Mapping[str, Benchmark] = {
    "loss": Benchmark(
        "full_resolution_loss.py", "--rounds 1", "--classes 5 --size 64 96 --grid 4 6 --rounds 1 --ways usual tiles"
    ),
    "ids": Benchmark("class_ids.py", "", "--size 64 96 --classes 10 --repeats 1"),
    "masks": Benchmark("mask_class_ids.py", "", "--size 64 96 --repeats 1"),
    "cache": Benchmark("feature_cache.py", "", "--cases vits --images 2 --size 64 --rounds 1"),
    "step": Benchmark("head_step.py", "", "--heads detail --steps 4 --backbone backbone=tiny --repeats 1"),
    "optimizer": Benchmark("optimizer_step.py", "", "--width 24 --blocks 2 --repeats 1"),
    "attention": Benchmark("attention.py", "", "--shapes 1x2x130 --channels 8 --repeats 1"),
    "busy": Benchmark("busy.py", "", "--steps 2 --size 32"),
    "packed": Benchmark("packed.py", "", "--frames 2 --repeats 1"),
    "scores": Benchmark("scores.py", "", "--repeats 1"),
    "vos": Benchmark("vos_scores.py", "", "--videos 2 --frames 4 --processes 1 --repeats 1"),
    "tracking": Benchmark("tracking.py", "", "--grid 12 16 --channels 16 --repeats 1"),
    "track": Benchmark("track_video.py", "", "--frames 3 --size 96 128 --short 96 --width 64"),
    "windows": Benchmark("windows.py", "", "--size 256 192 --classes 3 --window 64"),
    "video": Benchmark("predict_video.py", "", "--frames 8 --repeats 1"),
    "start": Benchmark("start.py", "", "--repeats 1"),
    "gpu": Benchmark("gpu.py", "", "--tiny"),
    "end": Benchmark(
        "end_to_end.py",
        "--live 3",
        "--epochs 2 --images 4 --batch 2 --size 28 42 --only 'LightlyTrain, head, fp32' "
        "'timm, head, fp32' 'dinoseg, head, fp32' 'dinoseg from its cache, head, fp32'",
        camvid=True,
    ),
}


def main(benchmarks: Mapping[str, Benchmark] = BENCHMARKS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=benchmarks, default=list(benchmarks), metavar="NAME",
                        help=f"of {', '.join(benchmarks)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs")
    parser.add_argument("--camvid", type=Path, help="CamVid: train/images and train/masks; without it images are drawn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("ratios.json"), help="file for rows, machine and command")
    args = parser.parse_args()
    about = {
        "machine": machine(("torch", "numpy", "opencv-python-headless", "pillow")),
        "threads": args.threads,
        "command": shlex.join(["python", *sys.argv]),
        "quick": args.quick,
    }
    found: list[dict[str, Any]] = []
    bad = 0
    for name in args.only:
        rows, measure = run(benchmarks[name], args)
        bad += sum(_verdict(row) in ("BELOW", "FAILED") for row in rows)
        found += [{"name": name, **measure, **asdict(row), "verdict": _verdict(row)} for row in rows]
        args.json.write_text(json.dumps({**about, "rows": found}, indent=1), encoding="utf-8")
    shown = [
        (row["name"], row["what"], row["reference"], _number(row["ratio"]), _number(row["needed"]), row["verdict"])
        for row in found
    ]
    headers = ["name", "what", "reference", "ratio", "needed", ""]
    print(tabulate(shown, headers, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 2 + ("left",)))
    print(f"\nA ratio above 1 is in our favour. {about['machine']}, {args.threads} threads; {about['command']}")
    for row in found:
        if row["skipped"]:
            print(f"{row['name']}: {row['what']}: {row['skipped']}")
    print(f"ratios: {args.json}")
    return int(bad > 0)


def run(benchmark: Benchmark, args: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """Return what a script tells, with a row that says so where it fails; and the load and the seconds it took."""
    words = shlex.split(benchmark.quick if args.quick else benchmark.words)
    if benchmark.camvid and args.camvid:
        words += ["--camvid", str(args.camvid.resolve())]
    command = [sys.executable, str(HERE / benchmark.script), *words]
    print(shlex.join(["python", *command[1:]]), file=sys.stderr, flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        environment = {**os.environ, FILE: str(path), "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    # a script exits with 1 where it misses a promise: without one, that is a failure like any other
    if not rows or done.returncode not in (0, 1) or (done.returncode == 1 and not any(row.missed for row in rows)):
        said = done.stdout.strip().splitlines()[-SAID:] or ["nothing"]
        print(f"exit status {done.returncode}; it said:", *said, sep="\n  ", file=sys.stderr, flush=True)
        rows.append(Row(f"{benchmark.script} FAILED", "", None, skipped=f"exit status {done.returncode}: {said[-1]}"))
    if args.quick:
        rows = [replace(row, needed=None) for row in rows]
    return rows, {"load": round(os.getloadavg()[0], 1), "seconds": round(time.perf_counter() - start, 1)}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _verdict(row: Row) -> str:
    if row.skipped:
        return "FAILED" if row.what.endswith("FAILED") else "skipped"
    return "BELOW" if row.missed else ""


if __name__ == "__main__":
    sys.exit(main())
