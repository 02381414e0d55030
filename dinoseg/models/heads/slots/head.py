"""Slot head: unsupervised segments that reconstruct the backbone's features, frame by frame."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoseg.core.contracts import Backbone, Head, Slots
from dinoseg.core.geometry import upsample, widths
from dinoseg.core.shapes import SlotOutputs
from dinoseg.models.heads.options import check_choice, check_positive
from dinoseg.models.heads.slots.attention import (
    GROUPS,
    SlotAttention,
    Standard,
    allowed_cells,
    check_enough_cells,
    make_time_decoders,
    resolve_steps,
    slot_sizes,
)
from dinoseg.models.heads.slots.background import background_mask
from dinoseg.models.heads.slots.decoder import Decoded, SlotDecoder
from dinoseg.models.heads.slots.positions import Positions, linear_positions, position_layer, training_grid
from dinoseg.models.heads.slots.predictor import make_predictor
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, LowShare

MASK_SOURCES = ("attention", "alpha")


class SlotHead(Head[SlotOutputs]):
    """Slots that bind to the features of a frame and reconstruct those of this and later frames.

    Slot attention, with SAVi's predictor between frames (Kipf et al., arXiv 2111.12594), runs on the features of a
    frozen transformer. An MLP decoder reconstructs these (DINOSAUR, Seitzer et al., arXiv 2209.14860). No weight
    depends on the number of slots: a trained head may run with another number.

    Args:
        in_dim: width of the backbone's map.
        num_layers: number of maps; one.
        num_slots: S, or (background, foreground) slots with `groups`.
        slot_dim: D.
        hidden_dim: hidden width of the MLP of slot attention.
        iterations: iterations of slot attention per frame.
        first_iterations: the same for frames with newly initialised slots; None = `iterations`.
        slot_init: initialisation of slots: `gaussian` noise, or `clusters` around mutually distant cells.
        groups: frames in which background slots attend only to cells that the class token ignores, and foreground
            slots only to the rest: `off`, `initial` (the first frame) or `always`.
        variance_as_std: use exp(log-variance) of the initial slots as their standard deviation itself.
        token_positions: add a learned linear position code to the tokens (Locatello et al., arXiv 2006.15055), for
            backbones whose features hardly encode positions: rotary positions (DINOv3), colours.
        standardise: standardise each channel of the features to mean 0 and variance 1 over the training data, both as
            input of the slots and as reconstruction target.
        predictor: `savi`, `carry` (slots enter the next frame unchanged) or `none` (initialised again in every
            frame).
        independent_until: share of the training up to which slots are initialised again in every frame, whatever the
            predictor.
        decoder_first: initial share of the training in which only the decoder learns. The gradients of an untrained
            decoder would only make slots alike that are initialised as clusters.
        steps: offsets in frames of the reconstruction targets: n = 0 to n, or a list.
        time_decoder: `none`, `linear` or `attention`, one for each of `steps`, applied to slots before decoding.
        decoder_dim: hidden width of the decoder.
        positions: `learned`, `sine` or `linear`.
        positions_grid: (h, w) of the training cells, for `learned` and `sine` positions and for `similarity`;
            otherwise unused.
        similarity: predict logits over the next frame's cells (VideoSAUR, Zadaianchuk et al., arXiv 2306.04829).
        mask_source: `attention`, or the decoder's `alpha` (of offset 0 if that is among `steps`, else of the first).
        checkpointing: recompute the decoder in the backward pass: less memory, more time.

    Raises:
        UserError: the maps or a value do not fit.
    """

    mixture = True

    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        *,
        num_slots: int | Sequence[int] = 10,
        slot_dim: Count = 256,
        hidden_dim: Count = 1024,
        iterations: Count = 1,
        first_iterations: Count | None = None,
        slot_init: str = "gaussian",
        groups: str = "off",
        variance_as_std: bool = False,
        token_positions: bool = False,
        standardise: bool = False,
        predictor: str = "savi",
        independent_until: LowShare = 0.0,
        decoder_first: LowShare = 0.0,
        steps: int | Sequence[int] = 0,
        time_decoder: str = "none",
        decoder_dim: Count = 1024,
        positions: str = "learned",
        positions_grid: Sequence[int] | None = (28, 28),
        similarity: bool = False,
        mask_source: str = "attention",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        dim = _map_width(in_dim, num_layers)
        first_iterations = iterations if first_iterations is None else first_iterations
        check_positive(slot_dim=slot_dim, hidden_dim=hidden_dim, decoder_dim=decoder_dim)
        check_positive(iterations=iterations, first_iterations=first_iterations)
        check_choice("groups", groups, GROUPS)
        check_choice("mask_source", mask_source, MASK_SOURCES)
        self.sizes = slot_sizes(num_slots, groups)
        self.num_slots = sum(self.sizes)
        self.groups, self.mask_source = groups, mask_source
        self.iterations = iterations
        self.first_iterations = first_iterations
        self.steps = resolve_steps(steps)
        self.similarity = similarity
        self.checkpointing = checkpointing
        # offset whose alpha masks segment a frame: 0 if the frame itself is reconstructed
        self.mask_step = self.steps.index(0) if 0 in self.steps else 0
        self.grid = training_grid(positions_grid, positions, similarity)
        self.slot_attention = SlotAttention(
            dim, slot_dim, hidden_dim, num_groups=len(self.sizes), variance_as_std=variance_as_std, slot_init=slot_init
        )
        self.standard = Standard(dim) if standardise else None
        self.independent_until, self.decoder_first, self.progress = independent_until, decoder_first, 0.0
        self.place = position_layer(dim, clusters=slot_init == "clusters") if token_positions else None
        self.predictor = make_predictor(predictor, slot_dim)
        self.time_decoders = make_time_decoders(time_decoder, slot_dim, len(self.steps))
        num_cells = self.grid[0] * self.grid[1] if similarity else 0
        self.decoder = SlotDecoder(slot_dim, dim, decoder_dim, Positions(positions, self.grid), num_cells)
        self.norm = nn.LayerNorm(dim)

    @property
    def slots(self) -> Slots:
        """The head itself."""
        return self

    @property
    def delayed_modules(self) -> tuple[float, Sequence[nn.Module]]:
        """The share of training after which the modules that produce slots start to learn, and these modules."""
        makers = (self.slot_attention, self.place, self.predictor)
        return self.decoder_first, [part for part in makers if part is not None]

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone without a class token if groups need its attention.

        Raises:
            UserError: the backbone does not fit; the message names ones that do.
        """
        if self.groups != "off" and not backbone.has_class_attention:
            raise UserError(
                f"head.groups={self.groups} needs a backbone with a class token whose attention can be read: "
                f"dino_*, dinov2_*, dinov3_vit*, tiny, tiny_surgical or a plain vision transformer of timm. Choose "
                f"one of these, or set head.groups=off and give head.num_slots as one number."
            )

    def set_progress(self, step: int, steps: int) -> None:
        """Set the finished share of training; from `independent_until` on, slots are carried from frame to frame."""
        self.progress = step / steps

    def run(self, backbone: Backbone, images: Tensor) -> SlotOutputs:
        """Return the outputs for clips (B, T, 3, H, W), or for images (B, 3, H, W) as clips of one frame."""
        clips = images if images.dim() == 5 else images[:, None]
        frames = clips.flatten(0, 1)  # (B * T, 3, H, W)
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
        seen = features
        if self.standard is not None:
            seen = self.standard(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        num_frames, grid = features.shape[1], (features.shape[-2], features.shape[-1])
        similarity = self.similarity and (num_frames > 1 or self.training)  # an image has no next frame
        if similarity:
            check_similar_cells(grid, self.grid)
        learns_onwards = self.predictor is not None and any(True for _ in self.predictor.parameters())
        telling = telling_frames(num_frames, self.steps, training=self.training, learns_onwards=learns_onwards)
        carried = not self.training or self.progress >= self.independent_until
        slots: Tensor | None = None
        frames: list[FrameSlots] = []
        for time in range(telling):
            allowed = None
            if background is not None and (time == 0 or self.groups == "always"):
                allowed = allowed_cells(background[:, time], self.sizes)
            slots, attention = self._step(seen[:, time], slots, allowed, self.sizes, carried=carried)
            frames.append(FrameSlots(slots, attention, self._decode_steps(slots, grid, similarity)))
        outputs = clip_outputs(seen, frames, self.steps, self.mask_step)
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
        seen = features if self.standard is None else self.standard(features)
        return self._step(seen, slots, allowed, self.sizes if sizes is None else sizes)

    def _step(
        self,
        features: Tensor,
        before: Tensor | None,
        allowed: Tensor | None,
        sizes: Sequence[int],
        *,
        carried: bool = True,
    ) -> tuple[Tensor, Tensor]:
        grid = (features.shape[-2], features.shape[-1])
        check_enough_cells(sum(sizes), grid)
        tokens = features.flatten(2).mT  # (B, h * w, C)
        if self.place is not None:
            tokens = tokens + self.place(linear_positions(grid, tokens).flatten(1).T)
        seen = None if allowed is None else allowed.flatten(2)
        guess = None if before is None or self.predictor is None else self.predictor(before)
        if guess is not None and carried:
            slots, iterations = guess, self.iterations
        else:
            slots, iterations = self.slot_attention.start(tokens, sizes, seen), self.first_iterations
            if guess is not None:
                slots = slots + 0.0 * guess  # DDP expects a gradient for every weight
        slots, attention = self.slot_attention(tokens, slots, iterations, seen)
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
        return upsample(masks.flatten(0, 1), size, valid)

    def _decode(self, slots: Tensor, grid: tuple[int, int], step: int, similarity: bool) -> Decoded:
        decoded = self.decoder(self.time_decoders[step](slots), grid, similarity=similarity)
        return decoded._replace(features=self.norm(decoded.features.movedim(1, -1)).movedim(-1, 1))

    def _decode_steps(self, slots: Tensor, grid: tuple[int, int], similarity: bool) -> list[Decoded]:
        calls = [(slots, grid, step, similarity and step == self.mask_step) for step in range(len(self.steps))]
        if self.checkpointing and torch.is_grad_enabled():
            return [checkpoint(self._decode, *one, use_reentrant=False) for one in calls]
        return [self._decode(*one) for one in calls]


def _map_width(in_dim: int | Sequence[int], num_layers: int) -> int:
    """Return the width of the single map; refuse several maps."""
    if num_layers != 1:
        raise UserError(
            f"head=slots reads one feature map, but backbone.layers gives {num_layers}. Set backbone.layers=[-1]."
        )
    return widths(in_dim, num_layers)[0]


class FrameSlots(NamedTuple):
    """Slots, attention and reconstructions of one frame."""

    slots: Tensor  # (B, S, D)
    attention: Tensor  # (B, S, h, w)
    reconstructions: list[Decoded]  # reconstructions, one for each offset in `steps`


def telling_frames(frames: int, steps: Sequence[int], *, training: bool, learns_onwards: bool) -> int:
    """Return the number of source frames, whose slots reconstruct frames.

    The last max(steps) frames are only targets.

    Args:
        frames: number of frames in the clip.
        steps: offsets in frames of the reconstruction targets.
        training: False allows an image, a clip of one frame, as its own source whatever the steps.
        learns_onwards: whether the predictor is trained from one source frame to the next, and so needs two.

    Raises:
        UserError: the clip is too short.
    """
    telling = frames - max(steps)
    if telling == 1 and training and learns_onwards:
        raise UserError(
            f"head.predictor=savi learns from pairs of frames, but clips of {frames} frames have none "
            f"(head.steps={steps}). Set data.clips.cut.length={max(steps) + 2} or more; or, for single frames, "
            "head.predictor=none."
        )
    if telling >= 1:
        return telling
    if frames == 1 and not training:
        return 1
    raise UserError(
        f"head.steps={steps} reconstructs up to {max(steps)} frames ahead, but clips have {frames}. Set "
        f"data.clips.cut.length={max(steps) + 1} or more, or lower head.steps."
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
            f"head.similarity=true predicts {trained_grid[0]} x {trained_grid[1]} cells (head.positions_grid), but "
            f"these frames have {grid[0]} x {grid[1]}. Set resolution.crop to head.positions_grid times the backbone's "
            f"patch size, or head.positions_grid=[{grid[0]},{grid[1]}] and train again."
        )
