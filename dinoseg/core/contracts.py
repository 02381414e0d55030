"""What backbones, heads and losses promise one another: base classes with defaults, so that nobody has to ask.

A part of your own inherits one of them. Axis letters are those of `shapes.py`.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dinoseg.core.geometry import pad_to_multiple, upsample
from dinoseg.core.shapes import Batch, ClipBatch, Prediction, WeightedMasks
from dinoseg.utils.errors import UserError

Outputs = TypeVar("Outputs")
_FEW = (4, 3, 2, 1)  # images at a time: 0.87 of the time of 16 at once, ViT-S, 350 x 476, float32
BesideTokens = dict[str, tuple[Tensor, Tensor]]  # what a block takes beside its tokens, by keyword


class Backbone(nn.Module):
    """Images (B, 3, H, W), float in 0..1, to L maps (B, C, h, w) of h = ceil(H / patch_size) rows.

    It normalises inside and pads at the bottom and on the right to the patch multiple; the caller crops back. The maps
    of a pyramid have a width and a grid each, the coarsest h x w; `dim` then lists the widths.
    """

    dim: int | list[int]
    patch_size: int
    num_layers: int  # L
    depth: int  # blocks (stages of a pyramid) in all
    layers: Sequence[int] = ()  # 0-based blocks of the maps
    is_pyramid: bool = False
    mean: Tensor  # (3, 1, 1) buffers, see `backbones.pixels.register_colours`
    std: Tensor
    weights: str | None = None  # where they came from; None or `random`: a checkpoint has to hold all of them
    unused: Sequence[str] = ()  # parameters that no map depends on
    uncalled_linears: frozenset[str] = frozenset()  # linear layers whose weight is read past their `forward`
    has_class_attention: bool = False  # whether there is `with_class_attention`
    takes_tokens: bool = False  # whether there is `embed`: its tokens go through one block after another
    takes_queries: bool = False  # whether blocks then take more tokens than it gives

    if TYPE_CHECKING:  # nn.Module's own, of which its types say nothing

        def __call__(self, images: Tensor) -> list[Tensor]:
            """Run `forward`."""
            ...

    # A class attribute would hide a module of its name that a backbone assigns to itself, so these two look it up
    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential | list[nn.Module]:
        """The blocks up to the last one that is read, in order; of a pyramid its stages."""
        blocks = self._modules.get("blocks")
        return blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else []

    @property
    def norm(self) -> nn.Module | None:
        """The final norm that the maps have passed, if there is one."""
        return self._modules.get("norm")

    def pixels(self, images: Tensor) -> Tensor:
        """Return images normalised and padded, as the blocks see them."""
        return pad_to_multiple((images - self.mean) / self.std, self.patch_size)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return L maps (B, C, h, w)."""
        raise NotImplementedError

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return what `forward` does; on a CPU, where nothing of it learns, of a few images at a time.

        The tokens of few stay in the processor's caches.
        """
        if (
            images.device.type != "cpu"
            or torch.compiler.is_compiling()  # asked first: a graph traced past here takes this many images alone
            or any(parameter.requires_grad for parameter in self.parameters())
            or (few := next(few for few in _FEW if len(images) % few == 0)) == len(images)
        ):
            return self(images)
        return [torch.cat(parts) for parts in zip(*map(self, images.split(few)), strict=True)]

    @property
    def first_trained(self) -> int | None:
        """The number of the first block of which something is trained; 0: of what comes before; None: nothing is.

        A norm after the blocks counts as one more block.
        """
        trained = {parameter for parameter in self.parameters() if parameter.requires_grad}
        if not trained:
            return None
        parts = [*self.blocks, self.norm or nn.Identity()]
        firsts = [number for number, part in enumerate(parts) if not trained.isdisjoint(part.parameters())]
        within = {parameter for part in parts for parameter in part.parameters()}
        return firsts[0] if trained <= within else 0

    def until(self, images: Tensor) -> list[Tensor]:
        """Return tokens (B, N, C) or maps (B, C, h, w) that the frozen part gives for images, for `onwards`.

        One for each block that is read, in their order; if something is trained, and more than the blocks before the
        first of it are read, what enters that block comes last.

        Raises:
            UserError: something is trained, and this backbone can be cut behind all of it alone.
        """
        if self.first_trained is not None:
            raise UserError(
                "This backbone is cut behind its last block alone, and some of it is trained. Choose adapter=frozen, "
                "a vision transformer, or engine.cache=off."
            )
        maps = dict(zip(self._read, self(images), strict=True))
        return [maps[layer] for layer in sorted(maps)]

    def onwards(self, frozen: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Return the L maps (B, C, h, w) for what `until` gave of images of `size` (H, W)."""
        maps = dict(zip(sorted({*self._read}), frozen, strict=True))
        return [maps[layer] for layer in self._read]

    @property
    def _read(self) -> Sequence[int]:
        return self.layers or range(self.num_layers)

    def with_class_attention(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps and where the class token looks in the last block, (B, heads, h, w) float32, of one pass."""
        raise NotImplementedError

    def embed(self, pixels: Tensor) -> tuple[Tensor, BesideTokens]:
        """Return the tokens (B, N, C) that enter the first block, and what each block takes beside."""
        raise NotImplementedError

    def beside(self, size: tuple[int, int]) -> BesideTokens:
        """Return what each block takes beside the tokens of padded pixels of `size` (H, W)."""
        return {}

    def export_state(self) -> dict[str, Tensor]:
        """Return the weights under the names in which `weights` reads them from a file.

        Raises:
            UserError: there are none, or it holds LoRA updates, which are no weights of their own.
        """
        raise UserError(f"{type(self).__name__} has no weights that could be exported. Choose another backbone.")


class Slots(Protocol):
    """Segments of a head that go from frame to frame."""

    groups: str  # in which frames background slots see the background alone: off, initial or always
    sizes: list[int]  # slots in each group, all in one without groups
    num_slots: int
    predictor: nn.Module | None  # slots to a first guess of those of the next frame; None: drawn anew in each

    def step(
        self,
        features: Tensor,
        slots: Tensor | None = None,
        allowed: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the slots (B, S, D) of one frame (B, C, h, w), and their attention (B, S, h, w)."""
        ...

    def masks(self, slots: Tensor, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the soft masks (B, S, h, w) of one frame."""
        ...


class Head(nn.Module, Generic[Outputs]):
    """Feature maps to outputs of its own kind, and those to pixels.

    Outputs are tensors (B, ...), alone or in lists, tables or dataclasses: a validation asks the loss of each image.

    It has either `forward`, or `run` if it needs more than the maps: the pixels, clips, or the blocks themselves.
    """

    mixture: bool = False  # whether its scores are sums of probabilities, as of mask classification, and no logits
    least_batch: int = 1  # training images per rank at once
    weights: str | None = None  # the file that its frozen part came from, if any
    no_object: bool = False  # whether the last column of its class logits says "no object"
    init: str | None = None  # `probe`: a new training begins with what `start` is given; None: at random
    one_size: str | None = None  # why an exported graph of it takes one size alone; None: it takes any

    if TYPE_CHECKING:

        def __call__(self, features: list[Tensor]) -> Outputs:
            """Run `forward`."""
            ...

    @property
    def slots(self) -> Slots | None:
        """The head as one of slots, which follows clips without labels; None: it scores classes."""
        return None

    @property
    def own_blocks(self) -> Sequence[nn.Module]:
        """Copies of a backbone's last blocks, in order, which it trains: all that is said of blocks holds for them."""
        return ()

    @property
    def late(self) -> tuple[float, Sequence[nn.Module]]:
        """The share of a training after which some of its parts begin to learn, and these parts."""
        return 0.0, ()

    def fits(self, backbone: Backbone) -> None:
        """Refuse a backbone that cannot serve it.

        Raises:
            UserError: naming what fits.
        """

    def copy_from(self, backbone: Backbone) -> None:
        """Take copies of what it begins with of a backbone that fits, when a model is put together of both.

        Raises:
            UserError: no copy can be made of it.
        """

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Score features x (D,) as `weight` (K, D) x + `bias` (K,); they have this mean and variance (D,)."""
        raise NotImplementedError

    def set_progress(self, share: float) -> None:
        """Take how much of the training is done, in [0, 1): for a head whose training changes with its length."""

    def run(self, backbone: Backbone, images: Tensor) -> Outputs:
        """Return the outputs for images (B, 3, H, W), float RGB in 0..1."""
        return self(backbone.maps(images))

    def until(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """Return tokens (B, N, C) or maps (B, C, h, w) of all before anything trained: `onwards` goes on as `run`.

        Raises:
            UserError: this head has a `run` of its own, and not this.
        """
        if type(self).run is not Head.run:
            raise UserError(
                f"{type(self).__name__} runs the backbone in a way of its own, and cannot be cut from what is frozen. "
                "Choose engine.cache=off, or a head that reads maps, such as head=linear or head=dpt."
            )
        return backbone.until(images)

    def onwards(self, backbone: Backbone, frozen: list[Tensor], size: tuple[int, int]) -> Outputs:
        """Return the outputs for what `until` gave of images that entered the backbone at `size` (H, W)."""
        return self(backbone.onwards(frozen, size))

    def forward(self, features: list[Tensor]) -> Outputs:
        """Return the outputs for L maps (B, C, h, w)."""
        raise NotImplementedError

    def grid_scores(self, outputs: Outputs) -> Tensor | None:
        """Return the class scores (B, K, h, w) of which `predict` is `geometry.upsample` and no more, else None.

        Losses then take them to pixels a tile at a time.
        """
        return None

    def weighted_masks(self, outputs: Outputs) -> WeightedMasks | None:
        """Return the masks that `predict` mixes, at least float32, if it is such a mixture and no more, else None.

        Losses then mix them a tile at a time.
        """
        return None

    def predict(self, outputs: Outputs, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        """Return class scores (B, K, H, W) at `size` for the image part `valid` of the outputs."""
        grid = self.grid_scores(outputs)
        if grid is None:
            raise NotImplementedError
        return upsample(grid, size, valid)


class Loss(nn.Module):
    """What training makes small."""

    needs_masks: bool = False  # whether it wants `MaskOutputs`
    needs_slots: bool = False  # whether it wants `SlotOutputs`, and asks for no labels
    needs_similarity: bool = False  # whether it wants those with `similarity`
    needs_carried: bool = False  # whether it compares slots that go from frame to frame
    sums_over_batch: bool = False  # whether it is no mean over samples or labels, so that parts of a batch have others
    num_divisors: int = 1  # D, by which its terms are divided; more than 1: see `in_step`
    divisor: Hashable = None  # names the divisor of a single term; None: known after the forward pass alone

    if TYPE_CHECKING:

        def __call__(self, prediction: Prediction, batch: Batch | ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
            """Run `forward`: on clips where it needs slots, else on images."""
            ...

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a mean, and its parts by name; `weight`, if it is among them, is what the mean was divided by."""
        raise NotImplementedError

    def divisors(self, batch: Any) -> Tensor:
        """Return what the labels of a batch, or of one that `to` has not completed yet, add to the divisors (D,)."""
        return torch.full((self.num_divisors,), float(len(batch.names)))

    def in_step(
        self, prediction: Prediction, batch: Batch | ClipBatch, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the part of a batch in the loss of a step, the loss of the batch alone, and its parts by name.

        Each term is divided by its own divisor over all batches and ranks of the step, so that the parts of the batches
        add up to the loss of one batch with all samples.

        Args:
            prediction: for the batch.
            batch: one of the step.
            divisors: (D,) of all batches and ranks of the step.
        """
        value, parts = self(prediction, batch)
        own = self.divisors(batch).to(divisors)
        return value * share_of(own, divisors)[0], value.detach(), parts


def share_of(own: Tensor, total: Tensor) -> Tensor:
    """Return own / total, and 0 where the total is 0."""
    return own / torch.where(total > 0, total, 1)
