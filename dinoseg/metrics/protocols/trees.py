"""Two trees of label files: those of one name belong together, and what fits nowhere is told."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np

from dinoseg.errors import UserError
from dinoseg.images import read_ids
from dinoseg.metrics.protocols.contract import BadFile, Case, Found

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Tree:
    """How label files lie below a folder.

    Args:
        ending: of their names; a file's own name is its path below the folder without it.
        layout: the same in words, for messages.
        depth: folders between the folder and a file, None for any number.
        exclude: a pattern of file names that are something else.
    """

    ending: str = ".png"
    layout: str = "any tree of PNG files"
    depth: int | None = None
    exclude: str = ""

    def files(self, folder: Path, option: str) -> dict[str, Path]:
        """Return name to file, sorted by name.

        Args:
            folder: where to look.
            option: `reference` or `prediction`, for messages.

        Raises:
            UserError: no folder, or no such file at that depth.
        """
        if not folder.is_dir():
            raise UserError(f"{option}={folder} is no folder. Give the folder that holds {self.layout}.")
        every = sorted(_walk(folder))
        fitting = [
            path
            for path in every
            if path.endswith(self.ending) and not (self.exclude and fnmatch(PurePosixPath(path).name, self.exclude))
        ]
        found = [path for path in fitting if self.depth is None or path.count("/") == self.depth]
        if not found:
            raise UserError(self._nothing(folder, option, every, fitting))
        return {path.removesuffix(self.ending): folder / path for path in found}

    def _nothing(self, folder: Path, option: str, every: list[str], fitting: list[str]) -> str:
        start = f"{option}={folder} does not hold {self.layout}"
        if fitting:
            parts = fitting[0].split("/")
            better = folder.joinpath(*parts[: len(parts) - 1 - (self.depth or 0)])
            hint = f" Try {option}={better}." if len(parts) - 1 > (self.depth or 0) else ""
            return f"{start}: {fitting[0]} is not at that depth.{hint}"
        kinds = Counter(PurePosixPath(path).suffix or "no ending" for path in every)
        held = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(_SHOWN)) or "no files"
        example = f", such as {every[0]}" if every else ""
        return f"{start}: no file ends with {self.ending}. It holds {held}{example}. Give the folder that does."


def match(
    reference: Mapping[str, Path],
    prediction: Mapping[str, Path],
    *,
    missing: Callable[[str], Path],
    unit: Callable[[str], str] = str,
) -> Found:
    """Return a case for each reference with a prediction of its name, a problem for each other one.

    Args:
        reference: name to file.
        prediction: likewise.
        missing: where the prediction of a name should lie.
        unit: what a name belongs to.
    """
    cases = [
        Case(name, unit(name), ((file, prediction[name]),)) for name, file in reference.items() if name in prediction
    ]
    problems = [
        (missing(name), f"is missing: {file} has no prediction. Add it.")
        for name, file in reference.items()
        if name not in prediction
    ]
    return Found(cases, problems, extra(prediction.keys() - reference.keys()))


def extra(names: Iterable[str]) -> list[str]:
    """Return a note for each folder that holds predictions without reference."""
    by_folder: dict[str, list[str]] = {}
    for name in sorted(names):
        parent, _, stem = name.rpartition("/")
        by_folder.setdefault(parent or ".", []).append(stem)
    return [
        f"{len(stems)} predictions in {folder} have no reference and are not scored: {', '.join(stems[:_SHOWN])}"
        + (f" and {len(stems) - _SHOWN} more" if len(stems) > _SHOWN else "")
        for folder, stems in by_folder.items()
    ]


def read_labels(path: Path) -> np.ndarray:
    """Return the ids (H, W) of a label file, of any integer type.

    Raises:
        BadFile: it is missing, unreadable or in colours.
    """
    try:
        ids = read_ids(path)
    except UserError as error:
        raise BadFile(path, str(error).replace(f"{path} ", "it ")) from None
    if ids.ndim != 2:
        raise BadFile(path, f"has {ids.shape[2]} channels. Label files have one: write ids as a grey or palette PNG.")
    return ids


def read_both(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a case's only reference and prediction.

    Raises:
        BadFile: one is unreadable, or their sizes differ.
    """
    (file, predicted_file), *_ = case.files
    assert predicted_file is not None
    reference, prediction = read_labels(file), read_labels(predicted_file)
    if reference.shape != prediction.shape:
        sizes = [f"{ids.shape[1]} x {ids.shape[0]}" for ids in (prediction, reference)]
        raise BadFile(
            predicted_file,
            f"is {sizes[0]} (width x height), its reference {sizes[1]}. Predict at the reference's size.",
        )
    return reference, prediction


def refuse_ids(ids: np.ndarray, wrong: np.ndarray, path: Path, rule: str) -> None:
    """Refuse a file whose ids are wrong somewhere.

    Args:
        ids: (H, W).
        wrong: (H, W) bool, True = has no meaning.
        path: the file.
        rule: what ids there are, and what to do.

    Raises:
        BadFile: naming the first wrong ids.
    """
    if wrong.any():
        held = [str(number) for number in np.unique(ids[wrong])]
        more = f" and {len(held) - _SHOWN} others" if len(held) > _SHOWN else ""
        raise BadFile(path, f"holds the ids {', '.join(held[:_SHOWN])}{more} in {wrong.sum()} pixels. {rule}")


def _walk(folder: Path) -> Iterable[str]:
    """Yield the path of every visible file below a folder, with slashes."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.startswith("."):
                yield Path(parent, file).relative_to(folder).as_posix()
