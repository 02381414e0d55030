"""The tab of features: an opened image beside the colours of its features, and similarities to clicked patches."""

import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nicegui import ui
from nicegui.events import GenericEventArguments
from PIL import Image

from dinoseg.extensions.feature_views.drawing import to_bytes
from dinoseg.extensions.feature_views.view import FeatureView, ImageFeatures, fit_basis
from dinoseg.extensions.serving.mask_editor import encode_image
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.extensions.serving.widgets import Component, Stage, add_button, add_slider
from dinoseg.extensions.serving.work import Work
from dinoseg.utils.wording import count_of

MAX_BYTES = 2**30  # of the features of all pages: 32 images of 1,024 pixels with 2,048 channels in patches of 16
_MAX_POINTS = 100  # that are averaged

Read = Callable[[Path], tuple[np.ndarray, int]]
Run = Callable[[str, Callable[[Work], str]], Awaitable[None]]
Wanted = tuple[tuple[Path, ...], int, tuple[tuple[float, float], ...]]  # images, number of the view, points


class UploadFeatures:
    """Features of opened images, computed once for each layer; the least recently used ones are evicted.

    Args:
        model: that all pages share.
        views: of its layers.
    """

    def __init__(self, model: SharedModel, views: Sequence[FeatureView]) -> None:
        self.model = model
        self.views = views
        self._known: OrderedDict[tuple[Path, int], tuple[ImageFeatures, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, layer: int, read: Read, work: Work) -> tuple[ImageFeatures, bytes]:
        """Return the features of an upload in the view of a number, and its image as a JPEG; only with a place.

        Args:
            path: of the upload, whose file never changes.
            layer: number of the view.
            read: decodes the upload.
            work: for which they are computed.
        """
        found = self._known.get((path, layer))
        if found is None:
            image, _ = read(path)
            with self.model.compute(work):
                found = self.views[layer].extract(image), encode_image(image)
        with self._lock:
            self._known[path, layer] = found
            self._known.move_to_end((path, layer))
            # two images are compared: the last two stay, whatever their size
            while (
                len(self._known) > 2 and sum(each.patches.values.nbytes for each, _ in self._known.values()) > MAX_BYTES
            ):
                self._known.popitem(last=False)
        return found

    def forget(self, folder: Path) -> None:
        """Drop the features of the uploads in a folder."""
        with self._lock:
            for key in [key for key in self._known if key[0].parent == folder]:
                del self._known[key]


class FeaturesPanel(Component, component="features.js"):
    """Rows of an image, its colours and its similarities."""


class FeaturesTab:
    """The tab of a page.

    Args:
        store: of the features.
        files: of the page, by the name in their address.
        address: of these files.
        read: decodes an upload; only with a place.
        run: runs a function in a thread unless the page is busy, and shows the text that it returns.
    """

    def __init__(self, store: UploadFeatures, files: dict[str, Any], address: str, read: Read, run: Run) -> None:
        self._store, self._files, self._address, self._read, self._run = store, files, address, read, run
        self._paths: tuple[Path, ...] = ()  # of the opened image, and of the one that is compared
        self._points: tuple[tuple[float, float], ...] = ()
        self._shown: Wanted = ((), 0, ())
        self._rows: list[dict[str, Any]] = []  # of the panel

    def build_panel(self) -> None:
        """Add the pictures to the page."""
        self._panel = FeaturesPanel().on("point", self._add_point)

    def build_card(self) -> Stage:
        """Add the other widgets to the page, and return the drop zone of the second image."""
        layers = [view.layer for view in self._store.views]
        with ui.card() as self._card:
            ui.label("Features").classes("heading")
            self._layer = add_slider("Layer: {}", 0, len(layers) - 1, self._update, layers)
            add_button("Clear clicks", self._clear_points, "outline")
            second = Stage()
            second.show(title="Drop a second image", hint="for comparison", small=True)
        self._layer.value = len(layers) - 1
        self._panel.visible = self._card.visible = False
        return second

    async def show(self, *, visible: bool) -> None:
        """Show or hide the tab."""
        self._panel.visible = self._card.visible = visible
        await self._update()

    async def open(self, path: Path) -> None:
        """Take another opened image; the second one stays."""
        self._paths = (path, *self._paths[1:])
        self._rows = []
        self._panel.show(rows=[])
        await self._clear_points()

    async def open_second(self, path: Path) -> None:
        """Take another second image and delete the former one, or this one if it cannot be shown."""
        former = self._paths
        self._paths = (*former[:1], path)
        await self._update()
        if self._shown[0] != self._paths:
            self._paths, former = former, self._paths
        for each in former[1:]:
            each.unlink(missing_ok=True)

    async def _clear_points(self) -> None:
        self._points = ()
        await self._update()

    async def _add_point(self, event: GenericEventArguments) -> None:
        try:
            x, y = map(float, event.args)
        except (TypeError, ValueError, OverflowError):  # of a click that no page sends
            return
        is_inside = self._rows and 0 <= x < self._rows[0]["width"] and 0 <= y < self._rows[0]["height"]
        if is_inside and len(self._points) < _MAX_POINTS:
            self._points += ((x, y),)
            await self._update()

    async def _update(self) -> None:
        """Show the images, layer and points that are wanted, also those that are chosen meanwhile."""
        while self._panel.visible and self._paths and self._shown != self._wanted:
            wanted = self._wanted
            await self._run("Computing features ...", partial(self._compute, wanted))
            if self._shown != wanted:  # the page is busy, or it failed
                return
            self._panel.show(rows=self._rows, points=wanted[2])

    @property
    def _wanted(self) -> Wanted:
        return self._paths, int(self._layer.value), self._points

    def _compute(self, wanted: Wanted, work: Work) -> str:
        """Make the rows of the panel, and return a text on them."""
        paths, layer, points = wanted
        view = self._store.views[layer]
        with self._store.model.hold_place(work):
            images, shown = zip(*[self._store.get(path, layer, self._read, work) for path in paths], strict=True)
            if self._shown[:2] != wanted[:2]:
                self._rows = self._draw(images, shown, view.patch_size)
            for number, row in enumerate(self._rows):
                cosines = view.similarity(images[0], points, images[number]).tobytes() if points else b""
                row["cosines"] = self._publish(f"cosines{number}.bin", cosines)
        self._shown = wanted
        return f"Features of layer {view.layer}; {count_of(len(points), 'click')}"

    def _draw(self, images: Sequence[ImageFeatures], shown: Sequence[bytes], patch_size: int) -> list[dict[str, Any]]:
        """Return a row for each image, with colours in one basis."""
        components = range(1, 1 + min(3, images[0].patches.values.shape[2]))
        basis = fit_basis(lambda: [image.patches for image in images], components, {})
        rows = []
        for number, (patches, (height, width)) in enumerate(images):
            colours = io.BytesIO()
            Image.fromarray(to_bytes(basis.colours(basis.project(patches.values)))).save(colours, format="PNG")
            row = {
                "image": self._publish(f"view{number}.jpg", shown[number]),
                "colours": self._publish(f"colours{number}.png", colours.getvalue()),
                "width": width,
                "height": height,
                "grid": patches.values.shape[:2],
                "seen": [side / patch_size for side in patches.size],  # in patches; the last ones may exceed it
            }
            rows.append(row)
        return rows

    def _publish(self, name: str, content: bytes) -> str:
        """Return the new address of a file of the page."""
        self._files[name] = content
        return f"{self._address}/{name}?{secrets.token_hex(4)}"
