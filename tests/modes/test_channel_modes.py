"""A training on colour and infrared images in files of their own, and all that is done with its model."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import SMALL, call, succeed
from making import save, write_video
from safetensors.torch import load_file

import dinoseg
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids

SMALL_MODEL = [word for word in SMALL if not word.startswith(("trainer.steps", "data.batch_size"))]
TRAIN = (*SMALL_MODEL, "mode=train", "data.batch_size=4", "mode.report=false", "mode.pictures=1", "head=linear")
NIR = ("data.channels=4", "data/pixels=files", "data.pixels.files=[images,nir]")
MASK2FORMER = ("head=mask2former", "head.num_heads=4", "loss=mask_classification", "backbone.arch.num_hidden_layers=4")
FEW = ("trainer.steps=4", "trainer.val_every=2", "trainer.save_every=2", "mode.metrics_only=true")
pytestmark = pytest.mark.heavy


def render(root, split, count, seed):
    """Write images whose class `bright` is visible in the infrared alone."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        mask = np.zeros((40, 56), np.uint8)
        top, left = rng.integers(0, 20), rng.integers(0, 30)
        mask[top : top + 20, left : left + 26] = 1
        save(root / split / f"images/{number}.png", rng.integers(60, 120, (40, 56, 3)))
        infrared = rng.integers(8000, 14000, (40, 56)) + 30000 * mask.astype(int)
        save(root / split / f"nir/{number}.tif", infrared, dtype=np.uint16)
        save(root / split / f"masks/{number}.png", mask)


def tensors(where, name):
    return load_file(where / name / "checkpoints/last.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("channels")
    render(where / "data", "train", 12, 0)
    render(where / "data", "val", 4, 1)
    succeed(where, *TRAIN, *NIR, "trainer.steps=60", "optim.optimizer.lr=1e-3", "hydra.run.dir=nir")
    return where


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def miou(run_folder):
    return json.loads((run_folder / "evaluation/scores.json").read_text())["miou"]


def test_a_fourth_channel_helps(place):
    succeed(place, *TRAIN, "trainer.steps=60", "optim.optimizer.lr=1e-3", "hydra.run.dir=rgb")
    assert miou(place / "nir") > 0.7 > 0.6 > miou(place / "rgb")


def test_evaluation_and_prediction_read_all_files(place):
    succeed(place, "mode=eval", "resume=nir", "engine=cpu", "hydra.run.dir=scored")
    succeed(place, "mode=predict", "resume=nir", "input=data/val/images", "engine=cpu", "hydra.run.dir=predicted")
    succeed(place, "mode=predict", "resume=nir", "input=val", "engine=cpu", "hydra.run.dir=split")
    model = dinoseg.load(place / "nir", device="cpu")
    for path in sorted((place / "data/val/images").iterdir()):
        ids = read_ids(place / f"predicted/masks/{path.stem}.png")
        assert np.array_equal(ids, read_ids(place / f"split/masks/{path.stem}.png"))
        assert np.array_equal(ids, read_ids(place / f"scored/predictions/{path.stem}_pred.png"))
        found = model.predict(path)
        assert np.array_equal(ids, found.mask) and found.image.shape == (40, 56, 4)
        assert found.overlay().shape == (40, 56, 3)
        assert np.array_equal(model.predict(found.image).mask, ids)


def test_predictions_of_changed_files_or_channels_are_not_reused(here):
    shutil.copytree("data/val", "changing")
    words = ("mode=predict", "resume=nir", "input=changing/images", "engine=cpu", "hydra.run.dir=again")
    succeed(here, *words)
    save(here / "changing/nir/0.tif", np.zeros((40, 56)), dtype=np.uint16)
    done = succeed(here, *words)
    assert "0.png is predicted again" in done.err and "3 images of an earlier run reused" in done.err
    other = call(here, *words, "data.pixels.order=[2,1,0,3]")
    assert other.status == 1 and "data.pixels.order was null and is [2,1,0,3]" in other.err


def test_a_channel_without_effect_is_warned_of(place):
    weights = ("backbone.channel_weights=[1,1,1,0]", "trainer.steps=1")
    done = succeed(place, *TRAIN, *NIR, *weights, "adapter=frozen", "hydra.run.dir=frozen")
    assert "channels of weight 0 have no effect, since adapter=frozen" in done.err
    assert done.err.count("INFO mean=[") == done.err.count("INFO std=[") == 1
    assert "no effect" not in succeed(place, *TRAIN, *NIR, *weights, "hydra.run.dir=full").err


def test_exports_keep_the_channels(here):
    done = succeed(here, "mode=export", "export=onnx", "resume=nir", "engine=cpu", "hydra.run.dir=onnx")
    assert 'model.predict("images/picture.png")' in done.out
    succeed(here, "mode=export", "export=safetensors", "resume=nir", "engine=cpu", "hydra.run.dir=file")
    succeed(here, "mode=export", "export=program", "resume=nir", "engine=cpu", "hydra.run.dir=program")
    source = dinoseg.load(here / "nir", device="cpu", precision="fp32")
    files = {here / "onnx/model.onnx": {}, here / "file/model.safetensors": {"precision": "fp32"}}
    for path, options in files.items():
        model = dinoseg.load(path, device="cpu", **options)
        for image in sorted((here / "data/val/images").iterdir()):
            wanted = source.predict(image)
            found = model.predict(image)
            assert np.array_equal(wanted.mask, found.mask)
            np.testing.assert_allclose(wanted.probabilities, found.probabilities, atol=1e-4)
        with pytest.raises(UserError, match=r"\[40, 56, 3\]"):
            model.predict(np.zeros((40, 56, 3), np.uint8))
    with pytest.raises(UserError, match="export_onnx"):
        dinoseg.export_onnx(source, [np.zeros((40, 56, 4), np.uint8)], out_dir=here / "never")


def test_resuming_packed_images_and_workers_change_no_bit(place):
    constant = ("optim.schedule.warmup=0", "optim.schedule.kind=constant")
    succeed(place, *TRAIN, *NIR, *FEW, *constant, "hydra.run.dir=whole")
    succeed(place, *TRAIN, *NIR, *FEW, *constant, "trainer.steps=2", "hydra.run.dir=half")
    succeed(place, "mode=train", "resume=half", "trainer.steps=4", "engine=cpu", "engine.workers=0")
    succeed(place, *TRAIN, *NIR, *FEW, *constant, "data.cache=packed", "hydra.run.dir=packed")
    succeed(place, *TRAIN, *NIR, *FEW, *constant, "engine.workers=1", "hydra.run.dir=of_a_worker")
    wanted = tensors(place, "whole")
    for name in ("half", "packed", "of_a_worker"):
        found = tensors(place, name)
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted), name
    assert wanted["model/backbone.model.embeddings.patch_embeddings.weight"].shape[1] == 4


