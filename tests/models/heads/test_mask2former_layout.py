"""Names, shapes and parameter counts of the segmentor that Meta released with DINOv3."""

import itertools
import re

import torch

from dinoseg.models.heads.mask2former.head import Mask2FormerHead, meta_name

# What Meta's file holds for ViT-7B/16 and 150 classes: name with {choices}, and shape
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
    ("0.spm.fc1.weight", "4096x64x1x1"),
    ("0.spm.fc2.weight", "4096x128x1x1"),
    ("0.spm.fc{3,4}.weight", "4096x256x1x1"),
    ("0.spm.fc{1,2,3,4}.bias", "4096"),
    ("0.{EXTRACTOR}.{query_norm,feat_norm,ffn_norm}.{weight,bias}", "4096"),
    ("0.{EXTRACTOR}.attn.sampling_offsets.weight", "128x4096"),
    ("0.{EXTRACTOR}.attn.sampling_offsets.bias", "128"),
    ("0.{EXTRACTOR}.attn.attention_weights.weight", "64x4096"),
    ("0.{EXTRACTOR}.attn.attention_weights.bias", "64"),
    ("0.{EXTRACTOR}.attn.value_proj.weight", "2048x4096"),
    ("0.{EXTRACTOR}.attn.value_proj.bias", "2048"),
    ("0.{EXTRACTOR}.attn.output_proj.weight", "4096x2048"),
    ("0.{EXTRACTOR}.attn.output_proj.bias", "4096"),
    ("0.{EXTRACTOR}.ffn.fc1.weight", "1024x4096"),
    ("0.{EXTRACTOR}.ffn.{fc1,dwconv.dwconv}.bias", "1024"),
    ("0.{EXTRACTOR}.ffn.dwconv.dwconv.weight", "1024x1x3x3"),
    ("0.{EXTRACTOR}.ffn.fc2.weight", "4096x1024"),
    ("0.{EXTRACTOR}.ffn.fc2.bias", "4096"),
    ("0.up.weight", "4096x4096x2x2"),
    ("0.up.bias", "4096"),
    ("0.norm{1,2,3,4}.{BATCH_NORM}", "4096"),
    ("0.norm{1,2,3,4}.num_batches_tracked", ""),
    ("1.pixel_decoder.input_convs.{0,1,2}.0.weight", "2048x4096x1x1"),
    ("1.pixel_decoder.input_convs.{0,1,2}.0.bias", "2048"),
    ("1.pixel_decoder.input_convs.{0,1,2}.1.{weight,bias}", "2048"),
    ("1.pixel_decoder.encoder.level_encoding", "3x2048"),
    ("1.{ENCODER}.self_attn.sampling_offsets.weight", "384x2048"),
    ("1.{ENCODER}.self_attn.sampling_offsets.bias", "384"),
    ("1.{ENCODER}.self_attn.attention_weights.weight", "192x2048"),
    ("1.{ENCODER}.self_attn.attention_weights.bias", "192"),
    ("1.{ENCODER}.self_attn.{value_proj,output_proj}.weight", "2048x2048"),
    ("1.{ENCODER}.self_attn.{value_proj,output_proj}.bias", "2048"),
    ("1.{ENCODER}.norm{1,2}.{weight,bias}", "2048"),
    ("1.{ENCODER}.linear1.weight", "4096x2048"),
    ("1.{ENCODER}.linear1.bias", "4096"),
    ("1.{ENCODER}.linear2.weight", "2048x4096"),
    ("1.{ENCODER}.linear2.bias", "2048"),
    ("1.pixel_decoder.mask_feature.weight", "2048x2048x1x1"),
    ("1.pixel_decoder.mask_feature.bias", "2048"),
    ("1.pixel_decoder.lateral_convs.0.weight", "2048x4096x1x1"),
    ("1.pixel_decoder.output_convs.0.weight", "2048x2048x3x3"),
    ("1.pixel_decoder.{lateral,output}_convs.0.norm.{weight,bias}", "2048"),
    ("1.predictor.{ATTENTION}.in_proj_weight", "6144x2048"),
    ("1.predictor.{ATTENTION}.in_proj_bias", "6144"),
    ("1.predictor.{ATTENTION}.out_proj.weight", "2048x2048"),
    ("1.predictor.{ATTENTION}.out_proj.bias", "2048"),
    ("1.predictor.transformer_{self_attention,cross_attention,ffn}_layers.{NINE}.norm.{weight,bias}", "2048"),
    ("1.predictor.transformer_ffn_layers.{NINE}.linear1.weight", "4096x2048"),
    ("1.predictor.transformer_ffn_layers.{NINE}.linear1.bias", "4096"),
    ("1.predictor.transformer_ffn_layers.{NINE}.linear2.weight", "2048x4096"),
    ("1.predictor.transformer_ffn_layers.{NINE}.linear2.bias", "2048"),
    ("1.predictor.post_norm.{weight,bias}", "2048"),
    ("1.predictor.query_{feat,embed}.weight", "100x2048"),
    ("1.predictor.level_embed.weight", "3x2048"),
    ("1.predictor.class_embed.weight", "151x2048"),
    ("1.predictor.class_embed.bias", "151"),
    ("1.predictor.mask_embed.layers.{0,1,2}.weight", "2048x2048"),
    ("1.predictor.mask_embed.layers.{0,1,2}.bias", "2048"),
)
NINE = [str(number) for number in range(9)]
LISTS = {
    "BATCH_NORM": ["weight", "bias", "running_mean", "running_var"],
    "EXTRACTOR": [
        *(f"interactions.{block}.extractor" for block in range(4)),
        *(f"interactions.3.extra_extractors.{number}" for number in range(2)),
    ],
    "ENCODER": [f"pixel_decoder.encoder.encoder.layers.{number}" for number in range(6)],
    "NINE": NINE,
    "ATTENTION": [f"transformer_self_attention_layers.{number}.self_attn" for number in NINE]
    + [f"transformer_cross_attention_layers.{number}.multihead_attn" for number in NINE],
}


def names_in_file(pattern):
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [LISTS.get(part, part.split(",")) if odd % 2 else [part] for odd, part in enumerate(parts)]
    return [f"segmentation_model.{''.join(chosen)}" for chosen in itertools.product(*choices)]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def released_head(num_classes=150, **options):
    with torch.device("meta"):
        return Mask2FormerHead(4096, 4, num_classes, hidden_dim=2048, feedforward_dim=4096, **options)


def test_names_and_shapes_are_those_of_the_released_file():
    expected = {name: shape for pattern, shape in FILE for name in names_in_file(pattern)}
    found = {meta_name(name): "x".join(map(str, value.shape)) for name, value in released_head().state_dict().items()}
    assert len(expected) == 479
    assert found == expected


def test_parameter_counts_of_the_released_segmentor():
    head = released_head()
    class_layer = count(head.predictor.class_embed)
    assert count(head.adapter) == 227_084_736
    assert count(head.pixel_decoder) == 233_719_168
    assert count(head.predictor) - class_layer == 466_307_072
    assert class_layer == 309_399
    assert 6_716_043_264 + count(head) == 7_643_463_639


def test_only_the_new_class_layer_is_trainable_if_configured():
    head = released_head(26, no_object=False, trainable="class_embed")
    trained = {name: value.numel() for name, value in head.named_parameters() if value.requires_grad}
    assert trained == {"predictor.class_embed.weight": 2048 * 26, "predictor.class_embed.bias": 26}
    assert sum(trained.values()) == 53_274
    assert 6_716_043_264 + count(head) == 7_643_207_514
