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
from nicegui.element import Element
from nicegui.events import GenericEventArguments
from PIL import Image

from dinoseg.extensions.feature_views.drawing import to_bytes
from dinoseg.extensions.feature_views.view import FeatureView, ImageFeatures, fit_basis
from dinoseg.extensions.serving.mask_editor import encode_image
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.extensions.serving.widgets import Stage, add_button, add_slider
from dinoseg.extensions.serving.work import Work
from dinoseg.utils.wording import count_of

MAX_BYTES = 2**30  # of the features of all pages: 32 images of 1,024 pixels with 2,048 channels in patches of 16
_MAX_POINTS = 100  # that are averaged

Wanted = tuple[tuple[Path, ...], int, tuple[tuple[float, float], ...]]  # images, number of the view, points
Run = Callable[[str, Callable[[Work], str]], Awaitable[None]]


class FeatureStore:
    """Features of opened images, computed once for each layer; the least recently used ones are evicted.

    Args:
        model: that all pages share.
        views: of its layers.
    """

    def __init__(self, model: SharedModel, views: Sequence[FeatureView]) -> None:
        self.model = model
        self.views = views
        self._known: OrderedDict[tuple[Path, int], ImageFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, layer: int, read: Callable[[], np.ndarray], work: Work) -> ImageFeatures:
        """Return the features of an upload, whose file never changes.

        Args:
            path: of the upload.
            layer: number of the view.
            read: decodes the upload.
            work: for which they are computed.
        """
        key = (path, layer)
        found = self._known.get(key)
        if found is None:
            found = self.model.extract(self.views[layer], read(), work)
        with self._lock:
            self._known[key] = found
            self._known.move_to_end(key)
            # two images are compared: the last two stay, whatever their size
            while len(self._known) > 2 and sum(each.patches.values.nbytes for each in self._known.values()) > MAX_BYTES:
                self._known.popitem(last=False)
        return found

    def forget(self, path: Path) -> None:
        """Drop the features of an upload."""
        with self._lock:
            for key in [key for key in self._known if key[0] == path]:
                del self._known[key]


class FeaturesPanel(Element, component="features.js"):
    """Rows of an image, its colours and its similarities."""

    def show(self, **props: Any) -> None:
        """Set properties of the component."""
        self._props.update(props)
        self.update()


class FeaturesTab:
    """The tab of a page.

    Args:
        store: of the features.
        files: of the page, by the name in their address.
        address: of these files.
        read: decodes an upload; only with a place.
        run: runs a function in a thread unless the page is busy, and shows the text that it returns.
    """

    def __init__(
        self,
        store: FeatureStore,
        files: dict[str, Any],
        address: str,
        read: Callable[[Path], tuple[np.ndarray, int]],
        run: Run,
    ) -> None:
        self._store, self._files, self._address, self._read, self._run = store, files, address, read, run
        self._paths: tuple[Path, ...] = ()  # of the opened image, and of the one that is compared
        self._points: tuple[tuple[float, float], ...] = ()
        self._shown: Wanted = ((), 0, ())
        self._rows: list[dict[str, Any]] = []  # of the panel

    def build_panel(self) -> None:
        """Add the pictures to the page."""
        self._panel = FeaturesPanel().on("point", self._add_point)
        self._panel.visible = False

    def build_card(self) -> Stage:
        """Add the widgets to the page, and return the drop zone of the second image."""
        layers = [view.layer for view in self._store.views]
        with ui.card() as self._card:
            ui.label("Features").classes("heading")
            self._layer = add_slider("Layer: {}", 0, len(layers) - 1, self._update, layers)
            self._layer.value = len(layers) - 1
            add_button("Clear clicks", self._clear_points, "outline")
            self._second = Stage()
            self._second.show(title="Drop a second image", small=True)
        self._card.visible = self._second.visible = False
        return self._second

    async def show(self, *, visible: bool) -> None:
        """Show or hide the tab."""
        self._panel.visible = self._card.visible = visible
        await self._update()

    async def open(self, path: Path) -> None:
        """Take another opened image; the second one stays."""
        self._forget(self._paths[:1])
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
        self._forget(former[1:])
        for each in former[1:]:
            each.unlink(missing_ok=True)

    def close(self) -> None:
        """Drop the features."""
        self._forget(self._paths)

    def _forget(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._store.forget(path)
            self._files.pop(f"{path.name}.jpg", None)

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
            self._second.visible = True

    @property
    def _wanted(self) -> Wanted:
        return self._paths, int(self._layer.value), self._points

    def _compute(self, wanted: Wanted, work: Work) -> str:
        """Make the rows of the panel, and return a text on them."""
        paths, layer, points = wanted
        view = self._store.views[layer]
        with self._store.model.hold_place(work):
            images = [self._store.get(path, layer, partial(self._decode, path), work) for path in paths]
            if self._shown[:2] != wanted[:2]:
                self._rows = self._draw(images, view.patch_size, paths)
            text = f"Features of layer {view.layer}"
            if points:
                text += f"; similarity to {count_of(len(points), 'clicked patch', 'clicked patches')}"
            for number, row in enumerate(self._rows):
                row["cosines"], row["best"] = "", None
                if points:
                    cosines = view.similarity(images[0], points, images[number])
                    row["cosines"] = self._publish(f"cosines{number}.bin", cosines.tobytes())
                    row["best"] = _find_best(cosines, row) if number else None
        self._shown = wanted
        return text

    def _decode(self, path: Path) -> np.ndarray:
        image, _ = self._read(path)
        self._files[f"{path.name}.jpg"] = encode_image(image)
        return image

    def _draw(self, images: Sequence[ImageFeatures], patch_size: int, paths: Sequence[Path]) -> list[dict[str, Any]]:
        """Return a row for each image, with colours in one basis."""
        components = range(1, 1 + min(3, images[0].patches.values.shape[2]))
        basis = fit_basis(lambda: [image.patches for image in images], components, {})
        rows = []
        for number, (patches, (height, width)) in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(to_bytes(basis.colours(basis.project(patches.values)))).save(file, format="PNG")
            row = {
                "image": f"{self._address}/{paths[number].name}.jpg",
                "colours": self._publish(f"colours{number}.png", file.getvalue()),
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


def _find_best(cosines: np.ndarray, row: dict[str, Any]) -> list[float]:
    """Return x and y of the middle of the most similar patch's part in the image, in pixels, and its similarity."""
    place = np.unravel_index(cosines.argmax(), cosines.shape)
    y, x = ((at + min(at + 1, seen)) / (2 * seen) for at, seen in zip(place, row["seen"], strict=True))
    return [float(x * row["width"]), float(y * row["height"]), float(cosines.max())]
