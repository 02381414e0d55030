from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoseg.core.geometry import pad_to_multiple
from dinoseg.models.adapters import Full, LastBlocks, Lora
from dinoseg.models.backbones import pretrained
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.utils.errors import UserError

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
FAMILIES = {
    "dinov3_vit": ({**SMALL, "intermediate_size": 48, "num_register_tokens": 4}, 8, 5),
    "dinov2": ({**SMALL, "mlp_ratio": 2, "image_size": 56}, 14, 1),
    "dinov2_with_registers": ({**SMALL, "mlp_ratio": 2, "image_size": 56, "num_register_tokens": 4}, 14, 5),
}


def build(family, layers=(-1,), weights="random", **kwargs):
    arch, patch, _ = FAMILIES[family]
    torch.manual_seed(0)
    return TransformersVit(family, arch, weights, patch, layers, **kwargs)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("size", [(56, 56), (45, 61), (1, 1), (15, 200)])
def test_maps_cover_any_size(family, size):
    backbone = build(family, (0, -1))
    maps = backbone(torch.rand(2, 3, *size))
    patch = backbone.patch_size
    assert [tuple(part.shape) for part in maps] == [(2, 24, -(-size[0] // patch), -(-size[1] // patch))] * 2


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
    outputs = {}
    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda _, __, out, number=number: outputs.update({number: out}))
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


def test_early_layer_is_the_same_without_the_later_blocks(family):
    images = torch.rand(1, 3, 30, 30)
    whole, cut = build(family, (0, 2)).eval(), build(family, (0,)).eval()
    cut.load_state_dict({k: v for k, v in whole.state_dict().items() if k in cut.state_dict()})
    torch.testing.assert_close(cut(images)[0], whole(images)[0])
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())


def test_images_of_a_batch_do_not_see_one_another(family):
    backbone = build(family).eval()
    images = torch.rand(2, 3, 40, 33)
    torch.testing.assert_close(backbone(images)[0][1:], backbone(images[1:])[0], atol=1e-5, rtol=1e-4)


def test_normalisation_is_inside():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    plain = build("dinov3_vit", mean=(0, 0, 0), std=(1, 1, 1)).eval()
    inside = build("dinov3_vit", mean=mean, std=std).eval()
    images = torch.rand(1, 3, 16, 24)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(images)[0], plain(by_hand)[0])


def test_weights_of_half_precision_give_maps_of_full(family):
    images = torch.rand(1, 3, 30, 45)
    exact = build(family).eval()(images)[0]
    half = build(family, dtype="bfloat16").eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    rounded = half(images)[0]
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.05 * exact.norm()
    for adapter in (Full(), LastBlocks(1)):
        with pytest.raises(UserError, match="small updates would be rounded away.*dtype=float32"):
            adapter(half)


def test_a_norm_of_pre_training_is_counted_but_never_trained():
    backbone = build("dinov3_vit", local_cls_norm=True)
    assert (
        sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in build("dinov3_vit").parameters()) + 48
    )
    Full()(backbone)(torch.rand(1, 3, 16, 16))[0].square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is None} == set(backbone.unused)


def test_positions_are_rescaled_in_training_only_if_configured():
    images = torch.rand(1, 3, 32, 32)
    still = build("dinov3_vit").train()
    assert torch.equal(still(images)[0], still(images)[0])
    arch, patch, _ = FAMILIES["dinov3_vit"]
    noisy = TransformersVit("dinov3_vit", {**arch, "pos_embed_rescale": 2.0}, "random", patch).train()
    assert not torch.equal(noisy(images)[0], noisy(images)[0])


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        backbone = build("dinov3_vit", checkpointing=checkpointing).train()
        backbone(torch.ones(1, 3, 16, 16))[0].square().sum().backward()
        gradients.append(backbone.model.embeddings.patch_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_weights_from_a_file_and_a_folder(tmp_path, family):
    source = build(family)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_file(source.export_state(), tmp_path / "weights.safetensors")
    source.model.save_pretrained(tmp_path / "folder")
    images = torch.rand(1, 3, 20, 20)
    for weights in (tmp_path / "weights.safetensors", tmp_path / "folder"):
        loaded = build(family, weights=str(weights)).eval()
        torch.testing.assert_close(loaded(images)[0], source.eval()(images)[0])


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 7)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: .*tensors are missing.*Choose the backbone"):
        build("dinov3_vit", weights=str(tmp_path / "other.safetensors"))
    arch, patch, _ = FAMILIES["dinov3_vit"]
    TransformersVit("dinov3_vit", {**arch, "hidden_size": 48}, "random", patch).model.save_pretrained(tmp_path / "big")
    with pytest.raises(UserError, match="Choose the backbone"):
        build("dinov3_vit", weights=str(tmp_path / "big"))


