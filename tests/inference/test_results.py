from pathlib import Path

import numpy as np
import pytest

from dinoseg.inference import results
from dinoseg.inference.results import mask_names, result_names, write_image_results
from dinoseg.utils.images import read_ids, read_image

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
    assert len({name.casefold() for name in names}) == len(names)


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


def test_an_older_result_is_replaced_whole(tmp_path):
    folder = tmp_path / "a_segmentation"
    folder.mkdir()
    (folder / "stale.txt").write_text("old")
    write_image_results(folder, np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3), np.uint8), **OPTIONS)
    assert not (folder / "stale.txt").exists() and (folder / "original.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a_segmentation"]


def test_a_failing_write_leaves_no_part_and_the_old_result(tmp_path, monkeypatch):
    folder = tmp_path / "a_segmentation"
    folder.mkdir()
    (folder / "old.txt").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_image_results(folder, np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3), np.uint8), **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["a_segmentation"]
    assert [path.name for path in folder.iterdir()] == ["old.txt"]
