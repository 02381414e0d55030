"""Files of a model from a loop of one's own that other libraries read: merged LoRA, peft's adapters and ONNX."""

import numpy as np
import pytest
import torch
from peft import PeftModel

import dinoseg
from dinoseg.utils.errors import UserError

IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def make_trained(**options):
    """Return a model whose trainable parameters have other values than at its start."""
    model = dinoseg.create_model("tiny_surgical", num_classes=2, **{"adapter": "lora", **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_model_predicts_the_same_and_is_loaded_again(delta, dtype, tmp_path):
    model = make_trained(**{"backbone.dtype": dtype})
    before = model(IMAGES)
    merged = model.merge()
    assert merged is model and not merged.training
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    assert torch.allclose(model(IMAGES), before, atol=1e-4 if dtype == "float32" else 0.1)
    model.save(tmp_path / "model.safetensors", delta=delta)
    loaded = dinoseg.load(tmp_path / "model.safetensors", device="cpu", precision="fp32")
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert "adapter=frozen" in repr(loaded)
    assert loaded.facts.backbone["weights"] == "dinoseg:tiny_surgical"
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_merge_of_half_precision_keeps_train_mode_and_size_limit():
    model = make_trained(**{"backbone.dtype": "bfloat16"}).train()
    limit = model.model.limit = lambda size: 16
    model.merge()
    assert model.training and model.head.training and model.model.limit is limit


def test_merge_states_from_how_many_bits_weights_come():
    assert make_trained(adapter="qlora").merge().facts.dequantised == 4


def test_merge_keeps_the_source_of_a_loaded_backbone(tmp_path):
    make_trained().save(tmp_path / "model.safetensors")
    model = dinoseg.load(tmp_path / "model.safetensors", device="cpu")
    source = model.facts.backbone
    assert source["in_file"] and model.merge().facts.backbone == source


@pytest.mark.parametrize("options", [{}, {"adapter.dora": True}, {"adapter": "lora_all", "head": "mlp"}])
def test_peft_reads_the_saved_adapter_with_equal_logits(options, tmp_path):
    model = make_trained(**options)
    model.save_adapter(tmp_path / "adapter")
    head = options.get("head", "linear")
    base = dinoseg.create_model("tiny_surgical", head=head, adapter="frozen", num_classes=2, seed=7)
    read = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(read(IMAGES), model(IMAGES))


@pytest.mark.parametrize("call", ["merge", "save_adapter"])
def test_models_without_lora_layers_are_refused(call, tmp_path):
    model = dinoseg.create_model("tiny_surgical", num_classes=2)
    with pytest.raises(UserError, match="no LoRA layers.*adapter=lora"):
        getattr(model, call)(*[tmp_path / "adapter"] * (call == "save_adapter"))
    assert not any(tmp_path.iterdir())


def test_adapter_refuses_further_trained_weights_of_the_backbone(tmp_path):
    model = make_trained()
    model.backbone.norm.requires_grad_(True)
    with pytest.raises(UserError, match=r"norm.* is trained.*Use save"):
        model.save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["tensor", "arrays"])
def test_model_of_an_own_loop_is_exported_with_given_images(kind, tmp_path):
    model = make_trained().train()
    images = IMAGES if kind == "tensor" else [np.zeros((32, 48, 3), np.uint8), np.full((40, 40, 3), 9, np.uint8)]
    found = dinoseg.export_onnx(model, images, out_dir=tmp_path / "onnx")
    assert found["agreement"] >= 0.999 and model.training
    exported = dinoseg.load(tmp_path / "onnx")
    image = (255 * IMAGES[0]).byte().permute(1, 2, 0).numpy()
    assert (exported.predict(image).mask == model.predict(image).mask).mean() > 0.98  # bfloat16 on some processors
    assert found["path"] == str(tmp_path / "onnx/model.onnx")


def test_onnx_export_names_a_wrong_option(tmp_path):
    with pytest.raises(UserError, match="int3.* is unknown. Choose one of float32, float16, int8"):
        dinoseg.export_onnx(make_trained(), IMAGES, out_dir=tmp_path / "onnx", **{"export.precision": "int3"})
