"""Whole-image and sliding-window inference: placement, weighting and averaging of windows in bounded memory."""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal

import torch
from torch import Tensor

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Prediction
from dinoseg.core.sizes import with_shorter_side
from dinoseg.inference.rows import ResizedRows, Rows, at_size, mean
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass, Place
from dinoseg.models.model import SegmentationModel, Size, backbone_size
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Range, Scale, check_annotations

Overlap = Annotated[float, Range("a number from 0 to 0.9", 0, 0.9)]
Shortest = Annotated[int, Range("a whole number from 1 to 16384", 1, 2**14)]
Placement = Literal["stride", "even"]
Weights = Literal["cosine", "uniform"]
Flips = Literal["none", "horizontal", "all"]
Turn = tuple[bool, bool, bool]  # (transpose, flip vertically, flip horizontally), applied in this order

_AS_IT_IS: Turn = (False, False, False)
TURNS: dict[Flips, Sequence[Turn]] = {
    "none": (_AS_IT_IS,),
    "horizontal": (_AS_IT_IS, (False, False, True)),
    "all": [
        (exchanged, down, right) for exchanged in (False, True) for down in (False, True) for right in (False, True)
    ],
}
_MAX_PIXELS = 2**26  # limit of an image enlarged by `shortest`
_VIEWS = (
    "inference.flips and inference.scales average the classes of pixels, and objects have no average. Set "
    "inference.flips=none inference.scales=[1.0]."
)


