"""The model card of a hub's repository: what a model's facts say, in Markdown."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dinoseg.export.runtime.facts import UNKNOWN, Facts
from dinoseg.utils.wording import printable

_HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # ours to the hub's names; others are "other"
_UNSAFE = re.compile("[`|<>]")  # they end a span of code or a cell of a table, or begin HTML


def model_card(facts: Facts, repo_id: str) -> str:
    """Return the card's text; whatever a file says stands in it as text alone."""
    return (
        "\n".join([*_header(facts), *_use(facts, repo_id), *_classes(facts), *_scores(facts), *_origin(facts)]) + "\n"
    )


def _header(facts: Facts) -> Iterator[str]:
    licence = str(facts.backbone.get("licence", UNKNOWN))
    yield "---"
    yield f"license: {_HUB_LICENCES.get(licence, 'other')}"
    if licence not in _HUB_LICENCES:
        yield f"license_name: {json.dumps(licence)}"  # a JSON string is one of YAML
    yield "library_name: dinoseg"
    yield "pipeline_tag: image-segmentation"
    yield "---"
    yield ""


def _use(facts: Facts, repo_id: str) -> Iterator[str]:
    backbone = _text(facts.backbone.get("name", UNKNOWN))
    yield f"# {repo_id}"
    yield ""
    yield f"Semantic segmentation, {len(facts.classes)} classes, on the backbone {backbone}; made with dinoseg."
    yield ""
    yield "```python"
    yield "from dinoseg import Model"
    yield ""
    yield f"model = Model.from_pretrained({repo_id!r})"
    yield 'out = model.predict("picture.jpg")'
    yield "out.mask, out.areas, out.overlay()"
    yield "```"
    yield ""
    if facts.delta:
        yield (
            f"The file holds what was trained alone. The backbone comes from {_text(facts.backbone.get('weights'))}, "
            f"revision {_text(facts.backbone.get('revision') or UNKNOWN)}, when it is loaded."
        )
        yield ""


def _classes(facts: Facts) -> Iterator[str]:
    yield "## Classes"
    yield ""
    yield "| id | name | colour | IoU |"
    yield "|---|---|---|---|"
    per_class = (facts.scores or {}).get("per_class")
    for number, (name, colour) in enumerate(zip(facts.classes, facts.palette, strict=True)):
        yield f"| {number} | {_text(name)} | {tuple(colour)} | {_percent(_at(per_class, name))} |"
    yield ""


def _scores(facts: Facts) -> Iterator[str]:
    yield "## Scores"
    yield ""
    if facts.scores is None:
        yield "None were recorded with the file."
        yield ""
        return
    data, split = facts.data.get("name", UNKNOWN), facts.scores.get("split")
    yield f"On the split {_text(split)} of {_text(data)}: {_text(facts.scores.get('protocol'))}."
    yield ""
    yield from _table(facts.scores.get("values"), facts.scores.get("ci95"))
    official = facts.scores.get("official")
    if isinstance(official, Mapping):
        count, unit = _text(official.get("n")), _text(official.get("unit"))
        yield f"By the protocol {_text(official.get('protocol'))}, 95 % intervals over {count} units ({unit}):"
        yield ""
        yield from _table(official.get("scores"), official.get("ci95"))


def _origin(facts: Facts) -> Iterator[str]:
    yield "## Where it comes from"
    yield ""
    for key in ("name", "weights", "revision", "hash", "licence"):
        yield f"- backbone {key}: {_text(facts.backbone.get(key) or UNKNOWN)}"
    for side, what in facts.data.items():
        if isinstance(what, Mapping):
            count, digest = _text(what.get("count")), _text(what.get("names_sha256"))
            yield f"- data {_text(side)}: {count} images, SHA-256 of their names {digest}"
    yield f"- made with: {', '.join(f'{_text(name)} {_text(number)}' for name, number in facts.versions.items())}"
    yield ""
    yield "## Limits"
    yield ""
    largest = facts.sizes.get("largest")
    if largest:
        yield (
            f"Its training images had about {_text(facts.sizes.get('typical'))} pixels on the longer side, enlarged at "
            f"most to {_text(largest)}. Larger pictures are reduced to that scale before the model sees them."
        )
    yield "Scores are of one data set: on other cameras, places or tissues it may do worse, and does not say so."


def _table(values: Any, intervals: Any) -> Iterator[str]:
    if not isinstance(values, Mapping):
        return
    yield "| score | % | 95 % interval |"
    yield "|---|---|---|"
    for key, value in values.items():
        limits = _at(intervals, key)
        interval = " .. ".join(map(_percent, limits)) if isinstance(limits, list) else "-"
        yield f"| {_text(key)} | {_percent(value)} | {interval} |"
    yield ""


def _at(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}" if type(value) in (int, float) and 0 <= value <= 1 else "-"


def _text(value: Any) -> str:
    """Return a value as a number or one span of code, in which nothing is a link, emphasis or HTML."""
    if type(value) in (int, float):
        return str(value)
    text = _UNSAFE.sub(lambda letter: f"\\x{ord(letter[0]):02x}", printable(" ".join(str(value).split())))
    return f"`{text or ' '}`"
