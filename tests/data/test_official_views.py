"""Scale, crop and padding of views: equal to those of mmsegmentation, DINOv3 and EoMT, written here independently."""

import hashlib
import math
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinoseg.data.photometric import PhotometricDistortion
from dinoseg.data.transforms import Affine, Augment, ColorJitter

SIZES = [(60, 100), (101, 63), (20, 33), (480, 640), (50, 50), (37, 400)]
CROP = (48, 48)
SHORT = {"relative_to": "short", "scale": (0.5, 2.0), "distribution": "uniform", "padding": "end"}
FIT = {"relative_to": "fit", "scale": (0.5, 2.0), "distribution": "uniform", "padding": "end"}
FILL = (124, 116, 104)


class Numbers:
    """Random generator with given numbers."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self, count):
        taken, self.numbers = self.numbers[:count], self.numbers[count:]
        return np.array(taken)


def numbers(factor=0.5, left=0.5, top=0.5, flip=1.0, more=()):
    """Return the random numbers of a view without rotation, shear and shift."""
    return Numbers(factor, *[0.5] * 4, left, top, flip, *[0.5] * 4, *more)


def drawn_size(size, options, uniform):
    """Return (H, W) of an image that is scaled by a random factor."""
    least, largest = options["scale"]
    factor = least + (largest - least) * uniform
    if options["relative_to"] == "fit":  # as torchvision's ScaleJitter computes it
        ratio = min(CROP[0] / size[0], CROP[1] / size[1]) * factor
        return tuple(max(1, int(each * ratio)) for each in size)
    side = min(size) if options["relative_to"] == "short" else max(size)
    given = int(min(CROP) * factor)
    # the other side is int(given * other / side + 0.5), by exact fractions
    return tuple(math.floor(Fraction(given * each, side) + Fraction(1, 2)) for each in size)


def starts(size, left, top):
    """Return the start (top, left) of a crop of an image: whole pixels, uniform over all that are possible."""
    rooms = (max(0, side - crop) for side, crop in zip(size, CROP, strict=True))
    return tuple(int((room + 1) * uniform) for room, uniform in zip(rooms, (top, left), strict=True))


def view_of(matrix, size):
    """Return height, width, top, left and flip of a view, from its matrix and the image's (H, W)."""
    horizontal = abs(matrix[0, 0])
    vertical = matrix[1, 1]
    height, width = round(vertical * size[0]), round(horizontal * size[1])
    top = (vertical - 1) / 2 - matrix[1, 2]
    flipped = matrix[0, 0] < 0
    left = (width - 1 - (horizontal - 1) / 2 if flipped else (horizontal - 1) / 2) - matrix[0, 2]
    found = height, width, round(top), round(left), flipped
    assert np.allclose((vertical * size[0], horizontal * size[1], top, left), found[:4], atol=1e-6)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [SHORT, SHORT | {"relative_to": "long"}, FIT])
def test_sizes_and_boxes_equal_the_formulas(size, options):
    augment = Augment(CROP, **options, flip=0.5)
    rng = np.random.default_rng(size)
    mask = np.ones(size, np.uint8)
    for _ in range(40):
        factor, left, top, flip = rng.random(4)
        height, width = drawn_size(size, options, factor)
        matrix = augment.place(mask, numbers(factor, left, top, flip))
        assert view_of(matrix, size) == (height, width, *starts((height, width), left, top), flip < 0.5)
        seen = augment.mask(mask, numbers(factor, left, top, flip))
        assert (seen[:height, :width] == 1).all()  # top left, padded right and below, whether flipped or not
        assert (seen[height:] == 255).all() and (seen[:, width:] == 255).all()


@pytest.mark.parametrize("size", [(639, 427), (333, 1000), (7, 7), (1013, 61)])
def test_factor_1_is_the_crop_s_side_or_the_base(size):
    def scaled(crop, relative_to, **options):
        return Augment(crop, relative_to=relative_to, **options).scaled_size(size, 1.0)

    assert max(scaled((640, 640), "fit")) == 640
    assert min(Augment((640, 640), relative_to="fit").scaled_size((size[0], 9999), 1.0)) >= 1
    assert min(scaled((64, 96), "short")) == 64 and max(scaled((64, 96), "long")) == 96
    assert min(scaled((64, 96), "short", longest=50)) == 64  # a size that is given is not limited
    assert Augment((8, 8), longest=100).scaled_size((50, 200), 1.5) == (37.5, 150)
    assert Augment((8, 8), longest=200).scaled_size((50, 120), 1.0) == (50, 120)  # never enlarged


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (9, 12)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_pixels_equal_a_resized_padded_and_cropped_image(size, flip):
    """Enlarged without a blend with padding at the image's border; OpenCV's warp and resize differ by 1 level."""
    rng = np.random.default_rng(size)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    augment = Augment(CROP, **SHORT, flip=0.5, fill=FILL)
    for factor in (0.45, 0.5, 0.7, 1.0):
        height, width = drawn_size(size, SHORT, factor)
        if height < size[0] or width < size[1]:
            continue
        top, left = starts((height, width), left=0.9, top=0.3)
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        expected = np.full((*CROP, 3), FILL, np.uint8)
        part = (resized[:, ::-1] if flip < 0.5 else resized)[top : top + CROP[0], left : left + CROP[1]]
        expected[: part.shape[0], : part.shape[1]] = part
        seen, _ = augment(image, mask, numbers(factor, 0.9, 0.3, flip))
        assert np.abs(seen.astype(int) - expected).max() <= 1
        assert (seen[height:] == FILL).all() and (seen[:, width:] == FILL).all()


