"""What a word in capitals means in the commands of the docs: small data, models and files, each made when asked for.

A new word is a line of `PATHS` or `RUNS`, or a function below `@stand_in("WORD")`, of all stand-ins and a folder of its
own; it returns what stands in for the word. What a mode needs to be quick is a line of `SMALLER` in tests/test_docs.py.
"""

import shutil
from functools import partial
from itertools import product

import numpy as np
from command_line import SLOTS, succeed
from drawn_tracks import as_youtube_vis, draw_videos, separate, write_mots, write_youtube_vis
from making import save
from meta_files import write_released
from PIL import Image

from dinoseg.extensions.prepare import idd, sarrarp
from dinoseg.extensions.rendering.moving.write import render_moving_objects
from dinoseg.extensions.rendering.surgery.write import render_dataset
from dinoseg.utils.atomic import write_json

SMALL = ("backbone.weights=random", "backbone.arch.hidden_size=24", "backbone.arch.num_hidden_layers=2")
SMALL += ("backbone.arch.num_attention_heads=3", "backbone.layers=[-1]")
VIT = ("backbone=timm", "backbone.name=test_vit", "backbone.weights=random")
SHORT = ("trainer.steps=2", "trainer.val_every=2", "resolution.crop=[48,64]", "data.batch_size=2")
CPU = ("engine=cpu", "engine.workers=0")
LEAVES = ("data=folder", "data.root={FOLDER}", "data.classes=[background,leaf]")
LAYERS = ("data=folder", "data.root={OVERLAPS}", "data.classes=[smoke,tool]", "task=multilabel", "loss=bce_dice")
INSTANCES = ("data=coco_instances", "data.root={COCO}", "hparam=instance")
INSTANCES += ("head.blocks=1", "head.num_queries=5")
SMALL_SLOTS = ("head.slot_dim=16", "head.decoder_dim=16")
RENDERED_SLOTS = ("hparam=slots_rendered", "data.root={MOVI}", *SMALL_SLOTS)
VIT_SLOTS = (*VIT, "backbone.final_norm=false", "backbone.layers=[1]", "resolution.scale=2")
EXAMPLE = "references=[[{FOLDER}/val/images/a.png,{FOLDER}/val/masks/a.png]]"
PATHS = {  # what lies in another stand-in
    "PHOTOS": "{FOLDER}/val/images",
    "IMAGE": "{FOLDER}/val/images/a.png",
    "PERSON": "{DATA}/person",
    "FIRST_MASK": "{EXAMPLED_VIDEO}/video_left_masks/000000000.png",
    "VIDEO": "{SARRARP}/test/video_41/video_left.avi",
    "MASK": "{MASKS}/00000.png",
    "BACKBONE": "{RELEASED}/backbone.pth",
    "WEIGHTS": "{RELEASED}/backbone.pth",
    "SEGMENTOR": "{RELEASED}/head.pth",
}
RUNS = {  # run folders, and the words of the commands that write them
    "RUN": ("mode=train", "hparam=demo", "data.root={SARRARP}", *SMALL, *SHORT),
    "LARGE": ("mode=train", *LEAVES, *SMALL, *SHORT),
    "LAYERS": ("mode=train", *LAYERS, "mode.metrics_only=true", *SMALL, *SHORT),
    "FROZEN": ("mode=train", "hparam=detail_camvid", *VIT, "data.root={DATA}/camvid", *SHORT),
    "SLOTS": (*SLOTS, *SHORT, "data.root={MOVI}"),
    "FRAME_SLOTS": ("mode=train", *SMALL, *RENDERED_SLOTS, *SHORT),
    "VIT_SLOTS": ("mode=train", *VIT_SLOTS, *RENDERED_SLOTS, *SHORT),
    "OBJECTS": ("mode=train", *INSTANCES, "mode.metrics_only=true", *SMALL, *SHORT),
    "TRACKED": ("mode=track", "backbone=rgb", "input={FRAMES}", "labels={MASK}"),
    "EXPORTED": ("mode=export", "export=safetensors", "resume={RUN}"),
    "EXPORTED_ONNX": ("mode=export", "export=onnx", "resume={RUN}"),
    "EVALUATED": ("mode=eval", "resume={RUN}", "mode.metrics_only=true"),
    "EVALUATED_SCALED": ("mode=eval", "resume={RUN}", "inference=whole", "inference.scales=[1,1.5]"),
    "EXAMPLED": ("mode=example", "backbone=rgb", EXAMPLE, "input={FOLDER}/val/images"),
    "EXAMPLED_PAPER": ("mode=example", "backbone=rgb", "mode.rule=insid3", EXAMPLE, "input={FOLDER}/val/images"),
    "EXAMPLED_VIDEO": ("mode=example", "backbone=rgb", EXAMPLE, "input={VIDEO}"),
    "OUT": ("mode=features", "backbone=tiny_surgical", "input={IMAGE}"),
    "PREDICTED": ("mode=predict", "resume={RUN}", "input={FOLDER}/val/images"),
    "PREDICTED_SPLIT": ("mode=predict", "resume={RUN}", "input=val"),
}
_MAKERS = {}


