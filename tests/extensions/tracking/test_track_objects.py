"""mode=track with a model of single objects: files, options, and a run that was stopped."""

import csv
import json

import numpy as np
import pytest
from command_line import call
from drawn_videos import Rectangle, draw_scene, make_model
from failing import fail_after

from dinoseg.checkpoints.trained import TrainedModel
from dinoseg.core.objects import RunLengths
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.annotations.coco_ids import CocoIds
from dinoseg.extensions.annotations.rle import parse_counts
from dinoseg.extensions.tracking import track_mode as mode
from dinoseg.extensions.tracking.video import mask_folder
from dinoseg.extensions.tracking.video.track_files import TrackFiles
from dinoseg.utils.images import read_ids, write_png

CLASSES = ["car", "person", "sky"]
SCENE = draw_scene(
    [
        Rectangle("a", 0, [(8, 8 + 4 * time) for time in range(9)]),
        Rectangle("b", 1, [None] * 3 + [(40, 60)] * 2 + [None] * 2 + [(40, 60)] * 2, score=0.8),
        Rectangle("c", 1, [(40, 8)] * 9, score=0.2),
    ]
)


@pytest.fixture(scope="module")
def clip(trained):
    for number, frame in enumerate(SCENE[0]):
        write_png(trained / f"objects/{number:05d}.png", frame)
    write_png(trained / "object.png", np.ones(SCENE[0][0].shape[:2], np.uint8))
    return trained


@pytest.fixture
def track(clip, monkeypatch):
    """Return a function that runs the command with a model that finds the scene's objects from frame `start` on."""

    def run(out, *more, start=0, status=0):
        def load(builder):
            return TrainedModel(make_model(SCENE[1][start:]), builder.engine(), CLASSES, [(9, 9, 9)] * 3, 255, {})

        monkeypatch.setattr(mode, "load_trained", load)
        monkeypatch.setattr(mode, "find_trained_sizes", lambda *_: None)
        words = ("mode=track", "input=objects", "resume=segmenter", "engine=cpu", "engine.precision=fp32")
        words += ("mode.batch_size=2", "mode.save_every=2", "tracker.context=3", f"hydra.run.dir={out}")
        done = call(clip, *words, *more)
        assert done.status == status and "Traceback" not in done.err, done.err
        return done

    return run


def read_masks(folder):
    return np.stack([read_ids(path) for path in sorted((folder / "masks").glob("*.png"))])


