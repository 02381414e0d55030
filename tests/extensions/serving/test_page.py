"""A page keeps what it shows until another upload is opened, and takes only valid values of its visitor."""

import asyncio
import io
import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from command_line import TINY_KEYS
from nicegui import Client, core
from nicegui.page import page as nicegui_page
from object_models import draw_image, make_served
from PIL import Image
from serving_stand_ins import InThread, compute_endlessly, encode_image, picture, shared_model

import dinoseg
from dinoseg.extensions.serving import decoding, features_tab
from dinoseg.extensions.serving import page as page_module
from dinoseg.extensions.serving.features_tab import UploadFeatures
from dinoseg.extensions.serving.page import Page, PageContext
from dinoseg.extensions.serving.source import open_views
from dinoseg.extensions.video.writer import VideoWriter


def on_a_page(check, *, make_model=None, **options):
    """Return a test that runs a coroutine function of a new page and a function that sends it an upload."""

    def test(tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(decoding, "Child", InThread)
        monkeypatch.setattr(page_module, "_MAX_WAITING_STROKES", 2)

        async def start():
            core.loop = asyncio.get_running_loop()
            model = make_model and make_model()
            with shared_model(max_pixels=100_000, **{"model": model, **options}) as shared:
                client = Client(nicegui_page("/"), request=None)
                features = model and UploadFeatures(shared, open_views(model))
                with client:
                    page = Page(PageContext(shared, tmp_path, None, 1.0, 2.0, features), "token")
                page.folder.mkdir()

                async def send(content, name="a.png"):
                    path = page.folder / name
                    path.write_bytes(content)
                    page.add_upload(path)
                    await page._open_upload(SimpleNamespace(args=name))

                await check(page, send)
                client.delete()

        asyncio.run(start())
        assert caplog.text == ""

    return test


def list_files(page):
    return [path.name for path in page.folder.iterdir()]


@on_a_page
async def test_refused_upload_leaves_the_opened_one(page, send):
    await page._open_upload(SimpleNamespace(args="a\nb"))  # before any upload
    assert not page.files and "No file" in page._status.text
    await send(encode_image(picture()))
    shown = page.files["image.jpg"]
    mask = page._predicted
    for content in (b"no image", encode_image(picture())[:50], b"#EXTM3U\nfile:///etc/passwd\n"):
        await send(content, "b")
        assert "the file" in page._status.text.lower() and list_files(page) == ["a.png"]
        assert page.files["image.jpg"] is shown and page._predicted is mask
    await send(encode_image(picture(5, 5)), "c")
    assert page._predicted.shape == (5, 5) and list_files(page) == ["c"]
    assert page._status.text == "c: 5 x 5 pixels"  # a model of classes counts no objects


@on_a_page
async def test_video_is_opened_as_the_kind_that_was_checked(page, send):
    await send(encode_image(picture()))
    await page._segment_video()
    assert page._status.text.startswith("The file is not a video")
    page.add_upload(page.folder / "next")  # uploaded, but not opened
    await page._segment_video()
    assert page._status.text.startswith("The file is not a video")


@on_a_page
async def test_closed_page_holds_no_masks(page, send):
    await send(encode_image(picture(200, 200)))
    await page._paint(SimpleNamespace(args=[[0, 0], [200, 200]]))
    held = [weakref.ref(page._predicted), weakref.ref(page._editor), weakref.ref(page._editor.mask)]
    page.close()
    assert [ref() for ref in held] == [None] * 3 and not page.files and not page.folder.exists()


@on_a_page
async def test_upload_of_a_page_closed_meanwhile_is_dropped(page, send):
    def segment(path):
        page.close()
        return b"", np.zeros((9, 9), np.uint8), 0

    page._segment_file = segment
    page.folder.mkdir(exist_ok=True)
    await send(encode_image(picture()))
    assert page._predicted.shape == (1, 1) and not page.files


def on_a_page_that_computes(check):
    return on_a_page(check, before=compute_endlessly, timeout=0.1)


@on_a_page_that_computes
async def test_computing_of_a_page_ends_at_the_timeout(page, send):
    await send(encode_image(picture()))
    assert "mode.timeout" in page._status.text and not page.is_busy
    page._context.model._timeout = 1e9
    work = asyncio.create_task(send(encode_image(picture())))
    while not page._context.model._computing.locked():
        await asyncio.sleep(0.01)
    page.close()
    await work
    assert page._status.text == "Cancelled."


@on_a_page
async def test_an_upload_holds_a_place_for_its_image(page, send):
    model = page._context.model
    free = []
    model._runtime.before = lambda images: free.append(model._places._value)
    await send(encode_image(picture()))
    assert [*free, model._places._value] == [3, 4]


@on_a_page_that_computes
async def test_a_frame_ends_at_the_timeout(page, send):
    path = page.folder / "a.mp4"
    with VideoWriter(path, 10.0, (48, 64)) as writer:
        for number in range(3):
            writer.write(picture(48, 64, seed=number))
    page._opened = path
    await page._segment_video()
    assert "per image or frame (mode.timeout)" in page._status.text and not page.is_busy


@on_a_page
async def test_invalid_values_of_widgets_do_not_reach_the_page(page, send):
    await send(encode_image(picture()))
    client = page._stage.client
    inputs = [
        (widget, listener.id)
        for widget in client.elements.values()
        for listener in widget._event_listeners.values()
        if listener.type == "update:modelValue"
    ]
    assert len(inputs) == 7  # three sliders, brush and eraser, and a checkbox for each class
    for value in ("text", None, [], {}, -5, 1e300, "x" * 1000, True):
        for widget, listener in inputs:
            client.handle_event({"id": widget.id, "listener_id": listener, "args": [json.dumps(value)]})
            assert isinstance(widget.value, int | float) and -1 < widget.value < 101
        assert page._brush.value is (value is True) and 1 <= page._radius.value and 1 <= page._zoom.value <= 8
    page._tell("x" * 1000)
    assert len(page._status.text) == 300


@on_a_page
async def test_waiting_strokes_are_limited(page, send):
    await send(encode_image(picture()))
    async with page._painting:
        strokes = [asyncio.create_task(page._paint(SimpleNamespace(args=[[x, 1]]))) for x in range(5)]
        await asyncio.sleep(0)
        assert page._strokes == 2
    await asyncio.gather(*strokes)
    assert page._strokes == 0 and len(page._editor._strokes) == 2


@on_a_page
async def test_downloads_are_encoded_from_the_corrected_mask(page, send):
    await send(encode_image(np.zeros((40, 60, 3), np.uint8)))
    page._choose(1)
    await page._paint(SimpleNamespace(args=[[30, 20]]))
    for name, size in (("mask.png", (60, 40)), ("overlay.jpg", (60, 40)), ("layer.png", (60, 40))):
        content = io.BytesIO(page.files[name]())
        with Image.open(content) as image:
            assert image.size == size
            if name == "mask.png":
                assert np.asarray(image)[20, 30] == 1 and np.asarray(image)[0, 0] == 0


def on_a_page_with_layers(check):
    return on_a_page(check, has_layers=True)


@on_a_page_with_layers
async def test_overlapping_classes_are_painted_and_erased(page, send):
    image = picture(40, 60)
    await send(encode_image(image))
    wanted = np.array([image.mean(axis=-1) > 127, image[..., 0] > 127, np.zeros((40, 60), bool)])
    assert (page._editor.mask == wanted).all() and page._eraser.visible
    assert page._shares[1].text == f"{100 * wanted[1].mean():.2f} %" and page._shares[2].text == ""
    page._choose(1)
    page._eraser.value = True
    await page._paint(SimpleNamespace(args=[[30.5, 20.5]]))
    assert not page._editor.mask[1, 20, 30] and (page._editor.mask[[0, 2]] == wanted[[0, 2]]).all()
    page._eraser.value = False
    page._choose(2)
    await page._paint(SimpleNamespace(args=[[30.5, 20.5]]))
    assert page._editor.mask[2, 20, 30] and (page._editor.mask[0] == wanted[0]).all()
    with Image.open(io.BytesIO(page.files["mask.tif"]())) as saved:
        saved.seek(2)
        assert np.asarray(saved)[20, 30] == 1 and saved.n_frames == 3
    with (
        Image.open(io.BytesIO(page.files["overlay.jpg"]())) as drawn,
        Image.open(io.BytesIO(page.files["layer.png"]())) as layer,
    ):
        assert drawn.size == layer.size == (60, 40)
    page._reset()
    assert (page._editor.mask == wanted).all()


@on_a_page_with_layers
async def test_overlapping_classes_are_not_tracked_but_objects_are(page, send):
    await send(encode_image(np.full((40, 60, 3), 200, np.uint8)))
    page._context = replace(page._context, make_tracker=None)  # none is made
    await page._track_video()
    assert "paint objects" in page._status.text and not page.is_busy
    assert "negative" in page._status._style["color"]
    page._start_objects()
    assert page._editor.mask.shape == (40, 60) and not page._eraser.visible
    page._eraser.value = True  # left on; objects have no eraser
    page._choose(3)
    await page._paint(SimpleNamespace(args=[[30.5, 20.5]]))
    assert page._editor.mask[20, 30] == 3
    assert page._stage._props["color"] == f"rgb{page._editor.labels.palette[3]}"


def on_a_page_with_objects(check):
    return on_a_page(check, model=make_served("instance"))


def on_a_page_with_segments(check):
    return on_a_page(check, model=make_served("panoptic"))


@on_a_page_with_segments
async def test_stuff_is_not_counted(page, send):
    await send(encode_image(draw_image((120, 180))[0]))
    assert page._status.text == "a.png: 180 x 120 pixels; objects: 2 leaf, 1 stone"
    await send(encode_image(np.zeros((40, 60, 3), np.uint8)), "b.png")
    assert page._status.text == "b.png: 60 x 40 pixels; objects: none"


@on_a_page_with_objects
async def test_single_objects_are_counted_and_outlined(page, send):
    image, masks = draw_image((120, 180))
    await send(encode_image(image))
    assert page._status.text == "a.png: 180 x 120 pixels; objects: 2 leaf, 1 stone"
    assert (page._predicted == masks[0] + masks[1] + 2 * masks[2]).all(), "the mask has classes"
    with Image.open(io.BytesIO(page.files["image.jpg"])) as shown:
        red = (np.asarray(shown)[..., 0] > 100) & masks[1]
    assert 50 < red.sum() < 0.1 * masks[1].sum(), "the outline and number of the green leaf, whose class is red"
    with Image.open(io.BytesIO(page.files["layer.png"]())) as layer:
        is_covered = np.asarray(layer.convert("RGBA"))[..., 3] > 0
    marks = page._marks & masks[1]
    assert (is_covered[masks[1]] == ~marks[masks[1]]).all() and marks.sum() > 50, "outlines and numbers are legible"
    page._opacity.value = 100
    with Image.open(io.BytesIO(page.files["overlay.jpg"]())) as drawn:
        white = np.asarray(drawn)[masks[1]].min(axis=-1) > 200
    assert white.any(), "of the number, on the colours alone"
    await send(encode_image(np.zeros((40, 60, 3), np.uint8)), "b.png")
    assert page._status.text == "b.png: 60 x 40 pixels; objects: none"
    path = page.folder / "c.mp4"
    with VideoWriter(path, 10.0, image.shape[:2]) as writer:
        writer.write(image)
    await send(path.read_bytes(), "c.mp4")
    assert page._status.text == "c.mp4: 1 frames of 180 x 120 pixels", "frames have classes alone"
    assert (page._predicted == masks[0] + masks[1] + 2 * masks[2]).mean() > 0.95
    with Image.open(io.BytesIO(page.files["layer.png"]())) as layer:
        is_covered = np.asarray(layer.convert("RGBA"))[..., 3] > 0
    assert (is_covered == (page._predicted > 0)).all(), "a video has no outlines"


@on_a_page_with_objects
async def test_closed_page_holds_no_outlines(page, send):
    await send(encode_image(draw_image((120, 180))[0]))
    await page._paint(SimpleNamespace(args=[[0, 0], [20, 20]]))  # ends the thread's hold on the upload
    held = weakref.ref(page._marks)
    page.close()
    assert held() is None


def make_tiny():
    keys = {"head.layers": [0, 1], **TINY_KEYS}
    return dinoseg.create_model("tiny", classes=["a", "b"], adapter="frozen", **keys)


def on_a_page_with_features(check):
    return on_a_page(check, make_model=make_tiny)


def click(page, x, y):
    return page._features._add_point(SimpleNamespace(args=[x, y]))


@on_a_page_with_features
async def test_features_are_computed_once_for_each_layer(page, send):
    tab, views, image = page._features, page._context.features.views, picture(37, 50)
    kept = [view.extract(image) for view in views]
    await send(encode_image(image))
    passes = []
    views[0]._features.backbone.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    counts = []
    await page._choose_tab(tab, has_features=True)
    for layer in (1, 0, 1):
        tab._layer.value = layer
        await tab._update()
        assert page._status.text == f"Features of layer {layer}; 0 clicks"
        for points in ([(3, 4)], [(3, 4), (49.9, 36.9)]):
            await click(page, *points[-1])
            assert tab._panel._props["points"] == (*points,)
            assert page.files["cosines0.bin"] == views[layer].similarity(kept[layer], points).tobytes()
        counts.append(len(passes))
        await tab._clear_points()
        assert page.files["cosines0.bin"] == b""
    assert 0 < counts[0] < counts[1] == counts[2]
    for args in (None, ["x", 1], [1], [float("nan"), 1], [-1, 2], [50, 2], [2, 37], [10**400, 1]):
        await tab._add_point(SimpleNamespace(args=args))
    assert tab._points == () and len(passes) == counts[2]


@on_a_page_with_features
async def test_a_second_image_is_compared(page, send):
    tab, store, image = page._features, page._context.features, picture(37, 50)
    await page._choose_tab(tab, has_features=True)
    await send(encode_image(image))
    await click(page, 20, 12)

    async def send_second(content, name):
        (page.folder / name).write_bytes(content)
        page.add_upload(page.folder / name)
        await page._open_second()

    for second in (image, image[:33, ::-1]):
        await send_second(encode_image(second), f"{second.shape[0]}.png")
        cosines = store.views[1].similarity(image, [(20, 12)], second)
        assert page.files["cosines1.bin"] == cosines.tobytes() and tab._rows[1]["height"] == second.shape[0]
    await send_second(b"no image", "wrong")
    assert "file" in page._status.text and sorted(list_files(page)) == ["33.png", "a.png"]
    await send(encode_image(image), "b.png")
    assert [path.name for path in tab._paths] == ["b.png", "33.png"] and tab._points == ()
    page.close()
    assert not store._known


def test_least_recently_used_features_are_evicted(monkeypatch):
    monkeypatch.setattr(features_tab, "MAX_BYTES", 100)
    patches = SimpleNamespace(values=np.zeros(20, np.float32))  # 80 bytes
    read = []
    view = SimpleNamespace(extract=lambda image: SimpleNamespace(patches=patches))
    store = UploadFeatures(SimpleNamespace(compute=nullcontext), [view])
    for name in "abacab":
        store.get(name, 0, lambda name: (picture(), read.append(name)), None)
    assert read == ["a", "b", "c", "b"], "two stay, whatever their size"
