import csv
import json
from copy import deepcopy

import numpy as np
import pytest
from command_line import SMALL, call, succeed, write_data

from dinoseg.experiment.recipe import recipe_of
from dinoseg.training import checkpoint
from dinoseg.utils.images import write_png

STRONG = "mode.strengths=[0.01,0.1]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("probe")
    write_data(where / "data", train=5)
    return where


def test_every_block_and_the_layers_of_the_head_are_probed(folder):
    words = ("head=multiscale", "head.layers=[0,1]", "adapter=frozen", "mode=probe", STRONG, "hydra.run.dir=P")
    done = succeed(folder, *SMALL, *words)
    assert "5 training images, 1 of them held out" in done.err
    assert "chosen on 1 image only, so the choice is noisy" in done.err and "mode.held_out above 0.1" in done.err
    assert "does not rank backbones for fine-tuning" in done.out
    found = json.loads((folder / "P/probe.json").read_text())
    assert [row["blocks"] for row in found["readings"]] == ["0", "1", "0+1"]
    held = {row["blocks"]: row["held_out_miou"] for row in found["readings"]}
    assert held[found["best"]] == max(held.values())
    assert f"head.layers=[{found['best'].replace('+', ',')}]" in done.out
    rows = list(csv.DictReader((folder / "P/probe.csv").read_text().splitlines()))
    assert [float(row["val_miou"]) for row in rows] == [row["val_miou"] for row in found["readings"]]


@pytest.mark.heavy
def test_head_starts_from_the_probe_but_resumes_without_it(folder, monkeypatch):
    means = []
    restore = checkpoint.Checkpointer.restore

    def watch(checkpoints, model, *others):
        means.append(float(model.head.norm.running_mean.abs().max()))
        return restore(checkpoints, model, *others)

    monkeypatch.setattr(checkpoint.Checkpointer, "restore", watch)
    words = ("mode=train", "mode.report=false", "mode.metrics_only=true", "head=linear", "hydra.run.dir=T")
    done = call(folder, *SMALL, *words, "head.init=probe")
    assert done.status == 0 and "head.init=probe: mIoU" in done.err, done.err
    assert means[0] > 0
    again = call(folder, *SMALL, *words, "head.init=probe", "resume=T", "trainer.steps=3")
    assert again.status == 0 and "head.init" not in again.err, again.err
    info = checkpoint.describe(folder / "T/checkpoints/last.safetensors")
    other = deepcopy(info)
    other["config"]["head"]["init"] = None
    assert recipe_of(other) != recipe_of(info)


def test_masks_without_a_label_are_refused(tmp_path):
    write_data(tmp_path / "data")
    for path in (tmp_path / "data/train/masks").iterdir():
        write_png(path, np.full((32, 48), 255, np.uint8))
    done = call(tmp_path, *SMALL, "mode=probe")
    assert done.status == 1 and "No pixel of the training masks is labelled" in done.err
