"""Reports stand alone, escape what data says, and hold the right numbers; in Chromium they sort and fit a phone."""

import base64
import re
from dataclasses import fields, replace
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
import torch
from chromium import opened_page
from installed_wheel import built_wheel
from jinja2 import UndefinedError

from dinoseg.extensions.compare.page import ComparedRun, OtherRun, compare_images, comparison_page
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.report.html import page as page_module
from dinoseg.report.html import pictures
from dinoseg.report.html.charts import MAX, Axes, line_chart, range_around, thin, ticks
from dinoseg.report.html.evaluation import (
    ErrorAnalysis,
    EvaluationScores,
    calibration_charts,
    evaluation_page,
    heat_map,
    training_charts,
)
from dinoseg.report.html.page import render
from dinoseg.report.html.pictures import (
    BOTH_WRONG,
    RIGHT,
    WRONG,
    EvaluatedImages,
    PairShot,
    Shot,
    pair_card,
    prediction_card,
)
from dinoseg.report.palette import default_palette

HOSTILE = '<img src=x onerror="window.ran=1">\'"</script><script>window.ran=1</script>\x1b[31m\u202e&amp;${1}'
ABOUT = {"command": f"python -m dinoseg {HOSTILE}", "facts": {"model": HOSTILE}, "config": f"key: {HOSTILE}"}


def report(classes=3, images=12, *, labelled=True, groups=None, training=True, name="class"):
    draw = np.random.default_rng(0)
    matrix = draw.integers(1, 1000, (classes, classes)) + 5000 * np.eye(classes, dtype=int)
    matrix[-1 if classes > 1 else 1 :] = 0  # the last class is absent from the reference
    confusion = ConfusionMatrix(classes)
    confusion.matrix.copy_(torch.from_numpy(labelled * matrix))
    masks = draw.integers(0, classes, (2, 20, 30)).astype(np.uint8)
    shot = Shot(0, 0.5, draw.integers(0, 256, (20, 30, 3)).astype(np.uint8), *masks)
    bins = [[100, 60 + place, 70.0 + place] for place in range(15)]
    state = {"nll": 0.5, "ece": 0.1, "bins": bins}
    calibration = {"pixels": 1500, "images": images, "temperature": 1.2, "before": state, "after": state}
    intervals = {key: [0.2, 0.6] for key in ("miou", "dice", *(f"iou/{index}" for index in range(classes)))}
    return dict(
        title=HOSTILE,
        subtitle=HOSTILE,
        classes=[f"{name} {index}" for index in range(classes)],
        palette=default_palette(classes),
        ignore_index=255,
        values=confusion.compute(),
        intervals=intervals if images > 1 else {},
        unit="video" if groups else "image",
        images=[f"{name} {index}" for index in range(images)],
        units=groups or [str(index) for index in range(images)],
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
    "hostile": partial(report, name=HOSTILE, groups=[HOSTILE] * 6 + ["b"] * 6),
    "one class": partial(report, 1),
    "one image": partial(report, images=1),
    "all ignored": partial(report, labelled=False, training=False),
    "150 classes": partial(report, 150, name="a rather long name of a class, as it happens"),
    "over 150 classes": partial(report, 160),
}


def make_comparison(name="run"):
    draw = np.random.default_rng(0)
    base = report()
    masks = draw.integers(0, 3, (3, 20, 30)).astype(np.uint8)
    frame = draw.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    shot = PairShot(name, (0.2, 0.6), frame, masks[0], (masks[1], masks[2]))
    scores = {"miou": 0.4, "dice": 0.5, "accuracy": None, **{f"iou/{index}": 0.1 * index for index in range(3)}}
    limits = {key: [-0.1, 0.2] if value else None for key, value in scores.items()}
    verdict = {"p": 0.5, "verdict": "no significant difference"}
    gaps = {key: {"value": value and 0.1 - value / 2, "ci95": limits[key], **verdict} for key, value in scores.items()}
    images = [0.3] * 11 + [None]
    others = [OtherRun(f"{name} {n}", scores, images, gaps, images, [shot], "" if n else "none") for n in (0, 1)]
    shared = ("classes", "palette", "ignore_index", "unit", "images", "units", "about")
    return dict(
        subtitle=HOSTILE,
        **{key: base[key] for key in shared},
        image_scores=base["mious"],
        intervals="over 12 images",
        seeds="none",
        name=name,
        scores=scores,
        others=others,
    )


