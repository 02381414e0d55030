import hashlib
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from failing import fail_after
from making import write_motion_jpeg
from mistakes import assert_refused

from dinoseg.core.contracts import Backbone
from dinoseg.experiment.settings import check_same_settings
from dinoseg.extensions.tracking.propagation.settings import DINOV3, PropagationSettings
from dinoseg.extensions.tracking.propagation.tracker import PropagationTracker
from dinoseg.extensions.tracking.video import mask_folder
from dinoseg.extensions.tracking.video import state as track_state
from dinoseg.extensions.tracking.video.labels import find_labels
from dinoseg.extensions.tracking.video.run import TrackJob, track_video
from dinoseg.extensions.tracking.video.state import STATE, read_track_state
from dinoseg.extensions.video.frames import open_frames
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png

pytestmark = pytest.mark.slow  # whole videos

SETTINGS = PropagationSettings(short_side=24, context=3, radius=3)
SIZE = (20, 28)


class Patches(Backbone):
    patch_size = 4

    def forward(self, images):
        return [F.avg_pool2d(images - 0.45, 4)]


class Stopped(Exception):
    pass


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (*SIZE, 3)).astype(np.uint8)


def given_mask(value=1):
    mask = np.zeros(SIZE, np.uint8)
    mask[3:12, 4:15] = value
    return mask


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Write 23 frames, the first one's mask and that of an object which appears in frame 10, and track them once."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(23):
        write_png(folder / f"in/{number}.png", pixels(number))
    write_png(folder / "labels/0.png", given_mask(3))
    write_png(folder / "labels/10.png", given_mask(2)[:, ::-1])
    run(folder, folder / "whole")
    return folder


@pytest.fixture
def clip(tracked, tmp_path):
    """Copy the frames, the masks and the whole run, which a test may change."""
    return shutil.copytree(tracked, tmp_path, dirs_exist_ok=True)


def video(path, count=23):
    return write_motion_jpeg(path, map(pixels, range(count)), SIZE)


class Ahead(PropagationTracker):
    """One that notes what it was shown of a video before."""

    def look_ahead(self, video):
        self.ahead = [
            (list(frames), [None if mask is None else mask.max() for mask in masks]) for frames, masks in video()
        ]


def run(clip, folder, source="in", *, restart=False, settings=SETTINGS, backbone=Patches, tracker=None, **changes):
    """Track, as the mode does."""
    tracker = tracker or PropagationTracker(backbone(), settings, batch_size=4)
    standing = read_track_state(folder) if restart else None
    if standing:
        check_same_settings(folder, standing.settings, tracker.settings)
        tracker.load(standing.tensors)
    options = {"batch_size": 4, "save_every": 5} | changes
    with open_frames(str(clip / source)) as frames:
        labels = find_labels(str(clip / "labels"), frames)
        return track_video(TrackJob(tracker, frames, labels, folder, standing and standing.progress, **options))


def run_until(clip, folder, count, **changes):
    """Let a run die when it has written so many masks."""
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, mask_folder, "write_indexed_png", count, Stopped)
        with pytest.raises(Stopped):
            run(clip, folder, **changes)


def masks(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "masks").iterdir()}


def test_masks_are_named_as_frames(clip):
    assert masks(clip / "whole").keys() == {f"{number}.png" for number in range(23)}
    assert np.array_equal(read_ids(clip / "whole/masks/0.png"), given_mask(3))
    assert 2 not in read_ids(clip / "whole/masks/9.png") and 2 in read_ids(clip / "whole/masks/10.png")
    video(clip / "v.avi", 11)
    passed = run(clip, clip / "out", "v.avi")
    assert passed.items == 11 and passed.seconds > 0
    assert masks(clip / "out").keys() == {f"{number:09d}.png" for number in range(11)}


