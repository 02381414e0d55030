"""Every command of the README and the docs is run: on small stand-ins for the data, small models, for two steps."""

import json
import re
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import SLOTS, call
from meta_files import RELEASED, write_released
from PIL import Image

from dinoseg.command.own_keys import with_own_keys
from dinoseg.errors import UserError
from dinoseg.launch import launch
from dinoseg.preparation.idd import prepare as prepare_idd
from dinoseg.preparation.sarrarp import prepare
from dinoseg.synthetic.moving.write import render_moving_objects
from dinoseg.synthetic.surgery.write import render_dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = ("backbone.weights=random", "backbone.arch.hidden_size=24", "backbone.arch.num_hidden_layers=2")
SMALL += ("backbone.arch.num_attention_heads=3", "backbone.layers=[-1]")
SHORT = ("trainer.steps=2", "trainer.val_every=2", "resolution.crop=[48,64]", "data.batch_size=2")
CPU = ("engine=cpu", "engine.workers=0")


def small_model(words):
    """Return overrides that make the model of a command small."""
    if "backbone=rgb" in words:
        return ()
    if "backbone=timm" in words:
        return ("backbone.name=test_vit", "backbone.weights=random")
    if "head=mask2former" in words:
        return (
            *SMALL,
            "backbone.arch.hidden_size=64",
            "backbone.arch.num_attention_heads=4",
            "backbone.layers=[0,0,1,1]",
        )
    if any(word.startswith(("hparam=slots", "hparam=dinosavi")) for word in words):
        return (*SMALL, "head.slot_dim=16", "head.decoder_dim=16")
    if "hparam=idd/lora" in words:  # whose head reads four maps
        return (*SMALL, "backbone.layers=[0,0,1,1]")
    return (*SMALL, "head.blocks=1") if "head=eomt" in words else SMALL


def joined(block):
    """Return the lines of a block, those that a backslash continues as one."""
    return re.sub(r" \\\n +", " ", block).splitlines()


