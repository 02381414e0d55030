"""Made-up weights in the layout of Meta's published files."""

import math
from functools import partial

import torch

from dinoseg.extensions.query_heads.mask2former.head import Mask2FormerHead, meta_name

RELEASED_ARCH = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
RELEASED = (  # overrides for the files of write_released
    *("backbone=dinov3_vits16", "head.hidden_dim=64"),
    *(f"backbone.arch.{key}={value}" for key, value in RELEASED_ARCH.items()),
)
WIDTH, DEPTH, HEADS, PATCH, SIDE, HIDDEN = 24, 3, 3, 8, 5, 64


def meta_state(family, width=WIDTH, depth=DEPTH, patch=PATCH, side=SIDE, **options):
    """Return seeded weights by the names and shapes of Meta's files."""
    make = options.get("make", partial(torch.randn, generator=torch.Generator().manual_seed(0)))
    registers, hidden = options.get("registers", 0), options.get("hidden", HIDDEN)
    state = {"cls_token": make(1, 1, width), "patch_embed.proj.weight": make(width, 3, patch, patch) / patch}
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if family == "dinov3_vit":
        dim = width // options.get("heads", HEADS)
        periods = 100 ** (torch.arange(dim // 4) / (dim // 4))
        state |= {"rope_embed.periods": periods.bfloat16()}
        if count := options.get("registers", 4):
            state["storage_tokens"] = make(1, count, width)
        wide = ("w1", "w2") if options.get("gated") else ("fc1",)
        linears |= {f"mlp.{name}": (hidden, width) for name in wide}
    else:
        state["pos_embed"] = make(1, 1 + side * side, width)
        if registers:
            state["register_tokens"] = make(1, registers, width)
        linears |= {"mlp.w12": (2 * hidden, width)} if options.get("gated") else {"mlp.fc1": (hidden, width)}
    linears["mlp.w3" if options.get("gated") else "mlp.fc2"] = (width, hidden)
    qkv_bias = options.get("qkv_bias", True)
    norms = {"norm": width} | ({"local_cls_norm": width} if options.get("local") else {})
    for block in range(depth):
        norms |= {f"blocks.{block}.norm1": width, f"blocks.{block}.norm2": width}
        for name, shape in linears.items():
            state[f"blocks.{block}.{name}.weight"] = make(*shape) / math.sqrt(shape[1])
            if qkv_bias or name != "attn.qkv":
                state[f"blocks.{block}.{name}.bias"] = make(shape[0])
        if family != "vit":
            state |= {f"blocks.{block}.ls{i}.gamma": make(width) for i in (1, 2)}
        if family == "dinov3_vit" and qkv_bias:
            mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(width)
            state[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    state |= {f"{name}.weight": 1 + 0.3 * make(size) for name, size in norms.items()}
    state |= {f"{name}.bias": make(size) for name, size in norms.items()}
    state["patch_embed.proj.bias"] = make(width)
    if family != "vit":
        state["mask_token"] = make(1, width)
    return state


def write_released(folder):
    """Write a small backbone and segmentor of 150 classes as Meta's two files, and return their paths."""
    state = meta_state("dinov3_vit", width=64, depth=4, patch=16, hidden=64, heads=4, registers=4)
    torch.save(state, folder / "backbone.pth")
    torch.manual_seed(3)
    head = Mask2FormerHead(64, 4, 150, hidden_dim=64, feedforward_dim=4096)
    with torch.no_grad():  # queries that stay apart, so that there are several classes on a picture
        for name, parameter in head.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "predictor.transformer" in name and parameter.ndim > 1:
                parameter.mul_(0.1)
        head.predictor.class_embed.weight.mul_(20)
        head.predictor.mask_embed.layers[2].weight.mul_(10)
    torch.save({meta_name(name): value for name, value in head.state_dict().items()}, folder / "head.pth")
    return folder / "backbone.pth", folder / "head.pth"