def test_objects_are_written_with_id_class_and_score(track, clip):
    track("objects_whole")
    folder = clip / "objects_whole"
    masks = read_masks(folder)
    assert [np.unique(mask).tolist() for mask in masks] == [[0, 1]] * 3 + [[0, 1, 2]] * 2 + [[0, 1]] * 2 + [
        [0, 1, 2]
    ] * 2
    with open(folder / "objects.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["id"], row["class"], row["score"]) for row in rows} == {("1", "car", "0.9"), ("2", "person", "0.8")}
    assert len(rows) == 9 + 4 and (folder / "overlay.mp4").is_file()
    told = json.loads((folder / "track.json").read_text())
    assert told["objects"] == [1, 2] and told["flicker"] is None
    assert {key: told["settings"][key] for key in ("kind", "keep", "min_score")} == {
        "kind": "identities", "keep": 30, "min_score": 0.5,
    }  # fmt: skip


def test_options_of_objects_apply(track, clip):
    track("objects_options", "mode.keep=1", "mode.min_score=0.1")
    assert np.unique(read_masks(clip / "objects_options")).tolist() == [0, 1, 2, 3, 4]


def test_stopped_run_of_objects_resumes(track, clip, monkeypatch):
    track("objects_full")
    with monkeypatch.context() as patch:
        fail_after(patch, mask_folder, "write_indexed_png", 5, KeyboardInterrupt())
        track("objects_stopped", status=130)
    track("objects_on", "mode.restart=objects_stopped", start=4)
    np.testing.assert_array_equal(read_masks(clip / "objects_stopped"), read_masks(clip / "objects_full"))
    names = ("objects.csv", "track.json")
    table, told = (
        [(clip / folder / name).read_text() for folder in ("objects_stopped", "objects_full")] for name in names
    )
    assert table[0] == table[1]
    assert json.loads(told[0])["settings"] == json.loads(told[1])["settings"]


def test_tracks_are_written_in_both_formats(track, clip):
    names = [{"id": 7, "file_names": ["objects/0.png"]}], [{"id": 5, "name": "person"}, {"id": 3, "name": "car"}]
    (clip / "ids.json").write_text(json.dumps(dict(zip(("videos", "categories"), names, strict=True))))
    track("objects_written", "mode.outputs=[mots,youtube_vis]", "mode.ids=ids.json")
    masks = read_masks(clip / "objects_written")
    read = np.zeros_like(masks)
    for line in (clip / "objects_written/mots/objects.txt").read_text().splitlines():
        frame, number, label, height, width, counts = line.split()
        assert (int(label), int(number) % 1000) in {(3, 1), (5, 2)} and int(number) // 1000 == int(label)
        runs = RunLengths.of_counts(parse_counts(counts, int(height) * int(width)))
        read[int(frame)][runs.to_mask((int(height), int(width)))] = int(number) % 1000
    np.testing.assert_array_equal(read, masks)
    first, second = json.loads((clip / "objects_written/youtube_vis/objects.json").read_text())
    assert (first["video_id"], first["category_id"], first["score"]) == (7, 3, pytest.approx(0.9))
    assert (second["category_id"], len(first["segmentations"])) == (5, 9)
    for number, entry in enumerate((first, second), 1):
        for mask, ids in zip(entry["segmentations"], masks, strict=True):
            assert (mask is None) == (number not in ids)
            if mask:
                runs = RunLengths.of_counts(parse_counts(mask["counts"], ids.size))
                np.testing.assert_array_equal(runs.to_mask(ids.shape), ids == number)
    assert not [path for path in (clip / "objects_written/youtube_vis").iterdir() if path.name != "objects.json"]


@pytest.mark.parametrize(("images", "video"), [(None, 1), ({"clip": 0}, 0)])
def test_frames_without_the_object_of_a_track_are_null(tmp_path, images, video):
    files = TrackFiles(["youtube_vis"], "clip", CocoIds(Labels((), (), 255), {}, images))
    with files.open(tmp_path, None) as write:
        for position, number in enumerate((0, 1, 0)):
            write(position, np.full((2, 3), number, np.uint8))
    (track,) = json.loads((tmp_path / "youtube_vis/clip.json").read_text())
    assert [mask is None for mask in track["segmentations"]] == [True, False, True]
    assert (track["video_id"], track["category_id"], track["score"]) == (video, 1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mode.outputs=[mots] is for objects, and the model predicts classes"),
        ([], "mode.ids=odd.json is not a JSON file with videos and categories"),
        (
            {"videos": [{"id": 1, "file_names": ["b/0.png"]}], "categories": []},
            "mode.ids=odd.json has no image or video objects",
        ),
    ],
)
def test_unfit_ids_of_tracks_are_refused(track, clip, content, message):
    words = ("mode.outputs=[mots]",)
    if content is None:
        done = call(clip, "mode=track", "input=clip", "resume=segmenter", "engine=cpu", *words)
        assert done.status == 1 and message in done.err
        return
    (clip / "odd.json").write_text(json.dumps(content))
    assert message in track("odd_ids", *words, "mode.ids=odd.json", status=1).err


def test_track_of_an_unknown_class_is_refused_and_resumes(track, clip):
    video = {"id": 1, "file_names": ["objects/0.png"]}
    (clip / "few.json").write_text(json.dumps({"videos": [video], "categories": [{"id": 3, "name": "car"}]}))
    words = ("mode.outputs=[mots]", "mode.ids=few.json")
    assert "mode.ids=few.json has no category person" in track("objects_few", *words, status=1).err
    track("objects_on", "mode.restart=objects_few", "mode.outputs=[mots]", start=8)
    assert (clip / "objects_few/mots/objects.txt").is_file()


def test_ids_without_files_of_tracks_cause_a_warning(track, clip):
    (clip / "none.json").write_text(json.dumps({"videos": [{"id": 1, "file_names": ["objects/0"]}], "categories": []}))
    assert "No effect here: mode.ids=none.json" in track("objects_none", "mode.ids=none.json").err
    call(clip, "mode=track", "input=clip", "labels=first.png", "backbone=rgb", "engine=cpu", "mode.outputs=[mots]",
         "hydra.run.dir=propagated")  # fmt: skip
    assert (clip / "propagated/mots/clip.txt").read_text().startswith("0 1001 1 ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("mode.smoothing=0.5",),
            "mode.smoothing=0.5 is for the classes of a trained segmenter without single objects",
        ),
        (("labels=object.png",), "labels=object.png: a trained segmenter needs no masks"),
        (("mode.min_score=2",), "min_score"),
    ],
)
def test_options_of_other_models_are_refused(track, clip, more, message):
    assert message in track("objects_refused", *more, status=1).err
    assert not (clip / "objects_refused").exists()


@pytest.mark.parametrize("option", ["mode.keep=3", "mode.min_score=0.5"])
@pytest.mark.parametrize("words", [("resume=segmenter",), ("resume=slots",), ("labels=first.png", "backbone=rgb")])
def test_options_of_objects_are_refused_for_other_models(clip, option, words):
    done = call(clip, "mode=track", "input=clip", "engine=cpu", "hydra.run.dir=other_refused", *words, option)
    assert done.status == 1 and "Traceback" not in done.err
    assert f"{option} is for single objects of a trained model" in done.err
    assert not (clip / "other_refused").exists()
