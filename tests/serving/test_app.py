import base64
import errno
import io
import stat
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving_stand_ins import InThread, encoded, picture, service
from starlette.testclient import TestClient

from dinoseg.inference.video_file import VideoReader
from dinoseg.inference.video_writer import VideoWriter
from dinoseg.serving import jobs
from dinoseg.serving.answers import MaskStyle
from dinoseg.serving.app import App
from dinoseg.serving.clips import make_overlay
from dinoseg.serving.guard import Hosts
from dinoseg.serving.limits import ClipLimits, Refused
from dinoseg.tracking.tracker import Tracker
from dinoseg.utils.errors import UserError

FRAMES, SIZE = 6, (32, 48)


class Still(Tracker):
    """Follows nothing: every mask is the first one."""

    settings = {}
    first = None

    def track_batch(self, frames, labels):
        self.first = labels[0] if self.first is None else self.first
        return [self.first for _ in frames]

    def state(self):
        return {}

    def load(self, state):
        pass


@pytest.fixture(autouse=True)
def clips_in_threads(monkeypatch):
    """Decode clips in threads: a process takes as long to start as these tests."""
    monkeypatch.setattr("dinoseg.serving.clips.Child", InThread)


@contextmanager
def app(folder, before=lambda images: None, tracker=Still, max_pixels=10_000, **clips):
    with service(before, image_mib=0.5, max_pixels=max_pixels) as made:
        application = App(made, ClipLimits(**clips), folder, tracker).application(Hosts.of("127.0.0.1"))
        with TestClient(application, base_url="http://localhost") as ask:
            yield ask


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with VideoWriter(path, 10.0, SIZE) as writer:
        for number in range(FRAMES):
            writer.write(np.full((*SIZE, 3), 40 * number, np.uint8))
    return path.read_bytes()


def fast(path, frames):
    with VideoWriter(path, 100.0, SIZE) as writer:
        for _ in range(frames):
            writer.write(np.zeros((*SIZE, 3), np.uint8))
    return path.read_bytes()


def finished(ask, job):
    end = time.monotonic() + 120
    while (told := ask.get(f"/app/{job}").json())["state"] in ("waiting", "running"):
        assert time.monotonic() < end
        time.sleep(0.005)
    return told


def refused(answer):
    return answer.status_code, answer.json()["error"]["rule"]


def test_a_picture_gives_areas_and_both_masks_and_is_counted(tmp_path):
    image = picture(20, 30)
    bright = image.mean(axis=-1) > 127
    with app(tmp_path) as ask:
        told = ask.post("/app/image", content=encoded(image)).json()
        assert (told["width"], told["height"]) == (30, 20)
        assert [area["pixels"] for area in told["areas"]] == [(~bright).sum(), bright.sum()]
        assert [area["name"] for area in told["areas"]] == ["dark", "bright"]
        for name, mode in (("mask", "P"), ("ids", "L")):
            mask = Image.open(io.BytesIO(base64.b64decode(told[name])))
            assert mask.mode == mode and (np.asarray(mask) == bright).all()
        assert refused(ask.post("/app/image", content=b"text")) == (400, "format")
        metrics = ask.get("/metrics").text.splitlines()
        assert {'dinoseg_requests_total{code="200"} 1', 'dinoseg_errors_total{rule="format"} 1'} <= set(metrics)
        assert "dinoseg_request_seconds_count 2" in metrics
        assert list(tmp_path.iterdir()) == []  # nothing is kept


