"""HTML frame of every report: one self-contained file without network requests."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dinoseg.utils.wording import printable

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Args:
        name: anchor, one word.
        title: plain text.
        body: HTML with all text from data escaped.
    """

    name: str
    title: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section], warnings: Sequence[str] = ()) -> str:
    """Return the whole page as HTML.

    The content security policy allows only our own script, by its hash, so that a name left unescaped by mistake runs
    nothing.

    Args:
        title: plain text.
        subtitle: a line below the title, plain text.
        sections: sections, in order.
        warnings: plain texts above the sections; empty ones are left out.
    """
    style, script = (_HERE.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{each.name}">{text(each.title)}</a>' for each in sections)
    parts = "\n".join(
        f'<section id="{each.name}"><h2>{text(each.title)}</h2>\n{each.body}</section>' for each in sections
    )
    warned = "".join(f'<p class="warn">{text(warning)}</p>' for warning in warnings if warning)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>{style}</style></head>\n<body>\n'
        f'<header><h1>{text(title)}</h1><button id="theme" type="button" hidden>light / dark</button></header>\n'
        f'<p class="dim">{text(subtitle)}</p>\n<nav aria-label="sections">{links}</nav>\n'
        f"{warned}\n<main>\n{parts}\n</main>\n<script>{script}</script>\n</body></html>\n"
    )


def text(value: object) -> str:
    """Return plain text as HTML: escaped, without characters that control a terminal or the text direction."""
    return escape(printable(str(value)))


def paragraph(*sentences: str, kind: str = "note") -> str:
    """Return plain text as a paragraph."""
    return f'<p class="{kind}">{text(" ".join(sentences))}</p>'


def block(title: str, content: str, *, shut: bool = True) -> str:
    """Return multi-line plain text in a collapsible element, opened by its title."""
    return f"<details{'' if shut else ' open'}><summary>{text(title)}</summary><pre>{text(content)}</pre></details>"


def values(name: str, value: Any) -> str:
    """Return plain values as an inert JSON element, which a script reads by its id."""
    content = json.dumps(value, ensure_ascii=True).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{content}</script>'


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in 0..1 as percent; a dash if undefined."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def spanned(limits: Sequence[float] | None, digits: int = 1, sign: str = "") -> str:
    """Return an interval of shares as percent; a dash if there is none."""
    return "-" if limits is None else " .. ".join(f"{100 * end:{sign}.{digits}f}" for end in limits)


def tiles(shown: Sequence[tuple[str, str, str]]) -> str:
    """Return large values, each with a name and a note, all plain texts."""
    cells = (
        f'<div class="tile">{text(name)}<b>{text(value)}</b><span>{text(note)}</span></div>'
        for name, value, note in shown
    )
    return f'<div class="tiles">{"".join(cells)}</div>'
