"""Training with few masks: masks alone, FixMatch and UniMatch V2, at equal numbers of labelled crops and steps.

    python benchmarks/few_masks.py WEIGHTS --data DATA [--surgery SURGERY] [--steps 400] [--seeds 0 1 2] [--out F.json]
        [--arms alone fixmatch unimatch_v2 probe] [--settings camvid camvid_frozen surgery_frozen]

WEIGHTS is a safetensors file of timm's vit_tiny_patch16_224, DATA a folder with camvid/, SURGERY a folder that
`mode=render data=sarrarp` and `mode=prepare data=sarrarp` have filled. A seed draws 16 of the training masks, which all
arms share; the other training images have none. All arms score a moving average of the weights. One seed of all arms
and settings runs at a time. Scores are added to the file of `--out`, and what it holds does not run again, so that
further seeds may run later. Prints each score, the differences from `alone` over the seeds with their 95 % interval
(paired t), and time and memory of a step beside those of `alone`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

import dinoseg

MASKS, BATCH = 16, 4
ARMS = {  # words, and images of a step of the student
    "alone": (["trainer=supervised", "trainer.ema=0.996"], BATCH),
    "fixmatch": (["trainer=fixmatch"], 2 * BATCH),
    "unimatch_v2": (["trainer=unimatch_v2"], 3 * BATCH),
    "probe": ([], 0),
}
SETTINGS = {
    "camvid": ["data=camvid", "adapter=full"],
    "camvid_frozen": ["data=camvid", "adapter=frozen"],
    "surgery_frozen": ["data=sarrarp", "adapter=frozen"],
}


def run(setting, arm, seed, given):
    """Return the mIoU in percent of a run, and for a training the seconds and the GiB of a step."""
    root = given.surgery if setting.startswith("surgery") else given.data / "camvid"
    words = [*SETTINGS[setting], f"data.root={root}", f"seed={seed}", "backbone=timm", f"data.batch_size={BATCH}"]
    words += ["backbone.name=vit_tiny_patch16_224", f"backbone.weights={given.weights}", "resolution.crop=[176,240]"]
    words += ["backbone.mean=[0.5,0.5,0.5]", "backbone.std=[0.5,0.5,0.5]", "engine.cache=off"]
    data = dinoseg.open_dataset(words[0].removeprefix("data="), split="train", root=str(root))
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        names = np.random.default_rng(seed).choice(data.names, MASKS, replace=False)
        (where / "names.txt").write_text("\n".join(sorted(names)), encoding="utf-8")
        words += [f"data.labelled={where / 'names.txt'}", f"hydra.run.dir={where / 'run'}"]
        if arm == "probe":
            words = [word for word in words if not word.startswith("engine.")]
            _call("mode=probe", *words, "head=linear", "mode.layers=[-1]")
            found = json.loads((where / "run/probe.json").read_text(encoding="utf-8"))
            (best,) = [row for row in found["readings"] if row["blocks"] == found["best"]]
            return {"miou": 100 * best["val_miou"]}
        words += ["head=dpt", "head.features=64", "head.batch_norm=false", "head.dropout=0.0", *ARMS[arm][0]]
        words += [f"trainer.steps={given.steps}", f"trainer.val_every={given.steps}", "trainer.log_every=10"]
        _call("mode=train", *words, "mode.metrics_only=true", "mode.report=false")
        rows = [json.loads(row) for row in (where / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if "train/images_per_s" in row]
    last = trained[-1]
    return {
        "miou": 100 * next(row["val/miou"] for row in rows if "val/miou" in row),
        "seconds": ARMS[arm][1] / statistics.median(row["train/images_per_s"] for row in trained),
        "gib": max(row["train/memory_gib"] for row in trained),
        **{key: last.get(f"train/{key}") for key in ("confident", "pseudo_accuracy")},
    }


def _call(*words):
    done = subprocess.run([sys.executable, "-m", "dinoseg", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def tell_differences(found, steps):
    """Print the difference of each arm from `alone` over the seeds that have both, and the cost of its step."""
    for setting in SETTINGS:
        for arm in ARMS:
            pairs = [
                (result, found[key])
                for name, result in found.items()
                if name.startswith(f"{setting} {arm} {steps} ")
                and (key := name.replace(f" {arm} ", " alone ")) in found
                and arm != "alone"
            ]
            if not pairs:
                continue
            gaps = [one["miou"] - other["miou"] for one, other in pairs]
            text = f"{setting:15} {arm:12} minus alone: {statistics.mean(gaps):+.2f}"
            if len(gaps) > 1:
                low, high = stats.ttest_1samp(gaps, 0).confidence_interval()
                text += f" ({low:+.2f} to {high:+.2f})"
            text += f" over {len(gaps)} seeds"
            if arm != "probe":
                for key, unit in (("seconds", "s"), ("gib", "GiB")):
                    one, other = (statistics.mean(side[key] for side in sides) for sides in zip(*pairs, strict=True))
                    text += f"; {one:.2f} and {other:.2f} {unit} a step"
            print(text, flush=True)


def main():
    """Run what the file lacks, and print all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--surgery", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("few_masks.json"))
    given = parser.parse_args()
    if given.surgery is None and any(setting.startswith("surgery") for setting in given.settings):
        parser.error("--surgery: give the rendered data, or leave surgery_frozen out of --settings")
    found = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    for seed in given.seeds:
        for setting in given.settings:
            for arm in given.arms:
                name = f"{setting} {arm} {given.steps} {seed}"
                if name not in found:
                    found[name] = run(setting, arm, seed, given)
                    given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
                facts = {key: round(value, 3) for key, value in found[name].items() if value is not None}
                print(f"{setting:15} {arm:12} seed {seed}: {facts}", flush=True)
    tell_differences(found, given.steps)


if __name__ == "__main__":
    main()
