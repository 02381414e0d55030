"""Videos of drawn rectangles, and a model that finds the objects that it is told."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.objects import Objects
from dinoseg.core.shapes import MaskOutputs
from dinoseg.core.task import ObjectTask
from dinoseg.models.model import SegmentationModel

SIZE = (62, 101)  # no multiples of the cells


@dataclass
class Rectangle:
    """An object of a scene: its class, its top left corner in each frame (None: hidden), and what its pixels are.

    `missed` frames show it, but the model does not find it. `similar` objects have the same colours.
    """

    name: str
    class_id: int
    corners: list
    size: tuple = (16, 16)
    score: float = 0.9
    missed: object = ()
    similar: bool = False


@dataclass(frozen=True)
class NamedObjects(Objects):
    """Objects that tests know by names."""

    names: list = field(default_factory=list)


def draw_scene(rectangles, size=SIZE):
    """Return frames (H, W, 3) uint8 and the visible objects of each; later rectangles hide earlier ones."""
    draw = np.random.default_rng(0)
    ground = draw.integers(0, 60, (size[0] // 4 + 1, size[1] // 4 + 1, 3)).repeat(4, axis=0).repeat(4, axis=1)
    ground = ground[: size[0], : size[1]]
    colours = {}
    for number, each in enumerate(rectangles):
        paint = np.random.default_rng(100 if each.similar else number + 1)
        tint = paint.permutation([200, 120, 60])
        grain = paint.integers(-30, 30, (each.size[0] // 4 + 1, each.size[1] // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
        colours[number] = tint + grain[: each.size[0], : each.size[1]]
    frames, found = [], []
    for time in range(len(rectangles[0].corners)):
        frame = ground.copy()
        top = np.full(size, -1)
        for number, each in enumerate(rectangles):
            if each.corners[time] is not None:
                inside = np.zeros(size, bool)
                rows, columns = (slice(max(at, 0), max(at + length, 0))
                                 for at, length in zip(each.corners[time], each.size, strict=True))  # fmt: skip
                inside[rows, columns] = True
                shown = np.zeros_like(frame)
                whole = colours[number][-inside[rows].shape[0] or None :, :]
                part = whole[: inside[rows, columns].shape[0], -inside[rows, columns].shape[1] or None :]
                part = part[:, : inside[rows, columns].shape[1]]
                shown[rows, columns] = part
                frame[inside], top[inside] = shown[inside], number
        frames.append(frame.clip(0, 255).astype(np.uint8))
        numbers = [number for number, each in enumerate(rectangles)
                   if (top == number).any() and time not in each.missed]  # fmt: skip
        numbers.sort(key=lambda number: -rectangles[number].score)
        found.append(make_objects(np.array([top == number for number in numbers]).reshape(-1, *size),
                                  [rectangles[number] for number in numbers]))  # fmt: skip
    return frames, found


def make_objects(masks, rectangles):
    """Return objects with names, from masks (N, H, W)."""
    plain = Objects.of_masks(masks, [each.class_id for each in rectangles], [each.score for each in rectangles])
    return NamedObjects(**vars(plain), names=[each.name for each in rectangles])


class KnownObjects(ObjectTask):
    """A task that finds the given objects, those of the next image in each image; classes 0 and 1 are things."""

    things = frozenset({0, 1})

    def __init__(self, objects):
        self.objects = [*objects]

    def find_objects(self, class_logits, mask_logits, size, valid):
        return [self.objects.pop(0) for _ in class_logits]

    def join_objects(self, parts, size):
        raise AssertionError("images are whole")


class Colours(Backbone):
    """Colours of patches of 4 px as features, less their mean."""

    dim = 48
    patch_size = 4
    num_layers = 1
    depth = 1
    unused = ()

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        padded = F.pad(images, (0, -images.shape[-1] % 4, 0, -images.shape[-2] % 4))
        return [(F.pixel_unshuffle(padded, 4) - 0.2) * self.scale]


class Masks(Head):
    """A head of masks without any content."""

    mixture = True
    no_object = True

    def forward(self, features):
        (maps,) = features
        return MaskOutputs(maps.new_zeros(len(maps), 2, 3), maps[:, :2])


def make_model(objects):
    """Return a segmenter that finds the given objects, one entry for each frame in order."""
    return SegmentationModel(Colours(), Masks(), task=KnownObjects(objects)).eval()
