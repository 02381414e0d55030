"""Every check of the doctor: a planted fault that it must find, beside a clean twin in which it must find nothing."""

import json
import shutil
import tracemalloc
from dataclasses import replace

import cv2
import numpy as np
import pytest
from doctor_sets import CLASSES, PALETTE, findings_by_code, open_split, rewrite, scene, splits_of, write, write_clean
from making import DATA, save, write_video
from PIL import Image

from dinoseg.data.classes.masks import Masks
from dinoseg.data.doctor.checks.duplicates import near_pairs
from dinoseg.data.doctor.errors import find_errors
from dinoseg.data.doctor.examine import examine, summary
from dinoseg.data.doctor.suggestions import constant_class
from dinoseg.data.formats.folder import FolderLayout
from dinoseg.data.formats.idd_files import home_made_files
from dinoseg.data.splits import Partition
from dinoseg.utils.errors import UserError

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


def test_unreadable_files_are_findings(root):
    image, mask = root / "train/images/d0/f1.png", root / "val/masks/v/f2.png"
    for path in (image, mask):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    findings = findings_by_code(root)
    assert findings.keys() == {"unreadable_image", "unreadable_mask"}
    assert findings["unreadable_image"].files == (str(image),) and findings["unreadable_mask"].files == (str(mask),)
    assert all(f.severity == "error" and "1 of 16" in f.message for f in findings.values())


def test_ids_without_class_are_findings(root):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: np.where(mask == 2, 9, mask))
    rewrite(root / "val/masks/v/f3.png", lambda mask: np.where(mask == 2, 9, 2) + (mask == 1) * 10)
    findings = findings_by_code(root)
    assert findings.keys() == {"foreign_ids"}
    assert findings["foreign_ids"].severity == "error" and "2 of 16 masks" in findings["foreign_ids"].message
    assert "9 (in 2), 12 (in 1)" in findings["foreign_ids"].message
    assert [file.rsplit("/", 1)[1] for file in findings["foreign_ids"].files] == ["f0.png", "f3.png"]
    assert findings["foreign_ids"].reasons[1] == f"{root}/val/masks/v/f3.png: 9, 12"
    # all of them, as a shell takes them
    assert "'++data.reader.masks.ids={9: 255, 12: 255}'" in findings["foreign_ids"].remedy
    described = findings_by_code(root, options={"masks": Masks(described={"ids": None})})["foreign_ids"]
    assert "`ignore: {ids: [9, 12]}`" in described.remedy and "data.reader.masks" not in described.remedy
    assert findings_by_code(root, options={"masks": Masks(ids={9: 2, 12: 255})}) == {}


def test_colors_without_class_are_findings(root):
    table = np.array(PALETTE, np.uint8)
    for path in root.glob("*/masks/*/*.png"):
        rewrite(path, lambda mask: table[mask])
    assert findings_by_code(root, options={"masks": Masks("palette")}) == {}
    odd = root / "train/masks/d1/f5.png"
    pixels = table[scene(5)[1]]
    pixels[3, 4:6] = (1, 2, 3)
    save(odd, pixels)
    findings = findings_by_code(root, options={"masks": Masks("palette")})
    assert findings.keys() == {"foreign_ids"} and "(1, 2, 3) (in 1)" in findings["foreign_ids"].message
    assert "'data.reader.masks.ignore_colors=[[1, 2, 3]]'" in findings["foreign_ids"].remedy
    described = findings_by_code(root, options={"masks": Masks("palette", described={"ids": None})})["foreign_ids"]
    assert "`ignore: {colors: [[1, 2, 3]]}`" in described.remedy and "data.palette" not in described.remedy
    assert findings_by_code(root, options={"masks": Masks("palette", ignore_colors=[(1, 2, 3)])}) == {}


