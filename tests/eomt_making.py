"""Small EoMT heads with their backbones, and a spy on attention."""

import torch
import torch.nn.functional as F

from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.models.adapters import Full
from dinoseg.models.backbones import attention
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
FAMILIES = {
    "vit": ({**SMALL, "intermediate_size": 48, "image_size": 32}, 8),
    "dinov2": ({**SMALL, "mlp_ratio": 2, "image_size": 56}, 14),
    "dinov3_vit": ({**SMALL, "intermediate_size": 48, "num_register_tokens": 4, "layerscale_value": 1.0}, 16),
}


def pair(family="dinov3_vit", blocks=2, adapter=None, held=None, **options):
    """Return a backbone of one of FAMILIES, or of timm by its name, and a head."""
    torch.manual_seed(0)
    if family in FAMILIES:
        arch, patch = FAMILIES[family]
        backbone = TransformersVit(family, arch, "random", patch, **(held or {}))
    else:
        backbone = TimmBackbone(family, "random", None, **(held or {}))
    backbone = (adapter or Full())(backbone)
    head = EomtHead(backbone.dim, 1, 4, patch_size=backbone.patch_size, blocks=blocks, num_queries=5, **options)
    return backbone, head


def spy_on_attention(monkeypatch):
    calls = []
    given = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape[-2], key.shape[-2], None if attn_mask is None else attn_mask))
        return given(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    return calls
