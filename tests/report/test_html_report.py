"""Reports in a real headless Chromium: they load by themselves, sort, fit a phone, and run nothing that data says."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from chromium import opened_page

from dinoseg.report.html.about import About
from dinoseg.report.html.charts import Axes, around, line_chart, ticks
from dinoseg.report.html.comparison import ComparisonReport, OtherRun, PairShot, comparison_page
from dinoseg.report.html.evaluation import EvaluationReport, evaluation_page
from dinoseg.report.html.pictures import Shot
from dinoseg.report.palette import default_palette

HOSTILE = '<img src=x onerror="window.ran=1">\'"</script><script>window.ran=1</script>\x1b[31m\u202e&amp;${1}'
ABOUT = About(f"python -m dinoseg {HOSTILE}", {"model": HOSTILE}, f"key: {HOSTILE}")


def scores_of(counts):
    rows = []
    for index, (right, held, predicted) in enumerate(counts.T.tolist()):
        union = held + predicted - right
        iou = right / union if union else None
        shares = dict.fromkeys(("iou", "dice", "recall", "precision"), iou)
        rows.append({"id": index, **shares, "pixels": held, "predicted_pixels": predicted})
    present = [row["iou"] for row in rows if row["iou"] is not None]
    mean = sum(present) / len(present) if present else None
    means = dict.fromkeys(("miou", "dice", "accuracy"), mean)
    return {**means, "present_classes": len(present), "pixels": int(counts[1].sum()), "classes": rows}


def report(classes=3, images=12, *, labelled=True, groups=None, training=True, name="class"):
    draw = np.random.default_rng(0)
    matrix = draw.integers(1, 1000, (classes, classes)) + 5000 * np.eye(classes, dtype=int)
    matrix[-1 if classes > 1 else 1 :] = 0  # the last class is absent from the reference
    matrix *= labelled
    counts = np.stack([matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)])
    masks = draw.integers(0, classes, (2, 20, 30)).astype(np.uint8)
    shot = Shot(0, 0.5, draw.integers(0, 256, (20, 30, 3)).astype(np.uint8), *masks)
    bins = [[100, 60 + place, 70.0 + place] for place in range(15)]
    state = {"nll": 0.5, "ece": 0.1, "bins": bins}
    calibration = {"pixels": 1500, "images": images, "temperature": 1.2, "before": state, "after": state}
    intervals = {key: [0.2, 0.6] for key in ("miou", "dice", *(f"iou/{index}" for index in range(classes)))}
    return EvaluationReport(
        title=HOSTILE,
        said=HOSTILE,
        classes=[f"{name} {index}" for index in range(classes)],
        palette=default_palette(classes),
        ignore_index=255,
        scores={**scores_of(counts), "matrix": matrix.tolist()},
        intervals=intervals if images > 1 else {},
        unit="video" if groups else "image",
        names=[f"{name} {index}" for index in range(images)],
        groups=groups or [str(index) for index in range(images)],
        mious=[0.1 + 0.8 * index / images if labelled else None for index in range(images)],
        distances=(1, 2, 4, 8, 16),
        boundary=labelled * np.arange(12).reshape(6, 2)[:, ::-1],
        calibration=calibration if labelled and classes > 1 else None,
        best=[shot] * labelled,
        worst=[shot] * labelled,
        about=ABOUT,
        training=[{"step": step, "train/loss": 1 / (step + 1), "val/miou": None} for step in range(900)] * training,
    )


ODD = {
    "hostile": report(name=HOSTILE, groups=[HOSTILE] * 6 + ["b"] * 6),
    "one class": report(1),
    "one image": report(images=1),
    "all ignored": report(labelled=False, training=False),
    "150 classes": report(150, name="a rather long name of a class, as it happens"),
    "over 150 classes": report(160),
}


def compared(name="run"):
    draw, base = np.random.default_rng(0), report()
    masks = draw.integers(0, 3, (3, 20, 30)).astype(np.uint8)
    frame = draw.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    shot = PairShot(name, (0.2, 0.6), frame, masks[0], (masks[1], masks[2]))
    scores = {"miou": 0.4, "dice": 0.5, "accuracy": None, **{f"iou/{index}": 0.1 * index for index in range(3)}}
    limits = {key: [-0.1, 0.2] if value else None for key, value in scores.items()}
    gaps = {key: {"value": value and 0.1 - value / 2, "ci95": limits[key]} for key, value in scores.items()}
    others = [OtherRun(f"{name} {n}", scores, gaps, [0.3] * 11 + [None], [shot], "" if n else "none") for n in (0, 1)]
    first = (base.classes, base.palette, 255, base.names, 12, "image", name, scores, base.mious)
    return ComparisonReport(HOSTILE, *first, others, ABOUT)


PAGES = {**{name: evaluation_page(each) for name, each in ODD.items()}, "compared": comparison_page(compared(HOSTILE))}


class Tags(HTMLParser):
    """Collects the elements of a page, and refuses one that closes what is not open."""

    VOID = ("meta", "link", "img", "path", "rect", "circle", "image")

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_and_names_nothing_outside_itself(name):
    tags = Tags(PAGES[name])
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 5
    for tag, attributes in tags.found:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), attributes
        assert tag != "img" or attributes["alt"]
    assert "\x1b" not in PAGES[name] and "\u202e" not in PAGES[name] and "nan" not in re.sub(r"<pre.*", "", PAGES[name])
    assert len(PAGES[name]) < 2_000_000


@pytest.mark.parametrize(
    ("given", "low", "high"), [([], 0, 1), ([3.0], 2.8, 3.2), ([0.0], -0.5, 0.5), ([-1e-9, 1e9], -1e9, 2e9)]
)
def test_axes_always_have_a_length(given, low, high):
    ends = around(given)
    assert low - 1 <= ends[0] < ends[1] <= high + 1
    marks = ticks(*ends)
    assert 2 <= len(marks) <= 7 and all(ends[0] <= mark * (1 + 1e-9) and mark <= ends[1] * (1 + 1e-9) for mark in marks)
    assert "nan" not in line_chart("a", [("b", [(0.0, value) for value in given])], Axes(ends, ends, "x", "y"))


@pytest.mark.heavy
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (375, True)])
@pytest.mark.parametrize("name", ["hostile", "all ignored", "150 classes", "compared"])
def test_a_page_in_a_browser(tmp_path, name, width, dark):
    path = tmp_path / "report.html"
    path.write_text(PAGES[name])
    with opened_page(path.as_uri(), width=width, dark=dark) as page:
        requested = page.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
        assert all(address.startswith("data:") for address in requested)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
        assert page.evaluate("window.ran") is None
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(20, 23, 27)") is dark
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        assert not page.complaints


@pytest.mark.heavy
def test_tables_sort_by_mouse_and_keys_and_the_matrix_tells_its_counts(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(evaluation_page(report()))
    column = "[...document.querySelectorAll('#classes tbody tr')].map(row => row.cells[1].dataset.value)"
    with opened_page(path.as_uri()) as page:
        given = page.evaluate(column)
        head = page.locator("#classes thead button").nth(1)
        head.click()
        down = [float(value) for value in page.evaluate(column)]
        assert down == sorted(map(float, given), reverse=True)
        head.focus()
        page.keyboard.press("Enter")
        assert [float(value) for value in page.evaluate(column)] == down[::-1]
        assert page.locator("#classes th[aria-sort=ascending]").count() == 1
        page.locator("svg.heat").scroll_into_view_if_needed()
        cells = page.locator("svg.heat image").bounding_box()
        page.mouse.move(cells["x"] + cells["width"] / 2, cells["y"] + cells["height"] / 6)
        assert re.match(r"reference class 0, predicted class 1: [\d,]+ pixels", page.inner_text("output"))
        page.locator("svg.heat").focus()
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("output").startswith("reference class 0, predicted class 0: ")
        assert not page.complaints