def test_a_clip_is_segmented_frame_by_frame(tmp_path, clip):
    with app(tmp_path) as ask:
        taken = ask.post("/app/clip", content=clip).json()
        assert (taken["width"], taken["height"], taken["frames"], taken["state"]) == (48, 32, FRAMES, "ready")
        assert ask.post(f"/app/{taken['id']}/segment?opacity=1").status_code == 200
        told = finished(ask, taken["id"])
        assert (told["state"], told["done"]) == ("done", FRAMES), told
        masks = zipfile.ZipFile(io.BytesIO(ask.get(f"/app/{taken['id']}/masks.zip").content))
        shown = [np.unique(np.asarray(Image.open(masks.open(name)))).tolist() for name in sorted(masks.namelist())]
        assert shown == [[0], [0], [0], [0], [1], [1]]  # levels 0, 40, ..., 200
        assert [area["share"] for area in told["areas"]] == pytest.approx([4 / 6, 2 / 6])
        part = ask.get(f"/app/{taken['id']}/overlay.mp4", headers={"range": "bytes=0-9"})
        assert part.status_code == 206 and len(part.content) == 10
        (tmp_path / "got.mp4").write_bytes(ask.get(f"/app/{taken['id']}/overlay.mp4").content)
        with VideoReader(tmp_path / "got.mp4") as reader:
            last = list(reader)[-1]
        assert last[..., 0].mean() > 200 > 60 > last[..., 1].mean()  # bright, and red is its colour


def test_what_is_painted_is_followed(tmp_path, clip):
    mask = np.zeros(SIZE, np.uint8)
    mask[4:8, 4:12], mask[20:24, 4:8] = 1, 3
    with app(tmp_path) as ask:
        job = ask.post("/app/clip", content=clip).json()["id"]
        assert refused(ask.post(f"/app/{job}/track", content=mask.tobytes()[1:])) == (400, "mask_size")
        assert refused(ask.post(f"/app/{job}/track", content=bytes(mask.size))) == (400, "no_object")
        assert refused(ask.post(f"/app/{job}/track", content=b"\xff" * mask.size)) == (400, "no_object")
        assert ask.post(f"/app/{job}/track", content=mask.tobytes()).status_code == 200
        told = finished(ask, job)
        areas = {area["name"]: area["pixels"] for area in told["areas"]}
        assert areas == {"background": mask.size - 48, "object 1": 32, "object 3": 16}
        assert ask.post(f"/app/{job}/track", content=mask.tobytes()).status_code == 200  # once more, another way
        assert finished(ask, job)["state"] == "done"
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_backbone_follows_nothing(tmp_path, clip):
    with app(tmp_path, tracker=None) as ask:
        assert ask.get("/app/about").json()["tracks"] is False
        job = ask.post("/app/clip", content=clip).json()["id"]
        assert refused(ask.post(f"/app/{job}/track", content=b"1")) == (400, "no_tracker")


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "format"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "format"),
        (encoded(picture()), "format"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 500, "unreadable"),
    ],
    ids=["nothing", "playlist", "list of files", "picture", "cut"],
)
def test_what_is_no_video_is_refused_and_leaves_nothing(tmp_path, data, rule):
    with app(tmp_path) as ask:
        assert refused(ask.post("/app/clip", content=data)) == (400, rule)
        assert list(tmp_path.iterdir()) == []


def test_a_clip_over_a_limit_is_refused(tmp_path, clip):
    with app(tmp_path, max_seconds=0.5) as ask:
        assert refused(ask.post("/app/clip", content=clip)) == (400, "max_seconds")
    with app(tmp_path, max_pixels=SIZE[0] * SIZE[1] - 1) as ask:
        assert refused(ask.post("/app/clip", content=clip)) == (400, "max_pixels")
    with app(tmp_path, max_seconds=0.5) as ask:  # 31 frames in half a second are one too many
        assert refused(ask.post("/app/clip", content=fast(tmp_path / "fast.mp4", 31))) == (400, "max_seconds")
        assert ask.post("/app/clip", content=fast(tmp_path / "fast.mp4", 30)).status_code == 200
    (tmp_path / "small").mkdir()
    with app(tmp_path / "small", video_mib=0.0001) as ask:
        assert refused(ask.post("/app/clip", content=clip)) == (413, "max_bytes")
        assert list((tmp_path / "small").iterdir()) == []


