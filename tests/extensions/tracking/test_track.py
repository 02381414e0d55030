import csv
import fcntl
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from config_files import FOLDER
from failing import fail_after
from making import write_motion_jpeg
from mistakes import assert_refused
from omegaconf import OmegaConf
from PIL import Image

from dinoseg.cli.launch import Job, launch
from dinoseg.config.nodes import instantiate
from dinoseg.extensions.tracking import track_mode as mode
from dinoseg.extensions.tracking.propagation.settings import CRW, DINO, DINOV3
from dinoseg.extensions.tracking.video import mask_folder
from dinoseg.extensions.tracking.video import report as track_report
from dinoseg.extensions.tracking.video import run as video_run
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.report.palette import default_palette
from dinoseg.runs.location import RunLocation
from dinoseg.utils import locks
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png

SIZE = (36, 50)
WORDS = ["mode=track", "backbone=rgb", "backbone.patch_size=4", "engine=cpu", "engine.precision=fp32"]
WORDS += ["tracker.short_side=36", "tracker.radius=4", "mode.batch_size=3", "mode.save_every=3"]


def frame(number):
    """Return a red and a blue square that move over grey noise, and their ids."""
    pixels = np.random.default_rng(number).integers(100, 130, (*SIZE, 3))
    ids = np.zeros(SIZE, np.uint8)
    for label, (top, left), colour in ((1, (4, 4 + number), (240, 30, 30)), (5, (20, 34 - number), (30, 30, 240))):
        pixels[top : top + 12, left : left + 12] = colour
        ids[top : top + 12, left : left + 12] = label
    return pixels.astype(np.uint8), ids


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for number in range(10):
        for name, pixels in zip(("in", "masks"), frame(number), strict=True):
            write_png(folder / f"{name}/{number:05d}.png", pixels)
    for name, ids in {"first": frame(0)[1], "empty": frame(0)[1] * 0, "small": frame(0)[1][1:]}.items():
        write_png(folder / f"{name}.png", ids)
    write_png(folder / "other.png", frame(1)[1])
    return folder


@pytest.fixture(scope="module")
def config(compose):
    return compose(*WORDS)


@pytest.fixture
def track(clip, config, compose, tmp_path, monkeypatch):
    """Return a function that runs the mode; only another tracker is worth composing the config once more."""
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*changes, out="out", source="in", labels="first.png"):
        words = [*WORDS, f"input={source or 'null'}", f"labels={labels or 'null'}", *changes]
        if any(change.startswith("tracker=") for change in changes):
            return launch(Job(compose(*words), RunLocation(tmp_path / out, tmp_path), words))
        cfg = config.copy()
        for word in words[len(WORDS) :]:
            key, value = word.split("=", 1)
            OmegaConf.update(cfg, key, yaml.safe_load(value))
        return launch(Job(cfg, RunLocation(tmp_path / out, tmp_path), words))

    return run


def masks(folder):
    return {path.name: read_ids(path) for path in sorted(Path(folder, "masks").iterdir())}


def content(folder, *kinds):
    """Return the files of a run folder with some endings."""
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.suffix in kinds}


def log(folder):
    return Path(folder, "run.log").read_text(encoding="utf-8")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_folder_of_frames_is_tracked(track):
    result = track()
    assert result["frames"] == 10 and result["objects"] == [1, 5] and result["frames_per_s"] > 0
    assert "10 frames in" in log("out") and "frames/s including reading and writing" in log("out")
    assert names("out") == ["config", "masks", "objects.csv", "overlay.mp4", "run.log", "track.json"]
    found = masks("out")
    assert found.keys() == {f"{number:05d}.png" for number in range(10)}
    for number in range(10):
        ids = frame(number)[1]
        for label in (1, 5):
            here = found[f"{number:05d}.png"] == label
            assert (here & (ids == label)).sum() / (here | (ids == label)).sum() > 0.55, (number, label)
    with Image.open("out/masks/00004.png") as image:
        assert image.mode == "P" and tuple(image.getpalette()[15:18]) == default_palette(6)[5]
    with open("out/objects.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and rows[0] == {
        **{"frame": "0", "name": "00000", "id": "1", "area": "144", "centre_x": "9.5", "centre_y": "9.5"},
        **{"left": "4", "top": "4", "right": "15", "bottom": "15"},
    }
    told = json.loads(Path("out/track.json").read_text(encoding="utf-8"))
    assert told["settings"]["tracker"]["radius"] == 4 and told["settings"]["precision"] == "float32"
    assert told["labels"] == {"00000": "first.png"} and told["size"] == list(SIZE) and told["fps"] == 25
    assert told["frames"] == told["frames_timed"] == 10 and told["report_frames_per_s"] > 0
    with VideoReader("out/overlay.mp4") as overlay:
        assert overlay.size == SIZE and len(list(overlay)) == 10


