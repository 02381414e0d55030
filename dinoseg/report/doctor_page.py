"""HTML page with the findings of the data doctor: one self-contained file, offline, in a light and a dark theme."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from dinoseg.utils.wording import count_of

_LISTED = 200  # files listed per finding; doctor.json has all
_QUALITY = 85
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #667; --paper: #fff; --card: #f4f5f7; --line: #d5d8de;
  --error: #b3261e; --warning: #9a6200; --note: #2a5db0; --bar: #8ab0e8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --dim: #9aa0ab; --paper: #15171a; --card: #1f2226;
  --line: #3a3f47; --error: #ff8a80; --warning: #ffc266; --note: #8ab4f8; --bar: #3f6db3; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 70rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.finding { background: var(--card); border-left: .3rem solid; border-radius: .3rem; padding: .6rem 1rem;
  margin: .7rem 0; overflow-wrap: anywhere; }
.finding p { margin: .2rem 0; } .remedy, .dim { color: var(--dim); }
.error { border-color: var(--error); } .warning { border-color: var(--warning); } .note { border-color: var(--note); }
.error b { color: var(--error); } .warning b { color: var(--warning); } .note b { color: var(--note); }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.bar { display: inline-block; height: .7em; background: var(--bar); }
.swatch { display: inline-block; width: .8em; height: .8em; border: 1px solid var(--line); margin-right: .5em; }
ul { max-height: 20rem; overflow: auto; font: 13px/1.4 ui-monospace, monospace; }
figure { margin: 1rem 0; } figure img { max-width: 100%; border-radius: .3rem; }
"""


def doctor_page(
    title: str,
    findings: Sequence[Mapping[str, Any]],
    splits: Mapping[str, Mapping[str, Any]],
    palette: Sequence[Sequence[int]],
    pictures: Sequence[tuple[str, np.ndarray]],
) -> str:
    """Return the page as HTML.

    Args:
        title: name of the data set.
        findings: `severity`, `code`, `message`, `files`, `reasons` (of the files, or none), `remedy` and
            `stops_training` of each finding, in order.
        splits: `images`, `smallest` and `largest` (`width`, `height`), `void_share`, `constant_class` and `classes` of
            each split.
        palette: one colour per class.
        pictures: caption and pixels (H, W, 3) uint8 of each image.
    """
    counts = {kind: sum(each["severity"] == kind for each in findings) for kind in ("error", "warning", "note")}
    summary = ", ".join(count_of(count, kind) for kind, count in counts.items())
    parts = [
        f"<h1>{escape(title)}</h1><p>{summary}</p>",
        "<h2>Findings</h2>" + ("".join(map(_finding, findings)) or "<p>None.</p>"),
    ]
    if splits:
        parts.append("<h2>Splits</h2>" + _split_table(splits))
        parts.append("<h2>Classes</h2>" + _class_table(splits, palette))
    if pictures:
        parts.append("<h2>Pictures</h2>" + "".join(_figure(*picture) for picture in pictures))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _finding(finding: Mapping[str, Any]) -> str:
    severity, files = finding["severity"], finding["reasons"] or finding["files"]
    shown = "".join(f"<li>{escape(file)}</li>" for file in files[:_LISTED])
    more = f"<li>and {len(files) - _LISTED} more, in doctor.json</li>" if len(files) > _LISTED else ""
    listing = f"<details><summary>{len(files)} listed</summary><ul>{shown}{more}</ul></details>" if files else ""
    remedy = f'<p class="remedy">{escape(finding["remedy"])}</p>' if finding["remedy"] else ""
    also = ": training does not stop on it" if severity == "error" and not finding["stops_training"] else ""
    head = f'<p><b>{severity}</b> <span class="dim">{escape(finding["code"])}{also}</span></p>'
    return f'<div class="finding {severity}">{head}<p>{escape(finding["message"])}</p>{remedy}{listing}</div>'


def _split_table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            escape(name),
            f"{split['images']:,}",
            _size(split["smallest"]),
            _size(split["largest"]),
            _percent(split["void_share"]),
            _percent(split["constant_class"] and split["constant_class"]["miou"]),
        )
        for name, split in splits.items()
    ]
    sizes = ("smallest (width x height)", "largest (width x height)")
    return _table(("split", "images", *sizes, "ignored", "mIoU of one class everywhere"), rows)


def _class_table(splits: Mapping[str, Mapping[str, Any]], palette: Sequence[Sequence[int]]) -> str:
    names = list(splits)
    rows = []
    for index, row in enumerate(splits[names[0]]["classes"]):
        swatch = f'<span class="swatch" style="background: rgb({", ".join(map(str, palette[index]))})"></span>'
        cells = [f"{swatch}{index} {escape(row['class'])}"]
        for name in names:
            pixels = splits[name]["classes"][index]
            bar = f'<span class="bar" style="width: {6 * pixels["share"]:.2f}rem"></span>'
            cells += [f"{bar} {_percent(pixels['share'])}", f"{pixels['images']:,}"]
        rows.append(cells)
    heads = ["class"] + [text for name in names for text in (f"{escape(name)}: pixels", "images")]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(caption: str, pixels: np.ndarray) -> str:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert done
    source = f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
    return f'<figure><figcaption>{escape(caption)}</figcaption><img alt="{escape(caption)}" src="{source}"></figure>'


def _size(size: Mapping[str, int] | None) -> str:
    return f"{size['width']} x {size['height']}" if size else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