def test_foreign_ids_in_binary_masks_get_a_fitting_remedy(root):
    for path in root.glob("*/masks/*/*.png"):
        rewrite(path, lambda mask: (mask > 0) * 255)
    two = {"classes": CLASSES[:2], "palette": None, "masks": Masks("binary")}
    rewrite(root / "train/masks/d0/f0.png", lambda mask: np.where(mask == 0, 3, mask))
    rewrite(root / "train/masks/d0/f1.png", lambda mask: np.where(mask == 255, 250, mask))
    assert "threshold at 128" in findings_by_code(root, options=two)["foreign_ids"].remedy
    for path in root.glob("*/masks/*/*.png"):
        rewrite(path, lambda mask: np.where(mask > 128, 7, mask % 4))
    assert "format=ids" in findings_by_code(root, options=two)["foreign_ids"].remedy
    named = two | {"masks": Masks("binary", described={"ids": None})}
    assert "`masks: ids` in classes.yaml" in findings_by_code(root, options=named)["foreign_ids"].remedy


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_images_turned_by_exif_are_findings(root, turn):
    for name, kept in (("d0/f2", turn), ("d1/f5", 1)):
        image = Image.open(root / f"train/images/{name}.png")
        exif = image.getexif()
        exif[0x0112] = kept
        image.save(root / f"train/images/{name}.png", exif=exif)
    findings = findings_by_code(root)
    assert ("size_mismatch" in findings) == (turn == 6)  # only a quarter turn shows in the size
    assert ("turned_by_exif" in findings) == (turn != 1)
    if turn != 1:
        assert (
            findings["turned_by_exif"].severity == "warning" and "1 of 16 images" in findings["turned_by_exif"].message
        )
        assert findings["turned_by_exif"].files == (f"{root}/train/images/d0/f2.png",)
        assert findings["turned_by_exif"].look == (("train", "d0/f2"),)


@pytest.mark.parametrize("rule", ["error", "resize_mask"])
def test_size_mismatches_are_findings(root, rule):
    for name in ("d0/f1", "d2/f9"):
        rewrite(root / f"train/masks/{name}.png", lambda mask: mask[::2, ::2])
    findings = findings_by_code(root, options={"masks": Masks(on_size_mismatch=rule)})
    (only,) = findings.values()
    expected = ("warning", "resized_masks") if rule == "resize_mask" else ("error", "size_mismatch")
    assert (only.severity, only.code) == expected and len(only.files) == 2
    assert "2 of 16" in only.message and only.reasons[0] == f"{only.files[0]}: 64 x 48, its image 128 x 96"
    # what is set already is not advised
    assert ("on_size_mismatch=resize_mask" in only.remedy) == (rule == "error")


def test_masks_of_other_proportions_cannot_be_resized(root):
    rewrite(root / "train/masks/d0/f1.png", lambda mask: mask[::2, ::2])
    rewrite(root / "train/masks/d2/f9.png", lambda mask: mask.T)
    findings = findings_by_code(root, options={"masks": Masks(on_size_mismatch="resize_mask")})
    assert findings.keys() == {"size_mismatch", "resized_masks"}
    only = findings["size_mismatch"]
    assert only.severity == "error" and "1 of 16" in only.message and "resize_mask" not in only.remedy
    assert only.reasons == (f"{root}/train/masks/d2/f9.png: 96 x 128, its image 128 x 96",)
    assert findings["resized_masks"].files == (f"{root}/train/masks/d0/f1.png",)


def test_masks_saved_with_loss(root):
    path = root / "train/masks/d0/f2.png"
    save(path, np.full((96, 128), 1), format="JPEG", quality=100)  # under the name of a PNG, and by luck no other ids
    findings = findings_by_code(root)
    assert findings.keys() == {"mask_is_jpeg"} and findings["mask_is_jpeg"].files == (str(path),)
    assert "does not restore the ids" in findings["mask_is_jpeg"].remedy
    assert findings["mask_is_jpeg"].severity == "error" and "whatever their suffix" in findings["mask_is_jpeg"].message


def test_classes_missing_in_splits_are_findings(root):
    for path in (root / "val/masks/v").iterdir():
        rewrite(path, lambda mask: np.where(mask == 2, 1, mask))
    findings = findings_by_code(root, options={"classes": (*CLASSES, "moon"), "palette": None})
    assert findings.keys() == {"class_never_seen", "class_only_in_train"}
    assert "In no mask at all: 3 moon (1 of 4 classes)." in findings["class_never_seen"].message
    assert "In train but not in val: 2 right." in findings["class_only_in_train"].message
    for path in (root / "train/masks").rglob("*.png"):
        rewrite(path, lambda mask: np.where(mask == 1, 2, mask))
    findings = findings_by_code(root)
    assert findings["class_not_in_train"].severity == "warning"
    assert "In val but not in train: 1 left." in findings["class_not_in_train"].message


