"""The app in a real browser: what is on the page is what the model says."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from chromium import opened_page
from command_line import call

from dinoseg.inference.video_writer import VideoWriter
from dinoseg.utils.images import read_ids, read_image, write_png

pytestmark = pytest.mark.heavy
VIEW = """() => {
    const view = document.getElementById('view');
    return Array.from(view.getContext('2d').getImageData(0, 0, view.width, view.height).data);
}"""

FRAME = """async () => {
    if (video.readyState < 2) await new Promise((resolve) => (video.onloadeddata = resolve));
    video.pause();
    video.currentTime = 0;
    await new Promise((resolve) => (video.onseeked = resolve));
    const pen = new OffscreenCanvas(video.videoWidth, video.videoHeight).getContext('2d');
    pen.drawImage(video, 0, 0);
    return Array.from(pen.getImageData(0, 0, video.videoWidth, video.videoHeight).data);
}"""


@pytest.fixture(scope="module")
def scene(trained_once, tmp_path_factory):
    """A folder with two pictures, mode=predict's masks of them, a clip, and the address of the app."""
    folder = tmp_path_factory.mktemp("app")
    draw = np.random.default_rng(0)
    for name, size in (("first", (40, 60)), ("second", (36, 52))):
        write_png(folder / f"pictures/{name}.png", draw.integers(0, 256, (*size, 3)).astype(np.uint8))
    words = (f"resume={trained_once}/segmenter", "engine=cpu", "hydra.run.dir=predicted")
    assert call(folder, "mode=predict", "input=pictures", *words).status == 0
    with VideoWriter(folder / "clip.mp4", 10.0, (48, 64)) as writer:
        for number in range(8):  # a bright square that moves to the right
            frame = np.full((48, 64, 3), 30, np.uint8)
            frame[16:32, 8 + 3 * number : 24 + 3 * number] = (250, 200, 60)
            writer.write(frame)
    with running(folder, trained_once) as address:
        yield folder, address


@contextmanager
def running(folder, trained_once):
    words = [f"resume={trained_once}/segmenter", "engine=cpu", "mode.port=0", "tracker.short_side=48"]
    command = [sys.executable, "-m", "dinoseg", "mode=app", *words, "hydra.run.dir=app"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        yield next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=300)
    assert server.returncode == 0
    assert not list((folder / "app").glob("*uploads*"))


def pixels(page):
    return np.array(page.evaluate(VIEW), np.uint8).reshape(
        page.evaluate("document.getElementById('view').height"), -1, 4
    )[..., :3]


def drop(page, path):
    page.set_input_files("#file", path)
    page.locator("#said.bad").or_(page.locator("#said", has_text=f"{path.name}: ")).wait_for()


def slide(page, name, value):
    page.eval_on_selector(f"#{name}", f"it => {{ it.value = {value}; it.dispatchEvent(new Event('input')); }}")


def test_a_picture_its_classes_and_its_mask(scene):
    folder, address = scene
    image, ids = read_image(folder / "pictures/first.png"), read_ids(folder / "predicted/masks/first.png")
    with opened_page(address) as page:
        drop(page, folder / "pictures/first.png")
        colours = np.array(page.evaluate("fetch('app/about').then((it) => it.json())")["palette"], np.uint8)
        half = pixels(page)
        coloured = colours[ids].any(axis=-1)
        assert coloured.any() and (half[~coloured] == image[~coloured]).all()
        expected = (image[coloured].astype(int) + colours[ids][coloured]) / 2
        assert np.abs(half[coloured] - expected).max() <= 2
        slide(page, "opacity", 0)
        assert (pixels(page) == image).all()
        slide(page, "opacity", 100)
        assert (pixels(page) == colours[ids]).all()
        slide(page, "opacity", 50)
        rows = page.eval_on_selector_all("#areas tr", "rows => rows.map((row) => row.innerText.split(/\\s+/))")
        counts = {name: int(count.replace(",", "")) for name, count, share in (row[-3:] for row in rows)}
        assert counts == {
            name: int((ids == label).sum()) for label, name in enumerate(("dark", "bright")) if (ids == label).any()
        }
        bright = page.locator("#areas tr", has_text="bright").locator("input")
        bright.focus()
        page.keyboard.press("Space")  # without a mouse
        assert (pixels(page) == image).all()
        page.click("#all")
        assert (pixels(page) == half).all()
        with page.expect_download() as download:
            page.click("#downloads a")
        assert download.value.suggested_filename == "first_mask.png"
        assert (read_ids(download.value.path()) == ids).all()
        assert page.complaints == []


