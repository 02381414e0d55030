"""POST /segment and /objects answer with a mask, a list or one sentence, whatever is sent."""

import asyncio
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from fastapi import Request
from fastapi.testclient import TestClient
from object_models import draw_image, make_served
from PIL import Image
from pycocotools import mask as coco_mask
from serving_stand_ins import client, compute_endlessly, encode_image, picture, shared_model
from starlette.datastructures import QueryParams

from dinoseg.core.objects import Objects
from dinoseg.extensions.serving import endpoint
from dinoseg.extensions.serving import shared as shared_module
from dinoseg.extensions.serving.decoding import ImageDecoder
from dinoseg.extensions.serving.endpoint import build_endpoint
from dinoseg.extensions.serving.work import Work, WorkCancelled, run_in_thread
from dinoseg.utils.images import read_image


def read_mask(response):
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(response.content))


def read_refusal(response):
    detail = response.json()["detail"]
    assert set(response.json()) == {"detail"} and detail.endswith(".") and "\n" not in detail
    return response.status_code, detail


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("endpoint")


@pytest.fixture(scope="module")
def ask(folder):
    """A client of one endpoint, which stores nothing in its folder."""
    with client(folder) as asked:
        yield asked
    assert not list(folder.iterdir())


def test_an_image_gives_its_mask_with_the_palette(ask):
    image = picture()
    mask = read_mask(ask.post("/segment", content=encode_image(image)))
    assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 255, 0, 0]
    assert (np.asarray(mask) == (image.mean(axis=-1) > 127)).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_objects_are_those_of_the_model(tmp_path, task):
    image, masks = draw_image()
    expected = make_served(task).predict(image).objects
    with client(tmp_path, model=make_served(task)) as ask:
        response = ask.post("/objects?score=0", content=encode_image(image))
        health = ask.get("/health").json()
        assert health["task"] == task and health["things"] == ["leaf", "stone"]
        assert 'dinoseg_requests_total{code="200"} 1' in ask.get("/metrics").text
    found = response.json()
    assert response.status_code == 200 and len(found) == len(expected) >= 3
    for entry, wanted in zip(found, expected, strict=True):
        assert (entry["class"], entry["class_id"], entry["score"]) == (wanted.class_name, wanted.class_id, wanted.score)
        assert (entry["box"], entry["area"]) == ([*wanted.box], wanted.area)
        assert (coco_mask.decode(entry["segmentation"]) == wanted.mask).all()
    things = [wanted for wanted in expected if wanted.class_name != "ground"]
    assert all(any((wanted.mask == mask).all() for wanted in things) for mask in masks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("query", "places"),
    [("", [0, 1]), ("?score=0.96", [0]), ("?class=stone&score=0", [1, 2]), ("?class=ground", [])],
)
def test_objects_are_selected_by_score_and_class(tmp_path, monkeypatch, query, places):
    model = make_served()
    masks = np.stack([np.eye(4, 6, place, dtype=bool) for place in (0, 0, 1, 1)])  # the last one is a duplicate
    found = Objects.of_masks(masks, [1, 2, 2, 2], [0.99, 0.5, 0.4, 0.3])
    monkeypatch.setattr(model.runtime, "predict", lambda images: [(masks[0], found)])
    with client(tmp_path, model=model) as ask:
        entries = ask.post(f"/objects{query}", content=encode_image(picture())).json()
    assert [entry["score"] for entry in entries] == found.scores[places].tolist()


def test_too_many_objects_are_refused_with_a_remedy(tmp_path, monkeypatch):
    image = encode_image(draw_image()[0])
    with client(tmp_path, model=make_served()) as ask:
        length = len(ask.post("/objects", content=image).content)
        for limit in (length, length - 1, 10):  # of all objects, and where the last or the first exceeds it
            monkeypatch.setattr(endpoint, "_MAX_ANSWER", limit)
            response = ask.post("/objects", content=image)
            if limit == length:
                assert response.status_code == 200
            else:
                status, detail = read_refusal(response)
                assert status == 422 and "score=" in detail and "class=NAME" in detail


