"""Mask2Former head for plain vision transformers, in the layout of DINOv3's released segmentor."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.geometry import widths
from dinoseg.core.shapes import MaskOutputs, WeightedMasks
from dinoseg.extensions.query_heads.mask2former.adapter import VitAdapter
from dinoseg.extensions.query_heads.mask2former.pixel_decoder import GROUPS, PixelDecoder
from dinoseg.extensions.query_heads.mask2former.predictor import MaskedAttentionDecoder
from dinoseg.models.heads.semantic import semantic_map, weighted_masks
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, LowShare, check_annotations
from dinoseg.utils.tensor_files import check_weights, read_tensor_file

logger = logging.getLogger(__name__)
MAPS = 4
ADAPTER = "segmentation_model.0."
HEAD = "segmentation_model.1."
BACKBONE = f"{ADAPTER}backbone."
CLASS_LAYER = f"{HEAD}predictor.class_embed."
# how tensor shapes identify the segmentor of a file: value, tensor, axis, divisor and remedy
TELLING = (
    ("the backbone's width", f"{ADAPTER}level_embed", 1, 1, "choose the backbone of the file"),
    ("hidden_dim", f"{HEAD}predictor.post_norm.weight", 0, 1, "set hidden_dim={}"),
    ("num_heads", f"{ADAPTER}interactions.0.extractor.attn.attention_weights.bias", 0, 4, "set num_heads={}"),
    ("feedforward_dim", f"{HEAD}predictor.transformer_ffn_layers.0.linear1.bias", 0, 1, "set feedforward_dim={}"),
    ("num_queries", f"{HEAD}predictor.query_feat.weight", 0, 1, "set num_queries={}"),
    ("class outputs", f"{CLASS_LAYER}bias", 0, 1, "for other classes than the file's set class_layer=new"),
)


class Mask2FormerHead(Head[MaskOutputs]):
    """Adapter, pixel decoder and masked-attention decoder over four maps of a vision transformer and its pixels.

    It follows Cheng et al. (arXiv 2112.01527) and the segmentor released with DINOv3 (arXiv 2508.10104), whose
    outputs it reproduces number by number with the same weights. The deformable attention is plain torch and trains
    on any device.

    Args:
        in_dim: width of the backbone's maps.
        num_layers: number of these maps; four.
        num_classes: K.
        hidden_dim: width of pixel decoder and queries, a multiple of `num_heads` and of 32, at least 64; None = half
            of `in_dim`, rounded up to a valid width.
        num_heads: heads of every attention; also a divisor of half of `in_dim`.
        feedforward_dim: hidden width of the feed-forward blocks of both decoders; None = 4 x `hidden_dim`.
        num_queries: Q, the maximum number of masks per image.
        no_object: add a no-object column to the class logits, as the last one.
        weights: Meta's segmentor checkpoint (.pth), or a safetensors file with the same names; None = random.
        class_layer: with `weights`, `loaded` uses the class layer of the file, `new` a random one for other classes.
        trainable: `all`, or, with `weights`, only the `class_embed` layer.
        deep_supervision: also return the outputs of earlier layers in training, for the loss `MaskClassification`.
        drop_path: probability of skipping an extractor's feed-forward block per sample in training.
        checkpointing: recompute the deformable layers in the backward pass: less memory, more time.
        backbone_in_bfloat16: run the backbone in bfloat16 autocast, whatever the precision of the head, as Meta's
            adapter does (facebookresearch/dinov3, dinov3/eval/segmentation/models/backbone/dinov3_adapter.py).
        scores_in_bfloat16: round class and mask probabilities, and the sums of their products, to bfloat16, as Meta's
            evaluation does (dinov3/eval/segmentation/inference.py).

    Raises:
        UserError: the maps, a value or the weights do not fit. Also if `weights` is missing for class_layer=new or
            trainable=class_embed, except on the meta device.
    """

    provides = frozenset({"masks"})
    mixture = True
    fixed_size_reason = "its sampling points and positions depend on the size (Mask2Former)"

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        *,
        hidden_dim: Count | None = None,
        num_heads: Count = 16,
        feedforward_dim: Count | None = None,
        num_queries: Count = 100,
        no_object: bool = True,
        weights: str | None = None,
        class_layer: Literal["loaded", "new"] = "loaded",
        trainable: Literal["all", "class_embed"] = "all",
        deep_supervision: bool = True,
        drop_path: LowShare = 0.3,
        checkpointing: bool = False,
        backbone_in_bfloat16: bool = False,
        scores_in_bfloat16: bool = False,
    ) -> None:
        super().__init__()
        dim = _map_width(in_dim, num_layers)
        hidden = _hidden_width(dim, hidden_dim, num_heads)
        feedforward = 4 * hidden if feedforward_dim is None else feedforward_dim
        device = torch.get_default_device()
        if not weights and device.type != "meta":  # on meta only sizes are counted, without the file
            _check_without_weights(class_layer, trainable)
        self.no_object, self.deep_supervision = no_object, deep_supervision
        self.backbone_in_bfloat16, self.scores_in_bfloat16 = backbone_in_bfloat16, scores_in_bfloat16
        self.weights = weights
        with torch.device("meta") if weights else nullcontext():  # the file replaces any random initialisation
            self.adapter = VitAdapter(dim, num_heads, drop_path, checkpointing)
            self.pixel_decoder = PixelDecoder(dim, hidden, num_heads, feedforward, checkpointing)
            self.predictor = MaskedAttentionDecoder(
                hidden, num_heads, feedforward, num_queries, num_classes + no_object
            )
        if weights:
            # memory without values: the file has every one of them
            self.to_empty(device=device)
            load_segmentor(self, weights, new_class_layer=class_layer == "new")
            if class_layer == "new":
                self.predictor.reset_class_layer()
        if trainable == "class_embed":
            self.requires_grad_(False)
            self.predictor.class_embed.requires_grad_(True)

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone of images that are not RGB: the adapter reads the pixels with weights for three channels.

        Raises:
            UserError: it has another number of channels.
        """
        if backbone.channels != 3:
            raise UserError(
                f"The backbone takes {backbone.channels} channels, and mask2former reads the pixels as RGB. Choose "
                "another head, such as head=eomt or dpt, or images of 3 channels."
            )

    def run(self, backbone: Backbone, images: Tensor) -> MaskOutputs:
        """Return the outputs for images (B, 3, H, W), float RGB in 0..1; the head also reads the pixels."""
        with self._backbone_precision(images):
            features = backbone(images)
        return self.decode(features, backbone.pixels(images))

    def forward_frozen(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """Return the backbone's frozen features and pixels.

        If only the class layer is trained, return queries and masks in alternation instead.
        """
        pixels = backbone.pixels(images)
        with self._backbone_precision(images):
            given = backbone.forward_frozen(images)
        if not self._trains_classes_only(backbone):
            return [*given, pixels]
        # queries and masks depend on the image alone, too: cached, an epoch skips adapter and both decoders
        size = (images.shape[-2], images.shape[-1])
        with self._backbone_precision(images):
            features = backbone.forward_trainable(given, size)
        levels, mask_features = self.pixel_decoder(self.adapter(features, pixels))
        return [part for read in self.predictor.read(levels, mask_features, deep=self._deep) for part in read]

    def forward_trainable(self, backbone: Backbone, frozen: list[Tensor], size: tuple[int, int]) -> MaskOutputs:
        """Return the outputs for `forward_frozen`'s result on images that entered the backbone at `size` (H, W)."""
        if not self._trains_classes_only(backbone):
            with self._backbone_precision(frozen[-1]):
                features = backbone.forward_trainable(frozen[:-1], size)
            return self.decode(features, frozen[-1])
        return self.predictor.classify(list(zip(frozen[::2], frozen[1::2], strict=True)))

    def _backbone_precision(self, pixels: Tensor) -> AbstractContextManager:
        """Return the context of the backbone's pass over pixels."""
        if not self.backbone_in_bfloat16:
            return nullcontext()
        return torch.autocast(pixels.device.type, torch.bfloat16)

    def _trains_classes_only(self, backbone: Backbone) -> bool:
        # parameters are compared by identity; PyTorch hashes a tensor by its id
        learning = {parameter for parameter in self.parameters() if parameter.requires_grad}
        return backbone.first_trained is None and learning <= set(self.predictor.class_embed.parameters())

    @property
    def _deep(self) -> bool:
        return self.deep_supervision and self.training

    def decode(self, features: list[Tensor], pixels: Tensor) -> MaskOutputs:
        """Return class logits (B, Q, K + 1), or K without the no-object column, and mask logits (B, Q, 4h, 4w).

        Args:
            features: four maps (B, C, h, w), early blocks first.
            pixels: the padded, normalised image (B, 3, P * h, P * w).
        """
        levels, mask_features = self.pixel_decoder(self.adapter(features, pixels))
        return self.predictor(levels, mask_features, deep=self._deep)

    def weighted_masks(self, outputs: MaskOutputs) -> WeightedMasks | None:
        """Return the masks and class probabilities that `predict` mixes; None if it rounds them."""
        return None if self.scores_in_bfloat16 else weighted_masks(outputs, self.no_object)

    def predict(self, outputs: MaskOutputs, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        """Return class scores (B, K, H, W): class probability times mask probability, summed over the queries.

        The masks are upsampled to `size` first. Scores are non-negative but not probabilities: they may exceed 1.
        """
        dtype = torch.bfloat16 if self.scores_in_bfloat16 else torch.float32
        return semantic_map(outputs, size, valid, self.no_object, dtype)


def _map_width(in_dim: int | Sequence[int], num_layers: int) -> int:
    if num_layers != MAPS:
        raise UserError(
            f"This Mask2Former head reads exactly {MAPS} feature maps, but num_layers={num_layers}. Set "
            "layers=quarters, or list four blocks, early ones first."
        )
    map_widths = widths(in_dim, num_layers)
    if len(set(map_widths)) > 1:
        raise UserError(
            f"The backbone returns maps of the widths {map_widths}, but this Mask2Former head builds its own pyramid "
            "from four maps of one width. Choose a vision transformer, or a head that reads pyramids, such as linear."
        )
    return map_widths[0]


def _check_without_weights(class_layer: str, trainable: str) -> None:
    if class_layer == "new":
        raise UserError(
            "class_layer=new without weights: there is no class layer to replace, the whole head is new. "
            "Leave class_layer out, or give weights=FILE."
        )
    if trainable == "class_embed":
        raise UserError(
            "trainable=class_embed without weights: the other layers of the head would stay random. Give "
            "weights=FILE, Meta's segmentor checkpoint, or set trainable=all."
        )


def _hidden_width(dim: int, hidden_dim: int | None, num_heads: int) -> int:
    fitting = [heads for heads in range(1, min(dim // 2, 64) + 1) if dim // 2 % heads == 0]
    if num_heads not in fitting:
        raise UserError(
            f"num_heads={num_heads} does not divide {dim // 2}, half of the backbone's width {dim}. "
            f"Choose one of {', '.join(map(str, fitting))}."
        )
    # each head and each group of GroupNorm gets a whole number of channels
    step = math.lcm(num_heads, GROUPS)
    least = math.ceil(2 * GROUPS / step) * step  # GroupNorm on a single cell needs two channels per group
    if hidden_dim is None:
        return max(least, math.ceil(dim / 2 / step) * step)
    if hidden_dim % step or hidden_dim < least:
        below = max(least, hidden_dim // step * step)
        raise UserError(
            f"hidden_dim={hidden_dim} must be a multiple of {GROUPS} (groups of channels) and of num_heads="
            f"{num_heads}, and at least {2 * GROUPS}. Choose hidden_dim={below} or {below + step}."
        )
    return hidden_dim


def load_segmentor(head: nn.Module, path: str, *, new_class_layer: bool) -> int:
    """Load adapter, pixel decoder and predictor of a head from a file; return the number of ignored backbone keys.

    The backbone has its own weights: keys below `segmentation_model.0.backbone.` are allowed and ignored.

    Args:
        head: has the modules `adapter`, `pixel_decoder` and `predictor`; on the meta device it is only checked.
        path: Meta's `.pth` checkpoint, or a safetensors file with the same names.
        new_class_layer: expect the file's class layer, for any number of classes, but do not load it.

    Raises:
        UserError: the file cannot be read, keys are missing or unexpected, shapes do not fit, or tensors are not
            finite.
    """
    tensors = read_tensors(path)
    passed_over = [key for key in tensors if key.startswith(BACKBONE)]
    tensors = {key: value for key, value in tensors.items() if not key.startswith(BACKBONE)}
    # names, shapes and values are checked before anything is copied: a refused file leaves the head as it was
    wanted = {meta_name(name): tensor for name, tensor in head.state_dict().items()}
    _check_names(path, tensors.keys(), wanted.keys())
    if new_class_layer:
        wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(CLASS_LAYER)}
    _check_shapes(path, tensors, wanted)
    check_weights(tensors, f"weights={path}", wanted)
    with torch.no_grad():
        for key, tensor in wanted.items():
            if not tensor.is_meta:
                tensor.copy_(tensors[key])
    if passed_over:
        logger.info("Head weights %s: ignored %d keys of a backbone, which has its own weights", path, len(passed_over))
    return len(passed_over)


def meta_name(name: str) -> str:
    """Return Meta's name for a parameter or buffer of the head."""
    part, _, rest = name.partition(".")
    return f"{ADAPTER}{rest}" if part == "adapter" else f"{HEAD}{name}"


def read_tensors(path: str) -> dict[str, Tensor]:
    """Return the tensors of a `.pth` or `.safetensors` file by name, without running pickled code.

    Raises:
        UserError: the file does not exist, cannot be read, or holds anything but tensors.
    """
    tensors = read_tensor_file(Path(path).expanduser(), "weights")
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"weights={path}: not a plain dict of tensors. Give Meta's segmentor checkpoint.")
    return dict(tensors)


def _check_names(path: str, in_file: Collection[str], expected: Collection[str]) -> None:
    missing = [key for key in expected if key not in in_file]
    left_over = [key for key in in_file if key not in expected]
    problems = [
        f"{len(keys)} {what} ({', '.join(map(str, keys[:3]))}{', ...' * (len(keys) > 3)})"
        for what, keys in (("missing", missing), ("unexpected", left_over))
        if keys
    ]
    if problems:
        raise UserError(
            f"weights={path}: of the {len(expected)} keys of a Mask2Former segmentor, {'; '.join(problems)}. "
            f"Give the whole file of Meta's segmentor, such as dinov3_vit7b16_ade20k_m2f_head-*.pth."
        )


def _check_shapes(path: str, in_file: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [key for key, tensor in expected.items() if in_file[key].shape != tensor.shape]
    if not wrong:
        return
    # one wrong width changes hundreds of shapes: only the settings that explain them are named
    differences = []
    for name, key, axis, divisor, remedy in TELLING:
        if key in wrong:
            theirs, ours = (tensors[key].shape[axis] // divisor for tensors in (in_file, expected))
            differences.append(f"{name} is {theirs} in the file and {ours} in the model ({remedy.format(theirs)})")
    first = wrong[0]
    differences = differences or [
        f"{first} is {tuple(in_file[first].shape)} in the file and {tuple(expected[first].shape)} in the model"
    ]
    raise UserError(f"weights={path}: {len(wrong)} tensors have another shape: {'; '.join(differences)}.")
