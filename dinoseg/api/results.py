"""Results of modes as Python objects: mappings of names to values, with the folder that holds all files."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np

from dinoseg.report.html.page import format_interval, render
from dinoseg.report.table import MEANS, percent
from dinoseg.utils.errors import UserError

_FIRST = 4  # values in a `repr`
_OFFICIAL = "official_scores.json"


class Results(Mapping[str, Any]):
    """Plain values that a mode returned, by name.

    Attributes:
        folder: the run folder with all files, absolute.

    Examples:
        >>> import dinoseg
        >>> found = dinoseg.Results({"images": 2, "images_per_s": 9.5}, "outputs/demo/predicted")
        >>> found["images"], found
        (2, Results(images 2, images_per_s 9.5))
    """

    def __init__(self, values: Mapping[str, Any], folder: str | PathLike[str]) -> None:
        self._values = dict(values)
        self.folder = Path(folder).expanduser().absolute()

    @classmethod
    def of(cls, returned: Any) -> Self:
        """Return what a mode returned: its values, without the run folder in `run`."""
        return cls({key: value for key, value in returned.items() if key != "run"}, returned["run"])

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all values as a dict, ready for JSON."""
        return dict(self._values)

    def __repr__(self) -> str:
        shown = [f"{label_of(name)} {shown_value(name, value)}" for name, value in [*self.items()][:_FIRST]]
        return f"{type(self).__name__}({', '.join(shown)}{', ...' * (len(self) > _FIRST)})"

    def _repr_html_(self) -> str:
        rows = [[label_of(name), shown_value(name, value)] for name, value in self.items()]
        return html_table([type(self).__name__, ""], [*rows, ["folder", self.folder]])


class Scores(Results):
    """Scores of an evaluation by name, such as `scores["miou"]`: shares in 0..1, counts, or None where undefined.

    Capital letters of names make no difference: `scores["mIoU"]` is the same.

    Args:
        values: content of scores.json.
        folder: the folder of that file.

    Examples:
        >>> import dinoseg
        >>> scores = dinoseg.Run("outputs/demo/train").scores
        >>> 0 <= scores["miou"] <= 1, scores.per_class[0]["class"], scores.confusion.shape
        (True, 'Background', (10, 10))
    """

    def __init__(self, values: Mapping[str, Any], folder: str | PathLike[str]) -> None:
        self._all = dict(values)
        numbers = self._all.get("scores") or self._all  # official protocols have a table of scores
        super().__init__({key: each for key, each in numbers.items() if _is_number(each)}, folder)

    def __getitem__(self, key: str) -> Any:
        """Return a score, in any spelling: protocols call it mIoU, dinoseg miou."""
        names = {name.lower(): name for name in self._values}
        return self._values[key if key in self._values else names.get(str(key).lower(), key)]

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> Self:
        """Return the scores that an evaluation wrote to a folder.

        Raises:
            UserError: the folder has no scores.json, or it cannot be read.
        """
        return cls(read_json(Path(folder) / "scores.json"), folder)

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """Scores of each class, a row with its name and id each; `pandas.DataFrame` takes the list."""
        rows, table = self._all.get("classes") or self._all.get("per_class") or [], self.folder / "scores.csv"
        names = []
        if table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                names = [row["class"] for row in csv.DictReader(file)]
        named = len(names) == len(rows)
        return [({"class": names[number]} if named else {}) | row for number, row in enumerate(rows)]

    @property
    def confusion(self) -> np.ndarray | None:
        """Pixels by true class (rows) and predicted class (columns), (K, K) int64; None for other protocols."""
        matrix = self._all.get("matrix")
        return None if matrix is None else np.array(matrix, dtype=np.int64)

    @property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """95 % interval of each score of an official protocol; None with too few units, empty for other scores."""
        return {name: limits and tuple(limits) for name, limits in self._all.get("ci95", {}).items()}

    @cached_property
    def official(self) -> "Scores | None":
        """Scores by the official protocol of the dataset; None if it has none."""
        path = self.folder / _OFFICIAL
        return Scores(read_json(path), self.folder) if path.is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """Return all of scores.json as a dict: scores, classes and confusion matrix."""
        return dict(self._all)

    def _repr_html_(self) -> str:
        keys = [
            key
            for key in ("class", "iou", "dice", "recall", "precision")
            if any(key in each for each in self.per_class)
        ]
        rows = [[shown_value(key, row.get(key)) for key in keys] for row in self.per_class]
        return super()._repr_html_() + (html_table(keys, rows) if rows else "")


class Comparison(Results):
    """Differences of runs to the first one: `comparison["B"]["miou"]` has value, ci95, p and verdict.

    Attributes:
        first: name of the run that the others are compared with.
        scores: scores of each run, by its name.

    Examples:
        >>> import dinoseg
        >>> compared = dinoseg.compare(["outputs/demo/train", "outputs/demo/half"])
        >>> compared.first, [*compared], sorted(compared.scores)
        ('train', ['half'], ['half', 'train'])
    """

    def __init__(self, values: Mapping[str, Any], folder: str | PathLike[str]) -> None:
        others = values["others"]
        super().__init__({name: other["differences"] for name, other in others.items()}, folder)
        self._all = dict(values)
        self.first: str = values["first"]
        self.scores = {self.first: values["scores"], **{name: other["scores"] for name, other in others.items()}}

    @property
    def intervals(self) -> dict[str, dict[str, tuple[float, float] | None]]:
        """95 % intervals of the differences, by run and score; None with too few images."""
        return {
            name: {key: row["ci95"] and tuple(row["ci95"]) for key, row in rows.items()} for name, rows in self.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all of compare.json as a dict."""
        return dict(self._all)

    def __repr__(self) -> str:
        others = [
            f"{name} {percent(rows['miou']['value'])} ({format_interval(rows['miou']['ci95'])})"
            for name, rows in self.items()
        ]
        return f"Comparison(mIoU points minus {self.first}: {', '.join(others)})"

    def _repr_html_(self) -> str:
        keys = ["value", "ci95", "verdict"]
        rows = [
            [name, label_of(key), percent(row["value"]), format_interval(row["ci95"]), row["verdict"]]
            for name, differences in self.items()
            for key, row in differences.items()
        ]
        heads = [f"minus {self.first}", "score", "points", "95 % interval", keys[-1]]
        return html_table(heads, [*rows, ["folder", self.folder]])


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run folder.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path} ({error}). Give the folder of a finished run.") from None
    return content


def label_of(name: str) -> str:
    """Return the label of a score, such as mIoU for miou."""
    return MEANS.get(name, name)


def shown_value(name: str, value: Any) -> str:
    """Return a value for display; shares of named scores are percent."""
    if isinstance(value, float) and (name in MEANS or name in ("iou", "recall", "precision", "mean_accuracy")):
        return f"{percent(value)} %"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def html_table(heads: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a plain HTML table; all text is escaped."""
    return render("plain_table.html.jinja", heads=heads, rows=rows)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