@pytest.mark.parametrize("size", [(101, 63), (200, 333), (57, 48)])
@pytest.mark.parametrize("resample", ["antialias", "bilinear"])
def test_reduced_images_equal_the_official_resizing_filter(size, resample):
    """antialias: Pillow and torchvision, rounded after each side; bilinear: OpenCV's weights in steps of 1 / 32."""
    rng = np.random.default_rng(size)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = rng.integers(0, 4, size, dtype=np.uint8)
    for factor, flip in ((0.0, 1.0), (0.1, 0.0), (0.2, 1.0), (0.3, 0.0)):
        height, width = drawn_size(size, SHORT, factor)
        options = {"mode": "bilinear", "antialias": resample == "antialias"}
        full = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].double(), (height, width), **options)
        full = full[0].permute(1, 2, 0).numpy()
        top, left = starts((height, width), left=0.9, top=0.3)
        part = (full[:, ::-1] if flip < 0.5 else full)[top : top + CROP[0], left : left + CROP[1]]
        seen, ids = Augment(CROP, **SHORT, flip=0.5, resample=resample)(image, mask, numbers(factor, 0.9, 0.3, flip))
        most = 1.01 if resample == "antialias" else 255 * 2 / 32
        assert np.abs(seen[: part.shape[0], : part.shape[1]] - part).max() <= most
        other = Augment(CROP, **SHORT, flip=0.5)(image, mask, numbers(factor, 0.9, 0.3, flip))
        assert np.array_equal(ids, other[1])
        assert factor or not np.array_equal(seen, other[0])


@pytest.mark.parametrize("affine", [Affine(), Affine(180, 0.9, 45)])
@pytest.mark.parametrize("size", [(101, 263), (200, 133), (64, 1)])
def test_only_the_visible_part_is_reduced_with_the_same_result(size, affine):
    """The reference reduces the whole image; views that rotation moves out of the image are only padding."""
    image = np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    compared = 0
    for seed in range(40):
        augment = Augment((40, 30), scale=(0.2, 1.2), affine=affine, flip=0.5, resample="antialias")
        matrix = augment.place(mask, np.random.default_rng(seed))
        zoom = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        if zoom >= 1:
            continue
        height, width = (max(1, round(side * zoom)) for side in size)
        whole = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        scale = np.diag([width / size[1], height / size[0], 1])
        scale[:2, 2] = (np.diag(scale)[:2] - 1) / 2  # between pixel centres
        options = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_CONSTANT, "borderValue": (128, 128, 128)}
        expected = cv2.warpAffine(whole, (matrix @ np.linalg.inv(scale))[:2], (30, 40), **options)
        seen, _ = augment(image, mask, np.random.default_rng(seed))
        assert np.abs(seen.astype(int) - expected).max() <= (1 if affine == Affine() else 255 / 16)
        compared += 1
    assert compared > 20


def test_enlarged_images_do_not_depend_on_the_filter():
    image = np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    mask = np.zeros((40, 30), np.uint8)
    options = SHORT | {"scale": (1.0, 2.0)}
    views = [Augment(CROP, **options, resample=each)(image, mask, numbers(0.4))[0] for each in ("area", "antialias")]
    assert np.array_equal(*views)


@pytest.mark.parametrize("color", [ColorJitter(brightness=1.0), PhotometricDistortion(0.5, 0.5, 0, 0, probability=1)])
def test_padding_keeps_its_colour_at_the_end_only(color):
    image = np.full((20, 20, 3), 90, np.uint8)
    mask = np.zeros((20, 20), np.uint8)
    changed = {"end": 0, "spread": 0}
    for padding, seed in [(each, seed) for each in changed for seed in range(8)]:
        augment = Augment((40, 30), padding=padding, fill=(10, 200, 30), color=color)
        seen, ids = augment(image, mask, np.random.default_rng(seed))
        assert (ids == 0).sum() == 400
        changed[padding] += (seen[ids == 255] != (10, 200, 30)).any()
    assert changed["end"] == 0 and changed["spread"] > 5
    turned = Augment((40, 30), padding="end", affine=Affine(degrees=40), fill=(0, 0, 0))
    seen, ids = turned(image, mask, np.random.default_rng(3))
    inside = cv2.erode((ids == 255).astype(np.uint8), np.ones((5, 5))) > 0
    assert seen.shape == (40, 30, 3) and (seen[inside] == 0).all()


