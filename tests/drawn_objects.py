"""Files of COCO's objects for tests: drawn rectangles with holes, which overlap, tie, lie in crowds or are empty."""

import json

import numpy as np

from dinoseg.core.objects import RunLengths
from dinoseg.extensions.annotations.rle import to_text
from dinoseg.utils.images import write_png


def encode(mask, as_text=True):
    """Return a mask (H, W) as COCO's run lengths, compressed or as a list."""
    counts = RunLengths.of_mask(np.asarray(mask, bool)).to_counts(mask.size)
    return {"size": list(mask.shape), "counts": to_text(counts) if as_text else counts.tolist()}


def draw_instances(seed):
    """Return references and results in COCO's form; each entry also has its mask (H, W) as `mask`."""
    rng = np.random.default_rng(seed)
    categories = [{"id": number, "name": f"class {number}"} for number in (3, 7, 20)[: rng.integers(1, 4)]]
    images, annotations, results = [], [], []
    for image in rng.permutation(8)[: rng.integers(1, 5)].tolist():
        images.append({"id": image, "height": 26, "width": 34, "file_name": f"{image}.jpg"})
        for _ in range(rng.integers(0, 6)):
            area = float(rng.choice([1, 1024, 1025, 9216, 9217]))
            annotation = {"id": len(annotations) + 1, "area": area, "iscrowd": int(rng.random() < 0.2)}
            annotations.append({**_draw_object(rng, image, categories), **annotation})
        held = [entry for entry in annotations if entry["image_id"] == image]
        for _ in range(rng.choice([0, 6, 130], p=[0.2, 0.7, 0.1])):
            result = _draw_object(rng, image, categories)
            if held and rng.random() < 0.7:
                near = held[rng.integers(len(held))]
                result["mask"] = near["mask"] & (rng.random(near["mask"].shape) < rng.choice([0.55, 0.8, 1]))
                result["category_id"] = near["category_id"]
            results.append({**result, "score": float(rng.choice([0.2, 0.5, rng.random()]))})
    for entry in (*annotations, *results):
        entry["segmentation"] = encode(entry["mask"], as_text=bool(rng.integers(2)))
    return {"images": images, "categories": categories, "annotations": annotations}, results


def _draw_object(rng, image, categories):
    mask = np.zeros((26, 34), bool)
    top, left = rng.integers(-5, 26), rng.integers(-5, 34)  # some lie outside the image, and are empty
    mask[max(top, 0) : max(top + rng.integers(1, 20), 0), max(left, 0) : max(left + rng.integers(1, 20), 0)] = True
    return {"image_id": image, "category_id": int(rng.choice([each["id"] for each in categories])), "mask": mask}


def place_instances():
    """Return the same references and results every time, without random numbers, whose official scores are known."""
    images = [{"id": number, "height": 150, "width": 200, "file_name": f"v{number}.jpg"} for number in range(1, 13)]
    annotations, results = [], []
    for number in range(60):
        mask = np.zeros((150, 200), bool)
        top = 37 * number % 110
        left = 53 * number % 160
        side = (20, 30, 32, 50, 96, 100)[number % 6]
        mask[top : top + side, left : left + side] = True
        entry = {"image_id": 1 + number % 12, "category_id": 2 + 3 * (number % 7 % 3)}
        crowd = {"area": float(mask.sum()), "iscrowd": int(number % 11 == 5)}
        annotations.append({**entry, **crowd, "id": number + 1, "segmentation": encode(mask)})
        for shift in range(number % 3):
            moved = np.roll(mask, (3 * shift + number % 5, number % 4), (0, 1))
            score = (17 * number + 5 * shift) % 20 / 20
            results.append({**entry, "score": score, "segmentation": encode(moved)})
    categories = [{"id": number, "name": f"class {number}"} for number in (2, 5, 8, 9)]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def write_instances(folder, reference, results):
    """Write both as gt.json and results.json."""
    for name, content in (("gt", reference), ("results", results)):
        (folder / f"{name}.json").write_text(json.dumps(content, default=lambda mask: None))


