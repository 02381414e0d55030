"""Learning rates and mask probabilities of the recipes of objects, as the official codes compute them."""

import pytest
from config_files import required_overrides, written_choices
from omegaconf import OmegaConf
from torch import nn

from dinoseg.config.nodes import instantiate
from dinoseg.core.contracts import Head
from dinoseg.extensions.query_heads.eomt import annealing_windows, is_in_steps, masked_share
from dinoseg.models.adapters import Frozen, Full
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.model import SegmentationModel
from dinoseg.training.optim import set_learning_rates

# Computed by `configure_optimizers` and `mask_annealing` of training/lightning_module.py in tue-mps/eomt (7bd19dd) and
# tue-mps/pmt (54d73c9), with their configurations and small networks of the same depth. By step: the rates of the head,
# the patch embedding, the block before those that queries join and the first of these, and the mask probabilities.
OFFICIAL = {
    "eomt_coco_panoptic": {
        1: ([2e-7, 0, 0, 0], [1, 1, 1, 1]),
        1234: ([9.92506398e-5, 4.33277125e-7, 3.006464e-5, 3.75808e-5], [1, 1, 1, 1]),
        4321: ([9.60920823e-5, 5.73079142e-7, 3.97653537e-5, 4.97066921e-5], [1, 1, 1, 1]),
        30000: ([6.93161999e-5, 4.13391691e-7, 2.86848108e-5, 3.58560136e-5], [0, 0.973414622, 1, 1]),
        52345: ([4.5033473e-5, 2.68573055e-7, 1.86359993e-5, 2.32949992e-5], [0, 0, 0.496043493, 1]),
        70000: ([2.47516367e-5, 1.47615146e-7, 1.02428584e-5, 1.2803573e-5], [0, 0, 0, 0.302133724]),
    },
    "eomt_coco_instance": {
        1: ([2e-7, 0, 0, 0], [1, 1, 1, 1]),
        1234: ([9.92442616e-5, 4.33277125e-7, 3.006464e-5, 3.75808e-5], [1, 1, 1, 1]),
        4321: ([9.60587592e-5, 5.72930723e-7, 3.9755055e-5, 4.96938187e-5], [1, 1, 1, 1]),
        30000: ([6.90493688e-5, 4.11836517e-7, 2.85768989e-5, 3.57211237e-5], [0, 0.973414622, 1, 1]),
        52345: ([4.45413157e-5, 2.65661231e-7, 1.8433951e-5, 2.30424387e-5], [0, 0, 0.496043493, 1]),
        70000: ([2.40458183e-5, 1.43418343e-7, 9.95164666e-6, 1.24395583e-5], [0, 0, 0, 0.302133724]),
    },
    "eomt_coco_panoptic_dinov3": {
        1: ([1e-7, 0, 0, 0], [0.999699995, 1, 1, 1]),
        1234: ([0.0001234, 0, 0, 0], [0.620701079, 1, 1, 1]),
        4321: ([0.000195174355, 9.13384384e-7, 6.33787733e-5, 0.000154733333], [0, 1, 1, 1]),
        30000: ([0.000140789379, 8.57837767e-7, 5.95244526e-5, 0.00014532337], [0, 0.973414622, 1, 1]),
        52345: ([9.14682962e-5, 5.57321579e-7, 3.8671953e-5, 9.44139479e-5], [0, 0, 0.496043493, 1]),
        70000: ([5.02734941e-5, 3.06319285e-7, 2.12551702e-5, 5.18925054e-5], [0, 0, 0, 0.302133724]),
    },
    "eomt_coco_panoptic_dinov3_vits": {
        1: ([1e-7, 0, 0, 0], [0.999699995, 1, 1]),
        1234: ([0.0001234, 0, 0, 0], [0.620701079, 1, 1]),
        4321: ([0.000197616329, 1.32914921e-5, 7.92234667e-5, 0.000154733333], [0, 1, 1]),
        93236: ([0.000103271014, 9.0097349e-6, 5.37022048e-5, 0.000104887119], [0, 0.385040789, 1]),
        135519: ([5.50940892e-5, 4.80660662e-6, 2.8649608e-5, 5.59562656e-5], [0, 0, 0.45421294]),
    },
    "eomt_coco_instance_dinov3": {
        1: ([1e-7, 0, 0, 0], [1, 1, 1, 1]),
        1234: ([0.0001234, 0, 0, 0], [1, 1, 1, 1]),
        4321: ([0.000195132525, 9.13384384e-7, 6.33787733e-5, 0.000154733333], [1, 1, 1, 1]),
        30000: ([0.000140265997, 8.54887517e-7, 5.93197378e-5, 0.000144823579], [0, 0.973414622, 1, 1]),
        52345: ([9.04806544e-5, 5.51457826e-7, 3.82650735e-5, 9.34205895e-5], [0, 0, 0.496043493, 1]),
        70000: ([4.88463653e-5, 2.97706848e-7, 2.06575623e-5, 5.04335017e-5], [0, 0, 0, 0.302133724]),
    },
    "pmt_coco_panoptic": {
        1: ([3.33333333e-8], [0.999699995, 1, 1, 1, 1, 1]),
        1234: ([4.11333333e-5], [0.620701079, 1, 1, 1, 1, 1]),
        4321: ([0.000144033333], [0, 1, 1, 1, 1, 1]),
        30000: ([0.000161232886], [0, 0.603425991, 1, 1, 1, 1]),
        52345: ([8.1122612e-5], [0, 0, 0, 0.296285632, 0.871986089, 1]),
        70000: ([2.41736232e-5], [0, 0, 0, 0, 0, 0.302133724]),
    },
    "pmt_coco_instance": {
        1: ([3.33333333e-8], [0.999699995, 1, 1, 1, 1, 1]),
        1234: ([4.11333333e-5], [0.620701079, 1, 1, 1, 1, 1]),
        4321: ([0.000144033333], [0, 1, 1, 1, 1, 1]),
        30000: ([0.000160576326], [0, 0.603425991, 1, 1, 1, 1]),
        52345: ([7.95553001e-5], [0, 0, 0, 0.296285632, 0.871986089, 1]),
        70000: ([2.27530689e-5], [0, 0, 0, 0, 0, 0.302133724]),
    },
}


