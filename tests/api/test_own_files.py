"""Files of a model from a loop of one's own that other libraries read: merged LoRA, peft's adapters and ONNX."""

from functools import partial

import pytest
import torch
from mistakes import assert_refused, refusals
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

import dinoseg

IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def make_trained(std=0.05, **options):
    """Return a model whose trainable parameters have other values than at its start."""
    model = dinoseg.create_model("tiny_surgical", num_classes=2, **{"adapter": "lora", **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


WHOLE = pytest.param(False, "float32", marks=pytest.mark.heavy)


@pytest.mark.parametrize(("delta", "dtype"), [(True, "bfloat16"), WHOLE])
def test_merged_model_predicts_the_same_and_is_loaded_again(delta, dtype, tmp_path):
    model = make_trained(**{"backbone.dtype": dtype})
    file = tmp_path / "model.safetensors"
    before = model(IMAGES)
    merged = model.merge()
    assert merged is model and not merged.training
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    assert torch.allclose(model(IMAGES), before, atol=1e-4 if dtype == "float32" else 0.1)
    model.save(file, delta=delta)
    loaded = dinoseg.load(file, device="cpu", precision="fp32")
    assert torch.equal(loaded(IMAGES), model(IMAGES)) and "adapter=frozen" in repr(loaded)
    assert loaded.facts.backbone["weights"] == "dinoseg:tiny_surgical"
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_merge_of_half_precision_keeps_train_mode_and_size_limit():
    model = make_trained(**{"backbone.dtype": "bfloat16"}).train()
    limit = model.model.limit = lambda size: 16
    model.merge()
    assert model.training and model.head.training and model.model.limit is limit


def test_merge_states_the_bits_and_the_source_of_weights(tmp_path):
    assert make_trained(adapter="qlora").merge().facts.dequantised == 4
    make_trained().save(tmp_path / "model.safetensors")
    model = dinoseg.load(tmp_path / "model.safetensors", device="cpu")
    source = model.facts.backbone
    assert source["in_file"] and model.merge().facts.backbone == source


ALL_LAYERS = pytest.param({"adapter": "lora_all", "head": "mlp"}, marks=pytest.mark.heavy)


@pytest.mark.parametrize("options", [{}, ALL_LAYERS])
def test_peft_reads_the_saved_adapter_with_equal_logits(options, tmp_path):
    model = make_trained(**options)
    model.save_adapter(tmp_path / "adapter")
    head = options.get("head", "linear")
    base = dinoseg.create_model("tiny_surgical", head=head, adapter="frozen", num_classes=2, seed=7)
    read = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(read(IMAGES), model(IMAGES))


def save_with_trained_norm():
    model = make_trained()
    model.backbone.norm.requires_grad_(True)
    model.save_adapter("adapter")


def without_lora():
    return dinoseg.create_model("tiny_surgical", num_classes=2)


test_message_names_value_and_remedy = refusals(
    {
        "merge without LoRA": (lambda: without_lora().merge(), "no LoRA layers", "adapter=lora"),
        "adapter without LoRA": (lambda: without_lora().save_adapter("adapter"), "no LoRA layers", "adapter=lora"),
        "further weights of the backbone": (save_with_trained_norm, "norm", " is trained", "Use save"),
        "precision of a graph": (
            lambda: dinoseg.export_onnx(without_lora(), IMAGES, out_dir="onnx", **{"export.precision": "int3"}),
            *("int3", " is unknown. Choose one of float32, float16, int8"),
        ),
    }
)

CHANGES = {
    "merged": (lambda layer: layer.merge(), lambda layer: layer.unmerge()),
    "scaled": (lambda layer: layer.scale_layer(2), lambda layer: layer.unscale_layer()),
    "no adapter": (lambda layer: layer.set_adapter([]), lambda layer: layer.set_adapter("default")),
    "off": (lambda layer: layer.enable_adapters(False), lambda layer: layer.enable_adapters(True)),
}

QUICK = ("merged", "off")
PARAMS = [pytest.param(change, marks=() if change in QUICK else pytest.mark.heavy) for change in CHANGES]


@pytest.mark.parametrize("change", PARAMS)
def test_peft_layers_that_are_merged_or_off_are_not_saved(change, tmp_path):
    """A file of such a model would give other logits."""
    model = make_trained(std=0.1)
    file = tmp_path / "model.safetensors"
    adapter = tmp_path / "adapter"
    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    apply, undo = CHANGES[change]
    before = model(IMAGES)
    for layer in layers:
        apply(layer)
    saves = [partial(model.save, file, delta=delta) for delta in (False, True)]
    for refused in (*saves, partial(model.save_adapter, adapter), model.merge):
        assert_refused(refused, "peft", "unmerge", "enable_adapters")
    assert not file.exists() and not adapter.exists()
    for layer in layers:
        undo(layer)
    # a merge and its reverse round, and a delta needs the very weights of its source
    for save in saves[: 1 if change == "merged" else 2]:
        save()
        assert torch.allclose(dinoseg.load(file, device="cpu")(IMAGES), before, atol=1e-4)
