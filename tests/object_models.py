"""A model that finds drawn objects: each of its queries finds one colour."""

from contextlib import nullcontext

import numpy as np
import torch

from dinoseg.core.contracts import Head
from dinoseg.core.shapes import MaskOutputs
from dinoseg.extensions.objects.tasks import InstanceTask, PanopticTask
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.windows import Whole
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.heads.semantic import semantic_map, weighted_masks
from dinoseg.models.model import SegmentationModel
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.model import Model
from dinoseg.segmenter.torch_runtime import TorchRuntime

CLASSES = ["ground", "leaf", "stone"]
LABELS = (1, 1, 2, 0)  # classes of red, green and blue objects, and of the black ground
SCORES = (0.99, 0.95, 0.9, 0.85)  # their class probabilities
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourHead(Head[MaskOutputs]):
    """Queries for red, green, blue and black."""

    mixture = True
    no_object = True

    def forward(self, features):
        levels = 10 * features[0]  # (B, 3, H, W), -10..10
        masks = torch.cat([levels, -levels.amax(dim=1, keepdim=True)], dim=1)
        classes = torch.full((4, len(CLASSES) + 1), 1e-6)
        for query, (label, score) in enumerate(zip(LABELS, SCORES, strict=True)):
            classes[query, -1] = 1 - score
            classes[query, label] = score
        return MaskOutputs(classes.log().expand(levels.shape[0], -1, -1), masks)

    def weighted_masks(self, outputs):
        return weighted_masks(outputs)

    def predict(self, outputs, size, valid):
        return semantic_map(outputs, size, valid)


def make_model(task="panoptic"):
    """Return the model: an object of each colour, and the ground as stuff in panoptic segments."""
    backbone = RgbBackbone(1, mean=[0.5] * 3, std=[0.5] * 3)
    kind = {"panoptic": PanopticTask, "instance": InstanceTask}[task]
    things = ["leaf", "stone"]
    return SegmentationModel(backbone, ColourHead(), task=kind(CLASSES, things, "ground"), num_classes=3).eval()


def make_predictor(task="panoptic", strategy=None):
    """Return a predictor of the model."""
    return Predictor(make_model(task), torch.device("cpu"), nullcontext, strategy or Whole())


def make_served(task="panoptic"):
    """Return the model as `dinoseg.load` does."""
    facts = ModelFacts(tuple(CLASSES), ((0, 0, 0), (255, 0, 0), (0, 0, 255)), 255)
    return Model(TorchRuntime(make_predictor(task)), facts)


def draw_image(size=(60, 90), seed=0):
    """Return an image (H, W, 3) with a red, a green and a blue ellipse that do not touch, and their masks (3, H, W)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.zeros((*size, 3), np.uint8)
    masks = []
    for number, colour in enumerate(COLOURS.values()):
        middle = size[0] * rng.uniform(0.35, 0.65), size[1] * (number + 0.5) / 3
        reach = size[0] * rng.uniform(0.1, 0.3), size[1] * rng.uniform(0.05, 0.14)
        mask = ((rows - middle[0]) / reach[0]) ** 2 + ((columns - middle[1]) / reach[1]) ** 2 < 1
        image[mask] = colour
        masks.append(mask)
    return image, np.array(masks)


def serve():
    """Run the command line of mode=app with the model instead of a trained one."""
    from dinoseg.__main__ import main
    from dinoseg.extensions.serving import app_mode

    served = make_served("instance")
    # trackers run on the device of the parameters
    served.runtime.predictor.model.register_parameter("unused", torch.nn.Parameter(torch.ones(1)))
    app_mode.load_served = lambda *_: served
    main()
