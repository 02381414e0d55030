"""Names and files of the results of images."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from dinoseg.core.task import SEMANTIC
from dinoseg.data.classes.labels import Labels
from dinoseg.inference import image_run, results
from dinoseg.inference.class_record import ClassRecord, read_class_record, write_class_record
from dinoseg.inference.image_run import ImageInput, ImageRun, SegmentationSettings, segment_images
from dinoseg.inference.results import DoneInputs, mask_names, result_names, write_image_results
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, read_image, write_png

OPTIONS = {"classes": ["ground", "car"], "palette": [(0, 0, 0), (9, 200, 30)]}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.png"], ["a"]),
        (["d/a.png", "d/b.png"], ["a", "b"]),
        (["d/a.png", "d/a.jpg"], ["a_png", "a_jpg"]),
        (["d/a/x.png", "d/b/x.png", "d/c.png"], ["a_x_png", "b_x_png", "c"]),
        (["d/X.png", "d/x.png"], ["X_png", "x_png_2"]),
        (["d/a/x.png", "d/b/x.png", "d/a_x_png.png"], ["a_x_png_2", "b_x_png", "a_x_png"]),
        (["d/x.y.png", "d/x.y.jpg"], ["x_y_png", "x_y_jpg"]),
    ],
)
def test_names_never_collide(paths, names):
    assert result_names([Path(path) for path in paths]) == names


def test_masks_keep_names_that_the_disk_distinguishes(tmp_path):
    paths = [tmp_path / name for name in ("CASE.png", "case.png", "a/x.jpg")]
    assert mask_names(paths, str(tmp_path)) == ["CASE", "case", "a/x"]  # as mode=score looks for them
    assert mask_names([tmp_path / "CASE.jpg", tmp_path / "case.png"], str(tmp_path)) == ["CASE_jpg", "case_png"]


def test_an_image_gives_five_files(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3)).astype(np.uint8)
    mask = np.zeros((30, 41), np.uint8)
    mask[5:9, 7:20] = 1
    folder = tmp_path / "out" / "a_segmentation"
    write_image_results(folder, image, mask, **OPTIONS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "class_statistics.txt",
        "comparison.png",
        "original.png",
        "segmentation_colored.png",
        "segmentation_raw.npy",
    ]
    raw = np.load(folder / "segmentation_raw.npy")
    assert raw.dtype == np.uint8 and np.array_equal(raw, mask)
    assert np.array_equal(read_image(folder / "original.png"), image)
    colours = read_ids(folder / "segmentation_colored.png")
    assert tuple(colours[6, 8]) == (9, 200, 30) and tuple(colours[0, 0]) == (0, 0, 0)
    text = (folder / "class_statistics.txt").read_text()
    assert "\\n" not in text and " 1: car                       -       52 px ( 4.23%)\n" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_segmentation"]


def test_an_older_result_is_replaced_whole(older):
    write_zeros(older)
    assert not (older / "old.txt").exists() and (older / "original.png").exists()
    assert list(older.parent.iterdir()) == [older]


def test_a_failing_write_leaves_no_part_and_the_old_result(older, monkeypatch):
    monkeypatch.setattr(results, "write_text", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_zeros(older)
    assert list(older.parent.iterdir()) == [older] and list(older.iterdir()) == [older / "old.txt"]


def write_zeros(folder):
    write_image_results(folder, np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3), np.uint8), **OPTIONS)


@pytest.fixture
def older(tmp_path):
    """Return a folder that holds an older result."""
    folder = tmp_path / "a_segmentation"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


def test_run_renders_with_opacity_palette_and_ignore_index(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(image_run, "write_image_results", lambda *_, **named: drawn.append(named))
    write_png(tmp_path / "a.png", np.zeros((4, 6, 3), np.uint8))
    predictor = SimpleNamespace(
        predict=lambda images, probabilities: [(np.zeros((4, 6), np.uint8), None) for _ in images],
        model=SimpleNamespace(task=SEMANTIC),
    )
    labels = Labels.of(["a", "b"], [[1, 2, 3], [4, 5, 6]], 250)
    run = ImageRun(tmp_path, None, DoneInputs(tmp_path))
    segment_images(SegmentationSettings(predictor, labels, 0.25), [ImageInput(tmp_path / "a.png", "a", "a")], run)
    (named,) = drawn
    assert named["opacity"] == 0.25 and named["ignore_index"] == 250 and named["palette"] == labels.palette


def test_a_record_of_classes_comes_back(tmp_path):
    facts = (["a", "b"], [(1, 2, 3), (4, 5, 6)], 250)
    write_class_record(tmp_path, *facts, {"format": "ids"}, groups={"1": "a"})
    labels = Labels.of(["a", "b"], [[1, 2, 3], [4, 5, 6]], 250)
    assert read_class_record(tmp_path) == ClassRecord(labels, {"format": "ids"}, {"1": "a"})
    write_class_record(tmp_path, *facts, {"format": "ids"}, groups={"2": "b"})  # of more images in the same folder
    assert read_class_record(tmp_path).groups == {"1": "a", "2": "b"}
    write_class_record(tmp_path, *facts, {"format": "ids"}, groups={"2": None})  # predicted again, without groups
    assert read_class_record(tmp_path).groups == {"1": "a"}
    write_class_record(tmp_path, *facts, {}, has_layers=True)
    with pytest.raises(UserError, match="task=multilabel. Set protocol=multilabel"):
        read_class_record(tmp_path)
    assert read_class_record(tmp_path, has_layers=True) is not None
