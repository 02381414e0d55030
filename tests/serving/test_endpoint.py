import io

import numpy as np
import pytest
from PIL import Image
from serving_stand_ins import client, encoded, picture


def opened(answer):
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def test_a_picture_gives_its_mask_with_the_palette_or_as_ids():
    image = picture()
    with client() as ask:
        mask = opened(ask.post("/segment", files={"image": encoded(image)}))
        ids = opened(ask.post("/segment?format=ids", content=encoded(image)))
    expected = image.mean(axis=-1) > 127
    assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 255, 0, 0] and ids.mode == "L"
    assert (np.asarray(mask) == expected).all() and (np.asarray(ids) == expected).all() and expected.any()


@pytest.mark.parametrize(
    ("name", "data", "rule"),
    [
        ("nothing", b"", "empty"),
        ("text", b"GET / HTTP/1.1", "format"),
        ("gif", encoded(picture(), "GIF"), "format"),
        (
            "animated",
            encoded(Image.fromarray(picture()), save_all=True, append_images=[Image.new("RGB", (6, 4))]),
            "one_frame",
        ),
        ("truncated", encoded(picture(64, 64))[:-2000], "unreadable"),
        ("many pixels", encoded(np.zeros((101, 100, 3), np.uint8)), "max_pixels"),
        ("fractions", encoded(Image.fromarray(np.ones((4, 6), np.float32)), "TIFF"), "unreadable"),
    ],
)
def test_what_is_no_use_is_refused_by_a_rule_with_a_name(name, data, rule):
    with client(max_pixels=10_000) as ask:
        answer = ask.post("/segment", files={"image": data})
        assert answer.status_code == 400 and answer.json()["error"]["rule"] == rule, answer.text
        assert ask.post("/segment", files={"image": encoded(picture())}).status_code == 200
