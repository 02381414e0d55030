"""Conversion of Meta's DINO, DINOv2 and DINOv3 ViT checkpoints to the names of the Hugging Face hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoseg.utils.errors import UserError

INV_FREQ = "rope_embeddings.inv_freq"  # DINOv3's rotation frequencies, absent from the hub's files
LOCAL_CLS_NORM = "local_cls_norm."  # second final norm, used only in DINOv3's pre-training

FAMILIES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # transformers' model types
_NETWORKS = ("teacher", "student", "model", "state_dict")  # keys of a checkpoint that hold weights
_HEADS = ("head.", "dino_head.", "ibot_head.")  # pre-training heads in Meta's training checkpoints
_QKV = {"vit": ("query", "key", "value"), "dinov3_vit": ("q", "k", "v")}
_OUTSIDE = {  # tensors outside the blocks: Meta's name -> the hub's name
    "vit": {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
    "dinov3_vit": {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "rope_embed.periods": INV_FREQ,
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
}
_OUTSIDE["dinov2"] = _OUTSIDE["vit"] | {"mask_token": "embeddings.mask_token"}
_BLOCK = {  # modules in a block: Meta's name -> the hub's name
    "vit": {
        "norm1": "layernorm_before",
        "attn.qkv": "attention.attention.{}",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "dinov2": {
        "norm1": "norm1",
        "attn.qkv": "attention.attention.{}",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "norm2",
        "ls2.gamma": "layer_scale2.lambda1",
    },
    "dinov3_vit": {
        "norm1": "norm1",
        "attn.qkv": "attention.{}_proj",
        "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "norm2",
        "ls2.gamma": "layer_scale2.lambda1",
    },
}
_MLP = {  # by family and whether the MLP is gated (SwiGLU)
    ("vit", False): {},
    ("dinov2", False): {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    ("dinov2", True): {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"},
    ("dinov3_vit", False): {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"},
    ("dinov3_vit", True): {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"},
}


@dataclass(frozen=True)
class VitLayout:
    """Architecture of a vision transformer, as inferred from its weights or configuration."""

    family: str  # transformers' model type
    width: int
    depth: int
    patch_size: int
    registers: int = 0
    gated: bool = False  # SwiGLU

    def __str__(self) -> str:
        """Return a description in words."""
        name = {"vit": "DINO", "dinov3_vit": "DINOv3"}.get(self.family, "DINOv2")
        extras = [f"{self.registers} registers"] * bool(self.registers) + ["SwiGLU"] * self.gated
        parts = [f"width {self.width}", f"{self.depth} blocks", f"patches of {self.patch_size} px", *extras]
        return f"a {name} vision transformer ({', '.join(parts)})"


OPTIONS = {  # published models -> values of `backbone`
    VitLayout("vit", 384, 12, 8): "dino_vits8",
    VitLayout("vit", 384, 12, 16): "dino_vits16",
    VitLayout("vit", 768, 12, 8): "dino_vitb8",
    VitLayout("vit", 768, 12, 16): "dino_vitb16",
    VitLayout("dinov2", 384, 12, 14): "dinov2_vits14",
    VitLayout("dinov2", 768, 12, 14): "dinov2_vitb14",
    VitLayout("dinov2", 1024, 24, 14): "dinov2_vitl14",
    VitLayout("dinov2", 1536, 40, 14, gated=True): "dinov2_vitg14",
    VitLayout("dinov2_with_registers", 384, 12, 14, 4): "dinov2_vits14_reg4",
    VitLayout("dinov2_with_registers", 768, 12, 14, 4): "dinov2_vitb14_reg4",
    VitLayout("dinov2_with_registers", 1024, 24, 14, 4): "dinov2_vitl14_reg4",
    VitLayout("dinov2_with_registers", 1536, 40, 14, 4, gated=True): "dinov2_vitg14_reg4",
    VitLayout("dinov3_vit", 384, 12, 16, 4): "dinov3_vits16",
    VitLayout("dinov3_vit", 384, 12, 16, 4, gated=True): "dinov3_vits16plus",
    VitLayout("dinov3_vit", 768, 12, 16, 4): "dinov3_vitb16",
    VitLayout("dinov3_vit", 1024, 24, 16, 4): "dinov3_vitl16",
    VitLayout("dinov3_vit", 1280, 32, 16, 4, gated=True): "dinov3_vith16plus",
    VitLayout("dinov3_vit", 4096, 40, 16, 4, gated=True): "dinov3_vit7b16",
    VitLayout("dinov3_vit", 384, 12, 16): "surgenet_dinov3_vits16",
    VitLayout("dinov3_vit", 768, 12, 16): "surgenet_dinov3_vitb16",
    VitLayout("dinov3_vit", 1024, 24, 16): "surgenet_dinov3_vitl16",
}


def config_layout(config: Any) -> VitLayout:
    """Return the layout of a transformers configuration."""
    return VitLayout(
        config.model_type,
        config.hidden_size,
        config.num_hidden_layers,
        config.patch_size,
        getattr(config, "num_register_tokens", 0),
        getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False),
    )


def unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's backbone under plain names; content of any other form is returned under its own names.

    A pre-training checkpoint holds two networks, `teacher` and `student`, each a backbone with heads. The teacher's
    backbone is returned, as Meta publishes it, or the student's if there is no teacher. Weights under `model` or
    `state_dict`, as in some derived files, are returned like a teacher's. The blocks of models trained in chunks
    (`blocks.CHUNK.NUMBER`) are renamed to `blocks.NUMBER`.
    """
    names = dict(content)
    network = next((content[key] for key in _NETWORKS if isinstance(content.get(key), Mapping)), None)
    if network is not None:
        plain = {re.sub(r"^(module\.)?(backbone\.)?", "", name): value for name, value in network.items()}
        names = {name: value for name, value in plain.items() if not name.startswith(_HEADS)}
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in names.items()}