def stand_in(word):
    """Let the function below make what `word` means."""
    return lambda make: _MAKERS.setdefault(word, make)


class StandIns:
    """What words of the docs mean: `stand_ins["FOLDER"]`, each made once."""

    def __init__(self, root):
        self.root, self.made = root, {}

    def __contains__(self, word):
        return word in _MAKERS or word in RUNS or word in PATHS

    def __getitem__(self, word):
        if word in PATHS:
            return PATHS[word].format_map(self)
        if word not in self.made:
            folder = self.root / word.lower()
            shutil.rmtree(folder, ignore_errors=True)  # of one that could not be made nothing is left to go on with
            folder.mkdir()
            self.made[word] = self.run(folder, RUNS[word]) if word in RUNS else _MAKERS[word](self, folder)
        return self.made[word]

    def run(self, folder, words):
        """Run a command in a folder and return its run folder, `run` below it."""
        succeed(folder, *(word.format_map(self) for word in words), "hydra.run.dir=run", *CPU)
        return folder / "run"


def write_images(folder, image, mask, ids, names="ab", splits=("train", "val")):
    """Write images and masks of noise by two patterns, which may have a `split` and a `name`."""
    draw = np.random.default_rng(0)
    for split, name in product(splits, names):
        for pattern, pixels in ((image, draw.integers(0, 255, (50, 66, 3))), (mask, draw.choice(ids, (50, 66)))):
            if pattern:
                save(folder / pattern.format(split=split, name=name), pixels)


@stand_in("FOLDER")
def folder_of_masks(stand_ins, folder, ids=(0, 1, 255)):
    write_images(folder, "{split}/images/{name}.png", "{split}/masks/{name}.png", ids)
    return folder


stand_in("BINARY")(partial(folder_of_masks, ids=(0, 255)))


@stand_in("COINS")
def folder_of_ids(stand_ins, folder):
    write_images(folder, "{split}/images/{name}.png", None, (0,))
    for split, name in product(("train", "val"), "ab"):
        save(folder / f"{split}/masks/{name}.png", np.repeat((1001, 0, 2001), 22 * 50).reshape(50, 66), np.uint16)
    return folder


@stand_in("FOLDED")
def sweep_of_folds(stand_ins, folder):
    folds = ("data.folds=2", "data.fold=0,1", "head=linear,mlp", "mode.metrics_only=true", "hydra.sweep.dir=run")
    succeed(folder, "-m", "mode=train", "data=binary", f"data.root={stand_ins['BINARY']}", *SMALL, *SHORT, *CPU, *folds)
    return folder / "run"


@stand_in("OVERLAPS")
def folder_of_a_mask_for_each_class(stand_ins, folder):
    for label in ("smoke", "tool"):
        write_images(folder, "{split}/images/{name}.png", f"{{split}}/masks/{label}/{{name}}.png", (0, 1, 255))
    return folder


@stand_in("INFRARED")
def folder_of_colour_and_infrared(stand_ins, folder):
    shutil.copytree(stand_ins["FOLDER"], folder, dirs_exist_ok=True)
    draw = np.random.default_rng(0)
    for image in sorted(folder.glob("*/images/*.png")):
        save(image.parents[1] / "nir" / f"{image.stem}.tif", draw.integers(0, 2**16, (50, 66)), np.uint16)
    return folder


@stand_in("COCO")
def drawn_for_coco(stand_ins, folder):
    write_images(folder, "{split}/{name}.jpg", None, (0,), splits=("train", "valid"))
    images = [{"id": number, "file_name": f"{'ab'[number]}.jpg", "height": 50, "width": 66} for number in (0, 1)]
    drawn = {"category_id": 1, "segmentation": [[5, 5, 40, 5, 40, 40, 5, 40]], "iscrowd": 0}
    shapes = [{"id": number, "image_id": number, **drawn} for number in (0, 1)]
    content = {"images": images, "annotations": shapes, "categories": [{"id": 1, "name": "leaf"}]}
    for split in ("train", "valid"):
        write_json(folder / split / "_annotations.coco.json", content)
    return folder


@stand_in("YOLO")
def drawn_for_yolo(stand_ins, folder):
    write_images(folder, "images/{split}/{name}.jpg", None, (0,))
    for split in ("train", "val"):
        for number, name in enumerate("ab"):
            path = folder / f"labels/{split}/{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{number} 0.1 0.1 0.6 0.1 0.6 0.8\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [leaf, stem]\n")
    return folder


