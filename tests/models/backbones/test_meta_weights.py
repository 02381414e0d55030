import argparse
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from meta_files import DEPTH, HEADS, HIDDEN, PATCH, SIDE, WIDTH, meta_state
from mistakes import assert_refused, refusals
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from timm.models import eva, vision_transformer
from torch import nn

import dinoseg
from dinoseg.models.backbones.meta_weights import OPTIONS, VitLayout, config_layout, from_meta, unwrap
from dinoseg.models.backbones.transformers_vit import METHODS, TransformersVit, _config
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow  # large files of weights

CONFIGS = Path(dinoseg.__file__).parent / "cfg" / "backbone"
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
V1 = {**SMALL, "intermediate_size": HIDDEN, "image_size": SIDE * PATCH, "layer_norm_eps": 1e-6}
V2 = {**SMALL, "mlp_ratio": 4, "image_size": SIDE * PATCH}
V3 = {**SMALL, "intermediate_size": HIDDEN, "num_register_tokens": 4}
GATED_V3 = {**V3, "use_gated_mlp": True, "hidden_act": "silu"}
KINDS = {  # family, arch, and what the state takes
    "dino": ("vit", V1, {}),
    "dinov2": ("dinov2", V2, {"hidden": 4 * WIDTH}),
    "dinov2_swiglu": ("dinov2", {**V2, "use_swiglu_ffn": True}, {"gated": True}),
    "dinov2_reg": ("dinov2_with_registers", {**V2, "num_register_tokens": 4}, {"registers": 4, "hidden": 4 * WIDTH}),
    "dinov3": ("dinov3_vit", V3, {"registers": 4}),
    "dinov3_swiglu": ("dinov3_vit", GATED_V3, {"registers": 4, "gated": True}),
    "dinov3_7b": (
        "dinov3_vit",
        {**GATED_V3, "query_bias": False, "value_bias": False},
        {"registers": 4, "gated": True, "qkv_bias": False, "local": True},
    ),
}


def state_of(kind):
    family, _, options = KINDS[kind]
    return meta_state(family, **options)


def load(kind, path, layers=range(DEPTH), **changes):
    family, arch, _ = KINDS[kind]
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    return TransformersVit(family, {**arch, **changes}, str(path), PATCH, list(layers), **plain).eval()


def convert(kind, state):
    """Return a state by the names of transformers."""
    family, arch, _ = KINDS[kind]
    return from_meta(state, _config(family, {**arch, "patch_size": PATCH}), "f.pth")


COMBINED = ("dinov2_reg", "dinov3_swiglu")  # registers and gates, each of which another kind has as well


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.heavy] if kind in COMBINED else []) for kind in KINDS])
def kind(request):
    return request.param


