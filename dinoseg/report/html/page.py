"""HTML pages from templates: each is one self-contained file without network requests."""

import base64
import hashlib
import io
import statistics
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dinoseg.report.table import percent
from dinoseg.utils.wording import count_of, printable

_TEMPLATES = Path(__file__).with_name("templates")
_PACKAGE = Path(__file__).parents[2]
_WEBP_QUALITY = 82


def render(template: str, **context: Any) -> str:
    """Return a template's page as HTML, with all text of the context escaped.

    A template of an extension is named from the package on, such as `extensions/compare/comparison.html.jinja`.
    The content security policy of `base.html.jinja` allows only our own script, by its hash, so that a name left
    unescaped by mistake runs nothing.
    """
    return _environment().get_template(template).render(context)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    templates = Environment(
        loader=FileSystemLoader([_TEMPLATES, _PACKAGE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
        finalize=_make_printable,
    )
    templates.filters |= {
        "percent": percent,
        "interval": format_interval,
        "count_of": count_of,
        "interval_head": interval_head,
        "data_uri": data_uri,
        "median": statistics.median,
    }
    templates.globals["position"] = position_in
    script = _TEMPLATES.joinpath("page.js").read_text(encoding="utf-8")
    templates.globals["script"] = Markup(script)  # noqa: S704 (our own file)
    templates.globals["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates.globals["style"] = Markup(_TEMPLATES.joinpath("page.css").read_text(encoding="utf-8"))
    return templates


def _make_printable(value: Any) -> Any:
    """Escape what controls a terminal or the direction of text; the environment itself escapes HTML."""
    return printable(value) if type(value) is str else value


def format_interval(limits: Sequence[float] | None, digits: int = 1, sign: str = "") -> str:
    """Return an interval of shares as percent; a dash if there is none."""
    return "-" if limits is None else " .. ".join(percent(end, digits, sign) for end in limits)


def interval_head(units: int, unit: str) -> str:
    """Return the heading of a column of intervals over units, which wraps only between its two halves."""
    halves = ("95 % interval", f"over {count_of(units, unit)}")
    return " ".join(half.replace(" ", "\u00a0") for half in halves)


def position_in(ends: Sequence[float], value: float) -> float:
    """Return the position of a value between two ends in percent; a value outside is moved to the nearer end."""
    low, high = ends
    return round(100 * (min(max(value, low), high) - low) / ((high - low) or 1), 2)


def data_uri(pixels: np.ndarray) -> str:
    """Return an image (H, W, 3) uint8 as a WebP data URI; (H, W, 4) as a PNG data URI."""
    kind, options = ("png", {}) if pixels.shape[2] == 4 else ("webp", {"quality": _WEBP_QUALITY, "method": 4})
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
