"""The report of an evaluation of tracked objects, from the scores that it has just written."""

import json
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from dinoseg.core.sizes import evenly_spaced
from dinoseg.evaluation.about import Origin, about_run
from dinoseg.report.html.tracking import TrackingReport, tracking_page
from dinoseg.report.overlay import reduced
from dinoseg.utils.atomic import write_text
from dinoseg.utils.files import entries
from dinoseg.utils.images import IMAGE_SUFFIXES, read_image
from dinoseg.utils.natural_order import natural_order

PAGE = "report.html"  # in a run folder
_SHOWN = 6  # worst videos
_FRAMES = 4  # of each
_LONGEST = 480  # pixels of a picture's longer side
_SERIES = "J&F_per_frame"  # of protocols that score each frame


def report_videos(cfg: DictConfig, out_dir: Path, blends: Path | None, *, split: str, best: Path | None = None) -> None:
    """Write report.html from scores.json and some blended frames; nothing where there are no scores.

    Args:
        cfg: the whole config.
        out_dir: the run folder.
        blends: folder of folders of blended frames; None: there are none.
        split: of the data.
        best: of a training that ends with this evaluation: its best checkpoint.
    """
    scores = out_dir / "scores.json"
    if not scores.is_file():
        return
    result = json.loads(scores.read_text(encoding="utf-8"))
    key = next(iter(result["scores"]))
    rows = [row for row in result["per_video"] if row[key] is not None]
    worst = [row["name"] for row in sorted(rows, key=lambda row: row[key])[:_SHOWN]]
    curves = {row["name"]: row[_SERIES] for row in rows if _SERIES in row}
    origin = Origin.of(cfg, out_dir, best)
    model = "labels propagated without training" if origin.training is None else origin.model
    report = TrackingReport(
        title=f"{cfg.choices.data}, split {split}: {result['protocol']}",
        said=f"backbone={cfg.choices.backbone}, {model}",
        result=result,
        per_frame=(_SERIES.partition("_")[0], curves),
        shown=[] if blends is None else [(name, _frames(blends / name)) for name in worst],
        about=about_run(cfg, origin.folder, {"model": model}),
    )
    write_text(out_dir / PAGE, tracking_page(report))
    print(f"report:       {out_dir}/{PAGE}")


def _frames(folder: Path) -> list[tuple[str, np.ndarray]]:
    """Return some evenly spaced blended frames of a video with their names."""
    found = [path for path in entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = sorted(found, key=lambda path: natural_order(path.name))
    places = evenly_spaced(len(paths), _FRAMES)
    return [(paths[place].stem, reduced(read_image(paths[place]), _LONGEST)) for place in places]
