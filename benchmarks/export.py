"""Exported files against PyTorch, and against exports by hand: agreement, size and latency, measured in the same run.

    python benchmarks/export.py RUN [--count 16] [--by-hand] [KEY=VALUE ...]
    python benchmarks/export.py --random BACKBONE [--by-hand] KEY=VALUE ...

RUN is a run folder of mode=train or a checkpoint; further words go to `mode=export`. With `--random`, a model of that
`backbone=` option in its published shape is made, of random weights, its linear head trained for one step on the data
that further words name (`data=camvid data.root=DIR resolution.crop=[352,480]`): what is fast or slow about it, it
shares with a trained one.

Each export is proven by its gate (`exporting/`), whose report is what is printed: latency is that of one picture from
its array to class ids, of PyTorch eager and of the exported file in turns, picture by picture; the ratio is below 1
where the file is faster.

`--by-hand` exports the same module as one does without dinoseg, in two ways: `torch.onnx.export(module, x)`, and its
older tracer with `dynamic_axes`, as timm's `onnx_export.py` has it by default; pictures are resized, padded and brought
to pixels as for dinoseg's own file. All are timed in turns. The last column is a picture turned by 90 degrees.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch

from dinoseg.checkpoints.resume import standalone_config
from dinoseg.checkpoints.source import ModelSource
from dinoseg.config.resolvers import register_resolvers
from dinoseg.extensions.export.graph import Graph, record_of
from dinoseg.extensions.export.onnx_model import load_onnx, open_session
from dinoseg.extensions.export.onnx_pictures import GraphRuntime
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.export.pictures import pictures
from dinoseg.extensions.export.proof import TIMES, Reference, measure_seconds
from dinoseg.training import checkpoint
from dinoseg.utils.images import read_image

CASES = {
    "ONNX float32": ("export=onnx",),
    "ONNX float32, one size": ("export=onnx", "export.dynamic=false"),
    "ONNX float16 weights": ("export=onnx", "export.precision=float16"),
    "ONNX int8 weights": ("export=onnx", "export.precision=int8"),
    "torch.export program": ("export=program",),
}
ONE_STEP = ("adapter=frozen", "head=linear", "trainer.steps=1", "trainer.val_every=1", "mode.metrics_only=true")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--random", metavar="BACKBONE")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--by-hand", action="store_true")
    known, words = parser.parse_known_args()
    if known.run is not None and (known.random or "=" in known.run):
        words, known.run = [known.run, *words], None
    if (known.run is None) == (known.random is None):
        parser.error("give a run folder, or --random BACKBONE and the words of its data")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as folder:
        run = known.run
        if run is None:
            run, made = f"{folder}/run", (f"backbone={known.random}", "backbone.weights=random", *ONE_STEP)
            dinoseg("mode=train", "engine=cpu", "engine.workers=0", *made, *words, f"hydra.run.dir={run}")
            words = []
        gates(run, known.count, words)
        if known.by_hand:
            by_hand(run, known.count)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


def dinoseg(*words):
    """Run a command line; a refused export, which leaves its report, is no failure."""
    done = subprocess.run([sys.executable, "-m", "dinoseg", *words], capture_output=True, text=True, check=False)
    if done.returncode and "was not kept" not in done.stderr:
        sys.exit(f"{' '.join(words)}: {done.stderr}")


def gates(run, count, words):
    """Print what the gate of each kind of export says."""
    print("| export | kept | pixels that agree | mIoU, PyTorch / exported | MB | ms, PyTorch / exported | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            given = (f"resume={run}", "engine=cpu", f"export.count={count}", *case, *words)
            dinoseg("mode=export", *given, f"hydra.run.dir={folder}/out")
            report = json.loads(Path(folder, "out/export_report.json").read_text(encoding="utf-8"))
        miou, ms = report["miou"], report["latency_ms"]
        print(
            f"| {name} | {'yes' if report['proven'] else 'no'} | {report['agreement']:.3%} | {100 * miou['torch']:.2f} "
            f"/ {100 * miou['exported']:.2f} | {report['bytes'] / 1e6:.2f} | {ms['torch']:.1f} / {ms['exported']:.1f} "
            f"| {ms['ratio']:.2f} |",
            flush=True,
        )


def by_hand(run, count):
    """Print dinoseg's file beside exports by hand of the same module."""
    path = Path(run) if Path(run).is_file() else Path(run, "checkpoints/best.safetensors")
    register_resolvers()
    cfg = standalone_config(path, checkpoint.describe(path), {"engine.device": "cpu"})
    with tempfile.TemporaryDirectory() as folder:
        source = ModelSource(cfg)
        found = pictures("val", count, Path(folder), dataset=source.dataset, num_classes=source.num_classes)
        model, threads = source.load().model, torch.get_num_threads()
        record, _ = record_of(model, None, GraphOptions(dynamic=False), found[0].size)
        example = torch.rand(record.batch, 3, *record.size)
        graph, names = Graph(model, record).eval(), {"input_names": ["image"], "output_names": ["scores"]}
        axes = {"image": {0: "batch", 2: "height", 3: "width"}, "scores": {0: "batch", 2: "h", 3: "w"}}
        files = {name: Path(folder, f"{number}.onnx") for number, name in enumerate(("dynamo", "dynamic_axes"))}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(graph, (example,), files["dynamo"], external_data=False, verbose=False, **names)
            torch.onnx.export(graph, (example,), files["dynamic_axes"], dynamo=False, dynamic_axes=axes, **names)
        dinoseg("mode=export", "export=onnx", f"resume={run}", "engine=cpu", f"hydra.run.dir={folder}/out")
        ours = Path(folder, "out/model.onnx")
        open_record, _ = record_of(model, None, GraphOptions(), found[0].size)
        runtimes = {
            "PyTorch eager": Reference(model, open_record),
            "dinoseg, open size": load_onnx(ours, device="cpu", threads=threads)[0],
            "by hand, torch.onnx.export": hand(files["dynamo"], record, threads),
            "by hand, dynamo=False, dynamic_axes": hand(files["dynamic_axes"], open_record, threads),
        }
        sizes = [None, ours, *files.values()]
        images = [read_image(picture.path) for picture in found]
        seconds = {name: [] for name in runtimes}
        for image in images[:TIMES]:
            for _ in range(TIMES + 1):  # in turns; the first of each is left out
                for name, runtime in runtimes.items():
                    seconds[name].append(measure_seconds(runtime, image))
        table(runtimes, sizes, images, seconds)


