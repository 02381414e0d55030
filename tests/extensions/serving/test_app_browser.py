"""The app in a real browser: what the page shows and downloads is what the model says."""

import os
import re
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import opened_page
from command_line import call
from object_models import COLOURS
from PIL import Image
from serving_stand_ins import start_server

import dinoseg
from dinoseg.extensions.feature_views.drawing import enlarge
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.report.palette import default_palette
from dinoseg.utils.files import expand_path
from dinoseg.utils.images import read_ids, read_image, write_png

pytestmark = pytest.mark.heavy
TIMEOUT = 300_000  # milliseconds


@pytest.fixture(scope="module")
def scene(trained_once, tmp_path_factory):
    """A folder with an image, mode=predict's mask of it, two videos, and the address of the app."""
    folder = tmp_path_factory.mktemp("app")
    write_png(folder / "images/first.png", np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))
    words = (f"resume={trained_once}/segmenter", "engine=cpu", "hydra.run.dir=predicted")
    assert call(folder, "mode=predict", "input=images", *words).status == 0
    for name, frames, size in (("video", 8, (48, 64)), ("long", 590, (960, 1280))):
        with VideoWriter(folder / f"{name}.mp4", 10.0, size) as writer:
            for number in range(frames):  # a bright square that moves to the right
                frame = np.full((*size, 3), 30, np.uint8)
                left = 8 + 3 * (number % 8)
                frame[16:32, left : left + 16] = (250, 200, 60)
                writer.write(frame)
    words = ("tracker.short_side=48", "hydra.run.dir=run/app")
    with start_server("app", trained_once, folder, *words) as (server, address):
        yield folder, address
    expected = (" INFO ", "are larger than those of the training")
    lines = (folder / "log").read_text().splitlines()
    errors = [line for line in lines if not any(text in line for text in expected)]
    assert server.returncode == 0 and not errors, errors
    assert not [path for path in (folder / "run").iterdir() if path.name != "app"]


def upload(page, path):
    page.set_input_files("input[type=file]", path)
    page.get_by_role("status").filter(has_text=re.compile("pixels|cannot|Cannot|The file")).wait_for(timeout=TIMEOUT)
    page.wait_for_function("document.querySelector('.view')?.querySelectorAll('img').length !== 1")


def press(page, text):
    page.get_by_role("button", name=text, exact=True).click()


def download(page, text):
    with page.expect_download() as started:
        press(page, text)
    return started.value


def shares(page):
    names = page.locator(".legend .q-btn").all_inner_texts()
    return dict(zip(names, page.locator(".legend .quiet").all_inner_texts(), strict=True))


def shown_layer(page):
    """Return the mask's layer (H, W, 4) as the browser shows it."""
    page.wait_for_timeout(500)
    page.wait_for_function("document.querySelector('.mask').complete")
    height, width, values = page.evaluate("""() => {
        const layer = document.querySelector('.mask');
        const [height, width] = [layer.naturalHeight, layer.naturalWidth];
        const pen = new OffscreenCanvas(width, height).getContext('2d');
        pen.drawImage(layer, 0, 0);
        return [height, width, Array.from(pen.getImageData(0, 0, width, height).data)];
    }""")
    return np.array(values, np.uint8).reshape(height, width, 4)


def drag(page, *points):
    page.locator(".view").scroll_into_view_if_needed()
    box = page.locator(".view").bounding_box()
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()


def test_app_shows_classes_and_corrects_a_mask(scene):
    folder, address = scene
    ids = read_ids(folder / "predicted/masks/first.png")
    with opened_page(address) as page:
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.reload()
        upload(page, folder / "images/first.png")
        assert page.get_by_role("status").inner_text() == "first.png: 60 x 40 pixels"
        assert shares(page) == {
            name: f"{100 * (ids == label).mean():.2f} %" if (ids == label).any() else ""
            for label, name in enumerate(("dark", "bright"))
        }
        assert ((shown_layer(page)[..., 3] > 0) == (ids == 1)).all()
        page.get_by_label("Show 1").click()
        assert not shown_layer(page).any()
        page.get_by_label("Show 1").click()
        saved = download(page, "Download mask")
        assert saved.suggested_filename == "first_mask.png" and (read_ids(saved.path()) == ids).all()
        press(page, "dark")
        page.get_by_role("switch").click()
        drag(page, (0.2, 0.5), (0.8, 0.5))
        layer = shown_layer(page)
        changed = read_ids(download(page, "Download mask").path())
        assert (changed[20, 12:48] == 0).all() and ((layer[..., 3] > 0) == (changed == 1)).all()
        assert (changed != ids).any() and (changed[:10] == ids[:10]).all()
        press(page, "Undo")
        assert (read_ids(download(page, "Download mask").path()) == ids).all()
        with Image.open(download(page, "Download overlay").path()) as drawn:
            assert drawn.size == (60, 40)
        assert page.complaints == []
        assert {urlsplit(url).netloc for url in requests if url.startswith("http")} == {urlsplit(address).netloc}


