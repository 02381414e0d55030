from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from bicubic import cubic, cubic_matrix
from mistakes import refusals
from safetensors.torch import load_file, save_file

from dinoseg.core.geometry import pad_to_multiple
from dinoseg.models.adapters import Full, LastBlocks, Lora
from dinoseg.models.backbones.transformers_vit import METHODS, TransformersVit, interpolate
from dinoseg.utils.errors import UserError

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
FAMILIES = {
    "dinov3_vit": ({**SMALL, "intermediate_size": 48, "num_register_tokens": 4}, 8, 5),
    "dinov2": ({**SMALL, "mlp_ratio": 2, "image_size": 56}, 14, 1),
    "dinov2_with_registers": ({**SMALL, "mlp_ratio": 2, "image_size": 56, "num_register_tokens": 4}, 14, 5),
}


def build(family="dinov3_vit", layers=(-1,), weights="random", **kwargs):
    arch, patch, _ = FAMILIES[family]
    torch.manual_seed(0)
    return TransformersVit(family, arch, weights, patch, layers, **kwargs)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_last_map_is_the_model_output_without_prefix_tokens(family):
    backbone = build(family).eval()
    images = torch.rand(2, 3, 45, 53)  # 56 x 56 padded: elsewhere transformers resamples positions unlike Meta
    pixels = pad_to_multiple((images - backbone.mean) / backbone.std, backbone.patch_size)
    tokens = backbone.model(pixels).last_hidden_state
    assert backbone.num_prefix == FAMILIES[family][2]
    expected = tokens[:, backbone.num_prefix :].transpose(1, 2).reshape(backbone(images)[0].shape)
    torch.testing.assert_close(backbone(images)[0], expected)


@pytest.mark.parametrize("adapter", [None, LastBlocks(blocks=1), Full()])
def test_maps_without_final_norm_are_the_outputs_of_blocks(family, adapter):
    backbone = build(family, (2, 0), final_norm=False).eval()
    backbone = backbone if adapter is None else adapter(backbone)
    assert not list(backbone.norm.parameters())
    outputs = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    maps = backbone(torch.rand(2, 3, 33, 70))
    for part, number in zip(maps, (2, 0), strict=True):
        tokens = outputs[number] if isinstance(outputs[number], torch.Tensor) else outputs[number][0]
        assert torch.equal(part, tokens[:, backbone.num_prefix :].transpose(1, 2).reshape(part.shape))


def test_weights_load_and_export_without_the_final_norm(tmp_path, family):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(build(family).export_state(), whole)
    loaded = build(family, weights=str(whole), final_norm=False)
    save_file(loaded.export_state(), cut)
    again = build(family, weights=str(cut), final_norm=False)
    images = torch.rand(1, 3, 30, 30)
    assert torch.equal(again.eval()(images)[0], loaded.eval()(images)[0])
    with pytest.raises(UserError, match=r"2 tensors are missing.*norm"):
        build(family, weights=str(cut))


def test_weights_of_half_precision_give_maps_of_full(family):
    images = torch.rand(1, 3, 30, 45)
    exact = build(family).eval()(images)[0]
    half = build(family, dtype="bfloat16").eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    rounded = half(images)[0]
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_norm_of_pre_training_is_counted_but_never_trained():
    backbone = build(local_cls_norm=True)
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in build().parameters()) + 48
    Full()(backbone)(torch.rand(1, 3, 16, 16))[0].square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is None} == set(backbone.unused)


def test_positions_are_rescaled_in_training_only_if_configured():
    images = torch.rand(1, 3, 32, 32)
    still = build().train()
    assert torch.equal(still(images)[0], still(images)[0])
    arch, patch, _ = FAMILIES["dinov3_vit"]
    noisy = TransformersVit("dinov3_vit", {**arch, "pos_embed_rescale": 2.0}, "random", patch).train()
    assert not torch.equal(noisy(images)[0], noisy(images)[0])


def test_unreachable_hub_is_queried_once(monkeypatch, caplog):
    asked = []

    def refuse_connection(self, name, **options):
        asked.append((name, options["revision"]))
        raise ConnectionError("connection refused\nsee elsewhere")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse_connection)
    said = "the hub is unreachable \\(connection refused\\).*weights=PATH.*tiny_surgical"
    with pytest.raises(UserError, match=said) as caught:
        build(weights="nobody/nothing@v1")
    assert asked == [("nobody/nothing", "v1")] and not caplog.records and "\n" not in str(caught.value)


