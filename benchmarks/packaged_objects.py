"""Train the packaged model `dinoseg:objects`, and score it on renders that it was not trained on.

`python benchmarks/packaged_objects.py --out FOLDER [--steps 2400]` renders 864 videos of moving objects, takes three
frames of each of 800 for the training and one of each other for scores, trains PMT with one block on the frozen
`tiny_surgical`, and exports it without the backbone, in float16. It prints the scores and the size of that file.
"""

import argparse
import json
import sys
from pathlib import Path

from objects import run_dinoseg, take_frames, write_classes
from safetensors import safe_open
from safetensors.torch import save_file

VIDEOS, HELD_OUT = 800, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()
    folder = args.out.resolve()
    folder.mkdir(parents=True)
    rendered, data, run = folder / "rendered", folder / "data", folder / "run"
    counts = [f"render.train_videos={VIDEOS}", f"render.val_videos={HELD_OUT}", "render.seconds=1", "render.seed=5"]
    run_dinoseg(folder, "mode=render", "data=movi", f"data.root={rendered}", *counts)
    take_frames(rendered / "train", data / "train", 3)
    take_frames(rendered / "validation", data / "val", 1)
    write_classes(data)
    words = ["data=folder_instances", f"data.root={data}", "backbone=tiny_surgical", "adapter=frozen", "head=pmt"]
    words += ["head.blocks=1", "head.num_queries=16", "loss.criterion.num_points=1500", "optim.optimizer.lr=1e-3"]
    words += ["resolution.crop=[128,128]", "data.batch_size=8", "engine=cpu"]
    # the images for scores choose nothing: one validation, at the end
    words += [f"trainer.steps={args.steps}", f"trainer.val_every={args.steps}", f"hydra.run.dir={run}"]
    run_dinoseg(folder, "mode=train", "hparam=instance", *words)
    exported, scored = folder / "exported", folder / "scored"
    words = ["export=safetensors", "export.delta=true", f"resume={run}", f"hydra.run.dir={exported}"]
    run_dinoseg(folder, "mode=export", *words)
    packaged = folder / "objects.safetensors"
    halve(exported / "model.safetensors", packaged)
    run_dinoseg(folder, "mode=eval", f"resume={packaged}", f"data.root={data}", "engine=cpu", f"hydra.run.dir={scored}")
    scores = json.loads((scored / "scores.json").read_text())
    columns = ("annotated", "counted", "found", "merged", "split", "count_error")
    print(
        {name: scores[name] for name in ("AP", "AP50", "AP75")} | {name: scores["classes"][1][name] for name in columns}
    )
    print(f"{packaged}: {packaged.stat().st_size:,} bytes")
    return 0


def halve(file: Path, out: Path) -> None:
    """Write the weights of an exported model as float16."""
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    halved = {
        name: tensor.half() if name.startswith("model/") and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_file(halved, out, metadata)


if __name__ == "__main__":
    sys.exit(main())
