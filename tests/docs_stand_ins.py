"""What a word in capitals means in the commands of the docs: small data, models and files, each made when asked for.

A new word is a function here, below `@stand_in("WORD")`, of all stand-ins and a folder of its own; it returns what
stands in for the word. What a mode needs to be quick is a line of `SMALLER` in tests/test_docs.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from command_line import SLOTS, call
from meta_files import write_released
from PIL import Image

from dinoseg.synthetic.moving.write import render_moving_objects
from dinoseg.synthetic.surgery.write import render_dataset
from dinoseg.tasks.preparation import idd, sarrarp

SMALL = ("backbone.weights=random", "backbone.arch.hidden_size=24", "backbone.arch.num_hidden_layers=2")
SMALL += ("backbone.arch.num_attention_heads=3", "backbone.layers=[-1]")
VIT = ("backbone=timm", "backbone.name=test_vit", "backbone.weights=random")
SHORT = ("trainer.steps=2", "trainer.val_every=2", "resolution.crop=[48,64]", "data.batch_size=2")
CPU = ("engine=cpu", "engine.workers=0")
_MAKERS = {}


def stand_in(word):
    """Let the function below make what `word` means."""
    return lambda make: _MAKERS.setdefault(word, make)


class StandIns:
    """What words of the docs mean: `stand_ins["FOLDER"]`, each made once."""

    def __init__(self, root):
        self.root, self.made = root, {}

    def __contains__(self, word):
        return word in _MAKERS

    def __getitem__(self, word):
        if word not in self.made:
            folder = self.root / word.lower()
            shutil.rmtree(folder, ignore_errors=True)  # of one that could not be made nothing is left to go on with
            folder.mkdir()
            self.made[word] = _MAKERS[word](self, folder)
        return self.made[word]


def ran(folder, *words):
    """Run a command in a folder and return its run folder, `run` below it."""
    done = call(folder, *words, "hydra.run.dir=run", *CPU)
    assert done.status == 0, done.err
    return folder / "run"


def pictures(folder, names, image, mask, ids):
    """Write `names` as image and mask files by two patterns."""
    draw = np.random.default_rng(0)
    for name in names:
        for pattern, pixels in ((image, draw.integers(0, 255, (50, 66, 3))), (mask, draw.choice(ids, (50, 66)))):
            path = folder / pattern.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


@stand_in("FOLDER")
def folder_of_masks(stand_ins, folder):
    for split in ("train", "val"):
        pictures(folder, "ab", f"{split}/images/{{}}.png", f"{split}/masks/{{}}.png", [0, 1, 255])
    return folder


@stand_in("OVERLAPS")
def folder_of_a_mask_for_each_class(stand_ins, folder):
    for split in ("train", "val"):
        for label in ("smoke", "tool"):
            pictures(folder, "ab", f"{split}/images/{{}}.png", f"{split}/masks/{label}/{{}}.png", [0, 1, 255])
    return folder


@stand_in("LAYERS")
def run_of_layers(stand_ins, folder):
    words = ("data=folder", f"data.root={stand_ins['OVERLAPS']}", "data.classes=[smoke,tool]", "task=multilabel")
    return ran(folder, "mode=train", *words, "loss=bce_dice", "mode.metrics_only=true", *SMALL, *SHORT)


@stand_in("BINARY")
def folder_of_black_and_white_masks(stand_ins, folder):
    for split in ("train", "val"):
        pictures(folder, "ab", f"{split}/images/{{}}.png", f"{split}/masks/{{}}.png", [0, 255])
    return folder


@stand_in("INFRARED")
def folder_of_colour_and_infrared(stand_ins, folder):
    shutil.copytree(stand_ins["FOLDER"], folder, dirs_exist_ok=True)
    draw = np.random.default_rng(0)
    for image in sorted(folder.glob("*/images/*.png")):
        path = image.parents[1] / "nir" / f"{image.stem}.tif"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 2**16, (50, 66)).astype(np.uint16)).save(path)
    return folder


@stand_in("PHOTOS")
def photos(stand_ins, folder):
    return stand_ins["FOLDER"] / "val/images"


@stand_in("COCO")
def drawn_for_coco(stand_ins, folder):
    for split in ("train", "valid"):
        pictures(folder, "ab", f"{split}/{{}}.jpg", "unused/{}.png", [0])
        rows = [
            {"id": number, "file_name": f"{name}.jpg", "height": 50, "width": 66} for number, name in enumerate("ab")
        ]
        drawn = [[5, 5, 40, 5, 40, 40, 5, 40]]
        shapes = [{"id": n, "image_id": n, "category_id": 1, "segmentation": drawn, "iscrowd": 0} for n in (0, 1)]
        content = {"images": rows, "annotations": shapes, "categories": [{"id": 1, "name": "leaf"}]}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


@stand_in("LABELME")
def drawn_for_labelme(stand_ins, folder):
    pictures(folder, "abcd", "{}.jpg", "unused/{}.png", [0])
    shape = {"label": "leaf", "points": [[5, 5], [40, 40]], "shape_type": "rectangle"}
    for name in "abcd":
        content = {"imagePath": f"{name}.jpg", "imageHeight": 50, "imageWidth": 66, "shapes": [shape]}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@stand_in("IMAGE")
def image(stand_ins, folder):
    return stand_ins["FOLDER"] / "val/images/a.png"


@stand_in("DATA")
def small_sets(stand_ins, folder):
    for split in ("train", "val"):
        pictures(folder / "camvid", "ab", f"{split}/images/{{}}.jpg", f"{split}/masks/{{}}.png", range(12))
        shown = {"train": "train", "val": "valid"}[split]
        pictures(folder / "person", "ab", f"{shown}_images/{{}}.jpg", f"{shown}_masks/{{}}.png", [0, 255])
        image, mask = f"leftImg8bit/{split}/{split}1/{{}}_image.jpg", f"gtFine/{split}/{split}1/{{}}_label.png"
        pictures(folder / "idd20k_lite", "ab", image, mask, [0, 1, 2, 3, 4, 5, 6, 255])
        long = {"train": "training", "val": "validation"}[split]
        pictures(folder / "ade20k", "ab", f"images/{long}/{{}}.jpg", f"annotations/{long}/{{}}.png", [0, 1, 4, 150])
    return folder


@stand_in("PERSON")
def person(stand_ins, folder):
    return stand_ins["DATA"] / "person"


@stand_in("IDD")
def idd_with_polygons(stand_ins, folder):
    for split in ("train", "val"):
        write_polygons(folder / f"IDD_Segmentation/{{}}/{split}/{split}_1/")
    idd.prepare(folder, workers=1)
    return folder


def write_polygons(pattern):
    """Write two images of IDD with polygons instead of label maps."""
    for name in "ab":
        image = Path(str(pattern).format("leftImg8bit")) / f"{name}_leftImg8bit.png"
        drawn = Path(str(pattern).format("gtFine")) / f"{name}_gtFine_polygons.json"
        for path in (image, drawn):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 66, 3)).astype(np.uint8)).save(image)
        road = {"label": "road", "polygon": [[0, 25], [66, 25], [66, 50], [0, 50]]}
        sky = {"label": "sky", "polygon": [[0, 0], [66, 0], [66, 20], [0, 20]]}
        drawn.write_text(json.dumps({"imgHeight": 50, "imgWidth": 66, "objects": [road, sky]}))


@stand_in("EXPORTED")
def export_run(stand_ins, folder):
    return ran(folder, "mode=export", "export=safetensors", f"resume={stand_ins['RUN']}")


@stand_in("EXPORTED_ONNX")
def export_graph(stand_ins, folder):
    return ran(folder, "mode=export", "export=onnx", f"resume={stand_ins['RUN']}")


@stand_in("EVALUATED")
def evaluate_run(stand_ins, folder):
    return ran(folder, "mode=eval", f"resume={stand_ins['RUN']}", "mode.metrics_only=true")


@stand_in("SARRARP")
def operations(stand_ins, folder):
    render_dataset(folder, train_videos=3, test_videos=1, seconds=1, size=(48, 64), workers=1)
    sarrarp.prepare(folder, workers=1)
    return folder


@stand_in("VIDEO")
def video(stand_ins, folder):
    return stand_ins["SARRARP"] / "test/video_41/video_left.avi"


@stand_in("VIDEOS")
def videos(stand_ins, folder):
    for name in "ab":
        shutil.copy(stand_ins["VIDEO"], folder / f"{name}.avi")
    return folder


@stand_in("FRAMES")
def frames(stand_ins, folder):
    """Write two frames of the videos' size, of which a rectangle stands out."""
    shown = np.zeros((48, 64), np.uint8)
    shown[10:40, 20:50] = 1
    for name in ("00000", "00001"):
        Image.fromarray(shown).save(folder / f"{name}.png")
    return folder


