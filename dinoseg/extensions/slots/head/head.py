"""Slot head: unsupervised segments that reconstruct the backbone's features, frame by frame."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoseg.core.contracts import Backbone
from dinoseg.core.geometry import upsample, widths
from dinoseg.extensions.slots.contract import SlotOutputs, Slots
from dinoseg.extensions.slots.head.attention import (
    Groups,
    SlotAttention,
    SlotInit,
    Standardiser,
    TimeDecoder,
    allowed_cells,
    check_enough_cells,
    make_time_decoders,
    resolve_steps,
    slot_sizes,
)
from dinoseg.extensions.slots.head.background import background_mask
from dinoseg.extensions.slots.head.decoder import Decoded, DecoderKind, SlotDecoder, SlotMixer
from dinoseg.extensions.slots.head.positions import (
    PositionKind,
    Positions,
    linear_positions,
    position_layer,
    training_grid,
)
from dinoseg.extensions.slots.head.predictor import PredictorKind, check_heads, make_predictor
from dinoseg.extensions.slots.head.transformer import token_encoder
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Few, LowShare, NotNegative, Positive, Range, check_annotations

Depth = Annotated[int, Range("a whole number from 2 to 16", 2, 16)]


class SlotHead(Slots):
    """Slots that bind to the features of a frame and reconstruct those of this and later frames.

    Slot attention, with SAVi's predictor between frames (Kipf et al., arXiv 2111.12594), runs on the features of a
    frozen transformer. A decoder reconstructs these (DINOSAUR, Seitzer et al., arXiv 2209.14860). No weight depends on
    the number of slots, except with `slot_init=learned`: a trained head may run with another number.

    Args:
        in_dim: width of the backbone's map.
        num_layers: number of maps; one.
        num_slots: S, or (background, foreground) slots with `groups`.
        slot_dim: D.
        hidden_dim: hidden width of the MLP of slot attention; None: no MLP.
        token_mlp: pass the features through a layer norm and an MLP of two layers, 2 in_dim and D wide, before slot
            attention; reconstruction targets remain the features.
        iterations: iterations of slot attention per frame.
        first_iterations: the same for frames with newly initialised slots; None = `iterations`.
        slot_init: initialisation of slots: `gaussian` noise, `clusters` around mutually distant cells, or `learned`:
            one parameter per slot.
        initial_std: standard deviation of the initial slots before training; None: see `SlotAttention`.
        norm_state: the state of the GRU cell is the layer-normed slot.
        weight_floor: added to the weights of slot attention before their division by the sum over the cells.
        reference_init: initial weights as in the code of VideoSAUR and SlotContrast: queries and keys with torch's
            default, biases of the slot MLP and of the decoder 0.
        groups: frames in which background slots attend only to cells that the class token ignores, and foreground
            slots only to the rest: `off`, `initial` (the first frame) or `always`.
        variance_as_std: use exp(log-variance) of the initial slots as their standard deviation itself.
        token_positions: add a learned linear position code to the tokens (Locatello et al., arXiv 2006.15055), for
            backbones whose features hardly encode positions: rotary positions (DINOv3), colours.
        standardise: standardise each channel of the features to mean 0 and variance 1 over the training data, both as
            input of the slots and as reconstruction target.
        predictor: `savi`, `transformer` (a pre-norm block, as in SlotContrast), `carry` (slots enter the next frame
            unchanged) or `none` (initialised again in every frame).
        independent_until: share of the training up to which slots are initialised again in every frame, whatever the
            predictor.
        decoder_first: initial share of the training in which only the decoder learns. The gradients of an untrained
            decoder would only make slots alike that are initialised as clusters.
        steps: offsets in frames of the reconstruction targets: n = 0 to n, or a list.
        time_decoder: `none`, `linear` or `attention`, one for each of `steps`, applied to slots before decoding.
        decoder: `mlp` on each slot and cell, or `slot_mixer` (VideoSAUR), which mixes the slots of a cell first.
        decoder_dim: hidden width of the decoder.
        decoder_depth: linear layers of the decoder's MLP, 2 or more.
        mixer_blocks: transformer blocks of the slot mixer.
        positions: `learned`, `sine`, `linear` or `added` (learned, added to the slot).
        positions_grid: (h, w) of the training cells, for all positions but `linear` and for `similarity`; otherwise
            unused.
        output_norm: apply a layer norm to the reconstructed features.
        reconstruct: reconstruct the features; False: only predict the similarity.
        similarity: predict logits over the next frame's cells (VideoSAUR, Zadaianchuk et al., arXiv 2306.04829).
        similarity_of: what the similarity compares: `features`, or `keys` of the last block that is read.
        mask_source: `attention`, or the decoder's `alpha` (of offset 0 if that is among `steps`, else of the first).
        checkpointing: recompute the decoder in the backward pass: less memory, more time.

    Raises:
        UserError: the maps or a value do not fit.
    """

    mixture = True

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        *,
        num_slots: int | Sequence[int] = 10,
        slot_dim: Count = 256,
        hidden_dim: Count | None = 1024,
        iterations: Count = 1,
        first_iterations: Count | None = None,
        token_mlp: bool = False,
        slot_init: SlotInit = "gaussian",
        initial_std: Positive | None = None,
        norm_state: bool = False,
        weight_floor: NotNegative = 0.0,
        reference_init: bool = False,
        groups: Groups = "off",
        variance_as_std: bool = False,
        token_positions: bool = False,
        standardise: bool = False,
        predictor: PredictorKind = "savi",
        independent_until: LowShare = 0.0,
        decoder_first: LowShare = 0.0,
        steps: int | Sequence[int] = 0,
        time_decoder: TimeDecoder = "none",
        decoder: DecoderKind = "mlp",
        decoder_dim: Count = 1024,
        decoder_depth: Depth = 4,
        mixer_blocks: Few = 2,
        positions: PositionKind = "learned",
        positions_grid: Sequence[int] | None = (28, 28),
        output_norm: bool = True,
        reconstruct: bool = True,
        similarity: bool = False,
        similarity_of: Literal["features", "keys"] = "features",
        mask_source: Literal["attention", "alpha"] = "attention",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        dim = _map_width(in_dim, num_layers)
        first_iterations = iterations if first_iterations is None else first_iterations
        if similarity_of == "keys" and groups != "off":
            raise UserError(f"similarity_of=keys does not support groups={groups}. Set groups=off.")
        _check_decoder(decoder, positions, slot_dim)
        _check_outputs(similarity, similarity_of, reconstruct=reconstruct, output_norm=output_norm)
        self.sizes, self.steps = slot_sizes(num_slots, groups), resolve_steps(steps)
        self.num_slots = sum(self.sizes)
        self.groups, self.mask_source, self.checkpointing = groups, mask_source, checkpointing
        self.similarity, self.similarity_of = similarity, similarity_of
        self.iterations, self.first_iterations = iterations, first_iterations
        self.mask_step = self.steps.index(0) if 0 in self.steps else 0  # offset of alpha masks: 0, the frame, if any
        self.grid = training_grid(positions_grid, positions, similarity)
        self.token_mlp = token_encoder(dim, slot_dim) if token_mlp else None
        self.slot_attention = SlotAttention(
            slot_dim if token_mlp else dim,
            slot_dim,
            hidden_dim,
            num_groups=len(self.sizes),
            variance_as_std=variance_as_std,
            slot_init=slot_init,
            num_slots=self.num_slots,
            initial_std=initial_std,
            norm_state=norm_state,
            weight_floor=weight_floor,
            reference_init=reference_init,
        )
        self.standardiser = Standardiser(dim) if standardise else None
        self.independent_until, self.decoder_first, self.progress = independent_until, decoder_first, 0.0
        self.token_positions = position_layer(dim, clusters=slot_init == "clusters") if token_positions else None
        self.predictor = make_predictor(predictor, slot_dim)
        self.time_decoders = make_time_decoders(time_decoder, slot_dim, len(self.steps))
        num_cells = self.grid[0] * self.grid[1] if similarity else 0
        sizes = (slot_dim, dim if reconstruct else 0, decoder_dim, Positions(positions, self.grid, slot_dim), num_cells)
        self.decoder = (
            SlotDecoder(*sizes, depth=decoder_depth, reference_init=reference_init)
            if decoder == "mlp"
            else SlotMixer(*sizes, depth=decoder_depth, num_blocks=mixer_blocks)
        )
        self.norm = nn.LayerNorm(dim) if output_norm else None
        self.provides = _name_outputs(reconstruction=reconstruct, similarity=similarity, carried=predictor != "none")

    @property
    def delayed_modules(self) -> tuple[float, Sequence[nn.Module]]:
        """The share of training after which the modules that produce slots start to learn, and these modules."""
        modules = (self.slot_attention, self.token_mlp, self.token_positions, self.predictor)
        return self.decoder_first, [part for part in modules if part is not None]

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone without a class token if groups need its attention.

        Raises:
            UserError: the backbone does not fit; the message names ones that do.
        """
        if self.groups != "off" and not backbone.has_class_attention:
            raise UserError(
                f"groups={self.groups} needs a backbone with a class token whose attention can be read: "
                f"dino_*, dinov2_*, dinov3_vit*, tiny, tiny_surgical or a plain vision transformer of timm. Choose "
                f"one of these, or set groups=off and give num_slots as one number."
            )
        if self.similarity_of == "keys" and not backbone.has_class_attention:
            raise UserError(
                "similarity_of=keys needs a plain vision transformer, whose attention keys can be read: dino_*, "
                "dinov2_*, dinov3_vit*, tiny, tiny_surgical or one of timm. Choose one of these, or set "
                "similarity_of=features."
            )

    def set_progress(self, step: int, steps: int) -> None:
        """Set the finished share of training; from `independent_until` on, slots are carried from frame to frame."""
        self.progress = step / steps

    def run(self, backbone: Backbone, images: Tensor) -> SlotOutputs:
        """Return the outputs for clips (B, T, 3, H, W), or for images (B, 3, H, W) as clips of one frame."""
        clips = images if images.dim() == 5 else images[:, None]
        frames = clips.flatten(0, 1)  # (B * T, 3, H, W)
        # keys are targets of the similarity alone, and a single image has no next frame to compare with
        if self.similarity and self.similarity_of == "keys" and (self.training or clips.shape[1] > 1):
            maps, keys = backbone.with_keys(frames)
            outputs = self.follow(maps[-1].unflatten(0, clips.shape[:2]))
            return replace(outputs, keys=keys.unflatten(0, clips.shape[:2]))
        if self.groups == "off":
            return self.follow(backbone(frames)[-1].unflatten(0, clips.shape[:2]))
        maps, attention = backbone.with_class_attention(frames)
        background = background_mask(attention).unflatten(0, clips.shape[:2])
        return self.follow(maps[-1].unflatten(0, clips.shape[:2]), background)

    def follow(self, features: Tensor, background: Tensor | None = None) -> SlotOutputs:
        """Return slots, masks and reconstructions of clips.

        The last max(steps) frames are only targets. In eval mode an image, a clip of one frame, is segmented even if
        no target is left.

        Args:
            features: (B, T, C, h, w).
            background: (B, T, h, w), bool, True = background; required with groups, None without.

        Raises:
            UserError: a clip too short for its steps, a grid that `similarity` does not fit, or fewer cells than
                slots.
        """
        assert (background is None) == (self.groups == "off")
        # standardised features are the reconstruction targets, too: each channel counts alike in the squared error
        inputs = features
        if self.standardiser is not None:
            inputs = self.standardiser(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        num_frames, grid = features.shape[1], (features.shape[-2], features.shape[-1])
        similarity = self.similarity and (num_frames > 1 or self.training)  # an image has no next frame
        if similarity:
            check_similar_cells(grid, self.grid)
        trains_predictor = self.predictor is not None and any(True for _ in self.predictor.parameters())
        num_sources = count_source_frames(
            num_frames, self.steps, training=self.training, trains_predictor=trains_predictor
        )
        # slots first learn to find objects in single frames; evaluation always carries them
        carried = not self.training or self.progress >= self.independent_until
        slots: Tensor | None = None
        frames: list[FrameSlots] = []
        for time in range(num_sources):
            allowed = None
            if background is not None and (time == 0 or self.groups == "always"):
                allowed = allowed_cells(background[:, time], self.sizes)
            # one frame after the other, since a predictor starts each from the slots of the last
            slots, attention = self._step(inputs[:, time], slots, allowed, self.sizes, carried=carried)
            frames.append(FrameSlots(slots, attention, self._decode_steps(slots, grid, similarity)))
        outputs = clip_outputs(inputs, frames, self.steps, self.mask_step)
        return replace(outputs, carried=carried and self.predictor is not None)

    def step(
        self,
        features: Tensor,
        slots: Tensor | None = None,
        allowed: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the slots (B, S, D) of one frame, and their attention (B, S, h, w), which sums to 1 over the slots.

        Args:
            features: (B, C, h, w).
            slots: slots (B, S, D) of the previous frame; None in the first.
            allowed: which cells each slot may attend to (B, S, h, w), bool, True = may; None: all cells.
            sizes: slots per group (one number without groups) for new slots; None = the head's.

        Raises:
            UserError: fewer cells than slots.
        """
        inputs = features if self.standardiser is None else self.standardiser(features)
        return self._step(inputs, slots, allowed, self.sizes if sizes is None else sizes)

    def _step(
        self,
        features: Tensor,
        previous: Tensor | None,
        allowed: Tensor | None,
        sizes: Sequence[int],
        *,
        carried: bool = True,
    ) -> tuple[Tensor, Tensor]:
        grid = (features.shape[-2], features.shape[-1])
        check_enough_cells(sum(sizes), grid)
        tokens = features.flatten(2).mT  # (B, h * w, C)
        if self.token_positions is not None:
            # slot attention sees a set of tokens: it knows of places only what these hold
            tokens = tokens + self.token_positions(linear_positions(grid, tokens).flatten(1).T)
        if self.token_mlp is not None:
            tokens = self.token_mlp(tokens)  # (B, h * w, D)
        allowed_tokens = None if allowed is None else allowed.flatten(2)
        predicted = None if previous is None or self.predictor is None else self.predictor(previous)
        if predicted is not None and carried:
            # SAVi: slot attention corrects the prediction, in VideoSAUR and SlotContrast by 2 iterations, not 3
            slots, iterations = predicted, self.iterations
        else:
            slots, iterations = self.slot_attention.initial_slots(tokens, sizes, allowed_tokens), self.first_iterations
            if predicted is not None:
                slots = slots + 0.0 * predicted  # DDP expects a gradient for every weight
        # these corrected slots are decoded, and predicted from in the next frame, as in VideoSAUR and SlotContrast
        slots, attention = self.slot_attention(tokens, slots, iterations, allowed_tokens)
        return slots, attention.unflatten(2, grid)

    def decode(self, slots: Tensor, grid: tuple[int, int], step: int = 0) -> tuple[Tensor, Tensor]:
        """Return the features (B, C, h, w) and the alpha masks (B, S, h, w) decoded from slots (B, S, D).

        Args:
            slots: (B, S, D) of one frame.
            grid: (h, w) of the output.
            step: index into `steps`.
        """
        decoded = self._decode(slots, grid, step, False)
        return decoded.features, decoded.alpha

    def masks(self, slots: Tensor, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the soft masks (B, S, h, w) of one frame, given its slots (B, S, D) and attention (B, S, h, w)."""
        return attention if self.mask_source == "attention" else self.decode(slots, grid, self.mask_step)[1]

    def predict(self, outputs: SlotOutputs, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        """Return the soft masks of all frames (B * T', S, H, W)."""
        masks = outputs.attention if self.mask_source == "attention" else outputs.alphas[self.mask_step]
        # soft masks are enlarged, and compared at full size: an argmax of cells would show their steps
        return upsample(masks.flatten(0, 1), size, valid)

    def _decode(self, slots: Tensor, grid: tuple[int, int], step: int, similarity: bool) -> Decoded:
        decoded = self.decoder(self.time_decoders[step](slots), grid, similarity=similarity)
        if self.norm is None:
            return decoded
        # of the prediction alone, as in DINOSAVi: no norm is applied to the targets
        return decoded._replace(features=self.norm(decoded.features.movedim(1, -1)).movedim(-1, 1))

    def _decode_steps(self, slots: Tensor, grid: tuple[int, int], similarity: bool) -> list[Decoded]:
        # the similarity is to the next frame, whatever the offset, so one decoding of it suffices
        calls = [(slots, grid, step, similarity and step == self.mask_step) for step in range(len(self.steps))]
        if self.checkpointing and torch.is_grad_enabled():
            return [checkpoint(self._decode, *call, use_reentrant=False) for call in calls]
        return [self._decode(*call) for call in calls]


def _name_outputs(**has: bool) -> frozenset[str]:
    """Return the names of what a slot head provides, those of `OUTPUTS`."""
    return frozenset({"slots", *(name for name, is_there in has.items() if is_there)})


def _check_decoder(decoder: str, positions: str, slot_dim: int) -> None:
    if decoder != "slot_mixer":
        return
    check_heads(slot_dim, "decoder=slot_mixer")
    if positions != "added":
        raise UserError(
            f"positions={positions} with decoder=slot_mixer, whose positions are as wide as a slot. Set "
            "positions=added."
        )


def _check_outputs(similarity: bool, similarity_of: str, *, reconstruct: bool, output_norm: bool) -> None:
    if not reconstruct and not similarity:
        raise UserError("reconstruct=false leaves nothing to learn with similarity=false. Set one of them to true.")
    if not reconstruct and output_norm:
        raise UserError(
            "output_norm=true norms the reconstructed features, and reconstruct=false has none. Set output_norm=false."
        )
    if similarity_of == "keys" and not similarity:
        raise UserError(
            "similarity_of=keys has no effect with similarity=false. Set similarity=true, or similarity_of=features."
        )


def _map_width(in_dim: int | Sequence[int], num_layers: int) -> int:
    """Return the width of the single map; refuse several maps."""
    if num_layers != 1:
        raise UserError(f"A slot head reads one feature map, but num_layers={num_layers}. Set layers=[-1].")
    return widths(in_dim, num_layers)[0]


class FrameSlots(NamedTuple):
    """Slots, attention and reconstructions of one frame."""

    slots: Tensor  # (B, S, D)
    attention: Tensor  # (B, S, h, w)
    reconstructions: list[Decoded]  # reconstructions, one for each offset in `steps`


def count_source_frames(frames: int, steps: Sequence[int], *, training: bool, trains_predictor: bool) -> int:
    """Return the number of source frames, whose slots reconstruct frames.

    The last max(steps) frames are only targets.

    Args:
        frames: number of frames in the clip.
        steps: offsets in frames of the reconstruction targets.
        training: False allows an image, a clip of one frame, as its own source whatever the steps.
        trains_predictor: whether the predictor is trained from one source frame to the next, and so needs two.

    Raises:
        UserError: the clip is too short.
    """
    num_sources = frames - max(steps)
    if num_sources == 1 and training and trains_predictor:
        raise UserError(
            f"predictor=savi or transformer of the slot head learns from pairs of frames, but clips of {frames} frames "
            f"have none (steps={steps}). Give clips of {max(steps) + 2} frames or more; or, for single frames, set "
            "predictor=none."
        )
    if num_sources >= 1:
        return num_sources
    if frames == 1 and not training:
        return 1
    raise UserError(
        f"steps={steps} of the slot head reconstructs up to {max(steps)} frames ahead, but clips have {frames}. Give "
        f"clips of {max(steps) + 1} frames or more, or lower steps."
    )


def clip_outputs(features: Tensor, frames: Sequence[FrameSlots], steps: list[int], mask_step: int) -> SlotOutputs:
    """Return the outputs of the source frames, stacked over time.

    Args:
        features: (B, T, C, h, w).
        frames: source frames, in order.
        steps: offsets in frames of their reconstructions.
        mask_step: index into `steps` of the reconstruction used for masks and similarity.
    """
    reconstructions = list(zip(*(frame.reconstructions for frame in frames), strict=True))  # by step, then by frame
    similarity = [decoded.similarity for decoded in reconstructions[mask_step] if decoded.similarity is not None]
    return SlotOutputs(
        features=features,
        reconstructions=[torch.stack([decoded.features for decoded in of_step], dim=1) for of_step in reconstructions],
        alphas=[torch.stack([decoded.alpha for decoded in of_step], dim=1) for of_step in reconstructions],
        attention=torch.stack([frame.attention for frame in frames], dim=1),
        slots=torch.stack([frame.slots for frame in frames], dim=1),
        steps=steps,
        similarity=torch.stack(similarity, dim=1) if similarity else None,
    )


def check_similar_cells(grid: tuple[int, int], trained_grid: tuple[int, int]) -> None:
    """Refuse a grid other than the one the similarity is predicted over."""
    if grid != trained_grid:
        raise UserError(
            f"similarity=true of the slot head predicts {trained_grid[0]} x {trained_grid[1]} cells (positions_grid), "
            f"but these frames have {grid[0]} x {grid[1]}. Give crops of positions_grid times the backbone's patch "
            f"size, or set positions_grid=[{grid[0]},{grid[1]}] and train again."
        )
