"""One visitor's page: widgets in the browser, and the upload that they work on."""

import asyncio
import logging
import math
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nicegui import ui
from nicegui.events import GenericEventArguments

from dinoseg.core.objects import Objects
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.serving.decoding import VideoDecoder, is_video
from dinoseg.extensions.serving.features_tab import FeaturesTab, UploadFeatures
from dinoseg.extensions.serving.mask_editor import MAX_RADIUS, MaskEditor, encode_image, encode_mask
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.extensions.serving.video import FollowedObjects, Masks, write_labelled_video
from dinoseg.extensions.serving.widgets import Checkbox, Stage, Switch, add_button, add_slider
from dinoseg.extensions.serving.work import Work, WorkCancelled, run_in_thread
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.report.object_overlay import draw_objects
from dinoseg.report.palette import default_palette
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_MAX_TEXT = 300  # characters of a message; names of files are a visitor's
_MAX_WAITING_STROKES = 20  # of a page; further ones are dropped
_OBJECTS = Labels(("background", *(f"object {i}" for i in range(1, 10))), tuple(default_palette(10)), 255)


@dataclass(frozen=True)
class PageContext:
    """Objects that all pages of a server share.

    Args:
        model: the model.
        uploads: this server's own folder.
        make_tracker: creates a tracker of masks; None: the model has no backbone for tracking.
        max_mib: largest upload, in MiB.
        max_seconds: longest video.
        features: of the opened images of all pages; None: the model has no backbone in torch.
        make_object_tracker: creates a tracker of the objects that the model finds; None: it finds none.
        video_queue: held by the page whose video is processed; images are segmented between a video's batches.
    """

    model: SharedModel
    uploads: Path
    make_tracker: Callable[[], Tracker] | None
    max_mib: float
    max_seconds: float
    features: UploadFeatures | None = None
    make_object_tracker: Callable[[], Tracker] | None = None
    video_queue: asyncio.Lock = field(default_factory=asyncio.Lock)


class SegmentedUpload(NamedTuple):
    """An image or the first frame of a video, and what the model finds there.

    Attributes:
        shown: the image as a JPEG, with the outlines and numbers of its objects.
        mask: the model's mask.
        frames: number of frames of a video; 0: an image.
        counts: text on its objects; "": the model predicts none.
        marks: (H, W) bool, the pixels of outlines and numbers, if there are objects.
    """

    shown: bytes
    mask: np.ndarray
    frames: int = 0
    counts: str = ""
    marks: np.ndarray | None = None