def test_a_video_is_segmented_after_hostile_files(scene, tmp_path):
    folder, address = scene
    content = (folder / "images/first.png").read_bytes()
    hostile = {
        "cut.png": content[:400],
        "<img src=x onerror=alert(1)>.png": b"no image",
        "broken.mp4": (folder / "video.mp4").read_bytes()[:500],
        "bomb.png": content[:16] + (60_000).to_bytes(4, "big") * 2 + content[24:],
    }
    with opened_page(address) as page:
        for name, data in hostile.items():
            (tmp_path / name).write_bytes(data)
            page.set_input_files("input[type=file]", tmp_path / name)
            page.get_by_role("status").filter(has_text=re.compile("the file|The file")).wait_for(timeout=TIMEOUT)
            assert str(folder) not in page.get_by_role("status").inner_text()
            page.reload()
            page.get_by_text("No file uploaded yet.").wait_for()
        upload(page, folder / "video.mp4")
        assert page.get_by_role("status").inner_text() == "video.mp4: 8 frames of 64 x 48 pixels"
        press(page, "Segment every frame")
        page.get_by_text("Done: 8 frames").wait_for(timeout=TIMEOUT)
        page.wait_for_function("document.querySelector('video').videoWidth === 64")
        page.wait_for_function("document.querySelector('video').currentTime > 0.2")
        masks = download(page, "Download masks")
        assert masks.suggested_filename == "video_masks.zip"
        with zipfile.ZipFile(masks.path()) as archive:
            assert len(archive.namelist()) == 8
        download(page, "Download video").save_as(tmp_path / "overlay.mp4")
        with VideoReader(tmp_path / "overlay.mp4") as overlay:
            assert len(list(overlay)) == 8 and overlay.size == (48, 64)
        press(page, "Back to the first frame")
        page.locator(".view").wait_for()
        assert page.complaints == []


def test_painted_objects_are_tracked_on_a_phone(scene, tmp_path):
    folder, address = scene
    with opened_page(address, width=390, height=844) as page:
        upload(page, folder / "video.mp4")
        press(page, "Paint objects to track")
        press(page, "Track the mask of the first frame")
        page.get_by_text("The mask is empty").wait_for()
        drag(page, (0.2, 0.4), (0.3, 0.6), (0.3, 0.5))
        press(page, "object 2")
        drag(page, (0.8, 0.8), (0.9, 0.8))
        page.wait_for_function("document.querySelectorAll('.legend .quiet')[2].innerText !== ''")
        press(page, "Track the mask of the first frame")
        page.get_by_text("Done: 8 frames").wait_for(timeout=TIMEOUT)
        found = shares(page)
        assert found["object 1"] and found["object 2"] and not found["object 3"]
        download(page, "Download masks").save_as(tmp_path / "masks.zip")
        with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
            masks = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
        columns = [np.flatnonzero((mask == 1).any(axis=0)).mean() for mask in masks]
        assert columns[-1] > columns[0] + 8  # the square moves by 21 pixels
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.complaints == []


def test_a_video_is_cancelled_while_another_page_works(scene):
    folder, address = scene
    with opened_page(address) as page:
        upload(page, folder / "long.mp4")
        press(page, "Segment every frame")
        page.get_by_text("Frame ", exact=False).first.wait_for(timeout=TIMEOUT)
        other = page.context.browser.new_page()
        other.goto(address)
        upload(other, folder / "images/first.png")  # between the batches of the video
        saved = download(other, "Download mask")
        assert (read_ids(saved.path()) == read_ids(folder / "predicted/masks/first.png")).all()
        upload(other, folder / "video.mp4")
        press(other, "Segment every frame")
        other.get_by_text("Queued").wait_for()
        press(page, "Cancel")
        page.get_by_text("Cancelled.").wait_for(timeout=TIMEOUT)
        other.get_by_text("Done: 8 frames").wait_for(timeout=TIMEOUT)
        assert page.complaints == []
    deadline = time.monotonic() + 240
    while list(folder.glob("run/.uploads*/*/upload")):  # closed pages leave nothing
        assert time.monotonic() < deadline
        time.sleep(1)


