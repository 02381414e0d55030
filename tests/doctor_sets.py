"""Small data sets in which the tests of the doctor plant their faults."""

import cv2
import numpy as np
from making import save

from dinoseg.data.checks.errors import describe_split
from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.scan.scan import scan
from dinoseg.extensions.doctor.details import DETAILS
from dinoseg.extensions.doctor.examine import examine

CLASSES = ("ground", "left", "right")
PALETTE = ((0, 0, 0), (255, 0, 0), (0, 0, 255))


def scene(seed, size=(96, 128)):
    """Return an image of patches in noise, and the mask of the patches."""
    draw = np.random.default_rng(seed)
    light = cv2.resize(draw.integers(40, 200, (5, 6, 3)).astype(np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    image = light.astype(np.int64)
    mask = np.zeros(size, np.uint8)
    for index in range(4):
        top, left = draw.integers(0, size[0] - 30), draw.integers(0, size[1] - 40)
        here = slice(top, top + draw.integers(12, 30)), slice(left, left + draw.integers(12, 40))
        image[here] += draw.choice([-70, 70], 3)
        mask[here] = 1 + index % 2
    return np.clip(image + draw.integers(-6, 7, image.shape), 0, 255).astype(np.uint8), mask


def write(root, split, names, first=0):
    for number, name in enumerate(names):
        image, mask = scene(first + number)
        save(root / split / "images" / f"{name}.png", image)
        save(root / split / "masks" / f"{name}.png", mask)


def write_clean(root):
    """Write two drives and a half for training, and one for validation."""
    write(root, "train", [f"d{number // 4}/f{number}" for number in range(12)])
    write(root, "val", [f"v/f{number}" for number in range(4)], first=100)
    return root


def open_split(root, split, **options):
    return folder_dataset(root, split, **{"classes": CLASSES, "palette": PALETTE, **options})


def splits_of(root, images=True, splits=("train", "val"), **options):
    sets = {split: open_split(root, split, **options) for split in splits}
    details = DETAILS if images else None
    return [
        describe_split(split, data, scan(data.pairs, data.reader, images=images, details=details))
        for split, data in sets.items()
    ]


def findings_by_code(root, *, options=None, **rules):
    """Return code to finding, of all but notes on what to expect."""
    expected = {"constant_class_baseline", "class_imbalance"}
    findings = examine(splits_of(root, **(options or {})), **rules)
    return {finding.code: finding for finding in findings if finding.code not in expected}


def only_finding(root, code, severity, *, options=None, **rules):
    """Return the finding of a data set that has no other, and check its code and severity."""
    (finding,) = findings_by_code(root, options=options, **rules).values()
    assert (finding.code, finding.severity) == (code, severity)
    return finding


def rewrite(path, change):
    save(path, change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


def rewrite_all(root, change, pattern="*/masks/*/*.png"):
    for path in root.glob(pattern):
        rewrite(path, change)
