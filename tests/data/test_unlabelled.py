"""Weak and strong views of images without masks."""

import cv2
import numpy as np
import pytest

from dinoseg.data.photometric import PhotometricDistortion
from dinoseg.data.transforms import Augment, ColorJitter
from dinoseg.data.unlabelled import StrongView, UnlabelledImages
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

PLAIN = {"jitter": 0.0, "grey": 0.0, "blur": 0.0, "cutmix": 0.0}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def test_each_change_is_its_own(image):
    rng = np.random.default_rng(1)
    assert (StrongView(**PLAIN)(image, rng)[0] == image).all()
    grey = StrongView(**PLAIN | {"grey": 1.0})(image, rng)[0].astype(int)
    assert np.ptp(grey, axis=2).max() <= 1
    assert np.abs(grey[..., 0] - image @ np.array([0.299, 0.587, 0.114])).max() <= 2
    blurred = StrongView(**PLAIN | {"blur": 1.0}, sigma=(1.5, 1.5))(image, rng)[0]
    assert (blurred == cv2.GaussianBlur(image, (0, 0), 1.5)).all()
    brighter = StrongView(ColorJitter(brightness=0.5), **PLAIN | {"jitter": 1.0})(image, rng)[0]
    factors = brighter[(image > 40) & (brighter < 255)] / image[(image > 40) & (brighter < 255)]
    assert factors.std() < 0.02 and abs(factors.mean() - 1) > 0.01


def test_a_change_draws_as_often_as_another(image):
    after = []
    for settings in (PLAIN, {}, {"jitter": 1.0, "cutmix": 1.0}):
        rng = np.random.default_rng(3)
        StrongView(**settings)(image, rng)
        after.append(rng.random())
    assert len(set(after)) == 1


@pytest.mark.parametrize("size", [(20, 30), (1, 1), (2, 200), (301, 7)])
def test_boxes_lie_within(size):
    view, rng = StrongView(**PLAIN | {"cutmix": 1.0}), np.random.default_rng(0)
    areas = []
    for _ in range(200):
        top, left, bottom, right = view(np.zeros((*size, 3), np.uint8), rng)[1]
        assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
        areas.append((bottom - top) * (right - left) / (size[0] * size[1]))
    assert max(areas) <= 0.5 or min(size) == 1
    boxes = [StrongView(**PLAIN | {"cutmix": 0.5})(np.zeros((9, 9, 3), np.uint8), rng)[1] for _ in range(400)]
    assert 140 < sum(box == (0, 0, 0, 0) for box in boxes) < 260


def test_views_are_those_of_the_weak_one_and_say_where_there_is_no_image(tmp_path, image):
    write_png(tmp_path / "a.png", image)
    augment = Augment((32, 32), flip=0.5, ignore_index=7)
    images = UnlabelledImages([tmp_path / "a.png"], augment, StrongView(**PLAIN), views=3)
    assert len(images) == 1
    weak, outside, strong, boxes = images.read(0, np.random.default_rng(5))
    own = augment(image, np.zeros((20, 30), np.uint8), np.random.default_rng(5))
    assert (weak.permute(1, 2, 0).numpy() == own[0]).all() and (outside.numpy() == own[1]).all()
    assert strong.shape == (3, 3, 32, 32) and (strong == weak).all() and boxes.tolist() == [[0, 0, 0, 0]] * 3
    assert (outside == 0).sum() == 20 * 30 and (outside == 7).sum() == 32 * 32 - 600


def test_a_blur_of_no_range_is_refused():
    with pytest.raises(UserError, match=r"sigma=\[2\.0, 1\.0\]: give \[least, largest\]"):
        StrongView(sigma=[2.0, 1.0])


def test_a_strong_view_takes_colour_jitter_only():
    with pytest.raises(UserError, match="takes ColorJitter only"):
        StrongView(color=PhotometricDistortion(0.1, 0.1, 0.1, 0.1))