def call_page(page, kinds, given):
    """Return a page of the values in a dict: objects of some dataclasses, and the others by their names."""
    given = dict(given)
    parts = []
    for kind in kinds:
        parts.append(kind(**{field.name: given.pop(field.name) for field in fields(kind) if field.name in given}))
    return page(*parts, **given)


evaluation_html = partial(call_page, evaluation_page, (EvaluatedImages, EvaluationScores, ErrorAnalysis))
comparison_html = partial(call_page, comparison_page, (EvaluatedImages, ComparedRun))


@cache
def page_of(name):
    return comparison_html(make_comparison(HOSTILE)) if name == "compared" else evaluation_html(ODD[name]())


class Tags(HTMLParser):
    """Collects the elements and the text of a page, and refuses a tag that closes what is not open."""

    VOID = ("meta", "link", "img", "path", "rect", "circle", "image")

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(page)
        self.close()
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

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", [*ODD, "compared"])
def test_a_page_is_whole_and_names_nothing_outside_itself(name):
    page = page_of(name)
    tags = Tags(page)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 5
    for tag, attributes in tags.found:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), attributes
        assert tag != "img" or attributes["alt"]
    assert "\x1b" not in page and "\u202e" not in page and "nan" not in re.sub(r"<pre.*", "", page)
    assert len(page) < 2_000_000


def cells(page, section):
    """Return the rows of a section's tables as the plain texts of their cells."""
    part = re.search(f'<section id="{section}">(.*?)</section>', page, re.DOTALL)[1]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part, re.DOTALL)
    return [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]


def test_bands_add_up_outwards_and_each_is_wrong_by_itself():
    bands = np.array([[10, 5], [10, 3], [20, 1], [20, 1], [20, 0], [20, 0]])
    rows = cells(evaluation_html(report() | {"boundary": bands}), "boundary")[1:]
    assert [row[0] for row in rows] == [*(f"within {end} px" for end in (1, 2, 4, 8, 16)), "beyond 16 px"]
    assert [row[1] for row in rows] == ["50.0", "80.0", "90.0", "100.0", "100.0", "0.0"]
    assert [row[2] for row in rows] == ["10.0", "20.0", "40.0", "60.0", "80.0", "20.0"]
    assert [row[3] for row in rows] == ["50.0", "30.0", "5.0", "5.0", "0.0", "0.0"]


def test_worst_videos_are_first_and_histogram_spans_0_to_100():
    mious = [0.9, 0.9, 0.1, 0.1, 0.5, None]
    page = evaluation_html(report(images=6) | {"units": list("aabbcc"), "mious": mious, "unit": "video"})
    assert re.findall(r"<figcaption>(\w): ([\d.]+) over", page) == [("b", "10.0"), ("c", "50.0"), ("a", "90.0")]
    bars = re.findall(r"<title>([\d.]+) to ([\d.]+): (\d+)</title>", page)[:20]
    assert [(bars[0][0], bars[-1][1])] == [("0", "100")]
    assert [bar for bar in bars if bar[2] != "0"] == [("10", "15", "2"), ("50", "55", "1"), ("90", "95", "2")]
    assert "1 image without a labelled pixel have none.\nMedian 50.0 %" in page