def test_video_is_tracked_with_another_protocol(track):
    write_motion_jpeg("v.avi", (frame(number)[0] for number in range(6)), SIZE)
    changes = ["tracker=crw", "tracker.short_side=null", "tracker.context=2"]
    result = track(*changes, source="v.avi")
    assert result["frames"] == 6 and names("out/masks") == [f"{number:09d}.png" for number in range(6)]
    told = json.loads(Path("out/track.json").read_text(encoding="utf-8"))
    expected = {**asdict(CRW), "context": 2, "radius": 4}
    assert told["settings"]["tracker"] == expected and told["fps"] == 12.5


def test_tracks_are_outlined_in_the_bright_colours_of_masks(track, monkeypatch):
    overlays = []
    blend = track_report.blend

    def keep_overlay(*given, **named):
        overlays.append(blend(*given, **named))
        return overlays[-1]

    monkeypatch.setattr(track_report, "blend", keep_overlay)
    track("mode.batch_size=10")
    track("mode.outline=0", "mode.palette=[[0,0,0],[9,250,9]]", "mode.opacity=1", "mode.batch_size=10", out="own")
    for out, overlay, width in (("out", overlays[0], 1), ("own", overlays[10], 20)):
        with Image.open(f"{out}/masks/00000.png") as image:
            ids = np.asarray(image)
            colours = np.array(image.getpalette()).reshape(-1, 3)
        for label in (1, 5):
            rows, columns = np.nonzero(ids == label)
            edge = (rows < rows.min() + width) | (columns < columns.min() + width)
            assert (overlay[rows[edge], columns[edge]] == colours[label]).all() and colours[label].max() > 200
    assert colours[1].tolist() == [9, 250, 9] and tuple(colours[5]) == default_palette(6)[5]


def test_own_videos_are_not_enlarged_but_protocols_are_published(compose):
    own = instantiate(compose("mode=track").tracker)
    assert (own.upsample, own.enlarge, own.short_side) == ("bilinear", False, 960)
    assert instantiate(compose("mode=app").tracker) == own
    assert asdict(instantiate(compose("mode=eval", "data=davis2017").tracker)) == asdict(DINOV3)


def test_the_grid_is_reported_before_the_first_frame(track):
    track("tracker.short_side=72", "tracker.enlarge=false", "tracker.rounding=down")
    assert "10 frames of 36 x 50 (height x width): the backbone gets them at 36 x 48, on a grid of 9 x 12" in log("out")
    assert "(tracker.enlarge=true tracker.short_side=72 is finer, but at least four times slower)" in log("out")
    track("tracker.short_side=72", "tracker.enlarge=true", out="large")
    assert "at 72 x 100, on a grid of 18 x 25 cells, enlarged to tracker.short_side=72: tracker.en" in log("large")