def commands():
    """Yield (page, command) for each line of a bash block, continuation lines joined."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
            for line in joined(block):
                if line.strip() and not line.startswith("#"):
                    yield page.name, line.strip()


ALL = list(dict.fromkeys(command for _, command in commands()))
OURS = [command for command in ALL if command.startswith("python -m dinoseg")]


def pictures(folder, names, image, mask, ids):
    """Write `names` as image and mask files by two patterns."""
    draw = np.random.default_rng(0)
    for name in names:
        for pattern, pixels in ((image, draw.integers(0, 255, (50, 66, 3))), (mask, draw.choice(ids, (50, 66)))):
            path = folder / pattern.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


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


def write_tracked(root):
    """Write a folder of frames and one of masks, of which there is the first; it fits the videos too."""
    object_mask = np.zeros((48, 64), np.uint8)
    object_mask[10:40, 20:50] = 1
    for name, pixels in (("frames/00000", object_mask), ("frames/00001", object_mask), ("masks/00000", object_mask)):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"{name}.png")


def write_davis(root, videos):
    """Write rendered videos as DAVIS 2017 has its sequences."""
    for video in videos:
        for kind, folder, suffix in (("JPEGImages", "frames", "jpg"), ("Annotations", "segmentations", "png")):
            (root / kind / "480p" / video.name).mkdir(parents=True)
            for path in sorted((video / folder).iterdir())[:4]:
                Image.open(path).save(root / kind / "480p" / video.name / f"{path.stem}.{suffix}")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("".join(f"{video.name}\n" for video in videos))


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Write every data set that the docs name, in its own layout, and return what the placeholders mean."""
    root = tmp_path_factory.mktemp("docs")
    render_dataset(root / "sarrarp", train_videos=3, test_videos=1, seconds=1, size=(48, 64), workers=1)
    prepare(root / "sarrarp", workers=1)
    for split in ("train", "val"):
        pictures(root / "folder", "ab", f"{split}/images/{{}}.png", f"{split}/masks/{{}}.png", [0, 1, 255])
        pictures(root / "camvid", "ab", f"{split}/images/{{}}.jpg", f"{split}/masks/{{}}.png", range(12))
        shown = {"train": "train", "val": "valid"}[split]
        pictures(root / "person", "ab", f"{shown}_images/{{}}.jpg", f"{shown}_masks/{{}}.png", [0, 255])
        image, mask = f"leftImg8bit/{split}/{split}1/{{}}_image.jpg", f"gtFine/{split}/{split}1/{{}}_label.png"
        pictures(root / "idd20k_lite", "ab", image, mask, [0, 1, 2, 3, 4, 5, 6, 255])
        write_polygons(root / f"idd/IDD_Segmentation/{{}}/{split}/{split}_1/")
    prepare_idd(root / "idd", workers=1)
    for side in ("reference", "prediction", "second"):
        pictures(root / side, ["000000000", "000000060"], "unused/{}.png", "video_1/segmentation/{}.png", range(10))
        pictures(root / side, ["000000000", "000000060"], "unused/{}.png", "video_2/segmentation/{}.png", range(10))
        shutil.rmtree(root / side / "unused")
    video = root / "sarrarp/test/video_41/video_left.avi"
    assert cv2.VideoCapture(str(video)).isOpened()
    write_tracked(root)
    render_moving_objects(root / "movi", train_videos=2, val_videos=1, seconds=1, size=(48, 64), workers=1)
    write_davis(root / "davis", sorted((root / "movi/train").iterdir()))
    (root / "films").mkdir()
    for name in "ab":
        shutil.copy(video, root / f"films/{name}.avi")
    backbone, segmentor = write_released(root)
    image = root / "folder/val/images/a.png"
    scored = {side.upper(): root / side for side in ("reference", "prediction", "second")}
    files = {
        "IDD": root / "idd",
        **scored,
        "WEIGHTS": backbone,
        "BACKBONE": backbone,
        "SEGMENTOR": segmentor,
        "IMAGE": image,
        "VIDEO": video,
        "FRAMES": root / "frames",
        "MASKS": root / "masks",
        "MASK": root / "masks/00000.png",
        "MOVI": root / "movi",
        "DAVIS": root / "davis",
        "VIDEOS": root / "films",
    }
    return {"SARRARP": root / "sarrarp", "FOLDER": root / "folder", "DATA": root, "DIR": root / "new", **files}


@pytest.fixture(scope="session")
def trained(stand_ins, tmp_path_factory):
    """Return a function that trains a segmenter or a model of slots once, and gives its run folder."""
    images = ["mode=predict", f"input={stand_ins['FOLDER']}/val/images", *CPU]
    demo = ["mode=train", "hparam=demo", f"data.root={stand_ins['SARRARP']}", *SMALL, *SHORT, *CPU]
    slots = [*SLOTS, *SHORT, f"data.root={stand_ins['MOVI']}"]
    commands, kept = {"RUN": demo, "SLOTS": slots, "PREDICTED": images}, {}

    def run(compose, name):
        if name not in kept:
            overrides = commands[name] + ([f"resume={run(compose, 'RUN')}"] if name == "PREDICTED" else [])
            kept[name] = launch(compose(*overrides), tmp_path_factory.mktemp("run"), overrides)["run"]
        return kept[name]

    return run


def test_the_docs_hold_commands():
    assert len(OURS) >= 10
    known = re.compile(r"python -m dinoseg |make (demo|test)$|pip install \.$")
    assert [command for command in ALL if not known.match(command)] == []