def test_reliability_omits_bins_with_few_pixels():
    bins = [(0, 0, 0.0)] * 13 + [(19, 1, 17.0), (100, 60, 95.0)]
    state = {"nll": 1.0, "ece": 0.3, "bins": bins}
    reliability, _ = calibration_charts({"pixels": 119, "temperature": 2.0, "before": state, "after": state})
    assert [label for _, _, label in reliability["curves"][0]["dots"]] == ["uncalibrated: 0.95, 0.6"]


def test_matrix_shows_the_commonest_classes_as_row_shares():
    matrix = np.diag(np.arange(1, 161))
    shown = heat_map(matrix, [f"class {index}" for index in range(160)])
    assert shown["names"] == [f"class {index}" for index in range(10, 160)] and shown["left_out"] == 10
    assert "The 150 of 160 classes with the most" in page_of("over 150 classes")
    drawn = heat_map(np.array([[3, 1], [0, 8]]), ["a", "b"])
    assert [number["shown"] for number in drawn["numbers"]] == ["75", "25", "100"]


def test_errors_are_where_a_labelled_pixel_differs():
    masks = {"prediction": np.array([[0, 1, 1]], np.uint8), "reference": np.array([[0, 0, 255]], np.uint8)}
    shown = prediction_card(
        Shot(0, 0.5, np.full((1, 3, 3), 200, np.uint8), **masks),
        EvaluatedImages(["a", "b"], default_palette(2), 255, "image", ["name"], ["name"]),
    )
    assert shown["panels"][-1][0] == "errors: 50.0 % of the labelled pixels"
    assert [name for name, _ in shown["legend"]] == ["a", "b", "ignored"]


def test_significant_differences_are_marked_beyond_colour():
    base = make_comparison()
    limits = dict.fromkeys(base["scores"]) | {"miou": [0.1, 0.2], "dice": [-0.3, -0.2], "accuracy": [-0.1, 0.1]}
    usual = {"value": None, "p": None, "verdict": "no significant difference"}
    gaps = {key: {**usual, "ci95": ends} for key, ends in limits.items()}
    for key, value, verdict in (("miou", 0.15, "better"), ("dice", -0.25, "worse")):
        gaps[key] |= {"value": value, "verdict": f"significantly {verdict}"}
    gaps["accuracy"]["value"] = 0.0
    mious = [0.9] * 3 + [0.0] * 2 + [None] + list(base["image_scores"][6:])
    page = comparison_html(base | {"others": [replace(base["others"][1], differences=gaps, image_scores=mious)]})
    rows = {row[0]: row[4] for row in cells(page, "means")[1:]}
    assert rows == {"mIoU": "▲ +15.0", "mean Dice": "▼ -25.0", "pixel accuracy": "+0.0"}
    assert "is better in\n3, worse in 2 and equal in 6 of 11 images" in page
    assert "class 0 +30.00; class 1 +30.00;" in page and "over 12 images" in page
    assert "95\xa0%\xa0interval over\xa012\xa0images" in page


@pytest.mark.parametrize("sides", [1, 3, 31])
def test_tables_have_a_row_for_each_side_and_no_further_column(sides):
    base = make_comparison()
    others = [replace(base["others"][1], name=f"side {n}") for n in range(sides)]
    page = comparison_html(base | {"others": others})
    assert [row[0] for row in cells(page, "scores")[1:]] == ["run", *(f"side {n}" for n in range(sides))]
    for section, rows in (("means", 3), ("classes", 3)):
        assert {len(row) for row in cells(page, section)} == {7}
        assert len(cells(page, section)) == 1 + rows * sides
    of_side = ["mIoU", "side 0", "40.0", "40.0", "-10.0", "-10.0 .. +20.0", ""]
    assert cells(page, "means")[1] == of_side
    assert (f"<title>{sides} sides against run<" in page) == (sides > 1)


