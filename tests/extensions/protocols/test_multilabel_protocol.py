"""Scores of two folders of layers equal those of sets of pixels, class by class."""

import numpy as np
import pytest
from layer_images import CLASSES, draw_images, mean_surface_dice, sides_of
from making import save
from mistakes import assert_refused, refusals
from score_making import boundary_iou, overlap, scores

from dinoseg.extensions.protocols.contract import BadFile
from dinoseg.extensions.protocols.multilabel import Multilabel

NAMES = ["disc", "square", "thin line", "ring"]


def write(root, images, level=1, *, all_references=True):
    """Write layers as masks CLASS/video/NUMBER.png; empty references are left out if not all are wanted."""
    for number, (ids, mask, _) in enumerate(images):
        for layer, name in enumerate(NAMES):
            path = f"{name}/video {number % 2}/{number}.png"
            save(root / "prediction" / path, ids[layer] * level)
            if all_references or mask[layer].any():
                save(root / "reference" / path, mask[layer])
    return root / "reference", root / "prediction"


def expected(images):
    """Return the scores by the places of pixels, and the IoU of each class."""
    rows, right = [], []
    for layer in range(CLASSES):
        pairs = sides_of(images, layer)
        both = sum((mask & ids).sum() for mask, ids in pairs)
        held = sum(mask.sum() for mask, _ in pairs)
        iou, dice = overlap(pairs)
        recall = both / held if held else None
        shapes = {"boundary_IoU": boundary_iou(pairs), "NSD": mean_surface_dice(pairs)}
        rows.append({"mIoU": iou, "dice": dice, "mean_accuracy": recall, **shapes})
        for (mask, ids), (_, labels, _) in zip(pairs, images, strict=True):
            right += (mask == ids)[labels[layer] != 255].tolist()
    defined = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    means = {key: np.mean(values) if values else np.nan for key, values in defined.items()}
    return {**means, "accuracy": np.mean(right) if right else np.nan}, [row["mIoU"] for row in rows]


@pytest.mark.parametrize("level", [1, 255])
def test_scores_equal_their_definition(tmp_path, level):
    protocol = Multilabel(NAMES, boundary=True, nsd=True)
    for seed in range(10):
        images = draw_images(seed)
        folders = write(tmp_path / f"{seed}", images, level)
        means, ious = expected(images)
        assert scores(protocol, *folders) == pytest.approx(means, abs=1e-12, nan_ok=True), seed
        listing = protocol.find(*folders)
        total = sum(protocol.measure(case).sums for case in listing.cases)
        found = [row["IoU"] for row in protocol.per_class(total)]
        assert found == pytest.approx([np.nan if iou is None else iou for iou in ious], nan_ok=True)
        assert [row["name"] for row in protocol.per_class(total)] == NAMES


def test_a_reference_without_a_file_is_an_absent_class(tmp_path):
    for seed in range(3):
        images = [image for image in draw_images(seed) if image[1].any()]
        if images:
            whole, parts = tmp_path / f"{seed}", tmp_path / f"parts {seed}"
            found = scores(Multilabel(NAMES), *write(parts, images, all_references=False))
            assert found == pytest.approx(scores(Multilabel(NAMES), *write(whole, images)), nan_ok=True)


def test_files_that_do_not_fit_are_refused(tmp_path):
    images = [(np.ones((4, 5, 6), np.uint8), np.ones((4, 5, 6), np.uint8), None)] * 3
    reference, prediction = write(tmp_path, images)
    protocol = Multilabel(NAMES)
    save(prediction / "disc/video 0/0.png", np.full((5, 6), 7))
    save(reference / "ring/video 1/1.png", np.full((5, 6), 3))
    (prediction / "square/video 0/2.png").unlink()
    save(prediction / "disc/video 5/9.png", np.ones((5, 6)))
    listing = protocol.find(reference, prediction)
    assert [case.name for case in listing.cases] == ["video 0/0", "video 0/2", "video 1/1"]
    assert "no reference" in listing.notes[0] and "9" in listing.notes[0]
    messages = [
        "holds the ids 7",
        "square/video 0/2.png",
        "ring/video 1/1.png.* holds the ids 3 in 30 pixels.*0, 1 and 255",
    ]
    for case, message in zip(listing.cases, messages, strict=True):
        with pytest.raises(BadFile, match=message):
            protocol.measure(case)
    for sizes in (((5, 6), (5, 7)), ((9, 9), (9, 9))):
        for name, size in zip(NAMES, (*sizes, sizes[0], sizes[0]), strict=True):
            save(prediction / name / "video 0/0.png", np.ones(size))
        with pytest.raises(BadFile, match=r"\(5, 7\)|9 x 9|its reference"):
            protocol.measure(listing.cases[0])
    (reference / "empty").mkdir()
    words = "no masks in folders of the classes disc, square"
    assert_refused(lambda: protocol.find(reference / "empty", prediction), words)
    assert_refused(lambda: protocol.find(tmp_path, prediction), "lies inside")


def test_references_of_0_and_255_alone_are_noted(tmp_path):
    images = [(np.ones((4, 5, 6), np.uint8), np.eye(5, 6, dtype=np.uint8)[None].repeat(4, 0) * 255, None)]
    listing = Multilabel(NAMES).find(*write(tmp_path, images))
    assert "NO CLASS IS PRESENT" in listing.notes[0]
    binary = Multilabel(NAMES, binary=True)
    listing = binary.find(tmp_path / "reference", tmp_path / "prediction")
    assert not listing.notes
    assert binary.scores(binary.measure(listing.cases[0]).sums)["mIoU"] == pytest.approx(5 / 30)
    assert not Multilabel(NAMES, ignore_index=254).find(*write(tmp_path, images)).notes


test_message_names_the_value_without_a_meaning = refusals(
    {
        "no classes": (Multilabel, "names of the classes"),
        "ignored 1": (lambda: Multilabel(["a"], ignore_index=1), "masks hold 0 and 1"),
        "a path as a class": (lambda: Multilabel(["a/b"]), "a/b"),
    }
)
