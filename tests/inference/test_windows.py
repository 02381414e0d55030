"""Windows held against mmsegmentation's rule, written out in float64, and against the whole image."""

import itertools
import math
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import refusals
from torch import nn

from dinoseg.core.contracts import Head
from dinoseg.core.geometry import upsample
from dinoseg.core.sizes import with_shorter_side
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.rows import MemoryRows, ResizedRows, at_size, mean
from dinoseg.inference.windows import TURNS, Whole, Windows, apply_turn, profile, starts, sum_weights, undo_turn
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.model import SegmentationModel


def in_turn(*values):
    """Return each of some sizes with one of the values."""
    sizes = [(1, 1), (1, 37), (30, 2), (17, 23), (25, 24), (61, 40), (24, 24)]
    return list(zip(sizes, itertools.cycle(values), strict=False))


class PixelHead(Head):
    """Class scores of each pixel from its own colour, through `kernel` x `kernel` pixels."""

    def __init__(self, kernel=1, classes=4, mixture=False):
        super().__init__()
        self.layer = nn.Conv2d(3, classes, kernel, padding=kernel // 2)
        self.mixture = mixture

    def forward(self, features):
        scores = self.layer(features[0])
        return scores.sigmoid() if self.mixture else scores

    def predict(self, outputs, size, valid):
        return upsample(outputs, size, valid)


def make_model(longest=None, **options):
    torch.manual_seed(0)
    return SegmentationModel(RgbBackbone(patch_size=1), PixelHead(**options), longest=longest).double().eval()


def pictures(height, width, count=2, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((count, 3, height, width)))


def run_bands(model, images, strategy, **options):
    """Return what is averaged (B, K, H, W), in as few numbers as the strategy holds at a time."""
    with torch.no_grad():
        bands = strategy.bands(model, MemoryRows(images), nullcontext, **options)
        return torch.cat([band.scores().clone() for band in bands], dim=2)


def slid(model, image, crop, stride):
    """Average logits over windows by mmsegmentation's rule (`EncoderDecoder.slide_inference`), written out."""
    _, height, width = image.shape
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    total = 0.0
    counts = np.zeros((height, width))
    for row, column in itertools.product(range(rows), range(columns)):
        bottom = min(row * stride[0] + crop[0], height)
        right = min(column * stride[1] + crop[1], width)
        top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
        with torch.no_grad():
            logits = model(image[None, :, top:bottom, left:right]).scores()[0].numpy()
        placed = np.zeros((len(logits), height, width))
        placed[:, top:bottom, left:right] = logits
        total = total + placed
        counts[top:bottom, left:right] += 1
    return total / counts


@pytest.mark.parametrize(("size", "windows"), in_turn(((24, 24), 0.334, (16, 16)), ((10, 13), 0.25, (8, 10))))
def test_published_windows_are_those_of_mmsegmentation(size, windows):
    model = make_model(kernel=3)
    images = pictures(*size)
    crop, overlap, stride = windows
    strategy = Windows(crop, overlap=overlap, weights="uniform", average="scores", batch_size=3)
    expected = np.stack([slid(model, image, crop, stride) for image in images])
    np.testing.assert_allclose(run_bands(model, images, strategy).numpy(), expected, atol=1e-12)


def official_linear(model, image, side, stride, *, antialias=True):
    """Return DINOv3's and mmsegmentation's class scores (K, H, W) of an image (3, H, W), of a linear head.

    DINOv3 resizes by Pillow, with antialiasing, mmsegmentation by OpenCV, without.
    """
    height, width = image.shape[1:]
    low = min(height, width)
    high = max(height, width)
    size = [side if length == low else int(side * high / low + 0.5) for length in (height, width)]
    resized = F.interpolate(image[None], size, mode="bilinear", antialias=antialias)[0]
    mean_logits = slid(model, resized, (side, side), (stride, stride))
    return F.interpolate(torch.from_numpy(mean_logits)[None], (height, width), mode="bilinear")[0]


def official_eomt(model, image, side):
    """Return EoMT's class scores (K, H, W) of an image (3, H, W): windows along the longer side."""
    height, width = image.shape[1:]
    factor = max(side / height, side / width)
    size = [round(length * factor) for length in (height, width)]
    resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    count = math.ceil(max(size) / side)
    overlap = count * side - max(size)
    overlap = overlap / (count - 1) if overlap > 0 else 0
    sums = torch.zeros(4, *size, dtype=torch.float64)
    counts = torch.zeros(4, *size)
    for number in range(count):
        start = int(number * (side - overlap))
        part = (slice(None), slice(start, start + side)) if size[0] > size[1] else (..., slice(start, start + side))
        with torch.no_grad():
            sums[part] += model(resized[part][None]).scores()[0]
        counts[part] += 1
    return F.interpolate((sums / counts)[None], (height, width), mode="bilinear")[0]


ODD = [(37, 61), (61, 37), (33, 33), (17, 90), (31, 24)]


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize(("resample", "antialias"), [({}, True), ({"resample": "bilinear"}, False)])
def test_a_linear_head_is_evaluated_as_by_dinov3_or_dinov2(size, resample, antialias):
    model = make_model(kernel=3)
    images = pictures(*size, count=1)
    strategy = Windows(24, shortest=24, stride=16, weights="uniform", average="scores", batch_size=3, **resample)
    expected = official_linear(model, images[0], 24, 16, antialias=antialias)
    torch.testing.assert_close(run_bands(model, images, strategy)[0], expected, rtol=0, atol=1e-6)
    other = official_linear(model, images[0], 24, 16, antialias=not antialias)
    assert ((expected - other).abs().max() > 1e-3) == (min(size) > 24)


@pytest.mark.parametrize("size", ODD)
def test_eomt_is_evaluated_as_in_its_code(size):
    model = make_model(kernel=3, mixture=True)
    images = pictures(*size, count=1)
    strategy = Windows(24, shortest=24, placement="even", weights="uniform", average="scores", batch_size=3)
    expected = official_eomt(model, images[0], 24)
    torch.testing.assert_close(run_bands(model, images, strategy)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [1, 7, 24, 1024])
def test_even_windows_start_where_those_of_eomt_do(window):
    for length in itertools.chain(range(1, 5 * window + 2, max(1, window // 40)), (window, 2 * window)):
        found = Windows(window, placement="even").starts(0, length)
        count = max(1, math.ceil(length / window))
        overlap = Fraction(count * window - length, max(1, count - 1))
        expected = [int(number * (window - overlap)) for number in range(count)]
        assert found == expected and found[-1] == max(0, length - window)
    assert Windows((7, 1024), placement="even").starts(1, 2048) == [0, 1024]


def test_the_shorter_side_is_reduced_and_rounded_as_published():
    draw = np.random.default_rng(0)
    for height, width, side in draw.integers(1, 3000, (300, 3)).tolist():
        found = with_shorter_side((height, width), side)
        low = min(height, width)
        high = max(height, width)
        assert (min(found), max(found)) == (side, max(1, int(side * high / low + 0.5)))
        assert (found[0] <= found[1]) == (height <= width)
        factor = side / low  # EoMT rounds halves to even
        assert max(abs(own - round(length * factor)) for own, length in zip(found, (height, width), strict=True)) <= 1


def test_sides_of_scales_are_those_of_the_released_segmentor():
    strategy = Windows(896, shortest=896, scales=[0.9, 0.95, 1.0, 1.05, 1.1], multiple=32)
    sizes = [strategy._size_at_scale((480, 640), scale) for scale in strategy.scales]
    assert [size[0] for size in sizes] == [832, 864, 896, 940, 985]
    assert sizes[0] == (832, int(832 * 640 / 480 + 0.5))
    assert Windows(896, shortest=896)._size_at_scale((480, 640), 0.9)[0] == 806


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize(("flips", "scales"), [("horizontal", (1.0, 0.7)), ("all", (1.0,))])
def test_views_are_averaged_as_mmsegmentation_and_meta_do(flips, scales, mixture):
    model = make_model(kernel=3, mixture=mixture)
    images = pictures(37, 29, count=1)
    strategy = Windows((13, 10), stride=(9, 7), weights="uniform", average="scores", flips=flips, scales=scales)
    views = []
    for scale, turn in itertools.product(scales, TURNS[flips]):
        size = [max(1, round(side * scale)) for side in (37, 29)]
        scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear", antialias=True)
        scores = torch.from_numpy(slid(model, apply_turn(scaled, turn)[0], (13, 10), (9, 7)))[None]
        views.append(F.interpolate(undo_turn(scores, turn), (37, 29), mode="bilinear").softmax(dim=1))
    averaged = run_bands(model, images, strategy)
    torch.testing.assert_close(averaged, torch.stack(views).mean(dim=0), rtol=0, atol=1e-12)
    (band,) = islice(strategy.bands(model, MemoryRows(images), nullcontext), 1)
    assert band.mixture  # sums of probabilities, which is what a softmax of logits is of


def test_shortest_enlarges_an_image_to_at_most_64_megapixels():
    strategy = Windows(8, shortest=16384)
    model = make_model()
    sizes = []
    for size, scaled in (((1, 2), (5793, 11585)), ((8192, 3 * 8192), (8192, 3 * 8192)), ((2048, 1024), (11585, 5793))):
        assert strategy._size_at_scale(size, 1.0) == scaled

    def stop(module, inputs):
        sizes.append(inputs[0].shape)
        raise InterruptedError

    model.backbone.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        run_bands(model, pictures(1, 2, count=1), strategy)
    assert len(sizes) == 1


@pytest.mark.parametrize(("size", "options"), in_turn((0.0, "cosine"), (0.3, "uniform"), (0.9, "cosine")))
def test_windows_cover_all_pixels_and_weights_add_up(size, options):
    overlap, weights = options
    for length, window in itertools.product(size, (1, 7, 24)):
        begins = Windows(window, overlap=overlap).starts(0, length)
        weight = profile(min(window, length), weights)
        assert (weight > 0).all() and begins == sorted(set(begins)) and begins[0] == 0
        seen = np.zeros(length)
        for begin in begins:
            assert begin + min(window, length) <= length
            seen[begin : begin + window] += weight.numpy()
        assert (seen > 0).all()
        np.testing.assert_allclose(sum_weights(length, begins, weight).numpy(), seen)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize(
    ("size", "options"), in_turn({}, {"overlap": 0.0}, {"weights": "uniform"}, {"flips": "all"}, {"batch_size": 1})
)
def test_tiled_and_whole_mask_agree_without_context(size, options, mixture):
    model = make_model(mixture=mixture)
    images = pictures(*size)
    tiled = run_bands(model, images, Windows((9, 12), **options))
    with torch.no_grad():
        prediction = model(images)
    # logarithms of a mixture are of float32
    torch.testing.assert_close(
        tiled.double(), prediction.logits().softmax(dim=1).double(), rtol=0, atol=1e-6 if mixture else 1e-12
    )
    assert torch.equal(tiled.argmax(dim=1), prediction.scores().argmax(dim=1))


@pytest.mark.parametrize("average", ["probabilities", "scores"])
def test_freeing_rows_equals_keeping_all_rows(average):
    model = make_model(kernel=5)
    images = pictures(61, 40)
    freed = run_bands(model, images, Windows((16, 11), overlap=0.4, average=average))
    rows, columns = starts(61, 16, 10), starts(40, 11, 7)
    down, across = profile(16, "cosine"), profile(11, "cosine")
    kept = torch.zeros(2, 4, 61, 40, dtype=torch.float64)
    for top, image, left in itertools.product(rows, range(2), columns):
        with torch.no_grad():
            logits = model(images[image : image + 1, :, top : top + 16, left : left + 11]).logits()[0]
        part = logits.softmax(dim=0) if average == "probabilities" else logits
        kept[image, :, top : top + 16, left : left + 11] += part * (down[:, None] * across)
    kept /= sum_weights(61, rows, down)[:, None]
    kept /= sum_weights(40, columns, across)
    assert torch.equal(freed, kept)


def test_bands_are_at_most_a_stride_and_the_last_a_window():
    model = make_model()
    images = pictures(61, 40)
    bands = Windows((16, 16), overlap=0.5).bands(model, MemoryRows(images), nullcontext)
    with torch.no_grad():
        assert [band.scores().shape[2] for band in bands] == [8] * 5 + [5, 16]


@pytest.mark.parametrize("flips", ["horizontal", "all"])
def test_flips_average_probabilities_of_the_turned_images(flips):
    model = make_model(kernel=3)
    images = pictures(17, 23)
    parts, turned = [], []
    for turn in TURNS[flips]:
        turned.append(apply_turn(images, turn))
        assert torch.equal(undo_turn(turned[-1], turn), images)
        with torch.no_grad():
            parts.append(undo_turn(model(turned[-1]).logits().softmax(dim=1), turn))
    assert torch.equal(turned[1], images.flip(-1)) and len({str(part.tolist()) for part in turned}) == len(turned)
    averaged = run_bands(model, images, Whole(flips=flips))
    torch.testing.assert_close(averaged, torch.stack(parts).mean(dim=0))


@pytest.mark.parametrize(
    ("size", "to", "antialias"),
    [((17, 23), (9, 30), True), ((5, 1), (40, 3), False), ((30, 8), (30, 16), True), ((64, 3), (1, 1), False)],
)
def test_rows_are_resized_as_whole_images_are(size, to, antialias):
    images = pictures(*size)
    whole = F.interpolate(images, to, mode="bilinear", antialias=antialias)
    rows = ResizedRows(MemoryRows(images), to, antialias=antialias)
    parts = [rows.read(top, min(top + 4, to[0])) for top in range(0, to[0], 4)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
    for step in (1, 3, 100):
        bands = (images[:, :, top : top + step] for top in range(0, size[0], step))
        plain = F.interpolate(images, to, mode="bilinear", align_corners=False)
        torch.testing.assert_close(torch.cat(list(at_size(bands, size, to)), dim=2), plain, rtol=0, atol=1e-12)


def test_streams_of_other_bands_are_averaged_row_by_row():
    first, second = pictures(10, 4, seed=1), pictures(10, 4, seed=2)
    streams = [iter(first.split([3, 3, 4], dim=2)), iter(second.split([1, 8, 1], dim=2))]
    torch.testing.assert_close(torch.cat(list(mean(streams)), dim=2), (first + second) / 2)


@pytest.mark.parametrize("strategy", [Whole, partial(Windows, 500)])
def test_scales_average_probabilities_brought_to_the_same_size(strategy):
    model = make_model(kernel=3, longest=30)
    images = pictures(17, 40)
    sizes = {1.0: (13, 30), 0.5: (6, 15), 1.7: (22, 51)}
    parts = []
    for target in sizes.values():
        seen = F.interpolate(images, target, mode="bilinear", antialias=True)
        with torch.no_grad():
            probabilities = model(seen, reduce=False).logits().softmax(dim=1)
        parts.append(F.interpolate(probabilities, (17, 40), mode="bilinear"))
    averaged = run_bands(model, images, strategy(scales=tuple(sizes)))
    torch.testing.assert_close(averaged, torch.stack(parts).mean(dim=0), rtol=0, atol=1e-12)


def test_shorter_side_is_resized_and_windows_stay_inside():
    seen = []
    model = make_model()
    model.backbone.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    assert run_bands(model, pictures(20, 35), Windows(40, shortest=30)).shape == (2, 4, 20, 35)
    assert set(seen) == {(30, 40)}
    seen.clear()
    run_bands(model, pictures(1, 1, count=1), Windows((8, 8), shortest=16))
    assert set(seen) == {(8, 8)} and len(seen) == 3  # 9 windows, 4 at a time


def test_windows_predict_at_a_requested_size():
    model = make_model(kernel=3)
    images = pictures(17, 23)
    own = run_bands(model, images, Windows((9, 9)))
    other = run_bands(model, images, Windows((9, 9)), size=(34, 40))
    torch.testing.assert_close(other, F.interpolate(own, (34, 40), mode="bilinear"))


@pytest.mark.parametrize("average", ["probabilities", "scores"])
@pytest.mark.parametrize("mixture", [False, True])
def test_probabilities_of_windows_are_those_of_the_whole_image(mixture, average):
    model = make_model(mixture=mixture).float()
    images = list(np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8))
    whole, tiled = (
        Predictor(model, torch.device("cpu"), nullcontext, strategy)
        for strategy in (Whole(), Windows(16, average=average, batch_size=5))
    )
    probabilities = tiled.probabilities(images)
    ids = tiled.ids(images)
    torch.testing.assert_close(probabilities, whole.probabilities(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3, 40, 30))
    assert (probabilities.argmax(dim=1).numpy() == ids).all() and ids.dtype == np.uint8
    assert all((tiled.ids([image]) == own).all() for image, own in zip(images, ids, strict=True))


def test_memory_of_windows_is_independent_of_image_height():
    def peak(height):
        model = make_model(classes=30).float()
        rows = Rolling((height, 64))
        held = []
        with torch.no_grad():
            for band in Windows((32, 32)).bands(model, rows, nullcontext):
                held.append(band.outputs.untyped_storage().nbytes())
        return max(held), rows.most

    assert peak(64) == peak(1024)


class Rolling:
    """Rows made as they are read, and how many at a time."""

    count = 1

    def __init__(self, size):
        self.size, self.most = size, 0

    def read(self, top, bottom):
        self.most = max(self.most, bottom - top)
        return torch.zeros(1, 3, bottom - top, self.size[1], dtype=torch.uint8)


def test_windows_reproduce_published_strides():
    for side, overlap, stride in ((896, 0.3348, 596), (512, 0.334, 341), (512, 0.0, 512)):
        assert Windows(side, overlap=overlap).starts(0, 10 * side)[1] == stride
        assert Windows(np.int64(side), stride=np.int64(stride)).starts(0, 10 * side)[1] == stride


test_message_names_value_and_remedy = refusals(
    {
        str(options): (partial(Windows, **{"size": 8, **options}), *words)
        for options, *words in (
            ({"scales": []}, "inference.scales=[] has no scale"),
            ({"placement": "even", "stride": 4}, "inference.stride has no effect with inference.placement=even"),
            ({"stride": [4, 9]}, "inference.stride=[4, 9] leaves pixels between windows of 8"),
            ({"size": [8, 8, 3]}, "size=[8, 8, 3]"),
            ({"stride": [4]}, "stride=[4]"),
            ({"multiple": 32}, "inference.multiple=32 rounds the sides that inference.shortest sets"),
        )
    }
)