def test_last_image_marks_which_model_is_right(monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "mark_pixels", lambda frame, marks: seen.append(marks) or frame)
    first, second, reference = (
        np.array([ids], np.uint8) for ids in ([0, 1, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 255])
    )
    shot = PairShot("a", (0.1, 0.2), np.zeros((1, 5, 3), np.uint8), reference, (first, second))
    evaluated = EvaluatedImages(["a", "b"], default_palette(2), 255, "image", ["a"], ["a"])
    pair_card(shot, ("one", "other"), evaluated, "mIoU")
    assert {colour: mask[0].tolist() for mask, colour in seen[0]} == {
        RIGHT: [False, True, False, False, False],
        WRONG: [False, False, False, True, False],
        BOTH_WRONG: [False, False, True, False, False],
    }


def test_decisive_images_are_sorted_by_size_of_their_share():
    other = OtherRun("other", {}, [0.5] * 4, {}, [0.01, -0.05, None, 0.02], [])
    found = compare_images("abcd", ComparedRun("first", {}, [0.4] * 4), other)
    assert found["decisive"] == [(-0.05, "b"), (0.02, "d"), (0.01, "a")]


def test_scores_of_unbounded_metrics_are_numbers():
    given = report()
    given["metrics"] = [
        SimpleNamespace(
            scores={"share": "max", "area": "min"}, unbounded=("area",), class_columns=(), advise=lambda _: "an advice"
        )
    ]
    given["values"] = {**given["values"], "share": 0.4075, "area": 1.5}
    given["intervals"] = {**given["intervals"], "share": [0.25, 0.5], "area": [1.0, 2.25]}
    page = evaluation_html(given)
    assert (
        "share<b>40.8 %</b><span>95 %: 25.0 .. 50.0<" in page
        and "area<b>1.5</b><span>95 %: 1 .. 2.25<" in page
        and "an advice" in page
    )


def test_a_page_grows_no_further_with_its_images():
    base = make_comparison()
    draw = np.random.default_rng(0)
    sizes = []
    for images in (3_000, 30_000):
        mious = draw.random(images).tolist()
        other = replace(base["others"][1], image_scores=mious[::-1], decides=mious)
        names = [f"{index:05}" for index in range(images)]
        sizes.append(
            len(comparison_html(base | {"images": names, "units": names, "image_scores": mious, "others": [other]}))
        )
    assert max(sizes) < 1.02 * min(sizes)
    assert len(thin([(float(x), float(x)) for x in range(3999)])) <= MAX
    assert [x for x, _ in thin([(0.0, 1.0), (1.0, 1.0)])] == [0.0, 1.0]


def test_each_axis_has_its_own_ends():
    axes = Axes((0, 10), (0, 1), "x", "y")
    (left, foot), (right, top), (middle, half) = axes.at(0, 0), axes.at(10, 1), axes.at(5, 0.5)
    assert left < right and top < foot and (middle, half) == ((left + right) / 2, (top + foot) / 2)
    assert axes.at(-5, 9) == (left, top)


def test_whiskers_begin_at_zero():
    base = make_comparison()
    gaps = {key: gap | {"value": 0.1, "ci95": [0.05, 0.2]} for key, gap in base["others"][0].differences.items()}
    page = comparison_html(base | {"others": [replace(base["others"][0], differences=gaps)]})
    assert '<rect x="50.0" y="4" width="25.0"' in page and "M62.5 8H100.0" in page


def test_template_error_names_the_missing_variable():
    with pytest.raises(UndefinedError, match="'rows' is undefined"):
        render("plain_table.html.jinja", heads=["a"])


def test_training_curves_are_in_percent_within_their_own_range():
    rows = [{"step": step, "val/accuracy": 0.9 + 0.001 * step, "val/loss": 2.0} for step in range(11)]
    loss, accuracy = training_charts(rows)
    assert accuracy["axes"].y_name == "accuracy, %" and accuracy["axes"].y == pytest.approx((89.95, 91.05))
    assert accuracy["curves"][0]["dots"][0][-1] == "validation: 0, 90" and loss["axes"].y == pytest.approx((1.9, 2.1))
    (pseudo_labels,) = training_charts([{"step": 1, "train/confident": 0.4, "train/pseudo_accuracy": None}])
    assert [curve["dots"][0][-1] for curve in pseudo_labels["curves"]] == ["confident: 1, 40"]