def test_what_is_refused_is_told_and_the_page_goes_on(scene, tmp_path):
    folder, address = scene
    (tmp_path / "cut.png").write_bytes((folder / "pictures/first.png").read_bytes()[:400])
    with opened_page(address) as page:
        drop(page, tmp_path / "cut.png")
        assert "The image" in page.inner_text("#said") and page.locator("#said.bad").count() == 1
        drop(page, folder / "pictures/second.png")
        assert page.inner_text("#said").startswith("second.png: 52 x 36 pixels")
        assert all("400" in complaint for complaint in page.complaints)  # the browser's own line of the answer


def test_a_painted_object_is_followed_through_a_clip(scene):
    folder, address = scene
    with opened_page(address, width=390, height=844) as page:  # a phone's
        drop(page, folder / "clip.mp4")
        page.click("#paint")
        box = page.locator("#view").bounding_box()
        at = box["x"] + box["width"] * 16 / 64, box["y"] + box["height"] * 24 / 48
        slide(page, "size", 40)
        page.mouse.click(*at)
        plain, painted = np.array((250, 200, 60)), pixels(page)
        assert np.abs(painted[24, 16] - plain).max() > 40 > 20 > np.abs(painted[24, 9] - plain).max()
        page.click("#undo")
        assert page.is_disabled("#follow")
        page.mouse.click(*at)
        page.click("#add")
        page.focus("#view")
        for _ in range(30):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Space")  # a second object, by the keyboard
        page.click("#follow")
        page.wait_for_selector("#areas tr", timeout=300_000)
        assert page.inner_text("#said") == "Done: 8 frames."
        assert [text.split()[:2] for text in page.locator("#areas tr").all_inner_texts()][1:] == [
            ["object", "1"],
            ["object", "2"],
        ]
        page.evaluate("new Promise((resolve) => { video.ontimeupdate = () => video.currentTime > 0.3 && resolve(); })")
        assert page.evaluate("[video.videoWidth, video.error]") == [64, None]  # it plays
        with page.expect_download() as download:
            page.click("#downloads a:nth-child(2)")
        assert download.value.suggested_filename == "clip_masks.zip"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.complaints == []


def test_a_class_of_a_clip_can_be_switched_off(scene):
    folder, address = scene
    with opened_page(address) as page:
        drop(page, folder / "clip.mp4")
        page.click("#every")
        page.wait_for_selector("#areas tr", timeout=300_000)
        assert page.is_disabled("#redraw")
        slide(page, "opacity", 100)
        for wanted in ("none", "all"):
            page.click(f"#{wanted}")
            page.click("#redraw")
            page.locator("#said", has_text="Done: 8 frames.").wait_for()
            shown = page.evaluate(FRAME)
            first = np.full((48, 64, 3), 30, np.uint8)
            first[16:32, 8:24] = (250, 200, 60)
            error = np.abs(np.array(shown, float).reshape(48, 64, 4)[..., :3] - first).mean()
            assert error < 8 if wanted == "none" else error > 20
            assert [box.is_checked() for box in page.locator("#areas input").all()].count(wanted == "all") > 0
        assert page.inner_text("#said") == "Done: 8 frames." and page.complaints == []


def test_two_pages_at_once_do_not_mix(scene):
    folder, address = scene
    with opened_page(address) as one:
        other = one.context.browser.new_page()
        other.goto(address)
        for page, name in ((one, "first"), (other, "second")):
            page.set_input_files("#file", folder / f"pictures/{name}.png")
        for page, name in ((one, "first"), (other, "second")):
            page.locator("#said", has_text=f"{name}.png: ").wait_for()
            ids = read_ids(folder / f"predicted/masks/{name}.png")
            with page.expect_download() as download:
                page.click("#downloads a")
            assert (read_ids(download.value.path()) == ids).all()
        assert one.complaints == []
