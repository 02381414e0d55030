"""A multi-label model in endpoint and app: the layers of mode=predict, with the model's threshold of each class."""

import io
import re
import urllib.request
import zipfile

import numpy as np
import pytest
from chromium import opened_page
from command_line import call
from image_files import encode_image
from PIL import Image
from portable_parts import export_file, write_untrained
from serving_stand_ins import picture, start_server

import dinoseg
from dinoseg.checkpoints.source import ModelSource
from dinoseg.extensions.serving.source import load_served
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.utils.images import read_ids, write_png

pytestmark = pytest.mark.heavy
CLASSES = ("dark", "bright")
WORDS = ("backbone=rgb", "adapter=frozen", "head=linear", "task=multilabel", "loss=bce", "resolution.crop=[32,48]")


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory, compose):
    """A folder with a run of a multi-label model, its exported file, an image, a video, and mode=predict's masks."""
    folder = tmp_path_factory.mktemp("layers")
    write_png(folder / "images/first.png", picture(40, 60))
    path = write_untrained(compose, folder, *WORDS)
    found = dinoseg.load(path, device="cpu", precision="fp32").predict(folder / "images/first.png").probabilities
    stored, typed = (np.quantile(found, share, axis=(1, 2)).tolist() for share in (0.5, 0.7))
    path = write_untrained(compose, folder, *WORDS, f"task.threshold={stored}")
    export_file(path, folder / "exported")
    (folder / "run").rename(folder / "segmenter")
    (folder / "typed.txt").write_text(f"task.threshold={typed}")
    for name, words in (("stored", ()), ("typed", (f"task.threshold={typed}".replace(" ", ""),))):
        words = ("mode=predict", "resume=segmenter", "input=images", "engine=cpu", f"hydra.run.dir={name}", *words)
        assert call(folder, *words).status == 0
    with VideoWriter(folder / "video.mp4", 10.0, (48, 64)) as writer:
        for number in range(3):
            writer.write(picture(48, 64, seed=number))
    return folder


def read_predicted(folder, name):
    return np.stack([read_ids(folder / name / f"masks/{label}/first.png") for label in CLASSES])


def read_pages(content):
    with Image.open(io.BytesIO(content)) as image:
        pages = []
        for number in range(image.n_frames):
            image.seek(number)
            pages.append(np.asarray(image))
    return np.stack(pages)


@pytest.mark.parametrize(("name", "share"), [("stored", 0.5), ("typed", 0.3)])
def test_endpoint_returns_the_layers_of_predictions(multilabel, tmp_path, name, share):
    wanted = read_predicted(multilabel, name)
    assert wanted.mean(axis=(1, 2)) == pytest.approx([share, share], abs=0.05)
    words = [(multilabel / "typed.txt").read_text()] if name == "typed" else []
    body = encode_image(picture(40, 60))
    with start_server("serve", multilabel, tmp_path, "hydra.run.dir=run", *words) as (_, address):
        with urllib.request.urlopen(f"{address}/segment", body) as answer:
            assert (read_pages(answer.read()) == wanted).all()
        with urllib.request.urlopen(f"{address}/segment?class=bright", body) as answer:
            assert (read_pages(answer.read())[0] == wanted[1]).all()


def test_exported_file_is_served_with_its_thresholds(multilabel, compose, tmp_path):
    source = ModelSource(compose("mode=serve", "engine=cpu"))
    model = load_served(source, tmp_path, str(multilabel / "exported/model.safetensors"))
    assert (model.predict(picture(40, 60)).mask == read_predicted(multilabel, "stored")).all()


def test_app_shows_and_corrects_overlapping_classes(multilabel, tmp_path):
    wanted = read_predicted(multilabel, "stored")
    assert wanted.all(axis=0).any() and not wanted.any(axis=0).all()  # overlaps, and pixels without class
    with (
        start_server("app", multilabel, tmp_path, "hydra.run.dir=run") as (_, address),
        opened_page(address) as page,
    ):

        def upload(path, text):
            page.set_input_files("input[type=file]", path)
            page.get_by_role("status").filter(has_text=text).wait_for(timeout=300_000)

        def download(text):
            with page.expect_download() as started:
                page.get_by_role("button", name=text, exact=True).click()
            return started.value

        upload(multilabel / "images/first.png", "60 x 40 pixels")
        names = page.locator(".legend .q-btn").all_inner_texts()
        shares = dict(zip(names, page.locator(".legend .quiet").all_inner_texts(), strict=True))
        assert shares == {name: f"{100 * layer.mean():.2f} %" for name, layer in zip(CLASSES, wanted, strict=True)}
        saved = download("Download mask")
        assert saved.suggested_filename == "first_mask.tif" and (read_pages(saved.path().read_bytes()) == wanted).all()
        page.get_by_role("switch", name=re.compile("Eraser")).click()
        page.get_by_role("button", name="dark", exact=True).click()
        box = page.locator(".view").bounding_box()
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.up()
        page.wait_for_timeout(500)
        changed = read_pages(download("Download mask").path().read_bytes())
        assert not changed[0, 20, 12:48].any() and (changed[1] == wanted[1]).all()
        upload(multilabel / "video.mp4", "3 frames of 64 x 48 pixels")
        page.get_by_role("button", name="Segment every frame").click()
        page.get_by_text("Done: 3 frames").wait_for(timeout=300_000)
        with zipfile.ZipFile(download("Download masks").path()) as archive:
            assert archive.namelist() == [f"{number:09d}.tif" for number in range(3)]
            assert read_pages(archive.read("000000000.tif")).shape == (2, 48, 64)
        assert page.complaints == []