@pytest.mark.parametrize(
    ("stop", "done"),
    [
        *((0, 0), (7, 0), (8, 8), (16, 16), (22, 20)),
        *(pytest.param(*stop, marks=pytest.mark.heavy) for stop in ((3, 0), (15, 8), (19, 16))),
    ],
)
def test_restart_after_a_stop_gives_the_same_masks(clip, stop, done):
    run_until(clip, clip / "cut", stop)
    assert read_track_state(clip / "cut").progress.done == done
    assert run(clip, clip / "cut", restart=True).items == 23 - done
    assert masks(clip / "whole") == masks(clip / "cut")
    whole, cut = map(read_track_state, (clip / "whole", clip / "cut"))
    assert whole.progress == cut.progress and whole.progress.done == 20
    assert whole.tensors.keys() == cut.tensors.keys() >= {"features", "labels", "ids"}
    assert all(torch.equal(whole.tensors[key], cut.tensors[key]) for key in whole.tensors)


@pytest.mark.parametrize("source", ["in", "v.mkv"])
def test_tracker_can_look_ahead_at_the_whole_video(clip, source):
    video(clip / "v.mkv")
    (clip / "labels/10.png").rename(clip / "labels/000000010.png" if source == "v.mkv" else clip / "labels/10.png")
    (clip / "labels/0.png").rename(clip / "labels/000000000.png" if source == "v.mkv" else clip / "labels/0.png")
    ahead = Ahead(Patches(), SETTINGS, batch_size=4)
    assert run(clip, clip / "out", source, tracker=ahead).items == 23
    assert [len(frames) for frames, _ in ahead.ahead] == [4] * 5 + [3]
    given = [value for _, values in ahead.ahead for value in values]
    assert [(number, value) for number, value in enumerate(given) if value] == [(0, 3), (10, 2)]
    with open_frames(str(clip / source)) as frames:
        assert np.array_equal([frame for batch, _ in ahead.ahead for frame in batch], list(frames))


@pytest.mark.parametrize(("stop", "looks"), [(0, True), (7, True), (8, False), (19, False)])
def test_tracker_looks_ahead_only_if_nothing_is_finished(clip, stop, looks):
    run_until(clip, clip / "cut", stop)
    ahead = Ahead(Patches(), SETTINGS, batch_size=4)
    run(clip, clip / "cut", restart=True, tracker=ahead)
    assert hasattr(ahead, "ahead") == looks


@pytest.mark.parametrize(
    ("broken", "more"), [(17, r"\. No mask was written.*slots\.passes=1"), (0, r"image: replace or remove it\.$")]
)
def test_unreadable_frame_fails_while_looking_ahead(clip, broken, more):
    path = clip / f"in/{broken}.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"{broken}\.png.*{more}"):
        run(clip, clip / "out", tracker=Ahead(Patches(), SETTINGS, batch_size=4))
    assert not (clip / "out/masks").exists() or not masks(clip / "out")


def test_several_stops_and_masks_that_were_lost(clip):
    run_until(clip, clip / "cut", 14)
    run_until(clip, clip / "cut", 9, restart=True)
    assert read_track_state(clip / "cut").progress.done == 16
    for number in range(16, 23):
        (clip / f"cut/masks/{number}.png").write_bytes(b"half")  # written anew
    run(clip, clip / "cut", restart=True)
    assert masks(clip / "cut") == masks(clip / "whole")
    assert run(clip, clip / "cut", restart=True).items == 3  # the last batch alone


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_lost_masks_of_finished_frames_are_reported_first(clip, harm):
    run_until(clip, clip / "cut", 17)
    kept = {number: (clip / f"cut/masks/{number}.png").read_bytes() for number in (4, 15)}
    for number in kept:
        harm(clip / f"cut/masks/{number}.png")
    before = masks(clip / "cut")
    standing = (clip / "cut" / STATE).read_bytes()
    told = r"cut: 2 masks of the 16 finished frames missing or empty in .*masks: 4\.png, 15\.png\. .*start over"
    with pytest.raises(UserError, match=told):
        run(clip, clip / "cut", restart=True)
    assert masks(clip / "cut") == before and (clip / "cut" / STATE).read_bytes() == standing
    for number, file in kept.items():
        (clip / f"cut/masks/{number}.png").write_bytes(file)
    run(clip, clip / "cut", restart=True)
    assert masks(clip / "cut") == masks(clip / "whole")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read as Linux shows them")