def draw_segments(seed):
    """Return categories, and for each image its number and both sides: ids (H, W) and the entries of segments."""
    rng = np.random.default_rng(seed)
    categories = [{"id": number, "name": f"class {number}", "isthing": int(number < 10)} for number in (1, 4, 12, 30)][
        : rng.integers(1, 5)
    ]
    images = []
    for image in rng.permutation(8)[: rng.integers(1, 5)].tolist():
        reference = _draw_ids(rng, np.zeros((18, 24), np.int64), rng.integers(0, 7))
        prediction = np.where(rng.random(reference.shape) < 0.1, 0, reference)
        prediction = _draw_ids(rng, np.roll(prediction, int(rng.integers(-2, 3)), 1), rng.integers(0, 3))
        labels = {number: int(rng.choice([each["id"] for each in categories])) for number in range(1, 20)}
        sides = []
        for ids in (reference, prediction):
            numbers = rng.permutation(np.unique(ids[ids > 0])).tolist()
            segments = [{"id": number, "category_id": labels[number % 256]} for number in numbers]
            sides.append((ids, [{**each, "iscrowd": int(rng.random() < 0.25)} for each in segments]))
        images.append((image, *sides))
    return categories, images


def _draw_ids(rng, ids, count):
    for number in rng.integers(1, 20, count):
        top, left = rng.integers(0, 16), rng.integers(0, 22)
        ids[top : top + rng.integers(2, 12), left : left + rng.integers(2, 14)] = number + 256 * 300
    return ids


def place_segments():
    """Return as `draw_segments` does, without random numbers, whose official scores are known."""
    categories = [{"id": number, "name": f"class {number}", "isthing": int(number < 10)} for number in (1, 4, 12, 30)]
    images = []
    for image in range(1, 11):
        sides = []
        for shift in (0, 2 * image % 9):
            ids = np.zeros((40, 60), np.int64)
            for number in range(1, 8):
                top, left = (7 * number * image) % 33, (11 * number + 5 * image) % 48 + shift
                ids[top : top + 6 + number, left : left + 12] = 70000 + number
            numbers = np.unique(ids[ids > 0]).tolist()
            segments = [{"id": each, "category_id": (1, 4, 12, 4, 12, 1, 1)[each % 7]} for each in numbers]
            sides.append((ids, [{**each, "iscrowd": int(each["id"] % 7 == image % 4)} for each in segments]))
        images.append((image, *sides))
    return categories, images


def write_segments(folder, categories, images):
    """Write both sides as gt.json and results.json, with their folders of PNGs."""
    for side, name in enumerate(("gt", "results"), 1):
        annotations = []
        for image in images:
            ids, segments = image[side]
            entries = [{**each, "area": int((ids == each["id"]).sum())} for each in segments]
            file = f"v{image[0]}.png"
            write_png(folder / name / file, np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))
            annotations.append({"image_id": image[0], "file_name": file, "segments_info": entries})
        content = {"categories": categories, "annotations": annotations}
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_object_data(root, *, train=6, val=2, size=(32, 48), empty=()):
    """Write images of bright rectangles on a dark ground, with masks of their ids, for data=folder_instances.

    The training images numbered in `empty` show none. Return the words of a command line.
    """
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            rng = np.random.default_rng([number, len(split)])
            ids = np.zeros(size, np.uint8)
            for value in range(1, 1 if split == "train" and number in empty else 4):
                top, left = rng.integers(0, np.subtract(size, 10))
                ids[top : top + rng.integers(6, 12), left : left + rng.integers(6, 12)] = value
            image = np.where(ids[..., None] > 0, 120 + 40 * ids[..., None], 20) + rng.integers(0, 12, (*size, 3))
            write_png(root / split / "images" / f"{number}.png", image.astype(np.uint8))
            write_png(root / split / "masks" / f"{number}.png", ids)
    (root / "classes.yaml").write_text(
        "classes: {ground: {ids: [0]}, thing: {ids: []}}\nbackground: ground\nothers: thing\n"
    )
    return ("data=folder_instances", f"data.root={root}")
