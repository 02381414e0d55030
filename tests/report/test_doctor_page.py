"""doctor.html stands alone, escapes what it is given, and shows the pictures."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from dinoseg.report.html.page import render

VOID = {"meta", "img", "link", "rect"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects text and sources."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.sources, self.tags = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def split(images, counts, **other):
    rows = [
        {"id": i, "class": name, "pixels": n, "share": n / sum(counts), "images": i}
        for i, (name, n) in enumerate(zip(("road", "a<b&c"), counts, strict=True))
    ]
    constant = {"class": 0, "accuracy": 0.75, "miou": 0.375}
    sizes = {"smallest": {"width": 30, "height": 20}, "largest": {"width": 50, "height": 40}}
    return {"images": images, "void_share": 0.125} | {
        **sizes,
        "constant_class": constant,
        "classes": rows,
        **other,
    }


def make_finding(severity="error", files=(), message="m", remedy="r", reasons=(), stops=True):
    return {"severity": severity, "code": "some_code", "message": message, "files": list(files), "remedy": remedy} | {
        "reasons": list(reasons),
        "stops_training": stops,
    }


def doctor_page(findings, splits=(), palette=(), cards=()):
    context = {"findings": findings, "splits": splits or {}, "palette": palette, "cards": cards}
    return render("doctor.html.jinja", title='"t" <1>', subtitle="1 error", warnings=[], **context)


@pytest.fixture
def page():
    findings = [
        make_finding(message="<script>alert(1)</script>", files=[f"f&{i}" for i in range(450)]),
        make_finding("note", remedy="", stops=False),
        make_finding("note", files=["f"], reasons=["f: damaged"]),
    ]
    frame = np.zeros((30, 41, 3), np.uint8)
    frame[:, :20] = (250, 10, 5)
    splits = {"train": split(1234, (300, 100)), "v<al": split(0, (1, 1), smallest=None, constant_class=None)}
    card = {
        "title": "a 'quoted\" <title>",
        "summary": "s",
        "panels": [("image", frame)],
        "legend": [("a<b", (1, 2, 3))],
    }
    return doctor_page(findings, splits, ((0, 0, 0), (1, 2, 3)), [card])


def test_doctor_page_is_complete_and_self_contained(page):
    read = Reader(page)
    assert page.startswith("<!doctype html>") and "prefers-color-scheme: dark" in page
    assert read.tags.count("script") == 1
    assert not re.search(r"https?:|url\(|@import", page)
    assert all(source.startswith(("data:", "#")) for source in read.sources)


def test_doctor_page_shows_findings_counts_and_escaped_names(page):
    text = "".join(Reader(page).text)
    assert '"t" <1>' in text and "1 error" in text
    assert "<script>alert(1)</script>" in text and "a 'quoted\" <title>" in text and "a<b" in text
    assert "450 listed" in text and "f&199" in text and "f&200" not in text and "and 250 more" in text
    assert "f: damaged" in text and "width x height" in text and "does not stop" not in text
    assert "1,234" in text and "30 x 20" in text and "50 x 40" in text and "12.50" in text and "37.50" in text
    assert "1 a<b&c" in text and "75.00" in text and "v<al: pixels" in text


def test_images_are_embedded_in_the_page(page):
    data = next(each for each in Reader(page).sources if each.startswith("data:image/webp;base64,")).partition(",")[2]
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert image.shape == (30, 41, 3)
    np.testing.assert_allclose(image[5, 5], (250, 10, 5), atol=9)
    np.testing.assert_allclose(image[5, 35], (0, 0, 0), atol=9)


def test_errors_that_training_only_warns_of():
    text = "".join(Reader(doctor_page([make_finding(stops=False)])).text)
    assert "some_code: training does not stop on it" in text


def test_page_without_findings_has_no_images():
    text = "".join(Reader(doctor_page([])).text)
    assert "None." in text and "Pictures" not in text and "Splits" not in text