def table(runtimes, sizes, images, seconds):
    """Print a row for each runtime; the first is what the others are held against."""
    reference = next(iter(runtimes.values()))
    usual = None
    print("| export | pixels that agree | MB | ms | ratio | turned by 90 degrees |\n|---|---|---|---|---|---|")
    for (name, runtime), file in zip(runtimes.items(), sizes, strict=True):
        kept = [value for number, value in enumerate(seconds[name]) if number % (TIMES + 1)]
        ms = 1000 * median(kept)
        usual = usual or ms
        agree = np.mean([(runtime.ids([image]) == reference.ids([image])).mean() for image in images])
        turned = [np.ascontiguousarray(image.swapaxes(0, 1)) for image in images]
        try:
            other = f"{np.mean([(runtime.ids([one]) == reference.ids([one])).mean() for one in turned]):.3%}"
        except Exception as error:
            other = f"fails: {str(error).strip().splitlines()[0][:60]}"
        size = f"{file.stat().st_size / 1e6:.2f}" if file else ""
        print(f"| {name} | {agree:.3%} | {size} | {ms:.1f} | {ms / usual:.2f} | {other} |", flush=True)


def hand(file, record, threads):
    """Return what computes for a file that is not dinoseg's."""
    session = open_session(file, device="cpu", threads=threads)
    return GraphRuntime(lambda pixels: session.run(None, {"image": pixels}), record)


if __name__ == "__main__":
    main()
