"""Report of tracked objects in videos: scores by video and by object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoseg.report.html.about import About, about_sections
from dinoseg.report.html.evaluation import interval_note, official_table, video_curves
from dinoseg.report.html.page import Section, page, paragraph, percent, spanned, tiles
from dinoseg.report.html.pictures import card
from dinoseg.report.html.tables import number_cell, plain_cell, table
from dinoseg.report.scores import few_units


@dataclass(frozen=True)
class TrackingReport:
    """Content of the page.

    Args:
        title: plain text.
        subtitle: a line below the title.
        result: result of `scoring.summary` for the videos.
        per_frame: name of the score that the page plots over the frames, and its values by video, if any.
        shown: name and blended frames, each frame with its name, of the worst videos, worst first.
        about: provenance of the evaluation.
    """

    title: str
    subtitle: str
    result: Mapping[str, Any]
    per_frame: tuple[str, Mapping[str, Sequence[float | None]]]
    shown: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]]
    about: About


def tracking_page(report: TrackingReport) -> str:
    """Return the page as HTML."""
    result, (name, curves) = report.result, report.per_frame
    sections = [_scores(result), _videos(result), *_objects(result)]
    if curves:
        sections.append(video_curves(curves, f"{name} %", result["unit"]))
    sections.append(_pictures(report))
    sections += about_sections(report.about)
    return page(report.title, report.subtitle, sections, [few_units(result["n"], result["unit"])])


def _scores(result: Mapping[str, Any]) -> Section:
    key = next(iter(result["scores"]))
    limits = result["ci95"][key]
    between = "no interval" if limits is None else f"95 %: {spanned(limits)}"
    body = tiles([(key, f"{percent(result['scores'][key])} %", between)]) + official_table(result)
    return Section("scores", "Scores", body + paragraph(interval_note(result["n"], result["unit"])))


def _videos(result: Mapping[str, Any]) -> Section:
    keys = list(result["scores"])
    rows = [
        [plain_cell(row["name"]), *(number_cell(row[key], percent(row[key])) for key in keys)] for row in _rows(result)
    ]
    heads = [(result["unit"], "text"), *((f"{key} %", "number") for key in keys)]
    return Section("by-video", f"Each {result['unit']}", table(heads, rows, "Click a heading to sort"))


def _objects(result: Mapping[str, Any]) -> list[Section]:
    """Return a table of objects; empty if the protocol has no scores by object."""
    held = [(row["name"], row["objects"]) for row in _rows(result) if isinstance(row.get("objects"), Mapping)]
    found = [(video, number, scores) for video, objects in held for number, scores in objects.items()]
    if not found:
        return []
    keys = list(found[0][2])
    rows = [
        [
            plain_cell(f"{video}: {number}"),
            *(
                number_cell(scores[key], str(scores[key]) if isinstance(scores[key], int) else percent(scores[key]))
                for key in keys
            ),
        ]
        for video, number, scores in found
    ]
    heads = [("object", "text"), *((key if key == "proposal" else f"{key} %", "number") for key in keys)]
    return [Section("objects", "Each object", table(heads, rows, "Click a heading to sort"))]


def _pictures(report: TrackingReport) -> Section:
    key = next(iter(report.result["scores"]))
    values = {row["name"]: row[key] for row in _rows(report.result)}
    cards = [card(name, f"{key} {percent(values[name])} %", frames) for name, frames in report.shown]
    none = "None: mode.metrics_only=true saves no blended frames."
    return Section("pictures", f"Worst {report.result['unit']}s", "".join(cards) or paragraph(none))


def _rows(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return result["per_video"]