def test_computing_ends_at_the_timeout(tmp_path):
    with client(tmp_path, compute_endlessly, timeout=0.2) as ask:
        for _ in range(2):  # the next image gets its turn
            status, detail = read_refusal(ask.post("/segment", content=encode_image(picture())))
            assert status == 503 and "0.2 s" in detail and "mode.timeout" in detail


def test_each_frame_of_a_batch_has_the_timeout():
    work = Work()
    left = []
    with shared_model(lambda images: left.append(work.deadline - time.monotonic()), timeout=1e6) as shared:
        shared.segment([picture()] * 3, work)
    assert left == [pytest.approx(3e6, rel=1e-3)]


def test_a_stop_ends_computing_and_waiting(tmp_path):
    with shared_model(compute_endlessly) as shared, ThreadPoolExecutor(6) as pool:
        application = build_endpoint(shared, tmp_path, hosts=["localhost"], max_mib=1.0)
        with TestClient(application, base_url="http://localhost") as ask:
            answers = [pool.submit(ask.post, "/segment", content=encode_image(picture())) for _ in range(6)]
            while not shared._computing.locked():
                time.sleep(0.01)
            shared.stop(0)
            shared.stop(60)  # a second signal does not postpone the end
            assert {read_refusal(answer.result()) for answer in answers} == {
                (503, "The server stops. Send the file again later.")
            }
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "computing"])
def test_images_of_departed_clients_are_not_computed(tmp_path, waits):
    """They leave while another image is computed, or theirs."""
    started, ended = [], []

    def compute(images):
        started.append(1)
        compute_endlessly(images)
        ended.append(1)

    async def run(shared):
        work = Work()
        running = [{"type": "http.request"}]  # an event that is no departure

        async def receive():
            while not waits and not started:
                await asyncio.sleep(0.01)
            return running.pop() if running else {"type": "http.disconnect"}

        path = tmp_path / "a.png"
        path.write_bytes(encode_image(picture()))
        with pytest.raises(WorkCancelled):
            encode = partial(endpoint.encode_classes, shared, path, QueryParams(), work)
            await endpoint.run_for_client(Request({"type": "http"}, receive), shared, work, encode)

    with shared_model(compute) as shared:
        with shared._computing if waits else nullcontext():
            asyncio.run(run(shared))
        for thread in threading.enumerate():
            if thread.name == "work":
                thread.join()
    assert len(started) == (not waits) and not ended
    assert endpoint.error_response(WorkCancelled()).status_code == 499


def test_work_ends_with_its_cancelled_request():
    work = Work()

    async def run(shared):
        request = Request({"type": "http"}, asyncio.Event().wait)
        answer = asyncio.ensure_future(endpoint.run_for_client(request, shared, work, threading.Event().wait))
        await asyncio.sleep(0)
        answer.cancel()
        await answer

    with shared_model() as shared, pytest.raises(asyncio.CancelledError):
        asyncio.run(run(shared))
    assert work.is_cancelled


def test_images_of_departed_clients_wait_for_no_place(monkeypatch):
    monkeypatch.setattr(shared_module, "_PLACES", 0)
    monkeypatch.setattr(shared_module, "_POLL", 0.01)
    with shared_model() as shared:
        waiting = run_in_thread(shared.hold_place(Work(is_cancelled=True)).__enter__)
        with pytest.raises(WorkCancelled):
            asyncio.run(asyncio.wait_for(waiting, 10))


def test_compiled_code_stays_whole_and_is_checked_around():
    compiled = torch.compile(lambda pixels: (pixels + 1).relu(), backend="eager", fullgraph=True)
    with shared_model() as shared:
        with shared.compute(Work()):
            assert compiled(torch.ones(2)).tolist() == [2, 2]
        work = Work()
        with pytest.raises(WorkCancelled), shared.compute(work):
            work.is_cancelled = True
            torch.add(compiled(torch.ones(2)), 1)


