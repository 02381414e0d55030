"""YOLO's text files of polygons give the masks and objects of pycocotools, and a user's mistakes are named."""

import numpy as np
import pytest
from composed_data import load
from making import save
from mistakes import assert_refused
from pycocotools import mask as official

from dinoseg.config.nodes import instantiate
from dinoseg.core.object_ids import OBJECTS, object_classes
from dinoseg.extensions.packed.pack import pack
from dinoseg.testing import check_dataset

SIZE = (40, 56)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
TRIANGLE = "0.1 0.1 0.5 0.1 0.5 0.5"
NAMES = "names: [leaf, stem]\n"
ENTRIES = "train: images/train\nval: images/val\n"


def read(root, *overrides, split="train", name="yolo_instances"):
    data = load(name, root, *overrides)
    dataset = instantiate(data.reader)(split=split)
    return instantiate(data.objects)(dataset, background=0) if "objects" in data else dataset


def write(root, texts, folder="train", entries=ENTRIES + NAMES, suffix=".png"):
    """Write data.yaml, and for each name an image and its text; None: no text file."""
    for name, content in texts.items():
        save(root / f"images/{folder}/{name}{suffix}", np.zeros((*SIZE, 3)))
        if content is not None:
            path = root / f"labels/{folder}/{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    (root / "data.yaml").write_text(entries)


def rasterise(polygon, size=SIZE):
    """Return the mask (H, W) of a polygon (N, 2) in pixels, by pycocotools."""
    (code,) = official.frPyObjects([polygon.ravel().tolist()], *size)
    return official.decode(code).astype(bool)


@pytest.mark.parametrize("seed", range(8))
def test_polygons_are_those_of_pycocotools(tmp_path, seed):
    rng = np.random.default_rng(seed)
    texts, expected = {}, {}
    for name in "abc"[: 1 + seed % 3]:
        rows, expected[name] = [], []
        for _ in range(rng.integers(0, 9)):
            points = rng.uniform(-0.005, 1.005, (int(rng.integers(3, 9)), 2)).astype(np.float64)
            points = np.round(points, int(rng.choice([1, 2, 17])))  # ties with borders of pixels too
            number = int(rng.integers(2))
            rows.append(f"{number} " + " ".join(repr(float(value)) for value in points.ravel()))
            expected[name].append((number + 1, rasterise(points * (SIZE[1], SIZE[0]))))
        texts[name] = "\n".join(rows)
    texts["void"] = f"0 {TRIANGLE}"  # so that the split has an object
    write(tmp_path, texts)
    data = read(tmp_path)
    assert list(data.classes) == ["background", "leaf", "stem"] and data.maps[OBJECTS].things == (1, 2)
    for name, objects in expected.items():
        sample = data[data.names.index(name)]
        layers = sample["maps"][OBJECTS].numpy()
        values = np.unique(layers[layers > 0]).tolist()
        found = [(int(object_classes(value)), (layers == value).any(axis=0).tobytes()) for value in values]
        assert sorted(found) == sorted((number, mask.tobytes()) for number, mask in objects if mask.any())
        union = np.zeros(SIZE, bool)
        for _, mask in objects:
            union |= mask
        assert ((sample["mask"].numpy() > 0) == union).all()


def test_small_objects_lie_on_large_ones(tmp_path):
    write(tmp_path, {"a": "1 0.2 0.2 0.4 0.2 0.4 0.4 0.2 0.4\n0 0 0 1 0 1 1 0 1"})
    mask = read(tmp_path, name="yolo")[0]["mask"].numpy()
    assert mask[12, 16] == 2 and mask[0, 0] == mask[-1, -1] == 1
    mask = read(tmp_path, "data.reader.shapes.order=file", name="yolo")[0]["mask"].numpy()
    assert (mask == 1).all()
    # two parts that are joined, of opposite orientation
    write(tmp_path, {"a": "1 0.05 0.4 0.15 0.4 0.15 0.6 0.05 0.6\n0 0 0 1 1 1 0 0 1"})
    assert read(tmp_path, name="yolo")[0]["mask"][20, 5] == 2


