import json
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from failing import fail_after
from making import write_motion_jpeg
from mistakes import assert_refused
from omegaconf import OmegaConf
from PIL import Image

from dinoseg.checkpoints.trained import TrainedModel
from dinoseg.core.contracts import Head
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import SEMANTIC
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.annotations.written_files import PredictedShapes
from dinoseg.extensions.protocols import score_mode as score
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.extensions.video.run import VideoFiles
from dinoseg.inference import image_run, memory
from dinoseg.modes import predict as mode
from dinoseg.utils.images import read_ids, read_image, write_png

CLASSES = ["dark", "middle", "bright"]


class Brightness(torch.nn.Module):
    """Class scores by the pixel's brightness: the answer is known for every image."""

    head = Head()
    task = SEMANTIC

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        assert not torch.is_grad_enabled()
        self.batches.append(tuple(images.shape))
        level = images.float().mean(dim=1)
        scores = torch.stack([-(level - centre).abs() for centre in (0, 128, 255)], dim=1)
        return Prediction(scores, images.shape[-2:], (1.0, 1.0), lambda outputs, size, valid: outputs)


def expected_ids(frame):
    level = frame.astype(float).mean(axis=-1)
    return np.abs(level[..., None] - [0, 128, 255]).argmin(axis=-1)


@pytest.fixture
def trained_model(monkeypatch):
    palette = [(0, 0, 0), (200, 40, 0), (0, 90, 255)]
    engine = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    fake = TrainedModel(Brightness().eval(), engine, CLASSES, palette, 255, {})
    monkeypatch.setattr(mode, "load_trained", lambda cfg: fake)
    return fake


MASKS = {"_target_": "dinoseg.data.classes.masks.Masks", "format": "binary"}
CFG = OmegaConf.create({"data": {"reader": {"masks": MASKS}}})


def predict(source, out_dir, cfg=CFG, **changes):
    options = {"masks": False, "opacity": 0.5, "batch_size": 3} | changes
    options = {"shapes": PredictedShapes(), "videos": VideoFiles(), **options}
    return mode.predict(cfg, out_dir=out_dir, input=source and str(source), **options)


def random_image(path, size=(20, 30), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    write_png(path, pixels)
    return pixels


def random_video(path, frames=10):
    pixels = np.zeros((frames, 32, 48, 3), np.uint8)
    for index, frame in enumerate(pixels):
        frame[:, : 4 * index + 4] = 250
    return write_motion_jpeg(path, pixels, (32, 48))


def groups_of(out):
    return json.loads((out / "masks/classes.json").read_text())["groups"]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("predict.json", "predicted"))


def test_a_folder_of_several_sizes_and_equal_stems(trained_model, tmp_path, caplog):
    folder = tmp_path / "in"
    sizes = {**{f"same{index}": (8, 9) for index in range(5)}, "x": (5, 6), "large": (21, 33)}
    images = {name: random_image(folder / f"{name}.png", size, seed) for seed, (name, size) in enumerate(sizes.items())}
    images["x_png"], images["x_bmp"] = images.pop("x"), random_image(tmp_path / "x.png", (4, 6), seed=10)
    cv2.imwrite(str(folder / "x.bmp"), images["x_bmp"][..., ::-1])
    (folder / "notes.txt").write_text("not a picture")
    with caplog.at_level("INFO"):
        totals = predict(folder, tmp_path / "out")
    assert "images: 8 images in" in caplog.text and "the slowest stage is" in caplog.text
    assert totals["images"] == 8 and totals["images_per_s"] > 0
    assert names(tmp_path / "out") == sorted(f"{name}_segmentation" for name in images)
    for name, pixels in images.items():
        raw = np.load(tmp_path / "out" / f"{name}_segmentation" / "segmentation_raw.npy")
        assert raw.dtype == np.uint8 and np.array_equal(raw, expected_ids(pixels)), name
    assert max(batch[0] for batch in trained_model.model.batches) == 3  # batched by size, never above the limit


