"""Weights of timm's models in files."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from dinoseg.models.backbones import timm_backbone
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.utils.errors import UserError


def build(name="test_vit", layers=(-1,), weights="random", patch_size=None, **kwargs):
    torch.manual_seed(0)
    own = 32 if name in ("test_convnext", "test_resnet") else 16
    return TimmBackbone(name, weights, patch_size or own, layers, **kwargs)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_convnext", "test_resnet"])
@pytest.mark.parametrize("layers", [(-1,), (-1, 2)])
def test_exported_weights_are_read_again(tmp_path, name, layers):
    source = build(name, layers).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    save_file(source.export_state(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": source.export_state(), "step": 3}, tmp_path / "weights.pth")
    images = torch.rand(1, 3, 40, 40)
    for file in ("weights.safetensors", "weights.pth"):
        loaded = build(name, layers, weights=str(tmp_path / file)).eval()
        for ours, expected in zip(loaded(images), source(images), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_convnext", "deit_tiny_distilled_patch16_224"])
def test_a_classifiers_file_loads_whole_and_cut(tmp_path, name):
    torch.manual_seed(1)
    classifier = timm.create_model(name, num_classes=7)
    save_file(classifier.state_dict() | {"mask_token": torch.zeros(1)}, tmp_path / "classifier.safetensors")
    loaded = build(name, weights=str(tmp_path / "classifier.safetensors"))
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[key])
    own = 8 if name == "test_convnext" else 16
    cut = build(name, (1,), patch_size=own, weights=str(tmp_path / "classifier.safetensors"))
    assert len(cut.blocks) == 2


def test_weights_load_and_export_without_the_final_norm(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), whole)
    loaded = build(weights=str(whole), final_norm=False)
    save_file(loaded.export_state(), cut)
    build(weights=str(cut), final_norm=False)
    with pytest.raises(UserError, match=r"2 missing \(norm.weight, norm.bias\)"):
        build(weights=str(cut))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    file = tmp_path / "w.safetensors"
    state = {name: value.clone() for name, value in build().export_state().items()}

    def check_refused(changed, match):
        save_file(changed, file)
        with pytest.raises(UserError, match=match):
            build(weights=str(file))

    check_refused(
        {k: v for k, v in state.items() if k != "norm.bias"}, r"w\.safetensors: tensors are 1 missing \(norm.bias\)"
    )
    check_refused(state | {"extra": torch.zeros(1)}, r"1 unexpected \(extra\)\. Choose the name")
    check_refused(state | {"head2.weight": torch.zeros(1)}, r"1 unexpected \(head2.weight\)")
    check_refused(state | {"blocks.6.norm1.weight": torch.zeros(64)}, r"1 unexpected \(blocks.6.norm1.weight\)")
    check_refused(state | {"pos_embed": torch.zeros(1, 197, 64)}, r"1 of another shape \(pos_embed\)")
    check_refused({"norm.bias": torch.zeros(9)}, r"\d+ missing \(.*, \.\.\.\); 1 of another shape \(norm.bias\)")


def test_invalid_weight_files_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    (tmp_path / "broken.pth").write_bytes(b"1234")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(build().export_state(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    for name in ("broken.safetensors", "broken.pth", "empty.pth", "cut.pth"):
        with pytest.raises(UserError, match=f"{name}: not a readable (safetensors|PyTorch) file"):
            build(weights=str(tmp_path / name))
    with pytest.raises(UserError, match=r"nowhere\.pth: file not found"):
        build(weights=str(tmp_path / "nowhere.pth"))
    torch.save({"step": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: it holds objects other than tensors"):
        build(weights=str(tmp_path / "other.pth"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return json.dump, ({}, None)

    torch.save({"norm.bias": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: holds objects besides tensors .*could run code"):
        build(weights=str(tmp_path / "evil.pth"))


@pytest.mark.parametrize(("fault", "said"), [(torch.int8, "is int8"), (None, "holds NaN or infinity")])
def test_weights_that_are_not_finite_floats_are_refused_by_file(tmp_path, monkeypatch, fault, said):
    file = tmp_path / "w.safetensors"
    state = build("test_resnet").export_state()  # with counters of batches, which are whole numbers
    save_file(state, file)
    build("test_resnet", weights=str(file))
    name = next(name for name, value in state.items() if value.ndim == 4)
    save_file(state | {name: state[name].to(fault) if fault else state[name] / 0}, file)
    with pytest.raises(UserError, match=rf"^weights={file}: {name} {said}"):
        build("test_resnet", weights=str(file))
    spoilt = build("test_resnet").model
    torch.nn.init.constant_(next(spoilt.parameters()), float("nan"))
    monkeypatch.setattr(timm_backbone, "_create", lambda name, **_: spoilt)
    with pytest.raises(UserError, match=r"^weights=timm \(test_resnet\): .* holds NaN"):
        build("test_resnet", weights="timm")