def test_long_operation_does_not_delay_the_exit(monkeypatch):
    assert asyncio.run(run_in_thread(lambda: threading.current_thread().daemon))
    registered = []
    monkeypatch.setattr(shared_module, "_LAST_SECONDS", 0.01)
    monkeypatch.setattr("atexit.register", registered.append)
    with shared_model() as shared:
        shared._computing.acquire()
    assert registered == [shared_module._exit_at_once]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("segment?class=a&class=b", "class is given 2 times"),
        ("segment?clas=leaf", "The parameter clas is unknown"),
        ("segment?score=0.5", "This address takes class."),
        (f"segment?class={'x' * 2000}", "/health"),
        ("objects?class=tree", "class=tree is unknown"),
        ("objects?score=nan", "score=nan is not a number from 0 to 1. Give one, or leave score out."),
        ("objects?score=", "from 0 to 1"),
        ("objects?score=1.1", "score=1.1"),
        ("objects?score=0_1", "score=0_1 is not a number"),
        ("objects?score=\u0661", "is not a number from 0 to 1"),
    ],
)
def test_invalid_query_is_refused_in_one_sentence(tmp_path, address, reason):
    with client(tmp_path, model=make_served()) as ask:
        status, detail = read_refusal(ask.post(f"/{address}", content=encode_image(picture())))
    assert status == 400 and reason in detail and len(detail) < 200


def test_image_without_objects_gives_an_empty_list(tmp_path, monkeypatch):
    model = make_served()
    empty = Objects.of_runs((4, 6), [], [])
    monkeypatch.setattr(model.runtime, "predict", lambda images: [(np.zeros((4, 6), np.uint8), empty)])
    with client(tmp_path, model=model) as ask:
        response = ask.post("/objects", content=encode_image(picture()))
    assert response.status_code == 200 and response.json() == []


def test_class_ids_of_an_object_model_need_no_objects(tmp_path, monkeypatch):
    """To find those of a large image takes seconds."""
    image, masks = draw_image()
    model = make_served("instance")
    monkeypatch.setattr(model.runtime, "predict", None)
    with client(tmp_path, model=model) as ask:
        mask = np.asarray(read_mask(ask.post("/segment", content=encode_image(image))))
    assert (mask == masks[0] + masks[1] + 2 * masks[2]).all()


def test_objects_of_a_model_of_classes_are_refused(tmp_path):
    computed = []
    with client(tmp_path, computed.append) as ask:
        status, detail = read_refusal(ask.post("/objects", content=encode_image(picture())))
    assert status == 400 and "no single objects" in detail and "/segment" in detail
    assert not computed, "the model need not run"


def test_image_in_a_form_gives_the_same_mask(tmp_path):
    image = encode_image(picture(300, 400))
    with client(tmp_path, max_pixels=120_000) as ask:
        body = ask.post("/segment", content=image)
        for fields in ({}, {"threshold": "0.5", "b": "c"}):
            form = ask.post("/segment", files={"any": ("../../a.png", image, "image/png")}, data=fields)
            assert form.status_code == 200 and form.content == body.content
    assert not list(tmp_path.iterdir())


def test_forms_are_bounded(ask, folder):
    image = encode_image(picture())
    two = ask.post("/segment", files=[("a", ("a.png", image)), ("b", ("b.png", image))])
    assert read_refusal(two)[0] == 400 and "number of files is 1" in two.text
    none = ask.post("/segment", files={"a": (None, "text")})
    assert read_refusal(none)[0] == 400 and "curl -F" in none.text
    assert ask.post("/segment", files={"a": ("a.png", bytes(2**20))}).status_code == 413
    many = ask.post("/segment", files=[("a", (None, "text"))] * 20)
    assert read_refusal(many)[0] == 400 and "fields is 16" in many.text
    large = ask.post("/segment", files=[("a", (None, "t" * 70_000))])
    assert read_refusal(large)[0] == 400 and "64KB" in large.text
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=x"):
        broken = ask.post("/segment", content=b"--y\r\nno form", headers={"content-type": content_type})
        assert read_refusal(broken)[0] == 400
    assert 'code="500"' not in ask.get("/metrics").text and not list(folder.iterdir())


