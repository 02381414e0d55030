"""Make every figure of docs/pictures from rendered data, and the table of docs/gallery.md.

`python benchmarks/gallery.py [NAME ...] [--out docs/pictures] [--work outputs/gallery] [--table docs/gallery.md]` makes
all figures, or those of the named sections, on a CPU and without a download: 40 minutes of processor time in all. The
app and the reports are photographed in Chromium. Data and runs in `--work` are reused; delete the folder to start anew.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from PIL import Image

import dinoseg
from dinoseg.extensions.rendering.surgery.write import render_clip
from dinoseg.report.overlay import blend

SIZE = (128, 208)  # height, width in pixels of the rendered images of heads and tracking
CLASSES = ("background", "instrument", "thread and needle", "suction tool", "clamp", "catheter")
MERGED = np.array([0, 1, 1, 1, 2, 2, 3, 1, 4, 5], np.uint8)  # rendered id to class id
PALETTE = ((0, 0, 0), (40, 120, 255), (255, 235, 0), (255, 130, 0), (200, 60, 255), (0, 220, 130))
HEADS = ("linear", "multiscale", "detail")
LAYERS = ("instrument", "clasper", "shaft", "field of view")
LAYER_COLOURS = ((255, 255, 255), (204, 255, 0), (204, 0, 136), (34, 119, 255))
FRAMES = (0, 9, 18, 29)  # frames of the tracked video
UNTRACKED = "thread and needle"  # thinner than a patch
VAL_SEED = 1000  # of the first validation image
VIDEO_SEED = 1
TIMEOUT = 300_000  # milliseconds until the app has answered
BROWSER = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
MARK = "<!-- written by benchmarks/gallery.py -->"
Panel = tuple[str, np.ndarray]


@dataclass
class Gallery:
    """Folders of one call, and the figures that it has made.

    Attributes:
        out: folder of the figures.
        work: folder of data and runs.
        made: settings by the name of a figure.
    """

    out: Path
    work: Path
    made: dict[str, str] = field(default_factory=dict)

    def run(self, folder: str, *words: str) -> Path:
        """Run a mode in a run folder below `work`, unless it has ended there, and return the folder."""
        path = self.work / folder
        if not (path / "ended").exists():
            command = [sys.executable, "-m", "dinoseg", *words, f"hydra.run.dir={path}"]
            print(" ".join(command[1:]), flush=True)
            subprocess.run(command, check=True)
            (path / "ended").touch()
        return path

    def prepare_surgery(self) -> Path:
        """Return the root of the demo's data: rendered operations, prepared as SAR-RARP50."""
        root = self.work / "surgery"
        self.run("render", "mode=render", "data=sarrarp", f"data.root={root}")
        self.run("prepare", "mode=prepare", "data=sarrarp", f"data.root={root}")
        return root

    def train_demo(self) -> Path:
        """Return the run of `hparam=demo`."""
        return self.run("demo", "mode=train", "hparam=demo", f"data.root={self.prepare_surgery()}")

    def save(self, name: str, image: Image.Image, settings: str) -> None:
        """Write a figure as PNG, or as JPEG of quality 85."""
        image.convert("RGB").save(self.out / name, quality=85, optimize=True)
        self.note(name, settings)

    def note(self, name: str, settings: str) -> None:
        """Record the settings of a figure that has been written."""
        self.made[name] = settings
        print(f"{self.out / name}: {(self.out / name).stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SECTIONS, []], help="sections; none: all")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the figures")
    parser.add_argument("--work", type=Path, default=Path("outputs/gallery"), help="folder of data and runs")
    parser.add_argument("--table", type=Path, default=Path("docs/gallery.md"), help="page with the table of figures")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    gallery = Gallery(args.out, args.work.resolve())
    for name in args.names or SECTIONS:
        SECTIONS[name](gallery)
    write_table(args.table, gallery.made)


