"""Base classes of backbones, heads and losses, with default behaviour.

Custom parts inherit one of them. Axis letters are those of `shapes.py`.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence, Set
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoseg.core.geometry import pad_to_multiple, upsample
from dinoseg.core.sample_maps import MapKind
from dinoseg.core.shapes import Prediction, StackedSamples, WeightedMasks
from dinoseg.core.task import SEMANTIC, Task
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.wording import join_names

Outputs = TypeVar("Outputs")
_FEW = (4, 3, 2, 1)  # chunk sizes: 0.87 of the time of 16 images at once, ViT-S, 350 x 476, float32
BlockKwargs = dict[str, tuple[Tensor, Tensor]]  # keyword arguments of a block besides its tokens


class GuardedModule(nn.Module):
    """Module that refuses a submodule under the name of a property which does not return it.

    nn.Module would register the submodule, while the property and `forward` keep the old one.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute or register a submodule.

        Raises:
            UserError: it would be ignored.
        """
        to_property = isinstance(value, nn.Module) and isinstance(getattr(type(self), name, None), property)
        if to_property and getattr(self, name) is value:
            return
        super().__setattr__(name, value)
        if to_property and getattr(self, name) is not value:
            del self._modules[name]
            raise UserError(
                f"{type(self).__name__}.{name} is read-only: {type(value).__name__} would be ignored. Choose parts by "
                "the arguments of dinoseg.create_model, such as head=; change modules inside the part instead."
            )


class Backbone(GuardedModule):
    """Base class of backbones: map images (B, channels, H, W), float in 0..1, to L maps (B, C, h, w).

    h = ceil(H / patch_size) and w = ceil(W / patch_size). A backbone normalises images and pads them at the bottom
    and on the right to the patch multiple; the caller crops back. The maps of a pyramid differ in width and grid, the
    coarsest being h x w; `dim` then lists the widths.

    A plain vision transformer sets `has_tokens` and `num_prefix`, defines `embed`, `blocks` and `norm`, and inherits
    the rest. Each block maps tokens (B, N, C) to tokens, of which the last h * w are patches.
    """

    dim: int | list[int]
    patch_size: int
    num_layers: int  # L
    depth: int  # blocks (stages of a pyramid) in all
    layers: Sequence[int] = ()  # 0-based blocks of the maps
    is_pyramid: bool = False
    mean: Tensor  # (channels, 1, 1) buffers, see `models.backbones.normalisation.register_colours`
    std: Tensor
    weights: str | None = None  # source of the weights; None or `random`: checkpoints have to hold all of them
    unused: Sequence[str] = ()  # parameters that no map depends on
    undecayed: frozenset[str] = frozenset()  # names of weights that its library exempts from weight decay
    uncalled_linears: frozenset[str] = frozenset()  # linear layers whose weight is used outside their `forward`
    has_class_attention: bool = False  # whether `with_class_attention` and `with_keys` are implemented
    has_tokens: bool = False  # whether `embed` is implemented, and blocks accept more tokens than it returns
    num_prefix: int = 0  # class and register tokens, which come before the patches
    recomputed_modes: Collection[bool] = ()  # values of a block's `training` with which `run_block` recomputes it
    head_dim: int = 64  # width of a head of the blocks' attention, for a head that reads tokens

    if TYPE_CHECKING:  # nn.Module's own, which is untyped

        def __call__(self, images: Tensor) -> list[Tensor]:
            """Return L maps (B, C, h, w), by `forward`."""
            ...

    # looked up in `_modules`: a class attribute would hide a submodule of the same name
    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential | list[nn.Module]:
        """Return the blocks up to the last one that is read, in order; for a pyramid, its stages."""
        blocks = self._modules.get("blocks")
        return blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else []

    @property
    def norm(self) -> nn.Module | None:
        """Return the final norm that is applied to the maps, if there is one."""
        return self._modules.get("norm")

    @property
    def channels(self) -> int:
        """Return the number of channels of images, 3 for RGB."""
        return len(self.mean)

    def pixels(self, images: Tensor) -> Tensor:
        """Return images normalised and padded, as input of the blocks."""
        return pad_to_multiple((images - self.mean) / self.std, self.patch_size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (h, w) of the patches of images of `size` (H, W)."""
        return -(-size[0] // self.patch_size), -(-size[1] // self.patch_size)  # torch.export cannot write math.ceil

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return L maps (B, C, h, w) of a plain vision transformer; other backbones override it."""
        size = (images.shape[-2], images.shape[-1])
        block_kwargs = self.block_kwargs(size)
        _, read = self.run_blocks(self.embed(images), block_kwargs, skipped_prefix=self.num_prefix)
        return self._to_maps(self._finish(read, self.norm), size)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Run `forward`, in chunks of at most 4 images if the backbone is frozen and on the CPU.

        The tokens of a few images stay in the processor's caches.
        """
        if (
            images.device.type != "cpu"
            or torch.compiler.is_compiling()  # before the size is read: it would be traced as a constant
            or any(parameter.requires_grad for parameter in self.parameters())
            or (few := next(few for few in _FEW if len(images) % few == 0)) == len(images)
        ):
            return self(images)
        return [torch.cat(parts) for parts in zip(*map(self, images.split(few)), strict=True)]

    @property
    def first_trained(self) -> int | None:
        """Return the index of the first block with a trained parameter; None: nothing is trained.

        It is 0 if anything before the blocks is trained. A norm after the blocks counts as one more block.
        """
        trained = {parameter for parameter in self.parameters() if parameter.requires_grad}
        if not trained:
            return None
        parts = [*self.blocks, self.norm or nn.Identity()]
        firsts = [number for number, part in enumerate(parts) if not trained.isdisjoint(part.parameters())]
        within = {parameter for part in parts for parameter in part.parameters()}
        return firsts[0] if trained <= within else 0

    def forward_frozen(self, images: Tensor) -> list[Tensor]:
        """Return the frozen part's tokens (B, N, C) or maps (B, C, h, w) for images, as input of `forward_trainable`.

        There is one for each block that is read, in their order. If something is trained, these are the blocks before
        the first trained one, whose input comes last; otherwise they have passed the norm. Tokens include class and
        register tokens.

        Raises:
            UserError: something is trained, and this backbone can only be split behind its last block.
        """
        first = self.first_trained
        if self.has_tokens:
            block_kwargs = self.block_kwargs((images.shape[-2], images.shape[-1]))
            tokens, read = self.run_blocks(self.embed(images), block_kwargs, stop=first)
            if first is None:
                return [(self.norm or nn.Identity())(part) for part in read.values()]
            return [*read.values()] if first == len(self.blocks) else [*read.values(), tokens]
        if first is not None:
            raise UserError(
                "This backbone can only be split after its last block, and some of it is trained. Choose "
                "adapter=frozen, a vision transformer, or engine.cache=off."
            )
        maps = dict(zip(self._read, self(images), strict=True))
        return [maps[layer] for layer in sorted(maps)]

    def forward_trainable(self, frozen: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Return the L maps (B, C, h, w) from the result of `forward_frozen` for images of `size` (H, W)."""
        if self.has_tokens:
            return self._to_maps(self.trainable_tokens(frozen, self.block_kwargs(size), self.num_prefix), size)
        maps = dict(zip(sorted({*self._read}), frozen, strict=True))
        return [maps[layer] for layer in self._read]

    def trainable_tokens(
        self, frozen: list[Tensor], block_kwargs: BlockKwargs, skipped_prefix: int = 0
    ) -> list[Tensor]:
        """Return the tokens (B, num_prefix + h * w, C) of each block that is read, after the norm of the maps.

        Args:
            frozen: result of `forward_frozen`.
            block_kwargs: result of `block_kwargs` for the size of its images.
            skipped_prefix: number of class and register tokens to leave out.
        """
        first = self.first_trained
        known = [layer for layer in sorted({*self.layers}) if first is None or layer < first]
        # the input of the first trained block may follow
        read = {layer: part[:, skipped_prefix:].contiguous() for layer, part in zip(known, frozen, strict=False)}
        if first is None:
            return self._finish(read, None)
        read |= self.run_blocks(frozen[-1], block_kwargs, first, skipped_prefix=skipped_prefix)[1]
        return self._finish(read, self.norm)

    def run_blocks(
        self,
        tokens: Tensor,
        block_kwargs: BlockKwargs,
        start: int = 0,
        stop: int | None = None,
        skipped_prefix: int = 0,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the tokens (B, N, C) after blocks `start` to `stop`, and those after each one that is read.

        `skipped_prefix`: number of tokens to leave out of the latter. Their copies precede the next block, since the
        order of operations decides how their gradients are rounded.
        """
        read = {}
        for number, block in enumerate(list(self.blocks)[start:stop], start):
            tokens = self.run_block(block, tokens, **block_kwargs)
            if number in self.layers:
                read[number] = tokens[:, skipped_prefix:].contiguous()
        return tokens, read

    def run_block(self, block: nn.Module, tokens: Tensor, **block_kwargs: Any) -> Tensor:
        """Return the tokens (B, N, C) after a block.

        More tokens than those of `embed` may come first, and `attention_mask` (B, 1, Q, N), bool, True = attend,
        restrict the first Q.
        """
        has_gradient = torch.is_grad_enabled() and (block.training or tokens.requires_grad)
        if has_gradient and block.training in self.recomputed_modes:
            return checkpoint(partial(block, **block_kwargs), tokens, use_reentrant=False)
        return block(tokens, **block_kwargs)

    def _finish(self, read: Mapping[int, Tensor], norm: nn.Module | None) -> list[Tensor]:
        normed = {number: part if norm is None else norm(part) for number, part in read.items()}
        return [at_least_float32(normed[layer]) for layer in self.layers]

    def _to_maps(self, patches: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        return [part.mT.unflatten(2, self.grid(size)) for part in patches]

    @property
    def _read(self) -> Sequence[int]:
        return self.layers or range(self.num_layers)

    def with_class_attention(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps and the class token's attention (B, heads, h, w) float32 in the last block, from one pass."""
        raise NotImplementedError

    def with_keys(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps and the attention keys (B, C, h, w) of all heads in the last block that is read."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens (B, num_prefix + h * w, C) of images that enter the first block."""
        raise NotImplementedError

    def block_kwargs(self, size: tuple[int, int]) -> BlockKwargs:
        """Return keyword arguments of each block for images of `size` (H, W), such as rotary positions."""
        return {}

    def export_state(self) -> dict[str, Tensor]:
        """Return the weights under the names that `weights` reads from a file.

        Raises:
            UserError: the backbone has no weights to export, or holds LoRA updates, which are not weights of their own.
        """
        raise UserError(f"{type(self).__name__} has no weights to export. Choose another backbone.")


class Head(GuardedModule, Generic[Outputs]):
    """Base class of heads: map feature maps to outputs of the head's own type, and these to pixels.

    Outputs are tensors (B, ...), alone or in lists, dicts or dataclasses: a validation computes the loss of each image.

    A head overrides `forward`, or `run` if it needs more than the maps: the pixels, clips, or the blocks themselves.
    """

    provides: Set[str] = frozenset()  # names of what its outputs hold besides class scores, see `Loss.needs`
    no_classes: str | None = None  # what it predicts instead of classes, and what uses that; None: it scores classes
    mixture: bool = False  # whether its scores are sums of probabilities, as in mask classification, not logits
    min_batch_size: int = 1  # minimum number of training images per rank and pass
    weights: str | None = None  # file of its frozen part, if any
    no_object: bool = False  # whether the last column of its class logits means "no object"
    joint_blocks: int = 0  # number of the backbone's last blocks that its queries pass through
    init: str | None = None  # `probe`: a new training starts from a linear probe, see `start`; None: at random
    fixed_size_reason: str | None = None  # why its exported graph has a fixed input size; None: any size

    if TYPE_CHECKING:

        def __call__(self, features: list[Tensor]) -> Outputs:
            """Return the outputs for L maps (B, C, h, w), by `forward`."""
            ...

    @property
    def delayed_modules(self) -> tuple[float, Sequence[nn.Module]]:
        """Return the share of the training after which some modules start to be trained, and these modules."""
        return 0.0, ()

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone that this head cannot use.

        Raises:
            UserError: with the backbones that it can use.
        """

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Initialise the head to score features x (D,) as `weight` (K, D) x + `bias` (K,), from a linear probe.

        `mean` and `variance` (D,) are those of the features.
        """
        raise NotImplementedError

    def set_progress(self, step: int, steps: int) -> None:
        """Receive the 0-based step and the length of the training: for heads whose training depends on it."""

    def length_warning(self, steps: int) -> str | None:
        """Return a warning if settings in steps do not suit the length of the training; None: they do."""
        return None

    def run(self, backbone: Backbone, images: Tensor) -> Outputs:
        """Return the outputs for images (B, channels, H, W), float in 0..1."""
        return self(backbone.maps(images))

    def forward_frozen(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """Return tokens (B, N, C) or maps (B, C, h, w) from before anything trained, for `forward_trainable`.

        Raises:
            UserError: this head overrides `run`, but not `forward_trainable`.
        """
        if type(self).run is not Head.run and type(self).forward_trainable is Head.forward_trainable:
            raise UserError(
                f"{type(self).__name__} runs the backbone itself, so the frozen part cannot be split off. Choose "
                "engine.cache=off, or a head that reads feature maps, such as head=linear or head=dpt."
            )
        return backbone.forward_frozen(images)

    def forward_trainable(self, backbone: Backbone, frozen: list[Tensor], size: tuple[int, int]) -> Outputs:
        """Return the outputs for the result of `forward_frozen` for images passed to the backbone at `size` (H, W)."""
        return self(backbone.forward_trainable(frozen, size))

    def grid_scores(self, outputs: Outputs) -> Tensor | None:
        """Return class scores (B, K, h, w) if `predict` only applies `geometry.upsample` to them, else None.

        Losses then upsample them one tile at a time.
        """
        return None

    def weighted_masks(self, outputs: Outputs) -> WeightedMasks | None:
        """Return the masks, at least float32, if `predict` only computes their mixture, else None.

        Losses then mix them one tile at a time.
        """
        return None

    def predict(self, outputs: Outputs, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        """Return class scores (B, K, H, W) at `size`, for the share `valid` of the outputs that the image covers."""
        grid = self.grid_scores(outputs)
        if grid is None:
            raise NotImplementedError
        return upsample(grid, size, valid)


class Loss(nn.Module):
    """Base class of losses: map a prediction and a batch to a scalar and its named parts.

    `forward` returns a mean, and its parts by name; a part `weight` is the divisor of the mean.

    `needs` names what it reads besides class scores: `masks` (`MaskOutputs`), `layers` (masks with a layer for each
    class, as with task=multilabel), or what a head of an extension `provides`.
    """

    needs: Set[str] = frozenset()
    advice: str = "Choose a head that provides this, or another loss."  # where something that it needs is missing
    needs_maps: Mapping[str, MapKind] = {}  # maps that it reads from `Batch.maps`, by name
    sums_over_batch: bool = False  # whether splitting a batch changes it: it is no mean over samples or labels
    num_divisors: int = 1  # D, number of divisors of its terms; more than 1: see `step_loss`
    task: Task = SEMANTIC  # of the model, whose `targets` a loss of masks reads; set by the builder
    divisor: Hashable = None  # identifies the divisor of a single term; None: only known after the forward pass

    if TYPE_CHECKING:

        def __call__(self, prediction: Prediction, batch: StackedSamples) -> tuple[Tensor, dict[str, Tensor]]:
            """Return the mean and its parts, by `forward`."""
            ...

    def divisors(self, batch: Any) -> Tensor:
        """Return what a batch's labels add to the divisors (D,); the batch may not have been completed by `to` yet."""
        return torch.full((self.num_divisors,), float(len(batch.names)))

    def step_loss(
        self, prediction: Prediction, batch: StackedSamples, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's part of a step's loss, the loss of the batch alone, and its parts by name.

        Each term is divided by its own divisor over all batches and ranks of the step. The parts of the batches thus
        add up to the loss of one batch with all samples.

        Args:
            prediction: for the batch.
            batch: one of the step.
            divisors: (D,) of all batches and ranks of the step.
        """
        value, parts = self(prediction, batch)
        batch_divisors = self.divisors(batch).to(divisors)
        return value * safe_divide(batch_divisors, divisors)[0], value.detach(), parts


def check_needs(loss: Loss, provided: Set[str], name: str, by: str) -> None:
    """Refuse a loss that needs what nothing provides.

    Args:
        loss: the loss.
        provided: names of what there is, see `Head.provides`.
        name: of the loss, for messages.
        by: what provides it, for messages, such as `head=linear`.

    Raises:
        UserError: with both lists.
    """
    if not loss.needs <= provided:
        held = join_names(sorted(provided)) or "class scores alone"
        raise UserError(f"{name} needs {join_names(sorted(loss.needs))}, and {by} provides {held}. {loss.advice}")


def require_classes(head: Head, name: str) -> None:
    """Refuse a head without classes.

    Args:
        head: the head.
        name: of its model, as the subject of a sentence.

    Raises:
        UserError: with what the head is for.
    """
    if head.no_classes is not None:
        raise UserError(f"{name} predicts {head.no_classes}. Give a model that scores classes.")


def safe_divide(part: Tensor, total: Tensor) -> Tensor:
    """Return part / total; 0 where both are 0."""
    return part / torch.where(total > 0, total, 1)


def overrides_both(kind: type, name: str, other: str) -> bool:
    """Return whether the class that overrides the method `other`, or a subclass of it, also overrides `name`."""
    owner = next(base for base in kind.__mro__ if other in vars(base))
    return any(name in vars(base) for base in kind.__mro__[: kind.__mro__.index(owner) + 1])