def interrupt(track, monkeypatch, module, name, count):
    """Leave the folder `cut` of a run that was killed at a call of a function."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_after(patch, module, name, count, KeyboardInterrupt())
        track(out="cut")
    assert names("cut") == ["config", "masks", "run.log", "state.safetensors"]


@pytest.fixture
def stopped_run(track, monkeypatch):
    interrupt(track, monkeypatch, mask_folder, "write_indexed_png", 7)
    assert len(names("cut/masks")) == 7


def test_stopped_run_resumes_in_its_folder(track, stopped_run):
    result = track("mode.restart=cut", out="second")
    assert re.search("Resuming in cut after [36] frames", log("second"))
    assert result["run"] == "cut" and names("second") == ["config", "run.log"]
    track(out="whole")
    assert content("cut", ".png", ".csv") == content("whole", ".png", ".csv") and len(masks("cut")) == 10
    assert Path("cut/overlay.mp4").stat().st_size == Path("whole/overlay.mp4").stat().st_size
    assert names("cut") == names("whole")
    assert_refused(lambda: track("mode.restart=cut", out="third"), "mode.restart=cut: that run is finished")


def test_run_stopped_in_its_report_resumes(track, monkeypatch):
    interrupt(track, monkeypatch, track_report, "blend", 0)
    assert track("mode.restart=cut", out="second")["frames"] == 10
    assert "track.json" in names("cut")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tracker.radius=5"], r"tracker\.radius was 4 and is 5"),
        (["tracker=dino", "tracker.short_side=36"], r"tracker\.first was nearest_exact and is nearest; tracker\.long_"),
        (["backbone.std=[.2,.2,.2]"], r"backbone\.weights was \w+ and is \w+"),
        (["backbone.patch_size=6"], r"backbone\.patch_size was 4 and is 6"),
        (["engine.precision=bf16"], "precision was float32 and is bfloat16"),
        (["labels=other.png"], "labels=other.png has changed"),
        (["input=masks"], "input=masks has changed"),
    ],
)
def test_different_run_is_not_resumed(track, stopped_run, changes, message):
    before = content("cut", ".png", ".safetensors")
    with pytest.raises(UserError, match=message):
        track("mode.restart=cut", *changes, out="second")
    assert content("cut", ".png", ".safetensors") == before and len(before) == 8


def test_concurrent_resuming_is_refused(track, stopped_run):
    with open("cut/run.log", "a", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_refused(lambda: track("mode.restart=cut", out="second"), "Another process is writing to ", "cut")
    assert track("mode.restart=cut", out="third")["frames"] == 10
    file = locks.acquire(Path("cut/run.log"))
    assert file is not None
    locks.release(file)


@pytest.mark.parametrize(
    ("module", "write", "said"),
    [
        (video_run, "save_track_state", "starts over, since no state was saved yet"),
        (mask_folder, "write_indexed_png", r"with mode\.restart=.*out resumes"),
    ],
)
def test_full_disk_error_explains_how_to_resume(track, monkeypatch, module, write, said):
    fail_after(monkeypatch, module, write, 0, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match=rf"Cannot write below .*No space left.*{said}"):
        track()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": None}, "set input=<video or folder of frames>"),
        ({"labels": None}, "needs the objects to track: set labels=<mask of the first frame"),
        ({"source": "nowhere"}, "input=nowhere: file or folder not found"),
        ({"labels": "nowhere"}, "labels=nowhere: file or folder not found"),
        ({"labels": "empty.png"}, "labels=empty.png has no object"),
        ({"labels": "small.png"}, "small.png is 35 x 50 pixels, but the frames are 36 x 50"),
        ({"changes": ["mode.smoothing=0"]}, "mode.smoothing=0 is for the classes of a trained segmenter"),
        ({"changes": ["mode.opacity=2"]}, r"mode\.opacity=2 is out of range. Give a number from 0"),
        ({"changes": ["mode.palette=[1,2,3]"]}, r"mode\.palette=\[1, 2, 3\] .*Give a list of lists"),
        ({"changes": ["mode.palette=[[0,0,300]]"]}, r"mode\.palette=\[\[0, 0, 300\]\]: .* whole numbers from 0 to 255"),
        ({"changes": ["mode.restart=nowhere"]}, "mode.restart=nowhere: not an unfinished run of mode=track"),
    ],
)
def test_mistakes_are_named_before_the_backbone_is_loaded(track, monkeypatch, options, message):
    monkeypatch.setattr(mode, "tracker_maker", lambda *_, **__: pytest.fail("the backbone was loaded"))
    with pytest.raises(UserError, match=message):
        track(*options.pop("changes", []), **options)
    assert not Path("out").exists()


def test_a_mask_for_every_frame_is_warned_of(track):
    track(labels="masks")
    assert "labels=masks has a mask for every frame, and each replaces the tracked mask" in log("out")


@pytest.mark.parametrize(("name", "settings"), [("crw", CRW), ("dino", DINO), ("dinov3", DINOV3)])
def test_configs_equal_the_protocols(compose, name, settings):
    node = compose("mode=track", f"tracker={name}").tracker
    assert asdict(instantiate(node)) == asdict(settings)
    written = yaml.safe_load((FOLDER / "tracker" / f"{name}.yaml").read_text())
    assert list(written) == ["_target_", *asdict(settings)]  # every key, in the fields' order


def resident():
    """Return the bytes of memory in use by this process."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux shows it")
def test_memory_does_not_grow_with_the_video(track, monkeypatch):
    size = (64, 96)
    used = {}
    still = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    write_motion_jpeg("v.avi", (np.roll(still, number, axis=1) for number in range(2000)), size)
    write_png(Path("noise.png"), (still[..., 0] > 200).astype(np.uint8))

    def watch_memory(module, name):
        real = getattr(module, name)
        counted = []

        def call(*given, **named):
            counted.append(None)
            if len(counted) in (200, 2000):
                used.setdefault(name, []).append(resident())
            return real(*given, **named)

        monkeypatch.setattr(module, name, call)

    watch_memory(mask_folder, "write_indexed_png")
    watch_memory(track_report, "blend")
    changes = ["tracker.short_side=64", "tracker.context=2", "backbone.patch_size=32", "mode.batch_size=20"]
    assert track(*changes, source="v.avi", labels="noise.png")["frames"] == 2000
    for name, (early, late) in used.items():
        # 1800 frames of 18 kB would be 33 MB
        assert late - early < 8e6, f"{name}: {(late - early) / 1e6:.1f} MB more"