def is_meta(state: Mapping[str, object]) -> bool:
    """Return whether the weights use Meta's names for a vision transformer."""
    return "cls_token" in state and "patch_embed.proj.weight" in state


def from_meta(state: Mapping[str, Tensor], config: Any, source: str) -> dict[str, Tensor]:
    """Return Meta's weights of a vision transformer under the names of the hub's files.

    DINOv3's rotation periods are returned as `INV_FREQ`, and its norm for local crops, if present, as
    `LOCAL_CLS_NORM`; the hub's files have neither. Its key bias, which Meta's code masks, is checked to have no
    effect and left out, unless the configuration has a `key_bias`. SurgeNetDINO's DINOv3 (rlpddejong/SurgeNetDINO,
    segmentation_finetuning/models/vit.py) has one and no registers; its layer scales are named `gamma_1` and `gamma_2`.

    Args:
        state: Meta's tensors under plain names (see `unwrap`).
        config: transformers configuration of the target model.
        source: origin of the weights, for messages.

    Raises:
        UserError: another family or size, or a key bias that the model does not have.
    """
    state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value for name, value in state.items()}
    layout = _layout(state)
    _check_layout(layout, config, source)
    names = _names(layout, state)
    converted: dict[str, Tensor] = {}
    if layout.family == "dinov3_vit" and not layout.registers:
        converted["embeddings.register_tokens"] = state["cls_token"].new_empty(1, 0, layout.width)
    for name, value in state.items():
        if name in names and ".attn.qkv." in name:
            converted |= _split(name, names[name], state, config, source)
        else:  # the loader refuses what has no name of the hub
            converted[names.get(name, name)] = _tensor(name, value, layout.family)
    return converted


