import numpy as np
import pytest
from composed_data import CONFIGS, load
from making import DATA, save, write_video

from dinoseg.config.nodes import instantiate
from dinoseg.data.classes.labels import Labels
from dinoseg.data.scan.scan import class_counts
from dinoseg.extensions.prepare.prepare_mode import prepare

RELATIVES = ("ade20k", "camvid_", "davis2016", "idd_", "youtube_vos")
DESCRIBED = ("[_annotated,", "[coco,", "[labelme,", "[yolo,", "[folder, _id_objects")  # in defaults
NAMES = sorted(path.stem for path in (CONFIGS / "data").glob("[!_]*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",  # those of the same base differ in classes and folders, which other tests read
    [pytest.param(name, marks=[pytest.mark.heavy] if name.startswith(RELATIVES) else []) for name in NAMES],
)
def test_every_config_is_whole(tmp_path, name):
    text = (CONFIGS / f"data/{name}.yaml").read_text()
    # by files of the data's own
    described = "${dinoseg.class_file:classes" in text or any(base in text for base in DESCRIBED)
    data = load(name, tmp_path, *(["data.classes=[a,b]"] if described else []))
    labels = Labels.of(list(data.classes), data.palette, data.ignore_index)
    assert data.num_classes == len(labels.classes) and data.batch_size == 8
    augment = instantiate(data.augment)
    assert augment.crop == (64, 96) and augment.longest == 200
    instantiate(data.reader)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder", "train", "val", "ids"),
    [
        ("camvid", "camvid", 184, 51, {*range(11), 255}),
        ("idd_lite", "idd20k_lite", 702, 99, {*range(7), 255}),
        ("person", "person", 193, 48, {0, 1}),
    ],
)
def test_real_data_is_readable(name, folder, train, val, ids, tmp_path):
    root = DATA / folder
    if not root.is_dir():
        pytest.skip(f"no real data in {root}: set DINOSEG_DATA")
    cfg = load(name, root)
    source, augment = instantiate(cfg.reader), instantiate(cfg.augment)
    splits = [source(split=split) for split in ("train", "val")]
    assert [len(data) for data in splits] == [train, val]
    assert not set(splits[0].names) & set(splits[1].names)
    found = set()
    for index in range(0, val, 2):
        sample = splits[1][index]
        assert sample["image"].shape[1:] == sample["mask"].shape
        found |= set(sample["mask"].unique().tolist())
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
        seen, mask = augment(image, sample["mask"].numpy(), np.random.default_rng(index))
        assert seen.shape == (64, 96, 3) and mask.shape == (64, 96)
    assert found == ids
    counts = class_counts(splits[1], tmp_path)
    assert (counts > 0).all() and (class_counts(splits[1], tmp_path) == counts).all()


def test_prepare_mode_extracts_the_frames_of_sarrarp(tmp_path, caplog, compose):
    place = tmp_path / "sar/train1/video_01"
    write_video(place / "video_left.avi", 61)
    for index in (0, 60):
        save(place / f"segmentation/{index:09d}.png", np.zeros((32, 48)))
    cfg = compose("mode=prepare", "data=sarrarp", f"data.root='{tmp_path / 'sar'}'", "prepare.workers=1")
    with caplog.at_level("INFO"):
        prepare(cfg, out_dir=tmp_path)
    assert "train1/video_01: rate 1, decoded 61" in caplog.text
    assert (tmp_path / "prepared.json").is_file() and len(list((place / "rgb").iterdir())) == 2
