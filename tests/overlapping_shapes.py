"""Images of a disc and a square that overlap, and their masks: one PNG for each class, and COCO polygons."""

from itertools import groupby

import numpy as np
from making import save

from dinoseg.utils.atomic import write_json

CLASSES = ["disc", "square"]
SIZE = (32, 48)


def draw_pair(rng):
    """Return an image (H, W, 3), its masks (2, H, W) bool, and the corners (x, y) of the square."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    row, column, radius = rng.integers(10, 22), rng.integers(14, 34), rng.integers(7, 11)
    disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
    top = row - rng.integers(0, 6)
    left = column - rng.integers(0, 6)
    side = rng.integers(10, 14)
    square = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    image = rng.integers(0, 60, (*SIZE, 3), dtype=np.uint8)
    image[..., 0] += 180 * disc.astype(np.uint8)
    image[..., 1] += 180 * square.astype(np.uint8)
    bottom, right = min(top + side, SIZE[0]), min(left + side, SIZE[1])
    return image, np.stack([disc, square]), [left, top, right, top, right, bottom, left, bottom]


def write_overlaps(root, train=12, val=4):
    """Write both splits as ROOT/SPLIT/images and ROOT/SPLIT/masks/CLASS; return the masks of each image by name."""
    rng = np.random.default_rng(0)
    masks = {}
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            image, layers, _ = draw_pair(rng)
            name = f"{split}_{number}"
            masks[name] = layers
            save(root / split / "images" / f"{name}.png", image)
            for label, layer in zip(CLASSES, layers, strict=True):
                save(root / split / "masks" / label / f"{name}.png", layer)
    return masks


def write_coco(root):
    """Write train as run lengths of both classes, which overlap; return the masks of each image by name."""
    rng = np.random.default_rng(1)
    masks = {}
    images = []
    annotations = []
    for number in range(3):
        image, layers, _ = draw_pair(rng)
        name = f"train_{number}"
        masks[name] = layers
        save(root / "images" / f"{name}.png", image)
        images.append({"id": number, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]})
        for category, layer in enumerate(layers, start=1):
            drawn = {"size": list(SIZE), "counts": run_lengths(layer)}
            numbers = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append({**numbers, "segmentation": drawn, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / "instances_train.json", content)
    return masks


def run_lengths(layer):
    """Return COCO's uncompressed run lengths of a mask (H, W), by columns."""
    counts = [len([*run]) for _, run in groupby(layer.T.flat)]
    return [0, *counts] if layer[0, 0] else counts
