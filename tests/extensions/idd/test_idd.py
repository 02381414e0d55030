import re
import shutil
from functools import partial

import numpy as np
import pytest
from command_line import SMALL, call
from composed_data import load
from making import save
from mistakes import assert_refused

from dinoseg.config.nodes import instantiate
from dinoseg.data.checks.errors import check_for_errors
from dinoseg.data.classes.masks import Masks
from dinoseg.data.formats.folder import FolderLayout, folder_dataset
from dinoseg.data.label_tables.read import label_table
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.splits import Partition
from dinoseg.extensions.idd.dataset import idd
from dinoseg.extensions.idd.home_made import home_made_files
from dinoseg.extensions.packed.pack import pack

ENCODINGS = {  # data set: column of the label table, file name
    "idd": ("level3", "labellevel3Ids"),
    "idd_level2": ("level2", "labellevel2Ids"),
    "idd_level1": ("level1", "labellevel1Ids"),
    "idd_cityscapes": ("cs_train_id", "labelcsTrainIds"),
    "idd_ids": ("id", "labelids"),
    "idd_home_made": ("level3", "labelIds"),
}
CLASSES = {"classes": [f"c{i}" for i in range(26)]}
PALETTE = [[i, i, i] for i in range(26)]


def add(part, split, name, mask=((0, 25), (255, 3)), kind="labellevel3Ids", suffix=".png", polygons=False):
    """Write one image of IDD and its label map."""
    save(part / f"leftImg8bit/{split}/{name}_leftImg8bit{suffix}", np.full((2, 2, 3), 90))
    if mask is not None:
        save(part / f"gtFine/{split}/{name}_gtFine_{kind}.png", mask)
    if polygons:
        path = part / f"gtFine/{split}/{name}_gtFine_polygons.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def refused(root, split, *words, **options):
    """Check that IDD of a folder is refused; return the message."""
    return assert_refused(lambda: idd(root, split, **CLASSES | options), *words)


def members(column):
    """Return id to rows of the label table, by a column."""
    found = {}
    for row in label_table("idd"):
        if int(row[column]) < (35 if column == "id" else 255):
            found.setdefault(int(row[column]), []).append(row)
    return found


@pytest.mark.parametrize("name", ENCODINGS)
def test_names_and_colours_are_those_of_the_table(name, tmp_path):
    data = load(name, tmp_path)
    table = members(ENCODINGS[name][0])
    own_names = {("idd_cityscapes", 9): "terrain"}
    own_names |= dict.fromkeys([("idd", 12), ("idd_home_made", 12)], "vehicle fallback")
    assert sorted(table) == list(range(len(data.classes))) and data.num_classes == len(data.classes)
    for index, rows in table.items():
        colors = [[int(value) for value in row["color"].split()] for row in rows]
        typical = colors if name == "idd_level1" else colors[:1]
        assert list(data.palette[index]) in typical, (index, rows[0]["name"])
        if name not in ("idd_level2", "idd_level1") or len(rows) == 1:  # groups have names of their own
            assert data.classes[index] == own_names.get((name, index), rows[0]["name"])
    assert data.ignore_index == 255


def test_groups_have_the_names_of_the_benchmark(tmp_path):
    level2 = load("idd_level2", tmp_path).classes
    level1 = load("idd_level1", tmp_path)
    table = {row["name"]: row for row in label_table("idd")}
    for label, group in (
        ("tunnel", "construction"), ("polegroup", "obs-fallback"), ("traffic light", "info-structures"),
        ("guard rail", "fence-guard rail"), ("curb", "curb-wall"), ("train", "large-vehicle"), ("car", "car-auto"),
        ("bicycle", "2-wheeler"), ("animal", "person"), ("rail track", "non-drivable fallback"),
        ("parking", "drivable fallback"), ("fallback background", "sky"),
    ):  # fmt: skip
        assert level2[int(table[label]["level2"])] == group
    for label, group in (
        ("parking", "drivable"), ("rail track", "non-drivable"), ("rider", "living-things"), ("bus", "vehicles"),
        ("pole", "road-side-objs"), ("vegetation", "far-objects"), ("fallback background", "sky"),
    ):  # fmt: skip
        assert level1.classes[int(table[label]["level1"])] == group
    lite = load("idd_lite", tmp_path)
    assert level1.classes == lite.classes and level1.palette == lite.palette


