from contextlib import nullcontext

import numpy as np
import torch
from tiny_parts import tiny_vit

from dinoseg.inference.predictor import Predictor
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel


def test_ids_are_where_the_probability_is_highest():
    torch.manual_seed(0)
    backbone = tiny_vit()
    model = SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, 5)).eval()
    images = list(np.random.default_rng(0).integers(0, 256, (2, 19, 30, 3), dtype=np.uint8))
    predictor = Predictor(model, torch.device("cpu"), nullcontext)
    ids, probabilities = predictor.ids(images), predictor.probabilities(images)
    assert ids.shape == (2, 19, 30) and ids.dtype == np.uint8
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2, 19, 30))
    assert (probabilities.argmax(dim=1).numpy() == ids).all()
