import asyncio
import io
import socket
import tempfile
import threading
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from serving_stand_ins import client, encoded, picture, service
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.testclient import TestClient

from dinoseg.serving.endpoint import endpoint
from dinoseg.serving.guard import Hosts
from dinoseg.serving.limits import Limits, Refused
from dinoseg.serving.requests import bounded
from dinoseg.serving.service import Metrics
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image


def opened(answer):
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def refused(answer):
    error = answer.json()["error"]
    assert set(error) == {"rule", "message"} and error["message"].endswith(".")
    return answer.status_code, error["rule"]


def counted(ask, name):
    lines = [line for line in ask.get("/metrics").text.splitlines() if line.startswith(name)]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_picture_gives_its_mask_with_the_palette_or_as_ids():
    image = picture()
    with client() as ask:
        mask = opened(ask.post("/segment", files={"image": encoded(image)}))
        ids = opened(ask.post("/segment?format=ids", content=encoded(image)))
        assert refused(ask.post("/segment?format=jpg", content=encoded(image))) == (400, "answer_format")
    expected = image.mean(axis=-1) > 127
    assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 255, 0, 0] and ids.mode == "L"
    assert (np.asarray(mask) == expected).all() and (np.asarray(ids) == expected).all() and expected.any()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_run_lengths_are_cocos():
    image = picture(17, 23)
    with client() as ask:
        told = ask.post("/segment", files={"image": encoded(image)}, headers={"accept": "application/json"}).json()
    bright = image.mean(axis=-1) > 127
    assert told["size"] == [17, 23] and [segment["name"] for segment in told["segments"]] == ["dark", "bright"]
    for segment, mask in zip(told["segments"], (~bright, bright), strict=True):
        assert (coco.decode(segment["rle"]) == mask).all() and segment["pixels"] == mask.sum()
        assert segment["share"] == pytest.approx(mask.mean())


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "empty"),
        (b"GET / HTTP/1.1", "format"),
        (encoded(picture(), "GIF"), "format"),
        (encoded(Image.fromarray(picture()), save_all=True, append_images=[Image.new("RGB", (6, 4))]), "one_frame"),
        (encoded(picture(64, 64))[:-2000], "unreadable"),
        (encoded(picture(64, 64), "JPEG")[:-500], "unreadable"),
        (encoded(np.zeros((101, 100, 3), np.uint8)), "max_pixels"),
        (encoded(Image.new("1", (20_000, 20_000))), "max_pixels"),  # a bomb: 50 KB that would be 400 million pixels
        (encoded(Image.fromarray(np.ones((4, 6), np.float32)), "TIFF"), "unreadable"),
    ],
    ids=["empty", "text", "gif", "animated", "cut PNG", "cut JPEG", "large", "bomb", "fractions"],
)
def test_what_is_no_use_is_refused_by_a_rule_with_a_name(data, rule):
    with client(max_pixels=10_000) as ask:
        assert refused(ask.post("/segment", files={"image": data})) == (400, rule)
        assert ask.post("/segment", files={"image": encoded(picture())}).status_code == 200
        assert counted(ask, "dinoseg_errors_total") == {f'dinoseg_errors_total{{rule="{rule}"}}': 1}


def phone():
    file = io.BytesIO()
    Image.fromarray(picture(8, 12)).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    return file.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    return encoded(picture(8, 12), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("jpg", encoded(Image.fromarray(picture(8, 12)).convert("CMYK"), "JPEG")),
        ("png", encoded(Image.fromarray(picture(8, 12)[..., 0].astype(np.uint16) * 257))),
        ("png", encoded(Image.fromarray(picture(8, 12)).convert("LA"))),
        ("png", encoded(picture(1, 1))),
        ("png", encoded(picture(20, 3000))),
        ("jpg", turned()),
        ("jpg", phone()),
    ],
    ids=["CMYK", "16 bits", "alpha", "one pixel", "a strip", "turned", "a phone's with a preview"],
)
def test_odd_pictures_are_read_as_mode_predict_reads_them(kind, data, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(data)
    expected = read_image(tmp_path / f"a.{kind}").mean(axis=-1) > 127
    with client() as ask:
        assert (np.asarray(opened(ask.post("/segment", content=data))) == expected).all()


def test_a_form_needs_one_file():
    with client() as ask:
        assert refused(ask.post("/segment", files={"a": b"1", "b": b"2"})) == (400, "one_file")
        assert refused(ask.post("/segment", data={"image": "text"}, files={}))[0] == 400
        form = {"content-type": "multipart/form-data; boundary=x"}
        assert refused(ask.post("/segment", content=b"no form", headers=form)) == (400, "one_file")
        many = ask.post("/segment", files=[("image", encoded(picture()))] * 3)
        assert refused(many) == (400, "one_file") and "Too many files" in many.text
        assert counted(ask, "dinoseg_errors_total") == {
            'dinoseg_errors_total{rule="format"}': 1,
            'dinoseg_errors_total{rule="one_file"}': 3,
        }


@pytest.mark.parametrize("charset", ["undefined", "punycode", "\0", "utf-16", ""])
def test_a_form_in_an_odd_charset_is_refused(charset):
    head = b'--x\r\ncontent-disposition: form-data; name="a-\xff"; filename="b"\r\n\r\n'
    form, kind = head + encoded(picture()) + b"\r\n--x--\r\n", 'Multipart/form-data; boundary=x; charset="{}"'
    with client() as ask:
        odd = ask.post("/segment", content=form, headers={"content-type": kind.format(charset)})
        assert refused(odd) == (400, "one_file") and "; supported: utf-8" in odd.text
        assert ask.post("/segment", content=form, headers={"content-type": kind.format("UTF-8")}).status_code == 200


def test_a_form_that_a_full_disk_cannot_take_is_refused(monkeypatch):
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 1)
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full")
    with client() as ask:
        assert refused(ask.post("/segment", files={"image": encoded(picture())})) == (507, "disk")