def test_masks_are_on_the_disk_before_they_count_as_done(clip, monkeypatch):
    synced, saved = [], []
    real = track_state.write_tensors

    def write(path, tensors, header):
        synced_before = [name for name in synced if "state" not in name]
        real(path, tensors, header)
        last = saved[-1] if saved else 0
        done = read_track_state(clip / "out").progress.done
        due = [f"{number}.png" for number in range(last, done)]
        assert synced_before == [*due, "masks"][: len(due) + bool(due)]
        synced.clear()
        saved.append(done)

    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink().name))
    monkeypatch.setattr(track_state, "write_tensors", write)
    run(clip, clip / "out")
    assert saved == [0, 8, 16, 20]


def test_another_batch_size_is_warned_of(clip, caplog):
    run_until(clip, clip / "cut", 17)
    run_until(clip, clip / "cut", 2, restart=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    run(clip, clip / "cut", restart=True, batch_size=3)
    (told,) = [message for message in caplog.messages if "batch_size" in message]
    assert "mode.batch_size was 4 and is 3" in told and "by rounding" in told
    assert masks(clip / "cut").keys() == masks(clip / "whole").keys()
    assert read_track_state(clip / "cut").progress.batch_size == 3


def test_video_that_ended_early_resumes_once_fixed(clip):
    whole = video(clip / "v.avi").read_bytes()
    run(clip, clip / "of_video", "v.avi")
    (clip / "v.avi").write_bytes(whole[: int(0.7 * len(whole))])
    told = assert_refused(lambda: run(clip, clip / "cut", "v.avi", save_every=100), "ends early: 1", "mode.restart=")
    count = len(masks(clip / "cut"))
    assert f"{count} of 23 frames" in told and f"{count} masks so far" in told
    assert read_track_state(clip / "cut").progress.done == count - count % 4 - 4 >= 4
    (clip / "v.avi").write_bytes(whole)
    assert run(clip, clip / "cut", "v.avi", restart=True).items == 23 - (count - count % 4 - 4)
    assert masks(clip / "cut") == masks(clip / "of_video")


class CutShort:
    """The frames of a folder up to one, the last of them damaged, as a decoder gives them of a video cut inside it."""

    def __init__(self, frames, count):
        self.frames, self.end = frames, count

    def __getattr__(self, name):
        return getattr(self.frames, name)

    def __iter__(self):
        for number, frame in zip(range(self.end), self.frames, strict=False):
            yield frame if number < self.end - 1 else frame // 2
        raise UserError(f"in ends early: {self.end} of 23 frames read.")


@pytest.mark.parametrize("save_every", [1, pytest.param(100, marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    ("batch", "count", "done"), [(4, 12, 8), (4, 13, 8), (4, 15, 8), (4, 4, 0), (4, 3, 0), (1, 9, 8), (3, 12, 9)]
)
def test_last_frames_before_an_early_end_are_tracked_again(clip, batch, count, done, save_every):
    if batch != 4:
        shutil.rmtree(clip / "whole")
        run(clip, clip / "whole", batch_size=batch)
    run_cut_short(clip, count, batch_size=batch, save_every=save_every)
    assert len(masks(clip / "cut")) == count and read_track_state(clip / "cut").progress.done == done
    assert run(clip, clip / "cut", restart=True, batch_size=batch).items == 23 - done
    assert masks(clip / "cut") == masks(clip / "whole")


def run_cut_short(clip, count, **changes):
    frames = CutShort(open_frames(str(clip / "in")), count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "open_frames", lambda _: nullcontext(frames))
        with pytest.raises(UserError, match=rf"ends early: {count} of 23.* {count} masks so far are in"):
            run(clip, clip / "cut", **changes)


def test_repeated_restart_with_a_short_input_preserves_progress(clip):
    for restart, count in ((False, 12), (True, 12), (True, 10), (True, 16)):
        run_cut_short(clip, count, restart=restart, save_every=1)
        assert read_track_state(clip / "cut").progress.done == (12 if count == 16 else 8)
    run(clip, clip / "cut", restart=True)
    assert masks(clip / "cut") == masks(clip / "whole")


def test_a_broken_frame_and_a_broken_mask_stop_at_their_place(clip):
    good = (clip / "in/17.png").read_bytes()
    (clip / "in/17.png").write_bytes(good[:60])
    assert_refused(lambda: run(clip, clip / "cut"), "Cannot read ", "17.png as an image", " 17 masks so far are in")
    assert masks(clip / "cut").keys() == {f"{number}.png" for number in range(17)}
    (clip / "in/17.png").write_bytes(good)
    run(clip, clip / "cut", restart=True)
    assert masks(clip / "cut") == masks(clip / "whole")
    write_png(clip / "labels/10.png", given_mask(2)[:-1])
    assert_refused(lambda: run(clip, clip / "other"), "10.png is 19 x 28 pixels", " 10 masks so far")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clip: write_png(clip / "in/3.png", pixels(99)), r"input=.*in has changed .*cut/config/overrides\.txt"),
        (lambda clip: (clip / "in/3.png").rename(clip / "in/3a.png"), r"input=.*in has changed in"),
        (lambda clip: write_png(clip / "labels/0.png", given_mask(4)), "labels has changed in the first 16 frames"),
        (lambda clip: shutil.copy(clip / "labels/0.png", clip / "labels/2.png"), "labels=.*/labels has changed in"),
        (lambda clip: (clip / "labels/10.png").rename(clip / "labels/11.png"), "labels=.*/labels has changed in"),
        (lambda clip: [(clip / f"in/{number}.png").unlink() for number in range(11, 23)], "has 11 frames, but the run"),
    ],
)
def test_another_input_or_other_labels_are_refused(clip, change, message):
    run_until(clip, clip / "cut", 17)
    before = masks(clip / "cut")
    standing = (clip / "cut" / STATE).read_bytes()
    change(clip)
    with pytest.raises(UserError, match=message):
        run(clip, clip / "cut", restart=True)
    assert masks(clip / "cut") == before and (clip / "cut" / STATE).read_bytes() == standing