def test_features_are_compared_with_clicked_patches(scene, trained_once, tmp_path):
    _, address = scene
    path = expand_path("dinoseg:surgery", ".jpg")
    image = read_image(path)
    other = np.ascontiguousarray(image[8:, ::-1])
    write_png(tmp_path / "other.png", other)
    view = dinoseg.FeatureView(dinoseg.load(trained_once / "segmenter"))
    clicked = [(100.5, 92.5), (148.5, 60.5)]
    with opened_page(address) as page:
        upload(page, path)
        page.get_by_role("tab", name="Features").click()
        panels = page.locator(".panel")
        for number, (x, y) in enumerate(clicked, start=1):
            box = panels.first.bounding_box()
            scale = box["width"] / image.shape[1]
            page.mouse.click(box["x"] + scale * x, box["y"] + scale * y)
            page.get_by_text(f"; {number} click").wait_for(timeout=TIMEOUT)
        page.set_input_files("aside input[type=file]", tmp_path / "other.png")
        page.get_by_text("Best match").wait_for(timeout=TIMEOUT)
        for row, pixels in enumerate((image, other)):
            cosines = view.similarity(image, clicked, pixels)
            shown = enlarge(cosines[..., None], pixels.shape[:2], view.extract(pixels).patches.size, view.patch_size)
            panels.nth(3 * row + 2).hover()
            text = page.locator(".panels p").nth(row).inner_text()
            x, y, value = map(float, re.search(r"x (\d+), y (\d+): (\S+)", text).groups())
            assert value == pytest.approx(shown[int(y), int(x), 0], abs=6e-4)
        best = page.locator(".best circle").first
        x, y = (float(best.get_attribute(name)) for name in ("cx", "cy"))
        assert shown[int(y), int(x), 0] == shown.max() and f"Best match: {shown.max():.3f}" in text
        press(page, "Clear clicks")
        page.locator("canvas").first.wait_for(state="detached")
        assert page.complaints == []


def test_objects_of_a_video_have_steady_colours_and_ids(trained_once, tmp_path, monkeypatch):
    size = (48, 64)
    squares = {"red": (1, 2, 3), "green": (25, 20, 0)}  # top, left, pixels to the right per frame
    with VideoWriter(tmp_path / "video.mp4", 10.0, size) as writer:
        for number in range(12):
            frame = np.zeros((*size, 3), np.uint8)
            for name, (top, left, step) in squares.items():
                if name != "green" or number not in range(4, 7):  # it is hidden for three frames
                    frame[top : top + 22, left + step * number : left + step * number + 22] = COLOURS[name]
            writer.write(frame)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    )
    words = ("tracker.short_side=48", "hydra.run.dir=run/app")
    program = ("-c", "import object_models; object_models.serve()")
    with (
        start_server("app", trained_once, tmp_path, *words, program=program) as (_, address),
        opened_page(address) as page,
    ):
        upload(page, tmp_path / "video.mp4")
        press(page, "Follow the objects")
        page.get_by_text("Done: 12 frames; objects: 2 leaf").wait_for(timeout=TIMEOUT)
        page.wait_for_function("document.querySelector('video').currentTime > 0.2")
        assert shares(page)["leaf"] and not shares(page)["stone"]
        download(page, "Download video").save_as(tmp_path / "overlay.mp4")
        download(page, "Download masks").save_as(tmp_path / "masks.zip")
        assert page.complaints == []
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        masks = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    with VideoReader(tmp_path / "overlay.mp4") as overlay:
        frames = list(overlay)
    colours = default_palette(3)
    for number, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        for name, (top, left, step) in squares.items():
            if name == "green" and number in range(4, 7):
                assert mask[top + 11, left + 11] == 0
                continue
            place = (top + 18, left + step * number + 18)  # beside its number
            own = masks[0][top + 11, left + 11]
            assert own and mask[place] == own
            tint = (np.array(COLOURS[name]) + colours[own]) / 2
            np.testing.assert_allclose(frame[place], tint, atol=30)  # videos are lossy
    assert {*np.unique(masks)} == {0, 1, 2}
