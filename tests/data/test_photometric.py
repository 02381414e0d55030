"""Photometric distortion: equal to the formulas of mmsegmentation, DINOv3 and EoMT, written here in float64."""

import colorsys

import cv2
import numpy as np
import pytest
from mistakes import assert_refused

from dinoseg.data.photometric import PhotometricDistortion
from dinoseg.data.transforms import Augment

AMOUNTS = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5}
MMSEG = PhotometricDistortion(**AMOUNTS, hue=0.1, additive=True, space="hsv")
DINOV3 = PhotometricDistortion(**AMOUNTS, hue=0.5, additive=True)
EOMT = PhotometricDistortion(**AMOUNTS, hue=0.05)
SIZES = [(31, 45), (1, 1), (64, 7), (50, 50)]
OFF, HALF = 1.0, 0.5  # a switch that leaves a change out; an amount of no change


def noise(size, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    image[: size[0] // 3] //= 30  # dark
    image[size[0] // 2] = image[size[0] // 2, :, :1]  # grey
    return image


def clip_to_uint8(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def grey(image):
    return np.floor(image.astype(np.float64) @ [0.2989, 0.587, 0.114] + 1e-9)


def rotate_hue(image, share):
    """Rotate the hue of each pixel by the standard library."""
    turns = []
    for pixel in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        turns.append(colorsys.hsv_to_rgb((hue + share) % 1, saturation, value))
    return np.array(turns).reshape(image.shape) * 255.999


def hsv_changed(image, saturation=1.0, hue=0):
    """Multiply S and add to H in OpenCV's 8-bit HSV."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = clip_to_uint8(hsv[..., 1] * np.float64(saturation))
    hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def one(distortion, step, uniform, image):
    """Apply one of the four changes."""
    uniforms = np.array([HALF] * 4 + [OFF] * 4 + [0.0])
    uniforms[step], uniforms[4 + step] = uniform, 0.0
    return distortion(image, uniforms)


def assert_truncated(ours, exact):
    """Assert that bytes are truncated float64 values; next to a whole number, float32 may lie on its other side."""
    near = np.abs(exact - np.round(exact)) < 1e-3
    assert np.array_equal(ours[~near], clip_to_uint8(exact)[~near])
    assert np.abs(ours.astype(int) - clip_to_uint8(exact)).max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_changes_equal_the_formulas(size):
    for seed in range(6):
        image = noise(size, seed)
        uniform = np.random.default_rng(100 + seed).random()
        around = 0.5 + uniform  # the factor of contrast and saturation
        for distortion in (MMSEG, DINOV3):
            assert_truncated(one(distortion, 0, uniform, image), image + np.float64(64 * uniform - 32))
            assert_truncated(one(distortion, 1, uniform, image), image * np.float64(around))
        assert_truncated(one(EOMT, 0, uniform, image), image * np.float64(1 + 32 / 255 * (2 * uniform - 1)))
        assert_truncated(one(EOMT, 1, uniform, image), image * around + (1 - around) * grey(image).mean())
        for distortion in (DINOV3, EOMT):
            assert_truncated(one(distortion, 2, uniform, image), image * around + (1 - around) * grey(image)[..., None])
            hue = distortion.hue * (2 * uniform - 1)
            assert_truncated(one(distortion, 3, uniform, image), rotate_hue(image, hue))
        assert np.array_equal(one(MMSEG, 2, uniform, image), hsv_changed(image, saturation=around))
        assert np.array_equal(one(MMSEG, 3, uniform, image), hsv_changed(image, hue=int(36 * uniform) - 18))


@pytest.mark.parametrize(("uniform", "steps"), [(0.0, -18), (0.5, 0), (1 - 1e-9, 17), (0.49, -1)])
def test_hues_of_mmsegmentation_are_minus_18_to_17_steps(uniform, steps):
    image = np.array([[[200, 40, 90]]], np.uint8)
    assert np.array_equal(one(MMSEG, 3, uniform, image), hsv_changed(image, hue=steps))


def test_random_numbers_decide_order_and_choice_of_distortions():
    image = noise((20, 30), 3)
    rng = np.random.default_rng(5)
    for _ in range(20):
        uniforms = rng.random(9)
        expected = image
        for step in (0, 1, 2, 3) if uniforms[8] < 0.5 else (0, 2, 3, 1):
            if uniforms[4 + step] < 0.5:
                expected = one(DINOV3, step, uniforms[step], expected)
        assert np.array_equal(DINOV3(image, uniforms), expected)
    never = PhotometricDistortion(**AMOUNTS, hue=0.1, probability=0, space="hsv")
    still = PhotometricDistortion(0, 0, 0, 0, probability=1, space="hsv")
    assert np.array_equal(never(image, np.zeros(9)), image) and np.array_equal(still(image, np.zeros(9)), image)


def test_the_whole_image_is_changed_before_it_is_scaled():
    image = noise((40, 60), 1)
    image[:, :30] //= 4  # contrast depends on the mean grey
    mask = np.zeros((40, 60), np.uint8)
    options = {**AMOUNTS, "hue": 0.05, "probability": 1.0}
    crop = {"crop": (20, 20), "scale": (0.4, 0.9)}
    different = 0
    for seed in range(12):
        colors = [PhotometricDistortion(**options, before_scaling=each) for each in (True, False)]
        whole, part = (Augment(**crop, color=color)(image, mask, np.random.default_rng(seed)) for color in colors)
        rng = np.random.default_rng(seed)
        uniforms = np.concatenate([rng.random(12)[8:], rng.random(25)[:5]])
        changed = PhotometricDistortion(**options)(image, uniforms)
        plain = Augment(**crop)(changed, mask, np.random.default_rng(seed))
        assert np.array_equal(whole[0], plain[0]) and np.array_equal(whole[1], part[1])
        different += not np.array_equal(whole[0], part[0])
    assert different > 6


def test_images_of_16_bits_are_refused():
    change = PhotometricDistortion(0.1, 0.1, 0.1, 0.1)
    assert_refused(
        lambda: change(np.zeros((2, 2, 3), np.uint16), np.zeros(9)), "and these have 16. Choose color=jitter"
    )
