"""`training.json` in a run folder: where a training ended, its result, and the score that ranks the runs of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.files import entries, natural_order
from dinoseg.utils.units import read_valid_note
from dinoseg.utils.wording import count_of

END = "training.json"
_RANKING = forms.record(name=forms.text, value=forms.number(), lowest=forms.flag, fold=forms.maybe(forms.whole()))


class Ranking(NamedTuple):
    """Score of the validation split by which a run is compared with others.

    Attributes:
        name: of `trainer.score`.
        value: that of the evaluated weights, or the best validation if the evaluation lacks it.
        lowest: whether the lowest value is the best.
        fold: `data.fold`, since scores of different folds are of different images.
    """

    name: str
    value: float
    lowest: bool
    fold: int | None = None


def write_end(run: Path, step: int, result: Mapping[str, Any] | None = None, ranking: Ranking | None = None) -> None:
    """Record that a training has ended at a step, with the result of its final evaluation if that is written."""
    write_json(run / END, {"step": step, "result": result, "ranking": None if ranking is None else ranking._asdict()})


def read_end(run: Path) -> dict[str, Any]:
    """Return the record of a run; its entries are None if the training has not ended, or the record is damaged."""
    record = read_valid_note(
        run / END, lambda path: forms.read_json(path, forms.object_with()), damaged="%s is damaged (%s): it is ignored."
    )
    return record or {"step": None, "result": None}


def describe_sweep(folder: Path, *, key: str = "resume") -> str:
    """Return how many runs the folder of a sweep holds, and which to give: the best by its validation score."""
    runs = sorted((path for path in entries(folder) if path.is_dir()), key=lambda path: natural_order(path.name))
    count = count_of(runs, "run")
    records: dict[Path, Any] = {run: read_end(run).get("ranking") for run in runs}
    ranked = {run: Ranking(**record) for run, record in records.items() if forms.fits(record, _RANKING)}
    scores = {(ranking.name, ranking.lowest, ranking.fold) for ranking in ranked.values()}
    if len(scores) != 1:
        reason = "of different folds or scores" if scores else "without a final evaluation"
        return f"{folder} is a sweep of {count} {reason}, so none is the best: give one, {key}={folder}/JOB"
    ((name, is_lowest, _),) = scores
    best = (min if is_lowest else max)(ranked, key=lambda run: ranked[run].value)
    return f"{folder} is a sweep of {count}, the best by val/{name} is {best}: give {key}={best}"
