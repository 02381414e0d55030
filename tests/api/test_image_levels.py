"""Images as floats: a call of the model and `predict` take the same ones, and logits have a plain layout."""

import numpy as np
import pytest
import torch

import dinoseg
from dinoseg.utils.errors import UserError


@pytest.fixture(scope="module")
def model():
    return dinoseg.create_model("tiny_surgical", head="linear", num_classes=2).eval()


LEVELS = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "0 to 255": LEVELS * 255,
    "normalised": (LEVELS - 0.45) / 0.22,
    "NaN": torch.where(LEVELS > 0.9, torch.nan, LEVELS),
    "a little negative": LEVELS - 0.1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_floats_outside_0_to_1_are_refused(model, name):
    image = REFUSED[name]
    calls = (model.predict, *(lambda each, call=call: call(each[None]) for call in (model, model.features)))
    for call in (*calls, lambda each: model.predict(each.permute(1, 2, 0).numpy())):
        with pytest.raises(UserError, match=r"floats from .* to .*0\.\.1.*normalise"):
            call(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_floats_that_round_to_0_to_1_are_levels(model, dtype):
    image = LEVELS.clone()
    image[0, 0, :2] = torch.tensor([1.0000001, -1e-7])
    assert model(image[None].to(dtype)).isfinite().all() if dtype != torch.float64 else True
    found = model.predict(image.to(dtype)).image
    assert (found[0, :2, 0] == [255, 0]).all()


@pytest.mark.parametrize("size", [(33, 50), (32, 48), (8, 8), (1, 7)])
@pytest.mark.parametrize("head", ["linear", "eomt"])
def test_logits_are_contiguous(head, size):
    model = dinoseg.create_model("tiny_surgical", head=head, num_classes=3).eval()
    logits = model(torch.zeros(2, 3, *size))
    assert logits.is_contiguous() and logits.view(2, 3, -1).shape == (2, 3, size[0] * size[1])
    assert np.asarray(model.predict(np.zeros((*size, 3))).mask).shape == size