def test_void_masks_are_findings(root):
    rewrite(root / "train/masks/d0/f0.png", lambda mask: mask * 0 + 255)
    findings = findings_by_code(root)
    assert findings.keys() == {"all_void"} and findings["all_void"].files[0].endswith("d0/f0.png")
    for path in (root / "val/masks/v").iterdir():
        rewrite(path, lambda mask: np.where(mask == 0, 255, mask))
    findings = findings_by_code(root)
    assert findings["much_void"].severity == "warning" and "pixels of val are ignored" in findings["much_void"].message


def test_binary_masks_read_as_ids(root):
    for path in root.glob("*/masks/*/*.png"):
        rewrite(path, lambda mask: (mask > 0) * 255)
    two = {"classes": CLASSES[:2], "palette": None}
    parts = splits_of(root, **two)
    errors = [finding for finding in examine(parts) if finding.code == "binary_read_as_ids"]
    assert [each.severity for each in errors] == ["error", "warning"]  # train and val
    assert all("format=binary" in each.remedy for each in errors)
    assert findings_by_code(root, options={**two, "masks": Masks("binary")}) == {}
    assert findings_by_code(root, options={**two, "masks": Masks(ids={255: 1})}) == {}
    parts = splits_of(root, **two, ignore_index=254)
    messages = [finding.message for finding in examine(parts) if finding.code == "binary_read_as_ids"]
    assert len(messages) == 2 and "255 is not a class" in messages[0]


def test_one_class_is_an_error(root):
    for path in root.glob("*/masks/*/*.png"):
        rewrite(path, lambda mask: np.where(mask > 0, 255, 0))
    finding = findings_by_code(root, options={"classes": CLASSES[:1], "palette": None})["one_class"]
    assert finding.severity == "error" and finding.stops
    assert f"data.classes=[background,{CLASSES[0]}]" in finding.remedy and "format=binary" in finding.remedy


def test_names_that_differ_in_blanks_or_case_are_similar(root):
    names = [CLASSES[0], "Cat ", "cat", *CLASSES[3:]]
    finding = findings_by_code(root, options={"classes": names})["similar_class_names"]
    assert finding.severity == "warning" and "'Cat ', 'cat'" in finding.message


IDD = [f"c{index}" for index in range(26)]


@pytest.mark.parametrize("remapped", [True, False])
def test_idd_labels_without_road(root, remapped):
    official = np.array([0, 3, 24, 255], np.uint8)
    home_made = np.array([255, 1, 24, 255], np.uint8)
    for path in root.glob("*/masks/*/*.png"):
        rewrite(path, lambda mask: (home_made if remapped else official)[mask])
    idd = {"classes": IDD, "palette": None}
    findings = findings_by_code(root, options=idd, data_name="idd")
    assert ("home_made_idd" in findings) == remapped
    assert "home_made_idd" not in findings_by_code(root, options=idd, data_name="folder")
    named = {"classes": ["road", "rail track", "autorickshaw", "obs-str-bar-fallback", *IDD[4:]], "palette": None}
    assert ("home_made_idd" in findings_by_code(root, options=named)) == remapped
    with_remap = {**idd, "masks": Masks(ids={255: 0, 0: 255, 3: 255})}  # what is in the files counts, not the classes
    assert ("home_made_idd" in findings_by_code(root, options=with_remap, data_name="idd_home_made")) == remapped
    if remapped:
        # on purpose, so training only warns
        parts = splits_of(root, **with_remap)
        stops = {name: find_errors(parts, data_name=name)[0].stops for name in ("idd", "idd_home_made")}
        assert stops == {"idd": True, "idd_home_made": False}
        assert examine(parts, data_name="idd_home_made")[0].severity == "error"
        only = findings["home_made_idd"]
        assert only.severity == "error" and "255 is void" in only.message and "home-made" in only.message
        assert "mode=prepare data=idd" in only.remedy and len(only.files) == 16


