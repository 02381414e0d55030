import json
import shlex

import numpy as np
import pytest
from command_line import call, succeed
from making import save
from mistakes import assert_refused
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.conversion.convert_mode import place_image
from dinoseg.extensions.conversion.formats import (
    MOST_IDS,
    AnnotatedShapes,
    Classes,
    IdFormat,
    YoloFormat,
    collect_objects,
    remove_overlaps,
)
from dinoseg.inference.outputs import ImagePrediction

CONVERT = ("mode=convert", "mode.workers=0")
SIZE = (24, 30)
CLASSES = "{ground: , soil: , leaf: , stem: }"
FORMATS = ("coco", "coco_panoptic", "yolo", "labelme", "ids")


def draw_blocks(rng, canvas, value):
    """Paint one or two rectangles in the free pixels of a canvas; return whether some were free."""
    shape = np.zeros(SIZE, bool)
    for _ in range(rng.integers(1, 3)):
        top, left = rng.integers(0, (SIZE[0] - 2, SIZE[1] - 2))
        shape[top : top + rng.integers(1, 9), left : left + rng.integers(1, 9)] = True
    shape &= canvas == 0
    canvas[shape] = value
    return shape.any()


def draw_sample(rng):
    """Return an image, class ids and ids of objects of leaves and stems, of one or several parts each."""
    mask, ids = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint16)
    for number in range(1, rng.integers(1, 6)):
        draw_blocks(rng, ids, 300 + number)
        mask[ids == 300 + number] = rng.integers(2, 4)
    draw_blocks(rng, mask, 1)
    return rng.integers(0, 255, (*SIZE, 3)).astype(np.uint8), mask, ids