@stand_in("COCO_PANOPTIC")
def drawn_for_coco_panoptic(stand_ins, folder):
    write_images(folder, "{split}2017/{name}.jpg", None, (0,), splits=("train", "val"))
    images = [{"id": number, "file_name": f"{'ab'[number]}.jpg", "height": 50, "width": 66} for number in (0, 1)]
    segments = [{"id": number, "category_id": number, "iscrowd": 0} for number in (1, 2)]
    files = [{"image_id": number, "file_name": f"{'ab'[number]}.png", "segments_info": segments} for number in (0, 1)]
    categories = [{"id": 1, "name": "leaf", "isthing": 1}, {"id": 2, "name": "ground", "isthing": 0}]
    ids = np.full((50, 66, 3), (2, 0, 0), np.uint8)
    ids[10:40, 10:40] = 1, 0, 0
    for split in ("train", "val"):
        content = {"images": images, "annotations": files, "categories": categories}
        write_json(folder / f"annotations/panoptic_{split}2017.json", content)
        for each in files:
            save(folder / f"annotations/panoptic_{split}2017/{each['file_name']}", ids, np.uint8)
    return folder


@stand_in("LABELME")
def drawn_for_labelme(stand_ins, folder):
    write_images(folder, "{name}.jpg", None, (0,), names="abcd", splits=("",))
    shape = {"label": "leaf", "points": [[5, 5], [40, 40]], "shape_type": "rectangle"}
    for name in "abcd":
        content = {"imagePath": f"{name}.jpg", "imageHeight": 50, "imageWidth": 66, "shapes": [shape]}
        write_json(folder / f"{name}.json", content)
    return folder


@stand_in("DATA")
def small_sets(stand_ins, folder):
    write_images(folder / "camvid", "{split}/images/{name}.jpg", "{split}/masks/{name}.png", range(12))
    image, mask = "{split}_images/{name}.jpg", "{split}_masks/{name}.png"
    write_images(folder / "person", image, mask, (0, 255), splits=("train", "valid"))
    image, mask = "leftImg8bit/{split}/{split}1/{name}_image.jpg", "gtFine/{split}/{split}1/{name}_label.png"
    write_images(folder / "idd20k_lite", image, mask, (*range(7), 255))
    image, mask = "images/{split}/{name}.jpg", "annotations/{split}/{name}.png"
    write_images(folder / "ade20k", image, mask, (0, 1, 4, 150), names="abcd", splits=("training", "validation"))
    return folder


@stand_in("NAMES")
def names_of_two_images(stand_ins, folder):
    (folder / "names.txt").write_text("a\nb\n")
    return folder / "names.txt"


@stand_in("IDD")
def idd_with_polygons(stand_ins, folder):
    root = folder / "IDD_Segmentation"
    write_images(root, "leftImg8bit/{split}/{split}_1/{name}_leftImg8bit.png", None, (0,))
    road = {"label": "road", "polygon": [[0, 25], [66, 25], [66, 50], [0, 50]]}
    sky = {"label": "sky", "polygon": [[0, 0], [66, 0], [66, 20], [0, 20]]}
    for split, name in product(("train", "val"), "ab"):
        content = {"imgHeight": 50, "imgWidth": 66, "objects": [road, sky]}
        write_json(root / f"gtFine/{split}/{split}_1/{name}_gtFine_polygons.json", content)
    idd.prepare(folder, workers=1)
    return folder


@stand_in("SARRARP")
def operations(stand_ins, folder):
    render_dataset(folder, train_videos=3, test_videos=1, seconds=1, size=(48, 64), workers=1)
    sarrarp.prepare(folder, workers=1)
    return folder


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
        save(folder / f"{name}.png", shown)
    return folder


@stand_in("MOTS")
def tracks_of_mots(stand_ins, folder):
    write_mots(folder, separate(draw_videos(7)))
    return folder


@stand_in("YTVIS")
def tracks_of_youtube_vis(stand_ins, folder):
    reference, results = as_youtube_vis(draw_videos(7))
    write_youtube_vis(folder, reference, results)
    reference["videos"][0]["file_names"] = ["frames/0.jpg"]
    write_json(folder / "ids.json", reference)
    return folder


@stand_in("MASKS")
def masks(stand_ins, folder):
    shutil.copy(stand_ins["FRAMES"] / "00000.png", folder)
    return folder


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
    names = ["000000000", "000000060"]
    write_images(folder, None, "video_{split}/segmentation/{name}.png", range(10), names, splits=(1, 2))
    return folder


@stand_in("OFFICIAL")
@stand_in("OTHER")
def masks_to_hand_in(stand_ins, folder):
    """Take the references themselves, of SAR-RARP50's test and of IDD's val, for predictions."""
    shutil.copytree(stand_ins["SARRARP"] / "test", folder, dirs_exist_ok=True)
    return shutil.copytree(stand_ins["IDD"] / "IDD_Segmentation/gtFine/val", folder, dirs_exist_ok=True)


@stand_in("RELEASED")
def released_files(stand_ins, folder):
    write_released(folder)
    return folder
