"""Every backbone family with every adapter and every head: trains, saves, loads and predicts, or is refused.

Every test run tries each of them in two cells or more, the heavy ones each pair of them in two cells or more.
"""

import re
import traceback
from collections import Counter
from itertools import combinations, product

import pytest
import torch
from checkpoint_files import INFO
from config_files import options, read_whole
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny_parts import BACKBONES, PYRAMIDS, SMALL_HEADS, load, load_option, tiny_node

from dinoseg.config.nodes import instantiate
from dinoseg.core.shapes import Batch
from dinoseg.experiment.builder import Builder
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpointer, frozen_fingerprint
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow  # every head on every backbone with every adapter: minutes together

SMALL_ADAPTERS = {
    "lora": {"rank": 2},
    "lora_all": {"rank": 2, "rslora": True, "blocks": 2},
    "last_blocks": {"blocks": 2},
    "qlora": {"rank": 2, "targets": "all_linear"},
    "lora_8bit": {"rank": 2, "targets": "all_linear"},
}
FILES = {group: {option: read_whole(group, option) for option in options(group)} for group in ("adapter", "head")}
# every head in cfg/head that scores classes and needs no file: see tests/extensions/slots for slots
HEADS = [option for option, file in FILES["head"].items() if "num_classes" in file and file.get("weights") != "???"]
KNOWN_HEADS = {*SMALL_HEADS, "linear", "multiscale", "mlp"}  # those of which `refusal` knows all, and the backbones
KNOWN_BACKBONES = {"dino", "dinov2", "dinov2_registers", "dinov3", "convnext", "timm_vit", "timm_pyramid"}
SIZE = (37, 50)
FEWEST = min(len(BACKBONES), len(FILES["adapter"]), len(HEADS))
CELLS, QUICK = [], set()  # others than the quick ones are heavy
for b, a, h in product(range(len(BACKBONES)), range(len(FILES["adapter"])), range(len(HEADS))):
    if (b + a + h) % FEWEST in (0, 3):  # each value alone gives any two parts together once
        CELLS.append(([*BACKBONES][b], [*FILES["adapter"]][a], HEADS[h]))
    if (b + a + h) % FEWEST == 0 and (b + 2 * h) % 3 == 0:
        QUICK.add(CELLS[-1])


def refusal(backbone, adapter, head):
    """Return what a cell is refused with, or None."""
    if backbone in PYRAMIDS and adapter == "lora":
        return "adapter.targets=attention matches no linear layer"
    if backbone in PYRAMIDS and adapter == "lora_8bit":
        return "adapter.bits=8.*layers of a pyramid take feature maps"
    if head in ("eomt", "pmt") and backbone in PYRAMIDS:
        return "EoMT and PMT need a plain vision transformer"
    if head == "mask2former" and backbone in PYRAMIDS:
        return "this Mask2Former head builds its own pyramid.*Choose a vision transformer"
    return None


@pytest.fixture(scope="module")
def configs():
    """Compose each option once; a cell's config is put together from their nodes."""
    tried = {"head": HEADS, "loss": ["cross_entropy", "mask_classification"]}
    nodes = {group: {name: load_option(group, name) for name in names} for group, names in tried.items()}
    nodes["adapter"] = {name: load(f"adapter={name}")["adapter"] for name in FILES["adapter"]}
    return {"base": load(), "backbone": {name: tiny_node(name) for name in BACKBONES}, **nodes}


def cell_config(configs, backbone, adapter, head):
    nodes = {
        "backbone": configs["backbone"][backbone],
        "adapter": {**configs["adapter"][adapter], **SMALL_ADAPTERS.get(adapter, {})},
        "head": {**configs["head"][head], **SMALL_HEADS.get(head, {})},
    }
    return OmegaConf.create({**configs["base"], **nodes})


def loss_for(head, cfg, configs):
    """Return the loss that a head learns by: of masks where its scores are mixtures of them."""
    cfg.loss = configs["loss"]["mask_classification" if head.mixture else "cross_entropy"]
    if head.mixture:
        cfg.loss.criterion.num_points = 64
    return instantiate(cfg.loss.criterion)(class_weights=torch.ones(3))


def refused_by_a_part(error):
    """Return whether a head or an adapter has said itself that it does not serve: that is for its own test."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("/dinoseg/models/heads/" in file or file.endswith("/dinoseg/models/adapters.py") for file in files)


def make_batch():
    draw = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (2, 3, *SIZE), generator=draw, dtype=torch.uint8)
    mask = (image.float().mean(dim=1) / 86).long().clamp(max=2).to(torch.uint8)
    mask[:, :5] = 255
    return Batch(image, mask, ["a", "b"])


def train(model, loss, steps=2):
    """Train on one batch with the same random draws at each step; return the losses before each and at the end."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    batch = make_batch()
    values = []
    for step in range(steps + 1):
        torch.manual_seed(0)
        model.set_progress(0, 2)
        value, _ = loss(model(batch.image), batch)
        values.append(value.item())
        if step < steps:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return values