@pytest.mark.parametrize("name", ENCODINGS)
def test_each_encoding_is_read_from_its_own_file(name, tmp_path, caplog):
    column, kind = ENCODINGS[name]
    last = len(members(column)) - 1
    ids, expected = {
        "idd_home_made": ([[255, 1, 2, 4, 25], [0, 3, 26, 254, 9]], [[0, 1, 2, 4, 25], [255, 255, 255, 255, 9]]),
        "idd_ids": ([[0, 34, 35, 36], [37, 38, 39, 255]], [[0, 34, 255, 255], [255] * 4]),
    }.get(name, ([[0, last, 255]], [[0, last, 255]]))
    for _, other in ENCODINGS.values():  # all lie beside one another
        add(tmp_path, "val", "7/a", np.full((2, 2), 1), kind=other)
    add(tmp_path, "val", "7/a", ids, kind=kind)
    data = instantiate(load(name, tmp_path).reader)(split="val")
    assert data.names == ["7/a"]
    np.testing.assert_array_equal(data.mask(0), expected)
    warned = "255 is void in IDD but road here, and true road (0) is dropped" in caplog.text
    assert warned == (name == "idd_home_made") and len(caplog.records) == warned


def test_the_home_made_remap_is_total(tmp_path):
    add(tmp_path, "train", "7/a", np.arange(256).reshape(16, 16), kind="labelIds")
    mask = idd(tmp_path, "train", **CLASSES, encoding="home_made").mask(0).ravel()
    kept = {1, 2, *range(4, 26)}
    assert mask.tolist() == [0 if k == 255 else k if k in kept else 255 for k in range(256)]
    own = idd(tmp_path, "train", **CLASSES, encoding="home_made", ignore_index=254, masks=Masks(ids={25: 24}))
    assert own.mask(0).ravel()[[0, 25, 30, 255]].tolist() == [254, 24, 254, 0]
    assert "official" in load("idd", tmp_path) and "official" not in load("idd_home_made", tmp_path)


def test_a_part_in_png_and_one_in_jpg(tmp_path):
    first, second = tmp_path / "IDD_Segmentation", tmp_path / "idd20kII"
    add(first, "train", "0/000001")
    add(first, "val", "1/000002")
    add(second, "train", "201/frame0014", [[7, 7], [7, 7]], suffix=".jpg")
    add(second, "train", "201/frame0029", suffix=".JPEG")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden/leftImg8bit/train").mkdir(parents=True)
    train = idd(tmp_path, "train", **CLASSES, palette=PALETTE)
    assert train.names == ["0/000001", "201/frame0014", "201/frame0029"]
    sample = train[1]
    assert sample["name"] == "201/frame0014" and sample["image"].shape == (3, 2, 2)
    assert sample["mask"].tolist() == [[7, 7], [7, 7]] and train.palette[3] == (3, 3, 3)
    assert train[0]["mask"].tolist() == [[0, 25], [255, 3]] and train.mask(0).dtype == np.uint8
    assert idd(tmp_path, "val", **CLASSES).names == ["1/000002"]  # only one part has this split
    assert idd(second, "train", **CLASSES).names == ["201/frame0014", "201/frame0029"]
    assert train.fingerprint() != idd(second, "train", **CLASSES).fingerprint()


def test_parts_with_drives_of_one_name(tmp_path):
    for part in ("a", "b"):
        add(tmp_path / part, "train", "5/x")
        add(tmp_path / part, "val", f"{part}9/x")
    # a drive is shared in train, so val has the part in front too: folds put both together
    assert idd(tmp_path, "train", **CLASSES).names == ["a/5/x", "b/5/x"]
    assert idd(tmp_path, "val", **CLASSES).names == ["a/a9/x", "b/b9/x"]
    assert idd(tmp_path / "a", "train", **CLASSES).names == ["5/x"]


@pytest.mark.parametrize("shared", [True, False])
def test_folds_keep_drives_whole(tmp_path, shared):
    for part, start in (("a", 0), ("b", 0 if shared else 100)):
        for drive in range(start, start + 4):
            for image in range(drive % 4 + 1):
                add(tmp_path / part, "val" if drive % 4 == 3 else "train", f"{drive}/{image:06d}")
    seen = []
    for fold in range(3):
        cfg = load("idd", tmp_path, "data.folds=3", f"data.fold={fold}")
        train, val = (instantiate(cfg.reader)(split=split).names for split in ("train", "val"))
        drives = [{name.rsplit("/", 1)[0] for name in names} for names in (train, val)]
        assert not drives[0] & drives[1] and len(drives[0] | drives[1]) == 8  # a/0 and b/0 are two drives
        assert re.match(r"^[ab]/\d/\d{6}$" if shared else r"^\d+/\d{6}$", val[0])
        seen += val
    assert len(seen) == len(set(seen)) == 20