def test_idd_labels_of_another_name(tmp_path):
    save(tmp_path / "gtFine/val/7/a_gtFine_labelIds.png", [[1, 24], [255, 5]])
    assert len(home_made_files(tmp_path)) == 1
    save(tmp_path / "gtFine/val/7/b_gtFine_labelIds.png", [[0, 24], [255, 5]])
    assert home_made_files(tmp_path) == [] == home_made_files(tmp_path / "gone")


def test_drive_in_two_splits_is_a_finding(root):
    for kind in ("images", "masks"):
        (root / f"val/{kind}/d1").mkdir()
        shutil.move(root / f"train/{kind}/d1/f4.png", root / f"val/{kind}/d1/f4.png")
    findings = findings_by_code(root)
    assert findings.keys() == {"group_on_both_sides"} and "1 video or drive " in findings[[*findings][0]].message
    assert "both in train and in val: d1. " in findings["group_on_both_sides"].message
    assert "Official splits can have this" in findings["group_on_both_sides"].message
    assert findings["group_on_both_sides"].severity == "error"
    assert {file.rsplit("/", 1)[1] for file in findings["group_on_both_sides"].files} == {
        f"f{n}.png" for n in range(4, 8)
    }
    assert findings_by_code(root, group=r"f\d+$").keys() == {"group_on_both_sides"}  # f0 to f3 are in both
    assert findings_by_code(root, group=r"^.*$") == {}
    with pytest.raises(UserError, match=r"data\.group=\^nothing does not match the name"):
        findings_by_code(root, group="^nothing")


def test_names_without_folder_are_no_groups(tmp_path):
    write(tmp_path, "train", ["x", "y"])
    write(tmp_path, "val", ["x", "z"], first=50)
    assert findings_by_code(tmp_path) == {}
    assert findings_by_code(tmp_path, group="^(.)").keys() == {"group_on_both_sides"}


def test_duplicates_across_splits(root):
    image, _ = scene(3)
    save(root / "val/images/v/f0.bmp", image)  # another file, the same pixels
    (root / "val/images/v/f0.png").unlink()
    done = cv2.imwrite(
        str(root / "val/images/v/f1.png"), cv2.convertScaleAbs(cv2.resize(scene(7)[0], (124, 93)), beta=4)[..., ::-1]
    )
    assert done
    save(root / "val/masks/v/f1.png", cv2.resize(scene(7)[1], (124, 93), interpolation=cv2.INTER_NEAREST))
    save(root / "val/masks/v/f0.png", scene(3)[1])
    findings = findings_by_code(root)
    assert findings.keys() == {"duplicate_across_splits", "near_duplicate_across_splits"}
    assert findings["duplicate_across_splits"].severity == "error"
    assert findings["duplicate_across_splits"].files == (f"{root}/train/images/d0/f3.png = {root}/val/images/v/f0.bmp",)
    (near,) = findings["near_duplicate_across_splits"].files
    assert near.startswith(f"{root}/train/images/d1/f7.png ~ {root}/val/images/v/f1.png (")
    assert findings["near_duplicate_across_splits"].look == (("train", "d1/f7"), ("val", "v/f1"))


def test_duplicates_inside_a_split(root):
    for kind in ("images", "masks"):
        shutil.copy(root / f"train/{kind}/d0/f0.png", root / f"train/{kind}/d2/f8.png")
    findings = findings_by_code(root)
    assert findings.keys() == {"duplicate_in_split"} and findings["duplicate_in_split"].severity == "note"
    rewrite(root / "train/masks/d2/f8.png", lambda mask: np.where(mask == 1, 2, mask))
    findings = findings_by_code(root)
    assert findings.keys() == {"duplicate_in_split", "one_image_two_masks"}
    image = scene(0)[0]
    image[:, :, 0] = np.clip(image[:, :, 0].astype(int) + 3, 0, 255)
    save(root / "train/images/d2/f8.png", image)
    assert findings_by_code(root) == {}  # nearly equal images within a split are normal


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
    expected = close(first, second, same)
    assert set(found.closest) == set(expected) and len(expected) >= 25
    assert [bits for _, _, bits in found.closest] == sorted(bits for _, _, bits in expected)
    assert found.second == len({j for _, j, _ in expected})
    assert near_pairs(first[:0], second, 6, same=(same[0][:0], same[1])).closest == []


