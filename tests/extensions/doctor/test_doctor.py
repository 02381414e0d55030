"""Every check of the doctor: a planted fault that it must find, beside a clean twin in which it must find nothing."""

import json
import shutil
import tracemalloc
from dataclasses import replace

import cv2
import numpy as np
import pytest
from doctor_sets import (
    CLASSES,
    PALETTE,
    findings_by_code,
    only_finding,
    open_split,
    rewrite,
    rewrite_all,
    scene,
    splits_of,
    write,
    write_clean,
)
from making import DATA, save, write_video
from mistakes import assert_refused
from PIL import Image

from dinoseg.data.classes.masks import Masks
from dinoseg.data.formats.folder import FolderLayout
from dinoseg.data.splits import Partition
from dinoseg.extensions.doctor.details import compute_perceptual_hash
from dinoseg.extensions.doctor.duplicates import near_pairs
from dinoseg.extensions.doctor.examine import examine, summary

pytestmark = pytest.mark.slow  # scans a data set in each test


@pytest.fixture
def root(tmp_path):
    """A clean data set of two drives for training and one for validation."""
    return write_clean(tmp_path)


def test_clean_dataset_has_only_informative_notes(root):
    assert findings_by_code(root) == {}
    findings = examine(splits_of(root))
    assert [f.code for f in findings] == ["constant_class_baseline"] * 2 + ["class_imbalance"]
    assert {f.severity for f in findings} == {"note"}


def test_ids_without_class_are_findings(root):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: np.where(mask == 2, 9, mask))
    rewrite(root / "val/masks/v/f3.png", lambda mask: np.where(mask == 2, 9, 2) + (mask == 1) * 10)
    finding = only_finding(root, "foreign_ids", "error")
    assert "2 of 16 masks" in finding.message and "9 (in 2), 12 (in 1)" in finding.message
    assert [file.rsplit("/", 1)[1] for file in finding.files] == ["f0.png", "f3.png"]
    assert finding.reasons[1] == f"{root}/val/masks/v/f3.png: 9, 12"
    assert "'++data.reader.masks.ids={9: 255, 12: 255}'" in finding.remedy  # all of them, as a shell takes them
    assert findings_by_code(root, options={"masks": Masks(ids={9: 2, 12: 255})}) == {}


def test_colors_without_class_are_findings(root):
    table = np.array(PALETTE, np.uint8)
    rewrite_all(root, lambda mask: table[mask])
    assert findings_by_code(root, options={"masks": Masks("palette")}) == {}
    pixels = table[scene(5)[1]]
    pixels[3, 4:6] = (1, 2, 3)
    save(root / "train/masks/d1/f5.png", pixels)
    finding = only_finding(root, "foreign_ids", "error", options={"masks": Masks("palette")})
    assert "(1, 2, 3) (in 1)" in finding.message
    assert "'data.reader.masks.ignore_colors=[[1, 2, 3]]'" in finding.remedy
    assert findings_by_code(root, options={"masks": Masks("palette", ignore_colors=[(1, 2, 3)])}) == {}


def test_foreign_ids_in_binary_masks_get_a_fitting_remedy(root):
    rewrite_all(root, lambda mask: (mask > 0) * 255)
    two = {"classes": CLASSES[:2], "palette": None, "masks": Masks("binary")}
    rewrite(root / "train/masks/d0/f0.png", lambda mask: np.where(mask == 0, 3, mask))
    rewrite(root / "train/masks/d0/f1.png", lambda mask: np.where(mask == 255, 250, mask))
    assert "threshold at 128" in findings_by_code(root, options=two)["foreign_ids"].remedy


TURNED = {1: [], 3: ["turned_by_exif"], 6: ["size_mismatch", "turned_by_exif"]}  # a quarter turn shows in the size


@pytest.mark.parametrize("turn", TURNED)
def test_images_turned_by_exif_are_findings(root, turn):
    for name, kept in (("d0/f2", turn), ("d1/f5", 1)):
        image = Image.open(root / f"train/images/{name}.png")
        exif = image.getexif()
        exif[0x0112] = kept
        image.save(root / f"train/images/{name}.png", exif=exif)
    findings = findings_by_code(root)
    assert sorted(findings) == TURNED[turn]
    if turn != 1:
        turned = findings["turned_by_exif"]
        assert turned.severity == "warning" and "1 of 16 images" in turned.message
        assert turned.files == (f"{root}/train/images/d0/f2.png",) and turned.look == (("train", "d0/f2"),)


