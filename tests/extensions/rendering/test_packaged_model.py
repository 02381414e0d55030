"""The packaged models on renders that they were not trained on."""

import numpy as np
import pytest
from command_line import call

import dinoseg
from dinoseg.extensions.prepare import sarrarp
from dinoseg.extensions.rendering.moving.write import draw_video
from dinoseg.extensions.rendering.surgery.write import render_dataset
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids

NAME = "dinoseg:surgery"


@pytest.fixture(scope="module")
def model():
    return dinoseg.load(NAME, device="cpu", precision="fp32")


def test_packaged_model_scores_as_recorded_on_new_operations(model, tmp_path):
    render_dataset(tmp_path, train_videos=8, test_videos=1, seconds=1, seed=3, workers=1)
    sarrarp.prepare(tmp_path, workers=1)
    count = model.num_classes
    confusion = np.zeros((count, count), np.int64)
    for path in sorted(tmp_path.rglob("rgb/*.png")):
        reference = read_ids(path.parents[1] / "segmentation" / path.name)
        pairs = count * reference.astype(np.int64) + model.predict(path).mask
        confusion += np.bincount(pairs.ravel(), minlength=count**2).reshape(count, count)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    assert (confusion.diagonal() / union).mean() > 0.6  # docs/log/demo.md: 0.71


def test_packaged_image_shows_all_classes(model):
    areas = model.predict(NAME).areas
    assert min(areas.values()) >= 100 and 0.7 < areas["Background"] / sum(areas.values()) < 0.8


def test_packaged_model_of_objects_counts_as_recorded():
    model = dinoseg.load("dinoseg:objects", device="cpu", precision="fp32")
    assert [each.class_name for each in model.predict("dinoseg:objects").distinct_objects()] == 5 * ["object"]
    wrong = []
    for number in range(1, 25):
        image, ids = next(iter(draw_video((3, 1, number), 12, (128, 128))))
        wrong.append(abs(len(model.predict(image).distinct_objects()) - int(ids.max())))
    assert np.mean(wrong) < 0.8  # docs/log/demo.md: 0.44


def test_command_without_paths_equals_python(model, tmp_path):
    done = call(tmp_path, "mode=predict", f"resume={NAME}", f"input={NAME}", "engine=cpu", "hydra.run.dir=run")
    assert done.status == 0, done.err
    assert (read_ids(tmp_path / "run/masks/surgery.png") == model.predict(NAME).mask).mean() > 0.999


def test_unknown_packaged_names_are_refused(model, tmp_path):
    for words in (
        ("resume=dinoseg:objcts", "input=dinoseg:objects"),
        ("resume=dinoseg:objects", "input=dinoseg:objcts"),
    ):
        done = call(tmp_path, "mode=predict", *words)
        key = words[0].endswith("objects")
        assert f"Did you mean {'input' if key else 'resume'}=dinoseg:objects?" in done.err
    with pytest.raises(UserError, match="dinoseg:none|none.safetensors"):
        dinoseg.load("dinoseg:none")
    with pytest.raises(UserError, match="none.jpg"):
        model.predict("dinoseg:none")
    for words in (("resume=dinoseg:none", f"input={NAME}"), (f"resume={NAME}", "input=dinoseg:none")):
        done = call(tmp_path, "mode=predict", *words)
        assert done.status == 1 and "dinoseg:none" in done.err and "Traceback" not in done.err
        assert "tiny_surgical" not in done.err  # a backbone