def _layout(state: Mapping[str, Tensor]) -> VitLayout:
    blocks = {int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in state) if match}
    registers = next((state[name].shape[-2] for name in ("register_tokens", "storage_tokens") if name in state), 0)
    if "pos_embed" not in state:
        family = "dinov3_vit"
    elif any(name.endswith("ls1.gamma") for name in state):
        family = "dinov2_with_registers" if registers else "dinov2"
    else:
        family = "vit"
    width, *_, patch_size = state["patch_embed.proj.weight"].shape
    gated = any(".mlp.w3." in name for name in state)
    return VitLayout(family, width, max(blocks, default=-1) + 1, patch_size, registers, gated)


def _check_layout(layout: VitLayout, config: Any, source: str) -> None:
    """Refuse another family or size by the name of its option; the loader would list hundreds of tensors."""
    wanted = config_layout(config) if config.model_type in FAMILIES else f"a {config.model_type}"
    if layout != wanted:
        option = OPTIONS.get(layout)
        remedy = f"Choose the backbone {option}" if option else "Set family, patch_size and arch to match"
        raise UserError(
            f"weights={source}: the file holds {layout}, but the backbone is {wanted}. {remedy}, or give the "
            "file for this backbone."
        )


def _names(layout: VitLayout, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map Meta's names to the hub's for all tensors of such a model; {} stands for q, k and v."""
    kind = "dinov2" if layout.family == "dinov2_with_registers" else layout.family
    names = dict(_OUTSIDE[kind])
    if layout.registers:
        names["storage_tokens" if kind == "dinov3_vit" else "register_tokens"] = "embeddings.register_tokens"
    modules = _BLOCK[kind] | _MLP[kind, layout.gated]
    endings = {name: [""] if name.endswith(".gamma") else [".weight", ".bias"] for name in modules}
    if kind == "dinov3_vit":  # the 7B model has no qkv bias, the others have a mask on it
        biases = [part for part in ("bias", "bias_mask") if any(name.endswith(f".attn.qkv.{part}") for name in state)]
        endings["attn.qkv"] = [".weight", *(f".{part}" for part in biases)]
        if any(name.startswith(LOCAL_CLS_NORM) for name in state):
            names |= {LOCAL_CLS_NORM + part: LOCAL_CLS_NORM + part for part in ("weight", "bias")}
    prefix = "layer" if kind == "dinov3_vit" else "encoder.layer"
    for block in range(layout.depth):
        for module, target in modules.items():
            for ending in endings[module]:
                names[f"blocks.{block}.{module}{ending}"] = f"{prefix}.{block}.{target}{ending}"
    return names


def _tensor(name: str, value: Tensor, family: str) -> Tensor:
    if name == "rope_embed.periods":
        return 1 / value.float()
    return value[None] if family == "dinov3_vit" and name == "mask_token" else value


def _split(name: str, target: str, state: Mapping[str, Tensor], config: Any, source: str) -> dict[str, Tensor]:
    """Split a fused qkv tensor into q, k and v, without a key bias that the model does not have."""
    if name.endswith(".bias_mask"):
        return {}  # `_split_bias` applies it to the bias
    family = config.model_type
    parts = dict(zip(_QKV.get(family, _QKV["vit"]), state[name].chunk(3), strict=True))
    if family == "dinov3_vit" and name.endswith(".bias"):
        parts = _split_bias(name, state, config.key_bias, source)
    return {target.format(part): value.clone() for part, value in parts.items()}  # safetensors refuses shared views


def _split_bias(name: str, state: Mapping[str, Tensor], key_bias: bool, source: str) -> dict[str, Tensor]:
    """Return the biases of q and v, and of k with `key_bias`, after Meta's bias mask."""
    mask = state.get(f"{name}_mask")
    query, key, value = (state[name] if mask is None else state[name] * mask).chunk(3)
    if key_bias:
        return {"q": query, "k": key, "v": value}
    if torch.count_nonzero(key):  # also true for nan
        raise UserError(
            f"weights={source}: {name} has a non-zero key bias, but Meta's DINOv3 has none. Give an original "
            "file of Meta; for weights that were trained with a key bias, set arch.key_bias=true."
        )
    return {"q": query, "v": value}