def test_size_mismatches_are_findings(root):
    for name in ("d0/f1", "d2/f9"):
        rewrite(root / f"train/masks/{name}.png", lambda mask: mask[::2, ::2])
    only = only_finding(root, "size_mismatch", "error")
    assert len(only.files) == 2 and "2 of 16" in only.message
    assert only.reasons[0] == f"{only.files[0]}: 64 x 48, its image 128 x 96"
    assert "on_size_mismatch=resize_mask" in only.remedy


def test_masks_of_other_proportions_cannot_be_resized(root):
    rewrite(root / "train/masks/d0/f1.png", lambda mask: mask[::2, ::2])
    rewrite(root / "train/masks/d2/f9.png", lambda mask: mask.T)
    findings = findings_by_code(root, options={"masks": Masks(on_size_mismatch="resize_mask")})
    assert findings.keys() == {"size_mismatch", "resized_masks"}
    only = findings["size_mismatch"]
    assert only.severity == "error" and "1 of 16" in only.message and "of the image's aspect ratio" in only.remedy
    assert only.reasons == (f"{root}/train/masks/d2/f9.png: 96 x 128, its image 128 x 96",)
    resized = findings["resized_masks"]
    assert resized.severity == "warning" and resized.files == (f"{root}/train/masks/d0/f1.png",)
    assert "resize_mask" not in resized.remedy  # what is set already is not advised


def test_masks_saved_with_loss(root):
    path = root / "train/masks/d0/f2.png"
    save(path, np.full((96, 128), 1), format="JPEG", quality=100)  # under the name of a PNG, and by luck no other ids
    finding = only_finding(root, "mask_is_jpeg", "error")
    assert finding.files == (str(path),) and "1 of 16 masks are JPEG files" in finding.message
    assert "does not restore the ids" in finding.remedy
    save(path, np.full((96, 128), 99), format="JPEG")
    assert list(findings_by_code(root))[:2] == ["mask_is_jpeg", "foreign_ids"]


def test_missing_and_similar_classes_are_findings(root):
    rewrite_all(root, lambda mask: np.where(mask == 2, 1, mask), "val/masks/v/*")
    findings = findings_by_code(root, options={"classes": (*CLASSES, "moon"), "palette": None})
    assert findings.keys() == {"class_never_seen", "class_only_in_train"}
    assert "In no mask at all: 3 moon (1 of 4 classes)." in findings["class_never_seen"].message
    assert "In train but not in val: 2 right." in findings["class_only_in_train"].message
    rewrite_all(root, lambda mask: np.where(mask == 1, 2, mask), "train/masks/*/*.png")
    findings = findings_by_code(root)
    assert findings["class_not_in_train"].severity == "warning"
    assert "In val but not in train: 1 left." in findings["class_not_in_train"].message
    similar = findings_by_code(root, options={"classes": [CLASSES[0], "Cat ", "cat"]})["similar_class_names"]
    assert similar.severity == "warning" and "'Cat ', 'cat'" in similar.message


def test_void_masks_are_findings(root):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: mask * 0 + 255)
    findings = findings_by_code(root)
    assert findings.keys() == {"all_void"} and findings["all_void"].files[0].endswith("d0/f0.png")
    rewrite_all(root, lambda mask: np.where(mask == 0, 255, mask), "val/masks/v/*")
    findings = findings_by_code(root)
    assert findings["much_void"].severity == "warning" and "pixels of val are ignored" in findings["much_void"].message


def test_binary_masks_read_as_ids(root):
    rewrite_all(root, lambda mask: (mask > 0) * 255)
    two = {"classes": CLASSES[:2], "palette": None}

    def found(**options):
        return [each for each in examine(splits_of(root, **two, **options)) if each.code == "binary_read_as_ids"]

    assert [each.severity for each in found()] == ["error", "warning"]  # train and val
    assert all("format=binary" in each.remedy for each in found())
    assert findings_by_code(root, options={**two, "masks": Masks("binary")}) == {}
    assert findings_by_code(root, options={**two, "masks": Masks(ids={255: 1})}) == {}
    assert ["255 is ignored or no class" in each.message for each in found(ignore_index=254)] == [True, True]
    finding = findings_by_code(root, options={"classes": CLASSES[:1], "palette": None})["one_class"]
    assert finding.severity == "error" and finding.stops
    assert f"data.classes=[background,{CLASSES[0]}]" in finding.remedy and "format=binary" in finding.remedy


