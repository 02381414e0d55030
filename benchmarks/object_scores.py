"""Print the processor time of COCO's average precision and that of pycocotools, for synthetic files of two sizes.

`OMP_NUM_THREADS=1 python benchmarks/object_scores.py [--images 300 1500]`: processor seconds of one process, reading
included; exits with 1 where a score differs. Each image has 7 objects of 5 classes and 20 results.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rows import machine
from tabulate import tabulate

from dinoseg.evaluation.unit_scores import leave_units_out, metric_intervals
from dinoseg.extensions.objects.scoring.coco_instances import CocoInstances

SIZE = (240, 320)
CLASSES, OBJECTS, RESULTS = 5, 7, 20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs=2, default=(300, 1500))
    few, many = parser.parse_args().images
    print(machine())
    seconds: dict[str, list[float]] = {}
    for count in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            paths = draw_files(Path(folder), count)
            expected = measure(seconds, "pycocotools", score_with_pycocotools, *paths)
            for name, score in (("scores", score_alone), ("scores with intervals", score_with_intervals)):
                found = measure(seconds, name, score, *paths)
                if not np.allclose(found, expected, rtol=0, atol=1e-12):
                    sys.exit(f"{name}: {found} instead of {expected}")
    base = seconds["pycocotools"]
    rows = [
        (name, *(f"{each:.2f}" for each in values), *(f"{a / b:.2f}" for a, b in zip(values, base, strict=True)))
        + (f"{values[1] / values[0]:.1f}",)
        for name, values in seconds.items()
    ]
    heads = ["", f"{few} images, s", f"{many} images, s", f"ratio at {few}", f"ratio at {many}", "growth"]
    print(tabulate(rows, headers=heads, disable_numparse=True, colalign=["left", *["right"] * 5]))


def measure(
    seconds: dict[str, list[float]], name: str, score: Callable[[Path, Path], list[float]], *paths: Path
) -> list[float]:
    began = time.process_time()
    found = score(*paths)
    seconds.setdefault(name, []).append(time.process_time() - began)
    return found


def draw_files(folder: Path, count: int) -> tuple[Path, Path]:
    """Write ellipses as annotations, and moved copies of them and further ellipses as results."""
    rng = np.random.default_rng(0)
    images, annotations, results = [], [], []
    for image in range(1, count + 1):
        images.append({"id": image, "file_name": f"{image}.jpg", "height": SIZE[0], "width": SIZE[1]})
        held = [(draw_ellipse(rng), int(rng.integers(1, CLASSES + 1))) for _ in range(OBJECTS)]
        for ellipse, label in held:
            entry = describe(ellipse, image, label)
            area = float(coco_mask.area(entry["segmentation"]))
            annotations.append({**entry, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
        for _ in range(RESULTS):
            ellipse, label = held[rng.integers(OBJECTS)] if rng.random() < 0.6 else (draw_ellipse(rng), 1)
            moved = ellipse + rng.normal(0, 2, 5) * (1, 1, 1, 1, 0.02)
            results.append({**describe(moved, image, label), "score": float(rng.random())})
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    reference, prediction = folder / "reference.json", folder / "results.json"
    reference.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    prediction.write_text(json.dumps(results))
    return reference, prediction


def draw_ellipse(rng: np.random.Generator) -> np.ndarray:
    """Return the centre (x, y), two radii in pixels and the angle of an ellipse."""
    return np.array([rng.uniform(0, SIZE[1]), rng.uniform(0, SIZE[0]), *rng.uniform(8, 70, 2), rng.uniform(0, np.pi)])


def describe(ellipse: np.ndarray, image: int, label: int) -> dict:
    x, y, *radii, angle = ellipse
    across, along = np.meshgrid(np.arange(SIZE[1]) - x, np.arange(SIZE[0]) - y)
    first = across * np.cos(angle) + along * np.sin(angle)
    second = along * np.cos(angle) - across * np.sin(angle)
    mask = (first / max(radii[0], 3)) ** 2 + (second / max(radii[1], 3)) ** 2 < 1
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "image_id": image,
        "category_id": label,
        "segmentation": {"size": list(SIZE), "counts": runs["counts"].decode()},
    }


def score_with_pycocotools(reference: Path, prediction: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        held = COCO(str(reference))
        evaluation = COCOeval(held, held.loadRes(str(prediction)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


def score_alone(reference: Path, prediction: Path) -> list[float]:
    protocol = CocoInstances()
    rows = [protocol.measure(case).rows for case in protocol.find(reference, prediction).cases]
    return [*protocol.metric.score(rows).values()]


def score_with_intervals(reference: Path, prediction: Path) -> list[float]:
    protocol = CocoInstances()
    cases = protocol.find(reference, prediction).cases
    rows = [protocol.measure(case).rows for case in cases]
    scores = leave_units_out(protocol.metric, rows, [case.name for case in cases])
    metric_intervals(protocol.metric, scores)
    return [score.value for score in scores.values()]


if __name__ == "__main__":
    main()