def test_a_video_gives_an_overlay_and_masks(trained_model, tmp_path, caplog):
    video = random_video(tmp_path / "v.avi")
    with caplog.at_level("INFO"):
        totals = predict(video, tmp_path / "out", masks=True)
    assert names(tmp_path / "out") == ["v_masks", "v_overlay.mp4"]
    assert totals["frames"] == 10 and totals["frames_per_s"] > 0
    assert "v: 10 frames in" in caplog.text and "including reading and writing" in caplog.text
    with VideoReader(tmp_path / "out" / "v_overlay.mp4") as reader:
        assert reader.size == (32, 48) and reader.fps == pytest.approx(12.5)
        overlay = list(reader)
    assert len(overlay) == 10
    bright = overlay[9][10:20, 4:30].reshape(-1, 3).mean(axis=0)
    assert np.abs(bright - (125, 170, 252)).max() < 20  # half white, half the class's blue
    assert overlay[0][:, 20:].mean() < 12  # black classes leave the frame alone
    numbers = [f"{index:09d}" for index in range(10)]
    assert names(tmp_path / "out" / "v_masks") == [*(f"{number}.png" for number in numbers), "classes.json"]
    record = json.loads((tmp_path / "out/v_masks/classes.json").read_text())
    assert record["groups"] == dict.fromkeys(numbers, "v")
    ids = read_ids(tmp_path / "out" / "v_masks" / "000000004.png")
    assert ids.shape == (32, 48) and (ids[:, :18] == 2).all() and (ids[:, 24:] == 0).all()
    assert {batch[0] for batch in trained_model.model.batches} == {3, 1}
    predict(video, tmp_path / "opaque", opacity=1.0)
    assert names(tmp_path / "opaque") == ["v_overlay.mp4"]
    with VideoReader(tmp_path / "opaque/v_overlay.mp4") as reader:
        last = list(reader)[-1]
    assert np.abs(last[10:20, 4:30].reshape(-1, 3).mean(axis=0) - (0, 90, 255)).max() < 12  # the class's colour


def test_class_ids_have_the_layout_of_mode_score(trained_model, tmp_path, capsys):
    folder = tmp_path / "in"
    images = {name: random_image(folder / f"{name}.png", seed=len(name)) for name in ("a", "deep/a", "deep/frame10")}
    trained_model.ignore_index = 250
    for masks in (None, True, False):
        predict(f"{folder}/**/*.png", tmp_path / f"out{masks}", masks=masks)
        found = tmp_path / f"out{masks}/masks"
        if masks is False:
            assert not found.exists() and "score them" not in capsys.readouterr().out
            continue
        for name, pixels in images.items():
            assert np.array_equal(read_ids(found / f"{name}.png"), expected_ids(pixels))
        record = json.loads((found / "classes.json").read_text())
        colours = [list(colour) for colour in trained_model.palette]
        assert record == {
            **{"classes": CLASSES, "palette": colours, "ignore_index": 250},
            **{"masks": {"format": "binary"}, "has_layers": False, "groups": {}},
        }
        printed = capsys.readouterr().out
        assert f"masks:        {found}, 3 PNGs of class ids" in printed
        assert "# FOLDER: masks of the same names" in printed
        assert f"python -m dinoseg mode=score prediction={tmp_path}/out{masks} reference=FOLDER  #" in printed