def close(first, second, same):
    return [
        (i, j, bits)
        for i, one in enumerate(first.tolist())
        for j, two in enumerate(second.tolist())
        if same[0][i] != same[1][j] and (bits := (one ^ two).bit_count()) <= 6
    ]


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
    swap(root / "train/masks/d0/f1.png", root / "train/masks/d2/f10.png")
    findings = findings_by_code(root)
    assert findings.keys() == {"swapped_pair"} and findings["swapped_pair"].severity == "warning"
    assert findings["swapped_pair"].files == (f"{root}/train/masks/d0/f1.png <-> {root}/train/masks/d2/f10.png",)
    assert findings["swapped_pair"].look == (("train", "d0/f1"), ("train", "d2/f10"))


def test_masks_shifted_by_one_are_findings(root):
    masks = sorted((root / "train/masks").rglob("*.png"))
    contents = [mask.read_bytes() for mask in masks]
    for index, mask in enumerate(masks):
        mask.write_bytes(contents[index - 1])
    findings = findings_by_code(root)
    assert findings.keys() == {"masks_shifted"} and findings["masks_shifted"].severity == "error"
    assert "1 place later" in findings["masks_shifted"].message


def test_one_mask_with_two_images_is_a_warning(root):
    shutil.copy(root / "train/masks/d0/f1.png", root / "train/masks/d2/f10.png")
    findings = findings_by_code(root)
    assert findings.keys() == {"one_mask_many_images"} and findings["one_mask_many_images"].severity == "warning"


def test_masks_that_follow_no_edges_are_not_called_swapped(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(60):
        save(tmp_path / f"train/images/{number}.png", draw.integers(0, 256, (48, 64, 3)))
        save(tmp_path / f"train/masks/{number}.png", draw.integers(0, 3, (48, 64)))
    codes = {finding.code for finding in examine(splits_of(tmp_path, splits=("train",)))}
    assert not codes & {"swapped_pair", "masks_shifted"}


@pytest.fixture
def operation(tmp_path):
    """A video of 125 frames with its three masks."""
    folder = tmp_path / "video_01"
    write_video(folder / "video_left.avi", 125)
    for number in (0, 60, 120):
        image, mask = scene(number, (32, 48 + 16))
        save(folder / f"rgb/{number:09d}.png", image)
        save(folder / f"segmentation/{number:09d}.png", mask)
    return folder


def test_masks_against_the_video(operation, tmp_path):
    layout = FolderLayout("video_01/rgb", "video_01/segmentation")
    options = {"splits": ("train",), "layout": layout, "partition": Partition("lists", {"train": "all.txt"})}

    def codes(names):
        (tmp_path / "all.txt").write_text("".join(f"{number:09d}\n" for number in names))
        return findings_by_code(tmp_path, options=options)

    assert codes((0, 60, 120)) == {}
    (operation / ".prepared.json").write_text(json.dumps({"decoded": 125}))
    (operation / "segmentation/000000120.png").unlink()
    (operation / "rgb/000000120.png").unlink()
    findings = codes((0, 60))
    assert findings.keys() == {"masks_against_video"} and findings["masks_against_video"].severity == "error"
    told = findings["masks_against_video"].message
    assert (
        "125 frames, so segmentation/ should have 3 masks" in told
        and "has 2 (missing: 000000120; without a frame: none)" in told
    )
    save(operation / "segmentation/000000121.png", scene(1, (32, 64))[1])
    findings = codes((0, 60))
    assert "without a frame: 000000121" in findings["masks_against_video"].message
    assert findings["masks_without_frame"].files[0].endswith("000000121.png")


def test_constant_class_against_plain_arithmetic(root):
    train, val = splits_of(root)
    for part, split in ((train, "train"), (val, "val")):
        pixels = np.concatenate([data.ravel() for data in map(open_split(root, split).mask, range(len(part.records)))])
        guess = np.zeros_like(pixels)
        ious = [((pixels == k) & (guess == k)).sum() / ((pixels == k) | (guess == k)).sum() for k in range(3)]
        assert constant_class(part) == {
            "class": 0,
            "accuracy": pytest.approx((pixels == 0).mean(), rel=1e-12),
            "miou": pytest.approx(np.mean(ious), rel=1e-12),
        }


def test_sizes_are_ordered_by_their_pixels(root):
    part = splits_of(root)[0]
    sizes = [(97, 333), (123, 201), (211, 317), (241, 160)]
    records = [replace(record, image_size=size) for record, size in zip(part.records, sizes, strict=False)]
    rows = summary(replace(part, records=records))
    assert (rows["smallest"], rows["largest"]) == ({"width": 201, "height": 123}, {"width": 317, "height": 211})


def test_summary_counts_images_and_classes(root):
    rows = summary(splits_of(root)[0])
    assert rows["images"] == 12 and rows["void_share"] == 0
    assert rows["smallest"] == rows["largest"] == {"width": 128, "height": 96}
    assert sum(row["share"] for row in rows["classes"]) == pytest.approx(1)
    assert sum(row["pixels"] for row in rows["classes"]) == 12 * 96 * 128 and rows["classes"][0]["images"] == 12


real = pytest.mark.data
absent = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}: set DINOSEG_DATA")
LITE = FolderLayout("leftImg8bit/{split}", "gtFine/{split}", "_image", "_label", ["*_inst_label.png"])
SEVEN = {"classes": list("abcdefg"), "palette": None, "layout": LITE}


