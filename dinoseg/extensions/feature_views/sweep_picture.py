"""Picture of a sweep of mode=features: the colours of its jobs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.report.overlay import downscale, side_by_side, stack_vertically
from dinoseg.utils import forms
from dinoseg.utils.images import read_image, write_png
from dinoseg.utils.wording import count_of

SUMMARY = "summary.json"  # in the folder of a job
PICTURE = "features.png"  # in the folder of the sweep
_FORM = forms.object_with(inputs=forms.table(forms.table(forms.plain)))
_ROWS = 5  # inputs that are shown
_LONGEST = 512  # pixels of a panel


def draw_sweep(folder: Path, jobs: Sequence[tuple[Mapping[str, str], Path]]) -> None:
    """Write a picture with a row for each input of all jobs: the image, or a video's first frame, and their colours.

    There is none of a single job, of a swept `input`, or without an input that all jobs have shown.

    Args:
        folder: of the sweep.
        jobs: swept values by key, and the run folder, of each job.
    """
    found = [forms.read_json(run / SUMMARY, _FORM)["inputs"] for _, run in jobs]
    names = [name for name in found[0] if all(name in inputs for inputs in found)] if len(jobs) > 1 else []
    if not names or "input" in jobs[0][0]:
        return
    captions = [" ".join(f"{key}={value}" for key, value in values.items()) for values, _ in jobs]
    rows = []
    for name in names[:_ROWS]:
        shown = [_read_panels(run, name, inputs[name]) for (_, run), inputs in zip(jobs, found, strict=True)]
        panels = [shown[0][0], *(colours for _, colours in shown)]
        rows.append(side_by_side([*zip([name, *captions], panels, strict=True)]))
    write_png(folder / PICTURE, stack_vertically(rows))
    more = f", {len(rows)} of {count_of(names, 'input')}" if len(names) > _ROWS else ""
    print(f"side by side: {folder / PICTURE}{more}")


def _read_panels(run: Path, name: str, figures: Mapping[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and its colours; those after training, if a job shows both."""
    path = run / f"{name}_features.png"
    if path.exists():
        picture = read_image(path)
    else:
        with VideoReader(path.with_suffix(".mp4")) as reader:
            picture = next(iter(reader))
    panels = np.split(picture, 4 if "cosine" in figures else 2, axis=1)
    return downscale(panels[0], _LONGEST), downscale(panels[len(panels) // 2], _LONGEST)
