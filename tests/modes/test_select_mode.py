import csv
import json
import shutil

import numpy as np
import pytest
import torch
from command_line import SMALL, call, write_data
from films import write_film
from safetensors import safe_open
from safetensors.torch import save_file

from dinoseg.training.feature_cache.form import to_bytes
from dinoseg.utils.images import read_image, write_png

WORDS = ("mode=select", *(word for word in SMALL if not word.startswith(("adapter=", "trainer."))), "hydra.run.dir=R")
NO_DATA = tuple(word for word in WORDS if not word.startswith("data."))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("select")
    write_data(where / "data", train=6)
    done = call(where, *SMALL, "mode=train", "mode.report=false", "mode.metrics_only=true", "hydra.run.dir=model")
    assert done.status == 0, done.err
    return where


def selected(folder, *words):
    shutil.rmtree(folder / "R", ignore_errors=True)
    done = call(folder, *words)
    assert done.status == 0, done.err
    rows = list(csv.DictReader((folder / "R/selection.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == (folder / "R/selection.txt").read_text().split("\n")[:-1]
    told = json.loads((folder / "R/selection.json").read_text())["chosen"]
    assert [str(row["reason"]) for row in told] == [row["reason"] for row in rows]
    assert read_image(folder / "R/contact_sheet.png").std() > 0
    return rows, done


def test_a_data_set_s_images_are_chosen_and_copied(folder):
    rows, done = selected(folder, *WORDS, "count=3")
    assert "nearest to the mean" in rows[0]["reason"] and f"from {rows[0]['name']}" in rows[1]["reason"]
    assert f"1  {rows[0]['name']}: nearest to the mean" in done.out and "chosen:       3 of 6 images" in done.out
    for row in rows:
        copied = folder / f"R/images/{row['name']}.png"
        assert copied.read_bytes() == (folder / f"data/train/images/{row['name']}.png").read_bytes()
    more, _ = selected(folder, *WORDS, "count=5", "engine.workers=2")
    assert more[:3] == rows


def test_what_is_labelled_is_not_chosen_again(folder):
    first, _ = selected(folder, *WORDS, "count=2")
    (folder / "known.txt").write_text("\n".join(row["name"] for row in first))
    rest, _ = selected(folder, *WORDS, "count=1", "labels=known.txt")
    three, _ = selected(folder, *WORDS, "count=3")
    assert rest[0]["name"] == three[2]["name"] and rest[0]["reason"] == three[2]["reason"]
    images = ("input=data/train/images", "labels=known.txt")
    assert [row["name"] for row in selected(folder, *NO_DATA, "count=1", *images)[0]] == [rest[0]["name"]]


def test_features_are_taken_over_after_a_stop_and_a_damaged_one_is_made_anew(folder):
    words = (*WORDS, "count=4", "cache_dir=kept")
    before, done = selected(folder, *words)
    assert "reused" not in done.err
    again, done = selected(folder, *words)
    assert again == before and "6 of 6 images reused" in done.err
    files = sorted((folder / "kept/looks").glob("*/*.features"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-3] + b"abc")
    again, done = selected(folder, *words)
    assert again == before and "4 of 6 images reused" in done.err
    for path, tensors in zip(files, ([3, 2], [24, 1], [24], [24, 2, 1]), strict=False):
        path.write_bytes(to_bytes(path.stem, [torch.zeros(width) for width in tensors], "float32"))
    _, done = selected(folder, *words)
    assert "2 of 6 images reused" in done.err
    for other in ("backbone.arch.num_hidden_layers=1", "resolution.scale=0.5"):
        assert "reused" not in selected(folder, *words, other)[1].err


@pytest.mark.parametrize("selection", ["typical", "random"])
def test_others_choose(folder, selection):
    rows, _ = selected(folder, *WORDS, "count=3", f"selection={selection}")
    assert len({row["name"] for row in rows}) == 3
    if selection == "random":
        other = [selected(folder, *WORDS, "count=3", "selection=random", f"seed={n}")[0] for n in (1, 2)]
        assert not rows == other[0] == other[1]


@pytest.mark.heavy
def test_a_model_s_doubts_choose(folder):
    words = ("mode=select", "resume=model", "selection=uncertainty", "count=2", "hydra.run.dir=R", "engine=cpu")
    rows, _ = selected(folder, *words, "engine.workers=0")
    assert all(row["reason"].startswith("entropy ") for row in rows) and "the most uncertain" in rows[0]["reason"]
    margins, done = selected(folder, *words, "engine.workers=0", "selection.measure=margin", "selection.candidates=1")
    assert margins[0]["reason"].startswith("margin ") and "6 of 6 images reused" in done.err
    assert "reused" not in selected(folder, *words, "engine.workers=0", "inference=windows")[1].err
    shutil.copytree(folder / "model", folder / "other")
    path = folder / "other/checkpoints/best.safetensors"
    with safe_open(path, "pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: value + name.startswith("model/head.") for name, value in tensors.items()}, path, metadata=said)
    assert "reused" not in selected(folder, *words, "engine.workers=0", "resume=other")[1].err
    refused = call(folder, *WORDS, "count=2", "selection=uncertainty", "backbone.weights=nowhere")
    assert refused.status == 1 and "Set resume=RUN_FOLDER, or choose selection=k_centre" in refused.err


def test_frames_of_a_video_are_chosen_by_time(folder):
    write_film(folder / "film.mp4", frames=24)
    rows, done = selected(folder, *NO_DATA, "input=film.mp4", "mode.every=0.25", "count=2")
    assert {int(row["frame"]) for row in rows} <= {0, 6, 12, 18} and "overview:" in done.out
    for row in rows:
        assert float(row["time"]) == pytest.approx(int(row["frame"]) * 1001 / 24000, abs=1e-3)
        assert read_image(folder / f"R/images/{int(row['frame']):09d}.png").shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*WORDS,), "set count=N"),
        ((*WORDS, "count=7"), "so 6 are left to choose from. Give count=6 or less, or more images."),
        ((*WORDS, "count=0"), "count=0 is out of range"),
        ((*NO_DATA, "count=1"), "mode=select needs images to choose from: give input="),
        ((*NO_DATA, "count=1", "input=nowhere"), "File or folder not found: input=nowhere"),
        ((*NO_DATA, "count=1", "input=data"), "holds no image or video directly"),
        ((*WORDS, "count=1", "mode.split=tset"), "split=tset is unknown"),
        ((*WORDS, "count=1", "labels=nowhere"), "Cannot read the file list nowhere"),
        (
            (*NO_DATA, "count=2", "input=film2.mp4", "mode.every=99"),
            "choose from. Give count=1 or less, or more images (of a video, a smaller",
        ),
    ],
)
def test_what_cannot_be_chosen_is_said(folder, words, said):
    if "input=film2.mp4" in words:
        write_film(folder / "film2.mp4", frames=3)
    refused = call(folder, *words)
    assert refused.status == 1 and said in refused.err, refused.err


