"""Pseudo-labels for rendered surgery, and what they are worth."""

import errno
import json
import shutil
import threading

import numpy as np
import pytest
from command_line import call
from failing import fail_after

from dinoseg.experiment.builder import Builder
from dinoseg.synthetic.surgery.write import render_clip, render_dataset
from dinoseg.tasks.preparation import pseudo_labels as propagate
from dinoseg.utils.images import read_ids, write_png
from dinoseg.utils.locks import locked

SEED, SECONDS = 3, 2
PREPARE = (
    *("mode=prepare", "data=sarrarp", "data.root=sar", "data.prepare.propagate=true", "data.prepare.workers=1"),
    *("backbone=rgb", "tracker.short_side=null", "tracker.radius=3", "engine=cpu"),
)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Videos as they are downloaded."""
    home = tmp_path_factory.mktemp("rendered")
    render_dataset(home / "sar", train_videos=2, test_videos=1, seconds=SECONDS, size=(32, 48), seed=SEED, workers=1)
    return home


@pytest.fixture(scope="module")
def prepared(rendered, tmp_path_factory):
    """The same with pseudo-labels."""
    home = tmp_path_factory.mktemp("prepared")
    shutil.copytree(rendered / "sar", home / "sar")
    prepare(home)
    return home


@pytest.fixture
def home(prepared, tmp_path):
    """Return a copy that a test may change."""
    shutil.copytree(prepared, tmp_path / "home")
    return tmp_path / "home"


def prepare(home, *words):
    done = call(home, *PREPARE, f"hydra.run.dir=run{len(list(home.glob('run*')))}", *words)
    assert done.status == 0, done.err
    return done


def notes(home, video="train1/video_01"):
    return json.loads((home / "sar" / video / "pseudo/pseudo.json").read_text())


def times(home):
    return {path: path.stat().st_mtime_ns for path in sorted((home / "sar").rglob("pseudo/*"))}


def test_the_frames_between_masks_get_labels_marked_as_such(prepared):
    home = prepared
    due = [f"{index:09d}" for index in range(6, 60, 6)]
    for video in ("train1/video_01", "train1/video_02"):
        folder = home / "sar" / video / "pseudo"
        found = notes(home, video)
        assert "not checked" in found["what"]
        assert found["made_by"]["backbone"]["_target_"].startswith("dinoseg.models.backbones.")
        assert found["made_by"]["tracker"]["radius"] == 3 and found["made_by"]["min_agreement"] == 0.5
        assert sorted([*found["kept"], *found["left_out"]]) == due
        assert sorted(path.stem for path in folder.glob("*.png")) == sorted(found["kept"])
        assert all(share >= 0.5 for share in found["kept"].values())
        assert all(share < 0.5 for share in found["left_out"].values())
        for path in folder.glob("*.png"):
            mask = read_ids(path)
            assert mask.shape == (32, 48) and {*np.unique(mask)} <= {*range(10), 255} and (mask != 255).any()
    assert not (home / "sar/test/video_41/pseudo").exists()
    assert len(list((home / "sar/test/video_41/rgb").iterdir())) == SECONDS
    counts = json.loads((home / "run0/prepared.json").read_text())
    kept = {name: numbers.get("pseudo") for name, numbers in counts.items()}
    assert kept == {name: len(notes(home, name)["kept"]) for name in list(kept)[1:]} | {"test/video_41": None}
    assert counts["train1/video_01"]["left_out"] == 9 - kept["train1/video_01"]


def test_training_reads_them_on_request(home, compose):
    prepare(home, "data.prepare.min_agreement=0")
    words = ("data=sarrarp", f"data.root={home}/sar", f"cache_dir={home}/cache", "data.on_error=skip", "engine=cpu")
    assert len(Builder(compose(*words)).dataset("train")) == SECONDS
    cfg = compose(*words, "data.reader.pseudo=true")
    data = Builder(cfg).dataset("train", reduced=True)
    assert (
        len(data) == SECONDS + 9
        and [name.split("/")[1] for name in data.names] == ["0" * 9, f"{60:09d}"] + ["pseudo"] * 9
    )
    sample = data[5]
    assert sample["image"].shape == (3, 32, 48) and sample["mask"].shape == (32, 48)
    assert len(Builder(cfg).dataset("train")) == SECONDS  # to score on
    assert len(Builder(cfg).dataset("val")) == len(Builder(cfg).dataset("test")) == SECONDS


@pytest.mark.heavy
def test_running_again_does_only_what_is_missing_or_other(home):
    videos = [home / "sar/train1" / name for name in ("video_01", "video_02")]
    first = times(home)
    shutil.rmtree(videos[1] / "pseudo")
    stale = videos[1] / ".pseudo.123.part"  # of a run that was killed
    stale.mkdir()
    prepare(home, "data.prepare.videos=[train1/video_01]")
    assert times(home).items() < first.items() and stale.exists()
    prepare(home)
    second = times(home)
    assert second.keys() == first.keys() and not stale.exists()
    assert {path for path in first if first[path] == second[path]} == {*(videos[0] / "pseudo").iterdir()}
    write_png(videos[0] / "segmentation/000000060.png", np.full((32, 48), 4, np.uint8))
    lost = sorted((videos[1] / "pseudo").iterdir())[0]
    lost.unlink()
    prepare(home)
    third = times(home)
    assert lost in third and not third.items() & second.items()
    assert notes(home)["made_by"]["masks"] != notes(home, "train1/video_02")["made_by"]["masks"]
    write_png(videos[0] / "rgb/000000066.png", np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8))
    prepare(home)
    fourth = times(home)
    assert {path for path in third if third[path] != fourth[path]} == {*(videos[0] / "pseudo").iterdir()}
    prepare(home, "tracker.radius=2", "data.prepare.min_agreement=1")
    assert not times(home).items() & fourth.items() and notes(home)["made_by"]["tracker"]["radius"] == 2


def test_a_bad_video_fails_alone(home):
    videos = [home / "sar/train1" / name for name in ("video_01", "video_02")]
    write_png(videos[0] / "rgb/000000012.png", np.zeros((8, 8, 3), np.uint8))
    shutil.rmtree(videos[0] / "pseudo")
    write_png(videos[1] / "segmentation/000000060.png", np.full((32, 48), 77, np.uint8))
    done = call(home, *PREPARE, "hydra.run.dir=bad")
    assert done.status == 1 and "2 of 2 videos could not be given pseudo-labels" in done.err
    assert "000000012.png is 8 x 8," in done.err and "- train1/video_02: " in done.err and "the ids 77" in done.err
    assert not (videos[0] / "pseudo").exists() and not list(videos[0].glob(".pseudo*"))


def test_a_full_disk_stops_cleanly_and_the_next_run_goes_on(home, monkeypatch):
    fail_after(monkeypatch, propagate, "write_png", 12, OSError(errno.ENOSPC, "No space left on device"))
    for number in (1, 2):
        shutil.rmtree(home / f"sar/train1/video_0{number}/pseudo")
    words = [*PREPARE, "data.prepare.min_agreement=0"]
    done = call(home, *words, "hydra.run.dir=full")
    assert done.status == 1 and "is full: 1 of 2 videos have their pseudo-labels" in done.err
    assert not list((home / "sar/train1/video_02").glob("*pseudo*"))
    whole = times(home)
    monkeypatch.undo()
    assert call(home, *words, "hydra.run.dir=again").status == 0
    assert len(times(home)) == 20 and whole.items() <= times(home).items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.prepare.min_agreement=1.5"],
            "data.prepare.min_agreement=1.5 is out of range. Give a number from 0 to 1",
        ),
        (["backbone=tiny", "backbone.weights=none.safetensors"], "none.safetensors"),
        (["tracker.context=0"], "context=0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_extracted(rendered, words, message):
    done = call(rendered, *PREPARE, *words, "hydra.run.dir=run")
    assert done.status == 1 and message in done.err and "No effect" not in done.err
    assert not (rendered / "sar/train1/video_01").exists()


def test_labels_are_mostly_right_and_better_than_a_copied_mask(tmp_path):
    """With the packaged backbone, held against what the renderer drew."""
    size = (96, 160)
    render_dataset(tmp_path / "sar", train_videos=1, test_videos=0, seconds=SECONDS, size=size, seed=SEED, workers=1)
    prepare(tmp_path, "backbone=tiny_surgical", "tracker.upsample=bilinear", "tracker.radius=4")
    truth = [mask for _, mask in render_clip((SEED, 0, 1), 11, size)]
    right, kept, copied = 0, 0, []
    stems = notes(tmp_path)["kept"]
    for stem in stems:
        drawn = truth[int(stem) // 6]
        mask = read_ids(tmp_path / f"sar/train1/video_01/pseudo/{stem}.png")
        right += int((mask == drawn)[mask != 255].sum())
        kept += int((mask != 255).sum())
        copied.append((truth[0 if int(stem) <= 30 else 10] == drawn).mean())
    assert len(stems) == 9 and kept > 0.9 * 9 * 96 * 160
    assert right / kept > np.mean(copied) + 0.05 and right / kept > 0.93


def test_a_second_run_waits_for_the_first(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(propagate, "_labels_of", lambda propagation, video: {"pseudo": 1})
    done = []
    second = threading.Thread(target=lambda: done.append(propagate.propagate(None, tmp_path, ["train1/video_01"])))
    with locked(tmp_path / "train1/video_01/.propagate.lock"):
        second.start()
        while "waiting for it" not in caplog.text:
            assert second.is_alive()
        assert not done
    second.join(10)
    assert done == [{"train1/video_01": {"pseudo": 1}}]