def test_images_are_read_as_in_prediction(ask, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    image = tmp_path / "a.jpg"
    image.write_bytes(encode_image(picture(8, 12), "JPEG", exif=exif))
    mask = read_mask(ask.post("/segment", content=image.read_bytes()))
    assert (np.asarray(mask) == (read_image(image).mean(axis=-1) > 127)).all() and mask.size == (8, 12)


FAKE_SIZE = encode_image(Image.new("1", (8, 8))).replace((8).to_bytes(4, "big") * 2, (2**31 - 1).to_bytes(4, "big") * 2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"GET / HTTP/1.1", "not an image"),
        (b"--x\r\nContent-Disposition: form-data; name=a; filename=../../a.png\r\n\r\n", "not an image"),
        (encode_image(picture(), "GIF"), "not an image"),
        (encode_image(picture(64, 64))[:-2000], "truncated"),
        (encode_image(picture(64, 64), "JPEG")[:-500], "truncated"),
        (encode_image(np.zeros((101, 100, 3), np.uint8)), "100 x 101 pixels"),
        (encode_image(Image.new("1", (20_000, 20_000))), "too large"),  # 50 KB that would be 400 million pixels
        (FAKE_SIZE, "is truncated or not an image"),
        (encode_image(Image.fromarray(np.ones((4, 6), np.float32)), "TIFF"), "floating-point"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "not an image"),
        (b"\0\0\0\x18ftypisom" + bytes(64), "not an image"),
    ],
    ids="empty text form gif png jpeg large bomb header fractions playlist video".split(),
)
def test_hostile_uploads_are_refused_in_one_sentence(ask, folder, data, reason):
    status, detail = read_refusal(ask.post("/segment", content=data))
    assert status == 400 and reason in detail and str(folder) not in detail
    assert ask.post("/segment", content=encode_image(picture())).status_code == 200
    assert not list(folder.iterdir())


@pytest.mark.parametrize("announced", [True, False])
def test_too_many_bytes_are_refused(ask, folder, announced):
    sent = []

    def stream():
        while len(sent) < 1000:
            sent.append(1)
            yield bytes(2**16)

    content = bytes(2**20 + 1) if announced else stream()
    status, detail = read_refusal(ask.post("/segment", content=content))
    assert status == 413 and "larger than 1 MiB" in detail
    assert ask.post("/segment", content=encode_image(picture()) + bytes(2**19)).status_code == 200
    assert not list(folder.iterdir())


def test_other_host_names_and_other_sites_are_refused(ask):
    image = encode_image(picture())
    assert ask.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert ask.post("/segment", content=image, headers={"host": "[::1]:80"}).status_code == 200
    near = ("http://localhost.evil.example", "http://localhost:81", "http://[")
    for origin in ("http://evil.example", "null", *near):
        assert ask.post("/segment", content=image, headers={"origin": origin}).status_code == 403
    assert ask.post("/segment", content=image, headers={"origin": "http://localhost"}).status_code == 200


def test_responses_forbid_other_sites(ask):
    headers = ask.get("/health").headers
    for page in ("/docs", "/redoc", "/unknown"):
        assert ask.get(page).status_code == 404
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_a_full_disk_is_one_sentence(ask, monkeypatch, caplog):
    def fail(*_):
        raise OSError(28, "full")

    monkeypatch.setattr("dinoseg.extensions.serving.endpoint.save_body", fail)
    assert read_refusal(ask.post("/segment", content=b"x"))[0] == 507
    assert "full" in caplog.text


def test_health_and_metrics_are_served(tmp_path):
    with client(tmp_path) as ask:
        ask.post("/segment", content=encode_image(picture()))
        ask.post("/segment", content=b"no image")
        health = ask.get("/health").json()
        lines = dict(line.rsplit(" ", 1) for line in ask.get("/metrics").text.splitlines())
    classes = {"classes": ["dark", "bright"], "palette": [[0, 0, 0], [255, 0, 0]]}
    assert health == {"status": "ok", "task": "semantic", **classes, "things": []}
    assert lines['dinoseg_requests_total{code="200"}'] == lines['dinoseg_requests_total{code="400"}'] == "1"
    assert lines['dinoseg_request_seconds_count{code="400"}'] == "1"
    assert float(lines['dinoseg_request_seconds_sum{code="200"}']) > 0


