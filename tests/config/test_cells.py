"""The grid of cells that a training crop has follows from resolution and backbone."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinoseg.config.resolvers import register_resolvers
from dinoseg.config.stored import describe
from dinoseg.core.geometry import pad_to_multiple
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.extensions.slots.head.head import SlotHead
from dinoseg.models.model import backbone_size

GRID = "${dinoseg.cells:${resolution},${backbone.patch_size}}"


def cells(crop, patch_size, scale=1.0, longest=None):
    register_resolvers()
    resolution = {"crop": list(crop), "scale": scale, "longest": longest}
    return OmegaConf.create({"resolution": resolution, "backbone": {"patch_size": patch_size}, "grid": GRID}).grid


def test_cells_equal_the_grid_of_the_feature_maps():
    draw = np.random.default_rng(0)
    for _ in range(200):
        crop = tuple(map(int, draw.integers(1, 200, 2)))
        patch_size = int(draw.choice([4, 8, 14, 16]))
        scale = float(draw.choice([0.25, 0.5, 1, 1.3, 2]))
        longest = None if draw.random() < 0.5 else int(draw.integers(8, 250))
        padded = pad_to_multiple(torch.zeros(1, *backbone_size(crop, scale, longest)), patch_size)
        assert cells(crop, patch_size, scale, longest) == [side // patch_size for side in padded.shape[1:]]


@pytest.mark.parametrize(
    ("words", "grid"),
    [
        (["hparam=dinosavi_control"], [28, 28]),
        (["hparam=videosaur", "backbone=dinov3_vits16", "resolution.crop=[320,480]", "resolution.scale=0.5"], [10, 15]),
        (["head=slots", "head.positions_grid=[3,5]"], [3, 5]),
    ],
    ids=str,
)
def test_slots_derive_their_positions_grid(compose, words, grid):
    cfg = compose(*words)
    assert cfg.head.positions_grid == grid
    kept = json.loads(json.dumps(config_description(Builder(cfg))["config"]))
    assert kept["head"]["positions_grid"] == grid  # written out: later images may be seen at another resolution


def test_unknown_patch_size_leaves_positions_grid_unset(compose):
    cfg = compose("head=slots", "backbone=timm", "head.positions=linear")
    assert cfg.head.positions_grid is None
    SlotHead(8, 1, positions="linear", positions_grid=None)
    assert compose("head=slots", "backbone=timm", "backbone.patch_size=16").head.positions_grid == [33, 33]
    cfg = compose("head=slots", "backbone.patch_size=???")
    assert describe(cfg, ("head",))["config"]["head"]["positions_grid"] == "???"


def test_cells_and_class_files_resolve_in_place(compose, tmp_path):
    text = "classes: {ground: {ids: [0], color: [0, 0, 0]}, leaf: {ids: [3], color: [0, 255, 0]}}\nignore: {ids: [7]}\n"
    (tmp_path / "classes.yaml").write_text(text)
    cfg = compose("hparam=dinosavi_control", "data=folder", f"data.root={tmp_path}")
    OmegaConf.resolve(cfg)  # as `--cfg job --resolve` does
    assert cfg.head.positions_grid == [28, 28] and cfg.data.classes == ["ground", "leaf"]
    assert cfg.data.palette == [[0, 0, 0], [0, 255, 0]] and cfg.data.reader.masks.ids[7] == 255
