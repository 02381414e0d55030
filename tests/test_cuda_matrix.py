"""Every head, loss and adapter in training and validation on a pretended CUDA device: what each of them waits for."""

from itertools import cycle, islice

import pytest
import torch
from config_files import options, read_whole
from omegaconf import OmegaConf
from pretended_cuda import on_cuda, pretended_cuda
from test_cuda_paths import LOGGED, MATCHING, VALIDATION, tiny, train
from test_matrix import FILES, HEADS, SMALL_ADAPTERS, SMALL_HEADS, make_batch
from tiny_parts import load, tiny_node

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.clips.view import ClipBatch
from dinoseg.training.checkpoint import read

pytestmark = pytest.mark.heavy

LOVASZ = {  # of one that takes the batch as one image: which classes there are decides what is sorted
    "losses/lovasz.py forward: size of a mask's choice": 2,
    "losses/lovasz.py lovasz_softmax: read": 1,
    "losses/lovasz.py lovasz_softmax: size of _unique2": 1,
    "training/engine.py backward: size of a mask's choice": 1,
}
WAITS = {"mask_classification": MATCHING, "lovasz": LOVASZ, "ce_lovasz": LOVASZ}
BACKBONES = ("dino", "dinov2", "dinov2_registers", "convnext", "timm_vit", "timm_pyramid")
QUANTISED = ("qlora", "lora_8bit")  # whose kernels bitsandbytes calls by addresses of the device's memory
ADAPTERS = [each for each in FILES["adapter"] if each not in QUANTISED]


def cell(head="linear", adapter="frozen", loss="cross_entropy", backbone="dinov3"):
    words = (f"head={head}", f"adapter={adapter}", f"loss={loss}", "resolution.crop=[32,32]")
    cfg = OmegaConf.create(load(*words))
    cfg.backbone = OmegaConf.merge(tiny_node(backbone), {"layers": cfg.head.get("layers", [-1])})
    for group, small in (("head", SMALL_HEADS.get(head, {})), ("adapter", SMALL_ADAPTERS.get(adapter, {}))):
        cfg[group] = OmegaConf.merge(cfg[group], small)
    torch.manual_seed(0)
    return Builder(cfg).model(), Builder(cfg).criterion(class_weights=torch.ones(3))


def losses():
    found = {option: read_whole("loss", option) for option in options("loss")}
    weighted = [option for option in found if found[option]["class_weights"] is not None]
    return [option for option in weighted if "multilabel" not in str(found[option])]


def combine_parts():
    """Return (head, loss, adapter) of cells that train each of them, in few cells."""
    mask_heads = [head for head in HEADS if "num_queries" in SMALL_HEADS.get(head, {})]
    heads = [head for head in HEADS if head not in mask_heads]
    pixel_losses = [loss for loss in losses() if loss != "mask_classification"]
    count = max(len(heads), len(pixel_losses), len(ADAPTERS))
    cells = [*islice(zip(cycle(heads), cycle(pixel_losses), cycle(ADAPTERS), strict=False), count)]
    return cells + [(head, "mask_classification", "frozen") for head in mask_heads]


PARTS = combine_parts()


def check(folder, model, loss, waits, **given):
    done = train(folder, model, loss, steps=3, val_every=3, log_every=3, **given)
    assert done.error is None
    first, second, logged = done.data_module.steps
    assert first == second == waits
    terms = "training/trainer.py log_step: read"  # of a loss that has several
    assert {name: count for name, count in logged.items() if name != terms} == {**waits, **LOGGED}
    in_validation = {name: 2 * count for name, count in waits.items() if "backward" not in name}  # of two images
    assert done.data_module.validations == [VALIDATION | in_validation]


@pytest.mark.parametrize("number", range(len(PARTS)), ids=["-".join(parts) for parts in PARTS])
def test_each_part_trains_on_pretended_cuda(tmp_path, number):
    head, loss, adapter = PARTS[number]
    precision = ("bf16", "fp32")[number % 2]
    check(tmp_path, *cell(head, adapter, loss), WAITS.get(loss, {}), precision=precision, ema=0.5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_backbone_trains_on_pretended_cuda(tmp_path, backbone):
    check(tmp_path, *cell(adapter="full", backbone=backbone), {})


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_training_resumes_from_its_checkpoint_on_cuda(tmp_path, first, then):
    """With the state of a fused optimizer, also where the part before or after it is on a CPU."""
    whole = train(tmp_path / "whole", *tiny(), steps=4, val_every=2, log_every=2)
    train(tmp_path / "cut", *tiny(), steps=2, val_every=2, log_every=2, cuda=first)
    start = read(tmp_path / "cut" / "last.safetensors")
    rest = train(tmp_path / "cut", *tiny(), steps=4, val_every=2, log_every=2, start=start, cuda=then)
    assert rest.error is None and rest.step == 4
    if first and then:
        assert all(value.equal(rest.state[name]) for name, value in whole.state.items())


def test_every_trained_parameter_has_a_gradient():
    """DDP, which is told of no unused ones, would wait for it."""
    cells = [{"head": head, "loss": loss, "adapter": adapter} for head, loss, adapter in PARTS]
    cells += [{"adapter": "full", "backbone": each} for each in BACKBONES]
    for given in cells:
        model, loss = cell(**given)
        batch = make_batch()
        loss(model.train()(batch.image), batch)[0].backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and not [name for name, parameter in trained.items() if parameter.grad is None], given


def test_slots():
    words = ("hparam=slots_rendered", "backbone=tiny_surgical", "data.root=none", "backbone.weights=random")
    cfg = OmegaConf.create(load(*words))
    torch.manual_seed(0)
    with pretended_cuda() as waits:
        model, loss = on_cuda(Builder(cfg).model()), on_cuda(Builder(cfg).criterion())
        model.train()
        batch = ClipBatch(torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), ["a"]).to(torch.device("cuda"))
        value, _ = loss(model(batch.image), batch)
        value.backward()
        assert waits.take() == {}
