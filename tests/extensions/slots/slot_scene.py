"""A scene of coloured squares, and a model whose slots are colours: what a tracker does with them is exact."""

import numpy as np
import torch
from torch import nn

from dinoseg.core.contracts import Backbone
from dinoseg.core.geometry import pad_to_multiple
from dinoseg.extensions.slots.contract import Slots
from dinoseg.models.model import SegmentationModel

PATCH = 4
GREY, RED, BLUE, GREEN = (0.4, 0.4, 0.4), (0.9, 0.1, 0.1), (0.1, 0.1, 0.9), (0.1, 0.9, 0.1)


def paint(places, size=(32, 48)):
    """A grey frame with an 8 x 8 square at (row, column) for each colour, and their ids in that order, from 1."""
    frame = np.empty((*size, 3), np.uint8)
    ids = np.zeros(size, np.uint8)
    frame[:] = np.round(np.array(GREY) * 255)
    for number, (colour, (row, column)) in enumerate(places.items(), start=1):
        frame[row : row + 8, column : column + 8] = np.round(np.array(colour) * 255)
        ids[row : row + 8, column : column + 8] = number
    return frame, ids


def crossing_squares(length=6, size=(32, 48)):
    """A red and a blue square that change places, a cell a frame; frames and ids (red 1, blue 2)."""
    steps = [{RED: (8, 4 + 4 * time), BLUE: (20, 4 * length - 4 * time)} for time in range(length)]
    frames, ids = zip(*(paint(step, size) for step in steps), strict=True)
    return list(frames), list(ids)


def at_cells(mask):
    """What a mask holds beside the centres of the cells."""
    return mask[1::PATCH, 1::PATCH]


def assert_cells(masks, expected):
    """Check masks beside the centres of the cells, where they are exact."""
    np.testing.assert_array_equal([at_cells(mask) for mask in masks], [at_cells(mask) for mask in expected])


class Colours(Backbone):
    """The mean colour of each patch."""

    dim, patch_size, num_layers = 3, PATCH, 1

    def __init__(self, class_attention=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.has_class_attention = class_attention

    def forward(self, images):
        return [torch.nn.functional.avg_pool2d(pad_to_multiple(images, PATCH), PATCH) * self.scale]

    def with_class_attention(self, images):
        """Two heads: one looks at what is not grey, the other at nothing much."""
        assert self.has_class_attention
        maps = self(images)
        strong = (maps[0].amax(1) - maps[0].amin(1)) / maps[0][0, 0].numel()
        return maps, torch.stack([strong, torch.full_like(strong, 1e-6)], dim=1)


class ColourSlots(Slots):
    """Slots that are colours and take cells of theirs; of a frame they keep the mean colour of what they took."""

    mask_source = "attention"

    def __init__(self, colours, *, predictor="carry", sizes=None, groups="off", scramble=False):
        super().__init__()
        self.colours = nn.Parameter(torch.tensor(colours))
        self.sizes = sizes or [len(colours)]
        self.predictor = nn.Identity() if predictor == "carry" else None
        self.groups, self.scramble = groups, scramble
        self.seen = []

    def step(self, features, slots=None, allowed=None, sizes=None):
        self.seen.append((allowed, sizes))
        if slots is None or self.predictor is None:
            slots = self._choose_rows(features, sum(sizes or self.sizes))
        apart = (slots[..., None, None] - features[:, None]).square().sum(2)  # (1, S, h, w)
        logits = -apart * 200
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -1e9)
        attention = logits.softmax(1)
        if allowed is not None:
            attention = attention * allowed
        mass = attention.sum((2, 3))[..., None]
        found = torch.einsum("bshw,bchw->bsc", attention, features) / mass.clamp(min=1e-9)
        return torch.where(mass > 0.5, found, slots), attention

    def masks(self, slots, attention, grid):
        assert tuple(attention.shape[2:]) == grid
        return attention

    def _choose_rows(self, features, count):
        rows = torch.arange(count, device=features.device) % len(self.colours)
        if self.scramble:  # another order in each frame, which depends on what is seen
            rows = rows.roll(int(features[0, 0].argmax()))
        return self.colours[rows][None]


def model_of(colours=(GREY, RED, BLUE, GREEN), *, class_attention=True, scale=1.0, **kwargs):
    return SegmentationModel(Colours(class_attention), ColourSlots(colours, **kwargs), scale=scale).eval()