class Windows(InferenceStrategy):
    """Overlapping windows, batched across images, with averaged predictions.

    A window that would leave the image is shifted back into it, as in mmsegmentation. Memory is bounded by the image's
    width: `size` rows of all classes, in float32.

    Args:
        size: height and width of a window in image pixels; one number for both. A smaller image is one window.
        overlap: fraction of a window that the next window covers again; of no effect with `stride` or even placement.
        stride: pixels from one window to the next, a number or (down, across); None: from `overlap`. Published: 341
            for windows of 512, 596 for 896 (facebookresearch/dinov3, dinov3/eval/segmentation/configs).
        placement: `stride`, or `even`: ceil(side / size) windows along each side, the least that cover it, spread
            evenly, the j-th at int(j (side - size) / (windows - 1)). The latter is tue-mps/eomt's
            (training/lightning_module.py), which has windows along the longer side only, as `shortest` is `size`.
        weights: `cosine`, which gives pixels near a window's border a low weight, or `uniform`.
        average: `probabilities`, which are comparable between windows, flips and scales, or `scores`, as in
            mmsegmentation and Meta's code. `scores` averages the head's raw scores over the windows of one view (flip
            and scale), then the softmax of these over the views; each view is cut into its own windows.
        batch_size: windows per forward pass.
        flips: `none`; `horizontal`: the image and its mirror image; `all`: the eight symmetries of a square.
        scales: image scales to average over; 1 is the original scale.
        shortest: length in pixels to which the image's shorter side is enlarged or reduced first, see
            `with_shorter_side`; with `scales`, to int(shortest * scale). An image is enlarged to at most 64 megapixels.
            None: no resizing.
        multiple: shorter sides at scales below 1 are rounded up to a multiple of this, as in DINOv3's Mask2Former
            evaluation (32); needs `shortest`. None: no rounding.
        resample: interpolation of resized images: `antialias`, as in Pillow, or `bilinear` without antialiasing, as in
            OpenCV, and so in mmsegmentation and DINOv2's linear evaluation.

    Raises:
        UserError: an option is unknown or without effect, `size` or `stride` have neither 1 nor 2 numbers, `stride`
            leaves gaps, or `scales` is empty.
    """

    @check_annotations
    def __init__(
        self,
        size: Count | tuple[Count, Count],
        *,
        overlap: Overlap = 0.25,
        stride: Count | tuple[Count, Count] | None = None,
        placement: Placement = "stride",
        weights: Weights = "cosine",
        average: Literal["probabilities", "scores"] = "probabilities",
        batch_size: Count = 4,
        flips: Flips = "none",
        scales: Sequence[Scale] = (1.0,),
        shortest: Shortest | None = None,
        multiple: Count | None = None,
        resample: Literal["antialias", "bilinear"] = "antialias",
    ) -> None:
        self.size = _pair(size)
        self.stride = None if stride is None else _pair(stride)
        if not scales:
            raise UserError("inference.scales=[] has no scale. Give [1.0] for the original size.")
        if self.stride is not None and placement == "even":
            raise UserError(
                "inference.stride has no effect with inference.placement=even, which spreads windows by itself. Leave "
                "one of the two out."
            )
        if self.stride is not None and any(map(operator.gt, self.stride, self.size)):
            raise UserError(
                f"inference.stride={_format_pair(self.stride)} leaves pixels between windows of "
                f"{_format_pair(self.size)} that no window covers. Give a stride of at most inference.size."
            )
        if multiple is not None and shortest is None:
            raise UserError(
                f"inference.multiple={multiple} rounds the sides that inference.shortest sets. Set inference.shortest, "
                "or leave inference.multiple out."
            )
        self.overlap, self.placement, self.weights, self.average = overlap, placement, weights, average
        self.batch_size = batch_size
        self.turns = TURNS[flips]
        self.scales = scales
        self.shortest, self.multiple = shortest, multiple
        self.resizes = shortest is not None
        self.antialias = resample == "antialias"

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield predictions of bands of rows, each as soon as no later window overlaps it."""
        # windows serve small objects, so the image is reduced only if resolution.longest is set
        grid = backbone_size(rows.size, 1.0, model.longest)
        return self.over(model, rows, autocast, grid, size=size, on_pass=on_pass)

    def over(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        grid: Size,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield predictions as `bands` does, after resizing the images to `grid` (H, W)."""
        size = size or rows.size
        # probabilities of all turns add up in one pass; scores of two turns have no common zero, so each is a view
        views = [self.turns] if self.average == "probabilities" else [(turn,) for turn in self.turns]
        passes: list[_Pass] = []
        streams: list[Iterator[Tensor]] = []
        for scale, turns in itertools.product(self.scales, views):
            scaled = self._size_at_scale(grid, scale)
            scale_pass = _Pass(self, model, autocast, turns, on_pass if not passes else None)
            at_scale = rows if scaled == rows.size else ResizedRows(rows, scaled, antialias=self.antialias)
            passes.append(scale_pass)
            # generators: all views advance band by band, so no view of the whole image is in memory
            streams.append(at_size(scale_pass.averages(at_scale), scaled, size))
        # mmsegmentation and Meta: the mean of logits over windows, then of the softmax over views
        of_views = self.average == "scores" and len(streams) > 1
        if of_views:
            streams = [(model.task.probabilities(band) for band in stream) for stream in streams]
        for band in mean(streams):
            mixture = of_views or passes[0].mixture
            yield Prediction(band, (band.shape[2], band.shape[3]), (1.0, 1.0), upsample, mixture, task=model.task)

    def equals_single_pass(self, model: SegmentationModel, size: Size, autocast: Autocast) -> bool:
        """Return whether one window without further resizing, flips and scales covers an image of `size`."""
        grid = backbone_size(size, 1.0, model.longest)
        is_enlarged = self.shortest is not None and with_shorter_side(grid, self.shortest) != grid
        if is_enlarged or self.averages_views:
            return False
        # resized twice, to the windows' scale and then to the backbone's, pixels differ from those of one pass
        is_resized_once = grid == size or model.scale == 1.0
        return grid == model.reduced_size(size) and is_resized_once and all(map(operator.le, grid, self.size))

    @property
    def no_objects_reason(self) -> str | None:
        """Why it predicts no single objects; None: it predicts them."""
        if self.averages_views:
            return _VIEWS
        # an object is joined from the parts in two windows where these overlap
        strides = self.stride or [side * (1 - self.overlap) for side in self.size]
        if self.placement == "stride" and all(map(operator.lt, strides, self.size)):
            return None
        return (
            "Windows that do not overlap cut objects at their borders in two. Set inference.placement=stride "
            "inference.overlap=0.25 inference.stride=null, or inference=whole."
        )

    @property
    def averages_views(self) -> bool:
        """Return whether it averages over flips or scales, or predicts at another scale than 1."""
        return len(self.turns) > 1 or list(self.scales) != [1.0]

    def starts(self, axis: int, length: int) -> list[int]:
        """Return the first positions of windows that cover `length` pixels along an axis of the images."""
        side = self.size[axis]
        if self.placement == "even":
            return even_starts(length, side)
        return starts(length, side, self.stride[axis] if self.stride else max(1, round(side * (1 - self.overlap))))

    def _size_at_scale(self, grid: Size, scale: float) -> Size:
        """Return the (H, W) of images of size `grid` at a scale, enlarged to at most `_MAX_PIXELS` pixels."""
        if self.shortest is None:
            return backbone_size(grid, scale, None)
        shorter = max(1, int(self.shortest * scale))
        if self.multiple is not None and scale < 1:
            shorter += -shorter % self.multiple
        wanted = with_shorter_side(grid, shorter)
        if math.prod(wanted) <= max(_MAX_PIXELS, math.prod(grid)):
            return wanted
        return backbone_size(grid, max(1.0, math.sqrt(_MAX_PIXELS / math.prod(grid))), None)


