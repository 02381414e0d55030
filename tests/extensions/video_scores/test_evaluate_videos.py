"""mode=eval on videos: what is tracked, given and written, and scores that are those of mode=score."""

import errno
import json
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import call
from failing import fail_after
from mistakes import assert_refused
from omegaconf import OmegaConf
from PIL import Image
from tiny_parts import load_option

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import provenance_of
from dinoseg.extensions.clips.videos import Video
from dinoseg.extensions.protocols import folders
from dinoseg.extensions.protocols import score_mode as score
from dinoseg.extensions.protocols.video_clustering import VideoClustering
from dinoseg.extensions.slots import evaluation as slots
from dinoseg.extensions.slots.head.head import SlotHead
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.extensions.video_scores import videos
from dinoseg.extensions.video_scores.benchmark_videos import benchmark_videos
from dinoseg.extensions.video_scores.videos import TrackingOptions, evaluate_videos
from dinoseg.models.model import SegmentationModel
from dinoseg.modes import evaluate as mode
from dinoseg.modes.evaluate import find_scoring
from dinoseg.modes.evaluate import run as evaluate
from dinoseg.report.palette import write_indexed_png
from dinoseg.training import engine
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png


class Engine:
    """One rank of two or one, whose gathered values are its own."""

    device = torch.device("cpu")

    def __init__(self, batch=1, rank=0, world_size=1):
        self._batch, self.rank, self.world_size, self.is_main = batch, rank, world_size, rank == 0
        self.broadcast = self.gather = lambda value: value
        self.close = lambda: None

    def images_at_once(self):
        return self._batch

    def autocast(self):
        raise AssertionError("fakes compute nothing")


class Fake(Tracker):
    """Remembers what it is shown; its masks: `perfect` (the frame's red), `copy` (of what it was given), or an id.

    It looks at each video first, and finds the same when it tracks it.
    """

    def __init__(self, kind, log):
        super().__init__()
        self.kind, self.log, self.last = kind, log, None

    @property
    def settings(self):
        return {"kind": str(self.kind)}

    def look_ahead(self, video):
        self.ahead = [one for frames, labels in video() for one in zip(frames, labels, strict=True)]

    def track_batch(self, frames, labels):
        np.testing.assert_equal(list(zip(frames, labels, strict=True)), self.ahead[: len(frames)])
        del self.ahead[: len(frames)]
        return [self.mask(*each) for each in zip(frames, labels, strict=True)]

    def state(self):
        return {}

    def load(self, state):
        pass

    def mask(self, frame, label):
        self.log.append(None if label is None else label.copy())
        if label is not None:
            self.last = label if self.last is None else np.where(label, label, self.last)
        if self.kind == "perfect":
            return np.ascontiguousarray(frame[..., 0])
        return self.last.copy() if self.kind == "copy" else np.full(frame.shape[:2], self.kind, np.uint8)


def moving_squares(seed, length, size, ids):
    """Squares that walk over a frame: (T, H, W)."""
    rng = np.random.default_rng(seed)
    starts, steps = rng.integers(0, 8, (len(ids), 2)), rng.integers(0, 3, (len(ids), 2))
    masks = np.zeros((length, *size), np.uint8)
    for time in range(length):
        for label, start, step in zip(ids, starts, steps, strict=True):
            row, column = start + time * step
            masks[time, row : row + 9, column : column + 7] = label
    return masks


def write_frame(path, mask):
    """Write a frame with the mask in red, and each object in a colour of its own."""
    write_png(path, np.stack([mask, mask.clip(max=3) * 60 + 40, np.full_like(mask, 90)], axis=-1))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(folders, "count_cores", lambda: 1)


def write_davis(root, sequences, *, year="2017", split="val", annotations="Annotations", first_only=False):
    for name, masks in sequences.items():
        for index, mask in enumerate(masks):
            write_frame(root / f"JPEGImages/480p/{name}/{index:05d}.png", mask)
            if not (first_only and index):
                write_indexed_png(root / f"{annotations}/480p/{name}/{index:05d}.png", mask)
    place = root / f"ImageSets/{year}/{split}.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("\n".join(sequences) + "\n")
    return root


