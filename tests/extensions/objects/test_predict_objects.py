"""mode=predict and dinoseg.load with models of single objects."""

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from command_line import call, succeed

import dinoseg
from dinoseg.extensions.objects.finding import MAX_INSTANCES
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.inference.results import write_counts
from dinoseg.utils.images import write_png

SIZES = {"a": (40, 56), "b": (64, 48)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of images and of a model of each task, with random weights."""
    where = tmp_path_factory.mktemp("objects")
    for name, size in SIZES.items():
        write_png(where / "images" / f"{name}.png", np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    for task in ("instance", "panoptic"):
        model = dinoseg.create_model(
            "tiny",
            head={"name": "eomt", "blocks": 1, "num_queries": 9},
            classes=["person", "car"],
            weights="random",
            task=task,
        )
        with torch.no_grad():
            model.head.classify.weight.mul_(50)
        model.save(where / f"{task}.safetensors")
    return where


def predict(folder, task, *words):
    words = ("mode=predict", f"resume={task}.safetensors", "input=images", "engine=cpu", *words)
    return call(folder, *words)


@pytest.mark.parametrize("strategy", ["whole", "windows", "letterbox"])
def test_predict_writes_the_objects_that_python_finds(folder, strategy):
    words = (f"inference={strategy}", *(["inference.size=48"] if strategy != "whole" else []))
    out = folder / strategy
    done = predict(folder, "instance", *words, "mode.outputs=[coco]", f"hydra.run.dir={out}")
    assert done.status == 0, done.err
    results = json.loads((out / "coco" / "results.json").read_text())
    whole = json.loads((out / "coco" / "annotations.json").read_text())
    numbers = {image["file_name"]: image["id"] for image in whole["images"]}
    assert len(results) > len(whole["annotations"]) > 0
    if strategy == "whole":
        model = dinoseg.load(folder / "instance.safetensors", inference="whole")
        found = model.predict(folder / "images" / "a.png").objects
        own = [result for result in results if result["image_id"] == numbers["a.png"]]
        assert [each["score"] for each in own] == pytest.approx([each.score for each in found], abs=1e-5)
        assert len(found) <= MAX_INSTANCES and found[0].mask.shape == SIZES["a"]
        fewer = predict_objects(folder, "fewer", "task.max_instances=2").parent / "results.json"
        best = [result["score"] for result in json.loads(fewer.read_text()) if result["image_id"] == numbers["a.png"]]
        assert len(best) == 2 and {*best} <= {each["score"] for each in own}


@pytest.mark.parametrize("least", [0.5, 0])
def test_predict_lists_and_counts_the_shown_objects(folder, least):
    words = [] if least == 0.5 else [f"mode.min_score={least}"]
    annotations = json.loads(predict_objects(folder, f"listed_{least}", *words).read_text())
    listed = folder / f"listed_{least}"
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    written = read_rows(listed / "counts.csv")
    for image, counts in zip(annotations["images"], written, strict=True):
        own = [each for each in annotations["annotations"] if each["image_id"] == image["id"]]
        stem = image["file_name"].removesuffix(".png")
        rows = read_rows(listed / f"{stem}_segmentation/objects.csv")
        assert [int(row["number"]) for row in rows] == list(range(1, len(own) + 1))
        for row, each in zip(rows, own, strict=True):
            assert row["class"] == names[each["category_id"]] and float(row["score"]) == each["score"] >= least
            assert [int(row[key]) for key in ("area", "left", "top", "width", "height")] == [
                each["area"],
                *each["bbox"],
            ]
        found = Counter(row["class"] for row in rows)
        assert counts == {"image": stem, **{name: str(found[name]) for name in ("person", "car")}}
    assert any(float(counts["person"]) + float(counts["car"]) for counts in written)
    assert any(each["score"] < 0.5 for each in annotations["annotations"]) == (least < 0.5)


def test_score_of_shown_objects_is_stated_and_no_other_resumes(folder):
    run = ("mode.min_score=0.97", "hydra.run.dir=stated")
    done = predict(folder, "instance", *run)
    assert "of scores of 0.97 or more; of each image" in done.out
    assert "show no object: 2 of 2. They show scores of 0.97 or more" in done.err
    assert predict(folder, "instance", *run).status == 0
    other = predict(folder, "instance", "hydra.run.dir=stated")
    assert other.status != 0 and "mode.min_score was 0.97 and is 0.5" in other.err


def test_shapes_without_an_output_are_reported(folder):
    done = predict(folder, "instance", "mode.shapes.min_score=0.3", "hydra.run.dir=no_shapes")
    assert "No effect here: mode.shapes.min_score=0.3. Only outputs read it: mode.outputs=[coco," in done.err
    assert "No effect" not in predict(folder, "instance", "hydra.run.dir=strong").err


def test_score_of_objects_is_refused_for_a_model_of_classes(folder):
    dinoseg.create_model("rgb", num_classes=2).save(folder / "classes.safetensors")
    for key in ("mode.min_score", "mode.shapes.min_score"):
        done = predict(folder, "classes", f"{key}=0.3", "hydra.run.dir=classes")
        assert done.status != 0 and f"{key} is for a model of objects" in done.err


def test_videos_show_classes_and_the_log_says_so(folder):
    with VideoWriter(folder / "v.mp4", 10.0, SIZES["a"]) as writer:
        writer.write(np.zeros((*SIZES["a"], 3), np.uint8))
    assert "mode=track input=VIDEO follows" in predict(folder, "instance", "input=v.mp4", "hydra.run.dir=film").err
    assert "mode=track" not in predict(folder, "instance", "hydra.run.dir=no_film").err


def test_counts_of_a_thing_named_image_have_a_column(tmp_path):
    (tmp_path / "a_segmentation").mkdir()
    (tmp_path / "a_segmentation/objects.csv").write_text("class_id\n1\n1\n2\n")
    assert write_counts(tmp_path, ["a"], {1: "image", 2: "car"}) == {"image": 2, "car": 1}
    assert read_rows(tmp_path / "counts.csv") == [{"image": "a", "image (class)": "2", "car": "1"}]


def test_counts_cover_reused_images_and_no_failed_ones(folder, tmp_path):
    for name in SIZES:
        shutil.copy(folder / "images" / f"{name}.png", tmp_path)
    words = ("mode=predict", f"resume={folder}/instance.safetensors", "engine=cpu", f"input={tmp_path}")
    run = (*words, f"hydra.run.dir={tmp_path}/run")
    succeed(folder, *run)
    counts = read_rows(tmp_path / "run/counts.csv")
    (tmp_path / "run/a_segmentation/objects.csv").unlink()
    succeed(folder, *run)
    assert read_rows(tmp_path / "run/counts.csv") == counts and [row["image"] for row in counts] == ["a", "b"]
    (tmp_path / "a.png").write_bytes(b"no image")
    assert "1 of 2 inputs failed" in call(folder, *run).err
    assert read_rows(tmp_path / "run/counts.csv") == counts[1:]


def test_results_get_the_ids_of_the_annotations_that_score_them(folder):
    reference = json.loads(predict_objects(folder, "first").read_text())
    for each in (*reference["images"], *reference["categories"]):
        each["id"] += 40
    for each in reference["annotations"]:
        each["image_id"] += 40
        each["category_id"] += 40
    path = folder / "reference.json"
    path.write_text(json.dumps(reference))
    done = predict(folder, "instance", "inference=whole", "mode.outputs=[coco]", "hydra.run.dir=own")
    assert "predict with mode.outputs=[coco] mode.shapes.ids=FILE.json" in done.out and "protocol=" not in done.out
    predict_objects(folder, "same", f"mode.shapes.ids={path}")
    done = predict(
        folder, "instance", "inference=whole", "mode.outputs=[coco]", f"mode.shapes.ids={path}", "hydra.run.dir=again"
    )
    line = next(line for line in done.out.splitlines() if "protocol=coco_instances" in line)
    succeed(folder, *line.split("dinoseg ")[1].split(), "mode.workers=1", "hydra.run.dir=scored")
    assert json.loads((folder / "scored/scores.json").read_text())["scores"]["AP"] == 1


def read_rows(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def predict_objects(folder, run, *words):
    """Return the annotations of the objects of all images, exact to the pixel."""
    words = ("inference=whole", "mode.outputs=[coco]", "mode.shapes.format=rle", *words, f"hydra.run.dir={run}")
    assert predict(folder, "instance", *words).status == 0
    return folder / run / "coco/annotations.json"


def test_predict_writes_panoptic_segments(folder):
    out = folder / "segments"
    words = ("task.score_threshold=0.4", "task.overlap_threshold=0.1", f"hydra.run.dir={out}")
    done = predict(folder, "panoptic", "inference=whole", "mode.outputs=[panoptic,labelme]", *words)
    assert done.status == 0, done.err
    content = json.loads((out / "panoptic" / "panoptic.json").read_text())
    assert [entry["file_name"] for entry in content["annotations"]] == ["a.png", "b.png"]
    assert (out / "a_segmentation" / "comparison.png").is_file()
    succeed(
        folder, "mode=score", "protocol=coco_panoptic", f"reference={out}/panoptic/panoptic.json",
        f"prediction={out}/panoptic/panoptic.json", "mode.workers=1", "hydra.run.dir=scores",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "words", "remedy"),
    [
        ("instance", [], "mode.min_score"),
        ("panoptic", [], "task.score_threshold"),
        ("panoptic", ["task.score_threshold=0.2", "task.overlap_threshold=0"], "mode.min_score"),
    ],
)
def test_overlays_without_objects_are_logged(folder, task, words, remedy):
    model = dinoseg.load(folder / f"{task}.safetensors")
    with torch.no_grad():
        model.head.classify.weight.zero_()  # equal scores of all classes
    model.save(folder / f"weak_{task}.safetensors")
    done = predict(folder, f"weak_{task}", *words, f"hydra.run.dir=weak_{task}_{len(words)}")
    assert done.status == 0 and done.err.count("Overlays that show no object: 2 of 2.") == 1
    assert f"a lower {remedy}" in done.err and ("highest there is 0.00" in done.err) == (
        remedy == "task.score_threshold"
    )
    assert "show no object" not in predict(folder, "instance", "hydra.run.dir=strong").err


@pytest.mark.parametrize(
    ("task", "words", "remedy"),
    [
        ("instance", ["inference=whole", "inference.flips=horizontal"], "inference.flips=none"),
        ("panoptic", ["inference=windows", "inference.scales=[0.5]"], "inference.scales=[1.0]"),
        ("panoptic", ["inference=whole", "inference.min_region=9"], "inference.min_region=0"),
        ("instance", ["mode.outputs=[panoptic]"], "task=panoptic"),
    ],
)
def test_what_objects_cannot_have_is_refused(folder, task, words, remedy):
    done = predict(folder, task, *words, "hydra.run.dir=refused")
    assert done.status != 0 and remedy in done.err