def test_drive_in_two_splits_is_a_finding(root):
    for kind in ("images", "masks"):
        (root / f"val/{kind}/d1").mkdir()
        shutil.move(root / f"train/{kind}/d1/f4.png", root / f"val/{kind}/d1/f4.png")
    finding = only_finding(root, "group_on_both_sides", "error")
    assert "1 video or drive " in finding.message and "both in train and in val: d1. " in finding.message
    assert "Official splits can have this" in finding.message
    assert {file.rsplit("/", 1)[1] for file in finding.files} == {f"f{n}.png" for n in range(4, 8)}
    assert findings_by_code(root, group=r"f\d+$").keys() == {"group_on_both_sides"}  # f0 to f3 are in both
    assert findings_by_code(root, group=r"^.*$") == {}
    assert_refused(lambda: findings_by_code(root, group="^nothing"), "data.group=^nothing does not match the name")


def test_names_without_folder_are_no_groups(tmp_path):
    write(tmp_path, "train", ["x", "y"])
    write(tmp_path, "val", ["x", "z"], first=50)
    assert findings_by_code(tmp_path) == {}
    assert findings_by_code(tmp_path, group="^(.)").keys() == {"group_on_both_sides"}


def test_duplicates_across_splits(root):
    for index, (image, mask) in enumerate((scene(3), scene(7))):
        if index:  # smaller and brighter
            image = cv2.convertScaleAbs(cv2.resize(image, (124, 93)), beta=4)
            mask = cv2.resize(mask, (124, 93), interpolation=cv2.INTER_NEAREST)
        (root / f"val/images/v/f{index}.png").unlink()
        save(root / f"val/images/v/f{index}.{'png' if index else 'bmp'}", image)  # another file, the same pixels
        save(root / f"val/masks/v/f{index}.png", mask)
    findings = findings_by_code(root)
    assert findings.keys() == {"duplicate_across_splits", "near_duplicate_across_splits"}
    same, near = findings["duplicate_across_splits"], findings["near_duplicate_across_splits"]
    assert same.severity == "error"
    assert same.files == (f"{root}/train/images/d0/f3.png = {root}/val/images/v/f0.bmp",)
    assert near.files[0].startswith(f"{root}/train/images/d1/f7.png ~ {root}/val/images/v/f1.png (")
    assert len(near.files) == 1 and near.look == (("train", "d1/f7"), ("val", "v/f1"))


def test_duplicates_inside_a_split(root):
    for kind in ("images", "masks"):
        shutil.copy(root / f"train/{kind}/d0/f0.png", root / f"train/{kind}/d2/f8.png")
    only_finding(root, "duplicate_in_split", "note")
    rewrite(root / "train/masks/d2/f8.png", lambda mask: np.where(mask == 1, 2, mask))
    assert findings_by_code(root).keys() == {"duplicate_in_split", "one_image_two_masks"}
    image = scene(0)[0]
    image[:, :, 0] = np.clip(image[:, :, 0].astype(int) + 3, 0, 255)
    save(root / "train/images/d2/f8.png", image)
    assert findings_by_code(root) == {}  # nearly equal images within a split are normal


def test_perceptual_hash_survives_compression_and_scaling():
    def bits(one, two):
        return (compute_perceptual_hash(one) ^ compute_perceptual_hash(two)).bit_count()

    pictures = [
        cv2.resize(coarse.astype(np.uint8), (128, 96), interpolation=cv2.INTER_CUBIC)
        for coarse in np.random.default_rng(0).integers(0, 256, (12, 6, 7, 3))
    ]
    for one in pictures:
        done, data = cv2.imencode(".jpg", one, [cv2.IMWRITE_JPEG_QUALITY, 40])
        assert done and bits(one, cv2.imdecode(data, cv2.IMREAD_COLOR)) <= 4
        assert bits(one, cv2.resize(one, (80, 61), interpolation=cv2.INTER_AREA)) <= 4
        assert bits(one, cv2.convertScaleAbs(one, alpha=0.9, beta=5)) <= 4
    apart = [bits(one, two) for index, one in enumerate(pictures) for two in pictures[:index]]
    assert min(apart) > 10
    assert compute_perceptual_hash(np.full((30, 30, 3), 90, np.uint8)) is None