COMPOSED = {}  # by command line, since composing takes longer than a test
SEQUENCES = {
    "bear": moving_squares(1, 5, (33, 40), [1, 2]),
    "ape": moving_squares(2, 6, (30, 41), [1, 3]),
    "cow": moving_squares(3, 2, (9, 9), [1]),
}


@pytest.fixture
def track(compose, tmp_path):
    """Return a function that evaluates with a fake tracker: result, scores.json, run folder and what it was shown."""

    def run(kind, data, root, *more, split="val", supervision="first_frame", engine=None, **options):
        words = (f"data={data}", *more)
        if words not in COMPOSED:
            COMPOSED[words] = compose(*words)
        build = Builder(OmegaConf.merge(COMPOSED[words], {"data": {"root": str(root)}}))
        folder = tmp_path / f"run_{len(list(tmp_path.glob('run_*')))}"
        log = []
        chosen = benchmark_videos(build, split, supervision)
        options = TrackingOptions(**options)
        result = evaluate_videos(
            chosen, lambda: Fake(kind, log), engine or Engine(), folder, options, provenance_of(build, folder)
        )
        path = folder / "scores.json"
        scores = json.loads(path.read_text()) if path.exists() else None
        return SimpleNamespace(result=result, folder=folder, log=log, scores=scores)

    return run


@pytest.fixture
def davis(tmp_path):
    return write_davis(tmp_path / "DAVIS", SEQUENCES)


def score_mode(folder, protocol, reference, prediction):
    """Return what mode=score writes."""
    cfg = OmegaConf.create({"protocol": load_option("protocol", protocol), "data": {"group": None}})
    score.run(cfg, out_dir=folder / "scored", reference=str(reference), prediction=str(prediction), workers=1)
    return json.loads((folder / "scored/scores.json").read_text())


def check_same(ours, theirs):
    for key in ("protocol", "scores", "per_video", "ci95", "rules", "n", "files"):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize(("kind", "batch"), [("perfect", 1), ("copy", 4), pytest.param(0, 4, marks=pytest.mark.heavy)])
def test_davis_2017_scores_as_mode_score_does(track, davis, tmp_path, kind, batch):
    done = track(kind, "davis2017", davis, engine=Engine(batch))
    check_same(done.scores, score_mode(tmp_path, "davis2017", davis, done.folder / "masks"))
    assert done.result == {"videos": 3, **done.scores["scores"], "run": str(done.folder)}
    assert (done.scores["scores"]["J&F-Mean"] == 1) == (kind == "perfect")
    shown = [int(label is not None) for label in done.log]
    assert shown == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    np.testing.assert_array_equal(done.log[0], SEQUENCES["bear"][0])


def test_masks_use_the_davis_palette_and_blends_bright_colours(track, davis):
    folder = track("perfect", "davis2017", davis).folder
    for name, masks in SEQUENCES.items():
        files, blends = (sorted((folder / kind / name).iterdir()) for kind in ("masks", "blends"))
        assert [path.name for path in files] == [f"{index:05d}.png" for index in range(len(masks))]
        assert [path.name for path in blends] == [f"{index:05d}.jpg" for index in range(len(masks))]
        for path, mask in zip(files, masks, strict=True):
            with Image.open(path) as image:
                assert image.mode == "P" and np.array(image.getpalette()).reshape(-1, 3)[1].tolist() == [128, 0, 0]
                np.testing.assert_array_equal(np.asarray(image), mask)
    blend = np.asarray(Image.open(folder / "blends/bear/00000.jpg")).astype(float)
    mask = SEQUENCES["bear"][0]
    assert blend[mask == 1].mean(axis=0)[2] > 150  # the frame has 90, and the colour of object 1 has 255
    assert abs(blend[20:, 20:][mask[20:, 20:] == 0].mean(axis=0)[2] - 90) < 4