def write_sample(folder, name, image, mask, ids):
    save(folder / f"images/{name}.png", image)
    save(folder / f"masks/{name}.png", mask)
    save(folder / f"ids/{name}.png", ids, np.uint16)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Return a folder with drawn data of 40 images, whose objects have several parts and lie in one another."""
    folder = tmp_path_factory.mktemp("convert")
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for number in range(count):
            # YOLO's text files follow from the last folder `images`
            name = f"{('a b', 'images', '2')[number % 3]}/{number:03d}"
            write_sample(folder / "data" / split, name, *draw_sample(rng))
    (folder / "data/classes.yaml").write_text(f"classes: {CLASSES}\nbackground: ground\nthings: [leaf, stem]\n")
    return folder


OF_IDS = ("data=folder_instances", "data.root=data", "data.objects.files=[masks,ids]")


def convert(where, *words, out, read=OF_IDS):
    done = succeed(where, *CONVERT, *read, *words, f"hydra.run.dir={out}")
    return json.loads((where / out / "conversion.json").read_text()), done.out


@pytest.mark.parametrize("to", FORMATS)
def test_conversions_are_read_back_to_the_pixel(where, to):
    manifest, told = convert(where, f"mode.to={to}", out=f"out_{to}")
    assert "read back:    equal to the pixel" in told
    train = manifest["splits"]["train"]
    assert train["images"] == 32 and train["objects"] > 60 and train["pixels"] == 32 * SIZE[0] * SIZE[1]
    # the printed words read them: as ids, they are those of the original
    again = shlex.split(manifest["read"])
    convert(where, "mode.to=ids", out=f"back_{to}", read=again)
    names = [str(path.relative_to(where / "data")) for path in (where / "data").glob("*/masks/*/*.png")]
    assert len(names) == 40
    for name in names:
        first, second = (read_png(where / top / name) for top in ("data", f"back_{to}"))
        assert np.array_equal(first, second)
        ids = [read_png(where / top / name.replace("masks", "ids")) for top in ("data", f"back_{to}")]
        assert np.array_equal(*map(number_in_order, ids))
        assert np.array_equal(
            *map(
                read_png,
                (where / "data" / name.replace("masks", "images", 1), where / f"out_{to}" / find_image(to, name)),
            )
        )
        assert (where / f"out_{to}" / find_image(to, name)).stat().st_nlink == 1


def find_image(to, name):
    """Return where the image of a mask `split/masks/NAME.png` lies after a conversion."""
    split, _, *rest = name.split("/")
    folder = {"yolo": f"images/{split}", "ids": f"{split}/images"}.get(to, split)
    return "/".join([folder, *rest])


def read_png(path):
    return np.asarray(Image.open(path))


def number_in_order(ids):
    """Return ids with numbers in the order of their first pixels."""
    _, first, owners = np.unique(ids, return_index=True, return_inverse=True)
    return first[owners].reshape(ids.shape)


def encode(mask):
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [*mask.shape], "counts": runs["counts"].decode()}


def decode(runs):
    """Return run lengths of pycocotools in its canonical form."""
    return coco_mask.merge([runs])["counts"]


def block(top, left, height, width, hole=None):
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    if hole is not None:
        mask[hole] = False
    return mask


UGLY = {
    "with a hole": (block(2, 2, 7, 7, (slice(4, 6), slice(4, 6))), "leaf", 0),
    "larger": (block(12, 1, 9, 12), "leaf", 0),
    "on the larger one": (block(15, 8, 4, 8), "stem", 0),
    "crowd": (block(1, 18, 6, 9), "leaf", 1),
    "ignored": (block(10, 18, 4, 8), "blurred", 0),
}


@pytest.fixture(scope="module")
def ugly(where):
    """Return the words of COCO data with a hole, an overlap, a crowd and ignored pixels."""
    folder = where / "ugly"
    names = ["leaf", "stem", "blurred"]
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": names.index(label) + 1,
            "iscrowd": crowd,
            "area": int(mask.sum()),
            "bbox": [0, 0, 1, 1],
            "segmentation": encode(mask),
        }
        for number, (mask, label, crowd) in enumerate(UGLY.values(), 1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": annotations,
    }
    for split in ("train", "val"):
        save(folder / split / "a.png", np.full((*SIZE, 3), 90 + len(split)))
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    (folder / "classes.yaml").write_text(
        "classes: {background: , leaf: , stem: }\nbackground: background\nignore: {labels: [blurred]}\nmasks: labels\n"
    )
    return "data=coco_instances", "data.root=ugly"


@pytest.mark.parametrize(
    ("to", "pixels", "changed", "new"),
    [
        ("coco", 32, 0, 0),
        ("coco_panoptic", 0, 1, 1),  # the larger object has lost what is covered
        ("yolo", 32 + 4 + 54, 2, 1),  # the hole is filled, and the crowd left out
        ("labelme", 32, 1, 1),  # the crowd is an object
        ("ids", 0, 2, 1),
        ("masks", 0, 4, 0),
    ],
)
def test_what_a_format_cannot_hold_is_counted(where, ugly, to, pixels, changed, new):
    manifest, told = convert(where, f"mode.to={to}", "mode.split=val", read=ugly, out=f"ugly_{to}")
    lost = manifest["splits"]["val"]
    assert [lost[key] for key in ("changed_pixels", "changed_objects", "new_objects")] == [pixels, changed, new]
    assert lost["lost_ignored"] == (32 if pixels else 0) and lost["objects"] == 4
    assert ("other classes or objects" in told) and [*manifest["splits"]] == ["val"]


@pytest.mark.parametrize("shapes", ["polygons", "rle"])
def test_pycocotools_reads_the_same_masks(where, ugly, shapes):
    convert(where, "mode.to=coco", f"mode.shapes={shapes}", read=ugly, out=f"official_{shapes}")
    read = COCO(str(where / f"official_{shapes}/annotations/instances_val.json"))
    found = [
        (read.cats[entry["category_id"]]["name"], entry["iscrowd"], decode(read.annToRLE(entry)), entry["area"])
        for entry in read.anns.values()
    ]
    expected = [
        (label, crowd, decode(encode(mask)), mask.sum()) for mask, label, crowd in UGLY.values() if label != "blurred"
    ]
    assert sorted(found) == sorted(expected) and read.imgs[1]["file_name"] == "a.png"


def test_pixels_without_a_shape_are_ignored_without_a_background(where):
    for split in ("train", "val"):
        folder = where / "plain" / split
        mask = np.where(block(3, 4, 9, 9), 0, 1).astype(np.uint8)
        mask[:2] = 255
        save(folder / "images/b.png", np.full((*SIZE, 3), 90 + len(split)))
        save(folder / "masks/b.png", mask)
    plain = ("data=folder", "data.root=plain", "data.classes=[sky,tree]")
    for to in ("coco", "yolo", "labelme", "masks"):
        manifest, told = convert(where, f"mode.to={to}", read=plain, out=f"plain_{to}")
        assert "equal to the pixel" in told and manifest["splits"]["val"]["objects"] == 0
        assert ("data.unlabelled=ignore" in manifest["read"]) == (to != "masks")


@pytest.mark.parametrize("ignored", [100, 1])
def test_ignored_id_of_the_dataset_is_kept(where, ignored):
    mask = np.where(block(3, 4, 9, 9), ignored, 2).astype(np.uint8)
    for split in ("train", "val"):
        save(where / f"ignored_{ignored}/{split}/images/b.png", np.full((*SIZE, 3), 90 + len(split)))
        save(where / f"ignored_{ignored}/{split}/masks/b.png", mask)
    words = ("data=folder", f"data.root=ignored_{ignored}", "data.classes=[sky,soil,tree]")
    for to in ("coco", "masks"):
        named = (*words, f"data.ignore_index={ignored}")
        manifest, told = convert(where, f"mode.to={to}", read=named, out=f"ignored_{ignored}_{to}")
        assert "equal to the pixel" in told and f"data.ignore_index={ignored}" in manifest["read"]


def test_files_in_the_run_folder_are_not_replaced(where):
    before = {path: path.read_bytes() for path in (where / "data").rglob("*") if path.is_file()}
    done = call(where, *CONVERT, *OF_IDS, "mode.to=masks", "hydra.run.dir=data")
    assert done.status == 1 and "data holds classes.yaml, train, val. Choose a new folder" in done.err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("mode.to=ids", "data=folder"), "mode.to=ids holds single objects, and data=folder has none"),
        (("mode.to=coco_panoptic", "data=folder"), "mode.to=coco_panoptic holds single objects"),
        (("mode.to=voc", "data=folder"), "mode.to=voc"),
        (("mode.to=coco", "data=folder", "mode.split=later"), "later"),
        (
            ("mode.to=coco", "data=folder", "data.classes=[a,b]", "mode.tolerance=1000"),
            "error: mode.tolerance=1000 min",
        ),
        (("data=folder",), "mode.to"),
    ],
)
def test_what_cannot_be_converted_is_refused(where, words, text):
    done = call(where, *CONVERT, "data.root=data", *words, "hydra.run.dir=refused")
    assert done.status == 1 and text in done.err and "Traceback" not in done.err


def test_frames_become_files_and_other_pixels_are_refused(tmp_path):
    frame = np.full((4, 5, 3), 9, np.uint8)
    assert np.array_equal(read_png(place_image("a frame", frame, tmp_path, "x/0")), frame)
    scan = np.zeros((4, 5, 4), np.uint16)
    assert_refused(lambda: place_image("a scan", scan, tmp_path, "y"), "a scan: ", "has 4 channels of uint16")


def test_hidden_pixels_are_those_of_crowds_and_of_other_classes():
    whole, part, corner = (block(0, 0, *SIZE), block(2, 2, 4, 4), block(20, 20, 3, 3))
    mask = np.where(corner, 2, 1).astype(np.uint8)
    runs = [RunLengths.of_mask(each) for each in (corner, part, whole)]
    held = Objects.of_runs(SIZE, runs, [2, 1, 1], crowds=[False, False, True])
    classes = Classes(Labels.of(["ground", "leaf", "stem"], None, 255), 0, [1, 2])
    seen = remove_overlaps(collect_objects(mask, held, classes, joined=False), mask)
    found = {(bool(crowd), runs.area) for crowd, runs in zip(seen.crowds, seen.masks, strict=True)}
    assert found == {(False, 9), (False, 16), (True, mask.size - 25)}
    # the mask shows the first object on top of the second one
    seen = remove_overlaps(Objects.of_masks(np.array([corner, whole]), [2, 1]), mask)
    assert sorted(runs.area for runs in seen.masks) == [9, mask.size - 9]


def test_too_many_objects_for_16_bits_are_refused(tmp_path):
    classes = Classes(Labels.of(["ground", "leaf"], None, 255), 0, [1])
    objects = Objects.of_masks(np.ones((1, 4, 5), bool), [1]).select([0] * (MOST_IDS + 1))
    writer = IdFormat(tmp_path, classes, AnnotatedShapes()).make_writer("val")
    mask = np.ones((4, 5), np.uint8)
    prediction = ImagePrediction("a", tmp_path, np.zeros((4, 5, 3), np.uint8), mask, objects=objects)
    assert_refused(lambda: writer.write(prediction), "a has 65536 objects, and mode.to=ids holds 65,535")


def test_yolo_needs_a_class_beside_the_background(tmp_path):
    written = YoloFormat(tmp_path, Classes(Labels.of(["ground"], None, 255), 0, None), AnnotatedShapes())
    assert_refused(lambda: written.make_writer("val"), "mode.to=yolo needs a class besides the background")
