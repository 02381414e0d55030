"""Backbone adapters: frozen, LoRA, last blocks or full fine-tuning.

No other module imports peft or bitsandbytes. Constructors validate their arguments before any weights are loaded.
Calling an adapter modifies the backbone in place and returns it.
"""

import logging
import math
import sys
from copy import copy, deepcopy
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.utils.bounded_regex import Pattern
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, LowShare, check_annotations
from dinoseg.utils.tensor_files import write_tensors

_IMPORTING = Lock()  # held while bitsandbytes is imported, or withheld
TARGETS = {"attention": r"\.(attention|attn)\.", "all_linear": ""}


class Frozen:
    """Freeze the whole backbone: it runs in eval mode and builds no autograd graph.

    Args:
        bits: 4 or 8 to quantise the linear layers of the blocks to this many bits, or None.

    Raises:
        UserError: `bits` is neither 4 nor 8, or bitsandbytes is not installed.
    """

    def __init__(self, bits: int | None = None) -> None:
        if bits is not None:
            check_bits(bits)
        self.bits = bits

    def __call__(self, backbone: Backbone) -> Backbone:
        """Return the backbone without a trainable parameter."""
        backbone.requires_grad_(False)
        if self.bits is not None:
            quantise(backbone, self.bits)
        return backbone


class Full:
    """Train every backbone weight that the features depend on."""

    def __call__(self, backbone: Backbone) -> Backbone:
        """Return the backbone with all used parameters trainable."""
        _refuse_half(backbone, "full")
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name not in backbone.unused)
        return backbone


class LastBlocks:
    """Train the last blocks of the backbone and its final norm; earlier blocks build no autograd graph.

    Args:
        blocks: number of blocks to train, counted back from the last tapped one.

    Raises:
        UserError: `blocks` is below 1 or exceeds the number of blocks.
    """

    def __init__(self, blocks: Count) -> None:
        self.blocks = blocks

    def __call__(self, backbone: Backbone) -> Backbone:
        """Return the backbone with its last blocks trainable."""
        _refuse_half(backbone, "last_blocks")
        backbone.requires_grad_(False)
        for block in last_blocks(backbone, self.blocks):
            block.requires_grad_(True)
        if backbone.norm is not None:
            backbone.norm.requires_grad_(True)
        for name, parameter in backbone.named_parameters():
            if name in backbone.unused:
                parameter.requires_grad_(False)
        return backbone


class Lora:
    """Freeze the backbone and add trainable low-rank updates (Hu et al., arXiv 2106.09685).

    Each chosen linear layer W gets W + s B A, with A (rank, in) random and B (out, rank) zero.

    Args:
        rank: r, at least 1.
        alpha: sets the scale s = alpha / rank.
        dropout: dropout probability on the input of the update, in [0, 1).
        targets: `attention` (query, key, value and output projections), `all_linear` (the MLP layers too), or a
            regular expression searched in the names of the linear layers.
        rslora: use s = alpha / sqrt(rank) (rank-stabilised; Kalajdzievski, arXiv 2312.03732).
        blocks: adapt only this many last blocks; earlier blocks then store no activations. None: all blocks.
        bits: 4 (NF4, double quantisation, bfloat16 compute: QLoRA, Dettmers et al., arXiv 2305.14314) or 8 to
            quantise the frozen linear layers to this many bits, or None.

    Raises:
        UserError: rank below 1, dropout outside [0, 1), targets without a match, more blocks than the backbone has,
            or unsupported bits.
    """

    @check_annotations
    def __init__(
        self,
        rank: Count,
        alpha: Count,
        *,
        dropout: LowShare = 0.0,
        targets: str = "attention",
        rslora: bool = False,
        blocks: Count | None = None,
        bits: int | None = None,
    ) -> None:
        self.pattern = Pattern(TARGETS.get(targets, targets), "targets")
        if bits is not None:
            check_bits(bits)
        self.bits, self.blocks, self.targets = bits, blocks, targets
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora

    def __call__(self, backbone: Backbone) -> Backbone:
        """Return the backbone with trainable LoRA layers and all other parameters frozen."""
        _import_peft()
        from peft import LoraConfig

        where = backbone.blocks if self.blocks is None else last_blocks(backbone, self.blocks)
        inside = {part for block in where for part in block.modules()}
        linear = [name for name, part in backbone.named_modules() if isinstance(part, nn.Linear) and part in inside]
        names = [name for name in linear if self.pattern.search(f".{name}.")]
        passed_over = sorted(set(names) & backbone.uncalled_linears)
        if passed_over:
            raise UserError(
                f"targets={self.targets}: this backbone uses the weight of {passed_over[0]} directly "
                f"({len(passed_over)} such layers), so LoRA has no effect there. Choose an expression for its other "
                "layers, such as targets=proj, or the adapter last_blocks."
            )
        if not names:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "there are none"
            raise UserError(
                f"targets={self.targets} matches no linear layer of this backbone's blocks ({kinds}). Choose "
                f"{', '.join(TARGETS)}, an expression that matches one, or the adapter last_blocks."
            )
        backbone.requires_grad_(False)
        if self.bits is not None:
            quantise(backbone, self.bits)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            bias="none",
            target_modules=names,
        )
        _inject(config, backbone)
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # peft copies the base dtype: bfloat16 rounds updates away
        return backbone


