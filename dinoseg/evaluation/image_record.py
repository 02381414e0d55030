"""Record of an image evaluation for comparisons: per-image counts and metadata, stored without pickle."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dinoseg.core.metric import Counts
from dinoseg.evaluation.run_facts import EVALUATION, TRACKING
from dinoseg.evaluation.scoring.intervals import UnitScore, has_labels, unit_sums
from dinoseg.report.html.pictures import EvaluatedImages
from dinoseg.utils.atomic import atomic_file, write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_exists, open_regular

RECORD, COUNTS = "evaluation.json", "counts.npz"  # in a run folder
_REMEDY = "Evaluate again: python -m dinoseg mode=eval resume=RUN, where RUN is the run folder of the training."


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
        image_scores: of each image by itself, the main score of metrics of objects by name; None where undefined.
        chosen_here: whether the thresholds of the classes were chosen on this split.
    """

    background: int | None
    data: str
    root: str
    split: str
    source: str
    counts: np.ndarray
    scores: Mapping[str, UnitScore] = field(default_factory=dict)
    chosen_here: bool = False
    image_scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    def count_units(self) -> int:
        """Return the number of different units with labelled pixels, over which intervals are computed."""
        return int(has_labels(unit_sums(self.counts, self.units)).sum())

    @property
    def task(self) -> str:
        """The option of the group `task` of the model."""
        return "multilabel" if self.counts.shape[1] == 4 else "semantic"


def write_record(record: ImageRecord, out_dir: Path, rows: Mapping[str, Sequence[Counts]] | None = None) -> None:
    """Write a record into a run folder: the counts first, so that a JSON file implies complete counts.

    Args:
        record: of the evaluation.
        out_dir: the folder.
        rows: counts of further metrics for each image, by the main score of the metric. The file joins the arrays of
            all images under SCORE/NAME, see `_join_values`.
    """
    content: dict[str, Any] = {key: value for key, value in vars(record).items() if key != "counts"}
    arrays = {"classes": record.counts.astype("<i8")}
    for score, counts in (rows or {}).items():
        for name in counts[0]:
            arrays |= _join_values(f"{score}/{name}", [np.asarray(row[name]) for row in counts])
    with atomic_file(out_dir / COUNTS) as part, part.open("wb") as file:
        # most counts are small or flags: those of the average precision shrink to a tenth
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    content["scores"] = {name: asdict(score) for name, score in record.scores.items()}
    content["palette"] = [[int(level) for level in colour] for colour in record.palette]
    write_json(
        out_dir / RECORD, {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
    )


def _join_values(key: str, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of images as one; those of different lengths one after another, with their ends."""
    if len({value.shape for value in values}) == 1:
        return {key: np.stack(values)}
    return {key: np.concatenate(values), f"{key}/ends": np.cumsum([len(value) for value in values])}


def find_evaluation(folder: Path) -> Path:
    """Return the folder of a run's evaluation record: the run folder, or the evaluation at the end of a training.

    Raises:
        UserError: the folder or the record is missing.
    """
    check_exists(folder, "runs", "Give run folders of mode=eval or mode=train.")
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
        f"runs: {folder} holds no {RECORD}. Give run folders of mode=eval or mode=train on images, without "
        f"mode.report=false. {_REMEDY}"
    )


def read_record(folder: Path) -> ImageRecord:
    """Read the record in a folder.

    Raises:
        UserError: one of its two files is damaged, or of another evaluation.
    """
    with refuse_damage(folder):
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        with open_regular(folder / COUNTS) as file, np.load(file) as arrays:
            counts = arrays["classes"]
        palette = [tuple(colour) for colour in content["palette"]]
        scores = {name: UnitScore(**score) for name, score in content["scores"].items()}
        record = ImageRecord(**{**content, "palette": palette, "scores": scores}, counts=counts)
    if counts.shape[::2] != (len(record.images), len(record.classes)):
        raise UserError(f"runs: {RECORD} and {COUNTS} in {folder} are of two evaluations. {_REMEDY}")
    return record


@contextmanager
def refuse_damage(folder: Path) -> Iterator[None]:
    """Turn errors of reading the record in a folder into one that names the folder.

    Raises:
        UserError: the record is damaged.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(f"runs: {folder} holds a damaged {RECORD} or {COUNTS} ({error}). {_REMEDY}") from None
