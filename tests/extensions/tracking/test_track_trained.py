"""mode=track with trained models: smoothed classes or slots, runs that were stopped, and words of no use."""

import csv
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import call, succeed
from failing import fail_after
from meta_files import RELEASED, write_released
from safetensors import safe_open
from safetensors.torch import save_file

from dinoseg.extensions.tracking import track_mode as mode
from dinoseg.extensions.tracking.video import mask_folder
from dinoseg.extensions.tracking.video.state import read_track_state
from dinoseg.training import engine
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png

WAYS = {
    "segmenter": ("resume=segmenter", "mode.smoothing=0.8", "tracker.context=2"),
    "slots": ("resume=slots", "labels=first.png", "slots=lock_on", "slots.match=overlap", "slots.background_slots=2"),
    "backbone": ("labels=first.png", "backbone=rgb", "backbone.patch_size=4", "tracker.short_side=null"),
}
CPU = ("engine=cpu", "engine.precision=fp32")


def track(where, out, *more, status=0):
    words = ("mode=track", "input=clip", *CPU, "mode.batch_size=2", "mode.save_every=2", f"hydra.run.dir={out}")
    done = call(where, *words, *more)
    assert done.status == status and "Traceback" not in done.err, done.err
    return done


def masks(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "masks").glob("*.png"))}


def read_masks(folder):
    return np.stack([read_ids(path) for path in sorted((folder / "masks").glob("*.png"))])


@pytest.fixture(scope="module")
def whole_runs(trained):
    """Track by each way to the end; return what each said, and how often its model was run."""
    said, passes = {}, {}
    for way, words in WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            seen = passes[way] = []
            patch.setattr(engine.Engine, "autocast", lambda _, seen=seen: nullcontext(seen.append(1)))
            said[way] = track(trained, f"whole_{way}", *words).err
    return said, {way: len(seen) for way, seen in passes.items()}


@pytest.fixture(scope="module")
def stopped_runs(trained):
    """Let Ctrl-C come before the sixth mask of a run of each way; return what each said."""
    said = {}
    for way, words in WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            fail_after(patch, mask_folder, "write_indexed_png", 5, KeyboardInterrupt())
            said[way] = track(trained, f"stopped_{way}", *words, status=130).err.replace(f"{trained}/", "")
    return said


@pytest.fixture
def cut(trained, stopped_runs, tmp_path):
    """Return a function that copies the stopped run of a way."""
    return lambda way: shutil.copytree(trained / f"stopped_{way}", tmp_path / "cut")


@pytest.mark.parametrize("way", WAYS)
def test_stopped_run_resumes(trained, whole_runs, stopped_runs, cut, way):
    assert f"Stopped: the same command with mode.restart=stopped_{way} resumes." in stopped_runs[way]
    assert "\ninterrupted: finished results are in " in stopped_runs[way] and "training" not in stopped_runs[way]
    part = cut(way)
    whole = trained / f"whole_{way}"
    assert len(masks(part)) == 5
    resumed = track(trained, f"on_{way}", *WAYS[way], f"mode.restart={part}").err
    assert "No effect here" not in resumed + whole_runs[0][way]
    assert masks(part) == masks(whole) and len(masks(whole)) == 7
    told = [json.loads((folder / "track.json").read_text()) for folder in (part, whole)]
    assert told[0]["flicker"] == told[1]["flicker"] and told[0]["settings"] == told[1]["settings"]
    assert (told[0]["flicker"] is not None) == (way == "segmenter")