def test_split_by_fraction_is_predicted_under_its_own_names(trained_model, tmp_path, compose, capsys):
    for name in ("a", "deep/a", "deep/b", "c"):
        pixels = random_image(tmp_path / f"images/{name}.png", seed=len(name))
        write_png(tmp_path / f"masks/{name}.png", expected_ids(pixels).astype(np.uint8) + 1)
    reader = ("layout.images=images", "layout.masks=masks", "partition.by=fraction", "partition.val_fraction=0.5")
    words = (f"data.root={tmp_path}", "data=folder", f"data.classes={CLASSES}", "data.group='^.*/|$'")
    words += ("++data.reader.masks.ids={1: 0, 2: 1, 3: 2}", *(f"data.reader.{word}" for word in reader))
    cfg = compose(*words)
    out = tmp_path / "out"
    predict("val", out, cfg, masks=None)
    names = Builder(cfg).dataset("val").names
    groups = groups_of(out)
    assert groups == {name: name.rpartition("/")[0] and "deep/" for name in names}
    for folder in ("masks", "references"):
        found = (out / folder).rglob("*.png")
        assert sorted(path.relative_to(out / folder).with_suffix("").as_posix() for path in found) == names
    assert f"reference={out}/references" in capsys.readouterr().out
    sides = {"reference": str(out / "references"), "prediction": str(out)}
    scores = score.run(compose("mode=score"), out_dir=tmp_path, workers=1, **sides)
    assert scores["mIoU"] == 1.0 and json.loads((tmp_path / "scores.json").read_text())["n"] == len({*groups.values()})


def test_images_of_other_files_have_only_typed_groups(trained_model, tmp_path, compose, caplog):
    for name in ("IMG_1", "IMG_2"):
        random_image(tmp_path / f"in/{name}.png")
    (tmp_path / "out/config").mkdir(parents=True)
    for words, groups in (((), {}), (("data.group='_.$'",), {"IMG_1": "_1", "IMG_2": "_2"}), (("data.group=_2",), {})):
        (tmp_path / "out/config/overrides.txt").write_text("\n".join(("data=camvid", *words)))
        predict(tmp_path / "in", tmp_path / "out", compose("data=camvid", *words), masks=None)
        assert groups_of(tmp_path / "out") == groups
    (note,) = [record.message for record in caplog.records if "data.group" in record.message]
    assert "data.group=_2 does not match the name IMG_1" in note