def test_too_many_bytes_are_refused_when_they_are_announced_or_when_they_come():
    def chunks():
        for number in range(100):
            sent.append(number)
            yield b"x" * 2**14

    sent = []
    with client(image_mib=0.1) as ask:
        assert refused(ask.post("/segment", content=b"x" * 2**20)) == (413, "max_bytes")
        announced = ask.post("/segment", content=b"x", headers={"content-length": str(2**20)})
        assert refused(announced) == (413, "max_bytes"), "before any of it has come"
        assert refused(ask.post("/segment", content=chunks())) == (413, "max_bytes")
        assert ask.post("/segment", files={"image": encoded(picture())}).status_code == 200


def test_the_limit_of_bytes_is_the_largest_that_is_taken_however_they_come():
    with client(image_mib=2**-10) as ask:
        assert refused(ask.post("/segment", content=b"x" * 1024)) == (400, "format")
        assert refused(ask.post("/segment", content=b"x" * 1025)) == (413, "max_bytes")

    async def some():
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    async def read():
        await bounded(Request({"type": "http", "headers": []}, some), 2**-10).body()

    with pytest.raises(Refused, match="longer than"):
        asyncio.run(read())


def test_who_takes_pictures_too_gets_a_picture():
    with client() as ask:
        for accept, kind in (("application/json, image/png", "image/png"), ("*/*", "image/png")):
            answer = ask.post("/segment", content=encoded(picture()), headers={"accept": accept})
            assert answer.headers["content-type"] == kind


def test_metrics_tell_images_and_seconds_apart():
    metrics = Metrics(lambda: 1, lambda: 2)
    metrics.batch(3, 0.5)
    lines = set(metrics.text().splitlines())
    assert {"dinoseg_model_seconds_sum 0.500000", "dinoseg_batch_images_sum 3.000000"} <= lines
    assert {'dinoseg_model_seconds_bucket{le="0.25"} 0', 'dinoseg_model_seconds_bucket{le="0.5"} 1'} <= lines
    assert {"dinoseg_queue_length 1", "dinoseg_requests_in_hand 2"} <= lines