def test_empty_and_missing_text_files_are_images_without_objects(tmp_path, caplog):
    write(tmp_path, {"a": f"\n0 {TRIANGLE}\r\n\n0  {TRIANGLE}\n0 {TRIANGLE}\n", "b": "", "c": None, "d": "\ufeff\n"})
    data = read(tmp_path)
    assert [pair.objects.count for pair in data.pairs] == [2, 0, 0, 0]  # equal rows are one object
    assert [sample["maps"][OBJECTS].shape[0] > 0 for sample in data] == [True, False, False, False]
    assert "3 of 4 images have no shape" in caplog.text
    check_dataset(read(tmp_path))
    packed = pack(read(tmp_path), cache_dir=tmp_path / "cache", workers=1)
    assert all((packed[n]["maps"][OBJECTS] == data[n]["maps"][OBJECTS]).all() for n in range(4))
    before = data.fingerprint()
    write(tmp_path, {"b": "1 0 0 1 0 1 1"})
    assert read(tmp_path).fingerprint() != before
    assert read(tmp_path, "data.reader.shapes.without_shapes=skip").names == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2 0.1 0.1 0.5 0.1 0.5 0.5", ("class 2", "0 to 1")),
        ("-1 0.1 0.1 0.5 0.1 0.5 0.5", ("class -1",)),
        ("0.5 0.1 0.1 0.5 0.1 0.5 0.5", ("class 0.5",)),
        ("0 0.5 0.5 0.2 0.2", ("4 coordinates", "box", "export polygons")),
        ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.7", ("7 coordinates", "pairs")),
        ("0", ("0 coordinates", "3 points")),
        ("0 10 10 50 10 50 50", ("10, 10, 50", "outside of 0 to 1", "Divide x by the width")),
        ("0 0.1 nan 0.5 0.1 0.5 0.5", ("nan", "outside of 0 to 1")),
        ("leaf 0.1 0.1 0.5 0.1 0.5 0.5", ("leaf 0.1", "all numbers")),
        ("0,0.1,0.1,0.5,0.1,0.5,0.5", ("0,0.1", "all numbers")),
    ],
)
def test_a_wrong_row_is_named_with_its_file_and_line(tmp_path, row, words):
    write(tmp_path, {"a": f"1 {TRIANGLE}\n{row}\n9 {TRIANGLE}", "b": f"0 {TRIANGLE}"})
    data = read(tmp_path)
    assert data.names == ["b"]
    for word in ("labels/train/a.txt", "line 2", *words):
        assert word in data.lacking["a"]


def test_entries_of_splits_are_folders_lists_or_several(tmp_path):
    for folder in ("train", "more/deep", "valid"):
        write(tmp_path, {"a": f"1 {TRIANGLE}"}, folder=folder, suffix=".JPG" if folder == "valid" else ".png")
    (tmp_path / "list.txt").write_text(
        "images/train/a.png\n\n./images/more/deep/a.png\nimages/train/gone.png\n" + "x" * 300
    )
    several = "train: [images/train, images/more]\n"
    for entries, split, names in (
        (ENTRIES.replace("val: images/val", "val: images/valid"), "val", ["a"]),
        ("path: .\ntrain: images/train\nvalid: images/valid\n", "val", ["a"]),  # CVAT's subsets keep their names
        ("train: ../images/train\nval: ../images/valid\n", "train", ["a"]),  # Roboflow
        (f"path: {tmp_path / 'images'}\ntrain: train\n", "train", ["a"]),
        ("path: somewhere/else\ntrain: images/train\n", "train", ["a"]),
        ("path: [nowhere, .]\ntrain: images/train\n", "train", ["a"]),
        (several, "train", ["more/deep/a", "train/a"]),
        ("train: list.txt\n", "train", ["images/more/deep/a", "images/train/a"]),
        ("train: images\\train\n", "train", ["a"]),
    ):
        (tmp_path / "data.yaml").write_text(entries + "nc: 2\nnames:\n  1: stem\n  0: leaf\n")
        data = read(tmp_path, split=split)
        assert data.names == names and [*data.classes] == ["background", "leaf", "stem"]
        assert all((sample["mask"] == 2).any() for sample in data)
        assert all(
            "train/gone" in name and "gone.png" in reason or "xxx" in name for name, reason in data.lacking.items()
        )
    (tmp_path / "data.yaml").write_text(f"train: images/train\nval: images/valid\n{NAMES}")
    sides = [read(tmp_path, "data.reader.partition.by=fraction", split=split).names for split in ("train", "val")]
    assert sorted(sides) == [["train/a"], ["valid/a"]]