def test_cached_features_have_their_channels(place):
    fixed = ("adapter=frozen", "data.views=1", "engine.precision=fp32", "features.dtype=float32")
    for cache in ("disk", "off"):
        succeed(place, *TRAIN, *NIR, *FEW, *fixed, f"engine.cache={cache}", f"hydra.run.dir={cache}")
    wanted, found = tensors(place, "off"), tensors(place, "disk")
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name].double(), rtol=1e-3, atol=1e-5)


def test_a_fourth_channel_of_zeros_is_the_model_of_three():
    x = torch.rand(2, 3, 40, 56)
    zeros = {"data.channels": 4, "backbone.channel_weights": [1, 1, 1, 0]}
    for head in ("linear", "dpt", "eomt"):
        three, four = (dinoseg.create_model("tiny", head=head, num_classes=3, **keys).eval() for keys in ({}, zeros))
        assert torch.equal(three(x), four(torch.cat([x, torch.zeros(2, 1, 40, 56)], 1)))
        with pytest.raises(UserError, match=r"\(B, 4, H, W\)"):
            four(x)


def test_16_bits_enter_own_loops():
    model = dinoseg.create_model("tiny", num_classes=2, **{"data.channels": 5}).eval()
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 2**16, (1, 5, 40, 56)).astype(np.uint16))
    assert torch.equal(model(levels), model(levels.float() / 65535))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mode=predict", "resume=nir", "input=film.avi"), "film.avi has 3 channels"),
        (("mode=track", "resume=nir", "input=film.avi"), "film.avi has 3 channels"),
        (("mode=predict", "resume=nir", "input=data/val/images", "data.channels=3"), "Give data.channels=4"),
        (("mode=serve", "resume=nir", "mode.port=0"), "upload has 3 channels"),
        (("mode=app", "resume=nir", "mode.port=0"), "upload has 3 channels"),
        ((*TRAIN, "trainer=distil", "teacher=nir", "trainer.steps=1"), "takes images of 4 channels"),
        ((*TRAIN, "data.channels=4"), "has 3 channels"),
        ((*TRAIN, *NIR, *MASK2FORMER), "reads the pixels as RGB"),
    ],
)
def test_another_number_of_channels_is_refused(words, message, place):
    if not (place / "film.avi").exists():
        write_video(place / "film.avi", 3)
    done = call(place, *words, "engine=cpu", "hydra.run.dir=refused")
    assert done.status != 0 and message in done.err