def last_blocks(backbone: Backbone, count: int) -> list[nn.Module]:
    """Return the last `count` of the blocks up to the last tapped one.

    Raises:
        UserError: `count` is below 1 or exceeds the number of blocks.
    """
    blocks = list(backbone.blocks)
    if not 1 <= count <= len(blocks):
        raise UserError(f"blocks={count}: this backbone reads {len(blocks)} blocks; give 1 to {len(blocks)}.")
    return blocks[-count:]


def merge(backbone: Backbone) -> Backbone:
    """Merge the LoRA updates into their base weights and remove the LoRA modules."""
    _import_peft()
    from peft.tuners.lora import LoraLayer

    for name, part in list(backbone.named_modules()):
        if isinstance(part, LoraLayer):
            part.merge()
            parent, _, child = name.rpartition(".")
            base = part.get_base_layer()
            torch.autograd.graph.increment_version(list(base.parameters()))  # peft writes through `.data`
            setattr(backbone.get_submodule(parent), child, base)
    return backbone


def check_lora(model: nn.Module) -> None:
    """Refuse a model without LoRA layers.

    Raises:
        UserError: it has none.
    """
    if not has_lora(model):
        raise UserError("The model has no LoRA layers. Create it with adapter=lora, or save the whole model.")


def has_lora(model: nn.Module) -> bool:
    """Return whether a model has LoRA layers."""
    return bool(_lora_layers(model))


def _lora_layers(model: nn.Module) -> list[Any]:
    """Return peft's layers, by their attribute: a part of the user may be named like their tensors."""
    return [part for part in model.modules() if "lora_alpha" in vars(part)]


def write_adapter(model: SegmentationModel, folder: Path, prefix: str) -> None:
    """Write LoRA updates and the trained head to a folder that `peft.PeftModel.from_pretrained` reads.

    Args:
        model: the model, with LoRA layers in its backbone.
        folder: receives adapter_config.json and adapter_model.safetensors.
        prefix: name of the model, with a dot, inside the module that peft is given.

    Raises:
        UserError: other weights of the backbone are trained too, or the files cannot be written.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    backbone: Any = model.backbone
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            raise UserError(f"{name} of the backbone is trained, but an adapter holds LoRA updates alone. Use save.")
    config = copy(backbone.peft_config["default"])
    # whole names: peft shortens them to names such as v_proj, which layers of a head may have, too
    layers = [name for name, part in backbone.named_modules() if isinstance(part, LoraLayer)]
    config.target_modules = {f"{prefix}backbone.{name}" for name in layers}
    config.modules_to_save = [f"{prefix}head"]
    config.base_model_name_or_path = backbone.weights
    state = model.state_dict()
    trained = trained_names(model)
    tensors = {f"backbone.{name}": value for name, value in get_peft_model_state_dict(backbone).items()}
    tensors |= {name: state[name] for name in trained if name.startswith("head.")}
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{prefix}{name}": value for name, value in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", named, {"format": "pt"})


def check_active(model: nn.Module) -> None:
    """Refuse a model whose LoRA layers peft has merged, switched off or scaled, which its state dict does not say.

    Raises:
        UserError: a model loaded from its file would apply them, merged ones for the second time.
    """
    if not all(map(_is_as_configured, _lora_layers(model))):
        raise UserError(
            "LoRA layers of the model are merged, switched off or scaled by peft, so a file of it would give other "
            'results. Undo that before saving: call unmerge(), enable_adapters(True), set_adapter("default") and '
            "unscale_layer() on each layer."
        )


def _is_as_configured(layer: Any) -> bool:
    """Return whether a LoRA layer of peft adds its update at the scale of its rank and alpha."""
    if layer.merged or layer.disable_adapters or not layer.active_adapters:
        return False
    return all(
        layer.scaling[name] in (alpha / layer.r[name], alpha / math.sqrt(layer.r[name]))
        for name, alpha in layer.lora_alpha.items()
    )


def dequantised_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict with quantised weights dequantised to float32.

    Its keys are those of the same model without quantisation.
    """
    state = model.state_dict()
    for where, part in list(model.named_modules()):
        if not type(part).__module__.startswith("bitsandbytes."):
            continue
        from peft.utils.integrations import dequantize_module_weight

        for name in part.state_dict():
            del state[f"{where}.{name}"]
        # of a copy, since peft leaves an 8-bit layer on the CPU unusable
        state[f"{where}.weight"] = dequantize_module_weight(deepcopy(part)).detach().float()
        if part.bias is not None:
            state[f"{where}.bias"] = part.bias.detach().float()
    return state


