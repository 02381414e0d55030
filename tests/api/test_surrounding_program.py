"""Models and predictions neither depend on settings, threads and train mode of a program, nor change them."""

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from caller_settings import foreign_settings
from mistakes import assert_refused
from tiny_parts import SMALL_HEADS
from torch import nn

import dinoseg
from dinoseg.segmenter.torch_runtime import replicate_in_eval_mode

pytestmark = pytest.mark.slow
ARCH = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48}
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
BATCH = torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def make_model(head="linear", **options):
    """Return a small model in train mode, with BatchNorm and dropout."""
    small = {f"head.{key}": value for key, value in SMALL_HEADS.get(head, {}).items()}
    options = {"backbone.patch_size": 8, "backbone.arch": ARCH, "num_classes": 2, "adapter.dropout": 0.5, **options}
    return dinoseg.create_model("tiny", head=head, adapter="lora", **small, **options)


def test_prediction_and_training_do_not_change_one_another():
    model = make_model()
    modes = [part.training for part in model.modules()]
    counted = model.head.norm.num_batches_tracked
    main = threading.current_thread()
    reached = threading.Event()
    release = threading.Event()

    def wait(*_):
        if threading.current_thread() is not main:
            reached.set()
            assert release.wait(60)

    model.backbone.register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(model.predict, IMAGE)
        assert reached.wait(60)
        assert [part.training for part in model.modules()] == modes
        model(BATCH)
        assert counted == 1
        model.eval()
        model.train()  # the loop's own validation must not reach the prediction, either
        release.set()
    assert counted == 1 and [part.training for part in model.modules()] == modes
    assert np.array_equal(found.result().probabilities, model.eval().predict(IMAGE).probabilities)


def test_threads_predict_alike_on_a_model_in_train_mode():
    model = make_model()
    expected = model.predict(IMAGE).probabilities
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model.predict(IMAGE).probabilities, range(12)))
    assert all(np.array_equal(each, expected) for each in found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Referring(nn.Module):
    """A module whose attributes refer to its parts in each way, and that stores values for another part."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm, self.compiled = nn.Dropout(0.9), nn.BatchNorm1d(3), nn.Dropout(0.9)
        self.compiled.compile(backend="eager")
        self.wrapped = torch.compile(nn.Sequential(nn.Dropout(0.9)), backend="eager")
        self.listed, self.tabled, self.bound = [self.drop], {"norm": self.norm}, self.drop.forward
        self.bound_later = partial(self.run_parts, [self.norm])
        self.listed.append(self.listed)
        self.outside = [nn.Identity()]
        self.drop.cache = self.norm.cache = {}
        self.drop.register_forward_hook(self.store)

    def store(self, module, _inputs, output):
        self.output = output
        module.cache["output"] = output

    def run_parts(self, parts, inputs):
        return parts[0](inputs)

    def forward(self, inputs):
        """Return the inputs, but for the eval mode of the norm."""
        outputs = self.bound_later(self.bound(self.tabled["norm"](self.listed[0](inputs))))
        outputs = self.wrapped(self.compiled(outputs))
        assert self.output is self.norm.cache["output"]
        return outputs


def test_replica_refers_to_no_module_of_the_original():
    model = Referring().train()
    inputs = torch.randn(8, 3)
    replica = replicate_in_eval_mode(model)
    torch.testing.assert_close(replica(inputs), inputs, rtol=1e-4, atol=1e-4)
    assert model.norm.num_batches_tracked == 0 and all(part.training for part in model.modules())
    assert not hasattr(model, "output") and replica.tabled["norm"] is replica.norm
    assert replica.outside is model.outside
    model.norm.weight = nn.Parameter(torch.full((3,), 2.0))  # replaced
    with torch.no_grad():
        model.norm.bias.add_(1)
    torch.testing.assert_close(replica(inputs), (inputs * 2 + 1) * 2 + 1, rtol=1e-4, atol=1e-4)


QUICK = ("upernet", "eomt")  # of convolutions and of attention
HEADS = [name for name in dinoseg.list_heads() if name not in ("slots", "mask2former_meta")]
PARAMS = [pytest.param(head, marks=() if head in QUICK else pytest.mark.heavy) for head in HEADS]


@pytest.mark.parametrize("head", PARAMS)
def test_replica_of_each_head_computes_as_eval_mode(head):
    model = make_model(head)
    images = torch.from_numpy(IMAGE).permute(2, 0, 1)[None]
    with torch.inference_mode():
        found = replicate_in_eval_mode(model.model)(images).scores()
        assert torch.equal(found, model.eval().model(images).scores())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_traced_modules_are_replicated_scripted_ones_refused():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).train())
    replica = replicate_in_eval_mode(traced)
    assert traced.training and torch.equal(replica(torch.ones(2, 3)), traced.eval()(torch.ones(2, 3)))
    held = nn.Sequential(torch.jit.script(nn.Dropout(0.9)))
    assert_refused(lambda: replicate_in_eval_mode(held), "TorchScript module in training mode")
    assert torch.equal(replicate_in_eval_mode(held.eval())(torch.ones(3)), torch.ones(3))


def test_new_and_loaded_models_do_not_depend_on_settings(tmp_path):
    expected = make_model()
    expected.save(tmp_path / "expected.safetensors")
    with foreign_settings():
        model = make_model()
        model.save(tmp_path / "model.safetensors")
        loaded = dinoseg.load(tmp_path / "expected.safetensors", device="cpu")
        groups = model.trainable_parameters()
    for found in (model, loaded, dinoseg.load(tmp_path / "model.safetensors", device="cpu")):
        tensors, others = ([*each.state_dict().items(), *each.named_buffers()] for each in (found, expected))
        for (name, value), (_, other) in zip(tensors, others, strict=True):
            assert value.dtype == other.dtype and torch.equal(value, other), name
            assert value.device.type == "cpu" and not value.is_inference(), name
    sizes = [[len(group["params"]) for group in each] for each in (groups, expected.trainable_parameters())]
    assert sizes[0] == sizes[1]
    model(BATCH).sum().backward()


@pytest.mark.parametrize("head, options", [
    ("linear", {"inference": "windows"}), ("eomt", {"inference": "whole"}), ("eomt", {"task": "instance"})
])  # fmt: skip
def test_predictions_do_not_depend_on_settings(head, options):
    model = make_model(head, **options)
    model._precision = "fp32"
    expected = model.predict(IMAGE)
    with foreign_settings():
        found = model.predict(IMAGE)
        assert np.array_equal(found.mask, expected.mask)
        assert np.array_equal(found.probabilities, expected.probabilities)
        assert [each.score for each in found.objects or ()] == [each.score for each in expected.objects or ()]


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
