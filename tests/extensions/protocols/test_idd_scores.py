"""IDD and IDD-Lite against a pixel-by-pixel restatement of their official scripts."""

from functools import partial

import numpy as np
import pytest
from making import save
from mistakes import assert_refused
from PIL import Image
from score_making import assert_bad_file, maps, measure_pair, scores, tree, unit_sums

from dinoseg.extensions.protocols.idd import ENDING, NAMES, Idd
from dinoseg.extensions.protocols.idd_lite import IddLite
from dinoseg.metrics.counts import group_counts

SIZES = {720: (1280, 720), 1080: (1920, 1080), 480: (858, 480), 240: (426, 240)}  # as the official script has them
LEVEL2 = [[0], [1], [2], [3], [4], [5], [6, 7], [8, 9], [10, 11, 12], [13, 14]]
LEVEL2 += [[15, 16], [17, 18, 19], [20, 21], [22, 23], [24], [25]]
LEVEL1 = [[0, 1], [2, 3], [4, 5], [6, 7, 8], [9, 10, 11, 12], [13, 14], [15]]


def count(pairs, size, void):
    """Count the pairs of ids of maps that Pillow resizes, as in the official script."""
    matrix = np.zeros((void + 1, void + 1), int)
    for pair in pairs:
        images = [Image.fromarray(ids.astype(np.uint8)).resize(size, Image.Resampling.NEAREST) for ids in pair]
        np.add.at(matrix, tuple(np.minimum(np.asarray(image), void) for image in images), 1)
    return matrix


def mean_iou(matrix, classes):
    values = []
    for label in range(classes):
        hits = matrix[label, label]
        missed = sum(matrix[label]) - hits
        wrong = sum(matrix[row, label] for row in range(classes) if row != label)
        if hits + missed + wrong:
            values.append(hits / (hits + missed + wrong))
    return sum(values) / len(values) if values else np.nan


def merge(matrix, groups):
    return np.array([[sum(matrix[r, c] for r in rows for c in columns) for columns in groups] for rows in groups])


def official(matrix):
    known = matrix[:26, :26]
    level2 = merge(known, LEVEL2)
    return {
        "mIoU_level3": mean_iou(matrix, 26),
        "mIoU_level2": mean_iou(level2, 16),
        "mIoU_level1": mean_iou(merge(level2, LEVEL1), 7),
        "mIoU_level1_as_shipped": mean_iou(merge(matrix, LEVEL1), 7),
    }


def path(number):
    return f"drive{number % 3}/frame{number:04}{ENDING}"


@pytest.mark.parametrize("ids", [[*range(26), 255], [3, 4, 9, 25, 255], [255, 0], [*range(30), 254]])
def test_equals_the_official_script_on_varied_maps(tmp_path, ids):
    pairs = maps(np.random.default_rng(len(ids)), ids)
    found = scores(Idd(resolution=240), *tree(tmp_path, pairs, path))
    assert found == pytest.approx(official(count(pairs, SIZES[240], 26)), abs=1e-12, nan_ok=True)


def test_groups_of_large_counts_stay_exact():
    matrix = np.array([[2**60, 1, 2], [3, 2**60 + 1, 5], [7, 11, 13]])
    assert group_counts(matrix, np.array([0, 0, 1])).tolist() == [[2**61 + 5, 7], [18, 13]]


@pytest.mark.parametrize(("resolution", "shape"), [(1080, (227, 320)), (720, (719, 1283)), (480, (1080, 1920))])
def test_every_resolution_has_the_official_size(tmp_path, resolution, shape):
    rng = np.random.default_rng(shape[0] + resolution)
    reference, prediction = rng.integers(0, 27, (2, *shape), dtype=np.uint8)
    files = save(tmp_path / "a.png", reference), save(tmp_path / "b.png", prediction)
    expected = count([(reference, prediction)], SIZES[resolution], 26).ravel()
    np.testing.assert_array_equal(measure_pair(Idd(resolution), *files).sums, expected)


def test_palette_masks_are_read_as_ids_and_resized(tmp_path):
    ids = np.random.default_rng(3).integers(0, 26, (54, 96), dtype=np.uint8)
    picture = Image.fromarray(ids)
    picture.putpalette(list(range(255, -1, -1)) * 3)
    (tmp_path / "prediction/d").mkdir(parents=True)
    picture.save(tmp_path / f"prediction/d/a{ENDING}")
    save(tmp_path / f"reference/d/a{ENDING}", np.kron(ids, np.ones((2, 2), np.uint8)))
    assert scores(Idd(1080), tmp_path / "reference", tmp_path / "prediction")["mIoU_level3"] == 1