@stand_in("MASKS")
def masks(stand_ins, folder):
    shutil.copy(stand_ins["FRAMES"] / "00000.png", folder)
    return folder


@stand_in("MASK")
def mask(stand_ins, folder):
    return stand_ins["MASKS"] / "00000.png"


@stand_in("MOVI")
def moving_objects(stand_ins, folder):
    render_moving_objects(folder, train_videos=2, val_videos=1, seconds=1, size=(48, 64), workers=1)
    return folder


@stand_in("DAVIS")
def davis(stand_ins, folder):
    videos = sorted((stand_ins["MOVI"] / "train").iterdir())
    for video in videos:
        for kind, source, suffix in (("JPEGImages", "frames", "jpg"), ("Annotations", "segmentations", "png")):
            (folder / kind / "480p" / video.name).mkdir(parents=True)
            for path in sorted((video / source).iterdir())[:4]:
                Image.open(path).save(folder / kind / "480p" / video.name / f"{path.stem}.{suffix}")
    (folder / "ImageSets/2017").mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_text("".join(f"{video.name}\n" for video in videos))
    return folder


@stand_in("REFERENCE")
@stand_in("PREDICTION")
@stand_in("SECOND")
def scored_masks(stand_ins, folder):
    for number in (1, 2):
        mask = f"video_{number}/segmentation/{{}}.png"
        pictures(folder, ["000000000", "000000060"], "unused/{}.png", mask, range(10))
    shutil.rmtree(folder / "unused")
    return folder


