"""Settings of the surrounding program do not change models and their predictions."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from caller_settings import foreign_settings
from tiny_parts import SMALL_HEADS

import dinoseg

pytestmark = pytest.mark.slow
ARCH = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48}
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)


def make_model(head="linear", **options):
    small = {f"head.{key}": value for key, value in SMALL_HEADS.get(head, {}).items()}
    options = {"backbone.patch_size": 8, "backbone.arch": ARCH, "num_classes": 2, **small, **options}
    return dinoseg.create_model("tiny", head=head, adapter="lora", **options)


def assert_same(model, other):
    tensors, others = ([*each.state_dict().items(), *each.named_buffers()] for each in (model, other))
    for (name, value), (_, expected) in zip(tensors, others, strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
        assert value.device.type == "cpu" and not value.is_inference(), name


def test_new_and_loaded_models_do_not_depend_on_settings(tmp_path):
    expected = make_model()
    expected.save(tmp_path / "expected.safetensors")
    with foreign_settings():
        model = make_model()
        model.save(tmp_path / "model.safetensors")
        loaded = dinoseg.load(tmp_path / "expected.safetensors", device="cpu")
        groups = model.trainable_parameters()
    assert_same(model, expected)
    assert_same(loaded, expected)
    assert [len(group["params"]) for group in groups] == [
        len(group["params"]) for group in expected.trainable_parameters()
    ]
    assert_same(dinoseg.load(tmp_path / "model.safetensors", device="cpu"), expected)
    model(torch.from_numpy(IMAGE).movedim(-1, 0)[None]).sum().backward()


@pytest.mark.parametrize("head", ["linear", "mask2former", "eomt"])
@pytest.mark.parametrize("inference", ["whole", "windows"])
def test_predictions_do_not_depend_on_settings(head, inference):
    model = make_model(head, inference=inference)
    model._precision = "fp32"
    expected = model.predict(IMAGE)
    with foreign_settings():
        found = model.predict(IMAGE)
        assert np.array_equal(found.mask, expected.mask)
        assert np.array_equal(found.probabilities, expected.probabilities)


@pytest.mark.heavy
def test_a_pickled_model_predicts_in_a_new_process(tmp_path):
    model = make_model()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, IMAGE, model.predict(IMAGE).mask)))
    code = (
        "import pickle; model, image, mask = pickle.load(open('model.pkl', 'rb')); "
        "assert (model.predict(image).mask == mask).all()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
