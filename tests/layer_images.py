"""Drawn images of layers: empty, full, of one pixel, ignored, random."""

import numpy as np
from scipy import ndimage
from score_making import mean, surface_dice

CLASSES = 4


def draw_images(seed):
    """Return the layers of 1 to 3 images of odd sizes: empty, full, of one pixel, ignored, or random ones."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(rng.integers(1, 4)):
        shape = (CLASSES, *rng.integers(1, 22, 2))
        smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, 0, 1.5, 1.5)) > 0.05
        mask, ids = smooth.astype(np.uint8)
        for layer, kind in enumerate(rng.integers(0, 6, CLASSES)):
            if kind < 2:
                mask[layer] = kind  # empty or full
            elif kind == 2:
                mask[layer] = 0
                mask[layer, rng.integers(shape[1]), rng.integers(shape[2])] = 1
            elif kind == 3:
                ids[layer] = mask[layer]
        mask[rng.random(shape) < rng.choice([0, 0.2])] = 255
        mask[rng.integers(CLASSES)] = rng.choice([0, 255])
        logits = rng.normal(scale=3, size=shape).astype(np.float32)
        images.append((ids, mask, logits))
    return images


def sides_of(images, layer):
    """Return reference and prediction of a layer in each image, without ignored pixels."""
    return [[(side[layer] == 1) & (mask[layer] != 255) for side in (mask, ids)] for ids, mask, _ in images]


def mean_surface_dice(pairs):
    return mean(surface_dice(*pair) for pair in pairs)
