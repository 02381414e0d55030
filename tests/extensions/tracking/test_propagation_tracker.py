import json
import logging
from contextlib import nullcontext
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import refusals
from PIL import Image
from torch import nn

from dinoseg.core.contracts import Backbone
from dinoseg.extensions.tracking.grid.propagator import propagate
from dinoseg.extensions.tracking.propagation.masks import first_labels, to_mask
from dinoseg.extensions.tracking.propagation.settings import CRW, DINO, DINOV3
from dinoseg.extensions.tracking.propagation.tracker import PropagationTracker
from dinoseg.extensions.tracking.provenance import weights_of

TINY = {
    "dinov3": replace(DINOV3, short_side=32, radius=3),
    "dino": replace(DINO, short_side=24, long_multiple=8, radius=3),
    "crw": replace(CRW, context=3, radius=3),
}


class Patches(Backbone):
    """Means of the colours of patches, around zero, and their products; refuses what would have to be padded."""

    patch_size = 4
    layers = (0,)

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), requires_grad=False)
        self.seen = []

    def forward(self, images):
        assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
        assert not images.shape[2] % 4 and not images.shape[3] % 4 and not torch.is_grad_enabled()
        self.seen.append(tuple(images.shape))
        self.half = torch.is_autocast_enabled("cpu")
        colours = F.avg_pool2d(images - 0.45, 4)
        return [colours * 0, torch.einsum("kc,bchw->bkhw", self.mix, colours)]


def in_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def clip():
    """Frames of noise with two squares that move, and the ids of the first frame."""
    draw = np.random.default_rng(0)
    frames, masks = [], []
    for number in range(9):
        frame = draw.integers(90, 140, (26, 37, 3))
        mask = np.zeros((26, 37), np.uint8)
        for label, (top, left), colour in ((7, (3, 2 + number), (250, 20, 20)), (90, (15, 25 - number), (20, 30, 240))):
            frame[top : top + 9, left : left + 9] = colour
            mask[top : top + 9, left : left + 9] = label
        frames.append(frame.astype(np.uint8))
        masks.append(mask)
    return frames, masks


FRAMES, MASKS = clip()


def follow(settings, frames, labels, batch=3, tracker=None):
    tracker = tracker or PropagationTracker(Patches(), settings, batch_size=batch)
    masks = []
    for start in range(0, len(frames), batch):
        masks += tracker.track(frames[start : start + batch], labels[start : start + batch])
    return masks


@pytest.mark.parametrize("name", TINY)
def test_masks_are_those_of_propagate(name):
    settings = TINY[name]
    found = follow(settings, FRAMES, [MASKS[0], *[None] * 8])
    size = {"dinov3": (32, 48), "dino": (24, 32), "crw": (28, 40)}[name]
    if name == "dinov3":
        resized = [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in FRAMES]
    else:
        resized = [cv2.resize(frame, size[::-1]) for frame in FRAMES]
    with torch.no_grad():
        features = Patches()(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255)[-1]
    ids = torch.from_numpy(np.searchsorted([0, 7, 90], MASKS[0]).astype(np.uint8))
    soft = propagate(features, first_labels(ids, features.shape[2:], settings), settings=settings)
    table = np.array([0, 7, 90], np.uint8)
    for number in range(1, 9):
        expected = table[to_mask(soft[number], (26, 37), settings, patch_size=4).numpy()]
        assert found[number].dtype == np.uint8 and np.array_equal(found[number], expected), number
    assert np.array_equal(found[0], MASKS[0])  # as it was given
    overlap = [(found[8] == label) & (MASKS[8] == label) for label in (7, 90)]
    assert all(part.sum() > 40 for part in overlap)  # of 81


def test_void_is_background_and_comes_back_as_such():
    with_void = np.where(MASKS[0] == 0, 255, MASKS[0])
    with_void[:2] = 0
    plain, found = (follow(TINY["dinov3"], FRAMES, [first, *[None] * 8]) for first in (MASKS[0], with_void))
    assert np.array_equal(plain, found)


def test_objects_that_come_later_keep_their_ids():
    first = MASKS[0].copy()
    later = MASKS[4].copy()
    first[first == 7] = 0  # 90 is followed first, so a lower id comes second
    later[later == 90] = 0
    found = follow(TINY["dinov3"], FRAMES, [first, None, None, None, later, None, None, None, None])
    assert [sorted(np.unique(mask)) for mask in found[1:4]] == [[0, 90]] * 3
    assert [sorted(np.unique(mask)) for mask in found[4:]] == [[0, 7, 90]] * 5
    assert ((found[8] == 7) & (MASKS[8] == 7)).sum() > 30  # of 81


def test_254_objects_fit():
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(4, 0).repeat(4, 1)
    tracker = PropagationTracker(Patches(), replace(DINOV3, short_side=64, temperature=0.001, top_k=1))
    found = tracker.track([frame, frame], [ids, None])
    assert np.array_equal(found[0], np.where(ids == 255, 0, ids))
    assert np.array_equal(found[1], found[0])