@pytest.mark.parametrize(
    ("score", "titles"), [("area_error", ["mIoU", "area_error"]), ("miou", ["mIoU"]), (None, ["mIoU"])]
)
def test_training_curves_have_the_selecting_score_once(score, titles):
    rows = [{"step": step, "val/miou": 0.5, "val/area_error": 3.0 + step} for step in range(3)]
    charts = training_charts(rows, score)
    assert [chart["title"] for chart in charts] == titles
    if score == "area_error":
        assert charts[1]["curves"][0]["dots"][-1][-1] == "validation: 2, 5"


@pytest.mark.parametrize(
    ("given", "low", "high"), [([], 0, 1), ([3.0], 2.8, 3.2), ([0.0], -0.5, 0.5), ([-1e-9, 1e9], -1e9, 2e9)]
)
def test_axes_always_have_a_length(given, low, high):
    ends = range_around(given)
    assert low - 1 <= ends[0] < ends[1] <= high + 1
    marks = ticks(*ends)
    assert 2 <= len(marks) <= 7 and all(ends[0] <= mark * (1 + 1e-9) and mark <= ends[1] * (1 + 1e-9) for mark in marks)
    chart = line_chart("a", [("b", [(0.0, value) for value in given])], Axes(ends, ends, "x", "y"))
    assert "nan" not in str(chart)


def make_split(images, counts, **other):
    rows = [
        {"id": i, "class": name, "pixels": n, "share": n / sum(counts), "images": i, "objects": None}
        for i, (name, n) in enumerate(zip(("road", "a<b&c"), counts, strict=True))
    ]
    sizes = {"smallest": {"width": 30, "height": 20}, "largest": {"width": 50, "height": 40}}
    constant = {"class": 0, "accuracy": 0.75, "miou": 0.375}
    shared = {"images": images, "void_share": 0.125, **sizes, "constant_class": constant, "classes": rows}
    return shared | other


def make_finding(severity="error", files=(), message="m", remedy="r", reasons=(), stops=True):
    texts = {"severity": severity, "code": "some_code", "message": message, "remedy": remedy}
    return {**texts, "files": list(files), "reasons": list(reasons), "stops_training": stops}


def doctor_page(findings, splits=(), palette=(), cards=()):
    context = {"findings": findings, "splits": splits or {}, "palette": palette, "cards": cards}
    return render("extensions/doctor/doctor.html.jinja", title='"t" <1>', subtitle="1 error", warnings=[], **context)


def test_doctor_page_shows_findings_counts_names_and_images():
    findings = [
        make_finding(message="<script>alert(1)</script>", files=[f"f&{i}" for i in range(450)]),
        make_finding("note", remedy="", stops=False),
        make_finding("note", files=["f"], reasons=["f: damaged"]),
    ]
    frame = np.zeros((30, 41, 3), np.uint8)
    frame[:, :20] = (250, 10, 5)
    empty = make_split(0, (1, 1), smallest=None, constant_class=None)
    card = {"title": "a 'quoted\" <title>", "summary": "s", "panels": [("image", frame)]}
    card["legend"] = [("a<b", (1, 2, 3))]
    splits = {"train": make_split(1234, (300, 100)), "v<al": empty}
    page = doctor_page(findings, splits, ((0, 0, 0), (1, 2, 3)), [card])
    tags = Tags(page)
    assert page.startswith("<!doctype html>") and "prefers-color-scheme: dark" in page
    assert [tag for tag, _ in tags.found].count("script") == 1 and not re.search(r"https?:|url\(|@import", page)
    sources = [value for _, attributes in tags.found for key, value in attributes.items() if key in ("src", "href")]
    assert all(source.startswith(("data:", "#")) for source in sources)
    for shown in (
        *('"t" <1>', "1 error", "<script>alert(1)</script>", "a 'quoted\" <title>", "a<b", "450 listed", "f&199"),
        *("and 250 more", "f: damaged", "width x height", "1,234", "30 x 20", "50 x 40", "12.50", "37.50"),
        *("1 a<b&c", "75.00", "v<al: pixels"),
    ):
        assert shown in tags.text
    assert "f&200" not in tags.text and "does not stop" not in tags.text
    data = next(each for each in sources if each.startswith("data:image/webp;base64,")).partition(",")[2]
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert image.shape == (30, 41, 3)
    np.testing.assert_allclose(image[5, 5], (250, 10, 5), atol=9)
    np.testing.assert_allclose(image[5, 35], (0, 0, 0), atol=9)