def test_missing_label_maps_name_the_preparation_command(tmp_path):
    add(tmp_path, "train", "0/a", polygons=True)
    add(tmp_path, "train", "0/b", None, polygons=True)
    assert_refused(
        lambda: prepare_dataset(idd(tmp_path, "train", **CLASSES), split="train"),
        *("has no gtFine_labellevel3Ids.png in", "\n- 0/b: ", " on_error=skip"),
        f"python -m dinoseg mode=prepare data=idd data.root={tmp_path}",
    )
    for name in ("idd_level2", "idd_cityscapes", "idd_ids"):
        reader = instantiate(load(name, tmp_path).reader)
        assert_refused(partial(reader, split="train"), f"mode=prepare data={name} data.root=")
    thirty = [str(i) for i in range(30)]
    command = "data=idd data.reader.encoding=level4Id data.root="
    refused(tmp_path, "train", command, classes=thirty, encoding="level4Id")
    remedy = "Create the official label maps from the polygons and use data=idd"
    refused(tmp_path, "train", remedy, encoding="home_made")


def test_the_test_split_has_no_public_labels(tmp_path):
    add(tmp_path, "test", "0/a", None)
    refused(tmp_path, "test", "labels of IDD's test split are not public. Use split val")
    add(tmp_path, "test", "0/b")  # somebody who has them, but not all
    partly = idd(tmp_path, "test", **CLASSES)
    assert partly.names == ["0/b"] and "and no polygons to create it from" in partly.lacking["0/a"]


def test_unpaired_idd_files_are_reported(tmp_path):
    add(tmp_path, "train", "0/a")
    add(tmp_path, "train", "0/b", None)
    bare = idd(tmp_path, "train", **CLASSES)
    assert list(bare.lacking) == ["0/b"] and bare.remedy == "Unpack the archive again, or remove the images."
    (tmp_path / "leftImg8bit/train/0/b_leftImg8bit.png").unlink()
    save(tmp_path / "gtFine/train/3/c_gtFine_labellevel3Ids.png", [[0]])
    lone = idd(tmp_path, "train", **CLASSES)
    assert lone.names == ["0/a"] and "c_gtFine_labellevel3Ids.png has no image in" in lone.lacking["3/c"]
    words = ("Split train has 1 image with a mask, and 1 incomplete pairs:\n- 3/c: ", "label maps.\nTo")
    assert_refused(lambda: prepare_dataset(lone, split="train"), *words)
    shutil.rmtree(tmp_path / "gtFine/train/3")
    add(tmp_path, "train", "0/a", suffix=".jpg")
    refused(tmp_path, "train", "a_leftImg8bit.jpg and ", "a_leftImg8bit.png have the same name (0/a)")


def test_missing_idd_folders_are_reported(tmp_path):
    refused(tmp_path / "gone", "train", "does not hold IDD: no leftImg8bit or gtFine in it", "It holds nothing. Give")
    (tmp_path / "idd-20k-II.tar.gz").write_bytes(b"")
    refused(tmp_path, "train", "Unpack idd-20k-II.tar.gz there first", "filter='data'")
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    refused(tmp_path, "train", "leftImg8bit/train holds no image {drive}/{id}_leftImg8bit.png")
    refused(tmp_path, "val", "No folder ", "leftImg8bit/val: the splits there are train. Check data.root")


def test_incompatible_settings_are_refused(tmp_path):
    add(tmp_path, "train", "0/a")
    words = ("encoding=level3 is unknown. Choose one of id, csId, ", ", home_made")
    refused(tmp_path, "train", *words, encoding="level3")
    words = ("has 26 names", "the ids of data.reader.encoding=level2Id go from 0 to 15")
    refused(tmp_path, "train", *words, encoding="level2Id")
    by_fraction = Partition(by="fraction")
    refused(tmp_path, "train", "partition.by=fraction: IDD has split folders", partition=by_fraction)
    merged = idd(tmp_path, "train", classes=["road", "other"], masks=Masks(ids={25: 1, 3: 255}))
    assert merged.mask(0).tolist() == [[0, 1], [255, 255]]


