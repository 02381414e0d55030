"""Response formats of masks: PNG with a palette, grey ids, run lengths, or an overlay over a frame."""

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
from dinoseg.export.runtime.facts import ModelFacts
from dinoseg.report.indexed import indexed
from dinoseg.report.overlay import blend
from dinoseg.serving.limits import Refused

FORMATS = ("palette", "ids", "rle")


@dataclass(frozen=True)
class MaskStyle:
    """Names, colours and visibility of the ids in a clip's masks.

    Args:
        names: maps an id to its name.
        palette: a colour for each id.
        ignore_index: id that is shown as ignored.
        opacity: 0..1, 1 = colours only.
        hidden: ids where the frame shows without a colour.
    """

    names: Callable[[int], str]
    palette: Palette
    ignore_index: int = 255
    opacity: float = 0.5
    hidden: frozenset[int] = frozenset()

    def over(self, frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return a frame (H, W, 3) uint8 with its mask (H, W) uint8 overlaid."""
        tinted = blend(frame, mask, self.palette, ignore_index=self.ignore_index, opacity=self.opacity)
        if self.hidden:
            plain = np.isin(mask, list(self.hidden))
            tinted[plain] = frame[plain]
        return tinted


def wanted_format(request: Request) -> str:
    """Return the response format of a request: `?format=`, else by its Accept header, else `palette`.

    Raises:
        Refused: if the format is unknown.
    """
    requested = request.query_params.get("format")
    if requested is None:
        accepted = request.headers.get("accept", "")
        return "rle" if "application/json" in accepted and "image/" not in accepted else "palette"
    if requested not in FORMATS:
        raise Refused(400, "answer_format", f"format={requested!r} is unknown. Choose one of {', '.join(FORMATS)}.")
    return requested


def encoder(kind: str, facts: ModelFacts) -> Callable[[np.ndarray], Response]:
    """Return the function that turns class ids (H, W) uint8 into a response."""
    if kind == "rle":
        return lambda ids: JSONResponse(as_run_lengths(ids, facts))
    colours = facts.palette if kind == "palette" else None
    return lambda ids: Response(png(ids, colours), media_type="image/png")


def png(ids: np.ndarray, palette: tuple[tuple[int, int, int], ...] | None) -> bytes:
    """Encode ids (H, W) uint8 as a PNG, with a palette or in grey."""
    file = io.BytesIO()
    (Image.fromarray(ids) if palette is None else indexed(ids, palette)).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def areas(ids: np.ndarray, facts: ModelFacts) -> list[dict[str, Any]]:
    """Return id, name, colour, pixels and share of the mask for each class in it."""
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


def as_run_lengths(ids: np.ndarray, facts: ModelFacts) -> dict[str, Any]:
    """Return a mask's size and, for each class in it, the entry of `areas` with COCO's compressed run lengths."""
    size = list(ids.shape)

    def with_lengths(area: dict[str, Any]) -> dict[str, Any]:
        return {**area, "rle": {"size": size, "counts": to_text(encode(ids == area["id"]))}}

    return {"size": size, "segments": [with_lengths(area) for area in areas(ids, facts)]}