def test_metrics_only_and_no_official_scores(track, davis, capsys):
    written = {"masks", "scores.json", "tracking.json"}
    for report, files in ((True, {*written, "report.html"}), (False, written)):
        done = track("copy", "davis2017", davis, metrics_only=True, report=report)
        assert {path.name for path in done.folder.iterdir()} == files
    capsys.readouterr()
    done = track("copy", "davis2017", davis, official=False)
    assert done.scores is None and len(list(done.folder.rglob("*.jpg"))) == 13
    assert "mode.official=false" in capsys.readouterr().out


def test_report_has_objects_curves_and_worst_sequences(track, davis):
    done = track("copy", "davis2017", davis)
    page = (done.folder / "report.html").read_text()
    assert f"{100 * done.scores['scores']['J&F-Mean']:.1f} %" in page and "fewer than 10" in page
    assert "bear: 2" in page and "ape: 3" in page and "cow: 1" not in page  # of two frames none is scored
    assert "J&amp;F % of each frame" in page and page.count("<img") == 4 + 4
    per_frame = {row["name"]: row.get("J&F_per_frame", []) for row in done.scores["per_video"]}
    assert {name: len(values) for name, values in per_frame.items()} == {"bear": 3, "ape": 4, "cow": 0}
    of_objects = {
        row["name"]: np.mean([(each["J-Mean"] + each["F-Mean"]) / 2 for each in row["objects"].values()])
        for row in done.scores["per_video"]
        if row["objects"]
    }
    assert of_objects == pytest.approx({name: np.mean(values) for name, values in per_frame.items() if values})


def test_davis_2016_scores_one_foreground(track, tmp_path):
    grey = {name: np.where(masks > 0, 255, 0).astype(np.uint8) for name, masks in SEQUENCES.items()}
    root = write_davis(tmp_path / "DAVIS", grey, year="2016")
    done = track("copy", "davis2016", root)
    check_same(done.scores, score_mode(tmp_path, "davis2016", root, done.folder / "masks"))
    assert set(np.unique(done.log[0])) == {0, 1}  # an object, and no void
    assert 0 < done.scores["scores"]["J-Mean"] < 1
    assert track(1, "davis2016", root, supervision="none").scores is None  # no protocol of it


def test_void_in_a_given_mask_is_background(track, tmp_path):
    masks = SEQUENCES["bear"].copy()
    masks[:, :3] = 255
    done = track("copy", "davis2017", write_davis(tmp_path / "DAVIS", {"bear": masks}))
    assert set(np.unique(done.log[0])) == {0, 1, 2}


def test_unsupervised_davis_uses_its_own_annotations(track, tmp_path):
    root = write_davis(tmp_path / "DAVIS", {name: masks.clip(max=1) for name, masks in SEQUENCES.items()})
    write_davis(root, SEQUENCES, annotations="Annotations_unsupervised")
    done = track("perfect", "davis2017", root, supervision="none")
    check_same(done.scores, score_mode(tmp_path, "davis2017_unsupervised", root, done.folder / "masks"))
    assert done.scores["scores"]["J&F-Mean"] == 1 and set(map(type, done.log)) == {type(None)}


@pytest.mark.parametrize("data", ["davis2017", "youtube_vos"])
def test_sets_of_first_masks_alone_are_written_and_not_scored(track, tmp_path, data, capsys):
    if data == "davis2017":
        root = write_davis(tmp_path / "set", SEQUENCES, split="test-dev", first_only=True)
    else:
        root = write_youtube(tmp_path / "set", "test", {"a": SEQUENCES["bear"]}, {"a": [0]})
    done = track("copy", data, root, split="test")
    assert done.scores is None and done.result["videos"] == (3 if data == "davis2017" else 1)
    text = capsys.readouterr().out
    assert "submit the predicted masks to the benchmark's server" in text and str(done.folder / "masks") in text
    assert len(list((done.folder / "masks").rglob("*.png"))) == len(done.log)