def check_bits(bits: int) -> None:
    """Refuse another number of bits than 4 and 8, and a missing library, before any weights are loaded.

    Raises:
        UserError: `bits` is neither 4 nor 8, or bitsandbytes is not installed.
    """
    if bits not in (4, 8):
        raise UserError(f"bits={bits}: give 4, 8, or null for none.")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"bits={bits} needs bitsandbytes, which is not installed: in your clone of dinoseg, pip install "
            f"'.[quantised]', or leave bits out."
        )


def quantise(backbone: Backbone, bits: int) -> None:
    """Replace the linear layers of the blocks by frozen 4- or 8-bit ones; weights shrink when moved to the device.

    Raises:
        UserError: 8 bits for a pyramid.
    """
    if bits == 8 and backbone.is_pyramid:
        raise UserError(
            "bits=8: bitsandbytes multiplies rows of tokens in 8 bits, but layers of a pyramid take feature "
            "maps. Choose bits=4, leave bits out, or take a vision transformer."
        )
    uncalled = {backbone.get_submodule(name) for name in backbone.uncalled_linears}
    for block in backbone.blocks:
        for name, part in list(block.named_modules()):
            if isinstance(part, nn.Linear) and part not in uncalled:
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, _quantise_linear(part, bits))


def _quantise_linear(linear: nn.Linear, bits: int) -> nn.Module:
    _silence_bitsandbytes()
    with _IMPORTING:
        import bitsandbytes as bnb

    size = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    new: Any
    if bits == 4:
        new = bnb.nn.Linear4bit(
            *size, bias, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta"
        )
        new.support_avx512bf16_for_cpu = False  # its packed format needs widths divisible by 32 and cannot train
        new.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
    else:
        new = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new


def _inject(config: Any, backbone: Backbone) -> None:
    """Add peft's LoRA layers of float weights around the targets, as `peft.inject_adapter_in_model` does.

    That function first asks each library of quantised layers whether a target is its own, and imports bitsandbytes for
    it. LoRA around a quantised layer is the same: the base layer dequantises its weight, the update is added in float.
    """
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import dispatch_default

    class FloatLora(LoraModel):
        @staticmethod
        def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
            return dispatch_default(target, adapter_name, lora_config, **kwargs)

    FloatLora(backbone, config, "default")


def _import_peft() -> None:
    """Import peft without bitsandbytes, which it needs for an analysis of quantised models alone: 1.5 CPU seconds."""
    _silence_bitsandbytes()
    with _IMPORTING:
        modules: dict[str, Any] = sys.modules
        modules.setdefault("bitsandbytes", None)  # None: not to be found
        try:
            import peft  # noqa: F401
        finally:
            if modules["bitsandbytes"] is None:
                del modules["bitsandbytes"]


def _silence_bitsandbytes() -> None:
    """Silence bitsandbytes, which warns of optional kernels and at each matrix product."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _refuse_half(backbone: nn.Module, name: str) -> None:
    if any(parameter.dtype != torch.float32 for parameter in backbone.parameters()):
        raise UserError(
            f"The adapter {name} trains weights of the backbone, and in bfloat16 small updates would be rounded away. "
            "Give the backbone dtype=float32 (autocast still computes in bfloat16), or choose the adapter lora."
        )
