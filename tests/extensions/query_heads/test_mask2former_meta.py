"""The Mask2Former head against Meta's segmentor: numbers of its computation, and files in its layout."""

import itertools
import logging
import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinoseg.extensions.query_heads.mask2former.head import Mask2FormerHead, meta_name
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow  # large files of weights

TINY = {"hidden_dim": 64, "num_heads": 4, "feedforward_dim": 8, "num_queries": 3}


def noise(name, *shape):
    """Return numbers in -1..1 that depend on the name alone: the same on every machine."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64) + zlib.crc32(name.encode()) % 10007
    return ((steps * 12.9898).sin() * 43758.5453).frac().view(shape).float()


def made_weight(name, shape):
    if not shape:
        return torch.tensor(7)
    if len(shape) > 1:
        scale = 1.7 if "level_e" in name or "query_" in name else math.sqrt(3 / math.prod(shape[1:]))
        return noise(name, *shape) * scale
    if name.endswith("sampling_offsets.bias"):
        return noise(name, *shape) * 2
    return noise(name, *shape) / 5 + name.endswith(("norm.weight", "running_var"))


def made_file(head):
    return {meta_name(name): made_weight(meta_name(name), value.shape) for name, value in head.state_dict().items()}


# Of Meta's computation, retyped from its public repository for this comparison alone and kept outside the project (the
# released code itself was not run), with the weights, features (32 wide) and 64 x 96 pixels of `noise`: each map's mean
# absolute value, standard deviation and three of its numbers; two queries' classes, all masks at two places, and the
# semantic map at two pixels of 40 x 70
META = {
    "map 1": [0.34142, 0.46495, -0.24055, 0.34286, 0.15264],
    "map 2": [0.48068, 0.66302, -0.76951, -0.45575, -0.38981],
    "map 3": [0.40340, 0.55975, 0.21295, -0.27913, 0.78165],
    "map 4": [0.32453, 0.43763, -1.12865, 0.63974, -0.28117],
    "logits": [0.48082, 0.53140, -0.53495, -1.44205, -0.75764, 0.48070, 0.52734, -0.53534, -1.44044, -0.76034],
    "masks one": [7.67151, 7.68868, 7.67140, 7.67090, 7.68756, 7.67291],
    "masks two": [7.47626, 7.48969, 7.46392, 7.47449, 7.49253, 7.46450],
    "semantic": [2.10458, 2.21350, 0.76379, 0.30806, 1.83520, 1.93018, 0.66603, 0.26863],
}


def test_numbers_are_those_of_metas_computation(tmp_path):
    options = {"hidden_dim": 64, "feedforward_dim": 96, "num_queries": 6}
    torch.save(made_file(Mask2FormerHead(32, 4, 4, **options)), tmp_path / "made.pth")
    head = Mask2FormerHead(32, 4, 4, **options, weights=str(tmp_path / "made.pth")).eval()
    features = [noise(f"feature {index}", 1, 24, 32).mT.unflatten(2, (4, 6)) * 1.7 for index in range(4)]
    pixels = noise("pixels", 1, 3, 64, 96) * 1.7
    with torch.no_grad():
        maps = head.adapter(features, pixels)
        outputs = head.decode(features, pixels)
        semantic = head.predict(outputs, (40, 70), (1.0, 1.0))
    found = {
        f"map {number}": torch.stack([a.abs().mean(), a.std(), a[0, 3, -1, -2], a[0, -1, 0, 1], a[0, 17, 1, 2]])
        for number, a in enumerate(maps, start=1)
    }
    found["logits"] = outputs.class_logits[0, ::5].flatten()
    found["masks one"], found["masks two"] = outputs.mask_logits[0, :, 3, 5], outputs.mask_logits[0, :, -1, -1]
    found["semantic"] = torch.cat([semantic[0, :, 0, 0], semantic[0, :, 17, 33]])
    for name, expected in META.items():
        torch.testing.assert_close(found[name], torch.tensor(expected), rtol=0, atol=1e-4, msg=name)


def tiny(num_classes=2, dim=16, **options):
    torch.manual_seed(1)
    return Mask2FormerHead(dim, 4, num_classes, **{**TINY, **options})


@pytest.fixture(scope="module")
def whole():
    return made_file(tiny())


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="head.pth"):
        path = tmp_path / name
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, path)
        return str(path)

    return write


def refusal(path, **options):
    with pytest.raises(UserError) as raised:
        tiny(weights=str(path), **options)
    assert str(raised.value).startswith(f"weights={path}: ")
    return str(raised.value).removeprefix(f"weights={path}: ")


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_every_tensor_of_a_file_is_loaded(whole, write, name):
    loaded = {meta_name(name): value for name, value in tiny(weights=write(whole, name)).state_dict().items()}
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in loaded.items())


def test_half_precision_and_old_archives_are_read(whole, tmp_path):
    halved = {name: value.bfloat16() if value.is_floating_point() else value for name, value in whole.items()}
    torch.save(halved, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    parameter = tiny(weights=str(tmp_path / "old.pth")).predictor.post_norm.weight
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter, halved["segmentation_model.1.predictor.post_norm.weight"].float())


def test_keys_of_the_backbone_are_passed_over_and_counted(whole, write, caplog):
    backbone = {f"segmentation_model.0.backbone.blocks.{number}.weight": torch.ones(1) for number in range(3)}
    with caplog.at_level(logging.INFO):
        tiny(weights=write(whole | backbone))
    assert "ignored 3 keys of a backbone" in caplog.text


@pytest.mark.parametrize("no_object", [True, False])
def test_a_new_class_layer_takes_the_place_of_the_files(whole, write, no_object):
    head = tiny(7, weights=write(whole), class_layer="new", no_object=no_object)
    layer = head.predictor.class_embed
    outputs = 7 + no_object
    assert layer.weight.shape == (outputs, 64) and not layer.bias.any()
    assert 0.5 < layer.weight.abs().max() / math.sqrt(6 / (outputs + 64)) <= 1  # Xavier's bound
    assert layer.weight.unique().numel() > outputs * 32
    assert torch.equal(head.predictor.post_norm.weight, whole["segmentation_model.1.predictor.post_norm.weight"])
    again = tiny(weights=write(whole), class_layer="new").predictor.class_embed.weight  # of as many classes
    assert not torch.equal(again, whole["segmentation_model.1.predictor.class_embed.weight"])


def test_only_the_class_layer_gets_gradients_if_configured(whole, write):
    head = tiny(weights=write(whole), trainable="class_embed").train()
    outputs = head.decode([torch.randn(2, 16, 2, 3) for _ in range(4)], torch.randn(2, 3, 32, 48))
    (outputs.class_logits.square().mean() + outputs.mask_logits.square().mean()).backward()
    learnt = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert learnt == {"predictor.class_embed.weight", "predictor.class_embed.bias"}
    for option in ({"class_layer": "new"}, {"trainable": "class_embed"}):  # an outline needs no weights
        with torch.device("meta"):
            assert tiny(**option).predictor.class_embed.weight.requires_grad


def test_on_the_meta_device_a_file_is_checked_but_not_held(whole, write):
    with torch.device("meta"):
        head = tiny(weights=write(whole))
        assert "num_queries is 3 in the file and 4 in the model" in refusal(write(whole), num_queries=4)
    assert all(value.is_meta for value in head.state_dict().values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_classes": 5}, "class outputs is 3 in the file and 6 in the model (for other classes than the file's"),
        ({"no_object": False}, "class outputs is 3 in the file and 2 in the model"),
        ({"num_queries": 9}, "num_queries is 3 in the file and 9 in the model (set num_queries=3)"),
        ({"feedforward_dim": 16}, "feedforward_dim is 8 in the file and 16 in the model (set feedforward_dim=8)"),
        ({"num_heads": 2}, "num_heads is 4 in the file and 2 in the model (set num_heads=4)"),
        ({"dim": 32}, "the backbone's width is 16 in the file and 32 in the model (choose the backbone of the file)"),
    ],
)
def test_a_file_of_another_segmentor_is_refused_with_the_remedy(whole, write, options, expected):
    message = refusal(write(whole), **options)
    assert expected in message and "tensors have another shape" in message


@pytest.mark.parametrize("class_layer", ["loaded", "new"])
def test_missing_and_left_over_keys_are_named(whole, write, class_layer):
    gone = "segmentation_model.1.predictor.class_embed.bias"
    tensors = {name: value for name, value in whole.items() if name != gone} | {"teacher.cls_token": torch.ones(1)}
    message = refusal(write(tensors), class_layer=class_layer)
    assert f"1 missing ({gone}); 1 unexpected (teacher.cls_token)" in message
    backbone_alone = {"segmentation_model.0.backbone.cls_token": torch.ones(1)}
    assert "479 missing (segmentation_model.0.level_embed, " in refusal(write(backbone_alone))


def test_unreadable_files_are_refused(whole, write, tmp_path):
    assert refusal(tmp_path / "absent.pth") == "file not found. Check the path."
    for name in ("head.pth", "head.safetensors"):
        path = Path(write(whole, name))
        path.write_bytes(path.read_bytes()[:1000])
        assert "not a readable" in refusal(path)


LEVELS, STEM = "segmentation_model.0.level_embed", "segmentation_model.0.spm.stem.0.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: {"model": whole}, "not a plain dict of tensors"),
        (lambda whole: whole | {LEVELS: whole[LEVELS].char()}, f"{LEVELS} is int8"),
        (lambda whole: whole | {LEVELS: whole[LEVELS] / 0}, f"{LEVELS} holds NaN"),
        (
            lambda whole: whole | {STEM: torch.ones(64, 1, 3, 3)},
            f"1 tensors have another shape: {STEM} is (64, 1, 3, 3) in the file and (64, 3, 3, 3) in the model.",
        ),
    ],
)
def test_other_contents_are_refused(whole, write, change, said):
    assert said in refusal(write(change(whole)))


# What Meta's file holds for ViT-7B/16 and 150 classes: a name with {choices} and its shape, or a layer with the shapes
# of its weight and bias
FILE = (
    ("0.level_embed", "3x4096"),
    ("0.spm.stem.0.weight", "64x3x3x3"),
    ("0.spm.stem.{3,6}.weight", "64x64x3x3"),
    ("0.spm.stem.{1,4,7}.{BATCH_NORM}", "64"),
    ("0.spm.stem.{1,4,7}.num_batches_tracked", ""),
    ("0.spm.conv2.0.weight", "128x64x3x3"),
    ("0.spm.conv2.1.{BATCH_NORM}", "128"),
    ("0.spm.conv3.0.weight", "256x128x3x3"),
    ("0.spm.conv4.0.weight", "256x256x3x3"),
    ("0.spm.conv{3,4}.1.{BATCH_NORM}", "256"),
    ("0.spm.conv{2,3,4}.1.num_batches_tracked", ""),
    ("0.spm.fc1", "4096x64x1x1", "4096"),
    ("0.spm.fc2", "4096x128x1x1", "4096"),
    ("0.spm.fc{3,4}", "4096x256x1x1", "4096"),
    ("0.{EXTRACTOR}.{query_norm,feat_norm,ffn_norm}.{weight,bias}", "4096"),
    ("0.{EXTRACTOR}.attn.sampling_offsets", "128x4096", "128"),
    ("0.{EXTRACTOR}.attn.attention_weights", "64x4096", "64"),
    ("0.{EXTRACTOR}.attn.value_proj", "2048x4096", "2048"),
    ("0.{EXTRACTOR}.attn.output_proj", "4096x2048", "4096"),
    ("0.{EXTRACTOR}.ffn.fc1", "1024x4096", "1024"),
    ("0.{EXTRACTOR}.ffn.dwconv.dwconv", "1024x1x3x3", "1024"),
    ("0.{EXTRACTOR}.ffn.fc2", "4096x1024", "4096"),
    ("0.up", "4096x4096x2x2", "4096"),
    ("0.norm{1,2,3,4}.{BATCH_NORM}", "4096"),
    ("0.norm{1,2,3,4}.num_batches_tracked", ""),
    ("1.pixel_decoder.input_convs.{0,1,2}.0", "2048x4096x1x1", "2048"),
    ("1.pixel_decoder.input_convs.{0,1,2}.1.{weight,bias}", "2048"),
    ("1.pixel_decoder.encoder.level_encoding", "3x2048"),
    ("1.{ENCODER}.self_attn.sampling_offsets", "384x2048", "384"),
    ("1.{ENCODER}.self_attn.attention_weights", "192x2048", "192"),
    ("1.{ENCODER}.self_attn.{value_proj,output_proj}", "2048x2048", "2048"),
    ("1.{ENCODER}.norm{1,2}.{weight,bias}", "2048"),
    ("1.{ENCODER}.linear1", "4096x2048", "4096"),
    ("1.{ENCODER}.linear2", "2048x4096", "2048"),
    ("1.pixel_decoder.mask_feature", "2048x2048x1x1", "2048"),
    ("1.pixel_decoder.lateral_convs.0.weight", "2048x4096x1x1"),
    ("1.pixel_decoder.output_convs.0.weight", "2048x2048x3x3"),
    ("1.pixel_decoder.{lateral,output}_convs.0.norm.{weight,bias}", "2048"),
    ("1.predictor.{ATTENTION}.in_proj_weight", "6144x2048"),
    ("1.predictor.{ATTENTION}.in_proj_bias", "6144"),
    ("1.predictor.{ATTENTION}.out_proj", "2048x2048", "2048"),
    ("1.predictor.transformer_{self_attention,cross_attention,ffn}_layers.{NINE}.norm.{weight,bias}", "2048"),
    ("1.predictor.transformer_ffn_layers.{NINE}.linear1", "4096x2048", "4096"),
    ("1.predictor.transformer_ffn_layers.{NINE}.linear2", "2048x4096", "2048"),
    ("1.predictor.post_norm.{weight,bias}", "2048"),
    ("1.predictor.query_{feat,embed}.weight", "100x2048"),
    ("1.predictor.level_embed.weight", "3x2048"),
    ("1.predictor.class_embed", "151x2048", "151"),
    ("1.predictor.mask_embed.layers.{0,1,2}", "2048x2048", "2048"),
)
LISTS = {
    "BATCH_NORM": ["weight", "bias", "running_mean", "running_var"],
    "EXTRACTOR": [
        *(f"interactions.{block}.extractor" for block in range(4)),
        *(f"interactions.3.extra_extractors.{number}" for number in range(2)),
    ],
    "ENCODER": [f"pixel_decoder.encoder.encoder.layers.{number}" for number in range(6)],
    "NINE": list("012345678"),
    "ATTENTION": [f"transformer_self_attention_layers.{number}.self_attn" for number in range(9)]
    + [f"transformer_cross_attention_layers.{number}.multihead_attn" for number in range(9)],
}


def names_in_file(pattern):
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [LISTS.get(part, part.split(",")) if odd % 2 else [part] for odd, part in enumerate(parts)]
    return [f"segmentation_model.{''.join(chosen)}" for chosen in itertools.product(*choices)]


def test_names_and_shapes_are_those_of_the_released_file():
    with torch.device("meta"):
        state = Mask2FormerHead(4096, 4, 150, hidden_dim=2048, feedforward_dim=4096).state_dict()
    expected = {}
    for pattern, *shapes in FILE:
        for name in names_in_file(pattern):
            parts = [name] if len(shapes) == 1 else [f"{name}.weight", f"{name}.bias"]
            expected |= dict(zip(parts, shapes, strict=True))
    found = {meta_name(name): "x".join(map(str, value.shape)) for name, value in state.items()}
    assert len(expected) == 479
    assert found == expected
