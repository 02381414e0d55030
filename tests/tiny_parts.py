"""Every backbone family in a size that takes milliseconds, from its own config option."""

import copy
from functools import cache

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dinoseg.__main__ import CONFIGS
from dinoseg.config.resolvers import register_resolvers
from dinoseg.models.backbones.transformers_vit import TransformersVit

VIT = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
BACKBONES = {  # the option, and what makes it small
    "dino": ("dino_vits16", {"arch": {**VIT, "intermediate_size": 64, "image_size": 32}}),
    "dinov2": ("dinov2_vits14", {"arch": {**VIT, "mlp_ratio": 1, "image_size": 28}}),
    "dinov2_registers": ("dinov2_vits14_reg4", {"arch": {**VIT, "mlp_ratio": 1, "image_size": 28}}),
    "dinov3": ("dinov3_vits16", {"arch": {**VIT, "intermediate_size": 64, "layerscale_value": 1.0}}),
    "convnext": ("dinov3_convnext_tiny", {"arch": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}}),
    "timm_vit": ("timm", {"name": "test_vit"}),
    "timm_pyramid": ("timm", {"name": "test_convnext"}),
}
WEIGHTLESS = {"rgb": ("rgb", {})}  # nothing to train: no weights, no blocks, no gradients
PYRAMIDS = ("convnext", "timm_pyramid")
SMALL_HEADS = {
    "cnn": {"channels": 16},
    "dpt": {"features": 16},
    "upernet": {"channels": 16},
    "detail": {"fine": 4, "width": 8, "channels": 3},
    "mask2former": {"num_queries": 6, "num_heads": 4, "hidden_dim": 64, "feedforward_dim": 32, "drop_path": 0.0},
    "eomt": {"num_queries": 6, "blocks": 2},
    "pmt": {"num_queries": 6, "blocks": 2},
}
BASE = ("data.classes=[a,b,c]", "data.root=none", "engine=cpu")


@cache
def _compose_tiny(overrides):
    register_resolvers()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return OmegaConf.to_container(compose("main", [*BASE, *overrides]))


def load(*overrides):
    """Compose a config as the command line does, the same words once; interpolations stay as they are typed."""
    return copy.deepcopy(_compose_tiny(overrides))


@cache
def _compose_option(group, option):
    register_resolvers()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return OmegaConf.to_container(compose(f"{group}/{option}"))[group]


def load_option(group, option):
    """Return the node of an option of `backbone`, `head` or `loss`, in a fraction of the time of a whole config."""
    return copy.deepcopy(_compose_option(group, option))


def tiny_node(name):
    """Return the config node of a family's tiny backbone, untrained."""
    option, small = (BACKBONES | WEIGHTLESS)[name]
    untrained = {"channels": 3} if name in WEIGHTLESS else {"channels": 3, "weights": "random"}
    return OmegaConf.merge(load_option("backbone", option), small, untrained)


def tiny_vit(layers=(-1,), **options):
    """Return a random two-block DINOv3-type transformer with 8 px patches, 24 wide."""
    torch.manual_seed(0)
    arch = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "num_register_tokens": 4,
    }
    return TransformersVit("dinov3_vit", arch, "random", 8, layers, **options)
