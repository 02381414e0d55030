"""Backbones from timm: any vision transformer or feature pyramid that takes images of any size."""

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone
from dinoseg.models.backbones.attention import attend_fastest, class_maps, key_maps, plain_attention, watch_timm
from dinoseg.models.backbones.layers import Layers, resolve_layers
from dinoseg.models.backbones.normalisation import ColourMean, ColourStd, register_colours, resolve_colours
from dinoseg.models.backbones.patch_projection import ChannelWeight, adapt_input
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Channels, Count
from dinoseg.utils.tensor_files import check_weights, read_tensor_file
from dinoseg.utils.wording import suggest_nearest

_ANY_SIZE: Any = ({"dynamic_img_size": True}, {"strict_img_size": False})  # a model has one of these options or none
_UNUSED = "mask_token"  # left over from masked pre-training in some files
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts store the tensors


class TimmBackbone(Backbone):
    """timm model that returns the outputs of its blocks, or of the stages of a pyramid, as maps.

    Images are (B, 3, H, W), float RGB in 0..1, any H and W. They are normalised, then padded with zeros (the mean
    colour) at the bottom and on the right. Parts after the last of `layers` are removed.

    A transformer with one grid returns L maps (B, dim, h, w), h = ceil(H / patch_size), without class and register
    tokens. Each map passes the model's final norm unless `final_norm` is False; models that normalise only pooled
    features have none. Positions are interpolated as in timm.

    A pyramid (ConvNet, Swin) returns L maps as its stages output them, each with its own width and grid, without a
    norm. Its patch_size is the stride of the coarsest map.

    Args:
        name: timm model name, `vit_tiny_patch16_224`, or with a tag `vit_tiny_patch16_224.augreg_in21k_ft_in1k`.
        weights: `timm` (downloads timm's weights for `name`), a safetensors, .pth or .bin file with timm's names, or
            `random`.
        patch_size: side of a patch in pixels, checked against the model; None takes the model's.
        layers: 0-based blocks (stages of a pyramid) to return; negative numbers count from the last; `quarters` for
            four spread evenly.
        mean: RGB mean of the images the weights were trained on, in 0..1; None: timm's value for `name`, or
            that of satellite images if the name of the weights contains `sat493m`.
        std: RGB standard deviation of the same images.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        final_norm: apply the final norm to the maps of a transformer, although its scales and shifts were learned for
            the last block; False removes it from the model.
        channels: number of channels of the images; three are RGB.
        channel_weights: factor of each channel's kernel in the first convolution, such as `[1, 1, 1, 0]` for a fourth
            channel that starts without influence, see `adapt_input_kernel`; None: as timm adapts it.

    Raises:
        UserError: name unknown to timm, model with a fixed image size, wrong patch size, layer out of range, invalid
            colour statistics, or weights that are not available or do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        patch_size: Count | None,
        layers: Layers = (-1,),
        mean: Sequence[ColourMean] | None = None,
        std: Sequence[ColourStd] | None = None,
        checkpointing: bool = False,
        final_norm: bool = True,
        channels: Channels = 3,
        channel_weights: Sequence[ChannelWeight] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.weights = weights
        state = None if weights in ("timm", "random") else read_state(Path(weights).expanduser())
        self.model = _create(name, download=weights == "timm", channels=_stored_channels(name, state))
        notes = self.model.feature_info  # `module` and `reduction` of each block or stage
        levels = list(notes if isinstance(notes, list) else notes.info)
        self.layers = resolve_layers(layers, len(levels))
        self.depth = len(levels)
        self.num_layers = len(self.layers)
        self.is_pyramid = len({level["reduction"] for level in levels}) > 1
        self._normed = final_norm and not self.is_pyramid
        self.patch_size: int = max(levels[layer]["reduction"] for layer in self.layers)
        if patch_size not in (None, self.patch_size):
            kind = "a stride of {} px at the coarsest of these layers" if self.is_pyramid else "patches of {} px"
            raise UserError(
                f"patch_size={patch_size}: {name} has {kind.format(self.patch_size)}: set patch_size={self.patch_size}."
            )
        self._taps = [level["module"] for level in levels[: max(self.layers) + 1]]
        spare = {*self.model.state_dict(), *dict(self.model.named_buffers()), *_classifier(self.model), _UNUSED}
        self.model.prune_intermediate_layers(sorted(set(self.layers)), prune_norm=not self._normed, prune_head=True)
        if state is not None:
            load_weights(self.model, state, spare=spare, source=weights)
        elif weights == "timm":
            downloaded = self.model.state_dict()
            check_weights(downloaded, f"weights=timm ({name})", downloaded)
        modules = dict(self.model.named_modules())
        inputs = [part for layer in _first_convolutions(name) if isinstance(part := modules.get(layer), nn.Conv2d)]
        if not inputs and (channels != 3 or channel_weights is not None):
            raise UserError(
                f"channels={channels}: timm does not name the first convolution of {name}, so it takes RGB only. "
                "Choose a plain vision transformer, such as vit_small_patch16_224, or channels=3."
            )
        for convolution in inputs:
            adapt_input(convolution, channels, channel_weights)
        with uncalled_linears(self) as uncalled:
            maps = self._probe(name, channels, [levels[layer]["reduction"] for layer in self.layers])
        self.uncalled_linears = frozenset(uncalled)  # never called, only their weights are read: LoRA has no effect
        self.dim: int | list[int] = [part.shape[1] for part in maps]
        if self.num_layers == 1 or not self.is_pyramid:
            self.dim = maps[0].shape[1]
        self.unused = find_unused_parameters(self, maps)
        self.undecayed = _find_undecayed(self)
        self.has_class_attention = plain_attention(self.model) is not None
        self.has_tokens = not self.is_pyramid and _is_plain(self.model)
        if self.has_tokens:
            self.num_prefix = self.model.num_prefix_tokens
            self.head_dim = getattr(getattr(self.model.blocks[0], "attn", None), "head_dim", self.head_dim)
        attend_fastest(self.model)
        if checkpointing:
            self.model.set_grad_checkpointing(True)
            self.recomputed_modes = (False, True)
        known = self.model.pretrained_cfg
        register_colours(self, *resolve_colours(weights, mean, std, (known["mean"], known["std"]), channels))

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks up to the last tapped one, in order; for a pyramid its stages, each a list of modules."""
        return stages(self.model, self._taps) if self.is_pyramid else list(self.model.blocks)

    @property
    def norm(self) -> nn.Module | None:
        """The final norm applied to the maps; None for a pyramid."""
        return None if self.is_pyramid else getattr(self.model, "norm", None)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map (B, C, h, w) for each tapped layer."""
        return self._maps(self.pixels(images))

    def embed(self, images: Tensor) -> Tensor:
        """See `Backbone`; only for a plain ViT."""
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(self.pixels(images)))))

    def run_block(self, block: nn.Module, tokens: Tensor, **block_kwargs: Any) -> Tensor:
        """See `Backbone`; timm's attention takes masks of all rows."""
        mask = block_kwargs.pop("attention_mask", None)
        if mask is not None:
            block_kwargs["attn_mask"] = F.pad(mask, (0, 0, 0, tokens.shape[1] - mask.shape[2]), value=True)
        return super().run_block(block, tokens, **block_kwargs)

    def forward_trainable(self, frozen: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """See `Backbone`; the maps have the memory format of `forward`."""
        return [part.contiguous() for part in super().forward_trainable(frozen, size)]

    def with_class_attention(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps and the class token's attention in the last tapped block, from one forward pass.

        The attention is (B, heads, h, w), float32: softmax weights over all tokens. Those of class and register
        tokens are left out, so each head sums to less than 1. No gradient passes through it.

        Raises:
            UserError: the model has no class token or a non-standard attention (`has_class_attention` is False).
        """
        with watch_timm(self._plain_attention()) as calls:
            maps = self(images)
        return maps, class_maps(calls[0], self.num_prefix, maps[0].shape[2:])

    def with_keys(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps and the attention keys (B, dim, h, w) of the last tapped block, without gradients.

        Raises:
            UserError: see `with_class_attention`.
        """
        with watch_timm(self._plain_attention()) as calls:
            maps = self(images)
        return maps, key_maps(calls[0], self.num_prefix, maps[0].shape[2:])

    def _plain_attention(self) -> Any:
        attention = plain_attention(self.model)
        if attention is None:
            raise UserError(
                f"name={self.name}: this model has no class token, or a custom attention. Choose a plain "
                "vision transformer with a class token, such as vit_small_patch16_224, or dino_vits16."
            )
        return attention

    def export_state(self) -> dict[str, Tensor]:
        """Return the weights under the names that `weights` accepts in a file.

        Raises:
            UserError: the model has LoRA updates that are not merged.
        """
        return exported_state(self.model)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        wanted = sorted(set(self.layers))
        maps = self.model.forward_intermediates(
            pixels, indices=wanted, norm=self._normed, output_fmt="NCHW", intermediates_only=True
        )
        by_layer = dict(zip(wanted, maps, strict=True))
        return [by_layer[layer].contiguous() for layer in self.layers]  # the memory format affects rounding in heads

    def _probe(self, name: str, channels: int, strides: Sequence[int]) -> list[Tensor]:
        """Return the maps of a small non-square image, and refuse models that do not take any image size."""
        height, width = 2 * self.patch_size, 3 * self.patch_size
        was_training = self.model.training
        self.model.eval()  # keeps the running statistics unchanged
        pixels = torch.zeros(1, channels, height, width, device=next(self.model.parameters()).device)
        try:
            with torch.enable_grad():  # `unused` is read off the graph
                maps = self._maps(pixels)
            reason = "" if _grids(maps) == [(height // s, width // s) for s in strides] else f"maps of {_grids(maps)}"
        except Exception as error:  # the error class for an unsupported size differs between models
            maps, reason = [], (str(error).splitlines() or [type(error).__name__])[0]
        self.model.train(was_training)
        if reason:
            raise UserError(
                f"name={name}: this model does not support arbitrary image sizes ({height}x{width}: "
                f"{reason}). Choose a plain vision transformer or a feature pyramid, such as vit_small_patch16_224, "
                "swin_tiny_patch4_window7_224, convnext_tiny or resnet50."
            )
        return maps


def _find_undecayed(backbone: TimmBackbone) -> frozenset[str]:
    """Return the names of the parameters that timm exempts from weight decay, by names or by patterns such as `a.*`."""
    patterns = backbone.model.no_weight_decay() if hasattr(backbone.model, "no_weight_decay") else ()
    names = [name for name, _ in backbone.named_parameters()]
    return frozenset(name for pattern in patterns for name in fnmatch.filter(names, f"model.{pattern}"))


def _first_convolutions(name: str) -> list[str]:
    """Return the names of the convolutions that read the pixels; none if timm does not name them."""
    import timm

    config = timm.get_pretrained_cfg(name.partition(".")[0], allow_unregistered=True)
    names = getattr(config, "first_conv", None) or ()
    return [names] if isinstance(names, str) else list(names)


def _stored_channels(name: str, state: Mapping[str, Tensor] | None) -> int:
    """Return the number of channels of the images that weights were trained on."""
    names = [f"{layer}.weight" for layer in _first_convolutions(name)]
    kernels = [state[layer] for layer in names if layer in state] if state is not None else []
    return kernels[0].shape[1] if kernels and kernels[0].ndim == 4 else 3


def _create(name: str, download: bool, channels: int) -> Any:
    _check_name(name)
    try:
        return _create_any_size(name, download, channels)
    except (OSError, RuntimeError, ValueError) as error:
        if not download:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"weights=timm: {name} cannot be downloaded ({reason}). Without a network give a downloaded file: "
            "weights=PATH; for an untrained test: weights=random."
        ) from error


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know; one with a scheme, as of a hub, is looked up there."""
    import timm

    if ":" in name or ("." not in name and timm.is_model(name)):  # also a deprecated name
        return
    try:
        timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        known = [*timm.list_models(), *timm.list_pretrained()]
        raise UserError(f"name={name} is unknown to timm.{suggest_nearest(name, known)}") from error


def _create_any_size(name: str, download: bool, channels: int) -> Any:
    """Create a model, with the option for images of any size if it has one."""
    import timm

    settings: dict[str, Any] = {"pretrained": download, "num_classes": 0}
    settings |= {} if channels == 3 else {"in_chans": channels}
    for options in _ANY_SIZE:
        with contextlib.suppress(TypeError):  # this model has no such option
            return timm.create_model(name, **settings, **options)
    return timm.create_model(name, **settings)


def _is_plain(model: Any) -> bool:
    """Return whether the model is a plain sequence of blocks that take only tokens."""
    from timm.models.vision_transformer import VisionTransformer

    method = getattr(type(model), "forward_intermediates", None)
    return method is VisionTransformer.forward_intermediates


def _classifier(model: Any) -> list[str]:
    named = model.pretrained_cfg.get("classifier") or ()
    return [named] if isinstance(named, str) else list(named)


def _grids(maps: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(part.shape[2:]) for part in maps]


@contextlib.contextmanager
def uncalled_linears(module: nn.Module) -> Iterator[set[str]]:
    """Yield the set of linear-layer names; each layer called within the context is removed from it."""
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    uncalled = set(linears)
    hooks = [part.register_forward_hook(lambda *_, name=name: uncalled.discard(name)) for name, part in linears.items()]
    try:
        yield uncalled
    finally:
        for hook in hooks:
            hook.remove()


def find_unused_parameters(module: nn.Module, outputs: Sequence[Tensor]) -> list[str]:
    """Return the names of the parameters that no output depends on, according to the autograd graph."""
    nodes = [part.grad_fn for part in outputs]
    seen = set(nodes)
    reached = set()
    while nodes:
        node: Any = nodes.pop()
        reached.add(getattr(node, "variable", None))
        fresh = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= fresh
        nodes += fresh
    return [name for name, parameter in module.named_parameters() if parameter not in reached]


def stages(model: nn.Module, taps: Sequence[str]) -> list[nn.Module]:
    """Return one module list per tap, in order: the modules that run after the previous tap up to this one.

    The order is that of module registration. If timm's `feature_info` names no module of the model, the whole model
    is the only stage.

    Args:
        model: a model whose top-level modules, or the entries of those that are lists, run one after another.
        taps: names of the modules whose output is a map, in order.
    """
    units = _units(model)
    ends = [_end(list(units), tap) for tap in taps]
    if 0 in ends or ends != sorted(set(ends)):
        return [model]
    parts = list(units.values())
    return [nn.ModuleList(parts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _units(model: nn.Module) -> dict[str, nn.Module]:
    units: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        inner = dict(child.named_children()) if isinstance(child, nn.Sequential | nn.ModuleList) else {}
        units |= {f"{name}.{number}": part for number, part in inner.items()} or {name: child}
    return units


def _end(units: Sequence[str], tap: str) -> int:
    """Return the index after the last unit that equals, contains or lies inside the tap, or 0 for none."""
    inside = [
        number
        for number, unit in enumerate(units)
        if f"{tap}.".startswith(f"{unit}.") or f"{unit}.".startswith(f"{tap}.")
    ]
    return inside[-1] + 1 if inside else 0


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or PyTorch checkpoint, without running pickled code.

    Raises:
        UserError: the file does not exist, is not readable, or needs code to be read.
    """
    content = read_tensor_file(path, "weights")
    inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    return dict(inner[0] if inner else content)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, spare: set[str], source: str) -> None:
    """Load tensors into a model; every tensor must be present, fit and be used.

    Args:
        model: changed in place.
        state: its tensors by name.
        spare: names of tensors, or of the modules that own them, that may be unexpected.
        source: origin of the weights, for the error message.

    Raises:
        RuntimeError: tensors are missing, unexpected or of another shape; the message names them.
        UserError: a tensor is quantised or not finite.
    """
    expected = model.state_dict()
    spared = {key for key in state.keys() - expected if any(f"{key}.".startswith(f"{name}.") for name in spare)}
    model.load_state_dict({key: value for key, value in state.items() if key not in spared})
    check_weights(state, f"weights={source}", expected)


def exported_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights under timm's names.

    Raises:
        UserError: the model holds LoRA updates.
    """
    state = model.state_dict()
    if any(".lora_" in name for name in state):
        raise UserError(
            "This backbone holds LoRA updates, which cannot be exported separately: merge them first, merge=true."
        )
    return {name: value.contiguous() for name, value in state.items()}
