"""Compare 20 steps of each kind of training with stored losses; `python tests/test_trajectories.py` stores them anew.

A change of code that is not meant to change numbers passes with the stored file as it is. On a processor with the same
instructions and the same torch the losses are equal to the bit. Elsewhere kernels sum in another order and training
amplifies the difference, so that only the first five steps are compared, to a relative tolerance of 5e-3.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from command_line import SLOTS, SMALL, succeed, write_data
from finished_runs import rows

from dinoseg.extensions.rendering.moving.write import render_moving_objects

FILE = Path(__file__).with_name("trajectories.json")
STEPS = 20
LENGTHS = ("trainer.val_every=20", "trainer.log_every=1", "trainer.evaluate=best", "mode.metrics_only=true")
IMAGES = (
    "mode=train",
    "backbone.arch.num_hidden_layers=4",
    "engine.precision=fp32",
    "optim.optimizer.lr=1e-3",
    *LENGTHS,
)
QUERIES = ("loss=mask_classification", "loss.criterion.num_points=64")
PLAIN = {
    "linear": ("head=linear",),
    "mlp": ("head=mlp",),
    "cnn": ("head=cnn", "head.channels=16"),
    "multiscale": ("head=multiscale",),
    "dpt": ("head=dpt", "head.features=16"),
    "upernet": ("head=upernet", "head.channels=16"),
    "detail": ("head=detail", "head.fine=4", "head.width=8"),
    "mask2former": (
        *("head=mask2former", "head.num_queries=6", "head.hidden_dim=64", "head.feedforward_dim=32"),
        *("head.num_heads=4", *QUERIES),
    ),
    "eomt": ("head=eomt", "head.num_queries=6", "head.blocks=1", *QUERIES),
    "pmt": ("head=pmt", "adapter=frozen", "head.num_queries=6", "head.blocks=2", *QUERIES),
    "frozen": ("adapter=frozen",),
    "frozen_cached": ("adapter=frozen", "engine.cache=memory", "data.views=2"),
    "frozen_scaled": ("adapter=frozen", "resolution.scale=0.5"),
    "lora": ("adapter=lora", "adapter.rank=2"),
    "lora_all": ("adapter=lora_all", "adapter.rank=2", "adapter.blocks=1"),
    "last_blocks": ("adapter=last_blocks", "adapter.blocks=1"),
    "dice": ("loss=dice",),
    "focal": ("loss=focal",),
    "lovasz": ("loss=lovasz",),
    "tversky": ("loss=tversky",),
    "ce_dice": ("loss=ce_dice",),
    "ce_lovasz": ("loss=ce_lovasz",),
    "accumulated": ("trainer.accumulate=2", "data.batch_size=1"),
    "ema": ("trainer.ema=0.9",),
    "bf16": ("engine.precision=bf16",),
    "layer_decay": ("optim.optimizer.layer_decay=0.8",),
    "clipped": ("trainer.clip=0.01",),
    "two_ranks": ("engine.devices=2",),
}
CLIPS = {
    "slots": (),
    "slots_attention": ("head.steps=[0,2]", "head.time_decoder=attention"),
    "slots_similarity": ("loss=video_similarity", "head.similarity=true"),
    "slots_contrast": ("loss=slot_contrast", "head.standardise=true", "head.independent_until=0.5"),
}
CASES = (*PLAIN, "resumed", "distilled", *CLIPS)


def train(folder, run, *words):
    """Train, and return the losses of the rows up to STEPS, by name."""
    succeed(folder, *words, f"hydra.run.dir={run}")
    losses = {}
    for row in (row for row in rows(folder, run) if row["step"] <= STEPS and "train/loss" in row):
        for name in (name for name in row if name.startswith("train/") and "loss" in name):
            losses.setdefault(name, []).append(row[name])
    assert losses
    return losses


def run_case(name, folder):
    steps = f"trainer.steps={STEPS}"
    if name in CLIPS:
        render_moving_objects(folder / "movi", train_videos=2, val_videos=1, seconds=1, size=(32, 32), workers=1)
        return train(folder, "run", *SLOTS, *CLIPS[name], *LENGTHS, steps)
    write_data(folder / "data")
    if name == "resumed":
        train(folder, "run", *SMALL, *IMAGES, *PLAIN["cnn"], "trainer.steps=7")
        return train(folder, "run", "mode=train", "resume=run", steps)
    if name == "distilled":
        train(folder, "teacher", *SMALL, *IMAGES, "trainer.steps=2")
        return train(folder, "run", *SMALL, *IMAGES, "trainer=distil", "teacher=teacher", steps)
    return train(folder, "run", *SMALL, *IMAGES, *PLAIN[name], steps)


def describe_machine():
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def test_every_case_is_stored():
    assert [*json.loads(FILE.read_text("utf-8"))["losses"]] == [*CASES]


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_losses_are_unchanged(name, tmp_path):
    stored = json.loads(FILE.read_text("utf-8"))
    losses = run_case(name, tmp_path)
    assert losses.keys() == stored["losses"][name].keys()
    for key, expected in stored["losses"][name].items():
        assert len(losses[key]) == len(expected), key
        if stored["machine"] == describe_machine():
            assert losses[key] == expected, key
        else:
            assert losses[key][:5] == pytest.approx(expected[:5], rel=5e-3, abs=1e-4), key


def store_trajectories(names=CASES):
    stored = json.loads(FILE.read_text("utf-8"))["losses"] if FILE.exists() else {}
    for name in names:
        with TemporaryDirectory() as folder:
            stored[name] = run_case(name, Path(folder))
        print(name, {key: values[-1] for key, values in stored[name].items()}, flush=True)
        losses = {each: stored[each] for each in CASES if each in stored}
        FILE.write_text(json.dumps({"machine": describe_machine(), "losses": losses}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # as the tests: ranks are processes of their own
    torch.set_num_threads(1)
    store_trajectories(sys.argv[1:] or CASES)