def write_youtube(root, split, videos, annotated, *, every=1):
    """Write frames, all of them in `<split>_all_frames` where only every n-th is of the split."""
    for name, masks in videos.items():
        for index, mask in enumerate(masks):
            if index % every == 0:
                write_frame(root / f"{split}/JPEGImages/{name}/{index:05d}.png", mask)
            if every > 1:
                write_frame(root / f"{split}_all_frames/JPEGImages/{name}/{index:05d}.png", mask)
            if index in annotated[name]:
                write_indexed_png(root / f"{split}/Annotations/{name}/{index:05d}.png", mask)
    return root


def test_youtube_vos_gives_each_object_where_it_appears(track, tmp_path):
    early = moving_squares(1, 12, (30, 40), [2])
    late = np.where(early == 0, moving_squares(2, 12, (30, 40), [5]), early)
    late[:5] = early[:5]
    first_late = early.copy()
    first_late[:5] = 0
    videos = {"a": late, "b": first_late}
    root = write_youtube(tmp_path / "YT", "valid", videos, {"a": [0, 5], "b": [5]}, every=5)
    for more, frames, batch in (((), 3, 1), (("data.all_frames=true",), 12, 1), (("data.all_frames=true",), 12, 4)):
        done = track("copy", "youtube_vos", root, *more, engine=Engine(batch))
        assert {path.name for path in (done.folder / "masks").iterdir()} == {"Annotations"}
        masks = done.folder / "masks/Annotations"
        for name in videos:  # frames of the split alone
            assert sorted(path.name for path in (masks / name).iterdir()) == ["00000.png", "00005.png", "00010.png"]
        at = {index: number for number, index in enumerate(range(0, 12, 12 // frames if frames == 12 else 5))}
        given = {number: label for number, label in enumerate(done.log[:frames]) if label is not None}
        assert set(given) == {0, at[5]}
        np.testing.assert_array_equal(given[0], late[0])
        np.testing.assert_array_equal(given[at[5]], np.where(late[5] == 5, 5, 0))  # 2 is known by then
        assert len(done.log) == frames + frames - at[5]  # of b, nothing is shown before its first mask
        assert not read_ids(masks / "b/00000.png").any() and set(np.unique(read_ids(masks / "b/00010.png"))) == {0, 2}
        assert done.scores is None
        assert not track("copy", "youtube_vos", root, *more, restart=str(done.folder)).log


def test_youtube_vos_train_prompts_later_objects_once(track, tmp_path):
    masks = moving_squares(1, 4, (30, 40), [2, 3])
    masks[0][masks[0] == 3] = 0
    root = write_youtube(tmp_path / "YT", "train", {"a": masks}, {"a": range(4)})
    done = track("copy", "youtube_vos", root, split="train")
    assert [label is not None for label in done.log] == [True, True, False, False]
    assert set(np.unique(done.log[1])) == {0, 3} and done.scores is None
    done = track(1, "youtube_vos", root, split="train", supervision="none")
    prediction = done.folder / "masks/Annotations"
    reference = root / "train/Annotations"
    check_same(done.scores, score_mode(tmp_path, "video_clustering", reference, prediction))


def write_movi(root, sequences):
    for name, masks in sequences.items():
        for index, mask in enumerate(masks):
            write_frame(root / f"validation/{name}/frames/{index:05d}.png", mask)
            write_png(root / f"validation/{name}/segmentations/{index:05d}.png", mask)
    return root


@pytest.mark.parametrize("kind", ["perfect", pytest.param(3, marks=pytest.mark.heavy)])
def test_movi_is_scored_as_clusters(track, tmp_path, kind):
    sequences = {name: moving_squares(int(name), 4, (32, 32), [1, 2, 3]) for name in ("0", "10", "9")}
    root = write_movi(tmp_path / "movi", sequences)
    reference = tmp_path / "reference"
    for name in sequences:
        shutil.copytree(root / f"validation/{name}/segmentations", reference / name)
    done = track(kind, "movi", root, supervision="none")
    theirs = score_mode(tmp_path, "video_clustering", reference, done.folder / "masks")
    check_same(done.scores, theirs)
    assert (done.scores["scores"]["FG-ARI"] == 1) == (kind == "perfect")
    assert track("copy", "movi", root).scores["scores"]["ARI"] < 1  # first masks may be given here, too


def test_ranks_share_the_videos(track, davis):
    second = track("perfect", "davis2017", davis, engine=Engine(rank=1, world_size=2))
    assert [path.name for path in (second.folder / "masks").iterdir()] == ["ape"] and second.scores is None


def test_stopped_evaluation_resumes(track, davis, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    whole = track("copy", "davis2017", davis)
    with monkeypatch.context() as patch:
        fail_after(patch, videos, "write_indexed_png", 7, OSError(errno.ENOSPC, "No space left on device"))
        assert_refused(lambda: track("copy", "davis2017", davis), "No space left", "mode.restart=")
    stopped = sorted(tmp_path.glob("run_*"))[-1]
    assert [path.name for path in stopped.rglob("*") if path.parent.name == "masks"] == ["bear"]  # whole or not at all
    on = track("copy", "davis2017", davis, restart=str(stopped))
    assert len(on.log) == 8 and on.scores == whole.scores  # ape and cow
    assert f"mode.restart={stopped}: 1 video reused: bear" in caplog.text
    files = [sorted(path.relative_to(run.folder) for path in run.folder.rglob("*.*")) for run in (on, whole)]
    assert files[0] == files[1]
    stray = stopped / "masks/bear/00009.png"  # of no frame: it would be scored with the rest
    shutil.copy(stopped / "masks/bear/00001.png", stray)
    assert len(track("copy", "davis2017", davis, restart=str(stopped)).log) == 13
    stray.unlink()
    (stopped / "masks/bear/00001.png").unlink()
    assert len(track("copy", "davis2017", davis, restart=str(stopped)).log) == 13
    again = track("copy", "davis2017", davis, restart=str(on.folder))
    assert not again.log and f"mode.restart={on.folder}: 3 videos reused: ape, bear, cow" in caplog.text
    other = partial(track, "perfect", "davis2017", davis, restart=str(stopped))
    assert_refused(other, "settings differ from that run: kind was copy and is perfect. Use")
    nowhere = partial(track, "copy", "davis2017", davis, restart=str(davis))
    assert_refused(nowhere, "holds no readable tracking.json")


def test_interrupt_names_the_folder_to_resume_from(track, davis, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_after(patch, videos, "write_indexed_png", 8, KeyboardInterrupt())
        track("copy", "davis2017", davis)
    (stopped,) = tmp_path.glob("run_*")
    assert f"Stopped: the same command with mode.restart={stopped} reuses the finished videos." in caplog.text
    assert len(track("copy", "davis2017", davis, restart=str(stopped)).log) == 8


def test_another_folder_of_the_same_name_is_other_data(track, tmp_path, monkeypatch):
    for place in ("a", "b"):
        write_davis(tmp_path / place / "DAVIS", SEQUENCES)
    monkeypatch.chdir(tmp_path / "a")
    first = track("copy", "davis2017", "DAVIS")
    recorded = json.loads((first.folder / "tracking.json").read_text())
    assert recorded["data"]["layout"]["root"] == str(tmp_path / "a/DAVIS")
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match=r"data.layout.root was .*/a/DAVIS and is .*/b/DAVIS\. Use"):
        track("copy", "davis2017", "DAVIS", restart=str(first.folder))
    assert not track("copy", "davis2017", "../a/DAVIS", restart=str(first.folder)).log  # the same, typed in another way


NO_MASKS = "first_frame: the videos of split test have no masks to start from"


def test_the_unsupervised_test_sets_need_no_masks(track, tmp_path, capsys):
    root = write_davis(tmp_path / "DAVIS", SEQUENCES, year="2019", split="test-dev")
    shutil.rmtree(root / "Annotations")
    track_test = partial(track, "copy", "davis2017", root, "data.year=2019", split="test")
    done = track(1, "davis2017", root, "data.year=2019", split="test", supervision="none")
    assert done.scores is None and len(list((done.folder / "masks").rglob("*.png"))) == 13
    assert "submit the predicted masks to the benchmark's server" in capsys.readouterr().out
    assert_refused(track_test, NO_MASKS)
    for name in ("bear", "ape", "cow"):
        (root / f"Annotations/480p/{name}").mkdir(parents=True)
    assert_refused(track_test, NO_MASKS)
    write_indexed_png(root / "Annotations/480p/bear/00000.png", SEQUENCES["bear"][0])
    assert_refused(track_test, "Video ape has no mask of its first frame, ", "ape", "00000.png")


@pytest.mark.parametrize(
    ("path", "pixels", "message"),
    [
        (
            "JPEGImages/480p/ape/00002.png",
            np.zeros((30, 39, 3), np.uint8),
            r"00000.png is 41 x 30 \(width x height\), .*00002.png is 39 x 30. Make them equal",
        ),
        (
            "Annotations/480p/ape/00000.png",
            np.ones((29, 41), np.uint8),
            r"00000.png is 41 x 30 .*its mask .*Annotations.*00000.png is 41 x 29. Replace",
        ),
        (
            "Annotations/480p/ape/00000.png",
            np.full((30, 41), 300, np.uint16),
            "holds the object id 300: ids go from 0 to",
        ),
    ],
)
def test_a_video_that_cannot_be_tracked_is_named_or_left_out(track, davis, path, pixels, message):
    Image.fromarray(pixels).save(davis / path)
    with pytest.raises(UserError, match=message):
        track("copy", "davis2017", davis)
    done = track("copy", "davis2017", davis, "data.on_error=skip")
    assert [row["name"] for row in done.scores["per_video"]] == ["bear", "cow"] and done.result["videos"] == 2
    (problem,) = done.scores["problems"]
    assert problem["file"].endswith("masks/ape") and not list(done.folder.glob("*/ape"))
    done = track("copy", "davis2017", davis, "data.on_error=skip", official=False)
    assert json.loads((done.folder / "problems.json").read_text())["problems"][0]["reason"] == problem["reason"]


def test_missing_and_unscorable_masks_are_reported(track, davis, tmp_path):
    with pytest.raises(UserError, match="(?s)ape/00001.png: holds the ids 9 .*The masks are saved: mode.restart="):
        track(9, "davis2017", davis)
    (folder,) = tmp_path.glob("run_*")
    assert len(json.loads((folder / "problems.json").read_text())["problems"]) == 2
    assert len(list((folder / "masks").rglob("*.png"))) == 13
    (davis / "Annotations/480p/ape/00000.png").unlink()
    assert_refused(lambda: track("copy", "davis2017", davis), "Video ape has 1 frame without mask: 00000")
    root = write_youtube(tmp_path / "YT", "valid", {"a": SEQUENCES["ape"]}, {"a": [2]})
    early = partial(track, "copy", "youtube_vos", root, "data.tracking.later=false")
    assert_refused(early, "Video a has no mask of its first frame, ", "00000.png, which defines")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("davis2017", {"supervision": "all"}, "mode.supervision=all is unknown. Choose one of none, first"),
        ("davis2017", {"supervision": "none"}, "mode.supervision=none needs a model that finds objects"),
        ("videos", {}, "data=videos has no masks of objects"),
    ],
)
def test_invalid_tracking_options_are_refused(compose, davis, tmp_path, data, options, message):
    cfg = compose(f"data={data}", f"data.root={davis}")
    assert_refused(lambda: evaluate(cfg, out_dir=tmp_path, **options), message)


def small_slots(number):
    return SlotHead(24, 1, num_slots=number, slot_dim=16, hidden_dim=16, decoder_dim=16, positions_grid=[4, 4])


def test_slots_that_fit_no_benchmark_are_refused_before_tracking(compose, tmp_path, monkeypatch):
    root = write_davis(write_davis(tmp_path, SEQUENCES), SEQUENCES, annotations="Annotations_unsupervised")

    def track_slots(number, *words, **options):
        trained = SimpleNamespace(model=SimpleNamespace(head=small_slots(number)), engine=None)
        monkeypatch.setattr(slots, "load_trained", lambda _: trained)
        builder = Builder(compose("mode=eval", "data=davis2017", f"data.root={root}", *words))
        slots.evaluate_slots(builder, tmp_path, "val", "none", **options)

    assert_refused(lambda: track_slots(24), "24 slots", " allows 20 segments. Set head.num_slots=20 or fewer")
    for allowed in (partial(track_slots, 24, official=False), partial(track_slots, 20)):
        assert_refused(allowed, "NoneType", error=AttributeError)  # on to the engine, of which there is none
    given = "mode.supervision=none does not provide. Set mode.supervision=first_frame, or slots=free"
    assert_refused(partial(track_slots, 5, "slots=lock_on"), "slots.lock_on=true ", given)


@pytest.mark.parametrize(
    ("data", "supervision", "protocol", "ids"),
    [
        ("davis2017", None, "davis2017", {0, 1, 2, 3}),
        ("davis2017", "none", "davis2017_unsupervised", {1, 2, 3, 4, 5}),
        pytest.param("movi", None, "video_clustering", {1, 2, 3, 4, 5}, marks=pytest.mark.heavy),
    ],
)
def test_slots_of_a_trained_model(compose, tiny_backbone, tmp_path, monkeypatch, data, supervision, protocol, ids):
    torch.manual_seed(0)
    backbone = tiny_backbone()
    engine = Engine(batch=6)
    passes = []
    engine.autocast = lambda: nullcontext(passes.append(1))
    model = SegmentationModel(backbone, small_slots(5)).eval()
    trained = SimpleNamespace(model=model, single_pass_model=model, engine=engine)
    sequences = {name: SEQUENCES[name] for name in ("bear", "ape")}
    root = write_movi(tmp_path / data, sequences)
    for kind in ("Annotations", "Annotations_unsupervised"):
        write_davis(root, sequences, annotations=kind)
    cfg = compose("mode=eval", f"data={data}", f"data.root={root}")
    monkeypatch.setattr(slots, "load_trained", lambda _: trained)
    result = slots.evaluate_slots(Builder(cfg), tmp_path / "run", "val", supervision, metrics_only=True)
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["protocol"] == protocol and scores["scores"].items() <= result.items()
    files = [tmp_path / f"run/masks/{name}/{index:05d}.png" for name in sequences for index in range(5)]
    assert len(passes) == 1 + 2 + 5 + 6  # provenance, a video's frames at once to the backbone, each to the slots
    held = {int(each) for path in files for each in np.unique(read_ids(path))}
    assert held <= ids and len(held) > 1
    assert json.loads((tmp_path / "run/tracking.json").read_text())["tracker"]["kind"] == "slots"


def test_evaluation_tracks_only_untrained_models_on_videos(compose):
    cfg = compose("mode=eval", "data=davis2016", "data.root=none")
    for changes, tracks in (
        ({}, True),
        ({"resume": "run"}, False),
        ({"data": {"scoring": None}}, False),  # images
        ({"head": {"weights": "file"}}, False),  # released trained
        ({"head": {"weights": "file", "class_layer": "new"}}, True),
        ({"head": {"weights": None}}, True),
    ):
        assert (find_scoring(Builder(OmegaConf.merge(cfg, changes))) is not None) == tracks, changes


def test_a_value_instead_of_a_scoring_function_is_refused(compose):
    cfg = compose("mode=eval", "data=davis2016", "data.root=none")
    for side, changes in (("data", {}), ("head", {"resume": "run"})):
        builder = Builder(OmegaConf.merge(cfg, changes, {side: {"scoring": "os.system"}}))
        assert_refused(lambda builder=builder: find_scoring(builder), f"{side}.scoring=os.system has no `_target_`")


@pytest.mark.parametrize("key", ["restart", "supervision"])
def test_keys_of_tracking_are_refused_for_images(compose, tmp_path, monkeypatch, key):
    images = SimpleNamespace(model=SimpleNamespace(head=SimpleNamespace(no_classes=None)))
    monkeypatch.setattr(mode, "load_trained", lambda _: images)
    cfg = compose("mode=eval", "data=davis2016", "data.root=none", "resume=run")
    assert_refused(lambda: evaluate(cfg, out_dir=tmp_path, **{key: "run"}), f"mode.{key}=run is for tracking in videos")


def test_propagation_from_the_command_line(davis, tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(engine.Engine, "autocast", lambda _: nullcontext(passes.append(1)))
    words = ["data=davis2017", "data.root=DAVIS", "backbone=rgb", "engine=cpu", "tracker.short_side=null"]
    words.append("engine.eval_batch_size=6")
    done = call(tmp_path, "mode=eval", *words, "slots.match=overlap", "hydra.run.dir=run")
    assert done.status == 0 and "J&F-Mean" in done.out, done.err
    assert len(passes) == 1 + len(SEQUENCES)  # provenance, and each video at once, as the engine says
    assert done.err.count("No effect here: slots.match=overlap. Label propagation has no slots") == 1
    ours = json.loads((tmp_path / "run/scores.json").read_text())
    check_same(ours, score_mode(tmp_path, "davis2017", davis, tmp_path / "run/masks"))
    assert ours["scores"]["J-Mean"] > 0.3  # patches of 8 pixels
    recorded = json.loads((tmp_path / "run/tracking.json").read_text())
    assert recorded["tracker"]["kind"] == "propagation" and recorded["given"] == "first"
    on = call(tmp_path, "mode=eval", *words, "mode.restart=run", "hydra.run.dir=on")
    assert on.status == 0 and json.loads((tmp_path / "on/scores.json").read_text()) == ours, on.err
    assert "mode.restart=run: 3 videos reused: ape, bear, cow" in on.err
    other = call(tmp_path, "mode=eval", *words, "tracker.radius=6", "mode.restart=run", "hydra.run.dir=other")
    assert other.status == 1 and "settings differ from that run: tracker.radius was 12 and is 6. Use" in other.err


def write_clips(folder, names, mask, square=None):
    """Write videos of two frames, and of predictions equal to their masks; return a function that scores them."""
    clips = []
    for name in names:
        frames = [folder / f"{name}/frames/{number}.png" for number in range(2)]
        masks = {number: folder / f"{name}/masks/{number}.png" for number in range(2)}
        for number, frame in enumerate(frames):
            write_png(frame, np.zeros((8, 8, 3), np.uint8))
            for path in (masks[number], folder / f"out/masks/{name}/{number}.png"):
                write_png(path, mask)
        clips.append(Video(name, frames, 12, masks, square=square))
    return partial(videos.score_masks, VideoClustering(), clips, folder / "out/masks", folder / "out")


def test_intervals_are_over_groups_of_videos(tmp_path):
    write_clips(tmp_path, ("1_a", "1_b", "2_a"), np.eye(8, dtype=np.uint8))(group="^[0-9]")
    result = json.loads((tmp_path / "out/scores.json").read_text())
    assert (result["n"], result["unit"], result["scored_unit"]) == (2, "group", "video")
    assert [row["group"] for row in result["per_video"]] == ["1", "1", "2"]


@pytest.mark.parametrize("square", [None, 8])
def test_a_broken_reference_is_left_out_or_named(tmp_path, square):
    score_clips = write_clips(tmp_path, "ab", np.pad(np.ones((3, 8), np.uint8), ((2, 3), (0, 0))), square)
    (tmp_path / "a/masks/1.png").write_bytes(b"broken")
    assert score_clips(skip=True)["FG-ARI"] == 1
    assert_refused(lambda: score_clips(skip=False), "1.png", "mode.restart=")