def test_a_failing_model_is_status_500(tmp_path):
    def fail(images):
        raise ZeroDivisionError

    with client(tmp_path, fail) as ask:
        with pytest.raises(ZeroDivisionError):
            ask.post("/segment", content=encode_image(picture()))
        assert 'code="500"} 1' in ask.get("/metrics").text
    assert not list(tmp_path.iterdir())


def test_few_images_are_decoded_at_once(tmp_path, monkeypatch):
    most = []
    decoded = threading.Semaphore(0)
    with client(tmp_path, lambda images: decoded.acquire(timeout=600)) as ask, ThreadPoolExecutor(8) as pool:
        decode = ImageDecoder.decode
        monkeypatch.setattr(ImageDecoder, "decode", lambda self, path: (most.append(1), decode(self, path))[1])
        answers = [pool.submit(ask.post, "/segment", content=encode_image(picture())) for _ in range(8)]
        while len(most) < 4:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(most) == 4  # as docs/security.md says
        decoded.release(8)
        assert [answer.result().status_code for answer in answers] == [200] * 8


def test_the_model_serves_one_request_at_a_time(tmp_path):
    running = threading.Semaphore(1)

    def check(images):
        assert running.acquire(blocking=False)
        time.sleep(0.02)  # longer than an image takes to be decoded
        running.release()

    pictures = [picture(4 + seed % 3, 6, seed) for seed in range(12)]
    with client(tmp_path, check) as ask, ThreadPoolExecutor(6) as pool:
        masks = list(pool.map(lambda image: read_mask(ask.post("/segment", content=encode_image(image))), pictures))
    for image, mask in zip(pictures, masks, strict=True):
        assert (np.asarray(mask) == (image.mean(axis=-1) > 127)).all()


def test_a_class_of_ids_is_a_mask_of_its_own(ask):
    image = picture()
    for name, wanted in (("bright", image.mean(axis=-1) > 127), ("dark", image.mean(axis=-1) <= 127)):
        mask = read_mask(ask.post(f"/segment?class={name}", content=encode_image(image)))
        assert (np.asarray(mask) == wanted).all()
    status, detail = read_refusal(ask.post("/segment?class=b%0Aright", content=encode_image(image)))
    assert status == 400 and "/health" in detail


def test_layers_are_pages_or_one_class(tmp_path):
    image = picture(9, 14)
    wanted = [image.mean(axis=-1) > 127, image[..., 0] > 127, np.zeros((9, 14), bool)]
    with client(tmp_path, has_layers=True) as ask:
        response = ask.post("/segment", content=encode_image(image))
        assert response.headers["content-type"] == "image/tiff" and (wanted[0] & wanted[1]).any()
        with read_mask(response) as mask:
            assert mask.n_frames == 3
            for number, layer in enumerate(wanted):
                mask.seek(number)
                assert (np.asarray(mask) == layer).all()
        for name, layer in zip(("bright", "red", "never"), wanted, strict=True):
            response = ask.post(f"/segment?class={name}", files={"file": ("a.png", encode_image(image))})
            assert response.headers["content-type"] == "image/png" and (np.asarray(read_mask(response)) == layer).all()
        health = ask.get("/health").json()
        assert health["task"] == "multilabel" and health["classes"] == ["bright", "red", "never"]


def test_layers_count_against_the_limit_of_pixels(tmp_path):
    with client(tmp_path, max_pixels=3 * 200, has_layers=True) as ask:
        assert ask.post("/segment", content=encode_image(picture(10, 20))).status_code == 200
        status, detail = read_refusal(ask.post("/segment", content=encode_image(picture(3, 67))))
        assert status == 400 and "67 x 3 pixels, more than 200, which mode.max_pixels allows for 3 layers" in detail