def test_a_clip_that_has_more_frames_than_it_says_is_left(tmp_path, clip):
    (tmp_path / "clip.mp4").write_bytes(clip)
    job, style = jobs.UploadJob("id", tmp_path, {"height": SIZE[0], "width": SIZE[1]}), MaskStyle(str, ((0, 0, 0),))
    with pytest.raises(UserError, match="more frames than its header states"):
        make_overlay(
            job, tmp_path / "clip.mp4", ClipLimits(max_seconds=0.05), style,
            lambda frames: [np.zeros(SIZE, np.uint8) for _ in frames],
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_app_looks_for_what_nobody_asks_for(tmp_path, clip, monkeypatch):
    monkeypatch.setattr("dinoseg.serving.app._SWEEP", 0.01)
    with app(tmp_path, keep_minutes=1e-4) as ask:
        assert ask.post("/app/clip", content=clip).status_code == 200
        end = time.monotonic() + 120
        while list(tmp_path.iterdir()):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_nobody_gets_at_anothers_files(tmp_path, clip):
    with app(tmp_path) as ask:
        first, second = (ask.post("/app/clip", content=clip).json()["id"] for _ in range(2))
        assert first != second and len(first) == 32
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in tmp_path.iterdir()} == {0o700}
        assert refused(ask.get(f"/app/{first[:-1]}/frame.png")) == (404, "gone")
        for name in ("clip.mp4", "..%2Fclip.mp4", "overlay.mp4"):
            assert ask.get(f"/app/{first}/{name}").status_code == 404
        assert ask.delete(f"/app/{first}").status_code == 204
        assert refused(ask.get(f"/app/{first}")) == (404, "gone") and ask.get(f"/app/{second}").status_code == 200
        assert len(list(tmp_path.iterdir())) == 1


def test_classes_of_a_clip_can_be_switched_off_without_the_model(tmp_path, clip):
    seen = []
    with app(tmp_path, lambda images: seen.append(len(images))) as ask:
        job = ask.post("/app/clip", content=clip).json()["id"]
        assert refused(ask.post(f"/app/{job}/redraw")) == (400, "no_masks")
        ask.post(f"/app/{job}/segment?opacity=1")
        first = finished(ask, job)
        masks, frames = ask.get(f"/app/{job}/masks.zip").content, sum(seen)
        for hidden in ("256", "1,", "-1", "a", "1,,0"):
            assert refused(ask.post(f"/app/{job}/redraw?hidden={hidden}")) == (400, "hidden")

        def last_frame(hidden):
            ask.post(f"/app/{job}/redraw?opacity=1&hidden={hidden}")
            assert finished(ask, job)["areas"] == first["areas"]
            (tmp_path / "got.mp4").write_bytes(ask.get(f"/app/{job}/overlay.mp4").content)
            with VideoReader(tmp_path / "got.mp4") as reader:
                return list(reader)[-1].mean(axis=(0, 1))

        assert np.abs(last_frame("0,1") - 200).max() < 5  # the clip's own grey
        assert np.abs(last_frame("0") - (255, 0, 0)).max() < 5
        again = ask.get(f"/app/{job}/masks.zip").content
        assert len(masks) == len(again) and sum(seen) == frames == FRAMES


def test_work_can_be_cancelled_and_begun_again(tmp_path, clip):
    goes_on = threading.Event()
    with app(tmp_path, lambda images: goes_on.wait(120)) as ask:
        job = ask.post("/app/clip", content=clip).json()["id"]
        ask.post(f"/app/{job}/segment")
        assert refused(ask.post(f"/app/{job}/segment")) == (409, "started")
        ask.post(f"/app/{job}/cancel")
        goes_on.set()
        told = finished(ask, job)
        assert (told["state"], told["error"]) == ("ready", "Cancelled.")
        assert ask.get(f"/app/{job}/overlay.mp4").status_code == 404
        ask.post(f"/app/{job}/segment")
        assert finished(ask, job)["state"] == "done"
        goes_on.clear()
        ask.post(f"/app/{job}/segment")
        ask.post(f"/app/{job}/cancel")
        goes_on.set()
        told = finished(ask, job)
        assert (told["state"], told["error"]) == ("done", "Cancelled.")  # what was made before is there
        assert ask.get(f"/app/{job}/overlay.mp4").status_code == 200