def test_adapter_repository_is_refused_before_fetching_its_base(monkeypatch, tmp_path):
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename="adapter_config.json")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given, **options: listed)
    with pytest.raises(UserError, match="weights=some/body@main: holds adapter_config.json"):
        build(weights="some/body")
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", Mock(side_effect=ConnectionError))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(UserError, match="weights=some/body: holds adapter_config.json"):
        build(weights="some/body")


def test_without_a_hub_weights_fetched_before_are_read(monkeypatch, tmp_path):
    save_file(build().export_state(), tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    state = build(weights="some/body").export_state()  # tests are without a hub
    kept = load_file(tmp_path / "model.safetensors")
    assert state.keys() == kept.keys() and all(torch.equal(state[name], kept[name]) for name in kept)


def test_gated_weights_explain_how_to_get_access(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=None))
    with pytest.raises(UserError, match="accept the licence.*log in.*weights=PATH"):
        build(weights="nobody/nothing@v1")


def write_folder(kind):
    """Write a model that a backbone of 24 numbers does not take, and return its folder."""
    arch, patch, _ = FAMILIES["dinov3_vit"]
    model = TransformersVit("dinov3_vit", arch | ({"hidden_size": 48} if kind == "wide" else {}), "random", patch).model
    model.save_pretrained(kind)
    if kind == "pickled":
        Path(kind, "model.safetensors").unlink()
        torch.save(model.state_dict(), Path(kind, "pytorch_model.bin"))
    return kind


test_message_names_value_and_remedy = refusals(
    {
        "wide": (lambda: build(weights=write_folder("wide")), "wide: ", "Choose the backbone"),
        "pickled": (lambda: build(weights=write_folder("pickled")), "safetensors"),
        "no file": (lambda: build(weights="nowhere.safetensors"), "nowhere.safetensors: file or folder not found"),
        "LoRA exported": (lambda: Lora(rank=1, alpha=1)(build()).export_state(), "merge them first, merge=true"),
    }
)


def smooth_row(step, cell, side):
    """Weights of the stored cells: a kernel as wide as a wanted cell, renormalised at the border."""
    width = max(step, 1.0)
    centre = (cell + 0.5) * step
    row = np.array([cubic((j + 0.5 - centre) / width, a=-0.5) for j in range(side)])
    first, last = int(centre - 2 * width + 0.5), int(centre + 2 * width + 0.5)
    row[: max(first, 0)] = 0
    row[last:] = 0
    return row / row.sum()


def by_hand(positions, grid, offset, antialias):
    side = round((positions.shape[1] - 1) ** 0.5)
    stored = positions[0, 1:].reshape(side, side, -1)
    if antialias:
        matrices = [torch.from_numpy(np.stack([smooth_row(side / n, cell, side) for cell in range(n)])) for n in grid]
    else:
        matrices = [cubic_matrix(side, (n + offset) / side, n) for n in grid]
    wanted = torch.einsum("yr,xc,rck->yxk", *matrices, stored).flatten(0, 1)
    return torch.cat([positions[:, :1], wanted[None]], dim=1)


@pytest.mark.parametrize("family", METHODS)
@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (4, 6), (13, 3), (7, 1)])
def test_positions_are_those_of_a_plain_loop(family, grid):
    torch.manual_seed(0)
    offset, antialias = METHODS[family]
    positions = torch.randn(1, 26, 3, dtype=torch.float64)
    found = interpolate(positions, grid, offset=offset, antialias=antialias)
    torch.testing.assert_close(found, by_hand(positions, grid, offset, antialias), atol=1e-9, rtol=0)
    assert interpolate(positions, (5, 5), offset=offset, antialias=antialias) is positions


@pytest.mark.parametrize("grid", [(side, side + 1) for side in (1, 36, 37, 256)])
@pytest.mark.parametrize("stored", [14, 28, 37])
def test_offset_never_costs_a_cell(grid, stored):
    found = interpolate(torch.zeros(1, 1 + stored * stored, 1), grid, offset=0.1, antialias=False)
    assert found.shape[1] == 1 + grid[0] * grid[1]


def test_half_precision_is_resampled_in_single_with_gradients():
    positions = torch.randn(1, 26, 8, requires_grad=True)
    found = interpolate(positions.bfloat16(), (9, 7), offset=0.1, antialias=False)
    assert found.dtype == torch.bfloat16
    exact = interpolate(positions.bfloat16().float(), (9, 7), offset=0.1, antialias=False)
    assert torch.equal(found, exact.bfloat16())
    exact.square().sum().backward()
    assert (positions.grad != 0).all()