def test_bad_files_are_named_and_the_rest_is_done(trained_model, tmp_path):
    folder = tmp_path / "in"
    for name in "aeg":
        random_image(folder / f"{name}.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "c.jpg").write_text("no picture")
    Image.new("1", (20_000, 20_000)).save(folder / "d.png")
    random_video(folder / "v.avi")
    whole = random_video(folder / "w.avi", frames=40).read_bytes()
    (folder / "w.avi").write_bytes(whole[: len(whole) // 2])
    (folder / "z.mp4").write_bytes(b"")
    failed = ("5 of 9 inputs failed; the others are in", "b.png", "c.jpg", "w.avi ends early", "z.mp4 as a video: 0")
    limit = "d.png as an image: it is too large (Image size (400000000 pixels) exceeds limit of 178956970 pixels"
    assert_refused(lambda: predict(folder, tmp_path / "out", masks=True), *failed, limit)
    images = [f"{name}_segmentation" for name in "aeg"]
    assert names(tmp_path / "out") == [*images, "masks", "v_masks", "v_overlay.mp4"]


def test_a_model_that_fails_leaves_nothing_half_written(trained_model, tmp_path, monkeypatch):
    fail_after(monkeypatch, trained_model.model, "forward", 2, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        predict(random_video(tmp_path / "v.avi"), tmp_path / "out", masks=True)
    assert names(tmp_path / "out") == []


def test_image_out_of_memory_is_named_and_others_are_predicted(trained_model, tmp_path, monkeypatch):
    for name in "abc":
        random_image(tmp_path / f"in/{name}.png", seed=ord(name))
    bad = torch.tensor(read_image(tmp_path / "in/b.png")).permute(2, 0, 1)
    real, draw = trained_model.model.forward, image_run.write_image_results

    def forward(images):
        if any(torch.equal(image, bad) for image in images):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(images)

    def write_or_fail(folder, *given, **named):
        if folder.name.startswith("c"):
            raise MemoryError
        draw(folder, *given, **named)

    trained_model.model.forward = forward
    monkeypatch.setattr(image_run, "write_image_results", write_or_fail)
    drawn = "in/c.png: there is not enough memory to draw"
    predicted = "in/b.png: Not enough memory to predict an image of 30 x 20 (width x height) (CUDA"
    assert_refused(lambda: predict(tmp_path / "in", tmp_path / "out"), "2 of 3 inputs failed", predicted, drawn)
    assert names(tmp_path / "out") == ["a_segmentation"] and [*(tmp_path / "out/predicted").iterdir()][0].stem == "a"


def test_repeated_command_resumes_where_it_stopped(trained_model, tmp_path, monkeypatch, caplog):
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(5):
        random_image(folder / f"{number}.png", seed=number)
    random_video(folder / "v.avi")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_after(patch, image_run, "write_image_results", 3, KeyboardInterrupt())
        predict(folder, out, batch_size=1)
    assert len(list(out.glob("*_segmentation"))) == 3
    trained_model.model.batches.clear()
    with caplog.at_level("INFO"):
        totals = predict(folder, out, batch_size=1)
    assert "3 images of an earlier run reused" in caplog.text and totals["images"] == 5
    assert len(trained_model.model.batches) == 2 + 10  # two images, ten frames
    whole = tmp_path / "whole"
    predict(folder, whole, batch_size=1)
    for path in whole.rglob("*"):
        if path.is_file() and "predict" not in str(path.relative_to(whole)):
            assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    trained_model.model.batches.clear()
    predict(folder, out, batch_size=1)
    assert trained_model.model.batches == []
    random_image(folder / "2.png", seed=99)
    (out / "v_overlay.mp4").unlink()
    predict(folder, out, batch_size=1)
    assert len(trained_model.model.batches) == 1 + 10 and "2.png is predicted again" in caplog.text
    said = ("settings differ", "frames was null and is 2", "start over without hydra.run.dir")
    assert_refused(lambda: predict(folder, out, frames=2), *said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": True}, "mode.masks was false and is true"),
        ({"opacity": 0.25}, "mode.opacity was 0.5 and is 0.25"),
        ({"frames": 2}, "mode.frames was null and is 2"),
        ({"outputs": ["palette"]}, "mode.outputs"),
        ({"cfg": {"resolution": {"scale": 0.5}}}, "resolution.scale"),
        ({"cfg": {"inference": {"flip": True}}}, "inference.flip"),
        ({"cfg": {"backbone": {"dtype": "bfloat16"}}}, "backbone.dtype"),
        ({"cfg": {"adapter": {"alpha": 2}}}, "adapter.alpha"),
        ({"cfg": {"head": {"layers": [1]}}}, "head.layers"),
    ],
)
def test_results_of_other_settings_are_not_mixed(trained_model, tmp_path, changes, message):
    parts = {"resolution": {"scale": 1.0}, "inference": {"flip": False}, "backbone": {"dtype": "float32"}}
    cfg = OmegaConf.merge(CFG, parts, {"adapter": {"alpha": 1}, "head": {"layers": [0]}})
    random_image(tmp_path / "in/a.png")
    assert predict(tmp_path / "in", tmp_path / "out", cfg)["images_per_s"] > 0
    again = predict(tmp_path / "in", tmp_path / "out", cfg)
    assert again["images"] == 1 and again["images_per_s"] == 0  # a rate of what this run did
    changed = OmegaConf.merge(cfg, changes.pop("cfg", {}))
    assert_refused(lambda: predict(tmp_path / "in", tmp_path / "out", changed, **changes), message)


def test_input_replaced_while_reading_is_predicted_again(trained_model, tmp_path, caplog):
    folder = tmp_path / "in"
    real = trained_model.model.forward
    random_image(folder / "a.png")
    random_video(folder / "v.avi")

    def forward(images):
        if images.shape[-2:] == (20, 30):
            random_image(folder / "a.png", seed=1)
        else:
            random_video(folder / "new.avi", frames=4).replace(folder / "v.avi")
        return real(images)

    trained_model.model.forward = forward
    assert predict(folder, tmp_path / "out")["frames"] == 10
    trained_model.model.forward = real
    assert predict(folder, tmp_path / "out")["frames"] == 4
    assert "a.png is predicted again" in caplog.text and "v.avi is predicted again" in caplog.text


def test_further_outputs_of_a_video_are_of_each_frame(trained_model, tmp_path, capsys):
    out = tmp_path / "out"
    outputs = ["palette", "probabilities", "confidence"]
    video = random_video(tmp_path / "v.avi")
    predict(video, out, masks=True, outputs=outputs)
    assert names(out) == ["v_confidence", "v_masks", "v_overlay.mp4", "v_palette", "v_probabilities"]
    assert "v_overlay.mp4" not in capsys.readouterr().out.replace("*_overlay.mp4, *_masks, *_palette, *_prob", "")
    with VideoReader(video) as reader:
        frames = list(reader)
    for number, frame in enumerate(frames):
        name = f"{number:09d}"
        scores = -np.abs(frame.astype(float).mean(axis=-1) - np.array([0, 128, 255])[:, None, None])
        shares = np.exp(scores - scores.max(axis=0))
        shares /= shares.sum(axis=0)
        np.testing.assert_allclose(np.load(out / f"v_probabilities/{name}.npy"), shares, atol=1e-3)
        np.testing.assert_allclose(np.load(out / f"v_confidence/{name}.npy"), shares.max(axis=0), atol=1e-3)
        for folder in ("v_masks", "v_palette"):
            assert np.array_equal(read_ids(out / folder / f"{name}.png"), shares.argmax(axis=0))
    trained_model.model.batches.clear()
    predict(video, out, masks=True, outputs=outputs)
    assert trained_model.model.batches == []
    shutil.rmtree(out / "v_palette")
    predict(video, out, masks=True, outputs=outputs)
    assert len(names(out / "v_palette")) == 10


def test_inputs_that_fit_no_option_are_refused_before_loading(monkeypatch, tmp_path):
    monkeypatch.setattr(mode, "load_trained", lambda cfg: pytest.fail("the model was loaded"))
    for name in ("a.mp4", "b.mkv"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(b"nothing")
    random_image(tmp_path / "in/a.png")
    random_video(tmp_path / "in/v.avi")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 7 * 3 * 4 * 32 * 48 - 1)
    annotations = ("outputs names coco, labelme: choose some of palette, prob", " frames of ", "in/v.avi")
    for source, outputs, words in (
        (None, [], ("give input=<image, folder, glob or video>",)),
        (tmp_path / "in", ["palette", "coco", "labelme"], annotations),
        (tmp_path / "bad", [], ("Cannot read ", "a.mp4 as a video", "b.mkv")),
        (tmp_path / "in/v.avi", [], ("v.avi has frames of 48 x 32 pixels; up to 21 ", "Lower mode.batch_size")),
    ):
        assert_refused(partial(predict, source, tmp_path / "out", outputs=outputs), *words)
    assert not (tmp_path / "out").exists()


def test_annotation_outputs_are_complete_after_resuming(trained_model, tmp_path):
    cfg = OmegaConf.merge(CFG, {"data": {"background": "dark", "classes": CLASSES}})
    options = {"masks": True, "outputs": ["coco", "confidence"], "shapes": PredictedShapes("rle")}
    pixels = {name: random_image(tmp_path / f"in/{name}.png", seed=seed) for seed, name in enumerate("abc")}
    (tmp_path / "in/c.png").rename(tmp_path / "c.png")
    for names_then in ("ab", "abc"):
        predict(tmp_path / "in", tmp_path / "out", cfg, **options)
        content = json.loads((tmp_path / "out/coco/annotations.json").read_text())
        assert [image["file_name"] for image in content["images"]] == [f"{name}.png" for name in names_then]
        if names_then == "ab":
            (tmp_path / "c.png").rename(tmp_path / "in/c.png")
    assert [row["name"] for row in content["categories"]] == CLASSES[1:]
    areas = sum(row["area"] for row in content["annotations"])
    assert areas == sum((expected_ids(image) > 0).sum() for image in pixels.values())
    assert np.load(tmp_path / "out/confidence/c.npy").max() <= 1
    options["outputs"] = ["koko"]
    assert_refused(lambda: predict(tmp_path / "in", tmp_path / "x", cfg, **options), "mode.outputs names koko")