def test_fifty_at_once_are_each_answered_with_their_own():
    images = [picture(8 + n % 3, 12, seed=n) for n in range(50)]
    with client(batch_size=8, wait=0.005) as ask:
        got = {}

        def send(number):
            got[number] = np.asarray(opened(ask.post("/segment", content=encoded(images[number]))))

        threads = [threading.Thread(target=send, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        batches = counted(ask, "dinoseg_batch_images")
    assert all((got[n] == (image.mean(axis=-1) > 127)).all() for n, image in enumerate(images))
    assert batches["dinoseg_batch_images_sum"] == 50 > batches["dinoseg_batch_images_count"]


def test_more_than_the_queue_holds_are_told_to_come_back():
    gate, inside = threading.Event(), threading.Event()

    def held(images):
        inside.set()
        gate.wait(120)

    with client(held, queue=1) as ask:
        first = threading.Thread(target=ask.post, args=("/segment",), kwargs={"content": encoded(picture())})
        first.start()
        inside.wait(120)
        answer = ask.post("/segment", content=encoded(picture()))
        gate.set()
        first.join()
        assert refused(answer) == (503, "busy") and answer.headers["retry-after"] == "1"
        assert ask.post("/segment", content=encoded(picture())).status_code == 200


def test_pixels_that_are_held_are_bounded_and_let_go():
    gate, inside = threading.Event(), threading.Semaphore(0)

    def held(images):
        inside.release()
        gate.wait(120)

    with service(held, max_pixels=24, batch_size=1) as made:
        with TestClient(endpoint(made, Hosts.of("127.0.0.1")), base_url="http://localhost") as ask:
            threads = [
                threading.Thread(target=ask.post, args=("/segment",), kwargs={"content": encoded(picture())})
                for _ in range(16)
            ]
            for thread in threads:
                thread.start()
            while len(made.worker) < 15:
                time.sleep(0.001)
            assert refused(ask.post("/segment", content=encoded(picture(1, 1)))) == (503, "busy")
            gate.set()
            for thread in threads:
                thread.join()
            for _ in range(17):
                assert ask.post("/segment", content=encoded(picture())).status_code == 200


def test_the_model_sees_no_more_pixels_at_once_than_an_image_may_have():
    gate, seen = threading.Event(), []

    def held(images):
        gate.wait(120)
        seen.append(len(images))

    with service(held, max_pixels=48) as made:
        futures = [made.worker.submit(picture()) for _ in range(9)]
        gate.set()
        assert [future.result(120).shape for future in futures] == [(4, 6)] * 9
    assert max(seen) == 2 and sum(seen) == 9


def test_every_request_in_hand_may_come_and_be_answered_before_a_stop():
    assert Limits(timeout=5.0).patience == 10


def test_an_answer_that_takes_too_long_is_a_timeout_and_its_work_is_dropped():
    with client(lambda images: time.sleep(0.1), timeout=0.05) as ask:
        assert refused(ask.post("/segment", content=encoded(picture()))) == (504, "timeout")


def test_a_model_that_fails_is_an_error_of_the_server_alone(caplog):
    with client(lambda images: 1 / 0) as ask:
        assert refused(ask.post("/segment", content=encoded(picture()))) == (500, "model")
        assert ask.get("/health").json()["status"] == "ok"
    assert "ZeroDivisionError" in caplog.text


def test_health_tells_the_classes_and_that_it_stops():
    with service() as made:
        ask = TestClient(endpoint(made, Hosts.of("127.0.0.1", ["*"])))
        assert ask.get("/health").json()["classes"][1] == {"id": 1, "name": "bright", "colour": [255, 0, 0]}
        made.announce_stop()
        assert ask.get("/health").status_code == 503


SAME_SITE = {"sec-fetch-site": "same-site"}  # another port of this machine


def test_another_name_or_another_sites_page_is_refused():
    with client() as ask:
        assert ask.get("/health").status_code == 200
        assert ask.get("/health", headers={"host": "127.0.0.1:1234"}).status_code == 200
        assert ask.get("/health", headers={"host": "[::1]:1234"}).status_code == 200
        assert refused(ask.get("/health", headers={"host": "rebound.example"})) == (403, "origin")
        assert refused(ask.get("/health", headers={"host": "localhost@evil.example"})) == (403, "origin")
        for headers in (
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"sec-fetch-site": "cross-site"},
            SAME_SITE,
        ):
            assert refused(ask.post("/segment", content=encoded(picture()), headers=headers)) == (403, "origin")
        same = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
        assert ask.post("/segment", content=encoded(picture()), headers=same).status_code == 200


def test_a_link_from_elsewhere_is_followed_and_nothing_else_comes_from_there():
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    with client() as ask:
        assert ask.get("/health", headers=link).status_code == 200
        for other in ({"sec-fetch-dest": "iframe"}, {"sec-fetch-mode": "no-cors"}, {"origin": "http://["}):
            assert refused(ask.get("/health", headers=link | other)) == (403, "origin")
        assert refused(ask.post("/segment", content=encoded(picture()), headers=link)) == (403, "origin")


def test_where_other_machines_reach_it_names_that_nobody_gave_are_refused(caplog):
    here, there = Hosts.of("127.0.0.2", ["My.example"]), Hosts.of("0.0.0.0", ["my.example"])
    assert "mode.host=0.0.0.0 is reachable from other machines" in caplog.text and len(caplog.records) == 1
    for known in ("localhost:8000", "127.0.0.2", "[::1]:80", "MY.example:1"):
        assert known in here and known in there
    for address in ("192.168.0.7:8000", "[fe80::1]"):
        assert address in there and address not in here
    for name in ("rebound.example", "192.168.0.7.evil.example", "", "evil.example#192.168.0.7", "0x7f.1", "[::1"):
        assert name not in here and name not in there
    assert f"{socket.gethostname()}:8000" in there
    assert "rebound.example" in Hosts.of("0.0.0.0", ["*"])


@pytest.mark.parametrize("name", ["http://my.example", "my.example:8000", "", "a b", "[::1]", "user@my.example"])
def test_what_is_no_name_of_a_host_is_told(name):
    with pytest.raises(UserError, match="mode.hosts: .* is not a host name"):
        Hosts.of("127.0.0.1", [name])
    assert "[2001:db8::1]" in Hosts.of("127.0.0.1", ["2001:db8::1"])


def test_a_client_that_hangs_up_has_its_work_dropped():
    gate, seen = threading.Event(), []

    def held(images):
        seen.append(len(images))
        gate.wait(120)

    async def hang_up(app, body):
        """Send a whole request, wait until the model is busy with another one, and go."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent = []

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/segment", "query_string": b"", "headers": []}
        await app(scope, receive, send)
        return sent[0]["status"]

    with service(held) as made:
        busy = made.worker.submit(picture())
        while not seen:
            time.sleep(0.001)
        status = asyncio.run(hang_up(endpoint(made, Hosts.of("127.0.0.1", ["*"])), encoded(picture())))
        gate.set()
        busy.result(120)
        assert status == 499 and made.in_hand == 0 and len(made.worker) == 0
        assert 'rule="hung_up"} 1' in made.metrics.text()
    assert seen == [1]  # of the other one alone