def test_a_segmenter_is_smoothed(trained, whole_runs):
    track(trained, "own", "resume=segmenter", "mode.smoothing=0")
    succeed(trained, "mode=predict", "resume=segmenter", "input=clip", *CPU, "hydra.run.dir=p")
    predicted = [np.load(path) for path in sorted((trained / "p").glob("*/segmentation_raw.npy"))]
    own, smooth = read_masks(trained / "own"), read_masks(trained / "whole_segmenter")
    np.testing.assert_array_equal(own, predicted)
    assert smooth.shape == own.shape and (smooth != own).any()
    shares = [float(np.mean(stack[1:] != stack[:-1])) for stack in (own, smooth)]
    flicker = json.loads((trained / "whole_segmenter/track.json").read_text())["flicker"]
    assert [flicker["before"], flicker["after"]] == pytest.approx(shares)
    assert f"{100 * shares[0]:.2f} %, smoothed {100 * shares[1]:.2f} %" in whole_runs[0]["segmenter"]
    with open(trained / "whole_segmenter/objects.csv", encoding="utf-8", newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == {str(label) for label in np.unique(smooth)}


def test_slots_are_followed_with_and_without_a_first_mask(trained, whole_runs):
    track(trained, "free", "resume=slots")
    free = read_masks(trained / "free")
    assert set(np.unique(free)) <= {1, 2, 3} and free.shape == (7, 32, 32)
    given = read_masks(trained / "whole_slots")
    first = read_ids(trained / "first.png")
    assert set(np.unique(given)) <= set(np.unique(first)) and len(np.unique(given)) > 1
    assert (trained / "whole_slots/overlay.mp4").is_file()


def test_model_gets_batches_of_frames_in_engine_precision(whole_runs):
    # four batches of 7 frames; slots are matched in each frame, and the first pass is kept of the provenance
    assert whole_runs[1] == {"segmenter": 1 + 4, "slots": 1 + 4 + 7, "backbone": 1 + 4}


def test_slots_are_no_classes_to_predict(trained):
    done = call(trained, "mode=predict", "resume=slots", "input=clip", "engine=cpu")
    assert done.status == 1 and "Traceback" not in done.err
    assert "resume=slots/checkpoints/best.safetensors predicts slots" in done.err and "mode=track" in done.err


def test_stopped_run_does_not_resume_at_another_scale(trained, cut):
    """At the same it does: test_stopped_run_resumes."""
    part = cut("segmenter")
    before = masks(part)
    on = (*WAYS["segmenter"], f"mode.restart={part}")
    said = track(trained, "other_scale", *on, "resolution.longest=null", status=1).err
    assert "settings differ from that run: large_frames was above 72 pixels reduced to 48 (resolution.longest " in said
    assert masks(part) == before


def read_state(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["track"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_track_state_without_a_tensor_is_refused(trained, cut):
    part = cut("segmenter")
    path = part / "state.safetensors"
    info, tensors = read_state(path)
    assert info["progress"]["done"] == 4 and len(tensors) >= 3
    save_file({key: value for key, value in tensors.items() if key != min(tensors)}, path, {"track": json.dumps(info)})
    before = masks(part)
    said = track(trained, "second", *WAYS["segmenter"], f"mode.restart={part}", status=1).err
    assert "state.safetensors is not readable" in said and "to start over" in said
    assert masks(part) == before


def test_track_state_with_an_invalid_frame_count_is_refused(cut):
    part = cut("backbone")
    standing = read_track_state(part)
    tracker = SimpleNamespace(settings=standing.settings, load=lambda tensors: None)
    assert mode._go_on(tracker, standing, part).done == 4
    path = part / "state.safetensors"
    info, tensors = read_state(path)
    for done in (-1, "4", 0):
        save_file(tensors, path, {"track": json.dumps({**info, "progress": {**info["progress"], "done": done}})})
        with pytest.raises(UserError, match="state.safetensors is not readable .* to start over"):
            mode._go_on(tracker, read_track_state(part), part)


@pytest.mark.parametrize(
    ("way", "more", "message"),
    [
        ("segmenter", ("labels=first.png",), "labels=first.png: a trained segmenter needs no masks"),
        ("slots", ("mode.smoothing=0.5",), "mode.smoothing=0.5 is for the classes of a trained segmenter"),
        ("slots", ("labels=null",), "slots.lock_on=true creates slots from the first frame's mask, but none is given."),
    ],
)
def test_refused_tracking_leaves_no_folder(trained, way, more, message):
    done = track(trained, "refused", *WAYS[way], *more, status=1)
    assert message in done.err
    assert not (trained / "refused").exists(), [path.name for path in (trained / "refused").iterdir()]


@pytest.mark.parametrize(
    ("way", "more", "idle"),
    [
        ("segmenter", ("slots.temperature=0.1", "tracker.short_side=64", "tracker.first=nearest", "tracker.radius=3"),
         "slots.temperature=0.1, tracker.short_side=64, tracker.first=nearest. Smoothing"),
        ("slots", ("tracker=crw", "tracker.context=3", "slots.temperature=0.1"),
         "tracker=crw, tracker.context=3. Slots"),
        ("backbone", ("slots=lock_on", "slots.extra_slots=1", "tracker.context=3"),
         "slots=lock_on, slots.extra_slots=1. Label propagation"),
        ("segmenter", ("tracker=crw", "tracker.temperature=0.1"), None),
    ],
)  # fmt: skip
def test_overrides_without_effect_are_named_once(trained, monkeypatch, way, more, idle):
    monkeypatch.setattr(mode, "track_video", lambda job: None)
    monkeypatch.setattr(mode, "write_results", lambda *_: {})
    own = [word for word in WAYS[way] if word.split("=")[0] not in {each.split("=")[0] for each in more}]
    done = track(trained, "idle", *own, *more)
    shutil.rmtree(trained / "idle")
    assert done.err.count("No effect here") == (idle is not None)
    assert idle is None or f"No effect here: {idle}" in done.err


@pytest.mark.heavy
def test_a_released_segmentor_is_smoothed(trained, tmp_path):
    backbone, head = write_released(tmp_path)
    words = [*RELEASED, *CPU, "hparam=ade20k_m2f", f"backbone.weights={backbone}", "engine.workers=0"]
    for seed in (0, 1):
        image = np.random.default_rng(seed).integers(0, 256, (64, 96, 3)).astype(np.uint8)
        write_png(tmp_path / f"clip/{seed}.png", image)
    track(tmp_path, "smooth", *words, f"head.weights={head}")
    told = json.loads((tmp_path / "smooth/track.json").read_text())
    assert told["settings"]["kind"] == "smoothing" and told["settings"]["smoothing"] == 0.5
    assert told["flicker"]["after"] < told["flicker"]["before"]
    write_png(tmp_path / "first.png", np.ones((64, 96), np.uint8))
    refused = track(tmp_path, "no", *words, f"head.weights={head}", "labels=first.png", status=1)
    assert "or leave head.weights out" in refused.err