@pytest.fixture
def save_state(tmp_path):
    def save(state, name="meta.pth"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def timm_vit(state, kind, grid):
    """Return timm's ViT with the weights, its positions resampled by the rule that Meta's code states."""
    family, _, options = KINDS[kind]
    offset, antialias = METHODS[family]
    assert (offset, antialias) == ((0.0, True) if options.get("registers") else (0.1, False))
    model = vision_transformer.VisionTransformer(
        img_size=SIDE * PATCH,
        patch_size=PATCH,
        num_classes=0,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2 * HIDDEN / WIDTH if options.get("gated") else options.get("hidden", HIDDEN) / WIDTH,
        init_values=None if family == "vit" else 1.0,
        reg_tokens=options.get("registers", 0),
        no_embed_class=bool(options.get("registers")),
        **({"mlp_layer": vision_transformer.SwiGLUPacked, "act_layer": nn.SiLU} if options.get("gated") else {}),
    )
    model.load_state_dict(vision_transformer.checkpoint_filter_fn(dict(state), model))
    if grid != (SIDE, SIDE):
        stored = state["pos_embed"][:, 1:].transpose(1, 2).reshape(1, WIDTH, SIDE, SIDE)
        if offset:
            scale = tuple((cells + 0.1) / SIDE for cells in grid)
            wanted = F.interpolate(stored, scale_factor=scale, mode="bicubic")
        else:
            wanted = F.interpolate(stored, size=grid, mode="bicubic", antialias=True)
        first = [] if options.get("registers") else [state["pos_embed"][:, :1]]
        model.pos_embed = nn.Parameter(torch.cat([*first, wanted.flatten(2).transpose(1, 2)], dim=1))
        model.patch_embed.img_size, model.patch_embed.grid_size = tuple(PATCH * cells for cells in grid), grid
    return model


def build_eva(**options):
    """Return timm's DINOv3 of the sizes of the made-up weights."""
    sizes = {"img_size": SIDE * PATCH, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    positions = {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "use_rot_pos_emb": True}
    return eva.Eva(
        **{"num_classes": 0, "mlp_ratio": HIDDEN / WIDTH, "init_values": 1.0, "use_abs_pos_emb": False},
        **{"use_fc_norm": False, "dynamic_img_size": True, **sizes, **positions, **options},
    )


def timm_eva(state, kind, _grid):
    """Return timm's DINOv3 with the weights and the stored periods."""
    options = KINDS[kind][2]
    model = build_eva(
        qkv_bias=options.get("qkv_bias", True),
        swiglu_mlp=bool(options.get("gated")),
        swiglu_align_to=8,
        num_reg_tokens=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    missing, extra = model.load_state_dict(eva.checkpoint_filter_fn(dict(state), model), strict=False)
    assert not extra
    assert all(name.endswith("k_bias") for name in missing)
    model.rope.periods.copy_(state["rope_embed.periods"])
    return model


@pytest.mark.parametrize("grid", [(SIDE, SIDE), (3, 3), (4, 9), (11, 2)])
def test_features_of_every_block_are_those_of_timm(kind, grid, save_state):
    state = state_of(kind)
    reference = (timm_eva if KINDS[kind][0] == "dinov3_vit" else timm_vit)(state, kind, grid).eval()
    images = torch.randn(2, 3, grid[0] * PATCH, grid[1] * PATCH)
    with torch.no_grad():
        expected = reference.forward_intermediates(images, norm=True, intermediates_only=True)
        found = load(kind, save_state(state))(images)
    assert len(found) == len(expected) == DEPTH
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.abs().max() > 1
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_stored_periods_are_used_and_exported(save_state, tmp_path):
    state = state_of("dinov3")
    state["rope_embed.periods"] = state["rope_embed.periods"] * 1.5
    model = load("dinov3", save_state(state))
    torch.testing.assert_close(model.model.rope_embeddings.inv_freq, 1 / state["rope_embed.periods"].float())
    images = torch.randn(1, 3, 24, 40)
    save_file(model.export_state(), tmp_path / "own.safetensors")
    assert torch.equal(load("dinov3", tmp_path / "own.safetensors")(images)[-1], model(images)[-1])
    by_config = load("dinov3", "random").export_state()
    assert not any("rope" in name for name in by_config)


def test_local_norm_goes_to_its_place_or_nowhere(save_state):
    family, arch, _ = KINDS["dinov3_7b"]
    state = state_of("dinov3_7b")
    path = str(save_state(state))
    model = TransformersVit(family, arch, path, PATCH, local_cls_norm=True)
    assert torch.equal(model.local_cls_norm.weight, state["local_cls_norm.weight"])
    assert torch.equal(model.local_cls_norm.bias, state["local_cls_norm.bias"])
    assert TransformersVit(family, arch, path, PATCH).local_cls_norm is None


@pytest.mark.parametrize("name", ["meta.pt", "meta.bin", "meta.safetensors", "old.pth"])
def test_same_names_in_any_file_format(name, tmp_path, save_state):
    state = state_of("dinov2")
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name != "old.pth")
    images = torch.randn(1, 3, 20, 30)
    assert torch.equal(load("dinov2", tmp_path / name)(images)[-1], load("dinov2", save_state(state))(images)[-1])


@pytest.mark.parametrize(
    ("kind", "prefix", "chunked"),
    [("dino", "backbone.", False), ("dino", "module.backbone.", True), ("dinov3", "backbone.", True)],
)
def test_checkpoints_of_the_pretraining_give_the_teacher(kind, prefix, chunked, save_state):
    state = state_of(kind)
    names = {name: name.replace("blocks.", "blocks.0.") if chunked else name for name in state}
    teacher = {prefix + names[name]: value for name, value in state.items()}
    teacher |= {"head.mlp.0.weight": torch.zeros(2), "dino_head.last_layer.weight_v": torch.zeros(2)}
    student = {name: torch.zeros_like(value) for name, value in teacher.items()}
    whole = {"student": student, "teacher": teacher, "epoch": 7, "args": argparse.Namespace(lr=1), "dino_loss": {}}
    images = torch.randn(1, 3, 20, 30)
    found = load(kind, save_state(whole, "checkpoint.pth"))(images)[-1]
    assert torch.equal(found, load(kind, save_state(state))(images)[-1])
    assert unwrap({"student": {prefix + name: value for name, value in state.items()}}).keys() == state.keys()


def test_a_missing_or_left_over_key_is_named(kind, save_state):
    state = state_of(kind)
    rest = {name: value for name, value in state.items() if name != "blocks.1.attn.proj.weight"}
    extra = state | {"blocks.0.extra.weight": torch.zeros(1)}
    for content, name in ((rest, ".1.attention."), (extra, "blocks.0.extra.weight")):
        assert_refused(lambda content=content: load(kind, save_state(content)), "1 tensors are missing, unexp", name)


def published_state(layout, **options):
    sizes = {"width": layout.width, "depth": layout.depth, "patch": layout.patch_size, "heads": layout.width // 64}
    extras = {"registers": layout.registers, "gated": layout.gated, "side": 37}
    return meta_state(layout.family, **sizes, **extras, make=partial(torch.empty, device="meta"), **options)


@pytest.mark.parametrize("layout", OPTIONS, ids=OPTIONS.values())
def test_another_published_size_is_named(layout):
    held = rf"holds .*width {layout.width}, {layout.depth} blocks, patches of {layout.patch_size} px"
    message = rf"f\.pth: the file {held}.*but the backbone is .*width 24.*backbone {OPTIONS[layout]}\b"
    with pytest.raises(UserError, match=message):
        convert("dinov3", published_state(layout))


def option_config(option):
    node = OmegaConf.load(CONFIGS / f"{option}.yaml")
    node = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{node.defaults[0]}.yaml"), node)
    with torch.device("meta"):
        return _config(node.family, {**node.arch, "patch_size": node.patch_size})


@pytest.mark.parametrize("option", OPTIONS.values())
def test_names_of_published_sizes_are_backbone_options(option):
    config = option_config(option)
    assert OPTIONS[config_layout(config)] == option
    assert config.hidden_size // config.num_attention_heads == (128 if option == "dinov3_vit7b16" else 64)
    if option.startswith("surgenet"):
        assert (config.key_bias, config.layer_norm_eps) == (True, 1e-6)


def test_largest_published_model_is_converted_completely():
    layout = VitLayout("dinov3_vit", 4096, 40, 16, 4, gated=True)
    state = published_state(layout, hidden=8192, qkv_bias=False, local=True)
    state["rope_embed.periods"] = torch.ones(32)
    converted = from_meta(state, option_config("dinov3_vit7b16"), "f.pth")
    assert sum(value.numel() for name, value in converted.items() if "inv_freq" not in name) == 6_716_043_264


def without_masks(key_bias):
    """Return weights of DINOv3 without the masks that make its key bias zero; with zeros, or with a key bias."""
    state = state_of("dinov3")
    plain = {name: value for name, value in state.items() if not name.endswith("bias_mask")}
    if not key_bias:
        plain |= {name: value * state[f"{name}_mask"] for name, value in plain.items() if name.endswith("qkv.bias")}
    return plain


def test_zero_key_bias_needs_no_mask(save_state):
    images = torch.randn(1, 3, 20, 30)
    masked = load("dinov3", save_state(state_of("dinov3")))
    plain = load("dinov3", save_state(without_masks(key_bias=False), "plain.pth"))
    assert torch.equal(plain(images)[-1], masked(images)[-1])


class Evil:
    def __reduce__(self):
        return print, ("code from a weights file ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped, tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({**state_of("dino"), "x": Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pth: not a readable PyTorch file of tensors only \(it holds .*print\)"):
        load("dino", path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("share", "zipped"),
    [(0.0, True), (0.001, True), (0.001, False), (0.7, True), (0.7, False), (0.9999, True), (0.9999, False)],
)
def test_truncated_files_are_refused(share, zipped, tmp_path):
    torch.save(state_of("dinov2"), tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"weights=.*cut\.pth: not a readable PyTorch file.*Download it again"):
        load("dinov2", tmp_path / "cut.pth")


def test_poolers_of_hub_files_are_no_left_overs(tmp_path):
    family, arch, _ = KINDS["dino"]
    model = load("dino", "random")
    state = model.export_state()
    assert not any("pooler" in name for name in state)
    state |= {"pooler.dense.weight": torch.zeros(WIDTH, WIDTH), "pooler.dense.bias": torch.zeros(WIDTH)}
    save_file(state, tmp_path / "hub.safetensors")
    images = torch.randn(1, 3, 20, 30)
    assert torch.equal(load("dino", tmp_path / "hub.safetensors")(images)[-1], model(images)[-1])
    save_file(state | {"pooler.other.bias": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"pooler\.other\.bias"):
        load("dino", tmp_path / "odd.safetensors")


def surgenet_state(key_bias=True):
    """Return weights in the layout of SurgeNetDINO's DINOv3 files: no registers, no mask on the key bias."""
    state = without_masks(key_bias)
    del state["storage_tokens"]
    return state


SURGENET = {"num_register_tokens": 0, "key_bias": True, "layer_norm_eps": 1e-6}


def without_registers(state, images):
    """Return the normed last map of timm's DINOv3 with a key bias, computed with eps 1e-6."""
    model = build_eva(qkv_fused=False, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    wanted = {name: value for name, value in state.items() if name not in ("mask_token", "rope_embed.periods")}
    for name in [name for name in wanted if ".attn.qkv." in name]:
        block, kind = name.split(".attn.qkv.")
        parts = dict(zip("qkv", wanted.pop(name).chunk(3), strict=True))
        wanted |= {f"{block}.attn.{part}_proj.{kind}": value for part, value in parts.items()}
    names = {name: re.sub(r"ls([12])\.gamma", r"gamma_\1", name) for name in wanted}
    for block in model.blocks:  # timm has no key bias by design: add one
        block.attn.k_proj = nn.Linear(WIDTH, WIDTH)
    model.load_state_dict({names[name]: value for name, value in wanted.items()})
    model.rope.periods.copy_(state["rope_embed.periods"])
    with torch.no_grad():
        return model.eval().forward_intermediates(images, norm=True, intermediates_only=True)[-1]


@pytest.mark.parametrize(
    ("wrapper", "scales"),
    [(None, "ls{}.gamma"), ("teacher", "gamma_{}"), ("model", "ls{}.gamma"), ("state_dict", "gamma_{}")],
)
def test_surgenet_files_are_read(wrapper, scales, save_state):
    state = surgenet_state()
    stored = {re.sub(r"ls([12])\.gamma", lambda match: scales.format(match[1]), name): state[name] for name in state}
    if wrapper:
        stored = {wrapper: {f"backbone.{name}": value for name, value in stored.items()}, "epoch": 50}
    images = torch.randn(2, 3, 3 * PATCH, 4 * PATCH)
    found = load("dinov3", save_state(stored), **SURGENET)(images)[-1]
    torch.testing.assert_close(found, without_registers(state, images), atol=2e-5, rtol=0)
    silent = load("dinov3", save_state(surgenet_state(key_bias=False), "silent.pth"), **SURGENET)(images)[-1]
    assert (silent - found).abs().max() > 1e-2  # keys are rotated after the bias, which therefore counts


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_reg", "dino"])
def test_patch_kernels_are_resampled_as_in_timm(kind, save_state):
    """The kernel of another patch size is that of timm, and all else stays."""
    state = state_of(kind)
    family, arch, _ = KINDS[kind]
    model = TransformersVit(family, arch, str(save_state(state)), 10, weights_patch_size=PATCH).eval()
    kernel = model.model.embeddings.patch_embeddings.projection
    expected = resample_patch_embed(state["patch_embed.proj.weight"], [10, 10])
    torch.testing.assert_close(kernel.weight, expected)
    assert (kernel.stride, model.patch_size, model.model.config.patch_size) == ((10, 10), 10, 10)
    images = torch.randn(2, 3, 3 * PATCH, 4 * PATCH)
    enlarged = F.interpolate(images, scale_factor=10 / PATCH, mode="bicubic")
    before = load(kind, save_state(state), layers=[-1])(images)[-1]
    after = model(enlarged)[-1]
    assert before.shape == after.shape == (2, WIDTH, 3, 4)
    with pytest.raises(UserError, match="patches of 8 px"):
        TransformersVit(family, arch, str(save_state(state)), 10)


def load_content(kind, content, **changes):
    torch.save(content, "meta.pth")
    load(kind, "meta.pth", **changes)


def load_page():
    Path("page.pth").write_bytes(b"<html>404</html>")
    load("dino", "page.pth")


def load_key_bias(mask):
    state = state_of("dinov3")
    name = "blocks.1.attn.qkv.bias_mask"
    if mask is None:
        del state[name]
    else:
        state[name].fill_(mask)
    load_content("dinov3", state)


test_message_names_value_and_remedy = refusals(
    {
        f"{kind} {changes}": (partial(load_content, kind, state_of(kind), layers=[-1], **changes), *words)
        for kind, changes, *words in (
            ("dinov2", {"image_size": 7 * PATCH}, "position_embeddings", "or set its arch"),
            ("dinov3", {"num_attention_heads": 6}, "num_attention_heads=3."),
            ("dinov3", {"num_hidden_layers": 4}, "3 blocks", "4 blocks"),
            ("dinov3", {"num_register_tokens": 0}, "4 registers", "arch to match"),
            ("dinov3_swiglu", {"use_gated_mlp": False}, "SwiGLU"),
            ("dino", {"intermediate_size": 48}, "another shape"),
        )
    }
    | {
        f"{given} for {wanted}": (
            partial(load_content, wanted, state_of(given)),
            *("meta.pth: the file holds a DINO", " but the backbone is a DINO", "Set family"),
        )
        for given, wanted in (("dinov2", "dinov2_reg"), ("dino", "dinov2"), ("dinov3", "dino"))
    }
    | {f"key bias {mask}": (partial(load_key_bias, mask), "blocks.1.attn.qkv.bias") for mask in (None, 1.0, math.nan)}
    | {
        "a page": (load_page, "page.pth: not a readable PyTorch file"),
        "a list": (partial(load_content, "dino", [torch.zeros(1)]), "meta.pth: holds no named tensors"),
        "numbered": (partial(load_content, "dino", {1: torch.zeros(1)}), "meta.pth: holds no named tensors"),
        "empty": (partial(load_content, "dino", {}), "meta.pth: ", "holds nothing"),
        "nested": (
            partial(load_content, "dino", {"network": {"cls_token": torch.zeros(1)}, "epoch": 3}),
            *("holds network, epoch, and no weights", "`teacher`"),
        ),
        "for a ConvNeXt": (
            lambda: from_meta(state_of("dino"), argparse.Namespace(model_type="dinov3_convnext"), "f.pth"),
            *("holds a DINO vision transformer", "but the backbone is a dinov3_convnext"),
        ),
        "a key bias": (
            partial(load_content, "dinov3", surgenet_state(), num_register_tokens=0, layer_norm_eps=1e-6),
            "key bias",
            "set arch.key_bias=true",
        ),
        "no registers": (partial(load_content, "dinov3", surgenet_state()), "arch to match"),
    }
)


def test_conversion_leaves_its_input_and_shares_no_memory(kind, save_state, tmp_path):
    state, before = state_of(kind), state_of(kind)
    convert(kind, state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    converted = load(kind, save_state(state)).model.state_dict()
    save_file(converted, tmp_path / "copy.safetensors")  # which refuses tensors that share memory