@pytest.mark.parametrize(
    ("backbone", "adapter", "head"),
    [pytest.param(*cell, marks=[] if cell in QUICK else [pytest.mark.heavy]) for cell in CELLS],
)
def test_cell(configs, tmp_path, backbone, adapter, head):
    cfg = cell_config(configs, backbone, adapter, head)
    refused = refusal(backbone, adapter, head)
    try:
        model = Builder(cfg).model().to("cpu").train()
    except UserError as error:
        known = head in KNOWN_HEADS and backbone in KNOWN_BACKBONES
        assert re.search(refused, str(error)) if refused else not known and refused_by_a_part(error), error
        return
    assert not refused
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    losses = train(model, loss_for(model.head, cfg, configs))
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0], losses

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trainable
    state = model.state_dict()
    moved = {name for name in before if name in trainable | frozen and not torch.equal(before[name], state[name])}
    assert not moved & frozen
    assert trainable - moved == set(), "trainable, but never moved"
    assert {name for name in trainable if name.startswith("backbone.")} == expected_backbone(model, adapter)

    model.eval()
    batch = make_batch()
    expected = model(batch.image).scores()
    assert expected.shape == (2, 3, *SIZE) and torch.equal(model(batch.image).scores(), expected)
    info = {**INFO, "frozen": frozen_fingerprint(model)}
    Checkpointer(tmp_path, info).save_if_best(model, {"miou": 0.5})
    other = Builder(cfg).model().to("cpu").eval()
    checkpoint.load_weights(other, checkpoint.read(tmp_path / "best.safetensors"))
    assert torch.equal(other(batch.image).scores(), expected)


def expected_backbone(model, adapter):
    """Return which backbone parameters an adapter is there to train, by their names."""
    names = [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    if adapter == "full":
        return {name for name in names if name.removeprefix("backbone.") not in model.backbone.unused}
    if adapter == "last_blocks":
        last = {id(p) for block in model.backbone.blocks[-2:] for p in block.parameters()}
        norm = getattr(model.backbone, "norm", None)
        last |= {id(p) for p in norm.parameters()} if norm is not None else set()
        return {name for name, p in model.named_parameters() if id(p) in last}
    return {name for name in names if ".lora_" in name}


def test_the_matrix_is_whole():
    assert set(HEADS) >= KNOWN_HEADS and set(FILES["adapter"]) >= {*SMALL_ADAPTERS, "frozen", "full"}
    assert sum(refusal(*cell) is None for cell in CELLS) > 90
    for left, right in combinations(range(3), 2):
        parts = (BACKBONES, FILES["adapter"], HEADS)
        times = Counter((cell[left], cell[right]) for cell in CELLS)
        assert times.keys() == {*product(parts[left], parts[right])} and min(times.values()) >= 2
    times = Counter(part for cell in QUICK for part in cell)
    assert all(times[part] >= 2 for part in (*BACKBONES, *FILES["adapter"], *HEADS))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("adapter", "backbone"),
    [
        *(("frozen", backbone) for backbone in BACKBONES),
        *(("qlora", backbone) for backbone in ("dinov2_registers", "timm_vit", "timm_pyramid")),
        *(("last_blocks", backbone) for backbone in ("dinov2", "dinov3", "convnext")),
        *(("lora_all", backbone) for backbone in ("dino", "convnext")),
    ],
)
def test_checkpoint_omits_untrained_weights_of_a_file(configs, tmp_path, backbone, adapter):
    cfg = cell_config(configs, backbone, adapter, "linear")
    source = instantiate(cfg.backbone)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_file(source.export_state(), tmp_path / "weights.safetensors")
    cfg.backbone.weights = str(tmp_path / "weights.safetensors")
    model = Builder(cfg).model().to("cpu").train()
    train(model, loss_for(model.head, cfg, configs), steps=1)
    model.eval()
    info = {**INFO, "frozen": frozen_fingerprint(model)}
    Checkpointer(tmp_path, info).save_if_best(model, {"miou": 0.5})
    found = checkpoint.read(tmp_path / "best.safetensors")
    held = {name for name in found.part("model") if name.startswith("backbone.")}
    parameters = {name for name, _ in model.named_parameters()}
    assert held & parameters == expected_backbone(model, adapter)
    assert all("running" in name or "num_batches" in name for name in held - parameters)
    other = Builder(cfg).model().to("cpu").eval()
    checkpoint.load_weights(other, found)
    image = make_batch().image
    assert torch.equal(other(image).scores(), model(image).scores())

    if adapter == "last_blocks":  # the norm below is trained
        return
    state = source.export_state()
    vectors = [name for name, value in state.items() if value.ndim == 1]
    name = min(vectors, key=lambda name: not ("norm" in name and "weight" in name))
    save_file({**state, name: state[name] + 0.5}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="trained on other frozen backbone weights than backbone.weights"):
        checkpoint.load_weights(Builder(cfg).model().to("cpu"), found)