def test_near_pairs_against_counting_bits():
    draw = np.random.default_rng(4)
    first = draw.integers(0, 2**63, 300, dtype=np.uint64)
    second = np.concatenate([first[:40], draw.integers(0, 2**63, 5, dtype=np.uint64)])
    for index in range(40):
        for bit in draw.choice(64, index % 9, replace=False):
            second[index] ^= np.uint64(1) << np.uint64(bit)
    same = np.arange(300) % 50, np.arange(45) % 50 + 100
    same[1][:4] = [0, 1, 2, 10]  # three of the pairs are of equal pictures
    found = near_pairs(first, second, 6, same=same)
    expected = [
        (i, j, bits)
        for i, one in enumerate(first.tolist())
        for j, two in enumerate(second.tolist())
        if same[0][i] != same[1][j] and (bits := (one ^ two).bit_count()) <= 6
    ]
    assert set(found.closest) == set(expected) and len(expected) >= 25
    assert [bits for _, _, bits in found.closest] == sorted(bits for _, _, bits in expected)
    assert found.second == len({j for _, j, _ in expected})
    assert near_pairs(first[:0], second, 6, same=(same[0][:0], same[1])).closest == []


def test_frames_that_are_all_alike_cost_no_memory():
    count = 3000  # 9 million pairs, of which few are kept
    looks = np.full(count, 0x5A5A, np.uint64) ^ (np.uint64(1) << (np.arange(count) % 3).astype(np.uint64))
    every = np.arange(count)
    tracemalloc.start()
    near = near_pairs(looks, looks, 6, same=(every, every))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert near.second == count and len(near.closest) == 1000 and peak < 40e6
    assert {bits for _, _, bits in near.closest} == {0}


def swap(one, two):
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def test_swapped_pair_is_a_finding(root):
    first, second = root / "train/masks/d0/f1.png", root / "train/masks/d2/f10.png"
    swap(first, second)
    finding = only_finding(root, "swapped_pair", "warning")
    assert finding.files == (f"{first} <-> {second}",) and finding.look == (("train", "d0/f1"), ("train", "d2/f10"))
    swap(first, second)
    shutil.copy(first, second)
    only_finding(root, "one_mask_many_images", "warning")


def test_masks_shifted_by_one_are_findings(root):
    masks = sorted((root / "train/masks").rglob("*.png"))
    contents = [mask.read_bytes() for mask in masks]
    for index, mask in enumerate(masks):
        mask.write_bytes(contents[index - 1])
    assert "1 place later" in only_finding(root, "masks_shifted", "error").message


def test_masks_that_follow_no_edges_are_not_called_swapped(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(60):
        save(tmp_path / f"train/images/{number}.png", draw.integers(0, 256, (48, 64, 3)))
        save(tmp_path / f"train/masks/{number}.png", draw.integers(0, 3, (48, 64)))
    codes = {finding.code for finding in examine(splits_of(tmp_path, splits=("train",)))}
    assert not codes & {"swapped_pair", "masks_shifted"}


def test_masks_against_the_video(tmp_path):
    video = tmp_path / "video_01"
    write_video(video / "video_left.avi", 125)
    for number in (0, 60, 120):
        image, mask = scene(number, (32, 64))
        save(video / f"rgb/{number:09d}.png", image)
        save(video / f"segmentation/{number:09d}.png", mask)
    layout = FolderLayout("video_01/rgb", "video_01/segmentation")
    options = {"splits": ("train",), "layout": layout, "partition": Partition("lists", {"train": "all.txt"})}

    def findings_of(*numbers):
        (tmp_path / "all.txt").write_text("".join(f"{number:09d}\n" for number in numbers))
        return findings_by_code(tmp_path, options=options)

    assert findings_of(0, 60, 120) == {}
    (video / ".prepared.json").write_text(json.dumps({"decoded": 125}))
    (video / "segmentation/000000120.png").unlink()
    (video / "rgb/000000120.png").unlink()
    (finding,) = findings_of(0, 60).values()
    assert (finding.code, finding.severity) == ("masks_against_video", "error")
    assert "125 frames, so segmentation/ should have 3 masks" in finding.message
    assert "has 2 (missing: 000000120; without a frame: none)" in finding.message
    save(video / "segmentation/000000121.png", scene(1, (32, 64))[1])
    findings = findings_of(0, 60)
    assert "without a frame: 000000121" in findings["masks_against_video"].message
    assert findings["masks_without_frame"].files[0].endswith("000000121.png")


def test_summary_of_images_classes_sizes_and_constant_class(root):
    (part,) = splits_of(root, splits=["train"])
    rows = summary(part)
    assert rows["images"] == 12 and rows["void_share"] == 0
    assert rows["smallest"] == rows["largest"] == {"width": 128, "height": 96}
    assert sum(row["share"] for row in rows["classes"]) == pytest.approx(1)
    assert sum(row["pixels"] for row in rows["classes"]) == 12 * 96 * 128 and rows["classes"][0]["images"] == 12
    pixels = np.concatenate([data.ravel() for data in map(open_split(root, "train").mask, range(len(part.records)))])
    ious = [(pixels == 0).mean(), 0, 0]  # of a prediction of class 0 everywhere
    assert rows["constant_class"] == {
        "class": 0,
        "accuracy": pytest.approx((pixels == 0).mean(), rel=1e-12),
        "miou": pytest.approx(np.mean(ious), rel=1e-12),
    }
    sizes = [(97, 333), (123, 201), (211, 317), (241, 160)]  # ordered by their pixels
    records = [replace(record, image_size=size) for record, size in zip(part.records, sizes, strict=False)]
    rows = summary(replace(part, records=records))
    assert (rows["smallest"], rows["largest"]) == ({"width": 201, "height": 123}, {"width": 317, "height": 211})


def real(test):
    """Mark a test of real data, which is skipped where there are none."""
    absent = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}: set DINOSEG_DATA")
    return pytest.mark.data(absent(test))