@pytest.fixture
def road_lost(tmp_path):
    """Label maps of train and val with neither 0, road, nor 3, rail track, under both names."""
    for split in ("train", "val"):
        for kind in ("labellevel3Ids", "labelIds", "labellevel2Ids"):
            add(tmp_path, split, f"{split}/a", ((1, 14), (255, 5)), kind=kind)
    return tmp_path


def check(root, **options):
    """Check both splits as before a training."""
    sides = [idd(root, split, **CLASSES | options) for split in ("train", "val")]
    check_for_errors(*sides, cache_dir=root / "cache")


def test_label_maps_without_road_stop_training(road_lost, caplog):
    words = ("255 is void", "these labels look home-made", "mode=prepare data=idd", "train/a_gtFine_labellevel3Ids.png")
    assert_refused(lambda: check(road_lost), *words)
    remap = Masks(ids={255: 0, 0: 255, 3: 255})
    assert_refused(lambda: check(road_lost, masks=remap), *words)  # what is in the files counts, not the classes
    sides = [idd(road_lost, split, **CLASSES) for split in ("train", "val")]
    packed = [pack(side, cache_dir=road_lost / "packed", workers=1) for side in sides]
    assert_refused(lambda: check_for_errors(*packed, cache_dir=road_lost / "cache"), *words)
    check(road_lost, encoding="home_made")
    assert words[1] in caplog.text  # on purpose, so training only warns
    add(road_lost, "val", "val/b", ((3, 14), (255, 5)))
    check(road_lost)  # rail track


def test_only_idd_is_checked_for_road(road_lost, caplog):
    check(road_lost, classes=list("abcdefghijklmnop"), encoding="level2Id")
    layout = FolderLayout("leftImg8bit/{split}", "gtFine/{split}", "_leftImg8bit", "_gtFine_labellevel3Ids")
    names = load("idd", road_lost).classes
    sides = [folder_dataset(road_lost, split, classes=names, layout=layout) for split in ("train", "val")]
    check_for_errors(*sides, cache_dir=road_lost / "cache")
    assert not caplog.records


def test_idd_labels_of_another_name(tmp_path):
    save(tmp_path / "gtFine/val/7/a_gtFine_labelIds.png", [[1, 24], [255, 5]])
    assert len(home_made_files(tmp_path)) == 1
    save(tmp_path / "gtFine/val/7/b_gtFine_labelIds.png", [[0, 24], [255, 5]])
    assert home_made_files(tmp_path) == [] == home_made_files(tmp_path / "gone")


@pytest.mark.parametrize("image", ["_image", "_leftImg8bit"])
def test_idd_lite_of_another_release(tmp_path, image):
    save(tmp_path / f"leftImg8bit/val/7/a{image}.jpg", np.zeros((2, 2, 3)))
    save(tmp_path / "gtFine/val/7/a_gtFine_labellevel1Ids.png", [[0, 6], [255, 3]])
    save(tmp_path / "gtFine/val/7/a_inst_label.png", [[9, 9], [9, 9]])
    layout = "data.reader.layout"
    cfg = load("idd_lite", tmp_path, f"{layout}.mask_suffix=_gtFine_labellevel1Ids", f"{layout}.image_suffix={image}")
    data = instantiate(cfg.reader)(split="val")
    assert data.names == ["7/a"] and data.mask(0).tolist() == [[0, 6], [255, 3]]


@pytest.mark.heavy
def test_home_made_labels_train_with_a_warning_by_their_name(tmp_path):
    draw = np.random.default_rng(1)
    for name in [*(f"train/{number}" for number in range(3)), *(f"val/{number}" for number in range(2))]:
        save(tmp_path / f"idd/leftImg8bit/{name}/f_leftImg8bit.png", draw.integers(0, 256, (32, 48, 3)))
        ids = draw.choice([1, 2, 4, 5, 9, 25, 26, 255], (32, 48))  # neither 0, road, nor 3, rail track
        save(tmp_path / f"idd/gtFine/{name}/f_gtFine_labelIds.png", ids)
    words = [word for word in SMALL if not word.startswith(("data=", "data.classes=", "data.root="))]
    words += ["data.root=idd", "trainer.val_every=2", "mode.metrics_only=true", "hydra.run.dir=run"]
    done = call(tmp_path, "mode=train", *words, "data=idd_home_made")
    assert done.status == 0, done.err
    assert "data=idd_home_made trains on a custom remap: 255 is void in IDD but road here, and" in done.err
    assert "these labels look home-made or remapped" in done.err and list(tmp_path.rglob("run/**/scores.json"))