class JoinedHead(Head):
    """A single layer, whose queries join the last blocks."""

    def __init__(self, blocks):
        super().__init__()
        self.layer, self.joint_blocks = nn.Linear(16, 2), blocks


@pytest.fixture
def build_optimizer(compose):
    """Return a function that returns a recipe's config, and its optimizer of a small network of the same depth."""

    def build(hparam):
        cfg = compose(f"hparam={hparam}", *required_overrides(written_choices(hparam)))
        arch = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "num_register_tokens": 4}
        arch |= {"num_hidden_layers": cfg.backbone.arch.num_hidden_layers, "intermediate_size": 16}
        adapter = Full() if hparam.startswith("eomt") else Frozen()
        assert cfg.adapter._target_ == f"dinoseg.models.adapters.{type(adapter).__name__}"
        backbone = adapter(TransformersVit("dinov3_vit", arch, "random", 16))
        return cfg, instantiate(cfg.optim.optimizer)(SegmentationModel(backbone, JoinedHead(cfg.head.blocks)))

    return build


@pytest.mark.parametrize("hparam", OFFICIAL)
def test_schedules_are_those_of_the_official_code(build_optimizer, hparam):
    cfg, optimizer = build_optimizer(hparam)
    schedule = instantiate(cfg.optim.schedule)
    steps = cfg.trainer.steps
    blocks = cfg.head.blocks
    anneal = annealing_windows(OmegaConf.to_container(cfg.head)["anneal"], blocks)
    joint = cfg.backbone.arch.num_hidden_layers - blocks
    parts = ["head.", ".patch_embeddings.", f".layer.{joint - 1}.", f".layer.{joint}."]
    for step, (rates, shares) in OFFICIAL[hparam].items():
        set_learning_rates(optimizer, schedule, step, steps)
        found = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
        for part, rate in zip(parts[: len(rates)], rates, strict=True):
            values = {found[name] for name in found if part in name}
            assert len(values) == 1 and values.pop() == pytest.approx(rate, rel=1e-8), (step, part)
        assert len(rates) == 4 or all(name.startswith("head.") for name in found)
        ours = [masked_share(step if is_in_steps(window) else step / steps, window) for window in anneal]
        assert ours == pytest.approx(shares, abs=1e-8)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}