@real
def test_idd_lite_is_clean_until_a_pair_is_swapped(tmp_path):
    for split, count in (("train", 60), ("val", 20)):
        images = sorted((DATA / "idd20k_lite/leftImg8bit" / split).rglob("*_image.jpg"))
        for image in images[:: len(images) // count][:count]:
            for top, name in (("leftImg8bit", image.name), ("gtFine", image.name.replace("_image.jpg", "_label.png"))):
                target = tmp_path / top / split / image.parent.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(DATA / "idd20k_lite" / top / split / image.parent.name / name, target)
    layout = FolderLayout("leftImg8bit/{split}", "gtFine/{split}", "_image", "_label", ["*_inst_label.png"])
    options = {"classes": list("abcdefg"), "palette": None, "layout": layout}

    def faults():
        return [each for each in findings_by_code(tmp_path, options=options).values() if each.severity != "note"]

    assert faults() == []
    masks = sorted((tmp_path / "gtFine/train").rglob("*_label.png"))
    swap(masks[3], masks[40])
    (fault,) = faults()
    assert fault.code == "swapped_pair" and fault.files == (f"{masks[3]} <-> {masks[40]}",)


@real
def test_person_has_163_masks_of_another_size():
    layout = FolderLayout("{split}_images", "{split}_masks", splits={"val": "valid"})
    options = {"classes": ["background", "person"], "palette": None, "layout": layout}
    masks = Masks("binary", on_size_mismatch="resize_mask")
    findings = examine(splits_of(DATA / "person", images=False, masks=masks, **options))
    (sizes,) = [finding for finding in findings if finding.code == "resized_masks"]
    assert "resize_mask" not in sizes.remedy
    assert sizes.severity == "warning" and len(sizes.files) == len(set(sizes.files)) == 163
    assert "163 of 241" in sizes.message and not [f for f in findings if f.severity == "error"]


@real
def test_other_real_sets_are_examined():
    binary = {"classes": ["background", "object"], "palette": None, "masks": Masks("binary")}
    flat = Partition("fraction", val_fraction=0.5)
    endovis = splits_of(DATA / "endovis2017", layout=FolderLayout("images", "masks"), partition=flat, **binary)
    assert not [f for f in examine(endovis) if f.severity == "error"]
    davis = FolderLayout("JPEGImages/480p", "Annotations/480p")
    by_video = Partition("fraction", val_fraction=0.25, group="^([^/]+)/")
    parts = splits_of(DATA / "davis2016", images=False, layout=davis, partition=by_video, **binary)
    assert not [f for f in examine(parts) if f.severity == "error"]
    camvid = {"classes": [str(index) for index in range(11)], "palette": None, "masks": Masks(ids={11: 255})}
    parts = splits_of(DATA / "camvid", images=False, **camvid)
    assert [f.code for f in examine(parts, group="^([^_]+)") if f.severity == "error"] == ["group_on_both_sides"]


def test_ids_in_the_alpha_channel_are_a_warning(root):
    for path in root.rglob("masks/**/*.png"):
        ids = np.array(Image.open(path))
        Image.fromarray(np.dstack([np.zeros_like(ids)] * 3 + [ids])).save(path)
    finding = findings_by_code(root)["ids_in_alpha"]
    assert finding.severity == "warning" and "16 of 16 masks" in finding.message and "grey PNG" in finding.remedy