@pytest.mark.parametrize("command", OURS)
def test_command(command, compose, stand_ins, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[3:]
    if "-m" in words:  # one job of the sweep
        words = [re.sub(r"=([^\[,]*),.*", r"=\1", word) for word in words if word != "-m"]
    places = dict(stand_ins)
    places |= {
        name: trained(compose, name)
        for name in ("RUN", "SLOTS", "PREDICTED")
        if any(word.endswith(f"={name}") for word in words)
    }
    if "mode=render" in words:
        places["MOVI"] = tmp_path / "movi"
    mode = next(word.removeprefix("mode=") for word in words if word.startswith("mode="))
    words = [re.sub(r"(?<=[=\[,])([A-Z]+)(?=[/,\]]|$)", lambda found: str(places[found[1]]), word) for word in words]
    if mode == "train":
        words += [*small_model(words), *SHORT, *CPU]
    elif mode in ("track", "eval") and not any(word.startswith("resume=") for word in words):
        words += [*small_model(words), "tracker.short=48", *CPU]
    elif mode in ("track", "eval", "predict"):
        words += [*CPU, *(RELEASED if "hparam=ade20k_m2f" in words else ())]
    elif mode == "render":
        words += ["mode.val_videos=1"] if "data=movi" in words else []
        words += ["mode.train_videos=1", "mode.test_videos=1", "mode.seconds=1", "mode.size=[32,48]", "mode.workers=1"]
    words = with_own_keys(words)
    out_dir = tmp_path / f"outputs/{mode}_1"
    if (
        mode == "doctor"
    ):  # the stand-ins are as alike and as few as no data set is: whether it finds that is not at issue
        with suppress(UserError):
            launch(compose(*words), out_dir, words)
    else:
        launch(compose(*words), out_dir, words)
    written = {path.name for path in out_dir.rglob("*")}
    expected = {
        "train": "scores.json",
        "eval": "scores.json",
        "predict": "video_left_overlay.mp4" if "VIDEO" in command else "a_segmentation",
        "summary": "summary.json",
        "score": "scores.json",
        "doctor": "doctor.html",
        "export": "backbone.safetensors",
        "track": "track.json",
    }
    said = capsys.readouterr()
    assert expected.get(mode, "run.log") in written, said.out
    assert "No effect here" not in said.err


def test_no_line_is_longer_than_those_of_the_code():
    files = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "dinoseg/cfg").rglob("*.yaml")]
    lines = [(path, number, line) for path in files for number, line in enumerate(path.read_text().split("\n"), 1)]
    assert [f"{path.name}:{number}" for path, number, line in lines if len(line) > 120] == [] and len(lines) > 3000


def test_the_architecture_names_every_room_and_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*") if ".venv" not in path.parts}
    named = re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", page)
    missing = [name for name in named if not any(f"/{file}".endswith(f"/{name.rstrip('/')}") for file in files)]
    assert len(named) > 80 and not missing
    package = {path.name for path in (ROOT / "dinoseg").iterdir() if not path.name.startswith("__") and path.is_dir()}
    assert [room for room in package - {"assets"} if f"{room}/" not in page.split("## Inside")[0]] == []


def test_each_promise_names_a_test():
    text = (ROOT / "docs/security.md").read_text().split("## What is promised")[1].split("## What is not")[0]
    promises = text.split("\n- ")[1:]
    assert len(promises) >= 15
    for promise in promises:
        file, name = re.search(r"\(`(tests/\S+)::(\w+)`\)", promise).groups()
        assert f"def {name}(" in (ROOT / file).read_text(), promise


def test_five_commands_lead_to_scored_predictions(stand_ins, tmp_path):
    section = (ROOT / "README.md").read_text().split("### Your own images")[1]
    lines = joined(re.search(r"```bash\n(.*?)```", section, flags=re.S)[1])
    assert len(lines) == 5 and lines[0] == "pip install ."
    for line in lines[1:]:
        words = [word.replace("FOLDER", str(stand_ins["FOLDER"])) for word in shlex.split(line)[3:]]
        more = {"train": (*SMALL, *SHORT, *CPU), "predict": CPU}.get(words[0].removeprefix("mode="), ())
        done = call(tmp_path, *words, *more)
        assert done.status == 0 or "mode=doctor" in words, done.err  # the stand-ins are few and alike
    assert "leaf" in done.out and "mIoU" in done.out
    assert sorted(path.name for path in (tmp_path / "PREDICTED/masks").iterdir()) == ["a.png", "b.png", "classes.json"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    named = {word for page in PAGES for word in re.findall(r"`?make ([a-z]+)`", page.read_text())}
    assert named and named <= targets