@pytest.fixture
def lite(tmp_path):
    """A part of IDD-Lite: 60 frames of training, 20 of validation."""
    for split, count in (("train", 60), ("val", 20)):
        images = sorted((DATA / "idd20k_lite/leftImg8bit" / split).rglob("*_image.jpg"))
        for image in images[:: len(images) // count][:count]:
            mask = image.with_name(image.name.replace("_image.jpg", "_label.png"))
            for source, top in ((image, "leftImg8bit"), (mask, "gtFine")):
                target = tmp_path / top / split / image.parent.name / source.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(DATA / "idd20k_lite" / top / split / image.parent.name / source.name, target)
    return tmp_path


def faults(root, options):
    return {code: f for code, f in findings_by_code(root, options=options).items() if f.severity != "note"}


@real
@absent
def test_idd_lite_is_clean(lite):
    assert faults(lite, SEVEN) == {}


@real
@absent
@pytest.mark.parametrize("plant", ["ids", "truncated", "drive", "swap"])
def test_every_planted_fault_in_idd_lite_is_found(lite, plant):
    masks = sorted((lite / "gtFine/train").rglob("*_label.png"))
    images = sorted((lite / "leftImg8bit/train").rglob("*_image.jpg"))
    if plant == "ids":
        rewrite(masks[5], lambda mask: np.where(mask == mask[0, 0], 23, mask))
        code, files = "foreign_ids", (str(masks[5]),)
    elif plant == "truncated":
        masks[9].write_bytes(masks[9].read_bytes()[:-400])
        code, files = "unreadable_mask", (str(masks[9]),)
    elif plant == "swap":
        swap(masks[3], masks[40])
        code, files = "swapped_pair", (f"{masks[3]} <-> {masks[40]}",)
    else:
        drive = images[0].parent.name
        for path, top in ((images[0], "leftImg8bit"), (masks[0], "gtFine")):
            (lite / top / "val" / drive).mkdir(exist_ok=True)
            shutil.copy(path, lite / top / "val" / drive / f"0_{path.name}")
        code, files = "group_on_both_sides", None
    findings = faults(lite, SEVEN)
    assert code in findings and (files is None or findings[code].files == files)
    assert findings.keys() <= {code, "duplicate_across_splits"} and (plant == "drive" or len(findings) == 1)


@real
@absent
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
@absent
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


def test_jpeg_masks_come_before_the_ids_that_they_change(root):
    path = root / "train/masks/d0/f2.png"
    save(path, np.full((96, 128), 99), format="JPEG")
    assert list(findings_by_code(root))[:2] == ["mask_is_jpeg", "foreign_ids"]


def test_ids_in_the_alpha_channel_are_a_warning(root):
    for path in root.rglob("masks/**/*.png"):
        ids = np.array(Image.open(path))
        Image.fromarray(np.dstack([np.zeros_like(ids)] * 3 + [ids])).save(path)
    finding = findings_by_code(root)["ids_in_alpha"]
    assert finding.severity == "warning" and "16 of 16 masks" in finding.message and "grey PNG" in finding.remedy