def test_a_damaged_image_stops_or_is_left_out(tmp_path):
    for number in range(4):
        write_png(tmp_path / f"pictures/{number}.png", np.full((16, 16, 3), 60 * number, np.uint8))
    whole = (tmp_path / "pictures/2.png").read_bytes()
    (tmp_path / "pictures/2.png").write_bytes(whole[:40])
    words = (*NO_DATA, "input=pictures", "count=3")
    refused = call(tmp_path, *words)
    assert refused.status == 1 and "2.png" in refused.err and "data.on_error=skip" in refused.err
    rows, done = selected(tmp_path, *words, "data.on_error=skip")
    assert {row["name"] for row in rows} == {"0", "1", "3"} and "Left out" in done.err and "2.png" in done.err
    short = call(tmp_path, *words[:-1], "count=4", "data.on_error=skip", "hydra.run.dir=S")
    assert short.status == 1 and "3 are left to choose from" in short.err
    (tmp_path / "known.txt").write_text("0\n2\n")
    words = (*words[:-1], "count=2", "labels=known.txt")
    rest, _ = selected(tmp_path, *words, "data.on_error=skip")
    (tmp_path / "pictures/2.png").unlink()
    (tmp_path / "known.txt").write_text("0\n")
    assert rest == selected(tmp_path, *words)[0]
