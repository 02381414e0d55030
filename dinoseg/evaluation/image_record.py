"""Record of an image evaluation for comparisons: per-image counts and metadata, stored without pickle."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import BETTER
from dinoseg.evaluation.class_scores import ClassScores
from dinoseg.evaluation.further_scores import FurtherScore
from dinoseg.evaluation.run_facts import EVALUATION, TRACKING
from dinoseg.evaluation.scoring.units import has_labels, unit_sums
from dinoseg.report.html.pictures import EvaluatedImages
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_file, write_json
from dinoseg.utils.errors import UserError

RECORD, COUNTS = "evaluation.json", "counts.npz"  # in a run folder
_REMEDY = "Evaluate again: python -m dinoseg mode=eval resume=RUN, where RUN is the run folder of the training."
_MAX_CLASSES = 256
_LARGEST = 2**28  # maximum bytes of the JSON file: names of half a million images, and a few scores without each
_FRAMING = 4096  # bytes of an NPZ file of one array in addition to its values
_SHARE = forms.number(-1e-6, 1 + 1e-6)  # means may be rounded
_COLOUR = forms.row(*[forms.whole(0, 255)] * 3)
_FORM = forms.record(
    classes=forms.list_of(forms.text),
    palette=forms.list_of(_COLOUR),
    ignore_index=forms.whole(0, 255),
    background=forms.maybe(forms.whole(0, 255)),
    data=forms.text,
    root=forms.text,
    split=forms.text,
    unit=forms.text,
    images=forms.list_of(forms.text),
    units=forms.list_of(forms.text),
    source=forms.text,
    scores=forms.table(
        forms.record(
            better=forms.text,
            settings=forms.text,
            value=forms.maybe(_SHARE),
            left_out=forms.list_of(forms.maybe(_SHARE)),
            scored=forms.list_of(forms.flag),
        )
    ),
)


@dataclass(frozen=True)
class ImageRecord(EvaluatedImages):
    """Per-image counts of an evaluation, with metadata.

    Args:
        background: id of the background class; None without one.
        data: option of the config group `data`.
        root: absolute path of the data set's folder.
        split: train, val or test.
        source: origin of the model.
        counts: (N, 3, K) int64 of `MeanIoU`; of layers, (N, 4, K).
        scores: scores of further metrics by name.
    """

    background: int | None
    data: str
    root: str
    split: str
    source: str
    counts: np.ndarray
    scores: Mapping[str, FurtherScore] = field(default_factory=dict)

    @property
    def scored_units(self) -> np.ndarray:
        """Which units (U,) have labelled pixels, in the order of their first images."""
        return has_labels(unit_sums(self.counts, self.units))

    def count_units(self) -> int:
        """Return the number of different units with labelled pixels, over which intervals are computed."""
        return int(self.scored_units.sum())

    @property
    def task(self) -> str:
        """The option of the group `task` of the model."""
        return "multilabel" if self.counts.shape[1] == 4 else "semantic"


def write_record(record: ImageRecord, out_dir: Path) -> None:
    """Write a record into a run folder: the counts first, so that a JSON file implies complete counts."""
    content: dict[str, Any] = {key: value for key, value in vars(record).items() if key != "counts"}
    with atomic_file(out_dir / COUNTS) as part, part.open("wb") as file:
        np.savez(file, classes=record.counts.astype("<i8"))
    content["scores"] = {name: asdict(score) for name, score in record.scores.items()}
    content["palette"] = [[int(level) for level in colour] for colour in record.palette]
    write_json(
        out_dir / RECORD, {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
    )


def find_evaluation(folder: Path) -> Path:
    """Return the folder of a run's evaluation record: the run folder, or the evaluation at the end of a training.

    Raises:
        UserError: the record is missing.
    """
    if not folder.is_dir():
        raise UserError(f"runs: {folder} is not a folder. Give run folders of mode=eval or mode=train.")
    for path in (folder, folder / EVALUATION):
        if (path / RECORD).is_file():
            return path
        if (path / TRACKING).is_file():
            raise UserError(
                f"runs: {path} is an evaluation of videos, which mode=compare does not support. For the difference of "
                "two, paired by video, with its interval: python -m dinoseg mode=score protocol=NAME reference=ROOT "
                f"prediction=[{path}/masks,OTHER/masks], where NAME is the `protocol` in {path / 'scores.json'}."
            )
    raise UserError(
        f"runs: {folder} holds no {RECORD}: it is not an evaluation of images, or it was made with mode.report=false. "
        f"{_REMEDY}"
    )


def read_record(folder: Path) -> ImageRecord:
    """Read the record in a folder.

    Raises:
        UserError: the record is damaged.
    """
    try:
        _check_size(folder / RECORD, _LARGEST)
        content = forms.read_json(folder / RECORD, _FORM)
        size = 32 * len(content["images"]) * len(content["classes"])
        _check_size(folder / COUNTS, size + _FRAMING)
        counts = forms.read_arrays(folder / COUNTS, {"classes": forms.ArrayForm("<i8", 3, size)})["classes"]
        _check(content, counts)
    except (OSError, forms.SchemaError) as error:
        raise UserError(f"runs: {folder} holds a damaged {RECORD} or {COUNTS} ({error}). {_REMEDY}") from None
    palette = [tuple(colour) for colour in content["palette"]]
    scores = {name: FurtherScore(**score) for name, score in content["scores"].items()}
    return ImageRecord(**{**content, "palette": palette, "scores": scores}, counts=counts)


def _check_size(path: Path, most: int) -> None:
    """Refuse a file above its maximum size before it is read.

    Raises:
        OSError: the file is missing.
        SchemaError: the file is too large (names both sizes).
    """
    if (size := path.stat().st_size) > most:
        raise forms.SchemaError(f"{path.name} has {size} bytes; a valid one has at most {most}")


def _check(content: dict[str, Any], counts: np.ndarray) -> None:
    """Refuse inconsistent numbers.

    Raises:
        SchemaError: naming the inconsistent numbers.
    """
    images, classes = len(content["images"]), len(content["classes"])
    if not 1 <= classes <= _MAX_CLASSES or len(content["palette"]) != classes:
        raise forms.SchemaError(f"it has {classes} classes and {len(content['palette'])} colours")
    if (
        not images
        or counts.shape not in ((images, 3, classes), (images, 4, classes))
        or len(content["units"]) != images
        or len(set(content["images"])) != images
    ):
        raise forms.SchemaError(f"{images} images of {classes} classes have counts {list(counts.shape)}")
    if (content["background"] or 0) >= classes:
        raise forms.SchemaError(f"background {content['background']} is not one of its {classes} classes")
    if taken := content["scores"].keys() & {*ClassScores(classes, 0).keys}:
        raise forms.SchemaError(f"its further scores have the name {min(taken)}, which is that of another score")
    units = len(set(content["units"]))
    for name, score in content["scores"].items():
        if score["better"] not in BETTER or {len(score["left_out"]), len(score["scored"])} != {units}:
            raise forms.SchemaError(
                f"{name:.60} has better={score['better']!r:.20} and the values of {len(score['left_out'])} and "
                f"{len(score['scored'])} units instead of {units}"
            )
    right, reference, predicted = np.moveaxis(counts[:, :3], 1, 0)
    if counts.size and (counts.min() < 0 or counts.max() > 2**40 or (right > np.minimum(reference, predicted)).any()):
        raise forms.SchemaError("its counts are inconsistent")