@pytest.mark.parametrize("weights", ["timm/vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"])
def test_weights_of_timm_name_its_backbone(weights):
    with pytest.raises(UserError, match="backbone=timm with name=vit_tiny_patch16_224.augreg_in21k"):
        build("dinov3_vit", weights=weights)


def test_broken_and_missing_files_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="broken.safetensors: not a readable safetensors file"):
        build("dinov3_vit", weights=str(tmp_path / "broken.safetensors"))
    with pytest.raises(UserError, match="nowhere.safetensors: file or folder not found"):
        build("dinov3_vit", weights=str(tmp_path / "nowhere.safetensors"))


def test_pickled_weights_are_not_read(tmp_path):
    source = build("dinov3_vit")
    source.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(source.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        build("dinov3_vit", weights=str(tmp_path))


def test_lora_updates_are_not_exported():
    with pytest.raises(UserError, match="merge them first, merge=true"):
        Lora(rank=1, alpha=1)(build("dinov3_vit")).export_state()


def test_unreachable_hub_is_queried_once(monkeypatch, caplog):
    asked = []

    def refuse_connection(self, name, **options):
        asked.append((name, options["revision"]))
        raise ConnectionError("connection refused\nsee elsewhere")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse_connection)
    said = "the hub is unreachable \\(connection refused\\).*weights=PATH.*tiny_surgical"
    with pytest.raises(UserError, match=said) as caught:
        build("dinov3_vit", weights="nobody/nothing@v1")
    assert asked == [("nobody/nothing", "v1")] and not caplog.records and "\n" not in str(caught.value)


def test_adapter_repository_is_refused_before_fetching_its_base(monkeypatch, tmp_path):
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename="adapter_config.json")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given, **options: listed)
    with pytest.raises(UserError, match="weights=some/body@main: holds adapter_config.json"):
        build("dinov3_vit", weights="some/body")
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(pretrained, "_why_silent", lambda *given: "no answer")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(UserError, match="weights=some/body: holds adapter_config.json"):
        build("dinov3_vit", weights="some/body")


def test_without_a_hub_weights_fetched_before_are_read(monkeypatch, tmp_path):
    save_file(build("dinov3_vit").export_state(), tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    state = build("dinov3_vit", weights="some/body").export_state()  # tests are without a hub
    kept = load_file(tmp_path / "model.safetensors")
    assert state.keys() == kept.keys() and all(torch.equal(state[name], kept[name]) for name in kept)


def test_gated_weights_explain_how_to_get_access(monkeypatch):
    monkeypatch.setattr(pretrained, "_why_silent", lambda name, revision: "")
    with pytest.raises(UserError, match="accept the licence.*log in.*weights=PATH"):
        build("dinov3_vit", weights="nobody/nothing@v1")


@pytest.mark.parametrize("layers", [(3,), (-4,), (), (0, 9)])
def test_layers_out_of_range_are_refused_with_the_range(layers):
    with pytest.raises(UserError, match="this backbone has 3 blocks.*from -3 to 2"):
        build("dinov3_vit", layers)


def test_unknown_family_is_refused():
    with pytest.raises(UserError, match="family=resnet is unknown"):
        TransformersVit("resnet", {}, "random", 16)