class Page:
    """A page, built where it is created.

    Args:
        context: of all pages.
        token: name of the page in addresses.
    """

    def __init__(self, context: PageContext, token: str) -> None:
        self.folder = context.uploads / secrets.token_hex(16)
        self.files: dict[str, Path | bytes | Callable[[], bytes]] = {}  # by the name in their address
        self.is_busy = False
        self.is_receiving = False
        self._context = context
        self._address = f"/files/{token}"
        facts = context.model.facts
        self._classes = Labels(facts.classes, facts.palette, facts.ignore_index)
        self._next: Path | None = None  # the upload that is opened next
        self._opened = self.folder / "none"  # the upload that is shown; it is never written again
        self._name = ""  # of the upload, without its suffix
        self._clear_masks()
        self._painting = asyncio.Lock()
        self._strokes = 0  # that wait or are painted
        self._label = 0  # that the brush paints
        self._video: VideoDecoder | None = None  # that is processed
        self._current = Work()
        self._frames = 0  # of the upload; 0: an image
        self._frames_done = 0
        self._names: dict[int, ui.button] = {}  # of the legend
        self._shares: dict[int, ui.label] = {}
        self._features: FeaturesTab | None = None
        self._build(f"/upload/{token}")

    def add_upload(self, path: Path) -> None:
        """Let a complete file be opened next; the page shows the former upload until then."""
        if self._next is not None:
            self._next.unlink(missing_ok=True)
        self._next = path

    def close(self) -> None:
        """Cancel the work of the page, and remove its files and masks."""
        self._cancel()
        if self._context.features is not None:
            self._context.features.forget(self.folder)
        self.files.clear()
        self._clear_masks()  # widgets and handlers refer to one another, so that the page is collected much later
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clear_masks(self) -> None:
        self._predicted = np.zeros((1, 1), np.uint8)  # the model's mask of the image or the first frame
        self._marks: np.ndarray | None = None  # pixels of the image's outlines and numbers
        self._editor = MaskEditor(self._predicted, self._classes)

    # ---- widgets

    def _build(self, upload_address: str) -> None:
        ui.add_css(Path(__file__).with_name("style.css"))
        if self._context.features is not None:
            self._build_tabs(FeaturesTab(self._context.features, self.files, self._address, self._read, self._run))
        with ui.element("div").classes("columns"):
            with ui.element("div").classes("stack"):
                self._stage = Stage().on("uploaded", self._open_upload).on("stroke", self._paint)
                self._stage.on("failed", self._tell_failure)
                hint = f"up to {self._context.max_mib:g} MiB, videos up to {self._context.max_seconds:g} s"
                self._stage.show(url=upload_address, hint=hint, maxMib=self._context.max_mib)
                if self._features is not None:
                    self._features.build_panel()
            with ui.element("aside"):
                with ui.card():
                    ui.label("dinoseg").classes("heading")
                    self._status = ui.label("No file uploaded yet.").props("role=status")
                    self._progress = ui.element("q-linear-progress")  # NiceGUI's takes values from the browser
                    self._cancel_button = add_button("Cancel", self._cancel, "outline")
                with ui.element("div").classes("stack") as self._cards:
                    with ui.card() as self._video_card:
                        self._build_video_card()
                    with ui.card() as self._mask_card:
                        self._build_mask_card()
                if self._features is not None:
                    second = self._features.build_card().on("uploaded", self._open_second)
                    second.on("failed", self._tell_failure).show(url=upload_address, maxMib=self._context.max_mib)
        for widget in (self._progress, self._cancel_button, self._video_card, self._mask_card):
            widget.visible = False
        ui.timer(0.3, self._show_progress)

    def _build_tabs(self, features: FeaturesTab) -> None:
        self._features = features
        # without NiceGUI's tabs, which take values from the browser
        with ui.element("q-tabs").props("model-value=Segment no-caps dense align=left"):
            for name in ("Segment", "Features"):
                tab = ui.element("q-tab").props(f"name={name} label={name}")
                tab.on("click", partial(self._choose_tab, features, has_features=name == "Features"))

    async def _choose_tab(self, features: FeaturesTab, *, has_features: bool) -> None:
        self._cards.visible = not has_features
        self._stage.show(folded=has_features)
        await features.show(visible=has_features)

    def _build_video_card(self) -> None:
        ui.label("Video").classes("heading")
        segments = self._context.make_object_tracker is None
        add_button("Segment every frame" if segments else "Follow the objects", self._segment_video)
        if self._context.make_tracker is not None:
            add_button("Track the mask of the first frame", self._track_video)
            add_button("Paint objects to track", self._start_objects, "outline")
        with ui.element("div").classes("buttons") as self._video_results:
            add_button("Download video", partial(self._download, "overlay.mp4"), "outline")
            add_button("Download masks", partial(self._download, "masks.zip"), "outline")
            add_button("Back to the first frame", self._show_image, "outline")

    def _build_mask_card(self) -> None:
        ui.label("Mask").classes("heading")
        self._legend = ui.element("div").classes("legend")
        with ui.element("div") as self._tools:
            self._opacity = add_slider("Opacity: {} %", 0, 100, self._show_brush)
            self._brush = Switch("Brush: paints the chosen class", on_change=self._show_brush)
            self._eraser = Switch("Eraser: removes the chosen class", on_change=self._show_brush)
            self._radius = add_slider("Brush radius: {} px", 1, MAX_RADIUS, self._show_brush)
            self._zoom = add_slider("Zoom: {}", 1, 8, self._show_brush)
            with ui.element("div").classes("buttons"):
                add_button("Undo", self._undo, "outline")
                add_button("Reset", self._reset, "outline")
                add_button("Download mask", self._download_mask, "outline")
                add_button("Download overlay", partial(self._download, "overlay.jpg"), "outline")

    def _tell(self, text: str, *, is_error: bool = False) -> None:
        self._status.text = text[:_MAX_TEXT]
        self._status.style(f"color: {'var(--q-negative)' if is_error else 'inherit'}")

    def _tell_failure(self, event: GenericEventArguments) -> None:
        self._tell(str(event.args), is_error=True)

    def _show_progress(self) -> None:
        self._progress.visible = self._cancel_button.visible = self.is_busy and self._frames > 0
        if self.is_busy and self._frames_done:
            self._progress.props["value"] = self._frames_done / max(self._frames_done, self._frames)
            self._tell(f"Frame {self._frames_done} of {self._frames}")

    @contextmanager
    def _work(self, text: str) -> Iterator[None]:
        """Show that the page is busy, and the error if there is one."""
        self.is_busy = True
        self._current = Work()
        self._frames_done = 0
        self._tell(text)
        self._stage.show(busy=True)
        try:
            yield
        except Exception as error:
            if self._current.is_cancelled:  # the error comes from the ended decoder or the removed upload
                self._tell("Cancelled.")
            elif isinstance(error, UserError):
                self._tell(str(error), is_error=True)
            else:
                logger.exception("An upload could not be processed")
                self._tell(f"The server failed ({type(error).__name__}); see its log.", is_error=True)
        finally:
            self.is_busy = False
            self._stage.show(busy=False)

    async def _run(self, text: str, function: Callable[[Work], str]) -> None:
        """Run a function in a thread unless the page is busy; show the text that it returns."""
        if not self.is_busy:
            with self._work(text):
                self._tell(await run_in_thread(partial(function, self._current)))

    # ---- the upload and its mask

    async def _open_upload(self, event: GenericEventArguments) -> None:
        path = self._next
        if self.is_busy or path is None:
            return
        self._next = None
        with self._work("Segmenting ..."):
            try:
                found = await run_in_thread(partial(self._segment_file, path))
                self._check_frame(0)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            self._opened.unlink(missing_ok=True)
            self._opened = path
            self._predicted = found.mask
            self._marks = found.marks
            self._frames = found.frames
            self._name = Path(str(event.args)).stem[:100]
            self.files |= {
                "image.jpg": found.shown,
                # encoded for a browser that asks, not for each stroke
                "layer.png": lambda: self._editor.encode_layer(),
                "mask.png": self._encode_mask,
                "mask.tif": self._encode_mask,
                "overlay.jpg": self._encode_overlay,
            }
            self._radius.value = min(MAX_RADIUS, 2 + min(found.mask.shape[-2:]) // 40)
            self._opacity.value = 50
            self._edit(found.mask, self._classes)
            height, width = found.mask.shape[-2:]
            text = f"{found.frames} frames of " if found.frames else ""
            self._tell(f"{event.args}: {text}{width} x {height} pixels{found.counts}")
        if self._features is not None and self._opened == path:
            await self._features.open(path)

    async def _open_second(self) -> None:
        path = self._next
        if self._features is not None and path is not None and not self.is_busy:
            self._next = None
            await self._features.open_second(path)

    def _segment_file(self, path: Path) -> SegmentedUpload:
        """Return an image or a first frame of a video, segmented; only an image has objects."""
        model = self._context.model
        work = self._current
        with model.hold_place(work):
            image, frames = self._read(path)
            if frames:
                return SegmentedUpload(encode_image(image), model.segment([image], work)[0], frames)
            return self._show_prediction(image, *model.predict(image, work))

    def _read(self, path: Path) -> tuple[np.ndarray, int]:
        """Return an image and 0, or the first frame of a video and its number of frames; only with a place."""
        if not is_video(path):
            return self._context.model.decode(path), 0
        with closing(self._open_video(path)) as video:
            frame, _ = next(video.frames())
        return frame, max(1, video.count)

    def _show_prediction(self, image: np.ndarray, mask: np.ndarray, objects: Objects | None) -> SegmentedUpload:
        if objects is None:
            return SegmentedUpload(encode_image(image), mask)
        objects = objects.select_distinct(self._context.model.min_score)
        outlined = draw_objects(image, objects, self._classes.palette, opacity=0)
        counts = Counter(label for label in objects.classes.tolist() if label in self._context.model.things)
        marks = (outlined != image).any(axis=-1)
        return SegmentedUpload(encode_image(outlined), mask, 0, self._list_objects(counts), marks)

    def _list_objects(self, counts: Mapping[int, int]) -> str:
        listed = ", ".join(f"{counts[label]} {self._classes.classes[label]}" for label in sorted(counts))
        return f"; objects: {listed or 'none'}"

    def _encode_mask(self) -> bytes:
        return encode_mask(self._editor.mask, self._editor.labels.palette)

    def _encode_overlay(self) -> bytes:
        shown = self.files["image.jpg"]
        assert isinstance(shown, bytes)
        return self._editor.encode_overlay(shown, self._opacity.value / 100)

    def _open_video(self, path: Path) -> VideoDecoder:
        return VideoDecoder(path, max_pixels=self._context.model.max_pixels, max_seconds=self._context.max_seconds)

    def _reset(self) -> None:
        self._edit(self._predicted, self._classes)

    def _start_objects(self) -> None:
        self._brush.value = True
        self._edit(np.zeros(self._predicted.shape[-2:], np.uint8), _OBJECTS)

    def _edit(self, mask: np.ndarray, labels: Labels) -> None:
        self._editor = MaskEditor(mask, labels, self._marks)
        self._list_labels()
        self._show_image()

    def _list_labels(self) -> None:
        labels = self._editor.labels
        counts = self._editor.counts
        self._legend.clear()
        self._names.clear()
        self._shares.clear()
        with self._legend:
            for label in sorted(range(len(labels.classes)), key=lambda label: -counts[label]):
                box = Checkbox(value=True, on_change=partial(self._toggle_visible, label))
                box.props(f'dense aria-label="Show {label}"')
                ui.element("i").style(f"background: rgb{labels.palette[label]}")
                button = ui.button(labels.classes[label], on_click=partial(self._choose, label), color=None)
                self._names[label] = button.props("flat dense no-caps align=left")
                self._shares[label] = ui.label().classes("quiet")
        self._choose(min(1, len(labels.classes) - 1))

    def _choose(self, label: int) -> None:
        for name in self._names.values():
            name.classes(remove="chosen")
        self._names[label].classes("chosen")
        self._label = label
        self._show_brush()

    def _toggle_visible(self, label: int) -> None:
        self._editor.hidden ^= {label}
        self._show_mask()

    def _show_image(self) -> None:
        height, width = self._predicted.shape[-2:]
        image = f"{self._address}/image.jpg?{secrets.token_hex(4)}"
        self._stage.show(image=image, width=width, height=height, video="")
        self._mask_card.visible = self._tools.visible = True
        self._eraser.visible = self._editor.has_layers
        self._video_card.visible = self._frames > 0
        self._video_results.visible = False
        self._show_mask()

    def _show_mask(self) -> None:
        self._stage.show(mask=f"{self._address}/layer.png?{secrets.token_hex(4)}")
        self._show_shares(self._editor.counts)

    def _show_shares(self, counts: np.ndarray, frames: int = 1) -> None:
        pixels = frames * math.prod(self._editor.mask.shape[-2:])
        for label, text in self._shares.items():
            text.text = f"{100 * counts[label] / pixels:.2f} %" if counts[label] else ""

    @property
    def _erases(self) -> bool:
        return self._eraser.value and self._editor.has_layers

    def _show_brush(self) -> None:
        color = f"rgb{(0, 0, 0) if self._erases else self._editor.labels.palette[self._label]}"
        self._stage.show(paint=self._brush.value or self._erases, color=color, radius=self._radius.value)
        self._stage.show(zoom=self._zoom.value, opacity=self._opacity.value / 100)

    async def _paint(self, event: GenericEventArguments) -> None:
        if self.is_busy or self._strokes >= _MAX_WAITING_STROKES:
            return
        self._strokes += 1
        stroke = (event.args, self._radius.value, self._label)
        erase = self._erases
        try:
            async with self._painting:
                with suppress(TypeError, ValueError):  # of a stroke that no page sends
                    await asyncio.to_thread(self._editor.paint, *stroke, erase=erase)
        finally:
            self._strokes -= 1
        self._show_mask()

    async def _undo(self) -> None:
        if not self.is_busy:
            async with self._painting:
                self._editor.undo()
            self._show_mask()

    def _download_mask(self) -> None:
        self._download("mask.tif" if self._editor.has_layers else "mask.png")

    def _download(self, name: str) -> None:
        ui.download.from_url(f"{self._address}/{name}", f"{self._name}_{name}")

    # ---- videos

    async def _segment_video(self) -> None:
        if self.is_busy:
            return
        self._edit(self._predicted, self._classes)
        if self._context.make_object_tracker is None:
            await self._label_video(lambda frames: self._context.model.segment(frames, self._current))
            return
        tracker = self._context.make_object_tracker()
        followed = FollowedObjects(
            lambda frames: self._context.model.track(tracker, frames, [None] * len(frames), self._current),
            tracker,
            self._classes.palette,
            self._opacity.value / 100,
        )
        await self._label_video(followed.segment, followed)

    async def _track_video(self) -> None:
        if self._editor.has_layers:
            reason = "Classes overlap, and an object of a track has each pixel for itself: paint objects to track."
            self._tell(reason, is_error=True)
            return
        labels: list[np.ndarray | None] = [self._editor.mask.copy()]
        assert self._context.make_tracker is not None  # else there is no button
        tracker = self._context.make_tracker()

        def track(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
            given = [labels.pop() if labels else None for _ in frames]
            return self._context.model.track(tracker, frames, given, self._current)

        if self._editor.mask.any():
            await self._label_video(track)
        else:
            self._tell("The mask is empty: paint the objects to track.", is_error=True)

    async def _label_video(
        self, segment: Callable[[Sequence[np.ndarray]], Masks], followed: FollowedObjects | None = None
    ) -> None:
        if self.is_busy:
            return
        editor = self._editor
        draw = partial(editor.draw, opacity=self._opacity.value / 100) if followed is None else followed.draw

        def work() -> np.ndarray:
            with closing(self._open_video(self._opened)) as self._video:
                self._check_frame(0)
                palette = editor.labels.palette if followed is None else default_palette(256)
                return write_labelled_video(self._video, self.folder, palette, segment, draw, self._check_frame)

        with self._work("Queued ..."):
            async with self._context.video_queue:
                counts = await run_in_thread(work)
            for name in ("overlay.mp4", "masks.zip"):
                self.files[name] = self.folder / name
            self._stage.show(video=f"{self._address}/overlay.mp4?{secrets.token_hex(4)}")
            listed = ""
            if followed is not None:
                counts, numbers = followed.count_classes(counts)
                listed = self._list_objects(numbers)
            self._show_shares(counts, self._frames_done)
            self._tools.visible = False
            self._video_results.visible = True
            self._tell(f"Done: {self._frames_done} frames{listed}")

    def _check_frame(self, done: int) -> None:
        if self._current.is_cancelled:
            raise WorkCancelled
        self._frames_done = done

    def _cancel(self) -> None:
        self._current.is_cancelled = True
        if self._video is not None:
            self._video.kill()