def test_an_object_below_the_grid_is_warned_of(caplog):
    first = MASKS[0].copy()
    first[0, 36] = 3
    with caplog.at_level(logging.WARNING):
        found = follow(TINY["crw"], FRAMES, [first, *[None] * 8])  # bilinear reads four pixels, not this one
    assert "Frame 0: too small for the centre of a grid cell, so not tracked: object 3." in caplog.text
    assert "tracker.short_side" in caplog.text and "smooth edges" in caplog.text and 3 not in found[1]


@pytest.mark.parametrize("stop", [0, 3, 6])
@pytest.mark.parametrize("name", TINY)
def test_tracking_from_a_restored_state_changes_nothing(name, stop):
    labels = [MASKS[0], None, None, np.where(MASKS[2] == 7, 30, 0).astype(np.uint8), *[None] * 5]
    first, second = (PropagationTracker(Patches(), TINY[name], batch_size=3) for _ in range(2))
    begun = follow(TINY[name], FRAMES[:stop], labels[:stop], tracker=first)
    second.load({key: value.clone() for key, value in first.state().items()})
    done = begun + follow(TINY[name], FRAMES[stop:], labels[stop:], tracker=second)
    assert np.array_equal(done, follow(TINY[name], FRAMES, labels))


def test_frames_pass_the_backbone_in_batches():
    backbone = Patches()
    PropagationTracker(backbone, TINY["dinov3"], batch_size=3).track(FRAMES[:7], [MASKS[0], *[None] * 6])
    assert backbone.seen == [(3, 3, 32, 48), (3, 3, 32, 48), (1, 3, 32, 48)] and not backbone.half
    PropagationTracker(backbone, TINY["crw"], autocast=in_bfloat16).track(FRAMES[:1], MASKS[:1])
    assert backbone.half


test_message_names_value_and_remedy = refusals(
    {
        "no first mask": (lambda: follow(DINOV3, FRAMES, [None, MASKS[1], None]), "first frame has no mask. Give it"),
        "a mask of another size": (
            lambda: follow(TINY["dino"], FRAMES, [MASKS[0][:, 1:], None, None]),
            "A mask is 26 x 36 pixels, but the first frame 26 x 37 (H x W)",
        ),
        "a mask of colours": (lambda: follow(TINY["dino"], FRAMES[:1], FRAMES[:1]), "A mask is 26 x 37 x 3 pixels"),
        "a frame of another size": (
            lambda: follow(TINY["dino"], [*FRAMES[:2], FRAMES[2][1:]], [MASKS[0], None, None], batch=1),
            "A frame is 25 x 37 pixels, but the first frame 26 x 37",
        ),
        "another size in a batch": (
            lambda: follow(TINY["dino"], [FRAMES[0], FRAMES[1][1:]], [MASKS[0], None]),
            "A frame is 25 x 37 pixels, but the first frame 26 x 37",
        ),
    }
)


def test_tracker_settings_cover_all_influences_on_masks():
    def settings(**changes):
        backbone = Patches()
        how = changes.pop("settings", DINOV3)
        for key, value in changes.items():
            if key == "mix":
                backbone.mix += value
            elif key != "autocast":
                setattr(backbone, key, value)
        autocast = changes.get("autocast", nullcontext)
        return json.dumps(PropagationTracker(backbone, how, autocast=autocast).settings, sort_keys=True)

    told = [
        settings(),
        settings(settings=replace(DINOV3, radius=11)),
        settings(settings=replace(DINOV3, short_side=480)),
        settings(mix=1e-3),
        settings(layers=(1,)),
        settings(patch_size=8),
        settings(autocast=in_bfloat16),
    ]
    assert settings() == told[0] and len(set(told)) == len(told)
    assert '"precision": "bfloat16"' in told[-1] and '"precision": "float32"' in told[0]


@pytest.mark.parametrize("lost", ["features", "labels", "ids", "size", "seen"])
def test_a_state_that_is_not_whole_is_refused(lost):
    tracker = PropagationTracker(Patches(), TINY["dinov3"])
    tracker.track(FRAMES[:2], [MASKS[0], None])
    with pytest.raises(ValueError, match=lost):
        PropagationTracker(Patches(), TINY["dinov3"]).load({k: v for k, v in tracker.state().items() if k != lost})


def test_a_fingerprint_sees_names_shapes_values_and_buffers():
    def module(name="a", shape=(2, 3), value=1.0, buffer=0.0):
        made = nn.Module()
        made.register_parameter(name, nn.Parameter(torch.full(shape, value)))
        made.register_buffer("std", torch.tensor(buffer), persistent=False)
        return weights_of(made)

    prints = [module(), module("b"), module(shape=(3, 2)), module(value=1.01), module(buffer=0.1)]
    assert module() == prints[0] and len(set(prints)) == 5
