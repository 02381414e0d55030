"""What a mask is sent as: a picture with a palette, plain ids, run lengths, or colours over a frame."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dinoseg.core.shapes import Palette
from dinoseg.data.annotation.rle import encode, to_text
from dinoseg.export.runtime.facts import Facts
from dinoseg.report.indexed import indexed
from dinoseg.report.overlay import blend
from dinoseg.serving.limits import Refused

FORMATS = ("palette", "ids", "rle")


@dataclass(frozen=True)
class Look:
    """What ids in the masks of a clip are called and look like.

    Args:
        names: of an id.
        palette: a colour for each.
        ignore_index: shown as ignored.
        opacity: 0..1, 1 = colours only.
        hidden: ids that leave the frame as it is.
    """

    names: Callable[[int], str]
    palette: Palette
    ignore_index: int = 255
    opacity: float = 0.5
    hidden: frozenset[int] = frozenset()

    def over(self, frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return a frame (H, W, 3) uint8 with its mask (H, W) uint8 over it."""
        tinted = blend(frame, mask, self.palette, ignore_index=self.ignore_index, opacity=self.opacity)
        if self.hidden:
            plain = np.isin(mask, list(self.hidden))
            tinted[plain] = frame[plain]
        return tinted


def wanted_format(request: Request) -> str:
    """Return what a request asks for: by `?format=`, else by its Accept header; a picture with a palette otherwise.

    Raises:
        Refused: there is no such format.
    """
    asked = request.query_params.get("format")
    if asked is None:
        accepted = request.headers.get("accept", "")
        return "rle" if "application/json" in accepted and "image/" not in accepted else "palette"
    if asked not in FORMATS:
        raise Refused(400, "answer_format", f"format={asked!r} is unknown. Choose one of {', '.join(FORMATS)}.")
    return asked


def encoder(kind: str, facts: Facts) -> Callable[[np.ndarray], Response]:
    """Return what makes an answer of class ids (H, W) uint8."""
    if kind == "rle":
        return lambda ids: JSONResponse(as_run_lengths(ids, facts))
    colours = facts.palette if kind == "palette" else None
    return lambda ids: Response(png(ids, colours), media_type="image/png")


def png(ids: np.ndarray, palette: tuple[tuple[int, int, int], ...] | None) -> bytes:
    """Return ids (H, W) uint8 as a PNG, with a palette or grey."""
    file = io.BytesIO()
    (Image.fromarray(ids) if palette is None else indexed(ids, palette)).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def areas(ids: np.ndarray, facts: Facts) -> list[dict[str, Any]]:
    """Return for each class in a mask its id, name, colour, pixels and share of the mask."""
    counts = np.bincount(ids.ravel(), minlength=1)
    return [
        {
            "id": int(label),
            "name": facts.classes[label],
            "colour": list(facts.palette[label]),
            "pixels": int(counts[label]),
            "share": int(counts[label]) / ids.size,
        }
        for label in np.flatnonzero(counts)
    ]


def as_run_lengths(ids: np.ndarray, facts: Facts) -> dict[str, Any]:
    """Return a mask as its size and, for each class in it, what `areas` says and COCO's compressed run lengths."""
    size = list(ids.shape)

    def with_lengths(area: dict[str, Any]) -> dict[str, Any]:
        return {**area, "rle": {"size": size, "counts": to_text(encode(ids == area["id"]))}}

    return {"size": size, "segments": [with_lengths(area) for area in areas(ids, facts)]}
