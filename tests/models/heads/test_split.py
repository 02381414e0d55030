import copy
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from eomt_making import FAMILIES
from mirrored import count
from tiny_parts import tiny_vit
from torch import nn

from dinoseg.export.runtime import write
from dinoseg.models.adapters import Frozen, Full, LastBlocks, Lora
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads import split
from dinoseg.models.heads.split import SplitHead
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.optim import parameter_groups
from dinoseg.training.sharding import shard
from dinoseg.utils.errors import UserError

SIZES = [(37, 51), (1, 1), (16, 130)]


def made(family="dinov3_vit", layers=(0, -1), **held):
    torch.manual_seed(0)
    if family == "timm":
        return TimmBackbone("test_vit", "random", None, layers, **held)
    arch, patch = FAMILIES[family]
    return TransformersVit(family, arch, "random", patch, layers, **held)


def model_of(family="dinov3_vit", layers=(0, -1), adapter=None, held=None, **options):
    backbone = (adapter or Frozen())(made(family, layers, **(held or {})))
    return SegmentationModel(backbone, SplitHead(backbone.dim, backbone.num_layers, 3, **{"blocks": 2, **options}))


def stepped(model, image):
    """Return the model after some steps on an image, so that its copies are no longer the blocks."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model.train()(image).logits().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(params=[*FAMILIES, "timm"])
def family(request):
    return request.param


@pytest.mark.parametrize("layers", [(0, -1), (2, 1), (-1, -1)])
def test_it_reads_the_frozen_maps_and_the_copies_that_are_not_yet_trained_give_the_last_one(family, layers):
    model = model_of(family, layers).eval()
    last, seen = made(family, (max(layer % len(model.backbone.blocks) for layer in layers),)), []
    frozen = Frozen()(last).eval()
    model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for size in SIZES:
        image = torch.rand(2, 3, *size)
        scores = model(image)
        maps, patch = model.backbone(image), model.patch_size
        *given, task = seen.pop()
        for ours, theirs in zip(given, maps, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(task, frozen(image)[0])
        rows, columns = (-(-side // patch) for side in size)
        assert scores.outputs.shape == (2, 3, 4 * rows, 4 * columns) and scores.scores().shape == (2, 3, *size)


def test_scores_are_those_of_the_written_out_formula(family):
    image = torch.rand(2, 3, 37, 51, dtype=torch.float64)
    model = stepped(model_of(family).double(), image)
    backbone, head = model.backbone, model.head
    tokens, beside = backbone.embed(backbone.pixels(image))
    states = [tokens]
    for block in backbone.blocks:
        states.append(block(states[-1], **beside))
    trained = states[len(backbone.blocks) - 2]  # what leaves the block before the copied ones
    for block in head.copies:
        trained = block(trained, **beside)
    rows, columns = (-(-side // model.patch_size) for side in (37, 51))
    norm = backbone.norm or nn.Identity()
    first, last, task = (
        norm(state)[:, -rows * columns :].mT.reshape(2, -1, rows, columns) for state in (states[1], states[-1], trained)
    )

    def mixed(part, convs):
        for conv, pad in ((convs[0], 0), (convs[2], 1)):
            part = F.gelu(F.conv2d(part, conv.weight, conv.bias, padding=pad))
        return part

    fused = mixed(torch.cat([mixed(torch.cat([first, last], 1), head.prior), task], 1), head.fuse)
    for up, groups in ((head.upscale[0], head.upscale[1]), (head.upscale[3], head.upscale[4])):
        cells = torch.einsum("bcyx,cdij->bdyixj", fused, up.weight)
        fused = cells.flatten(4, 5).flatten(2, 3) + up.bias[:, None, None]
        parts = fused.unflatten(1, (groups.num_groups, -1)).flatten(2)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        fused = F.gelu(parts.view_as(fused) * groups.weight[:, None, None] + groups.bias[:, None, None])
    batch = head.upscale[-1]
    fused = (fused.movedim(1, -1) - batch.running_mean) / (batch.running_var + 1e-5).sqrt() * batch.weight + batch.bias
    expected = fused @ head.classify.weight[:, :, 0, 0].T + head.classify.bias
    assert not torch.equal(task, last)
    torch.testing.assert_close(model(image).outputs, expected.movedim(-1, 1))


def test_the_copies_learn_and_the_backbone_stays(family):
    model, image = model_of(family), torch.rand(2, 3, 40, 33)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(image).logits().square().mean().backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    inside = {f"head.copies.{name}" for name, _ in model.head.copies.named_parameters()}
    assert inside <= learns and not any("backbone" in name or name.startswith("head.norm") for name in learns)
    stepped(model, image)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == learns
    blocks = list(model.backbone.blocks)[-2:]
    for block, own in zip(blocks, model.head.trainable_blocks, strict=True):
        assert not any(torch.equal(*pair) for pair in zip(block.parameters(), own.parameters(), strict=True))


def test_a_checkpoint_holds_the_copies_and_of_a_backbone_with_weights_of_its_own_nothing():
    model = model_of()
    names = {name for name in model.state_dict() if name.startswith("head.")}
    assert any(name.startswith("head.copies.1.") for name in names)
    model.backbone.weights = "somewhere"
    assert trained_names(model) == names


def test_a_head_that_has_its_copies_keeps_them():
    model = stepped(model_of(), torch.rand(1, 3, 32, 32))
    held = copy.deepcopy(model.head.state_dict())
    again = SegmentationModel(model.backbone, model.head, scale=0.5).head.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in held.items())


def test_copies_learn_at_the_rate_of_blocks():
    model = model_of()
    rates = {"lr": 1.0, "backbone_lr": 0.1, "backbone_lr_scale": 0.5, "layer_decay": 0.5}
    groups = parameter_groups(model, weight_decay=0.1, **rates)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = next((number for number in (0, 1) if name.startswith(f"head.copies.{number}.")), None)
            rate = 1.0 if block is None else 0.1 * 0.5 * 0.5 ** (2 - block)
            assert found.pop(name) == (rate, 0.1 if parameter.ndim > 1 else 0.0), name
    assert not found


@pytest.mark.parametrize("held", [{}, {"checkpointing": True}])
def test_checkpointing_computes_the_copies_again_and_changes_no_gradient(family, held):
    gradients, passes = [], []
    for checkpointing in (False, True):
        model, calls = model_of(family, checkpointing=checkpointing, held=held).train(), []
        assert not any(getattr(part, "gradient_checkpointing", False) for part in model.head.modules())
        for block in model.head.trainable_blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        model(torch.rand(2, 3, 40, 33)).logits().square().mean().backward()
        gradients.append([p.grad for p in model.head.parameters() if p.requires_grad])
        passes.append(len(calls))
    assert passes == [2, 4]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_of_a_backbone_held_in_half_are_whole(name):
    model = model_of(name, held={"dtype": "bfloat16"}).train()
    assert {p.dtype for p in model.backbone.blocks.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    image = torch.rand(2, 3, 40, 33)
    assert {part.dtype for part in model.frozen((image * 255).byte()).tensors} == {torch.float32}
    model(image).logits().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.head.parameters() if p.requires_grad)
    exact = model_of(name).eval()
    exact.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(model.eval()(image).scores(), exact(image).scores(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_half_precision(family, training):
    model, image = model_of(family).train(training), torch.rand(2, 3, 40, 33)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(image).scores()
    assert scores.dtype == torch.float32
    if training:
        scores.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.head.parameters() if p.requires_grad)
    else:
        torch.testing.assert_close(scores, model(image).scores(), atol=0.1, rtol=0.1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_copies_of_quantised_blocks_are_whole_ones(bits):
    plain, drawn = model_of(), torch.get_rng_state()
    model = model_of(adapter=Frozen(bits=bits, device="cpu"))
    assert torch.equal(drawn, torch.get_rng_state())
    assert {type(part) for part in model.head.modules() if isinstance(part, nn.Linear)} == {nn.Linear}
    for ours, theirs in zip(model.head.parameters(), plain.head.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad
    model = stepped(model.to("cpu"), torch.rand(1, 3, 32, 32))
    with torch.device("meta"):
        outlined = model_of(adapter=Frozen(bits=bits, device="cpu")).head
    assert {name: value.shape for name, value in outlined.state_dict().items()} == {
        name: value.shape for name, value in model.head.state_dict().items()
    }


def test_weights_that_are_quantised_already_are_refused():
    backbone = Frozen()(made())
    linear = next(part for part in list(backbone.blocks)[-1].modules() if isinstance(part, nn.Linear))
    linear.weight = type("Packed", (nn.Parameter,), {})(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="is already quantised, as with trainer=multi_head. Choose adapter.bits=null"):
        SegmentationModel(backbone, SplitHead(24, 2, 3, blocks=1))


@pytest.mark.parametrize("adapter", [Full(), LastBlocks(1), Lora(2, 2), Lora(2, 2, blocks=1)])
def test_adapters_that_change_the_backbone_are_refused(adapter):
    with pytest.raises(UserError, match="of a frozen backbone, .* Choose adapter=frozen, or .*multiscale"):
        model_of(adapter=adapter)


@pytest.mark.parametrize(
    "backbone",
    [RgbBackbone(8), TimmBackbone("test_vit", "random", None), TimmBackbone("test_convnext", "random", None)],
)
def test_backbones_without_blocks_that_take_tokens_are_refused(backbone):
    backbone.takes_tokens &= "test_vit" not in getattr(backbone, "name", "")  # as timm's rotary ones have it
    with pytest.raises(UserError, match=r"head=split needs a backbone whose blocks take tokens .* dinov3_vit\*.*timm"):
        SegmentationModel(Frozen()(backbone), SplitHead(backbone.dim, 1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, r"head\.blocks=0: give a whole number of at least 1"),
        ({"blocks": 4}, r"head\.blocks=4: this backbone reads 3 blocks; give 1 to 3"),
        ({"channels": 0}, r"head\.channels=0: give a whole number of at least 1"),
        ({"in_dim": [24, 48]}, r"head=split needs a backbone whose blocks take tokens"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SegmentationModel(Frozen()(made()), SplitHead(**{"in_dim": 24, "num_layers": 2, "num_classes": 3, **options}))


@pytest.mark.parametrize(("blocks", "channels"), [(3, 1), (1, 40)])
def test_all_blocks_may_be_copied_and_any_width_be_mixed(blocks, channels):
    model, image = model_of(blocks=blocks, channels=channels).train(), torch.rand(2, 3, 33, 20)
    model(image).logits().square().mean().backward()
    frozen = model.frozen((image * 255).byte())
    assert [part.shape for part in frozen.tensors] == [(2, 6, 24), (2, 6, 24), (2, 11, 24)]
    assert model(frozen).outputs.shape == (2, 3, 12, 8)
    assert math_of(model.head, 24, channels) == count(model.head) - count(model.head.copies) - count(model.head.norm)


def math_of(head, dim, width):
    """Return the parameters of the mixtures, doublings and classes."""
    convs = (2 * dim + 1) * width + (width + dim + 1) * width + 2 * (9 * width + 1) * width
    return convs + 2 * ((4 * width + 1) * width + 2 * width) + 2 * width + (width + 1) * 3


def test_images_of_a_batch_do_not_see_one_another(family):
    model, image = model_of(family).eval(), torch.rand(2, 3, 40, 33)
    torch.testing.assert_close(model(image).scores()[1:], model(image[1:]).scores(), atol=1e-5, rtol=1e-4)


def test_copies_are_shared_out_block_by_block(monkeypatch):
    wrapped = []
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda part, **_: wrapped.append(part))
    model = model_of()
    shard(model, torch.device("cpu"), 2)
    assert wrapped == [*model.backbone.blocks, *model.head.trainable_blocks, model] and len(wrapped) == 6


def test_copies_of_gated_weights_are_not_passed_on_unless_asked():
    source = {"gated": True, "weights": "w", "licence": "l"}
    write._check_licence(source, None, ["model/head.classify.weight"])
    with pytest.raises(UserError, match="weights of the backbone w .l.*except head=split.*export.gated=true"):
        write._check_licence(source, None, ["model/head.copies.0.norm.weight"], copies=True)


def test_an_image_is_learnt():
    torch.manual_seed(0)
    backbone = Frozen()(tiny_vit((0, 1)))
    model, image = SegmentationModel(backbone, SplitHead(24, 2, 4, blocks=1)).train(), torch.rand(1, 3, 32, 32)
    labels = torch.arange(4).repeat_interleave(8).view(1, 32, 1).expand(1, 32, 32)
    optimizer, losses = torch.optim.AdamW(model.head.parameters(), lr=3e-3), []
    for _ in range(30):
        losses.append(F.cross_entropy(model(image).logits(), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert split.SplitHead.fixed_size_reason is None