class Whole(InferenceStrategy):
    """Whole-image inference strategy; averages class probabilities over `flips` and `scales`, see `Windows`."""

    def __init__(self, *, flips: Flips = "none", scales: Sequence[Scale] = (1.0,)) -> None:
        # a single window larger than any image
        self.passes = Windows(2**31, overlap=0.0, weights="uniform", batch_size=2**31, flips=flips, scales=scales)

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield the model's prediction as one band, or several bands if it is averaged over flips or scales."""
        if not self.is_single_pass(model, rows.size, autocast):
            grid = model.reduced_size(rows.size)
            yield from self.passes.over(model, rows, autocast, grid, size=size, on_pass=on_pass)
            return
        images = rows.read(0, rows.size[0])
        with autocast():
            prediction = model(images)
        if on_pass is not None:
            on_pass(prediction, images, [Place(image, 0, 0) for image in range(rows.count)], rows.size)
        yield replace(prediction, size=size or prediction.size)

    @property
    def no_objects_reason(self) -> str | None:
        """Why it predicts no single objects; None: it predicts them."""
        return _VIEWS if self.passes.averages_views else None

    def is_single_pass(self, model: SegmentationModel, size: Size, autocast: Autocast) -> bool:
        """Return whether the prediction is a single pass: no flips and only scale 1."""
        return not self.passes.averages_views


