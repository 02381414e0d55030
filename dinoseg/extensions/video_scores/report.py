"""Report of an evaluation on videos, from its scores and blended frames."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoseg.core.sizes import evenly_spaced
from dinoseg.evaluation.run_facts import about_run
from dinoseg.experiment.provenance import Provenance
from dinoseg.report.html.evaluation import video_charts
from dinoseg.report.html.page import render
from dinoseg.report.overlay import downscale
from dinoseg.report.table import few_units, percent
from dinoseg.utils.atomic import write_text
from dinoseg.utils.files import entries, natural_order
from dinoseg.utils.images import IMAGE_SUFFIXES, read_image

PAGE = "report.html"  # in a run folder
_SHOWN = 6  # worst videos
_FRAMES = 4  # per video
_LONGEST = 480  # pixels of an image's longer side
_SERIES = "J&F_per_frame"  # key of per-frame scores, if the protocol has them


def report_videos(provenance: Provenance, out_dir: Path, blends: Path | None, *, split: str) -> None:
    """Write report.html from scores.json and some blended frames; a no-op without scores.

    Args:
        provenance: the run and its model.
        out_dir: the run folder.
        blends: folder with one blend folder per video; None without blends.
        split: split of the data.
    """
    scores = out_dir / "scores.json"
    if not scores.is_file():
        return
    result = json.loads(scores.read_text(encoding="utf-8"))
    key = next(iter(result["scores"]))
    rows = [row for row in result["per_video"] if row[key] is not None]
    worst = sorted(rows, key=lambda row: row[key])[:_SHOWN]
    curves = {row["name"]: row[_SERIES] for row in rows if _SERIES in row}
    curve_name = f"{_SERIES.partition('_')[0]} %"
    model = "labels propagated without training" if provenance.training is None else provenance.model
    choices = provenance.choices
    page = render(
        "extensions/video_scores/tracking.html.jinja",
        title=f"{choices['data']}, split {split}: {result['protocol']}",
        subtitle=f"backbone={choices['backbone']}, {model}",
        warnings=[few_units(result["n"], result["unit"])],
        result=result,
        objects=[
            (f"{row['name']}: {number}", scores)
            for row in result["per_video"]
            if isinstance(row.get("objects"), Mapping)
            for number, scores in row["objects"].items()
        ],
        videos=video_charts(curves, curve_name),
        curve_name=curve_name,
        cards=[
            _blend_card(blends / row["name"], row["name"], f"{key} {percent(row[key])} %")
            for row in worst
            if blends is not None
        ],
        about=about_run(provenance.folder, provenance.config, {"model": model}),
    )
    write_text(out_dir / PAGE, page)
    print(f"report:       {out_dir}/{PAGE}")


def _blend_card(folder: Path, video: str, summary: str) -> dict[str, Any]:
    """Return a card of some evenly spaced blended frames of a video."""
    found = [path for path in entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = sorted(found, key=lambda path: natural_order(path.name))
    places = evenly_spaced(len(paths), _FRAMES)
    panels = [(paths[index].stem, downscale(read_image(paths[index]), _LONGEST)) for index in places]
    return {"title": video, "summary": summary, "panels": panels, "legend": []}