def test_frames_and_labels_that_were_not_reached_may_change(clip):
    run_until(clip, clip / "cut", 14)
    write_png(clip / "in/23.png", pixels(23))
    write_png(clip / "labels/21.png", given_mask(8))
    run(clip, clip / "cut", restart=True)
    run(clip, clip / "changed")
    assert masks(clip / "cut") == masks(clip / "changed") and len(masks(clip / "cut")) == 24


def test_a_mask_beyond_a_videos_end_is_refused_at_the_end(clip):
    video(clip / "v.avi", 10)  # a header's count may be one short, so mask 10 may have a frame
    with pytest.raises(UserError, match=r"labels has 1 mask without frame: 10.png; .*v\.avi has 10 frames"):
        run(clip, clip / "out", "v.avi")
    (clip / "labels/10.png").unlink()
    assert run(clip, clip / "out", "v.avi", restart=True).items == 2


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


class Wide(Patches):
    """Many channels of each patch of 4 x 4 pixels: 40 of every pixel in it."""

    def forward(self, images):
        return [F.pixel_unshuffle(images - 0.45, 4).repeat(1, 40, 1, 1)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux shows it")
def test_features_of_past_frames_are_freed(clip, monkeypatch):
    video(clip / "v.avi", 200)
    real = mask_folder.write_indexed_png
    used = []

    def write(*given):
        used.append(resident_bytes())
        real(*given)

    monkeypatch.setattr(mask_folder, "write_indexed_png", write)
    settings = replace(DINOV3, short_side=None, radius=2, context=3)
    run(clip, clip / "out", "v.avi", settings=settings, backbone=Wide)
    growth = used[-1] - used[60]
    assert len(used) == 200 and growth < 10e6, f"{growth / 1e6:.1f} MB"  # features of 140 frames would be 38 MB
