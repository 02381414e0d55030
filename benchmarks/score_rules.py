"""One small set of predictions under every protocol: prints the table of docs/log/scores_and_exports.md."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate

from dinoseg.extensions.protocols.ade20k import Ade20k
from dinoseg.extensions.protocols.cityscapes import Cityscapes
from dinoseg.extensions.protocols.davis import Davis2016, Davis2017, Davis2017Unsupervised
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.extensions.protocols.idd import Idd
from dinoseg.extensions.protocols.idd_lite import IddLite
from dinoseg.extensions.protocols.sar_rarp50 import SarRarp50
from dinoseg.extensions.protocols.sar_rarp50_seed import SarRarp50Seed
from dinoseg.extensions.protocols.semantic import Semantic
from dinoseg.extensions.protocols.summary import summary
from dinoseg.extensions.protocols.video_clustering import VideoClustering

WIDTH, HEIGHT, FRAMES = 256, 128, 5
OBJECTS = {"a": (1, 2, 3), "b": (1, 2, 3, 4), "c": (1, 2)}  # classes of each video; 0 is background, 6 is nowhere
CITYSCAPES = np.array([7, 24, 25, 32, 26, 28, 31])  # road, person, rider, motorcycle, car, bus, train
LEVEL3 = np.array([0, 4, 5, 6, 9, 11, 12])  # the same for IDD, with vehicle fallback for the train


def frames():
    """Return (video, frame, reference, prediction): moved outlines, a lost object, void, and what is no class."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    found = []
    for place, (video, labels) in enumerate(OBJECTS.items()):
        for frame in range(FRAMES):
            sides = np.zeros((2, HEIGHT, WIDTH), int)
            for side, (dx, dy, scale) in enumerate(((0, 0, 1.0), (3 + 2 * place, 2, 0.9))):
                for label in labels:
                    cx, cy = 30 + 50 * label + 4 * frame + dx, 30 + 17 * label + 5 * place + dy
                    radius = (30 - 5 * label + 2 * place) * scale
                    if side == 0 or not (label == 3 and frame == 3):
                        sides[side][(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = label
            reference, prediction = sides
            reference[:, -12:] = 255  # void
            prediction[-2] = 255  # outside the classes
            if video == "b" and frame == 2:
                prediction[100:120, 10:40] = 5  # only predicted
            found.append((video, frame, reference, prediction))
    return found


def save(path, ids, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(ids, dtype=dtype)).save(path)


def mapped(ids, table, void):
    return np.where(ids == 255, void, np.append(table, np.zeros(256, int))[ids])


def write(root, data):
    """Write both sides in every layout."""
    plain = np.arange(7)
    for video, frame, *sides in data:
        city = f"{video}/{video}_000000_{frame:06}_gtFine"
        for folder, ids in zip(("reference", "prediction"), sides, strict=True):
            objects = np.where(np.isin(ids, (0, 5, 6, 255)), 0, ids)
            save(root / f"semantic/{folder}/{video}/{frame:05}.png", ids)
            save(root / f"ade20k/{folder}/{video}/{frame:05}.png", mapped(ids, plain + 1, 0))
            save(root / f"idd/{folder}/{video}/{frame}_gtFine_labellevel3Ids.png", mapped(ids, LEVEL3, 255))
            save(root / f"idd_lite/{folder}/{video}/{frame}_label.png", ids)
            save(root / f"sar/{folder}/video_{video}/segmentation/{60 * frame:09}.png", mapped(ids, plain, 0))
            save(root / f"city/{folder}/{city}_labelIds.png", mapped(ids, CITYSCAPES, 0))
            for kind in ("Annotations", "Annotations_unsupervised"):
                if folder == "reference":
                    save(root / f"davis/reference/{kind}/480p/{video}/{frame:05}.png", objects)
            if folder == "prediction":
                save(root / f"davis/prediction/{video}/{frame:05}.png", objects)
            save(root / f"clusters/{folder}/{video}/{frame:05}.png", mapped(ids, plain, 0))
        labels = mapped(sides[0], CITYSCAPES, 0)
        save(root / f"city/reference/{city}_instanceIds.png", np.where(labels > 7, labels * 1000, labels), np.uint16)
        save(root / f"davis/reference/JPEGImages/480p/{video}/{frame:05}.jpg", np.zeros((HEIGHT, WIDTH)))
    for year in ("2016", "2017"):
        path = root / f"davis/reference/ImageSets/{year}/val.txt"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{video}\n" for video in OBJECTS))


def other_ways(data, keep=7):
    """Return means that are not official, from the same pixels."""
    rows = []
    for _, _, reference, prediction in data:
        held = reference != 255
        pairs = [((reference == c) & held, (prediction == c) & held) for c in range(keep)]
        rows.append([((a & b).sum(), (a | b).sum()) for a, b in pairs])
    counts = np.array(rows, float)  # (images, classes, 2)
    with np.errstate(invalid="ignore"):
        each, pooled = counts[..., 0] / counts[..., 1], counts[..., 0].sum(0) / counts[..., 1].sum(0)
    return [
        ("pooled, a class that is nowhere is 0 (mmseg nan_to_num=0)", "mIoU", np.nan_to_num(pooled).mean()),
        ("pooled over classes too (torchmetrics micro)", "IoU", counts[..., 0].sum() / counts[..., 1].sum()),
        ("mean over images of each image's mIoU", "mIoU", np.nanmean(np.nanmean(each, 1))),
        ("mean over all pairs of image and class that occur", "mIoU", np.nanmean(each)),
        ("mean over images, an absent class is 1", "mIoU", np.where(np.isnan(each), 1, each).mean()),
    ]


def main():
    rows = []
    data = frames()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, data)
        for protocol, layout in (
            (Semantic(num_classes=7, boundary=True, nsd=True), "semantic"),
            (Ade20k(num_classes=7), "ade20k"),
            (Cityscapes(), "city"),
            (Idd(), "idd"),
            (IddLite(), "idd_lite"),
            (SarRarp50(), "sar"),
            (SarRarp50Seed(), "sar"),
            (Davis2017(), "davis"),
            (Davis2017Unsupervised(), "davis"),
            (Davis2016(), "davis"),
            (VideoClustering(), "clusters"),
        ):
            found = protocol.find(root / layout / "reference", root / layout / "prediction")
            scored = score_cases(protocol, found, where=layout, workers=1)
            scores = summary(protocol, scored)["scores"]
            rows += [(protocol.name, key, value) for key, value in scores.items()]
    rows += other_ways(data)
    shown = [(rule, key, f"{100 * value:.2f}") for rule, key, value in rows]
    print(tabulate(shown, ["rule", "score", "%"], tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
