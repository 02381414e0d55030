import cv2
import numpy as np
import pytest
from mistakes import refusals

from dinoseg.data.transforms import Affine, Augment, ColorJitter


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(height, width, seed=0):
    image = rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng(seed + 1).integers(0, 5, (height, width), dtype=np.uint8)


def blobs(height, width, seed=0):
    """A smooth two-valued picture: the mask is where the image is bright."""
    field = cv2.GaussianBlur(rng(seed).standard_normal((height, width)), (0, 0), 8)
    mask = (field > 0).astype(np.uint8)
    return np.dstack([mask * 255] * 3), mask


@pytest.mark.parametrize(("flip", "step"), [(0.0, 1), (1.0, -1)])
@pytest.mark.parametrize("size", [(37, 53), (1, 1), (64, 64), (2, 300)])
def test_neutral_settings_and_a_flip_are_exact(size, flip, step):
    image, mask = noise(*size)
    seen, ids = Augment(size, flip=flip)(image, mask, rng())
    np.testing.assert_array_equal(seen, image[:, ::step])
    np.testing.assert_array_equal(ids, mask[:, ::step])


def test_crop_alone_cuts_and_pads_exactly():
    image, mask = noise(40, 10)
    places = set()
    for seed in range(20):
        seen, ids = Augment((16, 24))(image, mask, rng(seed))
        columns = np.flatnonzero((ids != 255).any(axis=0))
        left = columns[0]
        assert len(columns) == 10 and (ids[:, left : left + 10] != 255).all()
        assert (seen[:, :left] == 128).all()
        top = next(t for t in range(25) if np.array_equal(mask[t : t + 16], ids[:, left : left + 10]))
        np.testing.assert_array_equal(seen[:, left : left + 10], image[top : top + 16])
        places.add((top, left))
    assert len({t for t, _ in places}) > 5 and len({c for _, c in places}) > 5


@pytest.mark.parametrize(
    "settings",
    [
        {"affine": Affine(degrees=40)},
        {"affine": Affine(shear=20)},
        {"affine": Affine(translate=0.3)},
        {"scale": (2.7, 2.7)},
        {"scale": (0.6, 0.6)},
        {"scale": (0.3, 0.3)},
        {"longest": 130},
        {"scale": (0.4, 2.0), "affine": Affine(30, 0.2, 15), "flip": 0.5, "longest": 150},
    ],
)
def test_image_and_mask_move_together(settings):
    """Where the image is bright the mask says so; they differ only at edges, evenly to both sides."""
    differing, edge, balance = 0, 0, 0
    for seed in range(6):
        seen, ids = Augment((120, 120), **settings)(*blobs(200, 180, seed), rng(seed))
        inside = cv2.erode((ids != 255).astype(np.uint8), np.ones((5, 5))).astype(bool)
        bright = seen[..., 0] > 127
        wrong = (bright != (ids == 1)) & inside
        band = cv2.morphologyEx((ids == 1).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
        assert not (wrong & ~band).any()
        differing, edge = differing + wrong.sum(), edge + (band & inside).sum()
        balance += (wrong & bright).sum() - (wrong & ~bright).sum()
    assert differing <= 0.25 * edge
    assert abs(balance) <= 0.06 * edge


def test_pixels_outside_the_image_are_ignored():
    image = np.full((50, 50, 3), 200, np.uint8)
    mask = np.ones((50, 50), np.uint8)
    seen, ids = Augment((50, 50), affine=Affine(degrees=45), ignore_index=7)(image, mask, rng(5))
    assert set(np.unique(ids)) == {1, 7} and ids[25, 25] == 1 and ids[0, 0] == 7
    for value, level in ((7, 128), (1, 200)):
        deep = cv2.erode((ids == value).astype(np.uint8), np.ones((5, 5))).astype(bool)
        assert (seen[deep] == level).all()


@pytest.mark.parametrize("crop", [(30, 30), (90, 160), (300, 300)])
def test_part_of_the_image_always_stays_in_view(crop):
    augment = Augment(crop, scale=(0.5, 2), affine=Affine(15, 0.2, 10))
    for seed in range(60):
        assert (augment.mask(np.zeros((90, 160), np.uint8), rng(seed)) == 0).any()


def test_colour_leaves_the_mask_and_stays_near_its_range():
    image = np.full((20, 20, 3), (100, 120, 140), np.uint8)
    mask = noise(20, 20)[1]
    levels = []
    for seed in range(40):
        seen, ids = Augment((20, 20), color=ColorJitter(brightness=0.2))(image, mask, rng(seed))
        np.testing.assert_array_equal(ids, mask)
        levels.append(seen[0, 0, 0])
    assert 80 <= min(levels) < 88 and 112 < max(levels) <= 120


def test_hue_leaves_grey_alone_and_makes_red_cyan():
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    augment = Augment((1, 256), color=ColorJitter(saturation=0.9, hue=0.5))
    seen, _ = augment(grey, np.zeros((1, 256), np.uint8), rng(3))
    assert np.abs(seen.astype(int) - grey).max() <= 1
    image = np.full((2, 2, 3), (200, 40, 40), np.uint8)
    mask = np.zeros((2, 2), np.uint8)
    augment = Augment((2, 2), color=ColorJitter(hue=0.5))
    turned = np.array([augment(image, mask, rng(seed))[0][0, 0] for seed in range(40)]).astype(int)
    assert min(turned[:, 0] - turned[:, 1]) < -80 and max(turned[:, 2] - turned[:, 0]) > 80


test_message_names_value_and_remedy = refusals(
    {
        "falling scale": (lambda: Augment((5, 5), scale=(1.5, 0.5)), "scale=[1.5, 0.5]: give [least, largest]"),
        "a crop above longest": (lambda: Augment((50, 90), longest=80), "crop=[50, 90] is larger than longest=80"),
    }
)