def test_who_is_cancelled_while_he_waits_does_not_wait_for_his_turn(tmp_path, clip):
    gate = threading.Event()
    with app(tmp_path, lambda images: gate.wait(120), at_once=1) as ask:
        first, second, third = (ask.post("/app/clip", content=clip).json()["id"] for _ in range(3))
        for job in (first, second, third):
            ask.post(f"/app/{job}/segment")
        assert [ask.get(f"/app/{job}").json()["ahead"] for job in (second, third)] == [0, 1]
        assert ask.post(f"/app/{second}/cancel").json()["state"] == "ready"
        assert ask.get(f"/app/{third}").json()["ahead"] == 0
        assert ask.delete(f"/app/{third}").status_code == 204 and len(list(tmp_path.iterdir())) == 2
        gate.set()
        assert finished(ask, first)["state"] == "done"


def test_what_is_on_its_way_makes_no_room_for_others_and_is_not_given_up(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    held = jobs.Jobs(tmp_path, ClipLimits(held=2))
    coming, ready = held.new(), held.new()
    coming.last_request = 0.0
    held.arrived(ready)
    now[0] = 1801.0
    held.sweep()
    assert coming.folder.exists() and not ready.folder.exists()
    held.arrived(coming)
    held.sweep()
    assert held.get(coming.id) is coming  # it was not slow to be asked for, but to come
    coming.state = jobs.State.COMING
    assert held.new().folder.exists()
    with pytest.raises(Refused, match="2 clips are being processed"):
        held.new()
    held.close()
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_finished_upload_makes_room(tmp_path, clip):
    with app(tmp_path, held=2) as ask:
        ids = [ask.post("/app/clip", content=clip).json()["id"] for _ in range(3)]
        assert [ask.get(f"/app/{job}").status_code for job in ids] == [404, 200, 200]
        assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_takes_nothing_more_is_told_without_a_path(tmp_path, clip, monkeypatch, caplog):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))

    with app(tmp_path) as ask:
        job = ask.post("/app/clip", content=clip).json()["id"]
        monkeypatch.setattr("dinoseg.serving.clips.zipfile.ZipFile.writestr", full)
        ask.post(f"/app/{job}/segment")
        told = finished(ask, job)
        assert told["state"] == "failed" and "No space left on device" in told["error"]
        monkeypatch.setattr("dinoseg.serving.clips.write_png", full)
        answer = ask.post("/app/clip", content=clip)
        assert refused(answer) == (507, "disk") and str(tmp_path) not in told["error"] + answer.text
        assert str(tmp_path) in caplog.text and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_server_has_left_goes_at_the_next_start_and_a_living_ones_stays(tmp_path):
    words = "import sys; from pathlib import Path; from dinoseg.utils.atomic import scratch_folder\n"
    words += "with scratch_folder(Path(sys.argv[1]), 'uploads') as folder: print(folder, flush=True); input()"
    servers = [
        subprocess.Popen([sys.executable, "-c", words, tmp_path / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("dead", "living")
    ]
    dead, living = (Path(server.stdout.readline().decode().strip()) for server in servers)
    servers[0].kill()
    servers[0].communicate()
    with jobs.uploads_folder(tmp_path / "new") as mine:
        assert (dead.exists(), living.exists(), mine.exists()) == (False, True, True)
    servers[1].communicate(b"\n")
    assert not mine.exists() and not living.exists()


def test_what_nobody_asks_for_is_given_up(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    held = jobs.Jobs(tmp_path, ClipLimits(keep_minutes=30))
    done, busy = held.new(), held.new()
    done.state = jobs.State.DONE
    done.last_request = busy.last_request = 0.0
    busy.state = jobs.State.RUNNING
    now[0] = 61.0
    held.sweep()
    assert busy.cancelled.is_set() and held.get(done.id) is done  # which counts as asked for
    now[0] += 1799
    held.sweep()
    assert done.folder.exists()
    now[0] += 2
    held.sweep()
    assert not done.folder.exists()
    held.close()


def test_every_file_of_the_page_is_there_and_may_only_speak_to_its_own_server(tmp_path):
    with app(tmp_path) as ask:
        for name in ("", "style.css", "app.js", "paint.js"):
            answer = ask.get(f"/{name}")
            assert answer.status_code == 200
            assert "connect-src 'self'" in answer.headers["content-security-policy"]
            assert "http://" not in answer.text and "https://" not in answer.text
