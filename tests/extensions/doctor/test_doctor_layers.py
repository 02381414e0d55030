"""What mode=doctor reports on masks with a layer for each class, against numpy."""

import numpy as np
import pytest
import torch
from making import save

from dinoseg.data.checks.errors import describe_split
from dinoseg.data.custom import CustomDataset
from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.scan.measure import measure_sample
from dinoseg.data.scan.scan import scan
from dinoseg.extensions.doctor.examine import examine, summary

CLASSES = ["disc", "square", "ring", "never"]


def draw_layers(root, images=8):
    """Write images with random layers, of which some are empty, full, ignored, of one pixel or have no file."""
    rng = np.random.default_rng(0)
    layers = {}
    for number in range(images):
        shape = tuple(rng.integers(20, 40, 2))
        save(root / f"train/images/{number}.png", rng.integers(0, 256, (*shape, 3)))
        mask = rng.integers(0, 2, (4, *shape)).astype(np.uint8)
        mask[0, :4] = 255
        mask[1] = number % 2 if number < 6 else 0
        mask[2:] = 0
        mask[2, 3, 5] = number > 2
        if number == 0:
            mask[:] = 255
        layers[str(number)] = mask
        for index, name in enumerate(CLASSES):
            if number == 0 or index in (0, 2) or (index == 1 and number < 6):
                save(root / f"train/masks/{name}/{number}.png", mask[index])
    return layers


def examine_layers(root):
    data = folder_dataset(root, "train", classes=CLASSES, layers=True)
    part = describe_split("train", data, scan(data.pairs, data.reader, images=True))
    return {finding.code: finding for finding in examine([part])}, part


def test_counts_of_layers_equal_numpy(tmp_path):
    layers = draw_layers(tmp_path)
    findings, part = examine_layers(tmp_path)
    shown = summary(part)
    ignored = sum((mask == 255).sum() for mask in layers.values())
    labelled = sum((mask != 255).sum() for mask in layers.values())
    assert part.num_labelled == labelled and part.void == ignored
    assert shown["void_share"] == pytest.approx(ignored / (ignored + labelled)) and shown["constant_class"] is None
    for index, row in enumerate(shown["classes"]):
        present = [(mask[index] == 1).sum() for mask in layers.values()]
        assert row["pixels"] == sum(present) and row["images"] == np.count_nonzero(present)
        assert row["share"] == pytest.approx(sum(present) / (labelled / 4))
    several = [((mask == 1).sum(axis=0) > 1).sum() for mask in layers.values()]
    text = f"{sum(several):,} pixels of train show several classes, in {np.count_nonzero(several)} of 8 images."
    assert findings["overlaps"].message == text
    assert "never" in findings["class_never_seen"].message
    assert "square (2 of 8), never (7 of 8)" in findings["missing_layers"].message
    assert {"6: square", "7: square", "3: never"} <= {*findings["missing_layers"].files}
    assert len(findings["all_void"].files) == 1 and "0.png" in findings["all_void"].files[0]
    assert "no_labels" not in findings and "binary_read_as_ids" not in findings


def test_layers_larger_than_their_image_count_their_own_pixels(tmp_path):
    for name, side in (("a", 8), ("b", 4)):
        save(tmp_path / f"train/images/{name}.png", np.zeros((side, side, 3)))
        save(tmp_path / f"train/masks/disc/{name}.png", np.full((8, 8), 255))
    findings, part = examine_layers(tmp_path)
    assert findings["size_mismatch"].severity == "error"
    assert part.num_labelled == 2 * 3 * 64 and part.void == 2 * 64


def test_faulty_layers_are_errors_that_name_the_file(tmp_path):
    draw_layers(tmp_path)
    for number, mask in ((1, np.full((9, 9), 1)), (2, np.full((3, 3), 7))):
        for name in CLASSES[:3]:
            save(tmp_path / f"train/masks/{name}/{number}.png", mask)
    save(tmp_path / "train/masks/disc/3.png", np.zeros((2, 2)))
    findings, _ = examine_layers(tmp_path)
    reasons = "\n".join(findings["unreadable_mask"].reasons)
    assert "disc/2.png holds the ids 7" in reasons and "differ in size" in reasons
    assert "1.png" in findings["size_mismatch"].files[0]


def test_layers_without_a_labelled_pixel_are_an_error(tmp_path):
    for number in range(2):
        save(tmp_path / f"train/images/{number}.png", np.zeros((20, 20, 3)))
        for name in CLASSES:
            save(tmp_path / f"train/masks/{name}/{number}.png", np.full((20, 20), 255))
    assert "no_labels" in examine_layers(tmp_path)[0]
    save(tmp_path / "train/masks/disc/0.png", np.zeros((20, 20)))
    findings, _ = examine_layers(tmp_path)
    assert "no_labels" not in findings and "disc" in findings["class_never_seen"].message


def test_classes_that_never_overlap_are_noted(tmp_path):
    save(tmp_path / "train/images/0.png", np.zeros((20, 20, 3)))
    for row, name in enumerate(CLASSES):
        save(tmp_path / f"train/masks/{name}/0.png", np.arange(20)[:, None] == np.full(20, row))
    finding = examine_layers(tmp_path)[0]["overlaps"]
    assert finding.message.startswith("0 pixels") and "task=semantic" in finding.remedy


def test_layers_of_a_dataset_class_are_measured(tmp_path):
    layers = draw_layers(tmp_path)["4"]
    image = torch.zeros(3, *layers.shape[1:], dtype=torch.uint8)
    members = {"classes": CLASSES, "palette": [(0, 0, n) for n in range(4)], "ignore_index": 255, "names": ["4"]}
    members |= {"__len__": lambda self: 1}
    members |= {"__getitem__": lambda self, index: {"image": image, "mask": torch.from_numpy(layers), "name": "4"}}
    data = CustomDataset(type("Own", (), members)(), has_layers=True)
    part = describe_split("train", data, [measure_sample("4", "train: 4", lambda: data[0], 255)])
    assert part.records[0].mask_size == layers.shape[1:]
    assert part.counts.tolist() == (layers == 1).sum(axis=(1, 2)).tolist()
    assert part.records[0].overlap == ((layers == 1).sum(axis=0) > 1).sum()
    assert "missing_layers" not in {finding.code for finding in examine([part])}