def test_unknown_ids_are_counted_separately(tmp_path):
    reference = np.full((20, 20), 255)
    prediction = np.zeros((20, 20), int)
    reference[:2], prediction[:3] = 30, 39
    pair = save(tmp_path / "a.png", reference), save(tmp_path / "b.png", prediction)
    details = measure_pair(Idd(), *pair).details
    assert details == {"unknown_pixels_reference": 40, "unknown_pixels_prediction": 60}


def test_frames_of_a_drive_are_one_unit_with_named_classes(tmp_path):
    protocol = Idd(240)
    pairs = maps(np.random.default_rng(5), range(26))
    sums = unit_sums(protocol, *tree(tmp_path, pairs, path))
    assert sorted(sums) == ["drive0", "drive1", "drive2"]
    np.testing.assert_array_equal(sums["drive1"].reshape(27, 27), count(pairs[1::3], SIZES[240], 26))
    rows = protocol.per_class(sum(sums.values()))
    assert [row["name"] for row in rows] == list(NAMES) and [row["id"] for row in rows] == list(range(26))
    mean = np.mean([row["IoU"] for row in rows])
    assert mean == pytest.approx(protocol.scores(sum(sums.values()))["mIoU_level3"], abs=1e-12)


def test_missing_and_extra_predictions_are_reported(tmp_path):
    reference, prediction = tree(tmp_path, maps(np.random.default_rng(6), range(26)), path)
    (prediction / path(4)).unlink()
    save(prediction / f"drive9/late{ENDING}", [[0]])
    save(prediction / "drive1/overlay.png", [[0]])
    found = Idd().find(reference, prediction)
    assert [(file, "has no prediction" in reason) for file, reason in found.problems] == [(prediction / path(4), True)]
    assert len(found.cases) == 9 and len(found.notes) == 1
    assert "drive9" in found.notes[0] and "late" in found.notes[0]


def test_wrong_folder_depth_is_refused_with_a_suggestion(tmp_path):
    pairs = maps(np.random.default_rng(7), range(26))[:2]
    reference, prediction = tree(tmp_path, pairs, lambda number: f"val/{path(number)}")
    deep = "not at that depth. Try reference="
    assert_refused(partial(Idd().find, reference, prediction / "val"), deep, "reference/val.")
    assert_refused(partial(Idd().find, reference / "val", tmp_path / "nowhere"), "is not a folder")
    for number in range(2):
        (prediction / "val" / path(number)).rename(prediction / "val" / f"drive{number}/frame.jpg")
    words = ("prediction=", " does not hold ", " It holds 2 of .jpg, such as")
    assert_refused(partial(Idd().find, reference / "val", prediction / "val"), *words)
    assert_refused(partial(Idd, 721), "resolution=721 is unknown. Choose one of 720, 1080, 480, 240")


def test_unreadable_and_coloured_files_are_named(tmp_path):
    good = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 26, (60, 60)))
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:900])
    coloured = save(tmp_path / "coloured.png", np.zeros((2, 2, 3)))
    for bad, words in ((broken, "as an image ("), (coloured, "has 3 channels")):
        assert_bad_file(partial(measure_pair, Idd(), good, bad), bad, words)


def test_a_data_set_of_it_can_be_scored(tmp_path):
    protocol = Idd(240)
    assert protocol.target("drive/frame0001") == f"drive/frame0001{ENDING}"
    case = protocol.case("drive/frame0001", tmp_path / "a.png", tmp_path / "b.png")
    assert case.unit == "drive" and case.files == ((tmp_path / "a.png", tmp_path / "b.png"),)
    assert protocol.file_ids(np.array([[0, 25]])).tolist() == [[0, 25]]
    assert IddLite().target("drive/1") == "drive/1_label.png" and IddLite().case("d/1", *case.files[0]).unit == "d"
    assert IddLite().file_ids(np.array([[6]])).dtype == np.uint8


@pytest.mark.parametrize("ids", [[*range(7), 255], [2, 255], [0, 6, 7, 9]])
def test_idd_lite_equals_the_last_number_of_its_script(tmp_path, ids):
    pairs = maps(np.random.default_rng(len(ids)), ids)
    reference, prediction = tree(tmp_path, pairs, lambda number: f"d{number % 2}/{number}_label.png")
    save(reference / "d0/0_inst_label.png", [[9]])
    expected = mean_iou(count(pairs, (256, 128), 7), 7)
    assert scores(IddLite(), reference, prediction) == pytest.approx({"mIoU": expected}, abs=1e-12)
    rows = IddLite().per_class(sum(unit_sums(IddLite(), reference, prediction).values()))
    assert np.nanmean([row["IoU"] for row in rows]) == pytest.approx(expected) and rows[6]["name"] == "sky"