def test_doctor_page_of_few_findings_shows_no_more():
    warned = Tags(doctor_page([make_finding(stops=False)])).text
    assert "some_code: training does not stop on it" in warned
    nothing = Tags(doctor_page([])).text
    assert "None." in nothing and "Pictures" not in nothing and "Splits" not in nothing


@pytest.mark.heavy
def test_the_wheel_holds_every_template():
    package = Path(page_module.__file__).parents[2]
    files = [*(package / "report/html/templates").iterdir(), *package.glob("extensions/*/*.html.jinja")]
    expected = {path.relative_to(package.parent).as_posix() for path in files}
    with ZipFile(built_wheel()) as wheel:
        assert expected <= {*wheel.namelist()} and len(expected) == 10


@pytest.fixture(scope="module")
def browser():
    with opened_page("about:blank") as page:
        yield page


@pytest.fixture
def show(browser, tmp_path):
    """Return a function that shows a page at a width, in light or dark; at the end the browser has no complaints."""

    def open_file(content, width=1280, dark=False):
        path = tmp_path / "report.html"
        path.write_text(content)
        browser.complaints.clear()
        browser.set_viewport_size({"width": width, "height": 900})
        browser.emulate_media(media="screen", color_scheme="dark" if dark else "light")
        browser.goto(path.as_uri())
        return browser

    yield open_file
    assert not browser.complaints


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("hostile", 1280, False), ("hostile", 375, True), ("all ignored", 375, False), ("150 classes", 375, True)]
    + [("compared", 1280, True), ("compared", 375, False)],
)
def test_a_page_in_a_browser(show, name, width, dark):
    page = show(page_of(name), width, dark)
    requested = page.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
    assert all(address.startswith("data:") for address in requested)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert page.evaluate("window.ran") is None
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 23, 27)") is dark
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper


@pytest.mark.heavy
def test_tables_sort_by_mouse_and_keys_and_matrix_shows_counts(show):
    page = show(evaluation_html(report()))
    column = "[...document.querySelectorAll('#classes tbody tr')].map(row => row.cells[1].dataset.value)"
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
    image = page.locator("svg.heat image").bounding_box()
    page.mouse.move(image["x"] + image["width"] / 2, image["y"] + image["height"] / 6)
    assert re.match(r"reference class 0, predicted class 1: [\d,]+ pixels", page.inner_text("output"))
    page.locator("svg.heat").focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("output").startswith("reference class 0, predicted class 0: ")


@pytest.mark.heavy
def test_class_table_fits_desktop_paper_and_phone(show):
    cut = "[...document.querySelectorAll('.wide')].filter(each => each.scrollWidth > each.clientWidth).length"
    page = show(page_of("150 classes"), 880, dark=True)
    assert page.evaluate(cut) == 0
    page.set_viewport_size({"width": 360, "height": 700})
    page.evaluate("document.querySelector('#classes .wide').scrollLeft = 200")
    assert page.locator("#classes tbody th").first.bounding_box()["x"] >= 0
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every(each => each.open)")