@stand_in("OFFICIAL")
@stand_in("OTHER")
def masks_to_hand_in(stand_ins, folder):
    """Take the references themselves, of SAR-RARP50's test and of IDD's val, for predictions."""
    shutil.copytree(stand_ins["SARRARP"] / "test", folder, dirs_exist_ok=True)
    return shutil.copytree(stand_ins["IDD"] / "IDD_Segmentation/gtFine/val", folder, dirs_exist_ok=True)


@stand_in("BACKBONE")
def backbone_file(stand_ins, folder):
    write_released(folder)
    return folder / "backbone.pth"


@stand_in("WEIGHTS")
def weights(stand_ins, folder):
    return stand_ins["BACKBONE"]


@stand_in("SEGMENTOR")
def segmentor_file(stand_ins, folder):
    return stand_ins["BACKBONE"].with_name("head.pth")


@stand_in("EVALUATED_AT_HALF")
def evaluated_at_half(stand_ins, folder):
    return ran(folder, "mode=eval", f"resume={stand_ins['RUN']}", "resolution.scale=0.5", "mode.metrics_only=true")


@stand_in("RUN")
def trained_segmenter(stand_ins, folder):
    return ran(folder, "mode=train", "hparam=demo", f"data.root={stand_ins['SARRARP']}", *SMALL, *SHORT)


@stand_in("LARGE")
def trained_on_leaves(stand_ins, folder):
    data = f"data.root={stand_ins['FOLDER']}", "data.classes=[background,leaf]"
    return ran(folder, "mode=train", "data=folder", *data, *SMALL, *SHORT)


@stand_in("PREDICTED")
def predicted_masks(stand_ins, folder):
    return ran(folder, "mode=predict", f"resume={stand_ins['RUN']}", f"input={stand_ins['FOLDER']}/val/images")


@stand_in("PREDICTED_SPLIT")
def predicted_split(stand_ins, folder):
    return ran(folder, "mode=predict", f"resume={stand_ins['RUN']}", "input=val")


@stand_in("FRAME_SLOTS")
def trained_on_frames(stand_ins, folder):
    small = (*SMALL, "head.slot_dim=16", "head.decoder_dim=16")  # as the documents' commands are made small
    return ran(folder, "mode=train", "hparam=slots_rendered", *small, *SHORT, f"data.root={stand_ins['MOVI']}")


@stand_in("VIT_SLOTS")
def trained_on_frames_of_a_vit(stand_ins, folder):
    words = (*VIT, "backbone.final_norm=false", "head.slot_dim=16", "head.decoder_dim=16", "backbone.layers=[1]")
    words += ("resolution.scale=2", f"data.root={stand_ins['MOVI']}")
    return ran(folder, "mode=train", "hparam=slots_rendered", *words, *SHORT)


@stand_in("FROZEN")
def trained_on_a_frozen_backbone(stand_ins, folder):
    words = (*VIT, f"data.root={stand_ins['DATA']}/camvid")
    return ran(folder, "mode=train", "hparam=detail_camvid", *words, *SHORT)


@stand_in("SLOTS")
def trained_slots(stand_ins, folder):
    return ran(folder, *SLOTS, *SHORT, f"data.root={stand_ins['MOVI']}")
