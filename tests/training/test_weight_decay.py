"""Weight decay applies to the weights of convolutions, linear layers and attention, and to nothing else."""

import re

import pytest
from config_files import required_overrides, written_choices
from torch import nn

from dinoseg.models.adapters import Full
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.cnn import CnnHead
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.heads.dpt import DptHead
from dinoseg.models.heads.eomt import EomtHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mask2former.head import Mask2FormerHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.models.heads.slots.head import SlotHead
from dinoseg.models.heads.upernet import UperNetHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.optim import parameter_groups

# by timm model: names of its own parameters that are neither weights nor biases, and of the linear layers and
# convolutions that timm's `no_weight_decay` exempts
EXEMPT = {
    "swin_tiny_patch4_window7_224": ({"relative_position_bias_table"}, ""),
    "swinv2_tiny_window8_256": ({"logit_scale", "q_bias", "v_bias"}, "cpb_mlp"),
    "mvitv2_tiny": ({"rel_pos_h", "rel_pos_w"}, ""),
    "samvit_base_patch16": ({"pos_embed", "rel_pos_h", "rel_pos_w"}, ""),
    "tiny_vit_5m_224": ({"attention_biases"}, ""),
    "fastvit_t8": ({"gamma"}, ""),
    "xcit_nano_12_p16_224": ({"gamma1", "gamma2", "gamma3", "temperature"}, "pos_embed"),
}


def decay_of(model):
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    return {name: group["weight_decay"] for group in groups for name in group["names"]}


def leaf_names(model):
    """Yield each trained parameter with its name, its module and its name within it."""
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if parameter.requires_grad:
            yield name, model.get_submodule(module), leaf, parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", EXEMPT)
def test_weight_decay_of_timm_models_is_by_meaning(name):
    """Weights of convolutions and linear layers are decayed; norms, positions, scales and temperatures are not."""
    backbone = Full()(TimmBackbone(name, "random", None))
    own, exempt = EXEMPT[name]
    model = SegmentationModel(backbone, LinearHead(backbone.dim, 1, 2))
    found = decay_of(model)
    assert {leaf for _, _, leaf, _ in leaf_names(model)} - {"weight", "bias"} == own
    for full, module, leaf, parameter in leaf_names(model):
        is_norm = "Norm" in type(module).__name__
        decays = leaf == "weight" and not is_norm and not (exempt and f".{exempt}." in full)
        assert found[full] == (0.1 if decays else 0.0), (full, tuple(parameter.shape))
    assert not exempt or any(f".{exempt}." in full and leaf == "weight" for full, _, leaf, _ in leaf_names(model))


SLOTS = {"num_slots": 3, "slot_dim": 16, "hidden_dim": 32, "decoder_dim": 24, "positions_grid": [4, 4]}
HEADS = {
    "linear": lambda: LinearHead(64, 4, 2),
    "mlp": lambda: MlpHead(64, 4, 2, 8),
    "cnn": lambda: CnnHead(64, 4, 2, 14, channels=16),
    "dpt": lambda: DptHead(64, 4, 2),
    "upernet": lambda: UperNetHead(64, 4, 2, 16),
    "detail": lambda: DetailHead(64, 4, 2, 14),
    "eomt": lambda: EomtHead(64, 4, 2, patch_size=14, num_queries=5, blocks=1),
    "mask2former": lambda: Mask2FormerHead(64, 4, 2, hidden_dim=64, num_queries=5, feedforward_dim=32),
    "slots": lambda: SlotHead(64, 1, predictor="savi", decoder="mlp", **SLOTS),
    "slot_contrast": lambda: SlotHead(64, 1, slot_init="learned", predictor="transformer", token_mlp=True, **SLOTS),
    "videosaur": lambda: SlotHead(
        64, 1, decoder="slot_mixer", positions="added", mixer_blocks=1, similarity=True, **SLOTS
    ),
}


TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 1, "image_size": 28}


@pytest.mark.parametrize("head", HEADS)
def test_weight_decay_of_heads_is_by_meaning(head):
    vectors = (
        r"queries|query_\w+|level_\w+|learned_slots|mean|log_variance|table|\w*tokens?|position_embeddings|lambda1"
    )
    backbone = TransformersVit("dinov2", TINY, "random", 14, layers=(0, 0, 1, 1))
    model = SegmentationModel(Full()(backbone), HEADS[head]())
    found = decay_of(model)
    for name, module, leaf, _ in leaf_names(model):
        is_exempt = "Norm" in type(module).__name__ or "bias" in leaf or re.search(rf"\.({vectors})(\.weight)?$", name)
        assert found[name] == (0.0 if is_exempt else 0.1), name


@pytest.mark.parametrize("module", [nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)), nn.Embedding(3, 4)])
def test_norms_and_embeddings_of_two_axes_are_not_decayed(module):
    backbone = TransformersVit("dinov2", {**TINY, "num_hidden_layers": 1}, "random", 14)
    model = SegmentationModel(backbone, LinearHead(64, 1, 2))
    model.head.part = module
    found = decay_of(model)
    assert module.weight.ndim == 2 and found["head.part.weight"] == 0.0 and found["head.classify.weight"] == 0.1


@pytest.mark.parametrize(
    ("hparam", "rule"),
    [
        *(("eomt_ade20k", (0.05, "all")), ("eomt_ade20k_dinov3", (0.05, "all")), ("linear_ade20k", (1e-3, "all"))),
        *(("linear_ade20k_dinov2", (1e-4, "all")), ("idd_m2f", (1e-4, "matrices"))),
        *(("slotcontrast_movi_c", (0.0, "matrices")), ("videosaur_movi_c", (0.0, "matrices"))),
    ],
)
def test_official_recipes_keep_their_weight_decay(compose, hparam, rule):
    optimizer = compose(f"hparam={hparam}", *required_overrides(written_choices(hparam))).optim.optimizer
    assert (optimizer.weight_decay, optimizer.weight_decay_on) == rule