def test_labels_may_lie_next_to_the_images(tmp_path):
    save(tmp_path / "photos/a.png", np.zeros((*SIZE, 3)))
    (tmp_path / "photos/a.txt").write_text(f"0 {TRIANGLE}")
    (tmp_path / "data.yaml").write_text(f"train: photos\n{NAMES}")
    assert (read(tmp_path)[0]["mask"] == 1).any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: images/train\n", ("no list of classes", "names: [leaf, stem]")),
        ("[]", ("no list of classes",)),
        ("names: {0: leaf, 2: stem}\ntrain: images/train\n", ("name of class 1", "None")),
        ("names: [leaf, leaf]\ntrain: images/train\n", ("'leaf' is the name of 2 classes",)),
        ("names: {0: leaf, 1: leaf}\ntrain: images/train\n", ("'leaf' is the name of 2 classes",)),
        (NAMES + "val: images/val\n", ("no entry train", "partition.by=fraction")),
        (NAMES + "train: pictures\n", ("names pictures", "no ", "Correct its entries")),
        (NAMES + f"train: {'a' * 300}\n", ("names aaa", "Correct its entries")),
        (NAMES + "train: images/train\nkpt_shape: [17, 3]\n", ("key points", "export polygons")),
        (NAMES + "train: images\ntrain: images\n", ("more than once",)),
        (NAMES + "train: images/bare\n", ("no text file of polygons", "labels/bare/b.txt")),
        (NAMES + "train: images/empty\n", ("data.yaml holds no image",)),
    ],
)
def test_a_wrong_data_yaml_is_refused(tmp_path, content, words):
    write(tmp_path, {"a": f"0 {TRIANGLE}"})
    write(tmp_path, {"b": None}, folder="bare")
    (tmp_path / "images/empty").mkdir()
    (tmp_path / "data.yaml").write_text(content)
    assert_refused(lambda: read(tmp_path, "data.classes=[background,leaf,stem]"), "data.yaml", *words)
    (tmp_path / "data.yaml").unlink()
    assert_refused(
        lambda: read(tmp_path, "data.classes=[background,a]"), "No file of YOLO", "data.yaml", "layout.annotations"
    )


def test_export_of_cvat_is_read(tmp_path):
    """Its data.yaml has a list of images for each subset, and its coordinates six digits."""
    corners = np.array([[5, 5], [30, 6], [31, 33], [8, 20]])
    row = " ".join(f"{value:.6f}" for value in (corners / (SIZE[1], SIZE[0])).ravel())
    entries = "names:\n  0: leaf\n  1: stem\npath: .\ntrain: train.txt\n"
    write(tmp_path, {"walk/1": f"1 {row}\n", "walk/2": "", "run/1": f"0 {row}\n"}, entries=entries)
    names = ("walk/1", "walk/2", "run/1")
    (tmp_path / "train.txt").write_text("".join(f"images/train/{name}.png\n" for name in names))
    data = read(tmp_path)
    assert data.names == ["images/train/run/1", "images/train/walk/1", "images/train/walk/2"]
    assert ((data[1]["mask"].numpy() == 2) == rasterise(corners.astype(float))).all()
    words = ("data.reader.partition.by=fraction", "data.group='images/train/([^/]+)'")
    sides = [read(tmp_path, *words, split=split).names for split in ("train", "val")]
    assert sorted(sides) == [data.names[:1], data.names[1:]]


def test_the_last_folder_of_images_has_labels_next_to_it(tmp_path):
    save(tmp_path / "images/plants/images/a.png", np.zeros((*SIZE, 3)))
    (tmp_path / "images/plants/labels").mkdir()
    (tmp_path / "images/plants/labels/a.txt").write_text(f"0 {TRIANGLE}")
    (tmp_path / "data.yaml").write_text(f"train: images/plants/images\n{NAMES}")
    assert (read(tmp_path)[0]["mask"] == 1).any()