def write_table(page: Path, made: dict[str, str]) -> None:
    """Replace the rows of the figures that were made in the table at the end of the page."""
    commit = subprocess.check_output(("git", "rev-parse", "--short=8", "HEAD"), text=True).strip()
    text, _, table = page.read_text(encoding="utf-8").partition(MARK)
    rows = dict(line.split(" | ", 1) for line in table.strip().splitlines()[2:])
    rows |= {f"| `{name}`": f"{settings} | {commit} |" for name, settings in made.items()}
    lines = ["| figure | settings | version |", "|---|---|---|", *(" | ".join(row) for row in sorted(rows.items()))]
    page.write_text(text + MARK + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def show_prediction(gallery: Gallery) -> None:
    """Photograph README's first prediction: a packaged model on a packaged image."""
    run = gallery.run("prediction", "mode=predict", "resume=dinoseg:surgery", "input=dinoseg:surgery")
    figure = Image.open(run / "surgery_segmentation/comparison.png")
    gallery.save("first_prediction.jpg", figure, "`mode=predict resume=dinoseg:surgery input=dinoseg:surgery`")


def show_objects(gallery: Gallery) -> None:
    """Photograph README's counted objects: a packaged model on a packaged image."""
    run = gallery.run("objects", "mode=predict", "resume=dinoseg:objects", "input=dinoseg:objects")
    figure = Image.open(run / "objects_segmentation/comparison.png")
    gallery.save("objects.jpg", figure, "`mode=predict resume=dinoseg:objects input=dinoseg:objects`")


def show_features(gallery: Gallery) -> None:
    """Enlarge the features of a packaged image."""
    words = ("backbone=tiny_surgical", "input=dinoseg:surgery")
    figure = Image.open(gallery.run("features", "mode=features", *words) / "surgery_features.png")
    enlarged = figure.resize((2 * figure.width, 2 * figure.height), Image.Resampling.NEAREST)
    gallery.save("features.jpg", enlarged, f"`mode=features {' '.join(words)}`")


def show_example(gallery: Gallery) -> None:
    """Segment the instruments of a rendered image by the mask of another one."""
    folder = gallery.work / "example_data"
    folder.mkdir(exist_ok=True)
    (given, ids), (target, _) = (next(render_clip(seed, 1, (288, 480))) for seed in (3, 11))
    mask = np.isin(ids, (1, 2, 3)).astype(np.uint8)
    for name, pixels in (("reference", given), ("mask", 255 * mask), ("target", target)):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    references = f"references=[[{folder}/reference.png,{folder}/mask.png]]"
    words = ("backbone=tiny_surgical", references, f"input={folder}/target.png")
    run = gallery.run("example", "mode=example", *words)
    found = np.asarray(Image.open(run / "masks/target.png"))
    panels = [blend(image, each, PALETTE[:2], opacity=0.6) for image, each in ((given, mask), (target, found))]
    gallery.save(
        "example.jpg",
        Image.fromarray(np.concatenate(panels, axis=1)),
        "`mode=example backbone=tiny_surgical`, seeds 3, 11",
    )


def show_layers(gallery: Gallery) -> None:
    """Draw classes that overlap: a clasper and a shaft of an instrument inside a field of view."""
    image, mask = next(render_clip(VIDEO_SEED, 1, (192, 320)))
    rows, columns = np.indices(mask.shape)
    centre = (mask.shape[0] / 2, mask.shape[1] / 2)
    field_of_view = np.hypot(rows - centre[0], columns - centre[1]) < mask.shape[0] / 2.4
    layers = np.stack([np.isin(mask, (1, 2, 3, 6)), mask == 1, mask == 3, field_of_view]).astype(np.uint8)
    tinted = image
    for index, layer in enumerate(layers):  # one class after another: the last one hides the others' colours
        tinted = blend(tinted, layer, ((0, 0, 0), LAYER_COLOURS[index]))
    panels = [("image", image), ("tinted one after another", tinted), ("hatched", blend(image, layers, LAYER_COLOURS))]
    draw(gallery.out / "overlapping_classes.jpg", [panels], dict(zip(LAYERS, LAYER_COLOURS, strict=True)))
    gallery.note("overlapping_classes.jpg", "layers of a rendered frame, `dinoseg.report.overlay.blend`")


def show_heads(gallery: Gallery) -> None:
    """Train three heads on a frozen backbone and draw their masks of three validation images."""
    models = {}
    for head in HEADS:
        run = train_head(gallery, head)
        models[head] = dinoseg.load(run)
        scores = json.loads((run / "evaluation/scores.json").read_text())
        trained = json.loads((run / "cost.json").read_text())["trainable"]
        ious = " | ".join(f"{100 * each['iou']:.1f}" for each in scores["classes"][1:])
        print(f"| `head={head}` | {100 * scores['miou']:.1f} | {ious} | {trained:,} |")
    data = gallery.work / "heads_data"
    images = sorted((data / "val/images").iterdir())
    rows = []
    for path in (images[0], images[3], images[5]):
        masks = {f"head={head}": model.predict(path).mask for head, model in models.items()}
        masks["reference"] = np.array(Image.open(data / "val/masks" / path.name))
        image = np.array(Image.open(path))
        rows.append([("image", image), *((name, tint(image, mask)) for name, mask in masks.items())])
    draw(gallery.out / "gallery_heads.jpg", rows, class_colours(CLASSES[1:]))
    gallery.note("gallery_heads.jpg", "`backbone=tiny_surgical adapter=frozen loss=ce_dice trainer.steps=200`")


def write_heads_data(root: Path) -> Path:
    """Write 48 training and 16 validation images, a frame of another operation each, and return their folder."""
    for split, seeds in {"train": range(48), "val": range(VAL_SEED, VAL_SEED + 16)}.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            image, mask = next(render_clip(seed, 1, SIZE))
            Image.fromarray(image).save(root / split / f"images/{seed:04}.png")
            Image.fromarray(MERGED[mask]).save(root / split / f"masks/{seed:04}.png")
    return root


def train_head(gallery: Gallery, head: str) -> Path:
    """Return the run of a head on the frozen packaged backbone: 200 steps of 4 images."""
    data = write_heads_data(gallery.work / "heads_data")
    palette = ",".join(f"[{red},{green},{blue}]" for red, green, blue in PALETTE)
    return gallery.run(
        f"head_{head}",
        *("mode=train", f"head={head}", "backbone=tiny_surgical", "adapter=frozen", "loss=ce_dice"),
        *(f"data.root={data}", f"data.classes=[{','.join(CLASSES)}]", f"data.palette=[{palette}]"),
        *("data.batch_size=4", "data.views=2", f"resolution.crop=[{SIZE[0]},{SIZE[1]}]"),
        *("trainer.steps=200", "trainer.val_every=200", "optim.optimizer.lr=3e-3"),
    )


def show_tracking(gallery: Gallery) -> None:
    """Follow the objects of a rendered video from its first mask; print J&F and draw four frames."""
    clip = [(image, MERGED[mask]) for image, mask in render_clip(VIDEO_SEED, max(FRAMES) + 1, SIZE)]
    clip = [(image, np.where(mask == CLASSES.index(UNTRACKED), 0, mask).astype(np.uint8)) for image, mask in clip]
    frames = gallery.work / "frames"
    frames.mkdir(exist_ok=True)
    for index, (image, _) in enumerate(clip):
        Image.fromarray(image).save(frames / f"{index:03}.png")
    Image.fromarray(clip[0][1]).save(gallery.work / "first.png")
    settings = ("backbone=tiny_surgical", "tracker=dinov3", "tracker.short_side=256", "tracker.upsample=bilinear")
    labels = f"labels={gallery.work / 'first.png'}"
    run = gallery.run("tracked", "mode=track", *settings, f"input={frames}", labels)
    masks = [np.array(Image.open(run / f"masks/{index:03}.png")) for index in range(len(clip))]
    print(f"tracked: J&F {j_and_f(masks, clip):.1%}, first mask copied {j_and_f([masks[0]] * len(clip), clip):.1%}")
    rows = [
        [(f"frame {index}, {name}", tint(clip[index][0], row[index])) for index in FRAMES]
        for name, row in (("tracked", masks), ("reference", [mask for _, mask in clip]))
    ]
    draw(gallery.out / "gallery_tracking.jpg", rows, class_colours([n for n in CLASSES[1:] if n != UNTRACKED]))
    gallery.note("gallery_tracking.jpg", "`mode=track` with the settings in the text")


def j_and_f(masks: Sequence[np.ndarray], clip: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the mean J&F over the objects of the first mask and over all frames but the first and last, in 0..1."""
    objects = [int(each) - 1 for each in np.unique(clip[0][1]) if each]
    values = [
        torch.stack(dinoseg.metrics.region_and_boundary(torch.from_numpy(mask), torch.from_numpy(reference), 5))
        for mask, (_, reference) in zip(masks[1:-1], clip[1:-1], strict=True)
    ]
    return float(torch.stack(values)[..., objects].mean())


def show_slots(gallery: Gallery) -> None:
    """Train slots on rendered videos without masks, and show the segments of a validation video."""
    root = gallery.work / "movi"
    gallery.run("render_movi", "mode=render", "data=movi", f"data.root={root}")
    run = gallery.run("slots", "mode=train", "hparam=slots_rendered", f"data.root={root}")
    # of the four videos that the last validation draws, one whose objects hide one another
    figure = Image.open(run / "validation/step_03000/validation_0043_00000.png")
    figure.thumbnail((1000, 1000))
    gallery.save("slots.jpg", figure, "`mode=train hparam=slots_rendered`, video 43, step 3,000")


def show_demo(gallery: Gallery) -> None:
    """Show a validation frame of the demo, and its report."""
    run = gallery.train_demo()
    report = gallery.run("demo_eval", "mode=eval", f"resume={run}")
    figure = Image.open(sorted((report / "predictions").rglob("*_vis.png"))[0])
    gallery.save("demo.png", figure, "`make demo`")
    with open_browser() as browser:
        photograph(browser, report / "report.html", gallery.out / "report.png")
        gallery.note("report.png", "`mode=eval resume=outputs/demo/train`")


def show_comparison(gallery: Gallery) -> None:
    """Compare the three heads, and show the report."""
    sides = ",".join(str(train_head(gallery, head)) for head in HEADS)
    report = gallery.run("comparison", "mode=compare", f"mode.runs=[{sides}]", f"mode.names=[{','.join(HEADS)}]")
    with open_browser() as browser:
        photograph(browser, report / "report.html", gallery.out / "report_compare.png")
    gallery.note("report_compare.png", "`mode=compare` of the three heads in gallery_heads.jpg")


def show_app(gallery: Gallery) -> None:
    """Segment an image in the app, paint objects on a video and track them, on a desk and on a phone."""
    clip = list(render_clip(VIDEO_SEED, 24, (240, 384)))
    video = gallery.work / "operation.mp4"
    from dinoseg.extensions.video.writer import VideoWriter

    with VideoWriter(video, 10.0, (240, 384)) as writer:
        for image, _ in clip:
            writer.write(image)
    picture = gallery.work / "operation.png"
    Image.fromarray(clip[0][0]).save(picture)
    settings = ("mode=app", "resume=dinoseg:surgery", "tracker.short_side=240", "tracker.upsample=bilinear")
    shutil.rmtree(gallery.work / "app", ignore_errors=True)
    with serve(gallery.work / "app", settings) as address, open_browser() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.goto(address)
        upload(page, picture)
        page.wait_for_timeout(1000)
        page.screenshot(quality=85, type="jpeg", path=gallery.out / "app.jpg")
        page.goto(address)
        upload(page, video)
        press(page, "Paint objects to track")
        paint_objects(page, clip[0][1])
        page.wait_for_timeout(1000)
        page.screenshot(quality=85, type="jpeg", path=gallery.out / "app_paint.jpg")
        press(page, "Track the mask of the first frame")
        page.get_by_text("Done: 24 frames").wait_for(timeout=TIMEOUT)
        page.wait_for_function("document.querySelector('video').currentTime > 0.5")
        page.evaluate("document.querySelector('video').pause()")
        page.screenshot(quality=85, type="jpeg", path=gallery.out / "app_track.jpg")
        phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        phone.goto(address)
        upload(phone, picture)
        phone.wait_for_timeout(1000)
        phone.screenshot(quality=85, type="jpeg", path=gallery.out / "app_phone.jpg")
    for name in ("app.jpg", "app_paint.jpg", "app_track.jpg", "app_phone.jpg"):
        gallery.note(name, f"`{' '.join(settings)}`")


@contextmanager
def serve(folder: Path, words: Sequence[str]) -> Iterator[str]:
    """Start a server in a run folder, wait until it answers, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dinoseg", *words, f"mode.port={port}", f"hydra.run.dir={folder}"]
    server = subprocess.Popen(command)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a headless Chromium of the system."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        try:
            yield browser
        finally:
            browser.close()


def photograph(browser: Any, file: Path, path: Path) -> None:
    """Write the beginning of a page as a picture of 880 x 1060 pixels."""
    page = browser.new_page(viewport={"width": 880, "height": 1060})
    page.goto(file.resolve().as_uri())
    page.wait_for_timeout(500)
    page.screenshot(path=path)


def upload(page: Any, path: Path) -> None:
    """Give the app a file and wait for its view."""
    page.set_input_files("input[type=file]", path)
    page.get_by_role("status").filter(has_text="pixels").wait_for(timeout=TIMEOUT)
    page.wait_for_function("document.querySelector('.view')?.querySelectorAll('img').length !== 1")


def press(page: Any, text: str) -> None:
    page.get_by_role("button", name=text, exact=True).click()


def paint_objects(page: Any, mask: np.ndarray) -> None:
    """Paint the largest connected part of an instrument, the catheter and the suction tool, row by row."""
    for name, ids in (("object 1", (1, 2, 3)), ("object 2", (9,)), ("object 3", (6,))):
        press(page, name)
        _, parts, boxes, _ = cv2.connectedComponentsWithStats(np.isin(mask, ids).astype(np.uint8))
        largest = 1 + int(boxes[1:, cv2.CC_STAT_AREA].argmax())
        for row in range(4, mask.shape[0], 8):
            columns = np.flatnonzero(parts[row] == largest)
            for stroke in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
                if len(stroke) > 16:  # the brush has a radius of 8 pixels
                    drag(page, mask.shape, (row, int(stroke[0]) + 8), (row, int(stroke[-1]) - 8))


def drag(page: Any, shape: tuple[int, ...], *points: tuple[int, int]) -> None:
    """Draw a stroke through (row, column) pixels of a frame of `shape`."""
    box = page.locator(".view").bounding_box()
    places = [(box["x"] + box["width"] * x / shape[1], box["y"] + box["height"] * y / shape[0]) for y, x in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def tint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return blend(image, mask, PALETTE, opacity=0.65)


def class_colours(names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    return {name: PALETTE[CLASSES.index(name)] for name in names}


def draw(path: Path, rows: Sequence[Sequence[Panel]], colours: dict[str, tuple[int, int, int]]) -> None:
    """Write rows of labelled panels and a legend as a JPEG of 1,200 pixels in width."""
    height, width = rows[0][0][1].shape[:2]
    inches = 12 / len(rows[0]) * height / width + 0.3
    figure = Figure(figsize=(12, inches * len(rows) + 0.6), layout=ConstrainedLayoutEngine(h_pad=0.1))
    for line, axes_of_line in zip(rows, figure.subplots(len(rows), len(rows[0]), squeeze=False), strict=True):
        for (label, pixels), axes in zip(line, axes_of_line, strict=True):
            axes.imshow(pixels)
            axes.set_title(label, fontsize=13)
            axes.set_axis_off()
    patches = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="grey", label=name) for name, colour in colours.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=13, frameon=False)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})


SECTIONS: dict[str, Callable[[Gallery], None]] = {
    "prediction": show_prediction,
    "objects": show_objects,
    "features": show_features,
    "example": show_example,
    "layers": show_layers,
    "heads": show_heads,
    "tracking": show_tracking,
    "slots": show_slots,
    "demo": show_demo,
    "comparison": show_comparison,
    "app": show_app,
}


if __name__ == "__main__":
    main()