def blobs(size, seed, classes=3):
    """Return a mask with smooth regions of some classes, one of them large, and ignored pixels."""
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.standard_normal(size), (0, 0), 9)
    mask = np.digitize(field, np.quantile(field, [0.7, 0.9][: classes - 1])).astype(np.uint8)
    mask[cv2.GaussianBlur(rng.standard_normal(size), (0, 0), 5) > 0.08] = 255
    return mask


def passes(part, ratio):
    """Return whether a crop of labels shows several classes, none with `ratio` or more of the labelled pixels."""
    ids, counts = np.unique(part[part != 255], return_counts=True)
    return len(ids) > 1 and counts.max() / counts.sum() < ratio


@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.4, 1.0])
def test_crops_are_checked_ten_times(ratio):
    """The 11th crop is taken unchecked, as in mmsegmentation's and DINOv3's loop."""
    augment, size = (
        Augment(
            CROP, relative_to="short", scale=(2.5, 2.5), distribution="uniform", padding="end", cat_max_ratio=ratio
        ),
        (120, 170),
    )
    used = set()
    for seed in range(60):
        mask = blobs(size, seed)
        rng = np.random.default_rng(seed)
        positions = rng.random((11, 2))
        given = (positions[0, 0], positions[0, 1])
        more = [*[0.5] * 5, *positions[1:].ravel()]
        boxes = [starts(size, *position) for position in positions]
        parts = [mask[top : top + CROP[0], left : left + CROP[1]] for top, left in boxes]
        taken = next((number for number in range(10) if passes(parts[number], ratio)), 10)
        used.add(taken)
        assert np.array_equal(augment.mask(mask, numbers(0.5, *given, more=more)), parts[taken])
        matrix = augment.place(mask, numbers(0.5, *given, more=more))
        assert view_of(matrix, size)[2:4] == boxes[taken]
        image = np.repeat(mask[..., None], 3, axis=2)
        seen = augment(image, mask, numbers(0.5, *given, more=more))
        assert np.array_equal(seen[1], parts[taken]) and np.array_equal(seen[0][..., 0], parts[taken])
    assert {0.75: {0, 1}, 0.6: {0, 10}, 0.4: {10}, 1.0: {0}}[ratio] <= used


@pytest.mark.parametrize("color", [ColorJitter(0.2), PhotometricDistortion(0.1, 0.1, 0.1, 0.1)])
@pytest.mark.parametrize("options", [{}, SHORT, FIT | {"affine": Affine(20, 0.1, 5)}])
def test_mask_and_place_agree_with_the_view(options, color):
    augment = Augment(CROP, **options, flip=0.5, color=color, cat_max_ratio=0.6)
    free = Augment(CROP, **options, flip=0.5, color=color)
    moved = 0
    for seed in range(12):
        mask = blobs((90, 130), seed)
        _, seen = augment(np.repeat(mask[..., None], 3, axis=2), mask, np.random.default_rng(seed))
        assert np.array_equal(augment.mask(mask, np.random.default_rng(seed)), seen)
        place = augment.place(mask, np.random.default_rng(seed))
        rows, columns = np.nonzero(seen != 255)
        x, y, _ = np.rint(np.linalg.inv(place) @ np.stack([columns, rows, np.ones(len(rows))])).astype(int)
        assert (mask[y.clip(0, 89), x.clip(0, 129)] == seen[rows, columns]).mean() > 0.97
        other = free.place(mask, np.random.default_rng(seed))
        assert np.allclose(place[:2, :2], other[:2, :2])  # only the position is drawn again
        moved += not np.allclose(place, other)
    assert moved


@pytest.mark.parametrize("value", [3, 255])
def test_a_mask_of_one_class_or_none_gives_a_crop(value):
    mask = np.full((60, 90), value, np.uint8)
    seen = Augment(CROP, **SHORT, cat_max_ratio=0.75).mask(mask, np.random.default_rng(1))
    assert seen.shape == CROP and set(np.unique(seen)) <= {value, 255}


@pytest.mark.parametrize(("distribution", "median"), [("uniform", 1.25), ("log_uniform", 1.0)])
def test_factors_are_uniform_or_log_uniform(distribution, median):
    augment = Augment((64, 64), scale=(0.5, 2.0), distribution=distribution)
    for uniform, factor in ((0.0, 0.5), (0.5, median)):
        assert augment.place(np.zeros((200, 200), np.uint8), numbers(uniform))[0, 0] == pytest.approx(factor)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "9a337410076127ce"), ({"longest": 96, "affine": Affine(20, 0.1, 5)}, "4b16952a8622148d")],
)
def test_default_views_equal_recorded_digests(options, expected):
    """Digests recorded before these keys existed."""
    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)
    mask = rng.integers(0, 5, (61, 83), dtype=np.uint8)
    augment = Augment((40, 96), scale=(0.75, 1.5), flip=0.5, color=ColorJitter(0.2, 0.2, 0.2, 0.05), **options)
    digest = hashlib.sha256()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        for part in (*augment(image, mask, rng), rng.random(3)):
            digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == expected