@dataclass
class _Pass:
    """One pass over images at one scale, averaged over turns; the first turn sets the window placement."""

    windows: Windows
    model: SegmentationModel
    autocast: Autocast
    turns: Sequence[Turn]
    on_pass: OnPass | None
    mixture: bool = True  # whether the averaged values are probabilities

    def averages(self, rows: Rows) -> Iterator[Tensor]:
        """Yield bands (B, K, r, W) of weighted averages, each as soon as no later window overlaps it.

        A band is valid only until the next one is requested.
        """
        (height, width), along = self._place_windows(rows.size)
        profiles = [profile(side, self.windows.weights) for side in (height, width)]
        # the weight of a pixel is a product of one of its row and one of its column, and so are the sums over a grid of
        # windows
        totals = [sum_weights(*given) for given in zip(rows.size, along, profiles, strict=True)]
        # as many rows as a window has: at 3072 x 2048 and 19 classes 169 MiB instead of 967 (benchmarks/windows.py)
        score_sums: Tensor | None = None  # (B, K, height, W), starting at row `top`
        top = 0
        cut = _cut(rows, along, (height, width))
        while batch := list(islice(cut, self.windows.batch_size)):
            places = [place for place, _ in batch]
            scores = self._scores(torch.stack([crop for _, crop in batch]), places, rows.size)
            if score_sums is None:
                shape = (rows.count, scores.shape[1], height, rows.size[1])
                score_sums = scores.new_zeros(shape)
                profiles, totals = ([part.to(scores) for part in parts] for parts in (profiles, totals))
            for (image, first, left), part in zip(places, scores, strict=True):
                # windows come from the top down, so none will touch the rows above this one again
                if first > top:
                    yield _divide_by_weights(score_sums[:, :, : first - top], totals, top)
                    # a copy, since source and target overlap
                    rest = score_sums[:, :, first - top :].clone()
                    score_sums[:, :, : rest.shape[2]] = rest
                    score_sums[:, :, rest.shape[2] :] = 0
                    top = first
                score_sums[image, :, :, left : left + width] += part * (profiles[0][:, None] * profiles[1])
        assert score_sums is not None
        yield _divide_by_weights(score_sums, totals, top)

    def _place_windows(self, size: Size) -> tuple[Size, list[list[int]]]:
        """Return the (height, width) of windows on images of `size` (H, W), and their first rows and columns."""
        # with `scores`, a view's windows are cut from the turned image, as the official codes turn it first; here the
        # places are turned instead, since rows are read from the top
        exchanged, *flipped = self.turns[0]
        axes = (1, 0) if exchanged else (0, 1)  # of the turned image, by axis of this one
        sides = []
        along = []
        for axis, turned_axis in enumerate(axes):
            side = min(self.windows.size[turned_axis], size[axis])
            begins = self.windows.starts(turned_axis, size[axis])
            if flipped[turned_axis]:
                # a window at `start` of the mirrored image ends that far from the other side of this one
                begins = [size[axis] - side - start for start in reversed(begins)]
            sides.append(side)
            along.append(begins)
        return (sides[0], sides[1]), along

    def _scores(self, crops: Tensor, places: Sequence[Place], size: Size) -> Tensor:
        """Return the values to average (n, K, h, w) for crops (n, 3, h, w): the mean over `turns`."""
        total: Tensor | None = None
        for turn in self.turns:
            with self.autocast():
                prediction = self.model(apply_turn(crops, turn), reduce=False)
            if self.on_pass is not None and turn == _AS_IT_IS:
                self.on_pass(prediction, crops, places, size)
            self.mixture = self.windows.average == "probabilities" or prediction.mixture
            scores = prediction.scores() if self.windows.average == "scores" else _probabilities(prediction)
            scores = undo_turn(scores, turn)
            total = scores if total is None else total + scores
        assert total is not None
        return total if len(self.turns) == 1 else total / len(self.turns)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first positions of windows of `window` pixels that cover `length`, the last one shifted back."""
    count = max(0, math.ceil((length - window) / stride)) + 1
    # the last window is shifted back instead of padded: the model sees no border that the image does not have
    return [min(number * stride, max(0, length - window)) for number in range(count)]


def even_starts(length: int, window: int) -> list[int]:
    """Return the first positions of the least windows of `window` pixels that cover `length`, spread evenly."""
    count = -(-length // window)
    # tue-mps/eomt: start j at int(j (size - overlap)), which equals this quotient
    return [number * (length - window) // (count - 1) if number else 0 for number in range(count)]


def profile(length: int, weights: str) -> Tensor:
    """Return the weight (length,) float64 of each row or column of a window; all weights are above 0."""
    if weights == "uniform":
        return torch.ones(length, dtype=torch.float64)
    # half a period over the window, sampled at pixel centres, so that its border is above 0
    return torch.sin((torch.arange(length, dtype=torch.float64) + 0.5) * (math.pi / length))


def sum_weights(length: int, begins: Sequence[int], weights: Tensor) -> Tensor:
    """Return the summed window weights (length,) at each row or column."""
    total = torch.zeros(length, dtype=weights.dtype)
    for start in begins:
        total[start : start + len(weights)] += weights
    return total


def apply_turn(images: Tensor, turn: Turn) -> Tensor:
    """Return images (..., H, W) transposed and flipped as `turn` states."""
    images = images.transpose(-1, -2) if turn[0] else images
    return images.flip([axis for axis, flips in zip((-2, -1), turn[1:], strict=True) if flips])


def undo_turn(images: Tensor, turn: Turn) -> Tensor:
    """Invert `apply_turn`."""
    images = images.flip([axis for axis, flips in zip((-2, -1), turn[1:], strict=True) if flips])
    return images.transpose(-1, -2) if turn[0] else images


def _pair(given: int | tuple[int, int]) -> tuple[int, int]:
    """Return (down, across) of one number or two."""
    return (given[0], given[1]) if isinstance(given, tuple | list) else (given, given)


def _format_pair(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else str(list(pair))


def _cut(rows: Rows, begins: Sequence[Sequence[int]], window: Size) -> Iterator[tuple[Place, Tensor]]:
    """Yield windows with their places, from the top down; each row of windows covers all images."""
    for top in begins[0]:
        # one read for a row of windows, which are views of it
        strip = rows.read(top, top + window[0])  # (B, 3, h, W)
        # across the images of a batch, so that a pass is full although an image has few windows
        for image, left in itertools.product(range(rows.count), begins[1]):
            yield Place(image, top, left), strip[image, :, :, left : left + window[1]]


def _divide_by_weights(band: Tensor, totals: Sequence[Tensor], top: int) -> Tensor:
    """Divide weighted sums (B, K, r, W) by their weights in-place; the band starts at row `top`."""
    # window weights are separable, and so are their sums over a grid of windows
    return band.div_(totals[0][top : top + band.shape[2], None]).div_(totals[1])


def _probabilities(prediction: Prediction) -> Tensor:
    return prediction.task.probabilities(prediction.logits())
